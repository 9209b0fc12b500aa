"""``qat2int8 demo``."""

from __future__ import annotations

from qat2int8.tools.console import Debug, Json, Quiet, Verbose


def demo(json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """Not available in this build."""
    raise NotImplementedError("demo")
