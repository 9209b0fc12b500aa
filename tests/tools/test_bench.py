"""``qat2int8 bench``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eight_networks
import pytest
import report
from typer.testing import CliRunner

from qat2int8.pipelines import environment as environment_module
from qat2int8.pipelines.benchmarking import networks, peer, suite
from qat2int8.pipelines.benchmarking.child import CommandFailed, Cost
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.tools.cli import app


def bench(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, list[str]]]:
    """What was to be measured; float takes 10 ms, ours 4 ms."""
    seen: list[tuple[str, str, int, list[str]]] = []

    def measure(
        name: str, style: str, *, rounds: int, repeat: int, against: list[str], tell: Callable[[str], object]
    ) -> suite.Result:
        seen.append((name, style, rounds, against))
        tell("building")
        if name == "vgg16":
            raise CommandFailed("killed")
        if name == "vgg19":
            raise MemoryError
        if name == "ernie" and style == "every-tensor":
            raise KeyboardInterrupt
        runs = {form: [seconds] * rounds for form, seconds in (("float", 0.01), ("qat2int8", 0.004))}
        return suite.Result(name, style, runs, {"qat2int8": Cost(1.5, 2_000_000)}, {"openvino": "too new"}, 1)

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
    bench("resnet50", "--style", "both", "--rounds", "4")
    assert [each[:3] for each in asked] == [("resnet50", style, 4) for style in suite.STYLES]
    assert asked[0][3][0] == suite.STATIC
    asked.clear()
    bench()
    assert [name for name, *_ in asked] == list(suite.SUITE)


def test_the_rest_is_reported_when_networks_fail(asked: list[tuple[str, str, int, list[str]]]) -> None:
    result = bench("vgg16", "vgg19", "resnet50", "--json")
    assert result.exit_code == 2
    assert result.stderr == "error: vgg16 (layer-inputs): killed\nerror: vgg19 (layer-inputs): MemoryError\n"
    document = json.loads(result.stdout)
    assert [each["network"] for each in document["results"]] == ["resnet50"]
    assert document["failures"] == [
        {"network": "vgg16", "style": "layer-inputs", "reason": "killed"},
        {"network": "vgg19", "style": "layer-inputs", "reason": "MemoryError"},
    ]
    assert "Traceback" not in bench("vgg16").stderr
    assert "CommandFailed: killed" in bench("vgg16", "--debug").stderr


def test_an_interrupted_run_prints_and_keeps_what_was_measured(
    asked: list[tuple[str, str, int, list[str]]], tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    words = ("mobilenet_v1", "ernie", "--style", "both", "--history", str(path))
    result = bench(*words)
    assert result.exit_code == 130
    assert "style every-tensor" in result.stdout
    assert result.stdout.count("MobileNet-V1") == 6
    assert result.stderr.endswith("not measured: ernie (every-tensor)\ninterrupted\n")
    (run,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["network"], each["style"]) for each in run["results"]] == [
        ("mobilenet_v1", "layer-inputs"),
        ("ernie", "layer-inputs"),
        ("mobilenet_v1", "every-tensor"),
    ]
    assert run["missing"] == [{"network": "ernie", "style": "every-tensor"}]
    result = bench("ernie", "resnet50", "--style", "every-tensor")
    assert result.exit_code == 130
    assert "ResNet-50" in result.stdout
    result = bench("ernie", "--style", "every-tensor")
    assert (result.exit_code, result.stdout) == (130, "")


def test_progress_says_what_happens_and_how_long_it_took(asked: list[tuple[str, str, int, list[str]]]) -> None:
    told = bench("vgg16", "resnet50").stderr
    assert "[1/2] resnet50 (layer-inputs): building ... 0 s\n" in told
    assert "[2/2] vgg16 (layer-inputs): building ... failed after 0 s\n" in told
    assert bench("resnet50", "--quiet").stderr == ""


def test_what_figures_are_worth_is_told(
    asked: list[tuple[str, str, int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def machine(flags: tuple[str, ...], load: float) -> None:
        found = environment_module.Environment("a processor", flags, 2, load, {"onnxruntime": "1.0"}, "2026-01-01")
        monkeypatch.setattr(environment_module, "environment", lambda: found)

    monkeypatch.setattr(environment_module, "products_overflow", lambda: True)
    machine((), 9.0)
    result = bench("resnet50")
    assert "\nwarning: Of this processor: it has no instruction for products of bytes" in result.stdout
    assert "warning: the machine is busy" in result.stdout
    assert result.stderr.startswith("warning: the machine is busy")
    assert "one thread, pinned to one core, median of 11 interleaved rounds of 3 calls" in result.stdout
    assert "warning: resnet50 (layer-inputs): openvino is left out: too new" in result.stdout
    assert "a processor (no VNNI); onnxruntime 1.0; 2026-01-01." in result.stdout
    machine(("avx512_vnni",), 0.1)
    result = bench("resnet50")
    assert "\nOf this processor: it multiplies bytes in one instruction" in result.stdout
    assert "busy" not in result.output


def test_what_is_not_installed_is_told(
    asked: list[tuple[str, str, int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    assert "pip install 'qat2int8[bench]'" in bench("resnet50").stdout
    assert [each[3] for each in asked] == [[suite.STATIC]]
    assert "pip install" not in bench("resnet50", "--no-peers").stdout
    monkeypatch.setattr(suite, "find_spec", lambda name: name)
    assert "pip install" not in bench("resnet50").stdout
    assert asked[-1][3] == [suite.STATIC, suite.OPENVINO]


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


def test_the_document_is_told_of(asked: list[tuple[str, str, int, list[str]]]) -> None:
    document = json.loads(bench("resnet50", "--json").stdout)
    (paragraph,) = re.findall(r"^`--json` holds .*?\n\n", (report.DOCS / "benchmarks.md").read_text(), re.M | re.S)
    (result,) = document["results"]
    known = [*document, *result, *result["contenders"]["float"], *result["conversion"]["qat2int8"]]
    assert set(re.findall(r"`(\w+)`", paragraph)) == set(known)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of ResNet-50."""

    def draw() -> suite.Write:
        drawn = networks.tiny_resnet.drawn()
        return lambda style: drawn.write(fake_quant=style is not None, every_tensor=style == "every-tensor")

    network = suite.Network("Tiny", draw, lambda count, seed: images(count, 16, seed))
    monkeypatch.setitem(suite.SUITE, "resnet50", network)


@pytest.mark.slow
def test_a_tiny_network_from_end_to_end(tiny: None) -> None:
    result = bench("resnet50", "--style", "both", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [each["style"] for each in document["results"]] == list(suite.STYLES)
    for each in document["results"]:
        assert set(each["contenders"]) == {"float", "as exported", "qat2int8", *suite.peers()}
        assert all(one["milliseconds"] > 0 and len(one["seconds"]) == 2 for one in each["contenders"].values())
        assert set(each["conversion"]) == {"qat2int8", "quantize_static"}
        assert all(one["seconds"] > 0 and one["peak_bytes"] > 10_000_000 for one in each["conversion"].values())
        assert each["published"]["ratio"] == 3.75
        assert each["left_out"] == {}


@pytest.mark.slow
def test_a_peer_that_fails_is_left_out(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, sample: object) -> Any:
        assert path.name == "as_exported.onnx"
        raise RuntimeError("not for me\nat line 3")

    monkeypatch.setattr(peer, "openvino_caller", refuse)
    monkeypatch.setattr(peer, "cost_of", lambda *_: (_ for _ in ()).throw(CommandFailed("no memory")))
    doing: list[str] = []
    against = [suite.STATIC, suite.OPENVINO]
    result = suite.measure("resnet50", "layer-inputs", rounds=1, repeat=1, against=against, tell=doing.append)
    assert result.left_out == {"quantize_static": "no memory", "openvino": "not for me"}
    assert set(result.runs) == {"float", "as exported", "qat2int8"}
    assert doing == ["building", "converting", "quantize_static", "timing"]


@pytest.mark.slow
def test_the_tables_get_into_the_documents(tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marked = "before\n<!-- begin bench -->\nplaceholder\n<!-- end bench -->\nafter\n"
    pages = [tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text(marked)
    monkeypatch.setattr(report, "README", pages[0])
    monkeypatch.setattr(report, "DOCS", pages[1].parent)
    words = ["eight_networks.py", "resnet50", "--rounds", "1", "--style", "layer-inputs", "--write"]
    monkeypatch.setattr(sys, "argv", words)
    eight_networks.main()
    short, full = (page.read_text() for page in pages)
    for text in (short, full):
        assert text.startswith("before\n<!-- begin bench -->\n")
        assert text.endswith("\n<!-- end bench -->\nafter\n")
        assert "placeholder" not in text
        assert environment_module.environment().summary in text
    assert "| network | FP32 img/s | INT8 img/s | ratio | 6271 ratio |" in short
    assert re.search(r"^\| Tiny \| \d+ \| \d+ \| [\d.]+x \| 3.75x \|$", short, re.MULTILINE)
    assert "| network | FP32 img/s | INT8 img/s | ratio | 6271 FP32 | INT8 | ratio |" in full
    assert "| network | qat2int8 | memory | quantize_static | memory |" in full
    assert max(map(len, full.splitlines())) <= 120
