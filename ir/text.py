"""A model as text a person can read and compare: ONNX syntax with the weights left out."""

from __future__ import annotations

import difflib
import hashlib
import re

import onnx
import onnx_ir as oir

from qat2int8.ir.model import Model
from qat2int8.ir.substitute import substituted

SHOWN_ELEMENTS = 16
"""Tensors of more elements are shown as their type and a hash."""


def to_text(model: Model, *, scales: bool = False) -> str:
    """``model`` in ONNX text syntax, large tensors as ``w = <float[64,3,7,7] sha1:ab12cd34>``.

    Args:
        scales: append the scale table as comments.
    """
    with substituted(model.ir, _elided):
        proto = model.to_proto()
    declared = [info for info in proto.graph.value_info if info.name not in model.graph.initializers]
    shown = onnx.GraphProto(value_info=declared)
    proto.graph.ClearField("value_info")  # of an initializer it says what stands beside it anyway
    proto.graph.value_info.MergeFrom(shown.value_info)
    text: str = onnx.printer.to_text(proto)
    text = _PLACEHOLDER.sub(_shown, text)
    if scales and len(model.scales):
        rows = [
            f"//   {tensor}: {grid} {span} from {origin}" for tensor, grid, span, origin in model.scales.rows()
        ]
        text = "\n".join([text.rstrip("\n"), "// scales", *rows]) + "\n"
    return text


def text_diff(before: str, after: str) -> str:
    """What changed from ``before`` to ``after``, as a unified diff; empty when nothing did."""
    return "\n".join(
        difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=2)
    )


_MARK = "qat2int8-elided:"
_PLACEHOLDER = re.compile(r"string(?: (?P<name>\"[^\"]*\"|\S+) =)? ?\{\"" + _MARK + r"(?P<tensor>[^\"]*)\"\}")
_DIGEST = "qat2int8.sha1"


def _elided(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
    """A one-string tensor that says what ``tensor`` is, for the printer to print in its place."""
    if tensor.size <= SHOWN_ELEMENTS:
        return tensor
    shape = ",".join(str(size) for size in tensor.shape)
    summary = f"{_MARK}{_ONNX_NAMES[tensor.dtype]}[{shape}] sha1:{_digest(tensor)}"
    return oir.StringTensor([summary.encode()], shape=oir.Shape([]), name=tensor.name)


def _digest(tensor: oir.TensorProtocol) -> str:
    """The first eight hex digits of the SHA-1 of the data, remembered by the tensor, which never changes."""
    known = tensor.meta.get(_DIGEST)
    if known is None:
        hashed = hashlib.sha1(usedforsecurity=False)
        if isinstance(tensor, oir.StringTensor):
            for string in tensor.string_data():
                hashed.update(len(string).to_bytes(8, "little") + string)
        else:
            hashed.update(tensor.tobytes())
        known = tensor.meta[_DIGEST] = hashed.hexdigest()[:8]
    return str(known)


def _shown(match: re.Match[str]) -> str:
    return f"{match['name']} = <{match['tensor']}>" if match["name"] else f"<{match['tensor']}>"


_ONNX_NAMES = {dtype: dtype.name.lower() for dtype in oir.DataType}
