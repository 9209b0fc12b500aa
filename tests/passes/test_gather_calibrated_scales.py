"""Which tensors are calibrated, and which grids they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from arrays import model_of
from support import TARGET, apply, named

from qat2int8.ir import INT8, Code, Contract, Interval, Model, OpRule, PassFailed, Provenance, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.gather_calibrated_scales import GatherCalibratedScales
from qat2int8.passes.tensors_to_calibrate import tensors_to_calibrate

OPS = {
    "Conv": OpRule(Contract.COMPUTE, absorbs=("Relu", "Clip"), weight_axis=0),
    "Gemm": OpRule(Contract.COMPUTE, absorbs=("Relu",), weight_axis=1, float_output=True),
    "MatMul": OpRule(Contract.COMPUTE, weight_axis=1, float_output=True, data_inputs=(0, 1)),
    "Add": OpRule(Contract.ELEMENTWISE, absorbs=("Relu",), data_inputs=(0, 1)),
    "MaxPool": OpRule(Contract.MOVEMENT),
    "Flatten": OpRule(Contract.MOVEMENT),
    "Reshape": OpRule(Contract.MOVEMENT),
}
UINT8_TARGET = replace(TARGET, ops=OPS)
WEIGHTS = {"w": np.ones((2, 2, 1, 1)), "w2": np.ones((2, 2, 1, 1)), "m": np.ones((8, 3)), "shape": [1, 8]}
INPUTS = "float[1,2,2,2] x, float[2,2,1,1] w, float[2,2,1,1] w2, float[8,3] m, int64[2] shape"


def network(body: str, output: str = "float[1,2,2,2] y") -> Model:
    return model_of(f"g ({INPUTS}) => ({output}) {{ {body} }}", WEIGHTS)


class Known:
    """A source that knows the ranges it is given, by name."""

    origin = "a test"

    def __init__(self, **spans: tuple[float, float]) -> None:
        self.spans = {name: Interval(*span) for name, span in spans.items()}
        self.asked: list[str] = []

    def ranges(self, model: Model, wanted: Sequence[oir.Value]) -> Mapping[oir.Value, Interval]:
        self.asked = named(wanted)
        return {value: self.spans[value.name or ""] for value in wanted if value.name in self.spans}


def wanted(body: str, output: str = "float[1,2,2,2] y", **scales: QuantParams) -> list[str]:
    model = network(body, output)
    for name, params in scales.items():
        model.scales.set(model.values()[name], params)
    return named(tensors_to_calibrate(model, UINT8_TARGET))


def test_layers_want_their_inputs_and_outputs() -> None:
    assert wanted("c = Conv (x, w) y = Conv (c, w2)") == ["x", "c", "y"]


def test_an_absorbed_activation_stands_for_its_layer() -> None:
    assert wanted("c = Conv (x, w) r = Relu (c) y = Conv (r, w2)") == ["x", "r", "y"]
    # Somebody else reads what lies before the Relu.
    assert wanted("c = Conv (x, w) r = Relu (c) d = Conv (r, w2) y = Add (c, d)") == ["x", "c", "r", "d"]


def test_behind_data_movement_the_tensor_that_was_moved_is_wanted() -> None:
    body = "c = Conv (x, w) p = MaxPool <kernel_shape = [1, 1]> (c) y = Conv (p, w2)"
    assert wanted(body) == ["x", "c", "y"]
    assert wanted("f = Reshape (x, shape) y = Gemm (f, m)", "float[1,3] y") == ["x"]


def test_a_layer_that_can_end_in_float_wants_no_output_unless_it_is_read_as_integers() -> None:
    assert wanted("f = Flatten (x) y = Gemm (f, m)", "float[1,3] y") == ["x"]
    assert wanted("f = Flatten (x) g = Gemm (f, m) h = Add (g, g) y = Neg (h)", "float[1,3] y") == ["x", "g", "h"]
    assert wanted("f = Flatten (x) g = Gemm (f, m) y = Neg (g)", "float[1,3] y") == ["x"]


def test_elementwise_ops_are_wanted_behind_a_layer_only() -> None:
    assert wanted("a = Add (x, x) n = Neg (a) y = Conv (n, w)") == ["n", "y"]
    assert wanted("c = Conv (x, w) a = Add (c, x) y = Neg (a)") == ["x", "c", "a"]
    # A graph output of an elementwise op stays in float.
    assert wanted("c = Conv (x, w) y = Add (c, x)") == ["x", "c"]


def test_both_sides_of_a_product_of_activations_are_wanted() -> None:
    text = "g (float[1,2,2,2] x, float[1,2,2,2] z) => (float[1,2,2,2] y) { y = MatMul (x, z) }"
    assert named(tensors_to_calibrate(model_of(text), UINT8_TARGET)) == ["x", "z"]


def test_what_has_a_grid_is_not_wanted() -> None:
    grid = QuantParams.make(0.1)
    assert wanted("c = Conv (x, w) y = Conv (c, w2)", c=grid) == ["x", "y"]
    # A grid behind the movement does not speak for what lies before it.
    body = "c = Conv (x, w) p = MaxPool <kernel_shape = [1, 1]> (c) y = Conv (p, w2)"
    assert wanted(body, p=grid) == ["x", "c", "y"]


def test_constants_are_not_wanted() -> None:
    assert wanted("c = Conv (x, w) a = Add (c, w) y = Neg (a)", "float[2,2,2,2] y") == ["x", "c", "a"]


def gather(body: str, known: Known, *, symmetric: bool = False) -> Model:
    model = network(body)
    result = apply(GatherCalibratedScales(symmetric=symmetric), model, Context(UINT8_TARGET, known))
    assert result.counts["calibrated"] == len(model.scales)
    return model


BODY = "c = Conv (x, w) r = Relu (c) y = Conv (r, w2)"


def test_grids_hold_the_range_and_say_where_they_are_from() -> None:
    model = gather(BODY, Known(x=(-1.0, 3.0), r=(0.0, 2.0), y=(-5.0, 5.0)))
    grid = model.scales[model.values()["x"]]
    assert (grid.source, grid.origin) == (Provenance.CALIBRATED, "a test")
    assert grid.interval.lo == pytest.approx(-1.0, abs=0.01)
    assert grid.interval.hi == pytest.approx(3.0, abs=0.01)
    relu = model.scales[model.values()["r"]]
    assert (int(relu.zero_point), relu.interval.hi) == (0, pytest.approx(2.0))


def test_symmetric_grids_are_int8_around_zero_where_values_can_be_negative() -> None:
    model = gather(BODY, Known(x=(-1.0, 3.0), r=(0.0, 2.0), y=(-5.0, 5.0)), symmetric=True)
    grid = model.scales[model.values()["x"]]
    assert (grid.dtype, int(grid.zero_point), float(grid.scale)) == (INT8, 0, pytest.approx(3.0 / 127))
    assert int(model.scales[model.values()["r"]].zero_point) == 0
    assert model.scales[model.values()["r"]].dtype is not INT8


def test_a_range_is_cut_to_what_can_be_computed() -> None:
    # Tables of other tools know one magnitude only.
    model = gather(BODY, Known(x=(-3.0, 3.0), r=(-2.0, 2.0), y=(-5.0, 5.0)))
    relu = model.scales[model.values()["r"]]
    assert (relu.interval.lo, relu.interval.hi) == (0.0, pytest.approx(2.0))


def test_trained_grids_stay_and_are_not_asked_for() -> None:
    model, known = network(BODY), Known(x=(-1.0, 1.0), y=(-5.0, 5.0))
    trained = QuantParams.make(0.5, origin="training")
    model.scales.set(model.values()["r"], trained)
    apply(GatherCalibratedScales(), model, Context(UINT8_TARGET, known))
    assert model.scales[model.values()["r"]] is trained


def test_what_nobody_knows_is_reported() -> None:
    model = network(BODY)
    result = GatherCalibratedScales().run(model, Context(UINT8_TARGET, Known(x=(-1.0, 1.0), r=(0.0, 1.0))))
    assert result.counts == {"calibrated": 2}
    (finding,) = result.diagnostics
    assert (finding.code, finding.value, finding.node) == (Code.SCALE_MISSING, "y", model.graph[-1].name or "")


def test_a_tensor_that_never_changes_is_reported_and_gets_a_grid() -> None:
    model = network(BODY)
    known = Known(x=(-1.0, 1.0), r=(0.0, 0.0), y=(4.0, 4.0))
    result = GatherCalibratedScales().run(model, Context(UINT8_TARGET, known))
    assert [(found.code, found.value) for found in result.diagnostics] == [
        (Code.CALIBRATED_CONSTANT, "r"),
        (Code.CALIBRATED_CONSTANT, "y"),
    ]
    assert model.scales[model.values()["y"]].interval.contains(Interval(0.0, 3.9))


def test_without_a_source_it_says_what_to_do() -> None:
    with pytest.raises(PassFailed, match="qat2int8 quantize --data"):
        GatherCalibratedScales().run(network(BODY), Context(UINT8_TARGET))


def test_a_model_that_lacks_nothing_needs_no_source() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    assert not apply(GatherCalibratedScales(), model, Context(UINT8_TARGET)).modified
