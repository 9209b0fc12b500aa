"""Tables of calibrated ranges, and the formats they travel in."""

from qat2int8.pipelines.tables.table import CalibrationTable, Difference, Entry, diff, merge

__all__ = ["CalibrationTable", "Difference", "Entry", "diff", "merge"]
