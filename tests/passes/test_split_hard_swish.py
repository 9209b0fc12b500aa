from dataclasses import replace

import numpy as np
import pytest
from support import TARGET, apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import INT8, UINT8, Contract, OpRule, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.split_hard_swish import SplitHardSwish

MUL = OpRule(Contract.ELEMENTWISE, data_inputs=(0, 1))
CTX = Context(replace(TARGET, ops={**TARGET.ops, "Mul": MUL}))
WEIGHT = QuantParams.make(0.5, 0, INT8)
BEFORE = """g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {2}> {
  [c] a = Conv (x, w)
  [h] y = HardSwish (a)
}"""


def test_it_becomes_a_product_behind_a_layer_on_a_grid() -> None:
    model, result = check_pass(
        SplitHardSwish(),
        BEFORE,
        """g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {2}> {
          [c] a = Conv (x, w)
          [h_HardSigmoid] y_gate = HardSigmoid <alpha = 0.16666667, beta = 0.5> (a)
          [h] y = Mul (a, y_gate)
        }""",
        scales={"w": WEIGHT, "y": QuantParams.make(0.25, 3, UINT8)},
        ctx=CTX,
    )
    assert result.counts == {"split": 1}
    assert model.values()["y"] in model.scales


def test_the_numbers_stay_the_same() -> None:
    model = parse(BEFORE)
    before = model.to_proto()
    model.scales.set(model.values()["w"], WEIGHT)
    apply(SplitHardSwish(), model, CTX)
    for x in (np.asarray([-9, -3, -1.5, 0]), np.asarray([0.1, 1, 1.6, 50])):
        assert_same_numbers(before, model, {"x": x.reshape(1, 1, 2, 2).astype(np.float32)})


@pytest.mark.parametrize(
    ("text", "gridded", "ctx"),
    [
        (BEFORE, False, CTX),
        (BEFORE, True, Context(TARGET)),
        (BEFORE.replace("a = Conv (x, w)", "b = Conv (x, w) a = Abs (b)"), True, CTX),
        (BEFORE.replace("HardSwish (a)", "HardSwish (x)"), True, CTX),
    ],
    ids=["no grid", "no integer Mul", "not right behind", "a graph input"],
)
def test_it_stays_elsewhere(text: str, gridded: bool, ctx: Context) -> None:
    model = parse(text)
    if gridded:
        model.scales.set(model.values()["w"], WEIGHT)
    assert not SplitHardSwish().run(model, ctx).modified
