"""Whether a pass kept the model's numbers: onnxruntime, optimisation off, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Model, PassFailed, Severity
from qat2int8.passes import Numerics
from qat2int8.pipelines.sessions import reference_session

__all__ = ["NumericCheck"]

Array = npt.NDArray[Any]

EXACT_BOUND = 1e-5
"""Of an output's largest magnitude: float additions in another order."""
CLOSE_BOUND = 1e-3
"""Of an output's largest magnitude: constants rounded after they were folded into one another."""
MIN_SQNR = 10.0
"""Decibels; moving grids costs some, a wrong scale or zero point costs nearly all."""
MAX_FLIPPED = 0.01
"""Share of an integer output's elements that rounding may carry over by more than one level."""


class NumericCheck:
    """The outputs of a model for one set of random inputs, compared after each pass with the ones before it.

    A quantizing pass may also come closer to the model as it was at the start: it brings back the saturation
    that went when fake quants were taken off.
    """

    def __init__(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._feeds = feeds
        self._outputs = self._first = outputs

    @classmethod
    def of(cls, model: Model) -> NumericCheck | Diagnostic:
        """Compute the outputs before the first pass.

        Symbolic dimensions become 1, or 2 where the model does not run with 1. Inputs that go into a quantizer
        are spread over its range, others over [-1, 1].

        Returns:
            A warning instead where onnxruntime cannot run the model, for one because of custom ops.
        """
        reason = ""
        for size in (1, 2):
            try:
                feeds = _feeds(model, size)
                return cls(feeds, _run(model, feeds))
            except Exception as error:  # onnxruntime's own errors share no base but this one
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Diagnostic(
            Code.UNSUPPORTED_OP,
            Severity.WARNING,
            f"onnxruntime cannot run this model, so numbers are not compared between passes: {reason}",
            remedy="verify with 'checker', or register the custom ops",
        )

    def check(self, model: Model, numerics: Numerics) -> None:
        """Compare the outputs now with those of the last call.

        Raises:
            PassFailed: the model no longer runs, or an output moved farther than ``numerics`` allows.
        """
        try:
            outputs = _run(model, self._feeds)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PassFailed(f"left a model that onnxruntime no longer runs: {reason}") from error
        for name, before in self._outputs.items():
            problem = compare(before, outputs[name], numerics)
            if problem and numerics is Numerics.QUANTIZING:
                problem = compare(self._first[name], outputs[name], numerics)
            if problem:
                raise PassFailed(f"output '{name}' {problem}", remedy="see the two graphs with --dump-dir")
        self._outputs = outputs


def compare(before: Array, after: Array, numerics: Numerics) -> str:
    """What is wrong with an output after a pass; empty when nothing is.

    Integer outputs must be equal after an exact pass and all but equal after a close one; after a quantizing
    pass they are not compared, because the index of a largest element may rightly change. Neither is an output
    whose type became integer or float.
    """
    if before.shape != after.shape:
        return f"has shape {after.shape}, and {before.shape} before"
    if before.dtype.kind not in "fiub" or (before.dtype.kind == "f") != (after.dtype.kind == "f"):
        return ""
    if before.dtype.kind != "f":
        return _compare_integers(before, after, numerics)
    reference, now = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(reference)
    if numerics is Numerics.UNCLAMPED:
        return ""
    if not np.isfinite(now[finite]).all():
        return "has infinite or undefined elements that were finite before"
    reference, now = reference[finite], now[finite]
    if not reference.size:
        return ""
    error = now - reference
    if numerics is Numerics.QUANTIZING:
        sqnr = _decibels(float(np.square(reference).sum()), float(np.square(error).sum()))
        return (
            "" if sqnr >= MIN_SQNR else f"kept {sqnr:.1f} dB SQNR, less than the {MIN_SQNR:.0f} dB of a sound grid"
        )
    bound = EXACT_BOUND if numerics is Numerics.EXACT else CLOSE_BOUND
    span = max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny))
    moved = float(np.abs(error).max()) / span
    return (
        ""
        if moved <= bound
        else f"moved by {moved:.2g} of its range, more than the {bound:g} of {numerics} passes"
    )


def _compare_integers(before: Array, after: Array, numerics: Numerics) -> str:
    if numerics in (Numerics.QUANTIZING, Numerics.UNCLAMPED):
        return ""
    distance = np.abs(before.astype(np.float64) - after.astype(np.float64))
    if numerics is Numerics.EXACT:
        changed = int(np.count_nonzero(distance))
        return f"changed in {changed} of {before.size} elements" if changed else ""
    flipped = float(np.mean(distance > 1)) if before.size else 0.0
    return f"changed by more than one level in {flipped:.1%} of its elements" if flipped > MAX_FLIPPED else ""


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0.0 else float("-inf")


def _run(model: Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    session = reference_session(model.to_proto().SerializeToString())
    names = [output.name for output in session.get_outputs()]
    results: list[Array] = session.run(names, dict(feeds))
    return dict(zip(names, results, strict=True))


def _feeds(model: Model, size: int) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if value.dtype is None or value.shape is None:
            raise ValueError(f"input '{value.name}' has no type or shape")
        shape = [dim if isinstance(dim, int) else size for dim in value.shape]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(int(value.dtype))
        feeds[value.name or ""] = _draw(generator, shape, dtype, _span(model, value))
    return feeds


def _draw(
    generator: np.random.Generator, shape: list[int], dtype: np.dtype[Any], span: tuple[float, float]
) -> Array:
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        # Wide integers are indices and lengths, for which 0 and 1 are the safe choice; bytes are pixels.
        low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize == 1 else (0, 1)
        return generator.integers(low, high + 1, shape).astype(dtype)
    return generator.uniform(*span, shape).astype(dtype)


def _span(model: Model, value: oir.Value) -> tuple[float, float]:
    """The range of the quantizer that reads ``value``: outside of it fake quant clips and numbers say little."""
    for use in value.uses():
        if use.node.op_type != "QuantizeLinear" or use.idx != 0 or len(use.node.inputs) < 2:
            continue
        scale = model.constant(use.node.inputs[1])
        zero = model.constant(use.node.inputs[2]) if len(use.node.inputs) > 2 else np.zeros((), np.uint8)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
            continue
        step, level, limits = float(scale.item()), int(zero.item()), np.iinfo(str(zero.dtype))
        return step * (limits.min - level), step * (limits.max - level)
    return -1.0, 1.0
