"""Models that show what goes on inside: more outputs, and inner tensors that can be fed."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from qat2int8.ir import UnsupportedModel
from qat2int8.pipelines.sessions import ModelFile

__all__ = ["FORCED", "Instrumented", "TooLargeToInstrument"]

FORCED = "qat2int8_forced_"
"""In front of the name of an inner tensor: the input through which it is fed."""


class TooLargeToInstrument(UnsupportedModel):
    """A model, with its weights, that does not fit into one buffer of 2 GiB."""


class Instrumented:
    """A copy of a model, in memory, with ``shown`` tensors among its outputs.

    With :meth:`fed` each of them is an input as well (``FORCED`` and its name): what reads the tensor reads the
    input instead, so that every part of the graph between such tensors computes from what it is given.

    Attributes:
        outputs: names of the model's own outputs.
        shown: those of the tensors that nodes of the main graph compute.

    Raises:
        TooLargeToInstrument: when it is serialised.
    """

    def __init__(self, model: ModelFile, shown: Iterable[str]) -> None:
        self._proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        graph = self._proto.graph
        self.outputs = [output.name for output in graph.output]
        computed = {name for node in graph.node for name in node.output}
        self.shown = [name for name in dict.fromkeys(shown) if name and name in computed]
        present = set(self.outputs)
        # onnxruntime finds out the types itself.
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.shown if name not in present)

    @property
    def content(self) -> bytes:
        """The model, serialised."""
        try:
            content: bytes = self._proto.SerializeToString()
        except Exception as error:  # protobuf's EncodeError, whose module differs between its implementations
            raise TooLargeToInstrument("a model of more than 2 GiB cannot be looked into") from error
        return content

    def fed(self, elements: dict[str, int]) -> bytes:
        """The model, serialised, that reads its tensors in ``elements`` (with their types) from inputs."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                if name in elements:
                    node.input[index] = f"{FORCED}{name}"
        for name, element in elements.items():
            proto.graph.input.append(onnx.helper.make_tensor_value_info(f"{FORCED}{name}", element, None))
        content: bytes = proto.SerializeToString()
        return content
