"""A drawn network, written in any number of forms: its weights and its statistics are had once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypedDict, Unpack

import onnx

from qat2int8.pipelines.benchmarking.every_tensor import quantize_every_tensor
from qat2int8.pipelines.benchmarking.fake_quant import fake_quantize, fold_batch_norm, measure, settle
from qat2int8.pipelines.benchmarking.sketch import Sketch
from qat2int8.pipelines.benchmarking.tflite import channels_last, quantize_as_tflite

__all__ = ["Builder", "Drawn", "Export"]

P = ParamSpec("P")


class Export(TypedDict, total=False):
    """How a network is written.

    ``fake_quant`` (default true): Q/DQ pairs on the inputs and weights of Conv and Gemm.
    ``bn_folded`` (default false): biases in the Conv nodes in place of BatchNormalization.
    ``shared_quantizers`` (default false): consumers of one tensor read one Q/DQ pair, not one each.
    ``tflite`` (default false): channels last, BatchNormalization folded, and what fake quant there is in the
    style of TensorFlow Lite.
    ``every_tensor`` (default false): BatchNormalization folded, and what fake quant there is behind every operator
    in uint8, in the style of PyTorch.
    """

    fake_quant: bool
    bn_folded: bool
    shared_quantizers: bool
    tflite: bool
    every_tensor: bool


class Drawn:
    """A network with weights and statistics, not written yet. Its forms compute the same but for rounding."""

    def __init__(self, sketch: Sketch) -> None:
        self._statistics = measure(sketch)
        self._sketch = settle(sketch, self._statistics)

    def write(self, **export: Unpack[Export]) -> onnx.ModelProto:
        """The network in one form."""
        net = self._sketch
        fake_quant, shared = export.get("fake_quant", True), export.get("shared_quantizers", False)
        if export.get("tflite", False):
            net = channels_last(fold_batch_norm(net))
            return (quantize_as_tflite(net) if fake_quant else net).to_model()
        if export.get("every_tensor", False):
            net = fold_batch_norm(net)
            return (quantize_every_tensor(net) if fake_quant else net).to_model()
        if export.get("bn_folded", False):
            net = fold_batch_norm(net)
        if fake_quant:
            net = fake_quantize(net, self._statistics, shared_quantizers=shared)
        return net.to_model()


class Builder(Generic[P]):
    """A network by name: called, it is drawn and written in one form; :meth:`drawn` is for several."""

    def __init__(self, sketch: Callable[P, Sketch]) -> None:
        self.sketch = sketch
        self.__name__, self.__doc__ = sketch.__name__, sketch.__doc__

    def __call__(self, *dimensions: Any, **options: Any) -> onnx.ModelProto:
        """``options`` are those of :class:`Export`, and the dimensions of the network."""
        export: Any = {key: options.pop(key) for key in Export.__annotations__ if key in options}
        return self.drawn(*dimensions, **options).write(**export)

    def drawn(self, *args: P.args, **dimensions: P.kwargs) -> Drawn:
        """The network with its statistics, to be written in several forms."""
        return Drawn(self.sketch(*args, **dimensions))
