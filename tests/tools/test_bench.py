"""``qat2int8 bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qat2int8.pipelines.benchmarking import networks, suite
from qat2int8.pipelines.benchmarking.child import CommandFailed, Cost
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.tools.cli import app


def bench(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, list[str]]]:
    """What was to be measured; float takes 10 ms, ours 4 ms."""
    seen: list[tuple[str, str, int, list[str]]] = []

    def measure(name: str, style: str, *, rounds: int, repeat: int, against: list[str]) -> suite.Result:
        seen.append((name, style, rounds, against))
        if name == "vgg16":
            raise CommandFailed("killed")
        runs = {form: [seconds] * rounds for form, seconds in (("float", 0.01), ("qat2int8", 0.004))}
        return suite.Result(name, style, runs, {"qat2int8": Cost(1.5, 2_000_000)}, {})

    monkeypatch.setattr(suite, "measure", measure)
    return seen


def test_the_table_has_the_published_shape(asked: list[tuple[str, str, int, list[str]]]) -> None:
    output = bench("resnet50", "ernie", "googlenet", "--markdown").stdout
    assert "| network | FP32 img/s | INT8 img/s | ratio | 6271 FP32 | INT8 | ratio |" in output
    assert "| ResNet-50 | 100 | 250 | 2.50x | 13.15 | 49.33 | 3.75x |" in output
    assert "| ERNIE | 10.00 ms | 4.00 ms | 2.50x | 236.72 ms | 83.20 ms | 2.85x |" in output
    assert "| GoogleNet | 100 | 250 | 2.50x | - | - | - |" in output
    assert "| ResNet-50 | 1.5 s | 2 MB |" in output
    assert "Xeon Gold 6271" in output
    assert [name for name, *_ in asked] == ["googlenet", "resnet50", "ernie"]


def test_what_is_measured(asked: list[tuple[str, str, int, list[str]]]) -> None:
    assert bench("--quick", "--no-peers", "--quiet").stdout == ""
    assert asked == [(name, "layer-inputs", 3, []) for name in suite.QUICK]
    asked.clear()
    bench("ernie", "--style", "both", "--rounds", "4")
    assert [each[:3] for each in asked] == [("ernie", style, 4) for style in suite.STYLES]
    assert asked[0][3][0] == suite.STATIC
    asked.clear()
    bench()
    assert [name for name, *_ in asked] == list(suite.SUITE)


def test_the_rest_is_reported_when_a_network_fails(asked: list[tuple[str, str, int, list[str]]]) -> None:
    result = bench("vgg16", "resnet50", "--json")
    assert result.exit_code == 2
    assert result.stderr == "error: vgg16 (layer-inputs): killed\n"
    document = json.loads(result.stdout)
    assert [each["network"] for each in document["results"]] == ["resnet50"]
    assert document["failures"] == [{"network": "vgg16", "style": "layer-inputs", "reason": "killed"}]


def test_a_run_is_compared_with_the_one_before(
    asked: list[tuple[str, str, int, list[str]]], tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    first = bench("resnet50", "--history", str(path)).stdout
    assert "no earlier run of this machine" in first
    document = json.loads(bench("resnet50", "--history", str(path), "--json").stdout)
    (change,) = document["changes"]
    assert (change["contender"], change["before"], change["now"], change["percent"]) == ("qat2int8", 2.5, 2.5, 0.0)
    assert len(path.read_text().splitlines()) == 2
    assert "+0.0 %" in bench("resnet50", "--history", str(path)).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet5"], "no network is called 'resnet5' (there are googlenet"),
        (["--style", "odd"], "no style is called 'odd'"),
        (["--rounds", "0"], "--rounds"),
        (["--history", "no such folder/runs.jsonl"], "there is no such folder"),
        (["--history", __file__], "test_bench.py:1: not a run that bench wrote"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], told: str, asked: list[tuple[str, str, int, list[str]]]
) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert asked == []


@pytest.mark.slow
def test_a_tiny_network_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> suite.Write:
        drawn = networks.tiny_resnet.drawn()
        return lambda style: drawn.write(fake_quant=style is not None, every_tensor=style == "every-tensor")

    network = suite.Network("Tiny", draw, lambda count, seed: images(count, 16, seed))
    monkeypatch.setitem(suite.SUITE, "resnet50", network)
    result = bench("resnet50", "--style", "both", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [each["style"] for each in document["results"]] == list(suite.STYLES)
    for each in document["results"]:
        assert set(each["contenders"]) >= {"float", "as exported", "qat2int8", "quantize_static"}
        assert all(one["milliseconds"] > 0 and len(one["seconds"]) == 2 for one in each["contenders"].values())
        assert all(one["seconds"] > 0 and one["peak_bytes"] > 10_000_000 for one in each["conversion"].values())
        assert each["published"]["ratio"] == 3.75
