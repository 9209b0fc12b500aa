"""A reference model as it can be run, and what is known of the grids its tensors are read on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qat2int8.ir import Model, Qat2Int8Error, QuantParams
from qat2int8.ir.io import load_model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.pipelines.dialects import is_readable
from qat2int8.pipelines.front import gathering_passes
from qat2int8.pipelines.levels import CARRIES
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.reference import ReadableSource
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["ReadReference"]

_MOVES_FLOATS = CARRIES - {"Clip", "Max", "Min"}


@dataclass(eq=False)
class ReadReference:
    """A model in whatever dialect of fake quantization, or in none.

    Attributes:
        path: a file that onnxruntime loads: the model's own, or what passes made of a dialect it does not know.
        model: what is in that file.
        gathered: the same behind the passes that read fake quantization; its scale table holds the grids.
    """

    path: Path
    model: Model
    gathered: Model
    _readable: ReadableSource | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path) -> ReadReference:
        """Read a model.

        Raises:
            InvalidModel: the file is not a valid model, or a grid in it is wrong.
            UnsupportedModel: its dialect cannot be read.
        """
        model, gathered = load_model(path), load_model(path)
        readable = ReadableSource(gathered)
        context = Context(load_target(DEFAULT_TARGET))
        try:
            run_pipeline(gathered, gathering_passes(), context, verify=VerifyLevel.NONE, observers=(readable,))
        except Qat2Int8Error:
            if not is_readable(model):
                raise
            # A float model with something in it that only conversion minds: it can be run all the same.
            return cls(path, model, model)
        if readable.path is None:
            return cls(path, model, gathered)
        return cls(readable.path, load_model(readable.path), gathered, readable)

    def grids(self) -> dict[str, list[QuantParams]]:
        """The grids that activations are put on, by tensor name, nearest first.

        A tensor that is only moved before it is put on a grid is as good as on it.
        """
        found: dict[str, list[tuple[int, QuantParams]]] = {}
        for value, traced in self.gathered.scales.traces():
            found.setdefault(traced.tensor, []).append((0, traced.grid))
            if traced.grid.per_channel:
                continue
            moved, distance = value, 0
            while (maker := moved.producer()) is not None and maker.op_type in _MOVES_FLOATS:
                above = maker.inputs[0]
                if above is None:
                    break
                moved, distance = above, distance + 1
                found.setdefault(moved.name or "", []).append((distance, traced.grid))
        return {name: [grid for _, grid in sorted(grids, key=lambda one: one[0])] for name, grids in found.items()}
