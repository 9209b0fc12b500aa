"""Fidelity: how closely the INT8 model follows the fake-quant model it was made from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import DataError, Interval, Model, Target
from qat2int8.pipelines.sessions import Feeds, ModelFile, deployed_session, reference_session, run_session, session

__all__ = ["Fidelity", "OutputFidelity", "compare", "synthetic_inputs"]


@dataclass(frozen=True)
class OutputFidelity:
    """One graph output, compared over all samples.

    ``sqnr_db`` is ``10 log10(|reference|^2 / |difference|^2)``, infinite when equal; ``max_error`` is the
    largest absolute difference, ``value_range`` what the finite values of the reference span.
    ``same_argmax_percent`` is the share of positions of all but the last axis whose largest entry is the same
    one; None for outputs without classes.

    NaN and infinity equal themselves; where only one of the models has them the error is infinite, the
    SQNR minus infinity.
    """

    name: str
    sqnr_db: float
    max_error: float
    value_range: float
    same_argmax_percent: float | None


@dataclass(frozen=True)
class Fidelity:
    """The tensors among the graph outputs, over ``samples`` inputs, which are ``data`` ("synthetic" or what the
    caller names). Outputs that hold no numbers (strings, sequences) are not compared and not listed.
    """

    outputs: tuple[OutputFidelity, ...]
    samples: int
    data: str

    @property
    def sqnr_db(self) -> float:
        """The worst output's."""
        return min((output.sqnr_db for output in self.outputs), default=math.inf)

    @property
    def same_argmax_percent(self) -> float | None:
        """The worst output's, None when no output has classes."""
        shares = [o.same_argmax_percent for o in self.outputs if o.same_argmax_percent is not None]
        return min(shares, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def compare(
    reference: ModelFile,
    converted: ModelFile,
    batches: Iterable[Feeds],
    *,
    data: str = "synthetic",
    seconds: float = math.inf,
    target: Target | None = None,
) -> Fidelity:
    """Run both models on the same inputs: the reference with optimisation off, the converted one as deployed.

    Args:
        batches: inputs; at least one is used, then as many as fit into ``seconds``.
        target: what the converted model was made for; onnxruntime on this machine if not given.

    Raises:
        UnsupportedModel: onnxruntime refuses one of the models.
        DataError: an input does not fit, there is none, or the models differ in the outputs they have.
    """
    started = time.perf_counter()
    expected_session = reference_session(reference)
    actual_session = session(converted) if target is None else deployed_session(target, converted)
    names = [output.name for output in expected_session.get_outputs()]
    others = [output.name for output in actual_session.get_outputs()]
    if names != others:
        raise DataError(f"the models have different outputs: {', '.join(names)} and {', '.join(others)}")
    sums = [_Sums(name) for name in names]
    samples = 0
    for feeds in batches:
        expected = run_session(expected_session, feeds)
        actual = run_session(actual_session, feeds)
        for total, left, right in zip(sums, expected, actual, strict=True):
            total.add(left, right)
        samples += max((array.shape[0] for array in feeds.values() if array.ndim), default=1)
        if time.perf_counter() - started > seconds:
            break
    if not samples:
        raise DataError("no samples to compare the models on")
    return Fidelity(tuple(total.result() for total in sums if total.compared), samples, data)


class _Sums:
    """Running sums over the batches of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.compared = False
        self.signal = self.noise = self.max_error = 0.0
        self.lo, self.hi = math.inf, -math.inf
        self.same = self.positions = 0

    def add(self, expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fiub":
            return
        if expected.shape != actual.shape:
            raise DataError(f"output '{self.name}' has shape {actual.shape}, the reference has {expected.shape}")
        self.compared = True
        if not expected.size:
            return
        left, right = expected.astype(np.float64), actual.astype(np.float64)
        equal = (left == right) | (np.isnan(left) & np.isnan(right))
        with np.errstate(invalid="ignore"):
            error = np.where(equal, 0.0, np.abs(left - right))
        error[np.isnan(error)] = math.inf
        finite = left[np.isfinite(left)]
        self.signal += float(np.square(finite).sum())
        self.noise += float(np.square(error).sum())
        self.max_error = max(self.max_error, float(error.max()))
        if finite.size:
            self.lo, self.hi = min(self.lo, float(finite.min())), max(self.hi, float(finite.max()))
        if expected.ndim >= 2 and expected.shape[-1] > 1 and expected.dtype.kind == "f":
            same = left.argmax(-1) == right.argmax(-1)
            self.same += int(same.sum())
            self.positions += same.size

    def result(self) -> OutputFidelity:
        if self.noise == 0.0:
            sqnr = math.inf
        elif self.signal == 0.0 or math.isinf(self.noise):
            sqnr = -math.inf
        else:
            sqnr = 10.0 * math.log10(self.signal / self.noise)
        share = 100.0 * self.same / self.positions if self.positions else None
        return OutputFidelity(self.name, sqnr, self.max_error, max(self.hi - self.lo, 0.0), share)


def synthetic_inputs(model: Model, count: int, *, seed: int = 0) -> Iterator[Feeds]:
    """Inputs of one sample each, for models that come without data.

    A float input is smooth noise over the range of its grid (``model.scales``), the kind of signal a network
    of images was trained on; 8-bit integers are pixels of any value, wider ones small indices. Dimensions that
    are not fixed are 1, but for the height and width of images, where a network needs something to stride over.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {value.name or "": _sample(rng, value, model) for value in model.graph.inputs}


_IMAGE_SIZE = 64
"""Of an image whose size is not fixed: two, after the five halvings of most networks."""


def _sample(rng: np.random.Generator, value: oir.Value, model: Model) -> npt.NDArray[Any]:
    shape = _shape(value)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize == 1:
        limits = np.iinfo(np.int8 if dtype.kind == "i" else np.uint8)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 16, shape).astype(dtype)
    params = model.scales.get(value)
    span = params.span if params is not None else Interval(-1.0, 1.0)
    noise = _smooth_noise(rng, shape)
    middle, half = (span.lo + span.hi) / 2.0, (span.hi - span.lo) / 2.0
    # Rounded after clipping, a bound could land one float outside of the range.
    return np.clip((middle + half * noise / 3.5).astype(dtype), dtype.type(span.lo), dtype.type(span.hi))


def _shape(value: oir.Value) -> list[int]:
    dims = list(value.shape) if value.shape is not None else [1]
    return [
        dim if isinstance(dim, int) else _IMAGE_SIZE if len(dims) >= 4 and axis >= 1 else 1
        for axis, dim in enumerate(dims)
    ]


def _smooth_noise(rng: np.random.Generator, shape: list[int]) -> npt.NDArray[np.float64]:
    """Normal noise; the last two axes of images and the like vary slowly."""
    noise = rng.standard_normal(shape)
    for axis in (-1, -2) if len(shape) >= 4 else ():
        if shape[axis] >= 16:
            block = shape[axis] // 8
            coarse = np.repeat(np.take(noise, range(0, shape[axis], block), axis), block, axis)
            noise = 0.8 * np.take(coarse, range(shape[axis]), axis) + 0.2 * noise
    return noise
