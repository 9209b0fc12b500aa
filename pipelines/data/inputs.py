"""What a model wants to be fed, and whether an array is that."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import DataError, Model, UnsupportedModel

__all__ = ["Chosen", "InputSpec", "Names", "fit", "input_specs"]

Array = npt.NDArray[Any]

LABELS = "labels"
"""What the array with the expected answers is called unless the caller says otherwise."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        shape: a dimension is None where any size will do; the whole is None where not even the rank is known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    @property
    def batch(self) -> int | None:
        """How many samples a run takes, None for any number; a scalar has no samples."""
        return self.shape[0] if self.shape else None

    def __str__(self) -> str:
        shape = "?" if self.shape is None else _shown(self.shape)
        return f"{self.dtype}{shape}"


def input_specs(model: Model) -> tuple[InputSpec, ...]:
    """The inputs a caller has to give, in the order of the graph.

    Raises:
        UnsupportedModel: one is no tensor of numbers.
    """
    return tuple(_spec(value) for value in model.graph.inputs if not value.is_initializer())


def _spec(value: oir.Value) -> InputSpec:
    if not isinstance(value.type, oir.TensorType) or value.dtype in (None, oir.DataType.STRING):
        raise UnsupportedModel(
            f"is of type {value.type}; data can be read for tensors of numbers only", where=f"input '{value.name}'"
        )
    assert value.dtype is not None
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return InputSpec(value.name or "", np.dtype(value.dtype.numpy()), shape)


@dataclass(frozen=True)
class Chosen:
    """Which array goes where: array name by input name, and the array of the labels."""

    inputs: dict[str, str]
    labels: str | None

    @property
    def arrays(self) -> frozenset[str]:
        """All that have to be read."""
        return frozenset({*self.inputs.values(), *([self.labels] if self.labels is not None else ())})


@dataclass(frozen=True)
class Names:
    """How arrays are matched with inputs: by name, one with one whatever their names, or as the caller says.

    Attributes:
        inputs: of the model; None takes every array under its own name.
        renamed: array name by input name, as said by the caller; the input ``""`` is the only one.
        labels: name of the array with the labels; None: ``labels`` if there is one.
    """

    inputs: tuple[InputSpec, ...] | None
    renamed: Mapping[str, str] = field(default_factory=dict)
    labels: str | None = None

    def choose(self, available: Sequence[str], where: str) -> Chosen:
        """Match the arrays called ``available``, which were found at ``where``.

        Raises:
            DataError: an input finds no array, or could take several.
        """
        labels = LABELS if self.labels is None else self.labels
        if self.labels is not None and labels not in available:
            raise _missing("labels are to be", labels, available, where)
        found = labels if labels in available else None
        if self.inputs is None and self.renamed:
            for array in self.renamed.values():
                if array not in available:
                    raise _missing("an input is to be", array, available, where)
            return Chosen({name or array: array for name, array in self.renamed.items()}, found)
        if self.inputs is None:
            return Chosen({name: name for name in available if name != found}, found)
        renamed = self._renamed(available, where)
        candidates = [name for name in available if name != found]
        chosen = {}
        for spec in self.inputs:
            if spec.name in renamed:
                chosen[spec.name] = renamed[spec.name]
            elif spec.name in available:
                chosen[spec.name] = spec.name
            elif len(self.inputs) == 1 and len(candidates) == 1:
                chosen[spec.name] = candidates[0]
            elif len(self.inputs) == 1 and candidates:
                raise DataError(
                    f"holds the arrays {_list(candidates)}; none is called '{spec.name}' like the model's input",
                    where=where,
                    remedy=f"say which one: ?inputs={candidates[0]}",
                )
            else:
                raise _missing(f"the model's input '{spec.name}' is to be", spec.name, available, where)
        return Chosen(chosen, found)

    def one_sample(self, shapes: Mapping[str, Sequence[int]], chosen: Chosen, where: str) -> bool:
        """Whether arrays of these shapes lack the axis of samples: they have fewer axes than the inputs.

        Raises:
            DataError: some have it and some have not.
        """
        ranked = [spec for spec in self.inputs or () if spec.shape is not None]
        kinds = {len(shapes[chosen.inputs[spec.name]]) < len(spec.shape or ()) for spec in ranked}
        if len(kinds) > 1:
            raise DataError(
                "some of its arrays have an axis of samples and some have not",
                where=where,
                remedy="say what a file is: ?each=sample or ?each=batch",
            )
        return kinds == {True}

    def _renamed(self, available: Sequence[str], where: str) -> dict[str, str]:
        assert self.inputs is not None
        known = [spec.name for spec in self.inputs]
        renamed = {}
        for name, array in self.renamed.items():
            if not name and len(known) != 1:
                raise DataError(
                    f"the model has the inputs {_list(known)}",
                    where=where,
                    remedy=f"say which one '{array}' is for: ?inputs={known[0] if known else ''}:{array}",
                )
            if name and name not in known:
                raise DataError(f"the model has no input '{name}'", where=where, remedy=_near(name, known))
            if array not in available:
                raise _missing("an input is to be", array, available, where)
            renamed[name or known[0]] = array
        return renamed


def fit(array: Array, spec: InputSpec, where: str) -> Array:
    """``array``, whose first axis is the samples, as the model wants it.

    Floats of other widths are converted, integers too where their values fit. Axes of size 1 that are missing or
    too many are put right, because that moves no number. Nothing else is: integers do not become floats by
    themselves, since nobody knows by which scale.

    Raises:
        DataError: dtype or shape are others.
    """
    if spec.shape == ():
        return _converted(array, spec, where)
    return _shaped(_converted(array, spec, where), spec, where)


def _converted(array: Array, spec: InputSpec, where: str) -> Array:
    have, want = array.dtype, spec.dtype
    if have == want:
        return array
    if _is_float(have) and _is_float(want):
        with np.errstate(over="ignore"):  # infinity is an error where it is looked for, with its sample
            return array.astype(want)
    if have.kind in "iu" and want.kind in "iu":
        limits = np.iinfo(want)
        if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
            raise DataError(
                f"holds integers outside of {want}, which input '{spec.name}' takes",
                where=where,
                remedy=f"store numbers from {limits.min} to {limits.max}",
            )
        return array.astype(want)
    if have.kind in "iub" and _is_float(want):
        remedy = f"say how its integers are scaled, such as ?scale=1/255, or store it as {want}"
    else:
        remedy = f"store it as {want}"
    raise DataError(f"is {have}, but input '{spec.name}' of the model takes {want}", where=where, remedy=remedy)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _shaped(array: Array, spec: InputSpec, where: str) -> Array:
    if spec.shape is None or not array.ndim:
        return array
    have, want = array.shape[1:], spec.shape[1:]
    if _same(have, want):
        return array
    squeezed = [size for size in have if size != 1]
    known = [size for size in want if size != 1]
    if len(squeezed) == len(known) and _same(squeezed, known):
        sizes = iter(squeezed)
        return array.reshape(array.shape[0], *(1 if size == 1 else next(sizes) for size in want))
    raise DataError(
        f"a sample has the shape {_shown(have)}, input '{spec.name}' of the model takes {_shown(want)}",
        where=where,
        remedy=_reshaping(have, want),
    )


def _same(have: Sequence[int], want: Sequence[int | None]) -> bool:
    return len(have) == len(want) and all(b is None or a == b for a, b in zip(have, want, strict=True))


def _reshaping(have: Sequence[int], want: Sequence[int | None]) -> str:
    if len(have) == 3 and len(want) == 3:
        if _same((have[2], have[0], have[1]), want):
            return "put the channels first: x.transpose(0, 3, 1, 2)"
        if _same((have[1], have[2], have[0]), want):
            return "put the channels last: x.transpose(0, 2, 3, 1)"
    return "store the samples in the model's shape"


def _shown(shape: Sequence[int | None]) -> str:
    return f"[{','.join('?' if size is None else str(size) for size in shape)}]"


def _missing(what: str, name: str, available: Sequence[str], where: str) -> DataError:
    near = _near(name, available)
    return DataError(f"{what} in an array '{name}', which is not there", where=where, remedy=near)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there is {_list(known) or 'none at all'}"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
