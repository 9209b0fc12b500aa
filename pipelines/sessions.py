"""Sessions of onnxruntime's CPU provider, set up the way this project measures and verifies with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt
import onnxruntime as ort

from qat2int8.ir import DataError, Target, UnsupportedModel
from qat2int8.pipelines.exact_products import exact_products

__all__ = [
    "Feeds",
    "ModelFile",
    "deployed_session",
    "profiled_session",
    "reference_session",
    "run_session",
    "session",
]

Feeds: TypeAlias = dict[str, npt.NDArray[Any]]
"""Arrays by input name; the first axis of each is the batch."""

ModelFile: TypeAlias = Path | bytes
"""A model on disk, or serialised in memory."""


def session(
    model: ModelFile, *, threads: int = 0, optimized: Path | None = None, yielding: bool = False
) -> ort.InferenceSession:
    """A session as a user would make it, with default optimisation.

    Args:
        threads: intra-op threads; 0 lets the runtime choose.
        optimized: where to write the graph the runtime really executes.
        yielding: leave the processor to others between runs, for which its threads wait busily otherwise.

    Raises:
        UnsupportedModel: the runtime refuses the model.
    """
    options = _options(threads)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if yielding:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return _open(model, options)


def deployed_session(
    target: Target, model: ModelFile, *, threads: int = 0, optimized: Path | None = None
) -> ort.InferenceSession:
    """A session that computes ``model`` as ``target`` does, as near as onnxruntime on this machine comes to it.

    On x86 onnxruntime makes uint8 of int8 activations, and leaves layers in float where it cannot. On ARM it does
    not; the option that says so there by default makes it build the same graph of int8 kernels here, slow ones.
    Products that overflow here and not there are computed exactly. For a target with another runtime each node
    computes what the graph says: optimisation is off.

    Raises:
        UnsupportedModel: the runtime refuses the model.
    """
    if target.runtime != "onnxruntime":
        return reference_session(model, threads=threads)
    options = _options(threads)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if target.activation == "int8":
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        return _open(model, options)
    with exact_products(model) as exact:
        return _open(exact, options)


def reference_session(model: ModelFile, *, threads: int = 0) -> ort.InferenceSession:
    """A session that computes what the graph says, node by node: optimisation off."""
    options = _options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with exact_products(model, dequantized=False) as exact:
        return _open(exact, options)


def profiled_session(model: ModelFile, prefix: Path, *, threads: int = 0) -> ort.InferenceSession:
    """A session as :func:`session` makes it that records what each node takes; ``end_profiling`` names the file.

    Raises:
        UnsupportedModel: the runtime refuses the model.
    """
    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return _open(model, options)


def run_session(
    running: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]], names: Sequence[str] | None = None
) -> list[npt.NDArray[Any]]:
    """The outputs called ``names``, all of them if not given.

    Raises:
        DataError: the inputs do not fit the model.
    """
    try:
        outputs: list[npt.NDArray[Any]] = running.run(None if names is None else list(names), dict(feeds))
    except Exception as error:  # onnxruntime raises types of its own, with no common base
        raise DataError(f"onnxruntime cannot run the model on this input: {_first_line(error)}") from error
    return outputs


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def _open(model: ModelFile, options: ort.SessionOptions) -> ort.InferenceSession:
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own, with no common base
        where = "" if isinstance(model, bytes) else str(model)
        raise UnsupportedModel(f"onnxruntime cannot load the model: {_first_line(error)}", where=where) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
