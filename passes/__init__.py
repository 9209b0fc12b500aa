"""The passes, one a file; a file's name is the name of its pass with underscores."""

from qat2int8.passes.base import Context, Numerics, Pass, PassResult, RangeSource
from qat2int8.passes.registry import all_passes, find_pass, register

__all__ = [
    "Context",
    "Numerics",
    "Pass",
    "PassResult",
    "RangeSource",
    "all_passes",
    "find_pass",
    "register",
]
