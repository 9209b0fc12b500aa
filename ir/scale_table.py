"""The table of grids: which tensor lies on which grid, who said so, and who disagreed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from qat2int8.ir.diagnostic import Code, Diagnostic, Severity
from qat2int8.ir.errors import DataError
from qat2int8.ir.interval import Interval
from qat2int8.ir.quant import Provenance, QuantDType, QuantParams


@dataclass(frozen=True, eq=False)
class TrainedTensor:
    """A tensor of the source that training put on a grid, so that what became of it can be compared with it.

    Attributes:
        tensor: name of the float tensor that is quantized.
        integers: name of its integers, which is what there is where the source computes in integers.
        grid: what it was trained on, whatever grid it is moved to later.
    """

    tensor: str
    integers: str
    grid: QuantParams

    @classmethod
    def of(cls, source: oir.Value, quantizers: Sequence[oir.Node], grid: QuantParams) -> TrainedTensor:
        """``source`` and what the last of ``quantizers`` makes of it; of none, integers that come as they are."""
        integers = quantizers[-1].outputs[0] if quantizers else source
        return cls(source.name or "", integers.name or "", grid)


class ScaleTable:
    """Maps a value of the graph to its :class:`QuantParams`.

    Keys are values by identity, so a rename does not lose an entry. A write that disagrees with what stands
    there is decided by :class:`Provenance` and reported, never silent.

    Beside the grids it keeps a trace: which value, at first of floats and then of integers, is which
    :class:`TrainedTensor` of the source. No pass decides anything by it.
    """

    def __init__(self) -> None:
        self._grids: dict[oir.Value, QuantParams] = {}
        self._traces: dict[oir.Value, TrainedTensor] = {}

    def __getitem__(self, value: oir.Value) -> QuantParams:
        return self._grids[value]

    def __contains__(self, value: object) -> bool:
        return value in self._grids

    def __iter__(self) -> Iterator[oir.Value]:
        return iter(self._grids)

    def __len__(self) -> int:
        return len(self._grids)

    def get(self, value: oir.Value | None) -> QuantParams | None:
        """The grid of ``value``, or None."""
        return None if value is None else self._grids.get(value)

    def items(self) -> Iterator[tuple[oir.Value, QuantParams]]:
        """All entries, in the order they were first written."""
        return iter(list(self._grids.items()))

    def set(self, value: oir.Value, params: QuantParams) -> None:
        """Write an entry unconditionally: for passes that refine what they just read."""
        self._grids[value] = params

    def discard(self, value: oir.Value) -> QuantParams | None:
        """Forget an entry and its trace; returns the entry."""
        self._traces.pop(value, None)
        return self._grids.pop(value, None)

    def record(self, value: oir.Value, params: QuantParams, *, node: str = "") -> Diagnostic | None:
        """Write an entry unless a stronger one stands there.

        Of two that are equally strong the wider range stays, because it clips nothing that either was
        trained to keep. Returns a ``SCALE_CONFLICT`` diagnostic when the two disagree.
        """
        present = self._grids.get(value)
        if present is None:
            self._grids[value] = params
            return None
        if present.same_grid(params):
            if params.source > present.source:
                self._grids[value] = params
            return None
        wider = (params.source, params.interval.width) > (present.source, present.interval.width)
        kept, lost = (params, present) if wider else (present, params)
        self._grids[value] = kept
        if kept.source is not lost.source and kept.source < Provenance.TRAINED:
            return None
        return Diagnostic(
            Code.SCALE_CONFLICT,
            Severity.WARNING,
            f"two grids for one tensor: {kept} from {kept.origin} is used, {lost} from {lost.origin} is not",
            node=node,
            value=value.name or "",
            remedy="give both consumers one shared quantizer in training",
        )

    def move(self, old: oir.Value, new: oir.Value) -> None:
        """Let ``new`` take over the entry and trace of ``old``; what ``new`` had of its own is dropped."""
        params = self._grids.pop(old, None)
        if params is not None:
            self._grids[new] = params
        traced = self._traces.pop(old, None)
        if traced is not None:
            self._traces[new] = traced

    def trace(self, value: oir.Value, tensor: TrainedTensor) -> None:
        """Note that ``value`` is ``tensor`` of the source."""
        self._traces[value] = tensor

    def traced(self, value: oir.Value | None) -> TrainedTensor | None:
        """Which tensor of the source ``value`` is, or None."""
        return None if value is None else self._traces.get(value)

    def move_trace(self, old: oir.Value, new: oir.Value) -> None:
        """Let ``new`` be what ``old`` was of the source, unless it is something itself."""
        traced = self._traces.pop(old, None)
        if traced is not None:
            self._traces.setdefault(new, traced)

    def traces(self) -> Iterator[tuple[oir.Value, TrainedTensor]]:
        """Every value that is a trained tensor of the source, in the order they were found."""
        return iter(list(self._traces.items()))

    def clear(self) -> None:
        """Forget every entry."""
        self._grids.clear()
        self._traces.clear()

    def copy(self) -> ScaleTable:
        """An independent table with the same entries."""
        twin = ScaleTable()
        twin._grids = dict(self._grids)
        twin._traces = dict(self._traces)
        return twin

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(tensor, grid, range, origin) of every entry, for printing."""
        return [(v.name or "", str(p), str(p.interval), p.origin) for v, p in self._grids.items()]

    def to_json(self, digest: str) -> str:
        """The table as JSON, bound to a model by ``digest`` (a hex string); the inverse of :meth:`from_json`."""
        entries = {
            value.name: {
                "scale": params.scale.tolist(),
                "zero_point": params.zero_point.tolist(),
                "bits": params.dtype.bits,
                "signed": params.dtype.signed,
                "narrow_range": params.dtype.narrow_range,
                "top": params.dtype.top,
                "axis": params.axis,
                "source": params.source.label,
                "origin": params.origin,
                "trained": None if params.trained is None else [params.trained.lo, params.trained.hi],
            }
            for value, params in self._grids.items()
        }
        return json.dumps({"format": "qat2int8-scales-1", "model": digest, "scales": entries}, indent=1)

    @classmethod
    def from_json(cls, text: str, values: dict[str, oir.Value], digest: str) -> ScaleTable:
        """Read what :meth:`to_json` wrote, for the model whose values are given by name.

        Raises:
            DataError: not such a file, made for another model, or naming tensors this model lacks.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            entries: dict[str, dict[str, Any]] = document["scales"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError("not a qat2int8 scale table", remedy="write one with to_json") from error
        if document.get("model") != digest:
            raise DataError(
                f"the table was made for another model (digest {document.get('model')}, this one is {digest})",
                remedy="collect the scales again from this model",
            )
        table = cls()
        for name, entry in entries.items():
            if name not in values:
                raise DataError(f"the table names tensor '{name}', which the model does not have")
            try:
                table._grids[values[name]] = _params(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"its entry is not a grid: {error}", where=f"tensor '{name}'", remedy="write one with to_json"
                ) from error
        return table


def _params(entry: dict[str, Any]) -> QuantParams:
    trained = entry["trained"]
    return QuantParams.make(
        np.asarray(entry["scale"], np.float32),
        entry["zero_point"],
        QuantDType(entry["bits"], entry["signed"], entry["narrow_range"], entry["top"]),
        axis=entry["axis"],
        source=Provenance[entry["source"].upper()],
        origin=entry["origin"],
    ).with_(trained=None if trained is None else Interval(*trained))
