"""A candidate against its reference, layer by layer: where the error comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnxruntime as ort

from qat2int8.ir import DataError, Model, Qat2Int8Error, UnsupportedModel
from qat2int8.ir.io import load_model
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.counterpart import Counterpart
from qat2int8.pipelines.evaluation.errors import Errors, ErrorSums
from qat2int8.pipelines.evaluation.failure import Failure, until_broken
from qat2int8.pipelines.evaluation.layer_match import Matching, match_layers
from qat2int8.pipelines.evaluation.read_reference import ReadReference
from qat2int8.pipelines.instrument import FORCED, Instrumented
from qat2int8.pipelines.made_with import target_of
from qat2int8.pipelines.sessions import ModelFile, deployed_session, reference_session, run_session, session

__all__ = ["Comparison", "LayerComparison", "View", "compare_layers"]

Array = npt.NDArray[Any]

View = Literal["local", "end-to-end"]
"""Computed from the reference's own tensors, or each model from its own input."""


@dataclass(frozen=True)
class LayerComparison:
    """One layer of the candidate.

    Attributes:
        name, op_type: of its node; of an integer operator the float op it stands for.
        tensor: what was compared of it.
        reference: the tensor of the reference that is.
        source: the node of the reference that a conversion leaves in float to have the layer there.
        integer: whether ``tensor`` holds levels.
        end_to_end: each model from its own input; what went wrong earlier is carried along.
        local: the layer computed from the reference's own values of the tensors before it; None where the
            candidate could not be run like that.
    """

    name: str
    op_type: str
    tensor: str
    reference: str
    source: str
    integer: bool
    end_to_end: Errors
    local: Errors | None

    def errors(self, view: View) -> Errors:
        """Those of one view; end to end where there are no local ones."""
        return self.local if view == "local" and self.local is not None else self.end_to_end

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "name": self.name,
            "op_type": self.op_type,
            "tensor": self.tensor,
            "reference": self.reference,
            "source": self.source,
            "integer": self.integer,
            "end_to_end": self.end_to_end.as_dict(),
            "local": None if self.local is None else self.local.as_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """All layers that both models have.

    Attributes:
        layers: in the order of the candidate's graph.
        alone: names of the candidate's layers whose tensor the reference does not have.
        samples: how many both models were run on.
        failures: batches that a model could not be run on, which are left out.
        notes: what else there is to say about how it was measured.
    """

    layers: tuple[LayerComparison, ...]
    alone: tuple[str, ...]
    samples: int
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many layers the candidate has."""
        return len(self.layers) + len(self.alone)

    @property
    def has_local(self) -> bool:
        """Whether layers were computed from the reference's tensors too."""
        return any(layer.local is not None for layer in self.layers)

    @property
    def not_finite(self) -> tuple[LayerComparison, ...]:
        """The layers in which a model has NaN, or only one has infinity, in graph order."""
        return tuple(layer for layer in self.layers if layer.end_to_end.not_finite)

    def worst_first(self, view: View = "local") -> tuple[LayerComparison, ...]:
        """By falling error in one view; of equally bad layers the first in the graph, where it began."""
        return tuple(sorted(self.layers, key=lambda layer: layer.errors(view).sqnr_db))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "samples": self.samples,
            "matched": len(self.layers),
            "total": self.total,
            "layers": [layer.as_dict() for layer in self.layers],
            "alone": list(self.alone),
            "failures": [vars(failure) for failure in self.failures],
            "notes": list(self.notes),
        }


def compare_layers(
    reference: Path | ReadReference,
    candidate: Path,
    batches: Iterable[Batch],
    *,
    as_written: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Comparison:
    """Run both models on the same data and compare the layers that both have.

    The reference runs with optimisation off. What is kept are sums; the tensors of all layers are in memory for
    one batch at a time.

    Args:
        reference: the model the candidate was made from: float, or with fake quantization in any dialect.
        candidate: what became of it, converted here or by somebody else.
        as_written: run the candidate with optimisation off too: node by node as the file says, in place of the
            kernels it is deployed with.
        on_batch: called after every batch with its number from 1 on.

    Raises:
        UnsupportedModel: onnxruntime refuses one of the models.
        InvalidModel: a file is not a valid model.
        DataError: the models differ in inputs or outputs, have no layer in common, or there are no samples.
    """
    source = reference if isinstance(reference, ReadReference) else ReadReference.open(reference)
    model = load_model(candidate)
    _check_ends(source.model, model)
    matching = match_layers(source, model)
    if not matching.layers:
        raise DataError(
            f"none of its {len(matching.alone)} layers computes a tensor that the reference has",
            where=str(candidate),
            remedy="compare with the model it was made from, whose names it kept",
        )
    run = _Run(source.path, candidate, matching, reference_session if as_written else _deployment(model))
    seen = 0
    broken: list[Failure] = []
    for batch in until_broken(batches, broken):
        run.take(batch)
        seen += 1
        if on_batch is not None:
            on_batch(seen)
    if not seen:
        raise DataError("the data has no samples")
    return run.result(broken)


def _check_ends(reference: Model, candidate: Model) -> None:
    for kind in ("inputs", "outputs"):
        ours, theirs = (
            {value.name for value in getattr(model.graph, kind) if not value.is_initializer()}
            for model in (candidate, reference)
        )
        if ours != theirs:
            shown, expected = (", ".join(sorted(name or "" for name in names)) for names in (ours, theirs))
            raise DataError(
                f"the models have different {kind}: {shown} where the reference has {expected}",
                where=str(candidate.path),
                remedy="compare a model with the one it was made from",
            )


def _deployment(candidate: Model) -> Callable[[ModelFile], ort.InferenceSession]:
    """How sessions of the candidate are made: as on the target it was made for."""
    target = target_of(candidate)
    return session if target is None else partial(deployed_session, target)


class _Run:
    """The sessions, and the sums so far."""

    def __init__(
        self,
        reference: Path,
        candidate: Path,
        matching: Matching,
        open_candidate: Callable[[ModelFile], ort.InferenceSession],
    ) -> None:
        self._open = open_candidate
        self._layers = list(matching.layers)
        self._alone = list(matching.alone)
        self._expected = reference_session(
            Instrumented(reference, [layer.reference for layer in self._layers]).content
        )
        self._shown = Instrumented(candidate, [layer.tensor for layer in self._layers])
        self._whole = self._open(self._shown.content)
        self._local: ort.InferenceSession | None = None
        self._sums: list[tuple[ErrorSums, ErrorSums]] = []
        self._samples = 0
        self._failures: list[Failure] = []
        self._notes: list[str] = []

    def take(self, batch: Batch) -> None:
        """Compare on one batch; what goes wrong is kept as a failure."""
        results = []
        for name, running in (("reference", self._expected), ("candidate", self._whole)):
            try:
                results.append(_run(running, batch.inputs))
            except DataError as error:
                self._failures.append(Failure(name, batch.first, len(batch), str(error)))
                return
        expected, actual = results
        if not self._sums:
            self._settle(expected, actual)
        local = self._run_local(batch, expected)
        for layer, sums in zip(self._layers, self._sums, strict=True):
            theirs = expected[layer.reference]
            seen = layer.expected(theirs)
            for total, ours in zip(sums, (actual, local), strict=True):
                if ours is not None:
                    tensor = ours[layer.tensor]
                    total.add(seen, layer.actual(tensor), layer.levels_off(theirs, tensor))
        self._samples += len(batch)

    def _settle(self, expected: dict[str, Array], actual: dict[str, Array]) -> None:
        """Leave out layers whose tensors turn out to be something else, and make a session for the rest."""
        fitting: list[Counterpart] = []
        for layer in self._layers:
            theirs, ours = expected[layer.reference], actual[layer.tensor]
            if theirs.shape == ours.shape and ours.dtype == layer.dtype.numpy():
                fitting.append(layer)
            else:
                self._alone.append(layer.name)
        if not fitting:
            raise DataError("no tensor has the same shape in both models", remedy="compare it with its source")
        self._layers = fitting
        self._sums = [(ErrorSums(), ErrorSums()) for _ in fitting]
        elements = {layer.tensor: int(layer.dtype) for layer in fitting}
        try:
            self._local = self._open(self._shown.fed(elements))
        except UnsupportedModel as error:
            self._without_local(error)

    def _run_local(self, batch: Batch, expected: dict[str, Array]) -> dict[str, Array] | None:
        if self._local is None:
            return None
        forced = {f"{FORCED}{layer.tensor}": layer.forced(expected[layer.reference]) for layer in self._layers}
        try:
            return _run(self._local, {**batch.inputs, **forced})
        except DataError as error:
            self._without_local(error)
            return None

    def _without_local(self, error: Qat2Int8Error) -> None:
        self._local = None
        self._sums = [(whole, ErrorSums()) for whole, _ in self._sums]
        self._notes.append(f"the candidate cannot be run from the reference's tensors: {error.what}")

    def result(self, broken: Sequence[Failure]) -> Comparison:
        layers = tuple(
            LayerComparison(
                layer.name,
                layer.op_type,
                layer.tensor,
                layer.reference,
                layer.source,
                layer.pair is not None,
                whole.result(),
                local.result() if self._local is not None else None,
            )
            for layer, (whole, local) in zip(self._layers, self._sums, strict=False)
        )
        return Comparison(
            layers, tuple(self._alone), self._samples, (*self._failures, *broken), tuple(self._notes)
        )


def _run(running: ort.InferenceSession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Outputs by name.

    Raises:
        DataError: an input is missing or does not fit.
    """
    wanted = [value.name for value in running.get_inputs()]
    missing = [name for name in wanted if name not in feeds]
    if missing:
        raise DataError(f"the data has no array for input '{missing[0]}'")
    results = run_session(running, {name: feeds[name] for name in wanted})
    return dict(zip([output.name for output in running.get_outputs()], results, strict=True))
