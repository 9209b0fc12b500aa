"""What a runtime can compute in integers, as data: passes read it, ``pipelines/targets/*.yaml`` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np

from qat2int8.ir.errors import PipelineError
from qat2int8.ir.interval import Interval
from qat2int8.ir.quant import INT8, UINT8, Provenance, QuantDType, QuantParams


class Contract(StrEnum):
    """How an op's integer kernel wants its tensors."""

    COMPUTE = "compute"
    """Dequantized inputs, int32 bias, one quantizer on the output: Conv, Gemm, MatMul."""
    ELEMENTWISE = "elementwise"
    """Every input and the output on grids of their own: Add, Mul, Concat, GlobalAveragePool."""
    MOVEMENT = "movement"
    """Moves or selects elements: runs on the integers themselves, input and output share one grid."""
    RESIDUAL = "residual"
    """Fused into the convolution that computes one of its two inputs; the other one is on a grid: Add."""


class Format(StrEnum):
    """How a model says that it computes on integers."""

    QDQ = "qdq"
    """Float operators between Dequantize and Quantize, which the runtime makes integer kernels of."""
    QOPERATOR = "qoperator"
    """The operators of onnxruntime that compute on integers: QLinearConv, QGemm and the like."""


@dataclass(frozen=True)
class OpRule:
    """How one op type becomes an integer kernel of the target."""

    contract: Contract
    float_output: bool = False
    """Whether the kernel can also end in float (Gemm and MatMul heads)."""
    absorbs: tuple[str, ...] = ()
    """Activations that vanish in the output's quantizer when its grid saturates where they clamp."""
    weight_axis: int | None = None
    """Output-channel axis of a constant second input; None: the weight is per tensor only."""
    data_inputs: tuple[int, ...] = (0,)
    """Which inputs carry tensors on grids; the others (shapes, indices, bounds) are left alone."""


@dataclass(frozen=True)
class Target:
    """A runtime and what it accepts.

    ``activation`` is the integer type activations are lowered to, "either" where both will do; with
    ``zero_point`` "any" a range may sit anywhere (asymmetric), with "symmetric" zero is always level 0. Weights
    are int8, with zero point 0 where ``weight_zero_point`` is "symmetric"; with "any" a kernel also takes
    another one, slower.

    With ``placement`` "around" an integer kernel reads and writes tensors on grids, and a quantizer stands behind
    each. With "inputs" quantizers stand on the inputs of layers only: the runtime fuses float ops behind a layer
    into it and finds the grid of the result at the next layer.

    Without ``integer_clip`` levels at the ends of a grid cannot be cut off between Quantize and Dequantize, and a
    float Clip in front does it. ``rewrites`` names the passes, among those that pay on some runtimes only, that
    run for this one, and ``formats`` the forms of a model that the runtime reads. ``faster_in_float`` names op
    types that have an integer kernel which is slower than Dequantize, the float kernel and Quantize. ``runtime``
    is what executes the result, and with that how it can be certified. With ``product_sums`` "narrow" its
    processors add products of uint8 activations and int8 weights in pairs in 16 bits, where they can overflow.
    """

    name: str
    description: str
    activation: Literal["uint8", "int8", "either"]
    zero_point: Literal["any", "symmetric"]
    per_channel_weights: bool
    int32_bias: bool
    min_opset: int
    max_opset: int
    max_ir_version: int
    weight_zero_point: Literal["any", "symmetric"] = "symmetric"
    placement: Literal["around", "inputs"] = "around"
    integer_clip: bool = True
    runtime: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    product_sums: Literal["wide", "narrow"] = "wide"
    rewrites: tuple[str, ...] = ()
    faster_in_float: tuple[str, ...] = ()
    ops: Mapping[str, OpRule] = field(default_factory=dict)
    formats: tuple[Format, ...] = (Format.QDQ,)

    def check_format(self, wanted: Format) -> None:
        """Raise when the runtime does not read models of this format.

        Raises:
            PipelineError: names the formats it reads.
        """
        if wanted not in self.formats:
            raise PipelineError(
                f"{self.name} does not read the format {wanted}",
                remedy=f"it reads {' and '.join(self.formats)}",
            )

    @property
    def activation_dtype(self) -> QuantDType:
        """The grid type of activations; of new grids where both will do."""
        return INT8 if self.activation == "int8" else UINT8

    def grid_for(self, span: Interval, *, source: Provenance, origin: str) -> QuantParams:
        """The finest grid of this target's activations that holds ``span`` and, exactly, 0.0.

        Args:
            span: a bounded interval of real values.

        Raises:
            ValueError: ``span`` is unbounded.
        """
        if not span.bounded:
            raise ValueError(f"no grid holds {span}")
        dtype = self.activation_dtype
        if self.zero_point == "symmetric":
            step = max(span.amax, _TINY) / dtype.qmax
            return QuantParams.make(step, 0, dtype, source=source, origin=origin)
        lo, hi = min(span.lo, 0.0), max(span.hi, 0.0)
        step = float(np.float32(max(hi - lo, _TINY) / (dtype.qmax - dtype.qmin)))
        zero = int(np.clip(round(dtype.qmin - lo / step), dtype.qmin, dtype.qmax))
        return QuantParams.make(step, zero, dtype, source=source, origin=origin)

    def lower(self, params: QuantParams) -> QuantParams | None:
        """The same real values on this target's activation type, or None where the target cannot hold them.

        Moving between signed and unsigned shifts the zero point by half the range and keeps every level, so
        it is bit exact. The lowest level that a narrow range left out comes back: only what saturated next to it
        ever reaches it.
        """
        dtype = self.activation_dtype
        if params.per_channel or params.dtype.bits > dtype.bits:
            return None
        if self.activation == "either":
            dtype = INT8 if params.dtype.signed else UINT8
        if dtype.signed and not params.dtype.signed and self.zero_point == "any":
            return self._shifted_down(params)
        shift = 0
        if params.dtype.signed != dtype.signed:
            shift = 1 << (params.dtype.bits - 1)
            shift = shift if params.dtype.signed else -shift
        if params.dtype.narrow_range and np.all(params.zero_point == params.dtype.qmin):
            # Nothing is below zero, and the level that is missing there must not come back: zero stays lowest.
            shift -= 1
        shifted, top = params.zero_point + shift, params.dtype.top
        lowered = QuantDType(
            params.dtype.bits,
            dtype.signed,
            top=None if top is None else top + shift,
        )
        if np.any(shifted < lowered.qmin) or np.any(shifted > lowered.qmax):
            return None
        if self.zero_point == "symmetric" and np.any(shifted != 0):
            return None
        return params.with_(zero_point=shifted.astype(np.int32), dtype=lowered)

    def _shifted_down(self, params: QuantParams) -> QuantParams:
        """An unsigned grid on signed integers, its lowest level on theirs: whatever saturates at it still does."""
        dtype = self.activation_dtype
        shift, top = dtype.qmin, params.dtype.qmax + dtype.qmin
        lowered = dtype if top == dtype.qmax else QuantDType(dtype.bits, dtype.signed, top=top)
        return params.with_(zero_point=(params.zero_point + shift).astype(np.int32), dtype=lowered)


_TINY = 1e-6
"""A range of a constant-zero tensor still needs a positive step."""
