"""Data that Python code provides: iterables, functions that return one, arrays in memory."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.pipelines.data.dataset import Piece

__all__ = ["Arrays", "Iterated", "is_function_name", "named_function"]

Array = npt.NDArray[Any]

UNNAMED = "data"
"""What an array is called that came without a name."""


class Arrays:
    """Arrays in memory, the first axis of each the samples."""

    whole_batches = False

    def __init__(self, arrays: Mapping[str, Array], name: str = "arrays in memory") -> None:
        self.name = name
        self._arrays = {key: np.asarray(array) for key, array in arrays.items()}

    @property
    def count(self) -> int | None:
        # Arrays that nobody needs may have other lengths; reading tells.
        lengths = {len(array) for array in self._arrays.values() if array.ndim}
        return lengths.pop() if len(lengths) == 1 else None

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        longest = max((len(array) for array in self._arrays.values() if array.ndim), default=0)
        for at in range(start, longest, size):
            yield Piece(
                {key: array[at : at + size] if array.ndim else array for key, array in self._arrays.items()},
                self.name,
            )


class Iterated:
    """What ``make()`` iterates over: dicts of arrays, pairs ``(dict, labels)``, or bare arrays; a batch each.

    Instead of an iterable ``make`` may return an object with ``get_next()`` that ends with None, as onnxruntime's
    calibration readers do.
    """

    count = None
    whole_batches = False

    def __init__(self, make: Callable[[], Any], name: str) -> None:
        self.name = name
        self._make = make

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        at = 0
        for index, item in enumerate(self._items()):
            arrays = _arrays(item, f"{self.name}, item {index}")
            samples = max((len(array) for array in arrays.values() if array.ndim), default=0)
            left_out = min(max(start - at, 0), samples)
            at += samples
            if left_out < samples or not samples:
                cut = {key: array[left_out:] if array.ndim else array for key, array in arrays.items()}
                yield Piece(cut, f"{self.name}, item {index}")

    def _items(self) -> Iterator[Any]:
        try:
            made = self._make()
            get_next = getattr(made, "get_next", None)
            yield from iter(get_next, None) if callable(get_next) else made
        except DataError:
            raise
        except Exception as error:  # whatever code of a caller raises
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise DataError(f"its code failed: {reason}", where=self.name, remedy="mend it") from error


def once(iterator: Iterator[Any]) -> Callable[[], Iterator[Any]]:
    """An iterator as what makes one, which works a single time."""
    used: list[bool] = []

    def make() -> Iterator[Any]:
        if used:
            raise DataError(
                "an iterator can be gone through once only",
                remedy="give a list, or a function that returns a new iterator each time",
            )
        used.append(True)
        return iterator

    return make


def of_iterable(data: Iterable[Any]) -> Iterated:
    """A reader of an iterable, which is read again each time unless it is an iterator."""
    name = f"a {type(data).__name__}"
    if hasattr(data, "get_next") or isinstance(data, Iterator):
        return Iterated(once(data), name)  # type: ignore[arg-type]
    return Iterated(lambda: data, name)


def is_function_name(text: str) -> bool:
    """Whether ``text`` looks like ``package.module:function``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None


def named_function(text: str) -> Iterated:
    """The data that the function ``module:function``, called without arguments, returns.

    The current folder is looked into like ``python -m`` does.

    Raises:
        DataError: no such module or function.
    """
    module_name, _, path = text.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(f"cannot be imported: there is no module '{error.name}'", where=text) from error
    except Exception as error:  # whatever the module does when it is imported
        raise DataError(f"cannot be imported: {type(error).__name__}: {error}", where=text) from error
    finally:
        sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            raise DataError(f"'{part}' is not in it", where=text, remedy="name it as module:function")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"is of type {type(found).__name__}, no function", where=text)
    return Iterated(found, text)


def _arrays(item: Any, where: str) -> dict[str, Array]:
    labels = None
    if isinstance(item, tuple) and len(item) == 2:
        item, labels = item
    if not isinstance(item, Mapping):
        item = {UNNAMED: item}
    arrays = {str(name): _array(value, f"{where}: array '{name}'") for name, value in item.items()}
    if labels is not None:
        arrays["labels"] = _array(labels, f"{where}: the labels")
    if not arrays:
        raise DataError("is an empty dict", where=where, remedy="give arrays by input name")
    return arrays


def _array(value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:  # arrays of other libraries raise what they like
        raise DataError(f"is no array: {type(error).__name__}: {error}", where=where) from error
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise DataError(
            f"of type {type(value).__name__}, is no array of numbers",
            where=where,
            remedy="give numpy arrays by input name",
        )
    return array
