"""Running passes in order: checked before, between and after, watched by observers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as oir

from qat2int8.ir import Diagnostic, Fact, Model, PassFailed, Qat2Int8Error
from qat2int8.ir.verify import VerifyLevel
from qat2int8.ir.verify import verify as verify_model
from qat2int8.passes import Context, Pass, PassResult
from qat2int8.pipelines.order import check_order, facts_after, facts_of
from qat2int8.pipelines.spec import Fixpoint, PipelineSpec, flatten

if TYPE_CHECKING:
    from qat2int8.pipelines.numeric_check import NumericCheck
    from qat2int8.pipelines.observers import Observer

__all__ = ["MAX_ROUNDS", "PassRun", "PipelineRun", "Position", "run_pipeline", "total_counts"]

MAX_ROUNDS = 32
"""Rounds a fixpoint may take; real ones settle in three."""


@dataclass(frozen=True)
class Position:
    """Where in a pipeline a pass stands."""

    index: int
    """From 1, fixpoints flattened."""
    total: int
    round: int = 0
    """The round of the fixpoint it runs in, from 1; 0 outside of one."""
    loop: int = 0
    """The index of the first pass of that fixpoint; 0 outside of one."""

    @property
    def settled(self) -> Position:
        """The position without the round: the same for all runs of one pass in a fixpoint."""
        return replace(self, round=0)

    def __str__(self) -> str:
        return f"position {self.index}" + (f", round {self.round}" if self.round else "")


@dataclass(frozen=True)
class PassRun:
    """One run of one pass."""

    pass_: Pass
    position: Position
    result: PassResult
    seconds: float

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.pass_.name


@dataclass(frozen=True)
class PipelineRun:
    """What a pipeline did."""

    runs: tuple[PassRun, ...]
    facts: frozenset[Fact]
    """What holds now; hand it to the next pipeline on the same model."""
    notes: tuple[Diagnostic, ...] = ()
    """Findings of the manager itself."""
    left_out: tuple[str, ...] = ()
    """Names of passes that the target does not ask for; see :attr:`Pass.per_target`."""

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Everything that was found, in order."""
        return (*self.notes, *(finding for run in self.runs for finding in run.result.diagnostics))

    @property
    def changed(self) -> bool:
        """Whether any pass changed the model or its tables."""
        return any(run.result.modified for run in self.runs)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What each pass changed and how often, over all its runs; passes that did nothing are left out."""
        return total_counts(self.runs)


def total_counts(runs: Iterable[PassRun]) -> dict[str, dict[str, int]]:
    """The counts of ``runs``, added up by pass and kind; zeros are left out."""
    total: dict[str, dict[str, int]] = {}
    for run in runs:
        for kind, count in run.result.counts.items():
            if count:
                counts = total.setdefault(run.name, {})
                counts[kind] = counts.get(kind, 0) + count
    return total


def run_pipeline(
    model: Model,
    pipeline: PipelineSpec | Sequence[Pass | Fixpoint[Pass]],
    ctx: Context,
    *,
    verify: VerifyLevel = VerifyLevel.CHECKER,
    observers: Sequence[Observer] = (),
    facts: frozenset[Fact] | None = None,
) -> PipelineRun:
    """Run every pass of ``pipeline`` on ``model``, in place.

    Args:
        verify: what is checked after each pass; with ``numeric``, its outputs are computed and compared too.
        facts: what holds for the model already; found out from the model itself when not given.

    Raises:
        PipelineError: passes that do not exist, have no such options, or stand in the wrong order; nothing ran.
        Qat2Int8Error: a pass refused the model; its name and position are added.
        PassFailed: a pass crashed, broke the model, changed it without saying so, or does not settle.
    """
    passes = pipeline.build() if isinstance(pipeline, PipelineSpec) else tuple(pipeline)
    start = facts_of(model) if facts is None else facts
    check_order(passes, start)
    run = _Manager(model, ctx, verify, tuple(observers), len(tuple(flatten(passes)))).run(passes, start)
    for observer in observers:
        observer.finished(model, run)
    return run


class _Manager:
    """One run of one pipeline."""

    def __init__(
        self, model: Model, ctx: Context, level: VerifyLevel, observers: Sequence[Observer], total: int
    ) -> None:
        self._model, self._ctx, self._level, self._observers, self._total = model, ctx, level, observers, total
        self._inputs = [value.name or "" for value in model.graph.inputs]
        self._overridable = {name for name in self._inputs if name in model.graph.initializers}
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._runs: list[PassRun] = []
        self._left_out: dict[str, None] = {}
        self._notes: list[Diagnostic] = []
        self._numbers: NumericCheck | None = None
        self._signature = _signature(model)

    def run(self, passes: Sequence[Pass | Fixpoint[Pass]], facts: frozenset[Fact]) -> PipelineRun:
        if self._level is VerifyLevel.NUMERIC:
            self._start_numbers()
        index = 1
        for step in passes:
            if isinstance(step, Fixpoint):
                self._settle(step.passes, index)
                index += len(step.passes)
            else:
                self._one(step, Position(index, self._total))
                index += 1
        facts = facts_after(passes, facts)
        return PipelineRun(tuple(self._runs), facts, tuple(self._notes), tuple(self._left_out))

    def _start_numbers(self) -> None:
        # Imported here: only this level needs a runtime, which takes its time to load.
        from qat2int8.pipelines.numeric_check import NumericCheck

        numbers = NumericCheck.of(self._model)
        if isinstance(numbers, NumericCheck):
            self._numbers = numbers
        else:
            self._notes.append(numbers)

    def _settle(self, passes: Sequence[Pass], index: int) -> None:
        restless: list[str] = []
        for round_ in range(1, MAX_ROUNDS + 1):
            results = [
                self._one(pass_, Position(at, self._total, round_, index))
                for at, pass_ in enumerate(passes, start=index)
            ]
            restless = [p.name for p, result in zip(passes, results, strict=True) if result.modified]
            if not restless:
                return
        raise PassFailed(
            f"the fixpoint does not settle: {', '.join(restless)} still changed something in round {MAX_ROUNDS}",
            where=f"position {index}",
            remedy="a pass that ran must find nothing more to do in what it left",
        )

    def _one(self, pass_: Pass, position: Position) -> PassResult:
        if pass_.per_target and pass_.name not in self._ctx.target.rewrites:
            self._left_out[pass_.name] = None
            return PassResult()
        for observer in self._observers:
            observer.before(self._model, pass_, position)
        try:
            result, seconds = self._checked(pass_)
        except Exception as error:
            located = _located(error, pass_, position)
            for observer in self._observers:
                observer.failed(self._model, pass_, position, located)
            raise located from error
        run = PassRun(pass_, position, result, seconds)
        self._runs.append(run)
        for observer in self._observers:
            observer.after(self._model, run)
        return result

    def _checked(self, pass_: Pass) -> tuple[PassResult, float]:
        model = self._model
        started = time.perf_counter()
        result = pass_.run(model, self._ctx)
        seconds = time.perf_counter() - started
        model.forget_names()
        if self._level is VerifyLevel.NONE:
            return result, seconds
        before, self._signature = self._signature, _signature(model)
        if self._signature == before:
            return result, seconds
        if not result.modified:
            raise PassFailed(
                "changed the model but counted no change",
                remedy="count what the pass changes in PassResult.counts",
            )
        # An input with a default value may become a constant; every other one has to stay.
        present = {value.name for value in model.graph.inputs}
        inputs = [name for name in self._inputs if name not in self._overridable or name in present]
        # Tables alone were changed: what the checker said of the graph still holds.
        level = self._level if self._signature.graph != before.graph else VerifyLevel.STRUCTURE
        verify_model(model, level, graph_inputs=inputs, graph_outputs=self._outputs)
        if self._numbers is not None and result.modified:
            self._numbers.check(model, pass_.numerics)
        return result, seconds


def _located(error: Exception, pass_: Pass, position: Position) -> Qat2Int8Error:
    """``error`` with the pass it came from; what nobody raised on purpose becomes a PassFailed."""
    where = f"{pass_.name} ({position})"
    if isinstance(error, Qat2Int8Error):
        return type(error)(
            error.what, where=f"{where}: {error.where}" if error.where else where, remedy=error.remedy
        )
    return PassFailed(
        f"failed unexpectedly: {type(error).__name__}: {error}", where=where, remedy="rerun with --debug"
    )


@dataclass(frozen=True)
class _Signature:
    """Digests of the graph and of its tables that read no weight: cheap enough to take after every pass."""

    graph: str
    tables: str


def _signature(model: Model) -> _Signature:
    graph, tables = hashlib.sha256(), hashlib.sha256()

    def add(digest: hashlib._Hash, *parts: object) -> None:
        digest.update(repr(parts).encode())

    ends = [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]
    add(graph, *ends, len(model.ir.functions))
    for name in sorted(model.graph.initializers):  # their order means nothing, and passes do not keep it
        add(graph, name, id(model.graph.initializers[name].const_value))
    for node in model.graph.all_nodes():
        names = [None if value is None else value.name for value in node.inputs]
        add(graph, node.op_type, node.domain, node.name, names, [value.name for value in node.outputs])
        for attribute in node.attributes.values():
            add(graph, attribute.name, _attribute_key(attribute))
    for value, params in model.scales.items():
        add(tables, value.name, params.dtype, params.axis, params.scale.tobytes(), params.zero_point.tobytes())
    for value, moments in model.moments.items():
        add(tables, value.name, id(moments))
    return _Signature(graph.hexdigest(), tables.hexdigest())


def _attribute_key(attribute: oir.Attr) -> object:
    """What stands for an attribute's value: itself when it is small, else its identity."""
    value = attribute.value
    return value if isinstance(value, int | float | str | bytes | tuple | list) else id(value)
