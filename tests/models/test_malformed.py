"""Whatever file comes in: a model or an error of ours, never another exception, never a crash."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qat2int8.ir import InvalidModel, Qat2Int8Error, VerifyLevel, load_model, save_model, to_text, verify

QAT = """
<ir_version: 8, opset_import: ["" : 17], doc_string: "a small model">
g (float[1,2,4,4] x) => (float[1,2,4,4] y)
<float s = {0.1}, int8 z = {0}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0},
 float[2,2,1,1] w = {1, 2, 3, 4}, bool flag = {1}> {
  [xq] q = QuantizeLinear (x, s, z)
  [xd] d = DequantizeLinear (q, s, z)
  [wq] wi = QuantizeLinear <axis = 0> (w, ws, wz)
  [wd] wf = DequantizeLinear <axis = 0> (wi, ws, wz)
  [conv] c = Conv <kernel_shape = [1, 1]> (d, wf)
  [if] y = If (flag) <
    then_branch = t () => (float[1,2,4,4] ty) { [relu] ty = Relu (c) },
    else_branch = e () => (float[1,2,4,4] ey) { [neg] ey = Neg (c) }
  >
}
"""


def small_model() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(QAT)
    weights = np.arange(600, dtype=np.float32)  # above the size at which weights are kept from the checker
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "unused"))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def outcome(path: Path, content: bytes) -> str:
    """Load ``content``, and use what is loaded; the law is that nothing but our errors comes out."""
    path.write_bytes(content)
    message = ""
    try:
        model = load_model(path)
    except Qat2Int8Error as error:
        message = str(error)
    if message:
        assert message.startswith(str(path))
        assert "\n" not in message
        return "refused"
    verify(model, VerifyLevel.CHECKER)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value.numpy()
    to_text(model)
    save_model(model, path)
    return "loaded"


@pytest.fixture(autouse=True)
def _silence() -> None:
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)


def test_the_model_itself_loads(tmp_path: Path) -> None:
    assert outcome(tmp_path / "m.onnx", small_model().SerializeToString()) == "loaded"


def test_every_truncation(tmp_path: Path) -> None:
    content = small_model().SerializeToString()
    cuts = [*range(0, len(content), max(1, len(content) // 150)), len(content) - 1]
    outcomes = [outcome(tmp_path / "m.onnx", content[:cut]) for cut in cuts]
    assert outcomes.count("refused") >= 0.9 * len(outcomes)


@pytest.mark.parametrize("seed", range(4))
def test_byte_flips(tmp_path: Path, seed: int) -> None:
    original = small_model().SerializeToString()
    # The long weight is not where the interesting bytes are.
    interesting = len(original) - 2400
    random = np.random.default_rng(seed)
    outcomes = set()
    for _ in range(100):
        content = bytearray(original)
        for place in random.integers(0, interesting, random.integers(1, 4)):
            content[place] = random.integers(0, 256)
        outcomes.add(outcome(tmp_path / "m.onnx", bytes(content)))
    assert outcomes == {"loaded", "refused"}


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"hello", b"{}", b"\x00" * 99, bytes(range(256)), b"\x89PNG\r\n\x1a\n"]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    assert outcome(tmp_path / "m.onnx", content) == "refused"


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "c"


def _undefined(proto: onnx.ModelProto) -> None:
    proto.graph.node[4].input[0] = "nowhere"


def _undefined_inside(proto: onnx.ModelProto) -> None:
    proto.graph.node[5].attribute[0].g.node[0].input[0] = "nowhere"


def _duplicate_tensor(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].output[0] = "q"


def _duplicate_initializer(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def _wrong_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "flag"


def _unknown_op(proto: onnx.ModelProto) -> None:
    proto.graph.node[4].op_type = "Convolution"


def _missing_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "nothing"


def _short_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[-1].raw_data = b"\0" * 7


def _too_many_numbers(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].float_data.append(1.0)


def _huge_dims(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[-1].dims[:] = [2**62, 2**62]


def _negative_dims(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[-1].dims[:] = [-600]


def _unknown_dtype(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[-1].data_type = 99


def _undefined_dtype(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[-1].data_type = 0


def _no_op_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].op_type = ""


def _attribute_of_another_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].attribute[0].type = onnx.AttributeProto.FLOAT


def _sparse(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.add().values.name = "sparse"


MUTATIONS: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (_cycle, "cycle: 'xq' -> 'xd' -> 'conv' -> 'xq'"),
    (_undefined, "node 'conv' (Conv): input 'nowhere'"),
    (_undefined_inside, "'nowhere'"),
    (_duplicate_tensor, "'q'"),
    (_duplicate_initializer, "s initializer name is not unique"),
    (_wrong_type, "node 'xq' (QuantizeLinear)"),
    (_unknown_op, "node 'conv' (Convolution)"),
    (_missing_output, "nothing"),
    (_short_weight, "tensor 'unused': has 7 bytes of data where 2400 are needed"),
    (_too_many_numbers, "tensor 's': its data do not fit its shape"),
    (_huge_dims, "tensor 'unused'"),
    (_negative_dims, "tensor 'unused': has a negative dimension"),
    (_unknown_dtype, "tensor 'unused': has the unknown element type 99"),
    (_undefined_dtype, "unused"),
    (_no_op_type, "'op_type' of 'node'"),
    (_attribute_of_another_type, "axis"),
    (_sparse, "tensor 'sparse': sparse initializers"),
]


@pytest.mark.parametrize(("mutate", "words"), MUTATIONS, ids=[mutate.__name__[1:] for mutate, _ in MUTATIONS])
def test_structural_damage_is_named(tmp_path: Path, mutate: Callable[[onnx.ModelProto], None], words: str) -> None:
    proto = small_model()
    mutate(proto)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(Qat2Int8Error) as caught:
        load_model(path)
    assert words in str(caught.value)
    assert outcome(path, proto.SerializeToString()) == "refused"


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    proto = small_model()
    for depth in range(20):
        node = onnx.helper.make_node("If", ["flag"], [f"o{depth}"], then_branch=proto.graph)
        proto.graph.CopyFrom(onnx.GraphProto(name=f"g{depth}", node=[node]))
    outcome(tmp_path / "m.onnx", proto.SerializeToString())


def test_a_checker_that_raises_anything_is_still_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(*_: object, **__: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    path = tmp_path / "m.onnx"
    path.write_bytes(small_model().SerializeToString())
    monkeypatch.setattr(onnx.checker, "check_model", leak)
    with pytest.raises(InvalidModel):
        load_model(path)


def test_a_name_cannot_break_the_line_of_a_message(tmp_path: Path) -> None:
    proto = small_model()
    proto.graph.node[4].input[0] = "no\nwhere"
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InvalidModel, match="'no where'"):
        load_model(path)


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    content = small_model().SerializeToString().replace(b"relu", b"r\xfflu")
    assert outcome(tmp_path / "m.onnx", content) == "refused"
