"""The main job as one call: a model with fake quantization in, an INT8 model with its evidence out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as oir

from qat2int8.ir import Code, DataError, Diagnostic, InvalidModel, Model, PipelineError, Target, UnsupportedModel
from qat2int8.ir.io import check_output_path, load_model, read_proto, save_model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.passes.lower_to_qoperators import LowerToQoperators
from qat2int8.pipelines.calibration.algorithms import DEFAULT_ALGORITHM, Algorithm, parse_algorithm
from qat2int8.pipelines.calibration.ranges import CalibratedRanges, DataRanges, OnBatch
from qat2int8.pipelines.calibration.steps import with_calibration
from qat2int8.pipelines.certificate import Certificate, certify
from qat2int8.pipelines.dialects import has_fake_quant
from qat2int8.pipelines.fidelity import Fidelity, compare, synthetic_inputs
from qat2int8.pipelines.levels import pairs_of
from qat2int8.pipelines.manager import PipelineRun, run_pipeline
from qat2int8.pipelines.observers import Observer
from qat2int8.pipelines.reference import ReadableSource
from qat2int8.pipelines.sessions import Feeds, ModelFile
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import PipelineSpec, flatten
from qat2int8.pipelines.tables.table import CalibrationTable
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target
from qat2int8.pipelines.version import VERSION

__all__ = [
    "TENSORS_KEY",
    "Conversion",
    "check_not_converted",
    "convert",
    "run_conversion",
    "with_placement",
]

_PLACEMENT = "insert-quantize-dequantize"
_NARROWING = "narrow-wide-grids"
_LOWERING = "lower-to-qoperators"
_PIPELINE_KEY = "qat2int8.pipeline"
TENSORS_KEY = "qat2int8.tensors"
"""Of the metadata entry that says which tensor of the source an integer tensor of the result is."""
_MISSING_SCALE = "error"
_FIDELITY_SAMPLES = 16
_FIDELITY_SECONDS = 0.4

_RUNTIME_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})


@dataclass(frozen=True)
class _Stored:
    """A model file, and what tells whether it is still the same one."""

    path: Path
    identity: tuple[int, ...]

    @classmethod
    def at(cls, path: Path) -> _Stored:
        return cls(path, _identity(path))

    @property
    def unchanged(self) -> bool:
        try:
            return _identity(self.path) == self.identity
        except OSError:
            return False


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(eq=False)
class Conversion:
    """A converted model and what is known about it.

    Attributes:
        model: the result; its scale table holds the grid of every tensor that got one.
        target: what it was made for.
        pipeline: what was run.
        run: what each pass did.
        before: op types of the source with counts.
        source_bytes: size of the source, data files included.
        reference: what kind of model the source is, which fidelity compares with: ``fake-quant`` or ``float``.
    """

    model: Model
    target: Target
    pipeline: PipelineSpec
    run: PipelineRun
    before: dict[str, int]
    source_bytes: int
    _source: _Stored | bytes = field(repr=False)
    _readable: ReadableSource = field(repr=False)
    _ranges: CalibratedRanges | None = field(default=None, repr=False)
    reference: str = "fake-quant"
    _saved: _Stored | None = field(default=None, repr=False)
    _scratch: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Everything the passes had to say, in order."""
        return self.run.diagnostics

    @property
    def calibration(self) -> CalibrationTable | None:
        """The ranges that were calibrated, or the table they were read from; None where neither was given."""
        return self._ranges.table() if self._ranges is not None else None

    @property
    def after(self) -> dict[str, int]:
        """Op types of the result with counts."""
        return _op_counts(self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result, atomically.

        Raises:
            OutputError: the path cannot be written, or is the source, which fidelity is measured against.
        """
        if isinstance(self._source, _Stored):
            check_output_path(path, source=self._source.path)
        save_model(self.model, path)
        self._saved = _Stored.at(Path(path))

    @cached_property
    def certificate(self) -> Certificate:
        """What onnxruntime executes in integers; takes one session to find out.

        Raises:
            UnsupportedModel: onnxruntime refuses the model.
        """
        try:
            return certify(self.model, self._file(), self.target)
        except UnsupportedModel as error:
            raise _refused(self.model, error) from error

    @cached_property
    def fidelity(self) -> Fidelity:
        """How closely the result follows its source: on samples it was calibrated on, else on synthetic inputs.

        See :meth:`fidelity_on` for inputs of one's own.

        Raises:
            UnsupportedModel: onnxruntime refuses one of the models.
            DataError: no input could be made up that the models accept, or the source has been changed or deleted.
        """
        data = self._ranges.data if self._ranges is not None else None
        if data is not None:
            with contextlib.suppress(DataError):  # an iterator can be gone through once only
                batches = (batch.inputs for batch in itertools.islice(data, _FIDELITY_SAMPLES))
                return self._compared(batches, data.name, _FIDELITY_SECONDS)
        return self._compared(synthetic_inputs(self.model, _FIDELITY_SAMPLES), "synthetic", _FIDELITY_SECONDS)

    def fidelity_on(self, batches: Iterable[Feeds], name: str = "data") -> Fidelity:
        """The same on inputs of the caller: dicts of arrays by input name.

        Raises:
            UnsupportedModel: onnxruntime refuses one of the models.
            DataError: an input does not fit, there is none, or the source has been changed or deleted.
        """
        return self._compared(batches, name, math.inf)

    def _compared(self, batches: Iterable[Feeds], name: str, seconds: float) -> Fidelity:
        return compare(
            self._original(),
            self._file(),
            batches,
            data=name,
            seconds=seconds,
            target=self.target,
            pairs=pairs_of(self.model),
        )

    def _original(self) -> ModelFile:
        if self._readable.path is not None:
            return self._readable.path
        if isinstance(self._source, bytes):
            return self._source
        if not self._source.unchanged:
            raise DataError(
                "the source has been changed or deleted since it was converted",
                where=str(self._source.path),
                remedy="convert it again, or measure fidelity earlier",
            )
        return self._source.path

    def _file(self) -> Path:
        """The result on disk: where it was saved if it is still there, else a file of its own.

        A file even when it was never saved: in memory a model cannot have external data or exceed 2 GiB.
        """
        if self._saved is None or not self._saved.unchanged:
            self._scratch = tempfile.TemporaryDirectory(prefix="qat2int8-")
            path = Path(self._scratch.name) / "model.onnx"
            save_model(self.model, path)
            self._saved = _Stored.at(path)
        return self._saved.path


def convert(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    target: str | os.PathLike[str] | Target = DEFAULT_TARGET,
    pipeline: str | os.PathLike[str] | PipelineSpec = "qat-to-int8",
    quantize_ops: Sequence[str] = (),
    skip_nodes: Sequence[str] = (),
    on_missing_scale: str = _MISSING_SCALE,
    narrow_16_bit: bool = False,
    format: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    data: Any = None,
    calibrator: str | Algorithm = DEFAULT_ALGORITHM,
    samples: int | None = None,
    batch_size: int = 1,
    threads: int = 0,
    on_batch: OnBatch | None = None,
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
        narrow_16_bit: put 16-bit grids, which no integer kernel computes, on 8-bit grids of the same range.
        format: ``qdq`` or ``qoperator``, how the result says that it computes on integers; None leaves it to the
            pipeline, and the shipped one says ``qdq``.
        options: further options of passes, by pass name.
        data: samples for the tensors that nobody trained and nothing could derive a grid for; what
            :func:`qat2int8.pipelines.data.open_data` opens.
        calibrator: the algorithm for those, as in ``percentile{percent=99.9}``.
        samples: how many to use at most.
        batch_size: samples a run; a model that fixes its batch decides it.
        threads: of calibration; 0 for all processors.
        on_batch: told of the progress of calibration.
        verify: what is checked after each pass: none, structure, checker or numeric.
        observers: see :mod:`qat2int8.pipelines.observers`.

    Returns:
        The converted model; certificate and fidelity are computed when they are first read.

    Raises:
        InvalidModel: the file is not a valid model.
        UnsupportedModel: there is no fake quant in it, or none the target can compute.
        PipelineError: an unknown pipeline, target, pass, option or algorithm, or a format the target does not
            read.
        PassFailed: an unknown op or node, or a missing scale of an op asked for by name.
        DataError: the data cannot be read, do not fit, or make a tensor that is not finite.
    """
    chosen = target if isinstance(target, Target) else load_target(os.fspath(target))
    spec = pipeline if isinstance(pipeline, PipelineSpec) else load_pipeline(os.fspath(pipeline))
    spec = with_placement(
        spec,
        options,
        quantize_ops=quantize_ops,
        skip_nodes=skip_nodes,
        on_missing_scale=on_missing_scale,
        narrow_16_bit=narrow_16_bit,
        format=format,
    )
    ranging = None
    if data is not None:
        spec = with_calibration(spec)
        algorithm = parse_algorithm(calibrator)
        ranging = partial(
            DataRanges.open,
            data,
            algorithm,
            samples=samples,
            batch_size=batch_size,
            threads=threads,
            on_batch=on_batch,
        )
    return run_conversion(
        model, spec, chosen, admit=_check_fake_quant, ranging=ranging, verify=verify, observers=observers
    )


def with_placement(
    spec: PipelineSpec,
    options: Mapping[str, Mapping[str, Any]] | None,
    *,
    quantize_ops: Sequence[str],
    skip_nodes: Sequence[str],
    on_missing_scale: str,
    narrow_16_bit: bool = False,
    format: str | None = None,
) -> PipelineSpec:
    """``spec`` with the options that callers have names of their own for, and with ``options``, by pass name.

    Raises:
        PipelineError: the pipeline has no such pass.
    """
    placement: dict[str, Any] = {}
    if quantize_ops:
        placement["quantize_ops"] = tuple(quantize_ops)
    if quantize_ops or on_missing_scale != _MISSING_SCALE:
        placement["on_missing_scale"] = on_missing_scale
    if skip_nodes:
        placement["skip_nodes"] = tuple(skip_nodes)
    overrides = {name: dict(fields) for name, fields in (options or {}).items()}
    if placement:
        overrides.setdefault(_PLACEMENT, {}).update(placement)
    if narrow_16_bit:
        overrides.setdefault(_NARROWING, {})["requantize"] = True
    if format is not None:
        overrides.setdefault(_LOWERING, {})["format"] = format
    return spec.with_options(overrides) if overrides else spec


def run_conversion(
    model: str | os.PathLike[str] | onnx.ModelProto,
    spec: PipelineSpec,
    target: Target,
    *,
    admit: Callable[[Model, Target], None],
    ranging: Callable[[Model], CalibratedRanges] | None,
    reference: str = "fake-quant",
    verify: VerifyLevel | str,
    observers: Sequence[Observer],
) -> Conversion:
    """Read a model, run ``spec`` on it and stamp the result: what all conversions have in common.

    Args:
        admit: raises for a model that this conversion is not for.
        ranging: opens the source of calibrated ranges for the model.
        reference: what kind of model the source is.

    Raises:
        Qat2Int8Error: as :func:`convert`.
    """
    level = _verify_level(verify)
    # What is misspelt or not possible is found before a model is read that may take a while.
    for pass_ in flatten(spec.build()):
        if isinstance(pass_, LowerToQoperators):
            target.check_format(pass_.format)
    source: _Stored | bytes
    if isinstance(model, onnx.ModelProto):
        source = _serialized(model)
        graph = read_proto(model)
    else:
        graph = load_model(model)
        source = _Stored.at(Path(model))
    size = (len(source) if isinstance(source, bytes) else source.identity[2]) + _external_bytes(graph)
    before = _op_counts(graph)
    with _naming(graph), ThreadPoolExecutor(max_workers=1) as background:
        admit(graph, target)
        # Hashing 100 MB takes as long as several passes, and lets other threads run meanwhile.
        digest = background.submit(_sha256, source)
        readable = ReadableSource(graph)
        ranges = ranging(graph) if ranging is not None else None
        ctx = Context(target, ranges)
        with _data_errors_as_they_are():
            run = run_pipeline(graph, spec, ctx, verify=level, observers=(*observers, readable))
        _check_placed(graph, run)
        _stamp(graph, spec, target, run, digest.result())
    return Conversion(graph, target, spec, run, before, size, source, readable, ranges, reference)


@contextlib.contextmanager
def _data_errors_as_they_are() -> Iterator[None]:
    """Leave out which pass was running when a sample turned out to be wrong: it has no part in it."""
    try:
        yield
    except DataError as error:
        raise (error.__cause__ if isinstance(error.__cause__, DataError) else error) from None


def _verify_level(name: str) -> VerifyLevel:
    try:
        return VerifyLevel(name)
    except ValueError:
        raise PipelineError(
            f"no verification level is called '{name}'", remedy=f"one of {', '.join(VerifyLevel)}"
        ) from None


def _op_counts(model: Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


@contextlib.contextmanager
def _naming(model: Model) -> Iterator[None]:
    """Put the file's name in front of what is wrong with the model."""
    try:
        yield
    except (InvalidModel, UnsupportedModel) as error:
        if model.path is None:
            raise
        where = f"{model.path}: {error.where}" if error.where else str(model.path)
        raise type(error)(error.what, where=where, remedy=error.remedy) from error


def _refused(model: Model, error: UnsupportedModel) -> UnsupportedModel:
    """What there is to say about a result that the runtime does not load."""
    for node in model.graph.all_nodes():
        if node.domain not in _RUNTIME_DOMAINS:
            return UnsupportedModel(
                f"onnxruntime has no op '{node.op_type}' of domain '{node.domain}'",
                where=f"node '{node.name or node.outputs[0].name}'",
                remedy="replace it with ops of ONNX",
            )
    return UnsupportedModel(error.what, remedy=error.remedy)


def _serialized(proto: onnx.ModelProto) -> bytes:
    try:
        content: bytes = proto.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, whose module differs between its implementations
        raise UnsupportedModel(
            "a model in memory cannot be larger than 2 GiB",
            remedy="save it with external data and convert the file",
        ) from error
    return content


def _external_bytes(model: Model) -> int:
    tensors = (value.const_value for graph in model.ir.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, oir.ExternalTensor))


def check_not_converted(model: Model) -> None:
    """Raise for a model that this tool made."""
    if _PLACEMENT in model.ir.metadata_props.get(_PIPELINE_KEY, ""):
        raise UnsupportedModel("has been converted to INT8 already", remedy="convert the model it was made from")


def _check_fake_quant(model: Model, target: Target) -> None:
    """Raise when there is no fake quant to convert."""
    check_not_converted(model)
    if not has_fake_quant(model):
        raise _no_fake_quant()


def _no_fake_quant() -> UnsupportedModel:
    return UnsupportedModel(
        "no fake quantization found: no QuantizeLinear, no DequantizeLinear, no recorded thresholds",
        remedy="export the model with its fake quant nodes, or calibrate a float one with 'qat2int8 quantize'",
    )


def _check_placed(model: Model, run: PipelineRun) -> None:
    """Raise when nothing was placed because there is no fake quant, or none of a kind that can be computed."""
    placements = [passed for passed in run.runs if passed.name == _PLACEMENT]
    if not placements or any(passed.result.modified for passed in placements):
        return
    for finding in run.diagnostics:
        if finding.code is Code.UNSUPPORTED_FAKE_QUANT:
            where = f"node '{finding.node}', tensor '{finding.value}'"
            reason = finding.reason.removeprefix("left as it is: ")
            raise UnsupportedModel(f"nothing to convert: {reason}", where=where, remedy=finding.remedy)
    if not any(name.startswith("gather-") for name in run.counts) and not _quantizes(model):
        raise _no_fake_quant()


def _quantizes(model: Model) -> bool:
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.all_nodes())


def _sha256(source: _Stored | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(model: Model, spec: PipelineSpec, target: Target, run: PipelineRun, digest: str) -> None:
    """Write into the model where it comes from, so that the file alone explains itself."""
    model.ir.metadata_props.update(
        {
            "qat2int8.version": VERSION,
            _PIPELINE_KEY: str(spec),
            "qat2int8.target": target.name,
            "qat2int8.source_sha256": digest,
            "qat2int8.diagnostics": json.dumps([finding.as_dict() for finding in run.diagnostics]),
            TENSORS_KEY: json.dumps(
                {value.name: traced.tensor for value, traced in model.scales.traces() if value.name}
            ),
        }
    )
