"""Tables of calibrated ranges, and the formats they travel in."""

from qat2int8.pipelines.tables.files import FORMATS, read_table, write_table
from qat2int8.pipelines.tables.reuse import reusable
from qat2int8.pipelines.tables.table import CalibrationTable, Difference, Entry, diff, merge

__all__ = [
    "FORMATS",
    "CalibrationTable",
    "Difference",
    "Entry",
    "diff",
    "merge",
    "read_table",
    "reusable",
    "write_table",
]
