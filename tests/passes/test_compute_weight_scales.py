from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from support import TARGET, apply, parse

from qat2int8.ir import Code, Contract, Model, OpRule, Provenance, QuantDType, QuantParams, Severity
from qat2int8.passes import Context, PassResult
from qat2int8.passes.compute_weight_scales import ComputeWeightScales

COMPUTE = Contract.COMPUTE
OPS = {
    "Conv": OpRule(COMPUTE, weight_axis=0),
    "ConvTranspose": OpRule(COMPUTE, weight_axis=1),
    "Gemm": OpRule(COMPUTE, weight_axis=1),
    "MatMul": OpRule(COMPUTE, weight_axis=1),
    "Add": OpRule(Contract.ELEMENTWISE),
}
CTX = Context(replace(TARGET, ops=OPS))
INPUT = QuantParams.make(0.1)


def compute(text: str, ctx: Context = CTX, given: str = "x") -> tuple[Model, PassResult]:
    model = parse(text)
    if given:
        model.scales.set(model.values()[given], INPUT)
    return model, apply(ComputeWeightScales(), model, ctx)


def grid_of(model: Model, name: str = "w") -> QuantParams | None:
    return model.scales.get(model.values()[name])


def conv(
    weights: str = "{1, -127, 0, 0, 2, 0.5}", body: str = "[conv] y = Conv <pads = [0, 0, 0, 1]> (x, w)"
) -> str:
    return f"g (float[1, 1, 4, 4] x) => (float[1, 3, 4, 4] y) <float[3, 1, 1, 2] w = {weights}> {{ {body} }}"


def test_each_output_channel_gets_its_largest_magnitude_over_127() -> None:
    model, result = compute(conv())
    grid = grid_of(model)
    assert grid is not None
    np.testing.assert_array_equal(grid.scale, np.array([1, 1, 2 / 127], np.float32))
    assert (grid.axis, grid.source) == (0, Provenance.COMPUTED)
    assert grid.dtype == QuantDType(8, signed=True, narrow_range=True)
    assert grid.symmetric
    assert grid.origin == "largest magnitude of each channel"
    assert dict(result.counts) == {"computed": 1}
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.node, note.value) == (
        Code.WEIGHT_GRID_COMPUTED,
        Severity.NOTE,
        "conv",
        "w",
    )


def test_the_largest_weight_is_the_highest_level() -> None:
    weights = np.random.default_rng(1).normal(size=6)
    model, _ = compute(conv("{" + ", ".join(f"{w:.9g}" for w in weights) + "}"))
    grid, array = grid_of(model), model.constant(model.values()["w"])
    assert grid is not None
    assert array is not None
    levels = grid.quantize(array)
    np.testing.assert_array_equal(np.abs(levels).max(axis=(1, 2, 3)), [127] * 3)
    assert np.all(np.abs(grid.dequantize(levels) - array) <= grid.scale.reshape(3, 1, 1, 1) * 0.5001)


@pytest.mark.parametrize(
    ("layer", "shape", "x", "y", "axis"),
    [
        ("Gemm (x, w)", "2, 3", "1, 2", "1, 3", 1),
        ("Gemm <transB = 1> (x, w)", "3, 2", "1, 2", "1, 3", 0),
        ("MatMul (x, w)", "2, 3", "1, 2", "1, 3", 1),
        ("MatMul (x, w)", "1, 2, 3", "1, 1, 2", "1, 1, 3", None),
        ("MatMul (x, w)", "6", "1, 6", "1", None),
        ("ConvTranspose (x, w)", "2, 3, 1, 1", "1, 2, 4, 4", "1, 3, 4, 4", 1),
    ],
)
def test_the_axis_is_that_of_the_output_channels(layer: str, shape: str, x: str, y: str, axis: int | None) -> None:
    model, _ = compute(
        f"g (float[{x}] x) => (float[{y}] y) <float[{shape}] w = {{1, 2, 3, 4, 5, 6}}> {{ y = {layer} }}"
    )
    grid = grid_of(model)
    assert grid is not None
    assert grid.axis == axis
    steps = {0: [2, 4, 6], 1: [4, 5, 6], None: 6}[axis]
    np.testing.assert_allclose(grid.scale, np.array(steps) / 127, rtol=1e-6)


def test_a_target_with_one_step_per_weight_gets_one() -> None:
    model, _ = compute(conv(), Context(replace(CTX.target, per_channel_weights=False)))
    grid = grid_of(model)
    assert grid is not None
    assert (grid.axis, float(grid.scale), grid.origin) == (None, 1.0, "largest magnitude of the weight")


@pytest.mark.parametrize("zero", ["0, 0", "1e-44, 0"])
def test_a_channel_of_zeros_gets_step_one(zero: str) -> None:
    model, _ = compute(conv(f"{{{zero}, 127, 0, 127, 0}}"))
    grid = grid_of(model)
    assert grid is not None
    assert grid.scale.tolist() == [1, 1, 1]


def test_a_trained_grid_is_not_touched() -> None:
    model = parse(conv())
    trained = QuantParams.make(3.0)
    model.scales.set(model.values()["x"], INPUT)
    model.scales.set(model.values()["w"], trained)
    assert not apply(ComputeWeightScales(), model, CTX).modified
    assert grid_of(model) is trained


def test_a_weight_two_layers_read_gets_its_grid_once() -> None:
    model, result = compute(
        conv(body="p = Conv <pads = [0, 0, 0, 1]> (x, w) q = Conv <pads = [0, 0, 0, 1]> (x, w) y = Add (p, q)")
    )
    assert dict(result.counts) == {"computed": 1}
    assert len(model.scales) == 2


@pytest.mark.parametrize(
    ("text", "given"),
    [
        (conv(), ""),
        (conv(body="y = Conv <pads = [0, 0, 0, 1]> (x, w)"), "y"),
        (conv(body="n = Neg (w) y = Conv <pads = [0, 0, 0, 1]> (x, n)"), "x"),
        ("g (float[6] x) => (float[6] y) <float[6] w = {1, 2, 3, 4, 5, 6}> { y = Add (x, w) }", "x"),
        ("g (float[6] x) => (float[6] y) <float[6] w = {1, 2, 3, 4, 5, 6}> { y = Mul (x, w) }", "x"),
        ("g (float16[1, 2] x) => (float16[1, 1] y) <float16[2, 1] w = {1, 2}> { y = MatMul (x, w) }", "x"),
        ("g (double[1, 2] x) => (double[1, 1] y) <double[2, 1] w = {1, 2}> { y = MatMul (x, w) }", "x"),
        (
            '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>'
            "g (float[1, 2] x) => (float[1, 1] y) <float[2, 1] w = {1, 2}> { y = custom.MatMul (x, w) }",
            "x",
        ),
        ("g (float[1, 0] x) => (float[1, 0] y) <float[0, 0] w = {}> { y = MatMul (x, w) }", "x"),
    ],
)
def test_near_misses(text: str, given: str) -> None:
    model, result = compute(text, given=given)
    assert not result.modified
    assert result.diagnostics == ()
    assert len(model.scales) == bool(given)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = parse(conv())
    weight = model.values()["w"]
    model.scales.set(model.values()["x"], INPUT)
    weight.const_value = oir.tensor(np.full((3, 1, 1, 2), np.nan, np.float32), name="w")
    result = ComputeWeightScales().run(model, CTX)
    assert not result.modified
    assert [(d.code, d.node, d.value) for d in result.diagnostics] == [(Code.NODE_SKIPPED, "conv", "w")]
