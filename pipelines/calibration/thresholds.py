"""Where to cut a distribution of magnitudes: pure functions of a histogram."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from qat2int8.pipelines.calibration.histogram import Histogram

__all__ = ["divergence_threshold", "quantile", "regression_threshold", "squared_error_threshold"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]

FEW = 4096
"""Below so many values other than zero a divergence is noise: the threshold is the largest magnitude."""


def quantile(histogram: Histogram, share: float, *, zeros: bool = True) -> float:
    """The magnitude that the share ``share`` of all values does not exceed; within a bin, where evenly spread.

    Args:
        zeros: whether zeros count; a Relu makes any number of them.
    """
    counts = histogram.counts.astype(np.float64)
    if not zeros:
        counts[0] = 0.0
    filled = np.cumsum(counts)
    if not filled[-1]:
        return 0.0
    wanted = share * filled[-1]
    bin_ = int(np.searchsorted(filled, wanted))
    edges = histogram.edges()
    before = filled[bin_] - counts[bin_]
    return float(edges[bin_] + (edges[bin_ + 1] - edges[bin_]) * (wanted - before) / counts[bin_])


MOST = 0.999
"""The share of values other than zero that every candidate keeps."""


def divergence_threshold(
    histogram: Histogram, amax: float, *, levels: int, bins: int = 4096, even: bool = True, focus: bool = True
) -> float:
    """The threshold that loses the least information, by the Kullback-Leibler divergence.

    For every candidate of ``i`` bins, P is the histogram cut there with the rest added to its last bin, and Q the
    same bins without the rest, merged into ``levels`` groups and spread evenly again over those that are not
    empty. The smallest KL(P || Q) wins, the smallest threshold of equal ones (S. Migacz, "8-bit inference with
    TensorRT", GTC 2017). Zeros are exact on every grid and would drown the rest: their bin gets the count of its
    neighbour, as in NVIDIA's pytorch-quantization. A candidate keeps 99.9 % of what is not zero: where values
    crowd on a few spots, as on the empty background of images, merging is so costly that hardly any range at all
    would win. All candidates are computed at once from running sums, because a group adds
    ``S log(S / n)`` to the cross entropy, with its sum S and its number n of bins that are not empty.

    Args:
        amax: the largest magnitude.
        bins: of equal width, over a range that is a power of two.
        even: whether groups differ by one bin at most; else the last one takes all bins that are left, as in the
            original.
        focus: whether the range ends at four times what has to be kept, rounded up, when ``amax`` lies beyond: one
            value far away would leave a few bins to all others.
    """
    if amax <= 0.0 or histogram.total - int(histogram.counts[0]) < FEW:
        return amax
    most = quantile(histogram, MOST, zeros=False)
    reach = min(amax, 4.0 * most) if focus else amax
    top = 2.0 ** math.frexp(reach)[1]
    found, width, beyond = histogram.linear(top, bins)
    counts = found.astype(np.float64)
    counts[0] = counts[1]
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= levels:
        return amax
    cuts, bounds = _groups(bins, levels, even)
    # From the one that keeps most values to the one that keeps all.
    fitting = slice(int(np.searchsorted(cuts, min(most / width, used))), int(np.searchsorted(cuts, used)) + 1)
    best = int(cuts[fitting][np.argmin(_divergences(counts, float(beyond), cuts[fitting], bounds[fitting]))])
    return min((best + 0.5) * width, amax)


@functools.lru_cache(maxsize=8)
def _groups(bins: int, levels: int, even: bool) -> tuple[Indices, Indices]:
    """The candidates, a thousandth of all bins apart, and the bounds of the groups of each, a row a candidate."""
    cuts = np.arange(levels, bins + 1, max(bins // 1024, 1), dtype=np.int32)
    group = np.arange(levels + 1, dtype=np.int32)
    if even:
        return cuts, cuts[:, None] * group // levels
    bounds = (cuts // levels)[:, None] * group
    bounds[:, -1] = cuts
    return cuts, bounds


def _divergences(counts: Floats, beyond: float, cuts: Indices, bounds: Indices) -> Floats:
    """KL(P || Q) of every cut; infinite where the rest would lie in a bin that holds nothing of its own."""
    total = counts.sum() + beyond
    below = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    own = _xlogx(counts)
    entropy = np.concatenate([[0.0], np.cumsum(own)])
    sums = np.diff(below[bounds], axis=1)
    share = np.log(np.maximum(sums, 1e-300) / np.maximum(np.diff(filled[bounds], axis=1), 1))
    rest, last = total - below[cuts], counts[cuts - 1]
    crossed = (sums * share).sum(axis=1) + rest * share[:, -1]
    kept = entropy[cuts] - own[cuts - 1] + _xlogx(last + rest)
    divergences = (kept - crossed) / total - math.log(total) + np.log(np.maximum(below[cuts], 1e-300))
    divergences[(last == 0) & (rest > 0)] = np.inf
    return np.asarray(divergences)


def _xlogx(values: Floats) -> Floats:
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)))


def squared_error_threshold(
    histogram: Histogram, amax: float, *, levels: int, farthest: float = 0.99999, candidates: int = 128
) -> float:
    """The threshold T with the smallest squared error of rounding to steps of ``T / levels`` and clipping at T.

    The share ``1 - farthest`` of the largest magnitudes counts as lying where the share begins: its squared
    distance would outweigh the rounding of everything else (one value at 40 among 200,000 of a standard normal
    distribution moves the optimum from 4 to 20). Of few values nothing is moved.
    """
    if amax <= 0.0:
        return amax
    limit = min(quantile(histogram, farthest), amax)
    if limit <= 0.0:
        return amax
    edges, used = histogram.edges(), np.flatnonzero(histogram.counts)
    magnitudes = np.minimum((edges[used] + edges[used + 1]) / 2.0, limit)
    magnitudes[used == 0] = 0.0
    counts = histogram.counts[used].astype(np.float64)
    # Hundredths of a bin of the widest octave decide nothing: neighbours are taken together.
    place = np.rint(magnitudes * (_FINE / limit)).astype(np.int64)
    weights = np.bincount(place, counts, _FINE + 1)
    centres = np.bincount(place, counts * magnitudes, _FINE + 1)[weights > 0] / weights[weights > 0]
    weights = weights[weights > 0]
    thresholds = limit * np.arange(candidates // 16, candidates + 1) / candidates
    steps = (thresholds / levels)[:, None]
    errors = np.minimum(np.rint(centres / steps), levels) * steps - centres
    return float(thresholds[np.argmin((errors * errors) @ weights)])


_FINE = 2048
"""Places that magnitudes are told apart by where errors are summed; 8 to a step of uint8."""


def regression_threshold(histogram: Histogram, amax: float, cutoff: float) -> float:
    """Where the tail above ``cutoff * amax`` would run out of values: a line through the logarithms of its counts,
    in which a bin weighs as much as its count is certain.

    Between ``cutoff * amax`` and ``amax``; ``amax`` where the tail does not fall or has fewer than three bins.
    """
    top = 2.0 ** math.frexp(amax)[1]
    counts, width, _ = histogram.linear(top, 2048)
    bins = np.flatnonzero(counts)
    bins = bins[bins * width >= cutoff * amax]
    if len(bins) < 3:
        return amax
    slope, offset = np.polyfit((bins + 0.5) * width, np.log(counts[bins]), 1, w=np.sqrt(counts[bins]))
    return float(np.clip(-offset / slope, cutoff * amax, amax)) if slope < 0.0 else amax
