"""Run a converted model and its source side by side and compare their integer tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as oir
import onnxruntime as ort

from qat2int8.pipelines.instrument import FORCED, Instrumented
from qat2int8.pipelines.levels import LevelCount, Levels, Pair
from qat2int8.pipelines.sessions import Feeds, ModelFile, reference_session, run_session, session

__all__ = ["LevelProbe"]

Array = npt.NDArray[Any]


class LevelProbe:
    """The integer tensors of ``converted`` that are trained tensors of ``source``, compared in two ways.

    *End to end*, each model computes from its own input: what differs early is carried along, and a value that
    rounds the other way moves all that is computed from it. *Local*, each integer tensor is computed from the
    source's own values of the tensors before it: what differs there was made by the kernels in between.

    ``open_result`` makes the sessions of ``converted``.

    Attributes:
        outputs: names of the outputs of ``source``.
        pairs: those of the given ones that ``source`` has.

    Raises:
        UnsupportedModel: onnxruntime refuses one of the models.
    """

    def __init__(
        self,
        source: ModelFile,
        converted: ModelFile,
        pairs: Sequence[Pair],
        open_result: Callable[[ModelFile], ort.InferenceSession] = session,
    ) -> None:
        names = [name for pair in pairs for name in (pair.trained.tensor, pair.trained.integers)]
        shown = Instrumented(source, names)
        self._reference = reference_session(shown.content)
        self.outputs = shown.outputs
        # An input of the model may be what was quantized.
        present = {*shown.shown, *(value.name for value in self._reference.get_inputs())}
        self.pairs = [p for p in pairs if p.trained.tensor in present or p.trained.integers in present]
        whole = Instrumented(converted, [pair.integers for pair in self.pairs])
        elements = {
            pair.integers: int(oir.DataType.from_numpy(pair.dtype))
            for pair in self.pairs
            if pair.integers in whole.shown
        }
        self._sessions = open_result(whole.content), open_result(whole.fed(elements))
        self._counts = [[LevelCount(pair) for pair in self.pairs] for _ in self._sessions]

    def add(self, feeds: Feeds) -> list[Array]:
        """Compare on one batch; returns the outputs of the source.

        Raises:
            DataError: the inputs do not fit the models.
        """
        expected = _run(self._reference, feeds)
        whole = _run(self._sessions[0], feeds)
        forced = {
            f"{FORCED}{pair.integers}": pair.fed(expected, _channels(whole[pair.integers])) for pair in self.pairs
        }
        local = _run(self._sessions[1], {**feeds, **forced})
        for pair, *counts in zip(self.pairs, *self._counts, strict=True):
            bounds = pair.bounds(expected)
            for count, actual in zip(counts, (whole, local), strict=True):
                count.add(bounds, actual[pair.integers])
        return [expected[name] for name in self.outputs]

    @property
    def end_to_end(self) -> Levels:
        """Both models from their own inputs."""
        return Levels(tuple(count.result() for count in self._counts[0]))

    @property
    def local(self) -> Levels:
        """Each tensor from the source's values of those before it."""
        return Levels(tuple(count.result() for count in self._counts[1]))


def _channels(array: Array) -> int | None:
    return array.shape[1] if array.ndim > 1 else None


def _run(running: ort.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs and outputs by name."""
    names = [output.name for output in running.get_outputs()]
    return {**feeds, **dict(zip(names, run_session(running, feeds), strict=True))}
