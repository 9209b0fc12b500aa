"""The main job as one call: a model with fake quantization in, an INT8 model with its evidence out."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from qat2int8.ir import Code, Diagnostic, Model, PipelineError, Target, UnsupportedModel
from qat2int8.ir.io import load_model, read_proto, save_model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.pipelines.certificate import Certificate, certify
from qat2int8.pipelines.fidelity import Fidelity, compare, synthetic_inputs
from qat2int8.pipelines.manager import PipelineRun, run_pipeline
from qat2int8.pipelines.observers import Observer
from qat2int8.pipelines.sessions import Feeds, ModelFile
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.pipelines.target_files import load_target
from qat2int8.pipelines.version import VERSION

__all__ = ["Conversion", "convert"]

_PLACEMENT = "insert-quantize-dequantize"
_FIDELITY_SAMPLES = 16
_FIDELITY_SECONDS = 0.4


@dataclass(eq=False)
class Conversion:
    """A converted model and what is known about it.

    Attributes:
        model: the result; its scale table holds the grid of every tensor that got one.
        target: what it was made for.
        pipeline: what was run.
        run: what each pass did.
        before: op types of the source with counts.
    """

    model: Model
    target: Target
    pipeline: PipelineSpec
    run: PipelineRun
    before: dict[str, int]
    _source: ModelFile = field(repr=False)
    _saved: Path | None = field(default=None, repr=False)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Everything the passes had to say, in order."""
        return self.run.diagnostics

    @property
    def after(self) -> dict[str, int]:
        """Op types of the result with counts."""
        return _op_counts(self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result, atomically.

        Raises:
            OutputError: the path cannot be written.
        """
        save_model(self.model, path)
        self._saved = Path(path)

    @cached_property
    def certificate(self) -> Certificate:
        """What onnxruntime executes in integers; takes one session to find out.

        Raises:
            UnsupportedModel: onnxruntime refuses the model.
        """
        return certify(self.model, self._file())

    @cached_property
    def fidelity(self) -> Fidelity:
        """How closely the result follows its source on synthetic inputs; see :meth:`fidelity_on` for real ones.

        Raises:
            UnsupportedModel: onnxruntime refuses one of the models.
        """
        inputs = synthetic_inputs(self.model, _FIDELITY_SAMPLES)
        return compare(self._source, self._file(), inputs, seconds=_FIDELITY_SECONDS)

    def fidelity_on(self, batches: Sequence[Feeds], name: str = "data") -> Fidelity:
        """The same on inputs of the caller: dicts of arrays by input name.

        Raises:
            UnsupportedModel: onnxruntime refuses one of the models.
            DataError: an input does not fit, or there is none.
        """
        return compare(self._source, self._file(), batches, data=name)

    def _file(self) -> ModelFile:
        return self._saved if self._saved is not None else self.model.to_proto().SerializeToString()


def convert(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    target: str | Target = "ort-x86",
    pipeline: str | PipelineSpec = "qat-to-int8",
    quantize_ops: Sequence[str] = (),
    skip_nodes: Sequence[str] = (),
    on_missing_scale: str = "error",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    verify: VerifyLevel | str = VerifyLevel.CHECKER,
    observers: Sequence[Observer] = (),
) -> Conversion:
    """Turn a model with fake quantization into one that computes in integers.

    Args:
        model: a file, or a model in memory (left as it is).
        target: a target's name, a YAML file of one, or a :class:`Target`.
        pipeline: a shipped pipeline's name, a YAML file, pipeline text, or a :class:`PipelineSpec`.
        quantize_ops: op types to quantize; empty means all that the target supports.
        skip_nodes: names or ``*`` patterns of nodes to leave in float.
        on_missing_scale: ``error`` or ``float``, for ops named in ``quantize_ops`` that lack a scale.
        options: further options of passes, by pass name.
        verify: what is checked after each pass: none, structure, checker or numeric.
        observers: see :mod:`qat2int8.pipelines.observers`.

    Returns:
        The converted model; certificate and fidelity are computed when they are first read.

    Raises:
        InvalidModel: the file is not a valid model.
        UnsupportedModel: there is no fake quant in it, or none the target can compute.
        PipelineError: an unknown pipeline, target, pass or option.
        PassFailed: an unknown op or node, or a missing scale of an op asked for by name.
    """
    chosen = load_target(target) if isinstance(target, str) else target
    spec = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    placement: dict[str, Any] = {}
    if quantize_ops:
        placement |= {"quantize_ops": tuple(quantize_ops), "on_missing_scale": on_missing_scale}
    if skip_nodes:
        placement["skip_nodes"] = tuple(skip_nodes)
    overrides = {name: dict(fields) for name, fields in (options or {}).items()}
    if placement:
        overrides.setdefault(_PLACEMENT, {}).update(placement)
    if overrides:
        spec = spec.with_options(overrides)

    level = _verify_level(verify)
    source: ModelFile
    if isinstance(model, onnx.ModelProto):
        source = model.SerializeToString()
        graph = read_proto(model)
    else:
        source = Path(model)
        graph = load_model(source)
    before = _op_counts(graph)
    _check_fake_quant(graph)
    with ThreadPoolExecutor(max_workers=1) as background:
        # Hashing 100 MB takes as long as several passes, and lets other threads run meanwhile.
        digest = background.submit(_sha256, source)
        run = run_pipeline(graph, spec, Context(chosen), verify=level, observers=observers)
        _check_placed(run)
        _stamp(graph, spec, chosen, run, digest.result())
    return Conversion(graph, chosen, spec, run, before, source)


def _verify_level(name: str) -> VerifyLevel:
    try:
        return VerifyLevel(name)
    except ValueError:
        raise PipelineError(
            f"no verification level is called '{name}'", remedy=f"one of {', '.join(VerifyLevel)}"
        ) from None


def _op_counts(model: Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


def _check_fake_quant(model: Model) -> None:
    functions = (node for function in model.ir.functions.values() for node in function)
    for node in (*model.graph.all_nodes(), *functions):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or "out_threshold" in node.attributes:
            return
        if "out_threshold" in node.metadata_props:
            return
    raise UnsupportedModel(
        "no fake quantization found: no QuantizeLinear, no DequantizeLinear, no recorded thresholds",
        remedy="export the model with its fake quant nodes",
    )


def _check_placed(run: PipelineRun) -> None:
    """Raise when every fake quant was of a kind that cannot be computed, so that nothing was placed."""
    placements = [passed for passed in run.runs if passed.name == _PLACEMENT]
    if not placements or any(passed.result.modified for passed in placements):
        return
    for finding in run.diagnostics:
        if finding.code is Code.UNSUPPORTED_FAKE_QUANT:
            where = f"node '{finding.node}', tensor '{finding.value}'"
            raise UnsupportedModel(finding.reason, where=where, remedy=finding.remedy)


def _sha256(source: ModelFile) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(model: Model, spec: PipelineSpec, target: Target, run: PipelineRun, digest: str) -> None:
    """Write into the model where it comes from, so that the file alone explains itself."""
    model.ir.metadata_props.update(
        {
            "qat2int8.version": VERSION,
            "qat2int8.pipeline": str(spec),
            "qat2int8.target": target.name,
            "qat2int8.source_sha256": digest,
            "qat2int8.diagnostics": json.dumps([finding.as_dict() for finding in run.diagnostics]),
        }
    )
