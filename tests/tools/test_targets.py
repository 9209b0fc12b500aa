"""``qat2int8 targets``: what there is, and what one takes."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from support import REPOSITORY
from typer.testing import CliRunner, Result

from qat2int8.pipelines.target_files import load_target, target_names
from qat2int8.tools.cli import app


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["targets", *words])


def test_all_targets_are_listed() -> None:
    table, native = invoke().stdout.split("\n\n")
    listed = [line.split()[0] for line in table.splitlines()[2:] if not line.startswith(" ")]
    assert listed == list(target_names())
    assert native == f"native stands for the one for this machine: {load_target('native').name}.\n"


def test_one_is_shown_with_its_fields_and_ops() -> None:
    shown = invoke("tensorrt").stdout
    assert shown.startswith("tensorrt: TensorRT")
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if len(line.split()) > 1}
    assert rows["zero_point"] == ["symmetric"]
    assert rows["int32_bias"] == ["no"]
    assert rows["rewrites"] == ["-"]
    assert rows["Add"] == ["residual", "-", "no"]
    ort = " ".join(invoke("ort-x86").stdout.split())
    assert "Gemm compute Relu, Clip yes" in ort
    assert "optimize-int8, pad-channels" in ort


def test_the_document_holds_what_the_file_says() -> None:
    for name in target_names():
        document = json.loads(invoke(name, "--json").stdout)
        written = yaml.safe_load((REPOSITORY / "pipelines" / "targets" / f"{name}.yaml").read_text())
        assert {key: document[key] for key in written if key != "ops"} == {
            key: value for key, value in written.items() if key != "ops"
        }
        for op, rule in written["ops"].items():
            assert {key: document["ops"][op][key] for key in rule} == rule
    assert [each["name"] for each in json.loads(invoke("--json").stdout)] == list(target_names())


def test_a_file_of_ones_own_is_shown_and_a_wrong_name_corrected(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((REPOSITORY / "pipelines" / "targets" / "ort-x86.yaml").read_text().replace("ort-x86", "own"))
    assert invoke(str(own)).stdout.startswith("own: ")
    result = invoke("tensort")
    assert result.exit_code == 2
    assert "did you mean 'tensorrt'?" in result.stderr
