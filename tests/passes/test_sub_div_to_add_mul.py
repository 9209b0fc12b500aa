import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TARGET, apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import INT8, UINT8, QuantDType, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.sub_div_to_add_mul import SubDivToAddMul


def arithmetic(op: str, constant: str = "1, -2", order: str = "x, c") -> str:
    return f"g (float[2] x) => (float[2] y) <float[2] c = {{{constant}}}> {{ [n] y = {op} ({order}) }}"


Y = QuantParams.make(0.5, 3, UINT8)


def test_a_subtraction_becomes_an_addition() -> None:
    _, result = check_pass(
        SubDivToAddMul(),
        arithmetic("Sub"),
        """g (float[2] x) => (float[2] y) <float[2] c = {1, -2}, float[2] c_negated = {-1, 2}> {
          [n] y = Add (x, c_negated)
        }""",
        scales={"y": Y},
    )
    assert result.counts == {"subtractions": 1, "divisions": 0}


def test_a_division_becomes_a_multiplication() -> None:
    _, result = check_pass(
        SubDivToAddMul(),
        arithmetic("Div", "4, 4"),
        """g (float[2] x) => (float[2] y) <float[2] c = {4, 4}, float[2] c_inverse = {0.25, 0.25}> {
          [n] y = Mul (x, c_inverse)
        }""",
        scales={"y": Y},
    )
    assert result.counts == {"subtractions": 0, "divisions": 1}


@given(st.floats(-1e6, 1e6, width=32).filter(lambda c: abs(c) > 1e-6), st.sampled_from(["Sub", "Div"]))
def test_the_numbers_stay_the_same(constant: float, op: str) -> None:
    model = parse(arithmetic(op, f"{constant}, {constant}"))
    before = model.to_proto()
    model.scales.set(model.values()["y"], Y)
    assert apply(SubDivToAddMul(), model).modified
    assert_same_numbers(before, model, {"x": np.asarray([3.5, -0.125], np.float32)})


@pytest.mark.parametrize(
    ("grid", "constant", "mirrored"),
    [
        (QuantParams.make(0.5, 0, INT8), "63.5, -63.5", QuantParams.make(0.5, 0, INT8)),
        (QuantParams.make(0.5, 0, INT8), "63.5, -64", None),
        (QuantParams.make(0.5, 100, UINT8), "77.5, -50", QuantParams.make(0.5, 155, UINT8)),
        (QuantParams.make(0.5, -28, INT8), "77.5, -50", QuantParams.make(0.5, 27, INT8)),
        (
            QuantParams.make(0.5, 0, QuantDType(8, signed=True, narrow_range=True)),
            "63.5, -63.5",
            QuantParams.make(0.5, 0, QuantDType(8, signed=True, narrow_range=True)),
        ),
    ],
    ids=["symmetric", "lowest level", "unsigned", "signed, off centre", "narrow"],
)
def test_a_trained_constant_keeps_its_levels(
    grid: QuantParams, constant: str, mirrored: QuantParams | None
) -> None:
    model = parse(arithmetic("Sub", constant))
    model.scales.set(model.values()["c"], grid)
    model.scales.set(model.values()["y"], Y)
    result = apply(SubDivToAddMul(), model)
    assert result.modified is (mirrored is not None)
    if mirrored is not None:
        negated = model.values()["c_negated"]
        array = model.constant(negated)
        assert array is not None
        assert model.scales[negated].same_grid(mirrored)
        np.testing.assert_array_equal(mirrored.dequantize(mirrored.quantize(array)), array)


@pytest.mark.parametrize(
    ("text", "gridded"),
    [
        (arithmetic("Sub", order="c, x"), False),
        (arithmetic("Div", order="c, x"), False),
        (arithmetic("Sub", order="x, x"), False),
        (arithmetic("Div", "4, 2"), False),
        (arithmetic("Div", "0, 0"), False),
        (arithmetic("Div", "1e-45, 1e-45"), False),
        (arithmetic("Div", "3e38, 3e38"), False),
        (arithmetic("Div", "4, 4"), True),
        (arithmetic("Sub").replace("float[2]", "double[2]"), False),
    ],
    ids=["c - x", "c / x", "no constant", "two divisors", "zero", "overflow", "underflow", "a grid", "double"],
)
def test_others_stay(text: str, gridded: bool) -> None:
    model = parse(text)
    model.scales.set(model.values()["y"], Y)
    if gridded:
        model.scales.set(model.values()["c"], QuantParams.make(0.5, 0, INT8))
    assert not SubDivToAddMul().run(model, Context(TARGET)).modified


@pytest.mark.parametrize("op", ["Sub", "Div"])
def test_a_result_without_a_grid_is_left_as_it_is(op: str) -> None:
    assert not SubDivToAddMul().run(parse(arithmetic(op, "4, 4")), Context(TARGET)).modified
