"""Reading and writing model files: any file in gives a model or an error a person understands."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as oir

from qat2int8.ir.analysis import find_cycle
from qat2int8.ir.errors import InvalidModel, OutputError, Qat2Int8Error, UnsupportedModel
from qat2int8.ir.model import Model
from qat2int8.ir.substitute import substituted
from qat2int8.ir.verify import WEIGHT_BYTES, check, nbytes, path_of, weightless, weightless_file

IR_VERSIONS = range(3, 14)
"""What is read; onnxruntime 1.31 refuses 14. Version 3 is lifted to 4 on load, see :func:`load_model`."""

OPSETS = range(10, 27)
"""From the first opset that has QuantizeLinear to the last one onnxruntime 1.31 knows."""

INLINE_LIMIT = 2**31 - 2**24
"""Weights of more bytes than this go to a file of their own: a protobuf ends at 2 GiB, graph included."""

_HAD_EXTERNAL_DATA = "qat2int8.external_data"


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file.

    Nodes out of order are sorted and the domain "ai.onnx" becomes "", its other spelling. IR version 3 becomes
    4, in which an initializer need not be a graph input, so that passes can add some. External data is mapped
    when it is first read.

    Raises:
        InvalidModel: not a file, not ONNX, damaged, or a graph that is not valid.
        UnsupportedModel: valid, but of an IR version, opset or kind this tool does not handle.
    """
    path = Path(path)
    try:
        return _load(path)
    except Qat2Int8Error as error:
        # Names come from the file and may hold anything.
        what, where = (" ".join(part.split()) for part in (error.what, error.where))
        raise type(error)(what, where=f"{path}: {where}" if where else str(path), remedy=error.remedy) from error
    except Exception as error:  # onnx, protobuf and onnx_ir raise whatever comes up on a damaged file
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = str(root).strip().splitlines() or [type(root).__name__]
        raise InvalidModel(
            f"cannot be read as ONNX: {reason[0][:200]}", where=str(path), remedy=_EXPORT
        ) from error


def read_proto(proto: onnx.ModelProto) -> Model:
    """The model of a protobuf in memory, checked like a file and left as it is.

    External data is looked for in the current folder.

    Raises:
        InvalidModel: the graph is not valid.
        UnsupportedModel: valid, but of an IR version, opset or kind this tool does not handle.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    try:
        return _checked(copy, Path.cwd())
    except Qat2Int8Error:
        raise
    except Exception as error:  # onnx and onnx_ir raise whatever comes up on a damaged model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidModel(f"cannot be read as ONNX: {reason[0][:200]}", remedy=_EXPORT) from error


def save_model(model: Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
    """Write ``model`` to ``path``, atomically: on any failure what stood there before still does.

    Weights go to ``<path>.data`` beside it when there are more than :data:`INLINE_LIMIT` bytes of them or the
    model came with external data; ``external_data`` decides otherwise. Both files are complete on disk before
    either takes its name, the data first.

    Raises:
        OutputError: the place cannot be written, or the weights do not fit into one file.
    """
    path = Path(path)
    check_output_path(path)
    weights = [value for graph in model.ir.graphs() for value in graph.initializers.values()]
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    if external_data is None:
        external_data = size > INLINE_LIMIT or _had_external_data(model)
    elif not external_data and size > INLINE_LIMIT:
        raise OutputError(
            f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file",
            where=str(path),
            remedy="write them as external data",
        )
    try:
        if external_data:
            _save_with_data(model, path, [value for value in weights if _is_large(value)])
        else:
            with _temporary(path) as (file, temporary):
                _write_model(model, file)
                os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: it is complete on disk before it takes its name.

    Raises:
        OutputError: the place cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the name ``path`` when the block ends well; else nothing has changed.

    Raises:
        OutputError: the place cannot be written.
    """
    path = Path(path)
    check_output_path(path)
    try:
        with _temporary(path) as (file, temporary):
            yield file
            _flush(file)
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


def check_output_path(path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None) -> None:
    """Whether a model can be written to ``path``, asked before the work starts.

    Args:
        source: the model that is read, which is not to be overwritten.

    Raises:
        OutputError: the folder does not exist or is not writable, ``path`` is a folder or the source itself.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise OutputError("is a folder", where=str(path), remedy="name a file in it")
    if path.exists() and not path.is_file():  # such as /dev/null, which a rename would replace
        raise OutputError("is a device or pipe, not a file", where=str(path), remedy="name a file")
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise OutputError(f"the folder '{folder}' {reason}", where=str(path), remedy="create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder '{folder}' is not writable", where=str(path), remedy="write elsewhere")
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise OutputError("is the input model itself", where=str(path), remedy="write to another file")


_EXPORT = "export the model again"
_OTHER_EXPORT = "export it again with opset 13 to 26, or convert it with onnx.version_converter"


def _load(path: Path) -> Model:
    model = _checked(_parse(path), Path(os.path.abspath(path)).parent)
    model.path = path
    return model


def _checked(proto: onnx.ModelProto, folder: Path) -> Model:
    """The model of ``proto``, whose external data lies in ``folder``; its domains are normalised in place."""
    _normalise_domains(proto)
    _check_versions(proto)
    for graph, tensor in _tensors(proto):
        _check_tensor(graph, tensor, folder)
    try:
        check(weightless_file(proto))
    except InvalidModel as error:
        if "is not defined before it is read" not in error.what or _undefined_name(proto.graph, set()):
            raise
        sorted_ = False
    else:
        sorted_ = True
    had_external_data = any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer
    )
    model = Model(_to_ir(proto))
    if sorted_:
        weightless(model.ir)  # what cannot be written again, such as a name that is not UTF-8, is found here
    else:
        _sort(model)
        check(weightless(model.ir))
    oir.external_data.set_base_dir(model.graph, folder)
    model.ir.ir_version = max(model.ir.ir_version, 4)
    model.ir.meta[_HAD_EXTERNAL_DATA] = had_external_data
    return model


def _parse(path: Path) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InvalidModel("no such file") from None
    except IsADirectoryError:
        raise InvalidModel("is a folder", remedy="name the .onnx file in it") from None
    except OSError as error:
        raise InvalidModel(f"cannot be read: {error.strerror or error}") from error
    if not content:
        raise InvalidModel("is an empty file", remedy=_EXPORT)
    # Every writer puts the IR version, field 1, first: a file that does not start so is something else.
    starts_like_onnx = content[0] == 0x08
    if not starts_like_onnx and content[:512].isascii() and b"\0" not in content[:512]:
        raise InvalidModel("is a text file, not an ONNX model", remedy="name the binary .onnx file")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        if starts_like_onnx:
            raise InvalidModel("is damaged or cut short", remedy="copy or export it again") from error
        raise InvalidModel("is not an ONNX model", remedy="name the .onnx file") from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise InvalidModel("holds no ONNX graph; it is another kind of file or cut short", remedy=_EXPORT)
    return proto


def _normalise_domains(proto: onnx.ModelProto) -> None:
    versions: dict[str, int] = {}
    for imported in proto.opset_import:
        domain = "" if imported.domain == "ai.onnx" else imported.domain
        if versions.setdefault(domain, imported.version) != imported.version:
            raise InvalidModel(f"imports two versions of the opset '{domain or 'ai.onnx'}'", remedy=_EXPORT)
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    for function in proto.functions:
        for imported in function.opset_import:
            if imported.domain == "ai.onnx":
                imported.domain = ""
    for graph in _bodies(proto):
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""


def _check_versions(proto: onnx.ModelProto) -> None:
    if proto.ir_version not in IR_VERSIONS:
        newer = proto.ir_version > IR_VERSIONS[-1]
        raise UnsupportedModel(
            f"IR version {proto.ir_version} is {'newer' if newer else 'older'} than the "
            f"{IR_VERSIONS[0]} to {IR_VERSIONS[-1]} that can be read",
            remedy="export it with an older onnx, or set ir_version" if newer else _OTHER_EXPORT,
        )
    opset = next((imported.version for imported in proto.opset_import if imported.domain == ""), None)
    if opset is None:
        raise InvalidModel("imports no version of the default opset ('ai.onnx')", remedy=_EXPORT)
    if opset not in OPSETS:
        reason = "newer than any runtime supports" if opset > OPSETS[-1] else "older than QuantizeLinear"
        raise UnsupportedModel(
            f"opset {opset} is {reason}; {OPSETS[0]} to {OPSETS[-1]} can be read", remedy=_OTHER_EXPORT
        )
    if proto.training_info:
        raise UnsupportedModel("holds training information", remedy="export the model for inference")


def _bodies(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Everything that holds nodes: the main graph, its subgraphs, functions and theirs."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while stack:
        body = stack.pop()
        yield body
        for node in body.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    stack.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    stack.extend(attribute.graphs)


def _tensors(proto: onnx.ModelProto) -> Iterator[tuple[bool, onnx.TensorProto]]:
    """Every tensor, and whether it is in a graph (False: in a function).

    Raises:
        UnsupportedModel: a sparse initializer, which onnx_ir does not keep.
    """
    for body in _bodies(proto):
        in_graph = isinstance(body, onnx.GraphProto)
        if isinstance(body, onnx.GraphProto):
            for sparse in body.sparse_initializer:
                raise UnsupportedModel(
                    "sparse initializers are not supported",
                    where=f"tensor '{sparse.values.name}'",
                    remedy="export it as a dense tensor",
                )
            for tensor in body.initializer:
                yield True, tensor
        for node in body.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR and attribute.HasField("t"):
                    yield in_graph, attribute.t
                elif attribute.type == onnx.AttributeProto.TENSORS:
                    for tensor in attribute.tensors:
                        yield False, tensor


def _check_tensor(in_graph: bool, tensor: onnx.TensorProto, folder: Path) -> None:
    """Whether a tensor's data are there: the checker is not shown the large ones and does not count the others."""
    where = f"tensor '{tensor.name}'"
    if any(size < 0 for size in tensor.dims):
        raise InvalidModel(f"has a negative dimension: {list(tensor.dims)}", where=where)
    try:
        expected = nbytes(tensor)
    except ValueError:
        raise UnsupportedModel(f"has the unknown element type {tensor.data_type}", where=where) from None
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if not in_graph:
            raise UnsupportedModel(
                "a function or list of tensors keeps external data", where=where, remedy=_EXPORT
            )
        _check_external(tensor, expected, folder, where)
    elif not tensor.HasField("raw_data"):
        _check_typed(tensor, where)
    elif len(tensor.raw_data) != expected:
        what = f"has {len(tensor.raw_data)} bytes of data where {expected} are needed"
        raise InvalidModel(what, where=where, remedy=_EXPORT)


def _check_typed(tensor: onnx.TensorProto, where: str) -> None:
    """Whether the one list of numbers a tensor without raw data has is as long as its shape wants."""
    try:
        fits = oir.serde.deserialize_tensor(tensor).numpy().shape == tuple(tensor.dims)
    except Exception as error:  # numpy and onnx_ir each have their own
        raise InvalidModel(f"its data do not fit its shape: {error}", where=where, remedy=_EXPORT) from error
    if not fits:
        raise InvalidModel("its data do not fit its shape", where=where, remedy=_EXPORT)


def _check_external(tensor: onnx.TensorProto, expected: int, folder: Path, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if tensor.data_type == onnx.TensorProto.STRING:
        raise InvalidModel("strings cannot be external data", where=where)
    if not location:
        raise InvalidModel("external data without a location", where=where, remedy=_EXPORT)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError:
        raise InvalidModel("external data with an offset or length that is no number", where=where) from None
    data = folder / location
    inside = Path(os.path.realpath(data)).is_relative_to(os.path.realpath(folder))
    if Path(location).is_absolute() or not Path(os.path.normpath(data)).is_relative_to(folder) or not inside:
        raise InvalidModel(
            f"external data '{location}' lies outside the model's folder",
            where=where,
            remedy="copy the data file beside the model",
        )
    if not data.is_file():
        raise InvalidModel(
            f"external data file '{location}' is missing",
            where=where,
            remedy=f"put it into the model's folder, {folder}",
        )
    status = data.stat()
    if status.st_nlink > 1:
        raise InvalidModel(
            f"external data file '{location}' has hard links, which onnx does not trust",
            where=where,
            remedy="copy it",
        )
    if offset < 0 or length != expected or status.st_size < offset + length:
        raise InvalidModel(
            f"needs {expected} bytes at {offset} of external data file '{location}' ({status.st_size} bytes), "
            f"{length} are declared",
            where=where,
            remedy="copy or export model and data again",
        )


def _undefined_name(graph: onnx.GraphProto, outer: set[str]) -> bool:
    """Whether some node reads a name that nothing in its scope defines, in whatever order."""
    names = outer | {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    names |= {name for node in graph.node for name in node.output} | {""}
    for node in graph.node:
        if not names.issuperset(node.input):
            return True
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            if any(_undefined_name(nested, names) for nested in inner):
                return True
    return False


def _to_ir(proto: onnx.ModelProto) -> oir.Model:
    try:
        ir = oir.from_proto(proto)
    except NotImplementedError as error:
        raise UnsupportedModel(f"uses something onnx_ir cannot hold: {error}") from error
    for graph in ir.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, oir.serde.TensorProtoTensor):
                # onnx_ir keeps these apart from the protobuf and would write both.
                value.const_value.raw.ClearField("metadata_props")
    return ir


def _sort(model: Model) -> None:
    try:
        model.graph.sort()
        for function in model.ir.functions.values():
            function.sort()
    except ValueError:
        cycle = next((found for graph in model.ir.graphs() if (found := find_cycle(graph))), [])
        raise InvalidModel(
            f"the graph has a cycle: {path_of(cycle)}" if cycle else "a function has a cycle"
        ) from None


def _had_external_data(model: Model) -> bool:
    return bool(model.ir.meta.get(_HAD_EXTERNAL_DATA)) or any(
        isinstance(value.const_value, oir.ExternalTensor)
        for graph in model.ir.graphs()
        for value in graph.initializers.values()
    )


def _is_large(value: oir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is not oir.DataType.STRING and tensor.nbytes > WEIGHT_BYTES


def _write_model(model: Model, file: BinaryIO) -> None:
    with substituted(model.ir, _in_memory):
        _write_proto(model.to_proto(), file)


def _write_proto(proto: onnx.ModelProto, file: BinaryIO) -> None:
    proto.ir_version = min(proto.ir_version, IR_VERSIONS[-1])
    file.write(proto.SerializeToString(deterministic=True))
    _flush(file)


def _in_memory(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
    if not isinstance(tensor, oir.ExternalTensor):
        return tensor
    return oir.Tensor(
        tensor.numpy(),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _save_with_data(model: Model, path: Path, weights: list[oir.Value]) -> None:
    data = path.with_name(path.name + ".data")
    with _temporary(data) as (data_file, data_temporary), _temporary(path) as (file, temporary):
        written: dict[int, oir.ExternalTensor] = {}
        for value in weights:
            tensor = value.const_value
            assert tensor is not None
            if id(tensor) not in written:
                written[id(tensor)] = _append(tensor, data_file, data)
        _flush(data_file)
        with substituted(model.ir, lambda tensor: written.get(id(tensor)) or _in_memory(tensor)):
            _write_proto(model.to_proto(), file)
        overwritten = _living_in(model, data)
        with _replaced(data_temporary, data):
            os.replace(temporary, path)
        # The old tensors, which clones may share, were mapped when they were written and keep the replaced file.
        for value in overwritten:
            tensor = value.const_value
            value.const_value = written.get(id(tensor)) or tensor


def _append(tensor: oir.TensorProtocol, file: BinaryIO, data: Path) -> oir.ExternalTensor:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    offset = file.tell()
    file.write(tensor.tobytes())
    return oir.ExternalTensor(
        data.name,
        offset,
        file.tell() - offset,
        tensor.dtype,
        shape=oir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=os.path.abspath(data.parent),
    )


def _living_in(model: Model, data: Path) -> list[oir.Value]:
    """The weights whose data are in the file ``data``."""
    if not data.exists():
        return []
    return [
        value
        for graph in model.ir.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, oir.ExternalTensor) and os.path.samefile(value.const_value.path, data)
    ]


@contextmanager
def _replaced(temporary: Path, path: Path) -> Iterator[None]:
    """``temporary`` takes the place of ``path``; when the block fails, what stood there comes back."""
    backup = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    had_one = path.exists()
    if had_one:
        os.link(path, backup)
    try:
        os.replace(temporary, path)
        try:
            yield
        except BaseException:
            if had_one:
                os.replace(backup, path)
            else:
                path.unlink()
            raise
    finally:
        backup.unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file to write to beside ``path``, with the mode it has; gone at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


_ALIGNMENT = 64
"""Bytes: what runtimes want of a mapped weight."""
