"""Calibration: the ranges that tensors of a float model take on data."""

from qat2int8.pipelines.calibration.algorithms import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm, parse_algorithm
from qat2int8.pipelines.calibration.calibrator import Calibrator, calibrate
from qat2int8.pipelines.calibration.kept import combine, statistics_of
from qat2int8.pipelines.calibration.streams import BatchStream, CachedStream, DatasetStream

__all__ = [
    "ALGORITHMS",
    "DEFAULT_ALGORITHM",
    "Algorithm",
    "BatchStream",
    "CachedStream",
    "Calibrator",
    "DatasetStream",
    "calibrate",
    "combine",
    "parse_algorithm",
    "statistics_of",
]
