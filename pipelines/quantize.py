"""Post-training quantization as one call: a float model and samples in, an INT8 model with its evidence out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import onnx

from qat2int8.ir import DataError, Model, Target, UnsupportedModel
from qat2int8.ir.verify import VerifyLevel
from qat2int8.pipelines.calibration.algorithms import DEFAULT_ALGORITHM, Algorithm, parse_algorithm
from qat2int8.pipelines.calibration.ranges import CalibratedRanges, DataRanges, OnBatch, TableRanges
from qat2int8.pipelines.calibration.steps import (
    CALIBRATING,
    POST_TRAINING,
    until_calibration,
    with_bias_correction,
)
from qat2int8.pipelines.convert import Conversion, check_not_converted, run_conversion, with_placement
from qat2int8.pipelines.dialects import has_fake_quant
from qat2int8.pipelines.observers import Observer
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.pipelines.tables.table import CalibrationTable
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["quantize"]


def quantize(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any = None,
    *,
    table: CalibrationTable | None = None,
    trust_table: bool = False,
    calibrator: str | Algorithm = DEFAULT_ALGORITHM,
    samples: int | None = None,
    batch_size: int = 1,
    target: str | os.PathLike[str] | Target = DEFAULT_TARGET,
    pipeline: str | os.PathLike[str] | PipelineSpec = POST_TRAINING,
    per_channel: bool = True,
    symmetric: bool = False,
    keep_fp32_weights: bool = False,
    skip_first_conv: bool = False,
    bias_correction: bool = False,
    quantize_ops: Sequence[str] = (),
    skip_nodes: Sequence[str] = (),
    on_missing_scale: str = "error",
    format: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    threads: int = 0,
    on_batch: OnBatch | None = None,
    verify: VerifyLevel | str = VerifyLevel.CHECKER,
    observers: Sequence[Observer] = (),
) -> Conversion:
    """Turn a float model into one that computes in integers.

    Args:
        model: a file, or a model in memory (left as it is).
        data: samples to calibrate on: a path, arrays by input name, an iterable of dicts of arrays, or
            ``module:function``; see :func:`qat2int8.pipelines.data.open_data`.
        table: ranges that were calibrated before, in place of ``data``.
        trust_table: take a table of another model, by the names of tensors: one extracted from a trained twin.
        calibrator: the algorithm, with options as in ``percentile{percent=99.9}``.
        samples: how many to use at most.
        batch_size: samples a run; a model that fixes its batch decides it.
        target: a target's name, a YAML file of one, or a :class:`Target`.
        pipeline: a shipped pipeline's name, a YAML file, pipeline text, or a :class:`PipelineSpec`.
        per_channel: whether weights have a step per output channel, where the target can.
        symmetric: whether activations that can be negative have as many levels below zero as above.
        keep_fp32_weights: whether weights stay in float in the file, for the runtime to quantize on loading.
        skip_first_conv: whether the first Conv stays in float.
        bias_correction: whether the quantized weights of each channel keep their mean and spread.
        quantize_ops: op types to quantize; empty means all that the target supports.
        skip_nodes: names or ``*`` patterns of nodes to leave in float.
        on_missing_scale: ``error`` or ``float``, for ops named in ``quantize_ops`` that lack a scale.
        format: ``qdq`` or ``qoperator``, how the result says that it computes on integers; None leaves it to the
            pipeline, and the shipped one says ``qdq``.
        options: further options of passes, by pass name.
        threads: of calibration; 0 for all processors.
        on_batch: told of the progress of calibration.
        verify: what is checked after each pass: none, structure, checker or numeric.
        observers: see :mod:`qat2int8.pipelines.observers`.

    Returns:
        The quantized model. Its reference is the float model; its fidelity is measured on the data.

    Raises:
        InvalidModel: the file is not a valid model.
        UnsupportedModel: it has fake quant, or nothing the target computes in integers.
        PipelineError: an unknown pipeline, target, pass, option or algorithm.
        PassFailed: an unknown op or node, or a missing scale of an op asked for by name.
        DataError: neither data nor a table, or both; they do not fit the model; a tensor is not finite.
    """
    if (data is None) is (table is None):
        what = "neither data nor a table" if data is None else "both data and a table"
        raise DataError(f"{what} to take ranges from", remedy="give one of them")
    chosen = target if isinstance(target, Target) else load_target(os.fspath(target))
    if not per_channel:
        chosen = replace(chosen, per_channel_weights=False)
    spec = pipeline if isinstance(pipeline, PipelineSpec) else load_pipeline(os.fspath(pipeline))
    until_calibration(spec)
    spec = with_placement(
        spec,
        options,
        quantize_ops=quantize_ops,
        skip_nodes=skip_nodes,
        on_missing_scale=on_missing_scale,
        format=format,
    )
    if symmetric:
        spec = spec.with_options({CALIBRATING: {"symmetric": True}})
    placement = {"skip_first_conv": skip_first_conv, "float_weights": keep_fp32_weights}
    if any(placement.values()):
        spec = spec.with_options({"insert-quantize-dequantize": {k: v for k, v in placement.items() if v}})
    if bias_correction:
        spec = with_bias_correction(spec)
    algorithm = parse_algorithm(calibrator)
    ranging = (
        partial(_from_table, table, trust_table)
        if table is not None
        else partial(
            DataRanges.open,
            data,
            algorithm,
            samples=samples,
            batch_size=batch_size,
            threads=threads,
            on_batch=on_batch,
        )
    )
    return run_conversion(
        model,
        spec,
        chosen,
        admit=_check_float,
        ranging=ranging,
        reference="float",
        verify=verify,
        observers=observers,
    )


def _from_table(table: CalibrationTable, trusted: bool, model: Model) -> CalibratedRanges:
    if not trusted and table.model_digest and table.model_digest != model.digest():
        raise DataError(
            "the calibration table was made for another model",
            remedy="calibrate this one, or say --trust-table if its tensors are called the same",
        )
    return TableRanges(table)


def _check_float(model: Model, target: Target) -> None:
    """Raise for a model that was quantized, or trained to be, or holds nothing to quantize."""
    check_not_converted(model)
    if has_fake_quant(model):
        raise UnsupportedModel(
            "has fake quantization, whose trained grids are better than calibrated ones",
            remedy="use convert; with data it calibrates what training left open",
        )
    if not any(node.domain == "" and node.op_type in target.ops for node in model.graph.all_nodes()):
        raise UnsupportedModel(
            f"has nothing that {target.name} computes in integers", remedy="see 'qat2int8 inspect'"
        )
