"""Fidelity: how closely the INT8 model follows the fake-quant model it was made from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import DataError, Interval, Model, Target
from qat2int8.pipelines.instrument import TooLargeToInstrument
from qat2int8.pipelines.level_probe import LevelProbe
from qat2int8.pipelines.levels import Levels, Pair
from qat2int8.pipelines.sessions import Feeds, ModelFile, deployed_session, reference_session, run_session, session

__all__ = ["Fidelity", "OutputFidelity", "compare", "synthetic_inputs"]


@dataclass(frozen=True)
class OutputFidelity:
    """One graph output, compared over all samples.

    ``sqnr_db`` is ``10 log10(|reference|^2 / |difference|^2)``, infinite when equal; ``max_error`` is the
    largest absolute difference, ``value_range`` what the finite values of the reference span.
    ``same_argmax_percent`` is the share of positions of all but the last axis whose largest entry is the same
    one, or one of several that are equally large; None for outputs without classes.

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

    ``levels`` compares every integer tensor that training put on a grid, each model computing from its own
    input; ``local_levels`` compares what each of them is when computed from the source's own values of those
    before it. A value within float rounding of the middle of two levels may be either of them. None where no such
    tensor was compared.
    """

    outputs: tuple[OutputFidelity, ...]
    samples: int
    data: str
    levels: Levels | None = None
    local_levels: Levels | None = None

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
        return {
            "outputs": [asdict(output) for output in self.outputs],
            "samples": self.samples,
            "data": self.data,
            "levels": None if self.levels is None else self.levels.as_dict(),
            "local_levels": None if self.local_levels is None else self.local_levels.as_dict(),
        }


def compare(
    reference: ModelFile,
    converted: ModelFile,
    batches: Iterable[Feeds],
    *,
    data: str = "synthetic",
    seconds: float = math.inf,
    target: Target | None = None,
    pairs: Sequence[Pair] = (),
) -> Fidelity:
    """Run both models on the same inputs: the reference with optimisation off, the converted one as deployed.

    Args:
        batches: inputs; at least one is used, then as many as fit into ``seconds``.
        target: what the converted model was made for; onnxruntime on this machine if not given.
        pairs: integer tensors of the converted model to compare as well, from :func:`~.levels.pairs_of`.

    Raises:
        UnsupportedModel: onnxruntime refuses one of the models.
        DataError: an input does not fit, there is none, or the models differ in the outputs they have.
    """
    started = time.perf_counter()
    open_result = session if target is None else partial(deployed_session, target)
    probe: LevelProbe | None = None
    run: Callable[[Feeds], list[npt.NDArray[Any]]]
    if pairs:
        # A model too large to be looked into is still compared by its outputs.
        with contextlib.suppress(TooLargeToInstrument):
            probe = LevelProbe(reference, converted, pairs, open_result)
    if probe is not None:
        names, run = probe.outputs, probe.add
    else:
        plain = reference_session(reference)
        names, run = [output.name for output in plain.get_outputs()], partial(run_session, plain)
    actual_session = open_result(converted)
    others = [output.name for output in actual_session.get_outputs()]
    if names != others:
        raise DataError(f"the models have different outputs: {', '.join(names)} and {', '.join(others)}")
    sums = [_Sums(name) for name in names]
    samples = 0
    for feeds in batches:
        expected = run(feeds)
        actual = run_session(actual_session, feeds)
        for total, left, right in zip(sums, expected, actual, strict=True):
            total.add(left, right)
        samples += max((array.shape[0] for array in feeds.values() if array.ndim), default=1)
        if time.perf_counter() - started > seconds:
            break
    if not samples:
        raise DataError("no samples to compare the models on")
    outputs = tuple(total.result() for total in sums if total.compared)
    if probe is None or not probe.pairs:
        return Fidelity(outputs, samples, data)
    return Fidelity(outputs, samples, data, probe.end_to_end, probe.local)


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
            same = _is_largest(left, right.argmax(-1)) | _is_largest(right, left.argmax(-1))
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


_EQUALLY_LARGE = 1e-6
"""Of an entry: float sums in another order differ by as much."""


def _is_largest(scores: npt.NDArray[np.float64], index: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Whether the entry at ``index`` of the last axis is the largest one, or as large."""
    chosen = np.take_along_axis(scores, index[..., None], -1)[..., 0]
    largest = scores.max(-1)
    same: npt.NDArray[np.bool_] = np.isclose(chosen, largest, rtol=_EQUALLY_LARGE, atol=0.0, equal_nan=True)
    return same


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
