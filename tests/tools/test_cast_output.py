from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import parse, run
from typer.testing import CliRunner, Result

from qat2int8.tools.cli import app


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    proto = parse(
        """
        g (float[2,3] x) => (int64[2] y, float[2,3] z) {
          [m] y = ArgMax <axis = 1, keepdims = 0> (x)
          [n] z = Neg (x)
        }
        """
    )
    onnx.save(proto.to_proto(), path)
    return path


def cast(model: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["cast-output", str(model), "-o", str(model.parent / "out.onnx"), *words])


def test_the_output_is_cast_and_the_other_left_alone(model: Path) -> None:
    result = cast(model, "--output", "y", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    written = onnx.load(model.parent / "out.onnx")
    assert [(out.name, out.type.tensor_type.elem_type) for out in written.graph.output] == [
        ("y", onnx.TensorProto.FLOAT),
        ("z", onnx.TensorProto.FLOAT),
    ]
    y, z = run(written, {"x": np.float32([[0, 2, 1], [5, 3, 4]])})
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, [1, 0])
    assert z[0, 1] == -2


def test_json_tells_which_pass_ran(model: Path) -> None:
    document = json.loads(cast(model, "--output", "y", "--dtype", "float32", "--json").stdout)
    assert document["pipeline"] == "change-output-dtype{output=y dtype=float32}"
    assert document["changed"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--output", "zz", "--dtype", "float32"), "zz"),
        (("--output", "y", "--dtype", "flot32"), "flot32"),
        (("--output", "y"), "Missing option '--dtype'"),
    ],
)
def test_what_cannot_be_cast_is_refused_in_one_line(model: Path, words: tuple[str, ...], says: str) -> None:
    result = cast(model, *words)
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[0]
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (model.parent / "out.onnx").exists()


def test_a_name_that_reads_as_a_number_is_still_a_name(tmp_path: Path) -> None:
    proto = parse("g (float[3] x) => (int64[1] y) { [m] y = ArgMax <axis = 0> (x) }").to_proto()
    proto.graph.output[0].name = proto.graph.node[0].output[0] = "124"
    onnx.save(proto, tmp_path / "model.onnx")
    assert cast(tmp_path / "model.onnx", "--output", "124", "--dtype", "float32").exit_code == 0
