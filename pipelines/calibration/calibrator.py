"""Calibration as an object, for those who run the model in a loop of their own, and as one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as oir

from qat2int8.ir import DataError, Interval, Model, Target, UnsupportedModel
from qat2int8.ir.io import load_model, read_proto
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.pipelines.calibration.algorithms import DEFAULT_ALGORITHM, Algorithm, parse_algorithm
from qat2int8.pipelines.calibration.collector import Collector, sampling_model
from qat2int8.pipelines.calibration.kept import statistics_of
from qat2int8.pipelines.calibration.ranges import OnBatch, collect, table_of
from qat2int8.pipelines.calibration.statistics import Statistics
from qat2int8.pipelines.calibration.steps import POST_TRAINING, until_calibration
from qat2int8.pipelines.calibration.streams import BatchStream, CachedStream, batches_of
from qat2int8.pipelines.data import Dataset, InputSpec, input_specs, open_data
from qat2int8.pipelines.dialects import has_fake_quant
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.observers import Observer
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.pipelines.tables.json_table import read_json, write_json
from qat2int8.pipelines.tables.table import CalibrationTable
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["Calibrator", "calibrate"]


class Calibrator:
    """Finds the ranges of the tensors in a float model that integer kernels need.

    >>> calibrator = Calibrator("model.onnx", "entropy")
    >>> for images in batches:
    ...     calibrator.observe({"image": images})
    >>> table = calibrator.compute()

    Whoever runs the model elsewhere runs :attr:`sampling_model` there and hands its outputs to :meth:`record`.

    Attributes:
        algorithm: by which ranges are chosen; any may be given to :meth:`compute` as long as values were counted.
        digest: of the model, which binds tables to it.
        inputs: what the model takes.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | onnx.ModelProto,
        algorithm: str | Algorithm = DEFAULT_ALGORITHM,
        *,
        target: str | os.PathLike[str] | Target = DEFAULT_TARGET,
        pipeline: str | os.PathLike[str] | PipelineSpec = POST_TRAINING,
        resume: CalibrationTable | None = None,
        threads: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        """
        Args:
            model: a float model, a file or in memory.
            algorithm: by name, with options as in ``percentile{percent=99.9}``.
            pipeline: its passes up to the one that gathers calibrated scales prepare the model.
            resume: a table with statistics of this model, to go on from.
            threads: of running and counting; 0 for all processors.

        Raises:
            PipelineError: an unknown algorithm, target or pipeline, or one without that pass.
            InvalidModel: the file is not a valid model.
            UnsupportedModel: it has fake quant, or nothing the target computes in integers, or onnxruntime refuses
                it.
            DataError: ``resume`` does not fit.
        """
        self.algorithm = parse_algorithm(algorithm)
        chosen = target if isinstance(target, Target) else load_target(os.fspath(target))
        spec = pipeline if isinstance(pipeline, PipelineSpec) else load_pipeline(os.fspath(pipeline))
        spec = until_calibration(spec)
        graph = read_proto(model) if isinstance(model, onnx.ModelProto) else load_model(model)
        where = "" if isinstance(model, onnx.ModelProto) else os.fspath(model)
        if has_fake_quant(graph):
            raise UnsupportedModel(
                "has fake quantization: its trained grids would be lost",
                where=where,
                remedy="use convert, with data for what training left open",
            )
        self.digest = graph.digest()
        self.inputs: tuple[InputSpec, ...] = input_specs(graph)
        asked = _Asked()
        run_pipeline(graph, spec, Context(chosen, asked), verify=VerifyLevel.STRUCTURE, observers=observers)
        if not asked.wanted:
            raise UnsupportedModel(
                f"has nothing that {chosen.name} computes in integers",
                where=where,
                remedy="see 'qat2int8 inspect'",
            )
        self._model, self._wanted = graph, asked.wanted
        start = None if resume is None else self._resumed(resume)
        self._collector = Collector(
            graph, asked.wanted, histograms=self.algorithm.needs_values, start=start, threads=threads
        )

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors whose ranges are wanted, in order of the graph."""
        return tuple(value.name or "" for value in self._wanted)

    @property
    def sampling_model(self) -> onnx.ModelProto:
        """The prepared float model with :attr:`tensors` among its outputs (or inputs).

        Raises:
            UnsupportedModel: it is larger than a model in memory can be; :meth:`observe` takes any.
        """
        proto = sampling_model(self._model, self.tensors).to_proto()
        if proto.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
            raise UnsupportedModel("the sampling model is larger than 2 GiB", remedy="use observe instead")
        return proto

    @property
    def statistics(self) -> Statistics:
        """What was seen so far."""
        return self._collector.statistics

    def observe(self, batch: Mapping[str, npt.NDArray[Any]], first: int | None = None) -> None:
        """Run the model on a batch, arrays by input name, and take in what its tensors are.

        Args:
            first: the number of its first sample; counted on if not given.

        Raises:
            DataError: the input does not fit, or a tensor is not finite.
        """
        self._collector.run(dict(batch), self._next(first))

    def record(self, tensors: Mapping[str, npt.NDArray[Any]], count: int, first: int | None = None) -> None:
        """Take in what :attr:`sampling_model` gave for ``count`` samples: arrays by name of :attr:`tensors`.

        Raises:
            DataError: a tensor is missing or not finite.
        """
        self.statistics.add(self._next(first), count, tensors)

    def run(
        self, data: Any, *, batch_size: int = 1, samples: int | None = None, on_batch: OnBatch | None = None
    ) -> None:
        """Observe all of ``data``: whatever :func:`open_data` opens. Samples that were seen already are left out.

        Raises:
            DataError: the data cannot be read or do not fit; what was seen before stays.
        """
        opened = (
            data
            if isinstance(data, Dataset)
            else open_data(data, self.inputs, batch_size=batch_size, samples=samples)
        )
        collect(self._collector, opened, on_batch)

    def run_stream(self, stream: BatchStream) -> None:
        """Observe all batches of a stream.

        Raises:
            DataError: a batch has another size than the stream said at the start, or does not fit the model.
        """
        for batch in batches_of(stream, [spec.name for spec in self.inputs]):
            self.observe(batch)

    def cached(self, stream: CachedStream, say: Callable[[str], None] | None = None) -> CalibrationTable:
        """The table in the stream's cache if it fits, else one from its batches, which is put there.

        Args:
            say: told why a cache is not used.

        Raises:
            DataError: as :meth:`run_stream`.
        """
        cache = stream.read_calibration_cache()
        if cache is not None:
            try:
                return self.fitting(read_json(cache.decode("utf-8", "replace")))
            except DataError as error:
                if say is not None:
                    say(f"calibrating anew, the cache does not fit: {error.what}")
        self.run_stream(stream)
        table = self.compute()
        stream.write_calibration_cache(write_json(table).encode())
        return table

    def fitting(self, table: CalibrationTable) -> CalibrationTable:
        """``table``, if it is what this calibrator would compute: of this model and by this algorithm.

        Raises:
            DataError: it is not; says why.
        """
        if table.model_digest != self.digest:
            raise DataError("it was made for another model", remedy="calibrate again")
        if table.algorithm != str(self.algorithm):
            raise DataError(f"it was made by {table.algorithm}, not {self.algorithm}", remedy="calibrate again")
        missing = [name for name in self.tensors if name not in table.entries]
        if missing:
            raise DataError(f"it lacks tensor '{missing[0]}'", remedy="calibrate again")
        return table

    def compute(
        self, algorithm: str | Algorithm | None = None, *, keep_statistics: bool = False
    ) -> CalibrationTable:
        """The ranges, by the calibrator's algorithm or another one.

        Args:
            keep_statistics: whether the table holds what its ranges were computed from.

        Raises:
            DataError: no sample was seen, or the algorithm needs values that were not counted.
        """
        if not len(self.statistics):
            raise DataError("no sample was seen", remedy="observe some hundred that are typical")
        chosen = self.algorithm if algorithm is None else parse_algorithm(algorithm)
        return table_of(self.statistics, chosen, self.digest, keep=keep_statistics)

    def _next(self, first: int | None) -> int:
        indices = self.statistics.indices
        return first if first is not None else int(indices.max()) + 1 if indices.size else 0

    def _resumed(self, table: CalibrationTable) -> Statistics:
        if table.model_digest != self.digest:
            raise DataError("the table to go on from was made for another model", remedy="start anew")
        return statistics_of(table)


def calibrate(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any,
    algorithm: str | Algorithm = DEFAULT_ALGORITHM,
    *,
    target: str | os.PathLike[str] | Target = DEFAULT_TARGET,
    samples: int | None = None,
    batch_size: int = 1,
    keep_statistics: bool = False,
    threads: int = 0,
    on_batch: OnBatch | None = None,
) -> CalibrationTable:
    """The ranges that tensors of a float model take on ``data``.

    Args:
        model: a file, or a model in memory.
        data: a path, arrays, an iterable of dicts of arrays, or ``module:function``; see :func:`open_data`.
        algorithm: by name, with options as in ``percentile{percent=99.9}``.
        samples: how many to use at most.
        batch_size: samples a run; a model that fixes its batch decides it.
        keep_statistics: whether the table can be merged with those of other samples.
        on_batch: told of the progress.

    Raises:
        PipelineError: an unknown algorithm or target.
        InvalidModel: the file is not a valid model.
        UnsupportedModel: it has fake quant, or nothing the target computes in integers.
        DataError: the data cannot be read, do not fit, or make a tensor that is not finite.
    """
    calibrator = Calibrator(model, algorithm, target=target, threads=threads)
    calibrator.run(data, batch_size=batch_size, samples=samples, on_batch=on_batch)
    return calibrator.compute(keep_statistics=keep_statistics)


class _Asked:
    """A source of ranges that knows none and remembers what it was asked for."""

    origin = "no data yet"

    def __init__(self) -> None:
        self.wanted: list[oir.Value] = []

    def ranges(self, model: Model, wanted: Sequence[oir.Value]) -> Mapping[oir.Value, Interval]:
        self.wanted = list(wanted)
        return {}
