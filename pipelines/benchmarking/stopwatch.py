"""Timing of sessions against each other on a machine that does other things too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from qat2int8.pipelines.benchmarking.sketch import Array

Runs = dict[str, list[float]]


def interleave(contenders: Mapping[str, Callable[[], object]], *, rounds: int, repeat: int) -> Runs:
    """Seconds per call: in each round every contender runs ``repeat`` times, after one call that is not timed.

    What slows the machine down for a while slows all contenders of those rounds, so :func:`speedup` compares
    within a round. The order turns from round to round.
    """
    names = list(contenders)
    seconds: Runs = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            call = contenders[name]
            call()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def speedup(runs: Runs, name: str, reference: str) -> float:
    """How many times faster than ``reference``: the median over rounds of the ratio within a round."""
    return statistics.median(slow / fast for slow, fast in zip(runs[reference], runs[name], strict=True))


def session(path: Path, *, optimize: bool = True, threads: int = 1) -> ort.InferenceSession:
    """A CPU session with onnxruntime's default graph optimisation, or with none."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def caller(path: Path, sample: Array) -> Callable[[], object]:
    """A call that runs the model at ``path``, which has one input, once, on one thread."""
    model = session(path)
    name = model.get_inputs()[0].name
    return lambda: model.run(None, {name: sample})
