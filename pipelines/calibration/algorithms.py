"""How a range is chosen from what was seen: every algorithm by name, with its source."""

from __future__ import annotations

import abc
import difflib
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qat2int8.ir import DataError, Interval, PipelineError
from qat2int8.pipelines.calibration.histogram import Histogram
from qat2int8.pipelines.calibration.statistics import TensorStatistics
from qat2int8.pipelines.calibration.thresholds import (
    divergence_threshold,
    quantile,
    regression_threshold,
    squared_error_threshold,
)
from qat2int8.pipelines.spec import PassSpec, PipelineSpec, option_fields

__all__ = ["ALGORITHMS", "DEFAULT_ALGORITHM", "Algorithm", "parse_algorithm"]

DEFAULT_ALGORITHM = "entropy"


@dataclass(frozen=True)
class Algorithm(abc.ABC):
    """One way to choose the range of a tensor. Subclasses are frozen dataclasses: their fields are the options.

    Attributes:
        name: what people call it.
        source: the paper or program that it is known from.
        needs_values: whether it looks at a histogram; without one only the ends of samples are collected.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_values: ClassVar[bool] = True

    def span(self, tensor: TensorStatistics) -> tuple[Interval, float]:
        """The range to keep and the end of a symmetric one.

        Raises:
            DataError: no value was seen, or magnitudes were not counted and are needed.
        """
        if tensor.lo > tensor.hi:
            raise DataError("no value was seen")
        threshold = float(min(self.threshold(tensor), tensor.amax))
        lo, hi = (min(max(end, -threshold), threshold) for end in (tensor.lo, tensor.hi))
        return Interval(lo, hi), threshold

    @abc.abstractmethod
    def threshold(self, tensor: TensorStatistics) -> float:
        """The largest magnitude to keep."""

    def __str__(self) -> str:
        defaults = {name: option.default for name, option in option_fields(type(self)).items()}
        values = {name: getattr(self, name) for name in defaults}
        return str(PassSpec(self.name, {name: v for name, v in values.items() if v != defaults[name]}))


@dataclass(frozen=True)
class MinMax(Algorithm):
    """Everything that was seen: the smallest and the largest value."""

    name = "minmax"
    source = "TensorRT MinMaxCalibration; Paddle min_max"
    needs_values = False

    def threshold(self, tensor: TensorStatistics) -> float:
        return tensor.amax


@dataclass(frozen=True)
class Direct(Algorithm):
    """The largest magnitude, on both sides of zero where values have both signs."""

    name = "direct"
    source = "Paddle Calibrator, algo='direct'"
    needs_values = False

    def threshold(self, tensor: TensorStatistics) -> float:
        return tensor.amax

    def span(self, tensor: TensorStatistics) -> tuple[Interval, float]:
        span, amax = super().span(tensor)
        return (Interval(-amax, amax) if span.lo < 0.0 < span.hi else span), amax


@dataclass(frozen=True)
class MovingAverage(Algorithm):
    """Averages of the ends of samples, in which each sample back counts ``rate`` times as much as the next.

    Defined on the order of the data, not that of their arrival: shards give what one run gives.

    Options:
        rate: between 0 and 1.
    """

    name = "moving-average"
    source = "Paddle fake_quantize_moving_average_abs_max, with the ends of each sample in place of batches"
    needs_values = False

    rate: float = 0.9

    def __post_init__(self) -> None:
        _check_share(self.name, "rate", self.rate)

    def threshold(self, tensor: TensorStatistics) -> float:
        return max(abs(end) for end in self._ends(tensor))

    def span(self, tensor: TensorStatistics) -> tuple[Interval, float]:
        if tensor.lo > tensor.hi:
            raise DataError("no value was seen")
        return Interval(*self._ends(tensor)), self.threshold(tensor)

    def _ends(self, tensor: TensorStatistics) -> tuple[float, float]:
        seen = np.isfinite(tensor.minima)
        weights = self.rate ** np.arange(np.count_nonzero(seen) - 1, -1, -1, dtype=np.float64)
        ends = (float(np.average(array[seen], weights=weights)) for array in (tensor.minima, tensor.maxima))
        return next(ends), next(ends)


@dataclass(frozen=True)
class Average(Algorithm):
    """The mean over samples of the largest magnitude of each."""

    name = "avg"
    source = "Paddle PostTrainingQuantization, algo='avg'"
    needs_values = False

    def threshold(self, tensor: TensorStatistics) -> float:
        magnitudes = np.maximum(-tensor.minima.astype(np.float64), tensor.maxima.astype(np.float64))
        return float(np.mean(magnitudes[np.isfinite(magnitudes)]))


@dataclass(frozen=True)
class Entropy(Algorithm):
    """The threshold that loses the least information; tensors that are never negative have 256 levels, others 128
    on each side. Of fewer than 4,096 values other than zero the largest magnitude is taken.
    """

    name = "entropy"
    source = "TensorRT EntropyCalibration2; Migacz, 8-bit inference with TensorRT, GTC 2017"

    def threshold(self, tensor: TensorStatistics) -> float:
        return divergence_threshold(_counted(tensor), tensor.amax, levels=256 if tensor.lo >= 0.0 else 128)


@dataclass(frozen=True)
class EntropyV1(Algorithm):
    """The same as it was first published: 2,048 bins over the whole range, 128 levels for every tensor, and the
    last level takes what does not divide.
    """

    name = "entropy-v1"
    source = "TensorRT EntropyCalibration; Migacz, 8-bit inference with TensorRT, GTC 2017"

    def threshold(self, tensor: TensorStatistics) -> float:
        return divergence_threshold(_counted(tensor), tensor.amax, levels=128, bins=2048, even=False, focus=False)


@dataclass(frozen=True)
class Legacy(Algorithm):
    """A quantile of magnitudes and, with a cutoff below 1, where a line through the tail's logarithm ends.

    Options:
        quantile: the share of values to keep.
        cutoff: the tail begins at this share of the largest magnitude; 1 leaves it alone.
    """

    name = "legacy"
    source = "TensorRT LegacyCalibration (getQuantile, getRegressionCutoff)"

    quantile: float = 0.9999
    cutoff: float = 1.0

    def __post_init__(self) -> None:
        _check_share(self.name, "quantile", self.quantile)
        _check_share(self.name, "cutoff", self.cutoff)

    def threshold(self, tensor: TensorStatistics) -> float:
        kept = quantile(_counted(tensor), self.quantile)
        if self.cutoff >= 1.0 or tensor.amax <= 0.0:
            return kept
        return min(kept, regression_threshold(_counted(tensor), tensor.amax, self.cutoff))


@dataclass(frozen=True)
class Percentile(Algorithm):
    """The magnitude that ``percent`` of all values do not exceed.

    Options:
        percent: of all values.
    """

    name = "percentile"
    source = "onnxruntime and NVIDIA pytorch-quantization; McKinstry et al., arXiv:1809.04191"

    percent: float = 99.999

    def __post_init__(self) -> None:
        _check_share(self.name, "percent", self.percent, 100.0)

    def threshold(self, tensor: TensorStatistics) -> float:
        return quantile(_counted(tensor), self.percent / 100.0)


@dataclass(frozen=True)
class MeanSquaredError(Algorithm):
    """The smallest mean squared error of rounding and clipping; the farthest value of 100,000 has no vote on how
    far away it lies.
    """

    name = "mse"
    source = "NVIDIA pytorch-quantization; Banner et al., arXiv:1810.05723"

    def threshold(self, tensor: TensorStatistics) -> float:
        return squared_error_threshold(_counted(tensor), tensor.amax, levels=255 if tensor.lo >= 0.0 else 127)


@dataclass(frozen=True)
class Hist(Algorithm):
    """The middle of the first of 2,048 equal bins up to which the share ``share`` of all values lies.

    Options:
        share: of all values.
    """

    name = "hist"
    source = "Paddle PostTrainingQuantization, algo='hist'"

    share: float = 0.99999

    def __post_init__(self) -> None:
        _check_share(self.name, "share", self.share)

    def threshold(self, tensor: TensorStatistics) -> float:
        if tensor.amax <= 0.0:
            return 0.0
        counts, width, _ = _counted(tensor).linear(2.0 ** math.frexp(tensor.amax)[1], 2048)
        filled = np.cumsum(counts)
        return (int(np.searchsorted(filled, self.share * filled[-1])) + 0.5) * width


_KINDS: tuple[type[Algorithm], ...] = (
    Entropy,
    EntropyV1,
    Legacy,
    Percentile,
    MeanSquaredError,
    Hist,
    MinMax,
    Direct,
    Average,
    MovingAverage,
)

ALGORITHMS: dict[str, type[Algorithm]] = {kind.name: kind for kind in _KINDS}
"""Every algorithm by name, the default first."""


def parse_algorithm(text: str | Algorithm) -> Algorithm:
    """An algorithm by name, with options as passes have them: ``percentile{percent=99.9}``.

    Raises:
        PipelineError: no such algorithm or option, or a value that does not suit it.
    """
    if isinstance(text, Algorithm):
        return text
    steps = PipelineSpec.parse(text).passes
    if len(steps) != 1 or not isinstance(steps[0], PassSpec):
        raise PipelineError(f"'{text}' is not the name of one algorithm", remedy=f"one of {', '.join(ALGORITHMS)}")
    spec = steps[0]
    if spec.name not in ALGORITHMS:
        near = difflib.get_close_matches(spec.name, _KNOWN_AS, n=1)
        hint = f"did you mean '{_KNOWN_AS[near[0]]}'?" if near else f"one of {', '.join(ALGORITHMS)}"
        raise PipelineError(f"no calibration algorithm is called '{spec.name}'", remedy=hint)
    kind = ALGORITHMS[spec.name]
    known = option_fields(kind)
    for key in spec.options:
        if key not in known:
            has = f"it has {', '.join(known) or 'none'}"
            raise PipelineError(f"{kind.name} has no option '{key}'", remedy=has)
    return kind(**{key: known[key].convert(value) for key, value in spec.options.items()})


_KNOWN_AS = {
    **{name: name for name in ALGORITHMS},
    "KL": "entropy",
    "kl": "entropy",
    "entropy2": "entropy",
    "abs_max": "direct",
    "absmax": "direct",
    "min_max": "minmax",
    "max": "minmax",
    "quantile": "percentile",
    "average": "avg",
}
"""What people call them elsewhere, for hints."""


def _counted(tensor: TensorStatistics) -> Histogram:
    if tensor.histogram is None:
        raise DataError(
            "its values were not counted", remedy="calibrate again with an algorithm that looks at values"
        )
    return tensor.histogram


def _check_share(name: str, option: str, value: float, whole: float = 1.0) -> None:
    if not 0.0 < value <= whole:
        raise PipelineError(f"option '{option}' is a share above 0 and up to {whole:g}, not {value:g}", where=name)
