"""The order of passes, checked by the facts they require, provide and invalidate before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence

from qat2int8.ir import Fact, Model, PipelineError
from qat2int8.passes import Pass, all_passes
from qat2int8.pipelines.spec import Fixpoint, flatten

__all__ = ["check_order", "facts_after", "facts_of"]


def facts_of(model: Model) -> frozenset[Fact]:
    """What holds for a model nothing was done to yet, so that single passes run on plain float models.

    A model without any quantization has float weights and no fake quant; one without Constant and Identity
    nodes, functions and overridable initializers has its constants lifted. That scales were gathered never
    holds by itself: a pipeline that places quantizers has to say where its grids come from.
    """
    op_types = {node.op_type for node in model.graph.all_nodes()}
    facts = set()
    if not any(map(_quantizes, op_types)):
        facts |= {Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT}
    overridable = any(value.name in model.graph.initializers for value in model.graph.inputs)
    if op_types.isdisjoint({"Constant", "Identity"}) and not model.ir.functions and not overridable:
        facts.add(Fact.CONSTANTS_LIFTED)
    if "BatchNormalization" not in op_types:
        facts.add(Fact.BN_FOLDED)
    return frozenset(facts)


def _quantizes(op_type: str) -> bool:
    """Whether an op of any dialect rounds to a grid or computes on integers; when unsure, yes."""
    name = op_type.lower()
    return "quant" in name or name.startswith("qlinear") or name.endswith("integer")


def facts_after(passes: Sequence[Pass | Fixpoint[Pass]], facts: frozenset[Fact]) -> frozenset[Fact]:
    """What holds after ``passes`` when ``facts`` held before."""
    for pass_ in flatten(passes):
        facts = (facts - pass_.invalidates) | pass_.provides
    return facts


def check_order(passes: Sequence[Pass | Fixpoint[Pass]], facts: frozenset[Fact]) -> None:
    """Check that what each pass requires holds where it stands, ``facts`` being what holds at the start.

    Raises:
        PipelineError: names the pass, what it lacks, who took it away, and which pass would provide it.
    """
    order = tuple(flatten(passes))
    taken: dict[Fact, int] = {}
    for index in _visits(passes):
        pass_ = order[index]
        for fact in sorted(pass_.requires - facts):
            raise _misplaced(order, index, fact, taken.get(fact))
        for fact in pass_.invalidates & facts:
            taken[fact] = index
        facts = (facts - pass_.invalidates) | pass_.provides


def _visits(passes: Sequence[Pass | Fixpoint[Pass]]) -> list[int]:
    """Indices into the flat order as the passes run; a fixpoint twice, for what its end takes from its start."""
    visits: list[int] = []
    start = 0
    for step in passes:
        if isinstance(step, Fixpoint):
            rounds = list(range(start, start + len(step.passes)))
            visits += rounds + rounds
            start += len(step.passes)
        else:
            visits.append(start)
            start += 1
    return visits


def _misplaced(order: Sequence[Pass], index: int, fact: Fact, taker: int | None) -> PipelineError:
    pass_ = order[index]
    what = f"{pass_.name} (position {index + 1}) requires {fact}, which "
    later = [f"{p.name} (position {at + 1})" for at, p in enumerate(order) if at > index and fact in p.provides]
    if taker is not None:
        what += f"{order[taker].name} at position {taker + 1} invalidates"
        where = "between" if taker < index else "after it"
    else:
        what += "nothing before it provides"
        where = "before it"
    if later and taker is None:
        return PipelineError(what, remedy=f"move {later[0]} before it")
    providers = [name for name, cls in all_passes().items() if fact in cls.provides and name != pass_.name]
    if not providers:
        return PipelineError(what, remedy="no known pass provides it")
    return PipelineError(what, remedy=f"put {' or '.join(providers)} {where}")
