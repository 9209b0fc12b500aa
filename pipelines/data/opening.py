"""One way to open data, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.dataset import Dataset, Reader
from qat2int8.pipelines.data.inputs import InputSpec, Names
from qat2int8.pipelines.data.npz import Npz
from qat2int8.pipelines.data.options import DataOptions, parse
from qat2int8.pipelines.data.python_source import (
    UNNAMED,
    Arrays,
    Iterated,
    is_function_name,
    named_function,
    of_iterable,
)

__all__ = ["open_data"]


def open_data(
    source: Any,
    inputs: Sequence[InputSpec] | None = None,
    *,
    batch_size: int = 32,
    samples: int | None = None,
) -> Dataset:
    """Open data for a model.

    Args:
        source: a path or a text as in docs/formats.md; a mapping of the same keys with ``path`` among them; an
            array or a mapping of arrays by input name; an iterable of dicts of arrays, of ``(dict, labels)`` or of
            arrays, a batch each; an object with ``get_next()``; a function without arguments that returns one.
        inputs: what the model takes, from :func:`input_specs`; None takes the arrays as they are.
        batch_size: samples a batch. A model that fixes its first dimension decides it.
        samples: how many to read at most; None reads all.

    Raises:
        DataError: there are no such data, or what can be told of them without reading does not fit the model.
            Going through the dataset raises it for what is found on the way.
    """
    specs = None if inputs is None else tuple(inputs)
    if isinstance(source, str | Path) or (isinstance(source, Mapping) and isinstance(source.get("path"), str)):
        options = parse(source)
        names = Names(specs, options.inputs, options.labels)
        reader, names = _reader(options, names)
        return Dataset(
            reader,
            names,
            batch_size=batch_size,
            samples=samples,
            skip=options.skip,
            normalise=options.normalise(),
        )
    return Dataset(_of_python(source), Names(specs), batch_size=batch_size, samples=samples)


def _of_python(source: Any) -> Reader:
    if isinstance(source, Mapping):
        return Arrays(source)
    if isinstance(source, np.ndarray):
        return Arrays({UNNAMED: source})
    if isinstance(source, Callable) and not hasattr(source, "get_next"):  # type: ignore[arg-type]
        return Iterated(source, getattr(source, "__name__", "a function"))
    if isinstance(source, Iterable) or hasattr(source, "get_next"):
        return of_iterable(source)
    raise DataError(
        f"a {type(source).__name__} is no data", remedy="give a path, arrays, an iterable of dicts, or a function"
    )


def _reader(options: DataOptions, names: Names) -> tuple[Reader, Names]:
    format = options.format or _recognised(options.path)
    options.check_keys(format)
    path = Path(options.path)
    if format == "python":
        return named_function(options.path), names
    return Npz(path, names), names


def _recognised(path: str) -> str:
    if is_function_name(path) and not Path(path).exists():
        return "python"
    return "npz"
