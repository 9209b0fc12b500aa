"""One way to open data, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_folder import ArrayFolder
from qat2int8.pipelines.data.dataset import Dataset, Reader
from qat2int8.pipelines.data.image_folder import ImageFolder, Preparation
from qat2int8.pipelines.data.inputs import InputSpec, Names
from qat2int8.pipelines.data.mnist_idx import MnistIdx
from qat2int8.pipelines.data.normalise import Normalise
from qat2int8.pipelines.data.npy import Npy
from qat2int8.pipelines.data.npz import Npz
from qat2int8.pipelines.data.options import DataOptions, parse
from qat2int8.pipelines.data.paddle_binary import PaddleBinary
from qat2int8.pipelines.data.python_source import UNNAMED, Arrays, Iterated, named_function, of_iterable
from qat2int8.pipelines.data.recognise import recognised
from qat2int8.pipelines.data.tensorrt_batches import TensorrtBatches

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
        reader, names, normalise = _reader(options, specs)
        return Dataset(
            reader, names, batch_size=batch_size, samples=samples, skip=options.skip, normalise=normalise
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
        f"an object of type {type(source).__name__} is no data",
        remedy="give a path, arrays, an iterable of dicts, or a function",
    )


def _reader(options: DataOptions, inputs: tuple[InputSpec, ...] | None) -> tuple[Reader, Names, Normalise | None]:
    """The reader of the format, how its arrays are called, and what its numbers have to go through."""
    format = options.format or recognised(options.path)
    options.check_keys(format)
    path = Path(options.path)
    normalise = options.normalise()
    # Here the labels are an array among the others, elsewhere a file, or where the format has them.
    named = Names(inputs, options.inputs, options.labels)
    plain = Names(inputs)
    labels = _path(options.labels)
    match format:
        case "python":
            return named_function(options.path), named, normalise
        case "npz":
            return Npz(path, named), named, normalise
        case "folder":
            folder = ArrayFolder(path, named, options.each)
            return folder, folder.names, normalise
        case "npy":
            return Npy(path, plain, labels), plain, normalise
        case "mnist":
            return MnistIdx(path, labels), plain, normalise or Normalise(1 / 255)
        case "tensorrt":
            return TensorrtBatches(path, options.prefix, options.suffix), plain, normalise
        case "paddle":
            return PaddleBinary(path, options.dim, inputs), plain, normalise
    preparation = Preparation.of(options, inputs)
    if normalise is not None:
        normalise = replace(normalise, channels_last=preparation.channels_last)
    return ImageFolder(path, _path(options.list), _path(options.root), preparation), plain, normalise


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
