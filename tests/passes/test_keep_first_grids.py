from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import HEADER, TARGET, apply, check_pass, parse, run

from qat2int8.ir import INT8, UINT8, Code, Contract, OpRule, Provenance, QuantParams
from qat2int8.passes import Context, PassResult
from qat2int8.passes.keep_first_grids import FirstGrid, KeepFirstGrids
from qat2int8.pipelines.certificate import Certificate
from qat2int8.pipelines.convert import convert

LOOKUP = {"LeakyRelu": OpRule(Contract.ELEMENTWISE)}
POOL = {"MaxPool": OpRule(Contract.MOVEMENT)}
CTX = Context(replace(TARGET, ops={**TARGET.ops, **LOOKUP, **POOL}))
INPUT, WEIGHT = QuantParams.make(0.25, 0, UINT8), QuantParams.make(0.5, 0, INT8)
FIRST, SECOND = QuantParams.make(0.5, 0, INT8, origin="fake quant 'f'"), QuantParams.make(0.2, 0, UINT8)
BEFORE = """g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {2}> {
  [c] a = Conv (x, w)
  [r] y = Relu (a)
}"""
AFTER = BEFORE.replace("Relu", "LeakyRelu <alpha = 0.0>")
SCALES = {"x": INPUT, "w": WEIGHT, "a": FIRST, "y": SECOND}


def changed(
    scales: dict[str, QuantParams],
    mode: FirstGrid = FirstGrid.AUTO,
    body: str = BEFORE,
    ctx: Context = CTX,
) -> tuple[PassResult, dict[str, QuantParams], list[str]]:
    """What the pass says, the table behind it and the types of the nodes."""
    model = parse(body)
    for name, params in scales.items():
        model.scales.set(model.values()[name], params)
    result = apply(KeepFirstGrids(mode), model, ctx)
    table = {value.name or "": params for value, params in model.scales.items()}
    return result, table, [node.op_type for node in model.nodes()]


def test_a_relu_behind_a_coarse_grid_rounds_itself() -> None:
    model, result = check_pass(KeepFirstGrids(), BEFORE, AFTER, scales=SCALES, ctx=CTX)
    assert result.counts == {"kept": 1, "dropped": 0}
    assert not result.diagnostics
    assert model.scales[model.values()["a"]].same_grid(FIRST)


def test_a_clip_from_zero_leaves_its_other_end_to_the_second_grid() -> None:
    top = ", float zero = {0}, float top = {60}> {"
    before = BEFORE.replace("> {", top).replace("Relu (a)", "Clip (a, zero, top)")
    check_pass(KeepFirstGrids(), before, AFTER.replace("> {\n  [c]", top + "\n  [c]"), scales=SCALES, ctx=CTX)


@pytest.mark.parametrize(("step", "kept"), [(0.41, True), (0.4, False), (0.399, False), (0.3, False)])
def test_auto_keeps_what_could_move_a_level_by_more_than_one(step: float, kept: bool) -> None:
    result, table, ops = changed({**SCALES, "a": QuantParams.make(step, 10, UINT8)})
    assert ops == ["Conv", "LeakyRelu" if kept else "Relu"]
    assert result.counts == {"kept": int(kept), "dropped": int(not kept)}
    assert ("a" in table) == kept


def test_what_is_left_out_is_said() -> None:
    result, _, _ = changed({**SCALES, "a": FIRST.with_(scale=np.float32(0.3))}, FirstGrid.DROP)
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.FAKE_QUANT_DROPPED, "c", "a")
    assert "fake quant 'f'" in note.reason
    assert "0.75 levels: as asked" in note.reason


def test_two_small_steps_count_together_in_front_of_a_pool() -> None:
    body = """g (float[1,1,2,2] x) => (float[1,1,1,1] p) <float[1,1,1,1] w = {2}> {
      [c] a = Conv (x, w)
      [r] y = Relu (a)
      [m] p = MaxPool <kernel_shape = [2, 2]> (y)
    }"""
    scales = {**SCALES, "a": QuantParams.make(0.21, 0, UINT8), "y": QuantParams.make(0.205, 0, UINT8)}
    assert changed(scales, body=body)[2][1] == "Relu"
    assert changed({**scales, "p": SECOND}, body=body)[2][1] == "LeakyRelu"
    assert changed({**scales, "p": QuantParams.make(0.21, 0, UINT8)}, body=body)[2][1] == "Relu"


def test_a_second_grid_that_reaches_past_the_first_was_trained_without_it() -> None:
    short = QuantParams.make(0.5, 200, UINT8)  # ends at 27.5
    assert changed({**SCALES, "a": short, "y": QuantParams.make(0.12, 0, UINT8)})[2][1] == "LeakyRelu"
    result, table, ops = changed({**SCALES, "a": short})
    assert ops[1] == "Relu"
    assert "a" not in table
    assert "did not compute the first" in result.diagnostics[0].reason
    assert changed({**SCALES, "a": short}, FirstGrid.KEEP)[2][1] == "LeakyRelu"


@pytest.mark.parametrize(
    ("mode", "op"), [(FirstGrid.KEEP, "LeakyRelu"), (FirstGrid.AUTO, "Relu"), (FirstGrid.DROP, "Relu")]
)
def test_the_option(mode: FirstGrid, op: str) -> None:
    assert changed({**SCALES, "a": FIRST.with_(scale=np.float32(0.3))}, mode)[2][1] == op
    assert changed(SCALES, mode)[2][1] == ("Relu" if mode is FirstGrid.DROP else "LeakyRelu")


@pytest.mark.parametrize(
    "scales",
    [
        {"a": QuantParams.make(0.2, 9, UINT8)},
        {"a": FIRST.with_(source=Provenance.DERIVED)},
        {"y": SECOND.with_(source=Provenance.DERIVED)},
        {"y": QuantParams.make(0.2, 100, UINT8)},
        {"a": QuantParams.make([0.5, 0.5], 0, INT8, axis=1)},
        {"w": None},
        {"x": None},
        {"a": None},
    ],
    ids=[
        "one step",
        "a derived first",
        "a derived second",
        "a Relu in float",
        "per channel",
        "a float weight",
        "a float input",
        "no first",
    ],
)
def test_all_else_stays(scales: dict[str, QuantParams | None]) -> None:
    given = {name: params for name, params in {**SCALES, **scales}.items() if params is not None}
    result, table, ops = changed(given, FirstGrid.KEEP)
    assert ops == ["Conv", "Relu"]
    assert not result.modified
    assert set(table) == set(given)


def test_a_target_without_the_table_says_so() -> None:
    result, _, ops = changed(SCALES, FirstGrid.KEEP, ctx=Context(TARGET))
    assert ops[1] == "Relu"
    assert "test has no integer LeakyRelu" in result.diagnostics[0].reason


def test_a_second_reader_of_the_layer_keeps_its_grid_anyway() -> None:
    body = BEFORE.replace("(float[1,1,2,2] y)", "(float[1,1,2,2] y, float[1,1,2,2] b)")
    body = body.replace("[r]", "[n] b = Neg (a)\n  [r]")
    assert changed(SCALES, body=body)[2] == ["Conv", "Neg", "Relu"]


# Through the whole conversion


def source(steps: tuple[float, float], zeros: tuple[int, int], type_: str, activation: str) -> onnx.ModelProto:
    """Two convolutions, all of whose products and sums are exact, with two grids between them."""
    rng = np.random.default_rng(7)
    weights = [", ".join(f"{level / 16}" for level in rng.integers(-127, 128, 4 * 4)) for _ in range(2)]
    text = f"""{HEADER}
    g (float[1,4,8,8] x) => (float[1,4,8,8] y)
      <float sx = {{0.0625}}, {type_} zx = {{{0 if type_ == "int8" else 128}}},
       float sw = {{0.0625}}, int8 zw = {{0}},
       float s1 = {{{steps[0]!r}}}, {type_} z1 = {{{zeros[0]}}}, float s2 = {{{steps[1]!r}}},
       {type_} z2 = {{{zeros[1]}}}, float lo = {{0}}, float hi = {{6}},
       float[4,4,1,1] w = {{{weights[0]}}}, float[4,4,1,1] v = {{{weights[1]}}}> {{
      xq = QuantizeLinear (x, sx, zx)
      xd = DequantizeLinear (xq, sx, zx)
      wq = QuantizeLinear (w, sw, zw)
      wd = DequantizeLinear (wq, sw, zw)
      c = Conv (xd, wd)
      cq = QuantizeLinear (c, s1, z1)
      cd = DequantizeLinear (cq, s1, z1)
      r = {activation}
      rq = QuantizeLinear (r, s2, z2)
      rd = DequantizeLinear (rq, s2, z2)
      vq = QuantizeLinear (v, sw, zw)
      vd = DequantizeLinear (vq, sw, zw)
      e = Conv (rd, vd)
      eq = QuantizeLinear (e, s1, z1)
      y = DequantizeLinear (eq, s1, z1)
    }}"""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def differences(proto: onnx.ModelProto, mode: str, folder: Path) -> tuple[np.ndarray, Certificate]:
    """Between the outputs of the file and of what it is converted to, in levels of the first grid."""
    path = folder / "source.onnx"
    onnx.save(proto, path)
    conversion = convert(path, options={"keep-first-grids": {"first_grid": mode}})
    x = np.random.default_rng(3).uniform(-8, 8, (1, 4, 8, 8)).astype(np.float32)
    (step,) = (onnx.numpy_helper.to_array(each) for each in proto.graph.initializer if each.name == "s1")
    (expected,), (actual,) = run(proto, {"x": x}), run(conversion.model, {"x": x}, optimize=True)
    return np.abs(np.rint((actual - expected) / step)), conversion.certificate


@settings(max_examples=25, deadline=None)
@given(
    first=st.sampled_from([0.25, 0.5, 1.0]),
    ratio=st.floats(0.3, 0.49),
    zero=st.integers(-100, 20),
    signed=st.booleans(),
    activation=st.sampled_from(["Relu (cd)", "Clip (cd, lo, hi)"]),
)
def test_both_roundings_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    first: float,
    ratio: float,
    zero: int,
    signed: bool,
    activation: str,
) -> None:
    second = float(np.float32(first * ratio))
    if activation.startswith("Clip"):
        second = min(second, float(np.float32(6 / 255)))
    type_, lowest = ("int8", -128) if signed else ("uint8", 0)
    shift = 0 if signed else 128
    proto = source((first, second), (zero + shift, lowest), type_, activation)
    moved, certificate = differences(proto, "keep", tmp_path_factory.mktemp("two"))
    assert moved.max() <= 1
    # A value between two levels may go either way where the second convolution ends.
    assert (moved > 0).mean() < 0.01
    assert certificate.executed["QLinearLeakyRelu"] == 1
    assert certificate.integer_macs_percent == 100


def test_one_rounding_is_another_network(tmp_path: Path) -> None:
    proto = source((1.0, 0.4), (128, 0), "uint8", "Relu (cd)")
    assert differences(proto, "auto", tmp_path)[0].max() <= 1
    moved, certificate = differences(proto, "drop", tmp_path)
    assert moved.max() > 1
    assert "QLinearLeakyRelu" not in certificate.executed
