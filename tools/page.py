"""A report on a model that a command has made or was given, written to a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat2int8.pipelines.figures import as_bytes

if TYPE_CHECKING:
    from qat2int8.pipelines.data import Batch
    from qat2int8.pipelines.evaluation.evaluate import Evaluation
    from qat2int8.pipelines.evaluation.failure import Failure
    from qat2int8.pipelines.reporting.document import ReportDocument
    from qat2int8.tools.console import Report
    from qat2int8.tools.feeding import Source

__all__ = ["Page"]

_WARM_UP = 2
_HISTOGRAMS = 12


@dataclass(frozen=True)
class Page:
    """What is to be in a report, and where it goes.

    Attributes:
        file: its ending says in which form.
        data: what to measure on, as ``--data`` has it; None measures nothing.
        samples: how many to compare layer by layer on, rounded up to whole batches; all are judged.
        metric: what answers are judged by; None for the usual one, if the data have labels.
        beside: further models, whose answers and speed stand beside those of the reference.
    """

    file: Path
    data: str | dict[str, Any] | None
    batch_size: int = 1
    samples: int = 64
    metric: str | None = None
    beside: tuple[Path, ...] = ()

    def check(self, *others: Path | None) -> None:
        """Refuse a file that cannot be written, before the work starts.

        Args:
            others: files that the command reads or writes, which a report is not to replace.

        Raises:
            OutputError: the ending is unknown, there is no such folder, or it is one of ``others``.
        """
        from qat2int8.ir import OutputError
        from qat2int8.pipelines.reporting.write import check_report_path

        check_report_path(self.file)
        if any(other is not None and other.resolve() == self.file.resolve() for other in others):
            raise OutputError(
                "the report would replace a file of this command", where=str(self.file), remedy="name another file"
            )

    def write(
        self, model: Path, reference: Path | None, *, silent: bool
    ) -> tuple[ReportDocument, tuple[Failure, ...]]:
        """Measure ``model``, with ``reference`` what became of each layer too, and write all of it.

        Returns:
            What was written, and the batches that a model could not be run on.

        Raises:
            DataError: the data cannot be read or do not suit the models.
            UnsupportedModel: onnxruntime refuses ``model``.
        """
        from qat2int8.pipelines.reporting.collect import collect
        from qat2int8.pipelines.reporting.write import write_report

        measured = self._measured(model, reference, silent) if self.data is not None else {}
        document = collect(model, reference, **measured)
        write_report(document, self.file)
        found = (measured[part].failures for part in ("evaluation", "comparison") if part in measured)
        return document, tuple(failure for failures in found for failure in failures)

    def tell(self, report: Report, document: ReportDocument) -> None:
        """What could not be measured, and where the report is."""
        for note in document.notes:
            report.item(f"note: {note}", [], indent=0)
        report.line(f"report       {self.file}, {as_bytes(self.file.stat().st_size)}")

    def _measured(self, model: Path, reference: Path | None, silent: bool) -> dict[str, Any]:
        """Answers and speed; with a reference the error of each layer and the values of the worst ones too."""
        from qat2int8.pipelines.evaluation.activations import activations
        from qat2int8.pipelines.evaluation.compare import compare_layers
        from qat2int8.pipelines.evaluation.read_reference import ReadReference
        from qat2int8.tools.feeding import Source, named_models

        models = named_models([*([] if reference is None else [reference]), *self.beside, model])
        source = Source.open(models, self.data, self.batch_size)
        if reference is None:
            return {"evaluation": self._evaluation(models, source, silent), "data": source.name}
        readable = ReadReference.open(reference)
        evaluation = self._evaluation(models, source, silent)
        few = source.first(self.samples)
        comparison = compare_layers(readable, model, few)
        worst = [layer.name for layer in comparison.worst_first()[:_HISTOGRAMS]]
        return {
            "evaluation": evaluation,
            "data": source.name,
            "comparison": comparison,
            "values": activations(readable, model, few, worst),
            "notes": (*evaluation.notes, *comparison.notes),
        }

    def _evaluation(self, models: dict[str, Path], source: Source, silent: bool) -> Evaluation:
        from qat2int8.pipelines.evaluation.evaluate import evaluate
        from qat2int8.pipelines.evaluation.metrics import metric_factory
        from qat2int8.tools.progress import counting

        wanted = self.metric or ("topk" if _has_labels(source.batches) else None)
        batches = source.batches_in(0)
        with counting("measuring", batches, silent) as show:
            return evaluate(
                models,
                source.batches,
                None if wanted is None else metric_factory(wanted),
                skip_batches=_WARM_UP if batches is not None and batches > 2 * _WARM_UP else 0,
                on_batch=None if show is None else lambda done, _: show(done, ""),
            )


def _has_labels(batches: Iterable[Batch]) -> bool:
    first = next(iter(batches), None)
    return first is not None and first.labels is not None
