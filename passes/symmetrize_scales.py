"""Bring grids onto targets whose zero point is always 0."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import INT8, Code, Diagnostic, Fact, Model, QuantDType, QuantParams, Severity
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.kernels import kernel_of, quantized_outputs
from qat2int8.passes.registry import register


class OnAsymmetric(enum.StrEnum):
    """What becomes of a grid that loses levels or saturates elsewhere on int8 with zero point 0."""

    REGRID = "regrid"
    """A new step: the range stays what it was, with fewer levels in it. Reported tensor by tensor."""
    FLOAT = "float"
    """It stays as it is, so that what needs it stays in float, with that as the reason."""


@register
@dataclass(frozen=True)
class SymmetrizeScales(Pass):
    """Move the grids of quantized tensors to int8 with zero point 0, for targets that take no other.

    Nothing is lost where zero is the lowest level, at most 127 levels lie above it, and the tensor is never
    negative: the step stays, and so does the end. Any other grid loses something. uint8 from zero up keeps its
    range on half the levels; a range off centre keeps its larger side; a grid of few levels keeps its step and
    saturates later below. That is reported, or refused with ``asymmetric=float``.

    Options:
        asymmetric: ``regrid`` (default) or ``float``.
    """

    name = "symmetrize-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.QUANTIZING

    asymmetric: OnAsymmetric = OnAsymmetric.REGRID

    def run(self, model: Model, ctx: Context) -> PassResult:
        if ctx.target.zero_point != "symmetric":
            return PassResult()
        ranges, quantized = Ranges(model), _quantized(model, ctx)
        notes: list[Diagnostic] = []
        counts = {"kept exactly": 0, "put on new levels": 0}
        for value, params in model.scales.items():
            foreign = params.per_channel or params.dtype.bits > INT8.bits
            if value not in quantized or foreign or ctx.target.lower(params) is not None:
                continue
            exact = _from_zero(params) if ranges.raw(value).nonnegative else None
            if exact is not None:
                model.scales.set(value, exact)
                counts["kept exactly"] += 1
            elif self.asymmetric is OnAsymmetric.REGRID:
                symmetric = _symmetric(params)
                model.scales.set(value, symmetric)
                counts["put on new levels"] += 1
                notes.append(self._regridded(value, params, symmetric))
        return PassResult(counts, tuple(notes))

    def _regridded(self, value: oir.Value, trained: QuantParams, symmetric: QuantParams) -> Diagnostic:
        factor = float(symmetric.scale) / float(trained.scale)
        steps = "the same steps" if factor == 1.0 else f"steps {factor:.3g} times as wide"
        return self.note(
            Code.GRID_REQUANTIZED,
            f"{trained} became {symmetric}: {steps}, {symmetric.interval} instead of {trained.interval}",
            severity=Severity.WARNING,
            value=value.name or "",
            remedy="train on int8 grids with zero point 0, or keep it in float with asymmetric=float",
        )


def _quantized(model: Model, ctx: Context) -> set[oir.Value]:
    """The tensors that get a quantizer on this target if they have a grid."""
    kernels = (kernel_of(model, node, ctx.target) for node in model.nodes())
    read = {value for kernel in kernels if kernel is not None for value in (*kernel.inputs, *kernel.outputs)}
    return read.union(quantized_outputs(model, ctx.target))


def _from_zero(params: QuantParams) -> QuantParams | None:
    """The same levels for a tensor that is never negative; None where they are too many or begin elsewhere."""
    top = params.dtype.qmax - int(params.zero_point)
    if int(params.zero_point) != params.dtype.qmin or top > INT8.qmax:
        return None
    return params.with_(zero_point=np.zeros((), np.int32), dtype=_up_to(top))


def _symmetric(params: QuantParams) -> QuantParams:
    """A grid around zero over the range of ``params``, with its step where 8 bits are enough for that."""
    zero, span = int(params.zero_point), params.span
    lowest, highest = params.dtype.qmin - zero, params.dtype.qmax - zero
    if lowest >= INT8.qmin and highest <= INT8.qmax:
        return params.with_(zero_point=np.zeros((), np.int32), dtype=_up_to(highest), trained=span)
    step = np.asarray(span.amax / INT8.qmax, np.float32)
    return params.with_(scale=step, zero_point=np.zeros((), np.int32), dtype=INT8, trained=span)


def _up_to(top: int) -> QuantDType:
    return INT8 if top == INT8.qmax else QuantDType(INT8.bits, signed=True, top=top)
