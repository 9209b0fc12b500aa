"""Serialising a model with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import onnx_ir as oir

Substitution = Callable[[oir.TensorProtocol], oir.TensorProtocol]


def substitute(ir: oir.Model, substitution: Substitution) -> list[Callable[[], None]]:
    """Put ``substitution(tensor)`` in the place of every initializer and tensor attribute.

    Reaches the main graph and every subgraph; function bodies are left alone. Returns the steps that undo it.
    """
    undo: list[Callable[[], None]] = []
    for graph in (ir.graph, *ir.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (other := substitution(tensor)) is not tensor:
                undo.append(partial(setattr, value, "const_value", tensor))
                value.const_value = other
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type is not oir.AttributeType.TENSOR or attribute.is_ref():
                    continue
                tensor = attribute.as_tensor()
                if (other := substitution(tensor)) is not tensor:
                    undo.append(partial(node.attributes.__setitem__, name, attribute))
                    node.attributes[name] = oir.AttrTensor(name, other, doc_string=attribute.doc_string)
    return undo


@contextmanager
def substituted(ir: oir.Model, substitution: Substitution) -> Iterator[None]:
    """As :func:`substitute`, undone at the end of the block whatever happens in it."""
    undo = substitute(ir, substitution)
    try:
        yield
    finally:
        for step in undo:
            step()
