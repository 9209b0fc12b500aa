import numpy as np
import onnx_ir as oir
import pytest
from support import TARGET, apply, graph_text, parse

from qat2int8.ir import INT8, InvalidModel, Model, Provenance, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.gather_output_scales import GatherOutputScales

CUSTOM = '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>\n'


def with_metadata(text: str, **thresholds: str) -> Model:
    """A model whose nodes (by name) carry an out_threshold."""
    model = parse(text)
    for node in model.nodes():
        if node.name in thresholds:
            node.metadata_props["out_threshold"] = thresholds[node.name]
    return model


def scales(model: Model) -> dict[str | None, float]:
    return {value.name: float(params.scale) for value, params in model.scales.items()}


PLAIN = "g (float[2] x) => (float[2] y) { [relu] r = Relu (x) [neg] y = Neg (r) }"


def test_a_threshold_is_the_largest_magnitude_of_int8() -> None:
    model = with_metadata(PLAIN, relu="2.54")
    before = graph_text(model)
    assert apply(GatherOutputScales(), model).counts == {"gathered": 1}
    assert graph_text(model) == before
    (found,) = (model.scales[value] for value in model.scales)
    assert found.same_grid(QuantParams.make(np.float32(0.02), 0, INT8))
    assert (found.source, found.origin) == (Provenance.TRAINED, "out_threshold of 'relu'")
    assert scales(model).keys() == {"r"}


@pytest.mark.parametrize("value", ["1.27", '"1.27"'])
def test_an_attribute_covers_every_output_of_its_node(value: str) -> None:
    model = parse(
        f"""{CUSTOM} g (float[2] x) => (float[2] y) {{
          a, , b = custom.Split <out_threshold = {value}> (x)
          y = custom.Join (a, b)
        }}"""
    )
    assert apply(GatherOutputScales(), model).counts == {"gathered": 2}
    assert scales(model) == pytest.approx({"a": 0.01, "b": 0.01})


def test_the_attribute_beats_the_metadata() -> None:
    model = parse(f"{CUSTOM} g (float[2] x) => (float[2] y) {{ y = custom.Act <out_threshold = 1.27> (x) }}")
    next(model.nodes()).metadata_props["out_threshold"] = "99"
    apply(GatherOutputScales(), model)
    assert scales(model) == pytest.approx({"y": 0.01})


def test_zero_means_nothing_was_seen() -> None:
    model = with_metadata(PLAIN, relu="0", neg="0.0")
    assert not apply(GatherOutputScales(), model).modified
    assert len(model.scales) == 0


def test_outputs_that_are_not_float_get_none() -> None:
    model = with_metadata(
        """g (float[2] x) => (float[2] y, int64[1] i, int64[1] n, bool[2] c) {
          [sized] n = Shape (x)
          [size] m = Shape (x)
          [arg] i = ArgMax (x)
          [cmp] c = Less (x, x)
          [fill] y = Expand (x, m)
        }""",
        **dict.fromkeys(["sized", "size", "arg", "cmp"], "1"),
    )
    assert not apply(GatherOutputScales(), model).modified


def test_an_output_of_recorded_type_is_judged_by_that_type() -> None:
    model = with_metadata(
        "g (int32[2] x) => (int32[2] y) { [relu] r = Neg (x) y = Neg (r) }",
        relu="1",
    )
    model.values()["r"].type = oir.TensorType(oir.DataType.INT32)
    assert not apply(GatherOutputScales(), model).modified


FAKED = """g (float[2] x) => (float[2] y) <float s = {0.5}> {
  [relu] r = Relu (x)
  [quant] q = QuantizeLinear (r, s)
  [dequant] d = DequantizeLinear (q, s)
  [neg] y = Neg (d)
}"""


def test_what_a_fake_quant_reads_or_writes_is_left_to_it() -> None:
    model = with_metadata(FAKED, relu="1", quant="1", dequant="1", neg="1")
    assert apply(GatherOutputScales(), model).counts == {"gathered": 1}
    assert scales(model).keys() == {"y"}


@pytest.mark.parametrize("source", list(Provenance))
def test_a_grid_that_stands_there_stays(source: Provenance) -> None:
    model = with_metadata(PLAIN, relu="1")
    present = QuantParams.make(0.001, source=source)
    model.scales.set(model.values()["r"], present)
    result = apply(GatherOutputScales(), model)
    assert not result.modified
    assert not result.diagnostics
    assert model.scales[model.values()["r"]] is present


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "about 3", "", "1e-60"])
def test_what_is_no_magnitude_is_an_error(text: str) -> None:
    with pytest.raises(InvalidModel, match=r"Relu 'relu' \[r\]: ") as caught:
        GatherOutputScales().run(with_metadata(PLAIN, relu=text), Context(TARGET))
    assert caught.value.remedy


def test_a_negative_threshold_is_quoted() -> None:
    with pytest.raises(InvalidModel, match="out_threshold is '-1', not a magnitude"):
        GatherOutputScales().run(with_metadata(PLAIN, relu="-1"), Context(TARGET))


def test_a_list_of_magnitudes_is_an_error() -> None:
    model = parse(
        f"{CUSTOM} g (float[2] x) => (float[2] y) {{ [act] y = custom.Act <out_threshold = [1.0, 2.0]> (x) }}"
    )
    with pytest.raises(InvalidModel, match="Act 'act'"):
        GatherOutputScales().run(model, Context(TARGET))
