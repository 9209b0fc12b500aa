"""The encoder that is measured looks like what exporters write, and converts to integers all through."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from support import run

import qat2int8
from qat2int8.pipelines.benchmarking import bert

LAYERS = bert.SMALL.layers
LINEAR = 6 * LAYERS + 2
"""Four of the attention, two behind it; two in the head."""
NORMS = 2 * LAYERS + 1
TOKENS = {bert.TOKENS: bert.tokens(1, bert.SMALL, seed=5)}


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fake_quant", [False, True])
def test_both_spellings_compute_the_same(fake_quant: bool, dynamic: bool) -> None:
    whole, spelled = (
        bert.bert(bert.SMALL, fake_quant=fake_quant, decomposed=decomposed, dynamic=dynamic)
        for decomposed in (False, True)
    )
    for model in (whole, spelled):
        onnx.checker.check_model(model, full_check=True)
        assert ops(model)["QuantizeLinear"] == ops(model)["DequantizeLinear"] == 2 * LINEAR * fake_quant
    assert ops(whole)["LayerNormalization"] == ops(spelled)["Sqrt"] == NORMS
    assert ops(whole)["Gelu"] == ops(spelled)["Erf"] == LAYERS
    assert not {"LayerNormalization", "Gelu"} & set(ops(spelled))
    tolerance = 0.02 if fake_quant else 1e-4
    np.testing.assert_allclose(run(whole, TOKENS)[0], run(spelled, TOKENS)[0], atol=tolerance)


def test_fake_quant_moves_the_answers_a_little() -> None:
    plain, fake = (run(bert.bert(bert.SMALL, fake_quant=flag), TOKENS)[0] for flag in (False, True))
    assert 1e-5 < np.abs(plain - fake).max() < 0.1 * np.abs(plain).max()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_every_linear_layer_ends_up_in_integers(decomposed: bool, dynamic: bool) -> None:
    source = bert.bert(bert.SMALL, decomposed=decomposed, dynamic=dynamic)
    conversion = qat2int8.convert(source)
    after = ops(conversion.model.to_proto())
    assert after["LayerNormalization"] == after["Sum"] == NORMS
    assert after["Gelu"] == LAYERS
    assert not {"Erf", "Sqrt", "ReduceMean", "Pow"} & set(after)
    certificate = conversion.certificate
    assert len(certificate.compute) == LINEAR + len(certificate.float_compute)
    assert {record.op_type for record in certificate.float_compute} == {"MatMul"}
    assert certificate.executed["QGemm"] == LINEAR
    assert certificate.integer_macs_percent == pytest.approx(94.163, abs=0.01)
    expected = run(source, TOKENS)[0]
    actual = run(conversion.model, TOKENS, optimize=True)[0]
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
