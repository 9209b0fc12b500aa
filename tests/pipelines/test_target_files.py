from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from qat2int8.ir import Contract, PipelineError
from qat2int8.passes import all_passes
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target, target_names

OWN = """
name: own
description: mine
activation: int8
zero_point: symmetric
per_channel_weights: false
int32_bias: true
min_opset: 13
max_opset: 21
max_ir_version: 10
ops:
  Conv: {contract: compute, weight_axis: 0, absorbs: [Relu]}
"""


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", target_names())
def test_every_shipped_target_loads_and_is_called_like_its_file(name: str) -> None:
    assert load_target(name).name == name


def test_the_default_target_says_what_its_file_says() -> None:
    target = load_target(DEFAULT_TARGET)
    assert (target.activation, target.zero_point, target.per_channel_weights) == ("uint8", "any", True)
    assert target.ops["MatMul"].data_inputs == (0, 1)
    assert target.ops["Conv"].contract is Contract.COMPUTE
    assert target.ops["Conv"].weight_axis == 0
    assert target.ops["MaxPool"].absorbs == ()


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    target = load_target(own(tmp_path, OWN))
    assert (target.name, target.activation, target.max_opset) == ("own", "int8", 21)
    assert target.ops["Conv"].absorbs == ("Relu",)


@pytest.mark.parametrize(
    ("old", "new", "line", "says", "remedy"),
    [
        ("absorbs", "absorb", 12, "unknown key 'ops.Conv.absorb'", "did you mean 'absorbs'?"),
        ("int32_bias", "int32_bis", 7, "unknown key 'int32_bis'", "did you mean 'int32_bias'?"),
        ("contract: compute", "contract: think", 12, "ops.Conv.contract", ""),
        ("activation: int8", "activation: int4", 4, "activation", ""),
        ("min_opset: 13", "min_opset: x", 8, "min_opset", ""),
    ],
)
def test_a_mistake_in_the_file_is_reported_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, says: str, remedy: str
) -> None:
    path = own(tmp_path, OWN.replace(old, new))
    with pytest.raises(PipelineError) as caught:
        load_target(path)
    assert caught.value.where == f"{path}:{line}"
    assert says in caught.value.what
    assert remedy in caught.value.remedy


def test_a_missing_key_is_reported(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="'max_opset' is missing"):
        load_target(own(tmp_path, OWN.replace("max_opset: 21\n", "")))


def test_opset_limits_that_cross_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="min_opset 13 is above max_opset 12"):
        load_target(own(tmp_path, OWN.replace("max_opset: 21", "max_opset: 12")))


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PipelineError, match=r"no target is called 'ort-x68' \(did you mean 'ort-x86'\?\)"):
        load_target("ort-x68")
    with pytest.raises(PipelineError, match=r"known: .*ort-x86"):
        load_target("zzz")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none\.yaml: cannot be read: No such file"):
        load_target(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="not UTF-8"):
        load_target(binary)


def test_every_rule_of_a_shipped_file_reaches_the_target() -> None:
    from importlib import resources

    for name in target_names():
        text = resources.files("qat2int8.pipelines.targets").joinpath(f"{name}.yaml").read_text()
        for op, written in yaml.safe_load(text)["ops"].items():
            rule = load_target(name).ops[op]
            for key, value in written.items():
                assert getattr(rule, key) == (tuple(value) if isinstance(value, list) else value), (name, op, key)


def test_rewrites_have_to_be_passes_a_target_can_ask_for(tmp_path: Path) -> None:
    for name, remedy in (
        ("pad-stem-chanels", "did you mean 'pad-stem-channels'"),
        ("cleanup", "known: add-to-sum, average-"),
    ):
        with pytest.raises(PipelineError, match=f"'{name}' among the rewrites.*{remedy}"):
            load_target(own(tmp_path, OWN.replace("ops:", f"rewrites: [{name}]\nops:")))


def test_every_pass_that_pays_on_some_targets_is_asked_for_by_one() -> None:
    asked = {rewrite for name in target_names() for rewrite in load_target(name).rewrites}
    assert asked == {name for name, cls in all_passes().items() if cls.per_target}


def test_signed_grids_behind_a_relu_are_left_to_targets_that_leave_the_relu_in_the_graph() -> None:
    for name in target_names():
        target = load_target(name)
        absorbs = any(rule.absorbs for rule in target.ops.values())
        assert ("update-relu-output-scales" in target.rewrites) == absorbs


@pytest.mark.parametrize(
    ("machine", "overflows", "name"),
    [
        ("x86_64", False, "ort-x86"),
        ("AMD64", True, "ort-x86-avx2"),
        ("aarch64", False, "ort-arm"),
        ("arm64", False, "ort-arm"),
    ],
)
def test_native_is_the_one_for_this_machine(
    machine: str, overflows: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("qat2int8.pipelines.target_files.products_overflow", lambda: overflows)
    assert load_target("native") == load_target(name)


def test_the_targets_for_x86_differ_in_what_overflows_only() -> None:
    with_vnni, without = load_target("ort-x86"), load_target("ort-x86-avx2")
    signing = "sign-matmul-operands"
    assert (
        dataclasses.replace(
            with_vnni,
            name=without.name,
            description=without.description,
            product_sums="narrow",
            rewrites=tuple(name for name in with_vnni.rewrites if name != signing),
        )
        == without
    )
