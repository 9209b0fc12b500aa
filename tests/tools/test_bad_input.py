"""Whatever is wrong with what ``qat2int8 convert`` is given: one line that helps, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from qat2int8.tools.cli import app

QAT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,4,4] x) => (float[N,4,4,4] y)
<float xs = {0.05}, int8 xz = {0}, float[4] ws = {0.01, 0.02, 0.03, 0.04}, int8[4] wz = {0, 0, 0, 0}> {
  [xq] q = QuantizeLinear (x, xs, xz)
  [xd] d = DequantizeLinear (q, xs, xz)
  [wq] wi = QuantizeLinear <axis = 0> (w, ws, wz)
  [wd] wf = DequantizeLinear <axis = 0> (wi, ws, wz)
  [conv] c = Conv (d, wf)
  [relu] y = Relu (c)
}
"""
WEIGHT = np.linspace(-1.2, 1.2, 12, dtype=np.float32).reshape(4, 3, 1, 1)


def qat() -> onnx.ModelProto:
    """A Conv with fake quant on its input and, per channel, on its weight; its output gets no integer kernel."""
    proto = onnx.parser.parse_model(QAT)
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def constant(proto: onnx.ModelProto, name: str, array: object, dtype: type = np.float32) -> None:
    """Give the initializer ``name`` another value."""
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(array, dtype), name))


def refused(folder: Path, *words: object, model: object = "m.onnx", output: object = "out.onnx") -> str:
    """The one line with which ``convert`` refuses; it leaves the files of ``folder`` as they are."""
    before = _contents(folder)
    command = ["convert", str(folder / str(model)), "-o", str(folder / str(output)), *map(str, words)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--debug" not in line
    assert "Traceback" not in line
    assert _contents(folder) == before
    return str(line)


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(qat(), tmp_path / "m.onnx")
    return tmp_path


def test_the_model_that_the_cases_damage_converts(folder: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(folder / "m.onnx"), "-o", str(folder / "out.onnx")])
    assert result.exit_code == 0, result.output
    assert (folder / "out.onnx").exists()


# -- files that are no models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is an empty file"),
        (b"name: a\npasses: []\n", "is a text file"),
        (bytes(range(256)) * 4, "is not an ONNX model"),
        (qat().SerializeToString()[:200], "damaged or cut short"),
    ],
    ids=["empty", "text", "random", "truncated"],
)
def test_files_that_are_no_models(folder: Path, content: bytes, says: str) -> None:
    (folder / "m.onnx").write_bytes(content)
    line = refused(folder)
    assert str(folder / "m.onnx") in line
    assert says in line
    assert line.endswith(")")


def test_no_file_and_a_folder(folder: Path) -> None:
    assert refused(folder, model="missing.onnx") == f"error: {folder / 'missing.onnx'}: no such file"
    (folder / "models").mkdir()
    assert "is a folder (name the .onnx file in it)" in refused(folder, model="models")


# -- models that cannot be read ---------------------------------------------------------------------------------


def _opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = version

    return change


def _ir_version(proto: onnx.ModelProto) -> None:
    proto.ir_version = 14


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "c"


def _two_tensors_of_one_name(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].output[0] = "q"


def _scale(value: object, name: str = "xs") -> Callable[[onnx.ModelProto], None]:
    return lambda proto: constant(proto, name, value)


def _axis(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node[2:4]:
        node.attribute[0].i = 7


def _no_fake_quant(proto: onnx.ModelProto) -> None:
    del proto.graph.node[:4]
    proto.graph.node[0].input[:] = ["x", "w"]


def _rounding_only(proto: onnx.ModelProto) -> None:
    _no_fake_quant(proto)
    proto.graph.node[1].op_type = "Floor"


def _qonnx(proto: onnx.ModelProto) -> None:
    _no_fake_quant(proto)
    proto.opset_import.append(helper.make_opsetid("qonnx.custom_op.general", 2))
    inputs = ["x", "xs", "ws", "ws"]
    quant = helper.make_node("Quant", inputs, ["xq"], name="quant_x", domain="qonnx.custom_op.general")
    proto.graph.node.insert(0, quant)
    proto.graph.node[1].input[0] = "xq"


def _custom_op(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    proto.graph.node[-1].CopyFrom(helper.make_node("Swizzle", ["c"], ["y"], name="s", domain="com.example"))


def _sixteen_bits(dtype: type) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version, proto.ir_version = 21, 10
        constant(proto, "xz", 0, dtype)
        constant(proto, "wz", np.zeros(4), dtype)

    return change


def _steps_per_block(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version, proto.ir_version = 21, 10
    del proto.graph.node[:2]
    proto.graph.node[2].input[0] = "x"
    steps = (WEIGHT.shape[0], 1, *WEIGHT.shape[2:])
    constant(proto, "ws", np.full(steps, 0.1))
    constant(proto, "wz", np.zeros(steps), np.int8)
    for node in proto.graph.node[:2]:
        del node.attribute[:]
        attributes = {"axis": 1, "block_size": WEIGHT.shape[1]}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())


def _paddle_bits(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("paddle", 1))
    fake = helper.make_node(
        "fake_quantize_dequantize_moving_average_abs_max", ["x", "xs"], ["d"], domain="paddle", bit_length=4
    )
    del proto.graph.node[1]
    proto.graph.node[0].CopyFrom(fake)


CANNOT_BE_READ: list[tuple[str, Callable[[onnx.ModelProto], None], str]] = [
    ("opset 9", _opset(9), "opset 9"),
    ("opset 27", _opset(27), "opset 27"),
    ("IR version 14", _ir_version, "IR version 14"),
    ("cycle", _cycle, "cycle"),
    ("duplicate name", _two_tensors_of_one_name, "'q'"),
    ("scale NaN", _scale(np.nan), "xs"),
    ("scale infinite", _scale(np.inf), "xs"),
    ("scale zero", _scale(0), "xs"),
    ("scale negative", _scale(-0.1), "xs"),
    ("weight scale NaN", _scale([0.1, np.nan, 0.1, 0.1], "ws"), "ws"),
    ("weight scale negative", _scale([0.1, -0.1, 0.1, 0.1], "ws"), "ws"),
    ("axis out of range", _axis, "axis"),
    ("too few scales", _scale([0.1, 0.1], "ws"), "ws"),
    ("no fake quant", _no_fake_quant, "no fake quantization found"),
    ("a Floor of another kind", _rounding_only, "no fake quantization found"),
    ("qonnx", _qonnx, "'quant_x'"),
    ("custom op", _custom_op, "com.example"),
    ("int16", _sixteen_bits(np.int16), "int16"),
    ("uint16", _sixteen_bits(np.uint16), "uint16"),
    ("a step per block", _steps_per_block, "one scale per block"),
    ("4 bits of paddle", _paddle_bits, "it has 4 bits, and only 8 are read"),
]


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in CANNOT_BE_READ], ids=[case[0] for case in CANNOT_BE_READ]
)
def test_models_that_cannot_be_converted(
    folder: Path, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    proto = qat()
    change(proto)
    onnx.save(proto, folder / "m.onnx")
    line = refused(folder)
    assert says in line


@pytest.mark.parametrize(
    "change",
    [_no_fake_quant, _qonnx, _sixteen_bits(np.int16), _scale(np.nan), _cycle],
    ids=["none", "qonnx", "int16", "scale", "cycle"],
)
def test_the_file_is_named(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = qat()
    change(proto)
    onnx.save(proto, folder / "m.onnx")
    assert str(folder / "m.onnx") in refused(folder)


def test_no_temporary_file_is_named(folder: Path) -> None:
    proto = qat()
    _custom_op(proto)
    onnx.save(proto, folder / "m.onnx")
    assert refused(folder) == (
        "error: node 's': onnxruntime has no op 'Swizzle' of domain 'com.example' (replace it with ops of ONNX)"
    )


# -- places that cannot be written ------------------------------------------------------------------------------


def test_output_folder_missing(folder: Path) -> None:
    line = refused(folder, output="no/such/out.onnx")
    assert f"the folder '{folder / 'no/such'}' does not exist (create it first)" in line


def test_output_is_a_folder(folder: Path) -> None:
    (folder / "out.onnx").mkdir()
    assert "is a folder" in refused(folder)


def test_output_is_no_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "out.onnx")
    assert "is a device or pipe, not a file (name a file)" in refused(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link, None], ids=["symlink", "hard link", "itself"])
def test_output_is_the_input(folder: Path, link: Callable[[Path, Path], None] | None) -> None:
    output = "m.onnx"
    if link is not None:
        output = "other.onnx"
        link(folder / "m.onnx", folder / output)
    assert "is the input model itself" in refused(folder, output=output)
    assert "is the input model itself" in refused(folder, "--fp32-out", folder / output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_read_only(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o500)
    assert "is not writable" in refused(folder, output="closed/out.onnx")


def test_both_outputs_the_same(folder: Path) -> None:
    assert "are the same file" in refused(folder, "--fp32-out", folder / "." / "out.onnx")


# -- commands that ask for what is not there --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--target", "ort-x68"), "no target is called 'ort-x68' (did you mean 'ort-x86'?)"),
        (("--target", "none.yaml"), "none.yaml: cannot be read"),
        (
            ("--pipeline", "qat-to-int4"),
            "no pipeline or pass is called 'qat-to-int4' (did you mean 'qat-to-int8'?)",
        ),
        (("--pipeline", "canonicalize,fuse-conv-bm"), "'fuse-conv-bm'"),
        (("--pipeline", "canonicalize{size=1}"), "size"),
        (("--pipeline", "canonicalize("), "pipeline text, column 13: expected ','"),
        (("--pipeline", "none.yaml"), "none.yaml: cannot be read"),
        (("--quantize-ops", "Conv,Convolve"), "'Convolve'"),
        (("--skip-node", "cnv"), "'cnv'"),
        (("--relu-encoding", "fine"), "fine"),
        (("--on-missing-scale", "ignore"), "ignore"),
        (("--quantize-ops", "Conv", "--on-missing-scale", "ignore"), "ignore"),
        (("--verify", "much"), "'much'"),
        (("--require-int8", "101"), "'--require-int8'"),
        (("--require-int8", "most"), "'--require-int8'"),
        (("--quantise-ops", "Conv"), "--quantise-ops"),
        (("more.onnx",), "more.onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_misspelt_words(folder: Path, words: tuple[str, ...], says: str) -> None:
    assert says in refused(folder, *words)


def test_a_missing_output_option(folder: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(folder / "m.onnx")])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "--output" in line
    assert line.endswith("(see 'qat2int8 convert --help')")


def test_options_are_read_before_the_model(folder: Path) -> None:
    assert "'fuse-conv-bm'" in refused(folder, "--pipeline", "canonicalize,fuse-conv-bm", model="missing.onnx")
    assert "no target" in refused(folder, "--target", "none", model="missing.onnx")


# -- unusual models that are no mistakes ------------------------------------------------------------------------


def converted(folder: Path, proto: onnx.ModelProto) -> onnx.ModelProto:
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "m.onnx")
    result = CliRunner().invoke(app, ["convert", str(folder / "m.onnx"), "-o", str(folder / "out.onnx")])
    assert result.exit_code == 0, result.output
    done = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(done, full_check=True)
    return done


def test_float16(folder: Path) -> None:
    proto = qat()
    proto.opset_import[0].version, proto.ir_version = 21, 10
    constant(proto, "w", WEIGHT, np.float16)
    constant(proto, "ws", [0.01, 0.02, 0.03, 0.04], np.float16)
    constant(proto, "xs", 0.05, np.float16)
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "m.onnx")
    line = refused(folder)
    assert "FLOAT16" in line
    assert line.endswith("(convert the model to float32)")


def test_an_input_of_unknown_shape(folder: Path) -> None:
    proto = qat()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    onnx.save(proto, folder / "m.onnx")
    assert "'shape'" in refused(folder)


def test_an_empty_batch(folder: Path) -> None:
    proto = qat()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 0
    converted(folder, proto)


def test_an_empty_weight(folder: Path) -> None:
    proto = qat()
    constant(proto, "w", np.zeros((0, 3, 1, 1)))
    constant(proto, "ws", np.zeros(0))
    constant(proto, "wz", np.zeros(0), np.int8)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0
    onnx.save(proto, folder / "m.onnx")
    assert "QuantizeLinear 'wq' [ws]: the scale is empty" in refused(folder)


def test_fake_quant_on_weights_only(folder: Path) -> None:
    proto = qat()
    del proto.graph.node[:2]
    proto.graph.node[2].input[0] = "x"
    assert {node.op_type for node in converted(folder, proto).graph.node} == {"Conv", "Relu"}


def test_fake_quant_inside_a_subgraph(folder: Path) -> None:
    proto = qat()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    branches = {
        "then_branch": (nodes, "y"),
        "else_branch": ([helper.make_node("Conv", ["x", "w"], ["z"], name="float_conv")], "z"),
    }
    bodies = {
        key: helper.make_graph(body, key, [], [helper.make_tensor_value_info(out, 1, ["N", 4, 4, 4])])
        for key, (body, out) in branches.items()
    }
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    proto.graph.node.append(helper.make_node("If", ["flag"], ["chosen"], name="if", **bodies))
    proto.graph.output[0].name = "chosen"
    (node,) = converted(folder, proto).graph.node
    assert node.op_type == "If"


def test_fake_quant_inside_a_function(folder: Path) -> None:
    proto = qat()
    pair = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["i"]),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("fn", "FakeQuant", ["a", "s", "z"], ["b"], pair, opsets))
    proto.opset_import.append(helper.make_opsetid("fn", 1))
    del proto.graph.node[:2]
    call = helper.make_node("FakeQuant", ["x", "xs", "xz"], ["d"], name="fake", domain="fn")
    proto.graph.node.insert(0, call)
    assert not converted(folder, proto).functions


def test_converting_twice(folder: Path) -> None:
    proto = qat()
    pair = [
        helper.make_node("QuantizeLinear", ["r", "xs", "xz"], ["rq"], name="rq"),
        helper.make_node("DequantizeLinear", ["rq", "xs", "xz"], ["y"], name="rd"),
    ]
    proto.graph.node[-1].output[0] = "r"
    proto.graph.node.extend(pair)
    once = converted(folder, proto)
    assert any(node.op_type == "DequantizeLinear" for node in once.graph.node)
    onnx.save(once, folder / "m.onnx")
    assert refused(folder) == (
        f"error: {folder / 'm.onnx'}: has been converted to INT8 already (convert the model it was made from)"
    )


def test_a_traceback_is_shown_only_on_request(folder: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "qat2int8",
        "convert",
        str(folder / "none.onnx"),
        "-o",
        str(folder / "out.onnx"),
    ]
    plain = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == f"error: {folder / 'none.onnx'}: no such file\n"
    debug = subprocess.run([*words, "--debug"], capture_output=True, text=True, check=False)
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
