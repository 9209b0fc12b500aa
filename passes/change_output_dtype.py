"""Give a graph output another element type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as oir

from qat2int8.ir import Code, Model, PassFailed, Severity
from qat2int8.passes.base import Context, Numerics, PassResult
from qat2int8.passes.graphsurgeon_pass import GraphSurgeonPass
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class ChangeOutputDtype(GraphSurgeonPass):
    """Put a Cast to ``dtype`` in front of the graph output called ``output``, which keeps its name and shape.

    Nodes inside that read the same tensor go on reading the old type. An output cast before gets a second Cast
    and keeps the first: int64 -> float32 -> float16 does not round as int64 -> float16 does.

    Options:
        output: the name of the graph output; empty asks for nothing.
        dtype: its new element type, as ONNX or numpy calls it.

    Raises:
        PassFailed: no such output or type, or one that Cast does not know.
    """

    output: str = ""
    dtype: str = "float32"

    name = "change-output-dtype"
    numerics = Numerics.QUANTIZING  # an integer type rounds what a float output held

    def run(self, model: Model, ctx: Context) -> PassResult:
        if not self.output:
            return PassResult()
        source = self._check(model)
        if source is self._wanted:
            return PassResult()
        result = super().run(model, ctx)
        note = self.note(
            Code.OUTPUT_CAST,
            f"the output was {_name(source)} and is cast to {_name(self._wanted)}",
            severity=Severity.NOTE,
            value=self.output,
        )
        return replace(result, diagnostics=(note,))

    def edit(self, graph: gs.Graph) -> Mapping[str, int]:
        taken = {name for scope in (graph, *graph.subgraphs(recursive=True)) for name in scope.tensors()}
        taken |= {node.name for node in graph.nodes}
        source = graph.tensors()[self.output]
        source.name = _unique(f"{self.output}_before_cast", taken)
        target = gs.Variable(self.output, int(self._wanted), source.shape)
        cast = gs.Node(
            "Cast",
            _unique(f"{self.output}_cast", taken),
            {"to": int(self._wanted)},
            [source],
            [target],
        )
        graph.nodes.append(cast)
        graph.outputs = [target if output is source else output for output in graph.outputs]
        return {"outputs cast": 1}

    @property
    def _wanted(self) -> oir.DataType:
        """The element type called ``dtype``.

        Raises:
            PassFailed: there is none of that name.
        """
        try:
            return oir.DataType[_ALIASES.get(self.dtype.lower(), self.dtype.upper())]
        except KeyError:
            raise PassFailed(f"'{self.dtype}' is no element type", remedy=_one_of(_castable(_LATEST))) from None

    def _check(self, model: Model) -> oir.DataType:
        """The type the output has now.

        Raises:
            PassFailed: no such output, or one that cannot be cast to what is asked for.
        """
        outputs = {value.name or "": value for value in model.graph.outputs}
        if self.output not in outputs:
            raise PassFailed(f"the graph has no output '{self.output}'", remedy=f"it has {', '.join(outputs)}")
        value, wanted = outputs[self.output], self._wanted
        where = f"output '{self.output}'"
        if not isinstance(value.type, oir.TensorType):
            raise PassFailed(f"holds {value.type or 'no known type'}, which cannot be cast", where=where)
        if value.dtype is not wanted and value.is_graph_input():
            raise PassFailed("is a graph input itself, and both must keep the one name", where=where)
        castable = _castable(model.opset)
        for dtype in (wanted, value.type.dtype):
            if dtype not in castable:
                raise PassFailed(
                    f"Cast of opset {model.opset} does not know {_name(dtype)}",
                    where=where,
                    remedy=_one_of(castable),
                )
        return value.type.dtype


_ALIASES = {"float32": "FLOAT", "float64": "DOUBLE", "half": "FLOAT16"}
_LATEST = onnx.defs.onnx_opset_version()


def _name(dtype: oir.DataType) -> str:
    named = {"FLOAT": "float32", "DOUBLE": "float64"}
    return named.get(dtype.name, dtype.name.lower())


def _one_of(dtypes: set[oir.DataType]) -> str:
    return f"one of {', '.join(sorted(_name(dtype) for dtype in dtypes))}"


def _castable(opset: int) -> set[oir.DataType]:
    """The types Cast reads and writes at ``opset``, from its schema."""
    schema = onnx.defs.get_schema("Cast", min(opset, _LATEST))
    allowed = {kind for constraint in schema.type_constraints for kind in constraint.allowed_type_strs}
    return {dtype for dtype in oir.DataType if f"tensor({dtype.name.lower()})" in allowed}


def _unique(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name
