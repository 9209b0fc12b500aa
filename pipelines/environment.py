"""The machine a measurement was made on, and what integer kernels can be expected to give there."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat2int8.pipelines.exact_products import products_overflow

__all__ = ["Environment", "environment"]

_CPUINFO = Path("/proc/cpuinfo")
_BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
"""CPU flags, as Linux spells them, of instructions that multiply and add bytes in one step."""
_PACKAGES = ("onnxruntime", "onnx", "numpy", "qat2int8")
_BUSY = 0.5
"""Runnable processes a core, one of which is ours, from which on timings are doubted."""


@dataclass(frozen=True)
class Environment:
    """What a reader of figures has to know about where they come from.

    Attributes:
        processor: its name, as the system tells it.
        flags: its instructions for products of bytes, of those that integer kernels use; empty where it has none.
        cores: those this process may run on.
        load: mean number of runnable processes over the last minute, None where the system does not tell.
        versions: of the packages that matter, by name.
        date: ISO 8601, local.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    load: float | None
    versions: dict[str, str]
    date: str

    @property
    def expectation(self) -> str:
        """What integer Conv and Gemm can be expected to gain on this processor, as a sentence."""
        if "amx_int8" in self.flags or any("vnni" in flag for flag in self.flags):
            return "it multiplies bytes in one instruction (VNNI): expect 3 to 5 times the speed of float"
        if self.flags:
            return "it has dot products of bytes: expect 2 to 4 times the speed of float"
        if not products_overflow():
            return "whether it has an instruction for products of bytes (VNNI) is not known here"
        return (
            "it has no instruction for products of bytes (VNNI): expect 1 to 2 times the speed of float, and "
            "wrong numbers from models that were not made for that (--target ort-x86-avx2)"
        )

    @property
    def instructions(self) -> str:
        """:attr:`flags` as text, or that there are none; a system that names no flags is not taken at its word."""
        return ", ".join(self.flags) or ("no VNNI" if products_overflow() else "VNNI not known")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes timings on this machine doubtful now."""
        if self.load is not None and self.load > 1.0 and self.load / self.cores > _BUSY:
            return (
                f"the machine is busy: load {self.load:.1f} on {self.cores} cores; ratios within one run hold, "
                "milliseconds do not",
            )
        return ()

    @property
    def summary(self) -> str:
        """Processor, versions and date as one line."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.processor} ({self.instructions}); {versions}; {self.date}."

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        derived = {"instructions": self.instructions, "expectation": self.expectation}
        return asdict(self) | derived | {"warnings": list(self.warnings)}


def environment() -> Environment:
    """The machine as it is now."""
    name, flags = _processor()
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        load = None
    return Environment(
        name, flags, _cores(), load, dict(_versions()), datetime.datetime.now().astimezone().date().isoformat()
    )


def _processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name and its flags, from Linux's list of them; elsewhere the name only."""
    fields: dict[str, str] = {}
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return name, tuple(flag for flag in _BYTE_PRODUCTS if flag in present)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
