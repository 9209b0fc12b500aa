import itertools
import json
import math
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from support import parse

from qat2int8.ir import INT8, UINT8, DataError, Interval, QuantParams, UnsupportedModel
from qat2int8.pipelines.fidelity import Fidelity, compare, synthetic_inputs
from qat2int8.pipelines.sessions import Feeds


def plus(*constant: float, dtype: str = "float") -> bytes:
    """x plus a constant row, with any number of rows."""
    numbers = ", ".join(str(number) for number in constant)
    width = len(constant)
    row = f"{dtype}[N,{width}]"
    text = f"g ({row} x) => ({row} y) <{dtype}[{width}] c = {{{numbers}}}> {{ y = Add (x, c) }}"
    return parse(text).to_proto().SerializeToString()


def rows(*row: list[float], dtype: type = np.float32) -> Feeds:
    return {"x": np.asarray(row, dtype)}


def test_against_numbers_worked_by_hand() -> None:
    fidelity = compare(plus(0, 0), plus(0.5, 0), [rows([3, 4], [-5, 0]), rows([1, 1.25])])
    (output,) = fidelity.outputs
    assert output.name == "y"
    assert output.sqnr_db == pytest.approx(10 * math.log10((9 + 16 + 25 + 1 + 1.5625) / (3 * 0.25)))
    assert output.max_error == 0.5
    assert output.value_range == 9.0
    assert output.same_argmax_percent == pytest.approx(100 * 2 / 3)
    assert (fidelity.samples, fidelity.data) == (3, "synthetic")
    assert (fidelity.sqnr_db, fidelity.same_argmax_percent) == (output.sqnr_db, output.same_argmax_percent)


def test_equal_models_are_perfect() -> None:
    fidelity = compare(plus(1, 2), plus(1, 2), [rows([3, 4])], data="mine")
    assert (fidelity.sqnr_db, fidelity.outputs[0].max_error, fidelity.data) == (math.inf, 0.0, "mine")
    assert json.loads(json.dumps(fidelity.as_dict()))["samples"] == 1


def special(left: str, right: str, x: list[float]) -> Fidelity:
    def model(expression: str) -> bytes:
        return (
            parse(f"g (float[1,2] x) => (float[1,2] y) {{ y = {expression} (x) }}").to_proto().SerializeToString()
        )

    return compare(model(left), model(right), [rows(x)])


@pytest.mark.parametrize(
    ("left", "right"), [("Sqrt", "Identity"), ("Identity", "Sqrt")], ids=["in the reference", "in the result"]
)
def test_a_nan_on_one_side_is_no_perfect_score(left: str, right: str) -> None:
    (output,) = special(left, right, [-4.0, 1.0]).outputs
    assert output.sqnr_db == -math.inf
    assert output.max_error == math.inf


def test_a_nan_on_both_sides_is_equal() -> None:
    (output,) = special("Sqrt", "Sqrt", [-4.0, 4.0]).outputs
    assert (output.sqnr_db, output.max_error, output.value_range) == (math.inf, 0.0, 0.0)


@pytest.mark.parametrize(("right", "sqnr"), [("Log", math.inf), ("Neg", -math.inf)])
def test_infinities(right: str, sqnr: float) -> None:
    (output,) = special("Log", right, [0.0, 1.0]).outputs
    assert output.sqnr_db == sqnr
    assert output.max_error == (math.inf if sqnr < 0 else 0.0)


def test_any_error_on_a_reference_of_zeros_is_infinitely_bad() -> None:
    fidelity = compare(plus(0, 0), plus(0, 1e-3), [rows([0, 0])])
    assert fidelity.sqnr_db == -math.inf


def test_the_worst_output_speaks_for_all() -> None:
    def model(scale: float) -> bytes:
        text = f"""g (float[1,2] x) => (float[1,2] a, float[1,2] b) <float s = {{{scale}}}>
        {{ a = Neg (x) b = Mul (x, s) }}"""
        return parse(text).to_proto().SerializeToString()

    fidelity = compare(model(1.0), model(-0.9), [rows([1, 2])])
    assert [output.sqnr_db == math.inf for output in fidelity.outputs] == [True, False]
    assert fidelity.sqnr_db == pytest.approx(10 * math.log10(1 / 1.9**2), abs=1e-4)
    assert fidelity.same_argmax_percent == 0.0


def test_integer_outputs_have_an_error_but_no_classes() -> None:
    fidelity = compare(plus(0, 0, dtype="int64"), plus(0, 2, dtype="int64"), [rows([3, 4], dtype=np.int64)])
    (output,) = fidelity.outputs
    assert (output.max_error, output.same_argmax_percent) == (2.0, None)
    assert output.sqnr_db == pytest.approx(10 * math.log10(25 / 4))


@pytest.mark.parametrize("shape", ["4", "2,1"])
def test_an_output_without_a_last_axis_of_several_has_no_classes(shape: str) -> None:
    model = parse(f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Neg (x) }}").to_proto().SerializeToString()
    feeds = {"x": np.ones([int(dim) for dim in shape.split(",")], np.float32)}
    fidelity = compare(model, model, [feeds])
    assert fidelity.same_argmax_percent is None


def test_an_output_that_holds_no_numbers_is_not_listed_as_perfect() -> None:
    text = "g (float[1,2] x) => (float[1,2] y, seq(float[1,2]) s) { y = Neg (x) s = SequenceConstruct (x) }"
    model = parse(text).to_proto().SerializeToString()
    assert [output.name for output in compare(model, model, [rows([1, 2])]).outputs] == ["y"]


def test_models_of_other_outputs_or_shapes_cannot_be_compared() -> None:
    other = parse("g (float[N,2] x) => (float[N,2] z) { z = Neg (x) }").to_proto().SerializeToString()
    with pytest.raises(DataError, match="different outputs: y and z"):
        compare(plus(0, 0), other, [rows([1, 2])])
    row = parse("g (float[N,2] x) => (float[M,K] y) { y = Flatten <axis = 0> (x) }").to_proto().SerializeToString()
    with pytest.raises(DataError, match="output 'y' has shape"):
        compare(plus(0, 0), row, [rows([1, 2], [3, 4])])


def test_no_samples_and_wrong_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        compare(plus(0, 0), plus(0, 0), [])
    with pytest.raises(DataError, match="cannot run the model on this input"):
        compare(plus(0, 0), plus(0, 0), [{"wrong": np.zeros((1, 2), np.float32)}])
    with pytest.raises(DataError, match="cannot run the model on this input"):
        compare(plus(0, 0), plus(0, 0), [rows([1, 2, 3])])


def test_a_file_that_is_no_model() -> None:
    with pytest.raises(UnsupportedModel):
        compare(b"no model", plus(0, 0), [rows([1, 2])])


def test_time_is_spent_only_as_long_as_there_is_some() -> None:
    def slow() -> Iterator[Feeds]:
        for _ in itertools.count():
            time.sleep(0.05)
            yield rows([1, 2])

    assert 1 <= compare(plus(0, 0), plus(0, 0), slow(), seconds=0.2).samples <= 5
    assert compare(plus(0, 0), plus(0, 0), slow(), seconds=0.0).samples == 1


def inputs(text: str, grid: QuantParams | None = None, count: int = 8) -> list[npt.NDArray[np.generic]]:
    model = parse(text)
    if grid is not None:
        model.scales.set(model.values()["x"], grid)
    return [feeds["x"] for feeds in synthetic_inputs(model, count)]


@pytest.mark.parametrize(
    ("grid", "lo", "hi"),
    [
        (QuantParams.make(0.1, 0, INT8), -12.8, 12.7),
        (QuantParams.make(0.1, 0, UINT8), 0.0, 25.5),
        (QuantParams.make(0.1, 100, UINT8), -10.0, 15.5),
        (QuantParams.make(0.1, 0, UINT8).with_(trained=Interval(0.0, 6.0)), 0.0, 6.0),
        (None, -1.0, 1.0),
    ],
)
def test_synthetic_inputs_fill_the_range_of_their_grid(grid: QuantParams | None, lo: float, hi: float) -> None:
    arrays = np.stack(inputs("g (float[1,3,32,32] x) => (float[1,3,32,32] y) { y = Neg (x) }", grid))
    assert arrays.dtype == np.float32
    assert lo - 1e-6 <= arrays.min() < lo + 0.25 * (hi - lo)
    assert hi - 0.25 * (hi - lo) < arrays.max() <= hi + 1e-6


def test_synthetic_inputs_are_the_same_each_time_and_differ_from_each_other() -> None:
    text = "g (float[1,4] x) => (float[1,4] y) { y = Neg (x) }"
    first, second = inputs(text), inputs(text)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(("dtype", "numpy"), [("int64", np.int64), ("int32", np.int32)])
def test_synthetic_integers_are_small(dtype: str, numpy: type) -> None:
    arrays = np.stack(inputs(f"g ({dtype}[1,64] x) => ({dtype}[1,64] y) {{ y = Identity (x) }}"))
    assert arrays.dtype == numpy
    assert 0 <= arrays.min() < arrays.max() < 16


def test_synthetic_pixels_span_their_type() -> None:
    arrays = np.stack(inputs("g (uint8[1,256] x) => (uint8[1,256] y) { y = Identity (x) }"))
    assert arrays.dtype == np.uint8
    assert arrays.min() < 10
    assert arrays.max() > 245


def test_synthetic_booleans_are_both() -> None:
    arrays = np.stack(inputs("g (bool[1,64] x) => (bool[1,64] y) { y = Not (x) }"))
    assert arrays.dtype == np.bool_
    assert 0 < arrays.mean() < 1


@pytest.mark.parametrize(
    ("declared", "made"),
    [
        ("N,8", (1, 8)),
        ("N,T,8", (1, 1, 8)),
        ("N,3,H,W", (1, 3, 64, 64)),
        ("N,H,W,3", (1, 64, 64, 3)),
        ("4,3,16,W", (4, 3, 16, 64)),
    ],
)
def test_dimensions_that_are_not_fixed(declared: str, made: tuple[int, ...]) -> None:
    array = inputs(f"g (float[{declared}] x) => (float[{declared}] y) {{ y = Neg (x) }}", count=1)[0]
    assert array.shape == made
