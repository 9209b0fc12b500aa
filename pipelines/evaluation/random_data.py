"""Made-up batches for models that come without data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from qat2int8.ir import Model
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.fidelity import synthetic_inputs

__all__ = ["RandomData", "RandomSamples"]


@dataclass(frozen=True)
class RandomData:
    """Batches without end of what :func:`synthetic_inputs` makes up; the same ones at every iteration.

    A model whose batch is fixed gets batches of its own size.
    """

    model: Model
    batch_size: int
    name: str = "made-up inputs"

    def __iter__(self) -> Iterator[Batch]:
        samples = list(synthetic_inputs(self.model, self.batch_size))
        inputs = {
            value.name or "": np.concatenate([sample[value.name or ""] for sample in samples])
            if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int)
            else samples[0][value.name or ""]
            for value in self.model.graph.inputs
        }
        size = max((array.shape[0] for array in inputs.values() if array.ndim), default=1)
        for number in count():
            yield Batch(inputs, None, number * size)


@dataclass(frozen=True)
class RandomSamples:
    """``count`` different samples of :func:`synthetic_inputs`, each a batch of its own.

    They span the grids of the inputs where the scale table of ``model`` has them.
    """

    model: Model
    count: int
    name: str = "made-up inputs"

    def __iter__(self) -> Iterator[Batch]:
        first = 0
        for inputs in synthetic_inputs(self.model, self.count):
            yield Batch(inputs, None, first)
            first += max((array.shape[0] for array in inputs.values() if array.ndim), default=1)
