"""What the commands share that run models on data: the data, and how failed batches are told."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat2int8.pipelines.data import Batch
    from qat2int8.pipelines.evaluation.failure import Failure

__all__ = ["Source", "named_models", "print_failures"]

_SHOWN_FAILURES = 5


def named_models(models: Sequence[Path]) -> dict[str, Path]:
    """Files by the shortest names that tell them apart."""
    for name in (lambda path: path.stem, lambda path: path.name, str):
        named = {name(path): path for path in models}
        if len(named) == len(models):
            return named
    return {str(path): path for path in models}


class Source:
    """What the models are fed with.

    Attributes:
        batches: can be gone through again and again.
        count: how many samples there are, None if that is not known or there is no end.
        accuracy_output: the output that is the accuracy, where the labels are judged in the graph.
        notes: what is left out of the data.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, batches: Iterable[Batch], name: str, count: int | None, size: int, output: str | None
    ) -> None:
        self.batches, self.name, self.count, self.accuracy_output = batches, name, count, output
        self._size = size

    @classmethod
    def open(
        cls,
        models: dict[str, Path],
        data: str | dict[str, Any] | None,
        batch_size: int,
        labels: str | None = None,
        samples: int | None = None,
    ) -> Source:
        """The data as the first model wants it, after checking that the others want the same.

        Args:
            data: what was given as ``--data``, or its options; None for made-up inputs without end.
            labels: the data's labels, or an output that is the accuracy.
            samples: how many to read at most; None reads all.
        """
        from qat2int8.ir import DataError
        from qat2int8.ir.io import load_model
        from qat2int8.pipelines.data import input_specs, open_data
        from qat2int8.pipelines.data.options import parse
        from qat2int8.pipelines.evaluation.random_data import RandomData

        loaded = {name: load_model(path) for name, path in models.items()}
        wanted = {name: input_specs(model) for name, model in loaded.items()}
        (first, specs), *others = wanted.items()
        for name, other in others:
            if _signature(other) != _signature(specs):
                raise DataError(
                    f"{name} takes {_told(other)}, {first} takes {_told(specs)}",
                    remedy="give models with the same inputs",
                )
        if data is None:
            made_up = RandomData(loaded[first], batch_size)
            return cls(made_up, made_up.name, None, batch_size, None)
        outputs = [value.name for value in loaded[first].graph.outputs]
        options = parse(data).model_dump(exclude_unset=True)
        if labels is not None and labels not in outputs:
            options["labels"] = labels
        dataset = open_data(options, specs, batch_size=batch_size, samples=samples)
        in_graph = labels if labels in outputs else None
        source = cls(dataset, dataset.name, dataset.count, dataset.batch_size, in_graph)
        source.notes = dataset.notes
        return source

    def first(self, samples: int) -> Iterable[Batch]:
        """So many samples, rounded up to whole batches; they can be gone through again and again."""
        return _First(self.batches, math.ceil(samples / self._size))

    def batches_in(self, iterations: int) -> int | None:
        """How many batches a run takes, None if that is not known."""
        there = None if self.count is None else math.ceil(self.count / self._size)
        return min(there or iterations, iterations) if iterations else there


@dataclass(frozen=True)
class _First:
    batches: Iterable[Batch]
    count: int

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.batches, self.count)


def _signature(specs: Sequence[Any]) -> list[tuple[str, str, int | None]]:
    return sorted((spec.name, str(spec.dtype), None if spec.shape is None else len(spec.shape)) for spec in specs)


def _told(specs: Sequence[Any]) -> str:
    return ", ".join(f"{spec.name}: {spec}" for spec in specs)


def print_failures(failures: Sequence[Failure]) -> None:
    """The first few on stderr, a line each."""
    for failure in failures[:_SHOWN_FAILURES]:
        sys.stderr.write(f"error: {failure}\n")
    if len(failures) > _SHOWN_FAILURES:
        sys.stderr.write(f"... and {len(failures) - _SHOWN_FAILURES} more (--json has them all)\n")
