"""Runs kept in a file, one JSON document a line, and what changed since the last one of the same machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat2int8.ir import DataError

__all__ = ["Change", "append_run", "changes", "last_run", "read_history"]


@dataclass(frozen=True)
class Change:
    """How the speed of one contender against float moved. Milliseconds of two days are not compared."""

    network: str
    style: str
    contender: str
    before: float
    now: float

    @property
    def percent(self) -> float:
        """Above 0: faster than before."""
        return 100 * (self.now / self.before - 1)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The runs in ``path``, oldest first; none if there is no such file.

    Raises:
        DataError: a line is no run.
    """
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            run = json.loads(line)
            _machine(run)
            _speeds(run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: not a run that bench wrote", remedy="name another file with --history"
            ) from error
        runs.append(run)
    return runs


def last_run(runs: list[dict[str, Any]], now: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest of ``runs`` from the machine of ``now``."""
    return next((run for run in reversed(runs) if _machine(run) == _machine(now)), None)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What both runs measured, in the order of ``now``; float is the measure and does not change."""
    old = _speeds(before)
    return [
        Change(*key, old[key], speed) for key, speed in _speeds(now).items() if key in old and key[2] != "float"
    ]


def append_run(path: Path, run: Mapping[str, Any]) -> None:
    """Add a run as the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def _machine(run: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    facts = run["environment"]
    return facts["processor"], tuple(facts["flags"]), facts["cores"]


def _speeds(run: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    return {
        (result["network"], result["style"], name): float(each["speedup"])
        for result in run["results"]
        for name, each in result["contenders"].items()
    }
