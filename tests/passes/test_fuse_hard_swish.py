"""HardSwish in its spellings, and what looks like one."""

from __future__ import annotations

import numpy as np
import pytest
from support import apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import Provenance, QuantParams
from qat2int8.passes.fuse_hard_swish import FuseHardSwish

CONSTANTS = (
    "float three = {3}, float[1] zero = {0}, float o = {0}, float six = {6},"
    " float sixth = {0.16666667}, float one = {1}"
)


def swish(body: str, *, extra: str = "", header: str = "") -> str:
    return f"{header} g (float[N, 3] x) => (float[N, 3] y{extra}) <{CONSTANTS}> {{ {body} }}"


SPELLINGS = [
    "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) [last] y = Mul (x, h)",
    "h = HardSigmoid <alpha = 0.16666667> (x) [last] y = Mul (h, x)",
    "a = Add (x, three) c = Clip (a, o, six) m = Mul (x, c) [last] y = Div (m, six)",
    "a = Add (three, x) c = Clip (a, o, six) m = Mul (c, x) [last] y = Mul (sixth, m)",
    "a = Add (x, three) c = Clip (a, o, six) d = Div (c, six) [last] y = Mul (x, d)",
    "a = Add (x, three) c = Clip (a, o, six) d = Mul (c, sixth) [last] y = Mul (d, x)",
]


@pytest.mark.parametrize("body", SPELLINGS)
def test_every_spelling_becomes_one_hard_swish(body: str) -> None:
    before = swish(body)
    model, result = check_pass(FuseHardSwish(), before, swish("[last] y = HardSwish (x)"))
    assert dict(result.counts) == {"fused": 1}
    x = np.linspace(-5, 5, 60, dtype=np.float32).reshape(20, 3)
    assert_same_numbers(parse(before).to_proto(), model, {"x": x})


@pytest.mark.parametrize(
    "body",
    [
        SPELLINGS[0].replace("0.16666667", "0.2"),
        SPELLINGS[0].replace("0.5", "0.4"),
        SPELLINGS[0].replace("Mul (x, h)", "Mul (h, h)"),
        SPELLINGS[0].replace("Mul (x, h)", "Add (x, h)"),
        SPELLINGS[0].replace("(x) [last]", "(t) [last]").replace("h =", "t = Abs (x) h =", 1),
        SPELLINGS[2].replace("(x, three)", "(x, one)"),
        SPELLINGS[2].replace("(a, o, six)", "(a, o, three)"),
        SPELLINGS[2].replace("(a, o, six)", "(a, one, six)"),
        SPELLINGS[2].replace("(m, six)", "(six, m)"),
        SPELLINGS[2].replace("(m, six)", "(m, three)"),
        SPELLINGS[2].replace("y = Div (m, six)", "y = Relu (m)"),
        SPELLINGS[2].replace("(x, c)", "(a, c)"),
        SPELLINGS[4].replace("(c, six)", "(c, three)"),
        SPELLINGS[4].replace("(x, d)", "(a, d)"),
    ],
)
def test_other_functions_stay(body: str) -> None:
    model = parse(swish(body))
    assert not apply(FuseHardSwish(), model).modified


@pytest.mark.parametrize("tensor", ["a", "c", "m"])
def test_a_tensor_that_is_needed_elsewhere_stays(tensor: str) -> None:
    for extra, more in ((f", float[N, 3] {tensor}", ""), (", float[N, 3] z", f" z = Abs ({tensor})")):
        model = parse(swish(SPELLINGS[2] + more, extra=extra))
        assert not apply(FuseHardSwish(), model).modified


@pytest.mark.parametrize("tensor", ["a", "c", "m"])
def test_a_trained_grid_in_the_middle_keeps_the_chain(tensor: str) -> None:
    model = parse(swish(SPELLINGS[2]))
    model.scales.set(model.values()[tensor], QuantParams.make(0.1, source=Provenance.TRAINED))
    assert not apply(FuseHardSwish(), model).modified


def test_an_opset_without_hard_swish_is_left_alone() -> None:
    model = parse(swish(SPELLINGS[2], header='<ir_version: 8, opset_import: ["" : 13]>'))
    assert not apply(FuseHardSwish(), model).modified
