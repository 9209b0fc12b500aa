from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime as ort
import pytest
from support import parse

from qat2int8.ir import (
    InvalidModel,
    Model,
    OutputError,
    UnsupportedModel,
    VerifyLevel,
    check_output_path,
    io,
    load_model,
    save_model,
    verify,
)

WEIGHT = np.arange(1024, dtype=np.float32).reshape(32, 32)


def weighty() -> Model:
    """``y = x @ w + b`` with a weight large enough to be kept outside."""
    model = parse(
        """
        g (float[1,32] x) => (float[1,32] y) <float[1] b = {0.5}> {
          [mul] t = MatMul (x, w)
          [add] y = Add (t, b)
        }
        """.replace("(float[1,32] x)", "(float[1,32] x, float[32,32] w)")
    )
    inputs = model.graph.inputs
    value = inputs[1]
    inputs.remove(value)
    value.const_value = oir.tensor(WEIGHT, name="w")
    model.graph.register_initializer(value)
    return model


def answer(path: Path) -> Any:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((1, 32), np.float32)})[0]


EXPECTED = WEIGHT.sum(axis=0, keepdims=True) + 0.5


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model with its weight in a file beside it."""
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    save_model(weighty(), path, external_data=True)
    return path


# Reading


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(InvalidModel, match="is a folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"import torch\n", "text file"),
        (b"\xff\xfe\x00", "not an ONNX model"),
        (b"\x08\x08\x3a\xff\x01", "cut short"),
        (b"\x08\x08", "holds no ONNX graph"),
    ],
)
def test_what_is_not_onnx(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=words):
        load_model(path)


def stored(tmp_path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    proto = weighty().to_proto()
    change(proto)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(("version", "words"), [(2, "IR version 2 is older"), (14, "IR version 14 is newer")])
def test_other_ir_versions_are_refused(tmp_path: Path, version: int, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_model(stored(tmp_path, lambda proto: setattr(proto, "ir_version", version)))


@pytest.mark.parametrize("version", [4, 7, 13])
def test_ir_versions_are_kept(tmp_path: Path, version: int) -> None:
    path = stored(tmp_path, lambda proto: setattr(proto, "ir_version", version))
    save_model(load_model(path), path)
    assert onnx.load(path).ir_version == version


def test_no_model_is_written_that_the_runtime_refuses(tmp_path: Path) -> None:
    model = weighty()
    model.ir.ir_version = 14
    save_model(model, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").ir_version == 13
    np.testing.assert_allclose(answer(tmp_path / "m.onnx"), EXPECTED)


@pytest.mark.parametrize(("version", "words"), [(9, "older than QuantizeLinear"), (27, "newer than any runtime")])
def test_other_opsets_are_refused(tmp_path: Path, version: int, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_model(stored(tmp_path, lambda proto: setattr(proto.opset_import[0], "version", version)))


@pytest.mark.parametrize("version", [10, 26])
def test_the_first_and_last_opset_are_read(tmp_path: Path, version: int) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.ir_version, proto.opset_import[0].version = 10, version

    assert load_model(stored(tmp_path, change)).opset == version


def test_the_default_opset_must_be_imported(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="default opset"):
        load_model(stored(tmp_path, lambda proto: setattr(proto.opset_import[0], "domain", "com.microsoft")))


def test_the_long_name_of_the_default_domain(tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].domain = "ai.onnx"
        for node in proto.graph.node:
            node.domain = "ai.onnx"

    model = load_model(stored(tmp_path, change))
    assert model.opset == 17
    assert len(list(model.nodes("MatMul"))) == 1
    assert [imported.domain for imported in model.to_proto().opset_import] == [""]


def test_two_versions_of_one_domain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="two versions"):
        load_model(stored(tmp_path, lambda p: p.opset_import.append(onnx.helper.make_opsetid("ai.onnx", 13))))


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        backwards = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(proto.graph.node)]
        del proto.graph.node[:]
        proto.graph.node.extend(backwards)

    model = load_model(stored(tmp_path, change))
    assert [node.name for node in model.graph] == ["mul", "add"]
    verify(model, VerifyLevel.CHECKER)


def test_a_cycle_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="'mul' -> 'add' -> 'mul'"):
        load_model(stored(tmp_path, lambda proto: proto.graph.node[0].input.__setitem__(0, "y")))


def test_ir_3_models_accept_a_new_initializer(tmp_path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.ir_version, proto.opset_import[0].version = 3, 10
        proto.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, 1, t.dims) for t in proto.graph.initializer
        )

    model = load_model(stored(tmp_path, change))
    assert [value.name for value in model.graph.inputs] == ["x", "b", "w"]
    model.graph[1].replace_input_with(1, model.add_initializer("c", np.ones(1, np.float32)))
    verify(model, VerifyLevel.CHECKER)


def test_training_information_is_not_dropped_in_silence(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="training"):
        load_model(stored(tmp_path, lambda proto: proto.training_info.add()))


def test_the_checker_never_sees_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    check = onnx.checker.check_model

    def spy(proto: onnx.ModelProto, **options: Any) -> None:
        sizes.append(proto.ByteSize())
        check(proto, **options)

    path = stored(tmp_path, lambda proto: None)
    monkeypatch.setattr(onnx.checker, "check_model", spy)
    verify(load_model(path), VerifyLevel.CHECKER)
    assert len(sizes) == 2
    assert max(sizes) < 1024 < WEIGHT.nbytes


# External data


def test_external_data_is_mapped_and_runs(external: Path) -> None:
    assert files(external.parent) == ["m.onnx", "m.onnx.data"]
    model = load_model(external)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, oir.ExternalTensor)
    assert tensor.raw is None  # not even mapped yet
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    assert not isinstance(model.graph.initializers["b"].const_value, oir.ExternalTensor)
    np.testing.assert_allclose(answer(external), EXPECTED)


def test_external_data_is_written_back_as_such(external: Path, tmp_path: Path) -> None:
    save_model(load_model(external), tmp_path / "out.onnx")
    assert files(tmp_path) == ["in", "out.onnx", "out.onnx.data"]
    np.testing.assert_allclose(answer(tmp_path / "out.onnx"), EXPECTED)


def test_external_data_comes_home_when_asked(external: Path, tmp_path: Path) -> None:
    model = load_model(external)
    save_model(model, tmp_path / "out.onnx", external_data=False)
    assert files(tmp_path) == ["in", "out.onnx"]
    np.testing.assert_allclose(answer(tmp_path / "out.onnx"), EXPECTED)
    assert isinstance(model.graph.initializers["w"].const_value, oir.ExternalTensor)


@pytest.mark.parametrize("read_first", [True, False])
def test_data_may_be_overwritten_while_it_is_mapped(external: Path, read_first: bool) -> None:
    model = load_model(external)
    twin = model.clone()
    if read_first:
        model.constant(model.graph.initializers["w"])
    late = model.add_initializer("a", np.full((32, 32), 7, np.float32))
    model.graph.initializers.pop("a")
    # A weight in front of the old one moves it within the file.
    others = dict(model.graph.initializers)
    model.graph.initializers.clear()
    model.graph.register_initializer(late)
    for value in others.values():
        model.graph.register_initializer(value)
    save_model(model, external)
    np.testing.assert_allclose(answer(external), EXPECTED)
    for survivor in (model, twin):
        np.testing.assert_array_equal(survivor.constant(survivor.graph.initializers["w"]), WEIGHT)
    # The model that was written speaks of the new file from now on.
    ours, theirs = (m.graph.initializers["w"].const_value for m in (model, load_model(external)))
    assert (ours.offset, ours.length, ours.path) == (theirs.offset, theirs.length, theirs.path)
    save_model(model, external)
    np.testing.assert_allclose(answer(external), EXPECTED)
    assert files(external.parent) == ["m.onnx", "m.onnx.data"]


def test_too_many_bytes_for_one_file_go_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "INLINE_LIMIT", WEIGHT.nbytes)
    save_model(weighty(), tmp_path / "m.onnx")
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]
    np.testing.assert_allclose(answer(tmp_path / "m.onnx"), EXPECTED)
    with pytest.raises(OutputError, match="do not fit into one"):
        save_model(weighty(), tmp_path / "n.onnx", external_data=False)
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    model = weighty()
    second = oir.Value(name="v", const_value=model.graph.initializers["w"].const_value)
    second.type, second.shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape([32, 32])
    model.graph.register_initializer(second)
    save_model(model, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == WEIGHT.nbytes
    back = load_model(tmp_path / "m.onnx")
    np.testing.assert_array_equal(back.constant(back.graph.initializers["v"]), WEIGHT)


def relocate(path: Path, **entries: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "gone.data"}, "'gone.data' is missing"),
        ({"location": "../m.onnx.data"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "sub/../../x"}, "outside the model's folder"),
        ({"location": ""}, "without a location"),
        ({"offset": "8"}, "4096 bytes at 8"),
        ({"offset": "-8"}, "at -8"),
        ({"length": "12"}, "12 are declared"),
        ({"offset": "x"}, "no number"),
    ],
)
def test_external_data_that_is_not_there(external: Path, entries: dict[str, str], words: str) -> None:
    relocate(external, **entries)
    with pytest.raises(InvalidModel, match=words) as caught:
        load_model(external)
    assert "tensor 'w'" in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(external: Path, tmp_path: Path) -> None:
    data = external.with_name("m.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidModel, match="outside"):
        load_model(external)
    data.unlink()
    os.link(tmp_path / "elsewhere", data)
    with pytest.raises(InvalidModel, match="hard links"):
        load_model(external)


# Writing


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file in the way, with its data, which must be there unchanged at the end of the test."""
    path, data = tmp_path / "old.onnx", tmp_path / "old.onnx.data"
    path.write_bytes(b"old model")
    data.write_bytes(b"old data")
    yield path
    assert (path.read_bytes(), data.read_bytes()) == (b"old model", b"old data")
    assert files(tmp_path) == ["old.onnx", "old.onnx.data"]


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("external_data", [True, False])
def test_nothing_is_lost_when_the_disk_is_full(
    old: Path, monkeypatch: pytest.MonkeyPatch, external_data: bool
) -> None:
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_model(weighty(), old, external_data=external_data)


@pytest.mark.parametrize("external_data", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_lost_when_writing_stops(
    old: Path, monkeypatch: pytest.MonkeyPatch, external_data: bool, error: type[BaseException]
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(Model, "to_proto", stop)
    with pytest.raises(error):
        save_model(weighty(), old, external_data=external_data)


@pytest.mark.parametrize(("external_data", "step"), [(False, 1), (True, 1), (True, 2)])
def test_nothing_is_lost_when_the_last_steps_fail(
    old: Path, monkeypatch: pytest.MonkeyPatch, external_data: bool, step: int
) -> None:
    replace, calls = os.replace, []

    def sometimes(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == step:
            fail()
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(OutputError):
        save_model(weighty(), old, external_data=external_data)
    if step == 2:
        assert calls[:2] == [old.with_name("old.onnx.data"), old]  # the data first


def test_new_data_goes_away_again_with_a_failed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: fail() if str(b).endswith(".onnx") else replace(a, b))
    with pytest.raises(OutputError):
        save_model(weighty(), tmp_path / "m.onnx", external_data=True)
    assert files(tmp_path) == []


def test_both_files_are_on_disk_before_either_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(Path(b).name), replace(a, b))[1])
    save_model(weighty(), tmp_path / "m.onnx", external_data=True)
    assert steps == ["fsync", "fsync", "m.onnx.data", "m.onnx"]


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    path.chmod(0o640)
    save_model(weighty(), path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = weighty()
    before = model.to_proto()
    for external_data in (True, False):
        save_model(model, tmp_path / "m.onnx", external_data=external_data)
        assert model.to_proto() == before


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_output_path(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        check_output_path(tmp_path / "none" / "m.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        save_model(weighty(), tmp_path / "file" / "m.onnx")
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode == os.W_OK))
    with pytest.raises(OutputError, match="not writable"):
        check_output_path(tmp_path / "m.onnx")


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source, link, hard = tmp_path / "m.onnx", tmp_path / "link.onnx", tmp_path / "hard.onnx"
    source.touch()
    link.symlink_to(source)
    os.link(source, hard)
    for path in (source, link, hard, tmp_path / ".." / tmp_path.name / "m.onnx"):
        with pytest.raises(OutputError, match="input model itself"):
            check_output_path(path, source=source)
    check_output_path(tmp_path / "other.onnx", source=source)
    check_output_path(tmp_path / "other.onnx", source=tmp_path / "gone.onnx")
