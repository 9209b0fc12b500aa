"""Put tensors that were trained on 16 bits on 8-bit grids, when that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import INT8, UINT8, Code, Diagnostic, Fact, Model, QuantParams, Severity
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import FakeQuant, drop_unused_initializers, fake_quants, remove
from qat2int8.passes.registry import register

_WIDEST = 16


@register
@dataclass(frozen=True)
class NarrowWideGrids(Pass):
    """Replace fake quants of 9 to 16 bits by ones of 8 bits that end where they did.

    No integer kernel computes with 16 bits, so such a tensor stays in float between its quantizers. That is what
    was trained, and it is changed only when asked for. A symmetric grid stays symmetric, with zero at level 0; of
    a tensor that cannot be negative only the upper half is kept, on all 256 levels. The integers of a weight are
    rounded again. Each tensor is reported.

    Options:
        requantize: whether to do so at all.

    Raises:
        InvalidModel: a scale, zero point or axis is wrong.
    """

    name = "narrow-wide-grids"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    numerics = Numerics.QUANTIZING

    requantize: bool = False

    def run(self, model: Model, ctx: Context) -> PassResult:
        if not self.requantize:
            return PassResult({})
        work, notes = _Narrowing(model), dict[oir.Value, Diagnostic]()
        for fake in fake_quants(model, widest=_WIDEST):
            if not isinstance(fake, FakeQuant) or fake.is_bias or fake.params.dtype.bits <= INT8.bits:
                continue
            grid = work.narrow(fake)
            if fake.source not in notes:
                notes[fake.source] = self.note(
                    Code.GRID_REQUANTIZED,
                    f"{fake.params} was requantized to {grid}, as asked",
                    severity=Severity.NOTE,
                    value=fake.source.name or "",
                    remedy="keep it on 16 bits, in float, where its steps matter",
                )
        drop_unused_initializers(model, work.freed)
        if work.narrowed:
            common.ShapeInferencePass()(model.ir)  # which knows no quantizer of 16 bits before opset 21
        return PassResult({"narrowed": work.narrowed}, tuple(notes.values()))


@dataclass(eq=False)
class _Narrowing:
    """One run of the pass."""

    model: Model
    narrowed: int = 0
    freed: dict[oir.Value, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranges = Ranges(self.model)

    def narrow(self, fake: FakeQuant) -> QuantParams:
        """Put an 8-bit fake quant in the place of ``fake``; returns its grid."""
        source, anchor = fake.source, fake.nodes[-1]
        grid = _of_same_range(fake.params, nonnegative=not fake.constant and self.ranges.raw(source).nonnegative)
        name = source.name or "tensor"
        scale = self.model.add_initializer(f"{name}_scale", grid.scale)
        zero_point = self.model.add_initializer(f"{name}_zero_point", grid.zero_point.astype(grid.dtype.numpy))
        array = self.model.constant(source) if source.dtype is not oir.DataType.FLOAT else None
        if array is not None:
            levels = grid.quantize(fake.params.dequantize(array))
            integers = self.model.add_initializer(f"{name}_narrow", levels)
        else:
            integers = self._node(anchor, "QuantizeLinear", [source, scale, zero_point], grid)
            integers.type = oir.TensorType(grid.dtype.storage)
        result = self._node(anchor, "DequantizeLinear", [integers, scale, zero_point], grid)
        result.type = oir.TensorType(oir.DataType.FLOAT)
        self.freed.update(dict.fromkeys([*remove(self.model, fake, result), source]))
        self.narrowed += 1
        return grid

    def _node(self, anchor: oir.Node, op_type: str, inputs: list[oir.Value], grid: QuantParams) -> oir.Value:
        source = inputs[0]
        name = self.model.unique_name(f"{source.name}_{op_type}")
        node = oir.node(op_type, inputs, {} if grid.axis is None else {"axis": grid.axis}, name=name)
        self.model.insert_before(anchor, node)
        result = node.outputs[0]
        result.name = self.model.unique_name(f"{source.name}_narrow")
        result.shape = None if source.shape is None else source.shape.copy()
        return result


def _of_same_range(params: QuantParams, *, nonnegative: bool) -> QuantParams:
    """The 8-bit grid that ends where ``params`` does."""
    zeros, step = params.zero_point.astype(np.float64), params.scale.astype(np.float64)
    low, high = (params.dtype.qmin - zeros) * step, (params.dtype.qmax - zeros) * step
    origin = f"{params.origin}, narrowed from {params.dtype}"
    if params.dtype.signed and params.symmetric and not nonnegative:
        return params.with_(scale=_float32(high / INT8.qmax), dtype=INT8, origin=origin)
    low = np.zeros_like(low) if nonnegative else np.minimum(low, 0.0)
    scale = (np.maximum(high, 0.0) - low) / UINT8.qmax
    lowest = np.clip(np.rint(-low / scale), UINT8.qmin, UINT8.qmax).astype(np.int32)
    return params.with_(scale=_float32(scale), zero_point=lowest, dtype=UINT8, origin=origin)


def _float32(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.asarray(array, np.float32)
