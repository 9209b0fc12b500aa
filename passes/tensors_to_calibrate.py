"""Which activations need a range from data before integer kernels can be placed."""

from __future__ import annotations

import onnx_ir as oir

from qat2int8.ir import Contract, Model, Target
from qat2int8.passes.kernels import Kernel, kernel_of
from qat2int8.passes.scale_groups import is_movement

__all__ = ["tensors_to_calibrate"]


def tensors_to_calibrate(model: Model, target: Target) -> list[oir.Value]:
    """Activations without a grid that the integer kernels of ``target`` would compute with, in order of the graph.

    The inputs of layers and what layers compute, unless a layer can end in float and nothing quantized reads on;
    inputs and outputs of elementwise ops where a layer's result reaches them. Behind data movement it is
    the tensor that was moved: both lie on one grid. Elementwise graph outputs stay in float, with what only they
    would need.
    """
    search = _Search(model, target)
    for node in model.nodes():
        kernel = kernel_of(model, node, target)
        if kernel is not None:
            search.visit(kernel)
    order = {value: position for position, value in enumerate(model.values().values())}
    return sorted(search.wanted, key=order.__getitem__)


class _Search:
    def __init__(self, model: Model, target: Target) -> None:
        self.model = model
        self.target = target
        self.wanted: dict[oir.Value, None] = {}
        self.integer: set[oir.Value] = set()
        """Tensors that integer kernels would compute."""

    def visit(self, kernel: Kernel) -> None:
        if kernel.rule.contract is Contract.MOVEMENT:
            return
        if kernel.rule.contract is Contract.ELEMENTWISE and not self.is_fed(kernel):
            return
        for value in kernel.inputs:
            self.want(self.moved(value))
        for value in kernel.outputs:
            self.integer.add(value)
            if not kernel.rule.float_output:
                self.want(value)

    def is_fed(self, kernel: Kernel) -> bool:
        """Whether a layer's result reaches an elementwise op that is not the end of the graph."""
        fed = any(self.moved(value) in self.integer for value in kernel.inputs)
        return fed and not any(value.is_graph_output() for value in kernel.outputs)

    def want(self, value: oir.Value) -> None:
        known = value in self.model.scales or value.is_initializer()
        if not known and value.dtype in (None, oir.DataType.FLOAT):
            self.wanted[value] = None

    def moved(self, value: oir.Value) -> oir.Value:
        """The tensor of which ``value`` holds elements."""
        while True:
            producer = value.producer()
            if producer is None or producer.graph is not self.model.graph or not is_movement(self.model, producer):
                return value
            source = producer.inputs[0]
            if source is None or self.model.constant(source) is not None or value in self.model.scales:
                return value
            value = source
