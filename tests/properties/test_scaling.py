"""Ten times the nodes may take at most fifteen times as long: no pass walks the graph once per node."""

import gc
import time

import onnx
import pytest

from qat2int8.pipelines.benchmarking.networks import deep_chain
from qat2int8.pipelines.convert import convert

SMALL, LARGE = 33, 333
"""Blocks of deep_chain: about 500 and 5,000 nodes."""


def seconds(model: onnx.ModelProto) -> float:
    """The faster of two conversions; the collector is kept out, its pauses are not the passes'."""
    times = []
    for _ in range(2):
        gc.collect()
        gc.disable()
        started = time.process_time()
        converted = convert(model, verify="none")
        times.append(time.process_time() - started)
        gc.enable()
    assert converted.after["QuantizeLinear"] > 0
    return min(times)


@pytest.mark.slow
def test_the_pipeline_scales_with_the_number_of_nodes() -> None:
    small, large = deep_chain(SMALL), deep_chain(LARGE)
    assert len(small.graph.node) > 450
    assert len(large.graph.node) > 9 * len(small.graph.node)
    assert seconds(large) < 15 * seconds(small)
