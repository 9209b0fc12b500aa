"""A pass whose body is a GraphSurgeon snippet."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from qat2int8.ir import Model, PassFailed
from qat2int8.ir.graphsurgeon import from_gs, to_gs
from qat2int8.passes.base import Context, Pass, PassResult


class GraphSurgeonPass(Pass):
    """Base of passes that edit the graph as GraphSurgeon shows it; see :mod:`qat2int8.ir.graphsurgeon`.

    Every value and node of the model is replaced by a new object, unless :meth:`edit` reports no change: then
    the model is left as it is.
    """

    @abc.abstractmethod
    def edit(self, graph: gs.Graph) -> Mapping[str, int]:
        """Change ``graph`` in place and say what was changed how often; all zero: nothing was.

        GraphSurgeon compares tensors and nodes by name, so search its lists with ``is``.
        """

    def run(self, model: Model, ctx: Context) -> PassResult:
        names = ([value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs])
        graph = to_gs(model)
        result = PassResult(dict(self.edit(graph)))
        if not result.modified:
            return result
        edited = from_gs(graph, like=model)
        if names != ([v.name for v in edited.graph.inputs], [v.name for v in edited.graph.outputs]):
            raise PassFailed(f"{self.name} changed the names of graph inputs or outputs", remedy="keep them")
        model.ir, model.scales, model.moments = edited.ir, edited.scales, edited.moments
        model.forget_names()
        return result
