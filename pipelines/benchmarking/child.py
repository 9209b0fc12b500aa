"""A command in a process of its own: how long it takes, and how much memory at most."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qat2int8.ir import Qat2Int8Error

__all__ = ["CommandFailed", "Cost", "measured_command"]

_LAUNCHER = """
import json, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
seconds = time.perf_counter() - start
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:
    peak = None
json.dump({"code": done.returncode, "said": done.stderr[-2000:], "seconds": seconds, "peak": peak}, sys.stdout)
"""
"""Linux counts the memory of whoever starts a process as that of the process, hence a small one in between."""


class CommandFailed(Qat2Int8Error):
    """A command that was measured ended with an error."""


@dataclass(frozen=True)
class Cost:
    """Wall time, start of the process included; resident bytes at most, None where the system does not tell."""

    seconds: float
    peak_bytes: int | None


def measured_command(words: Sequence[str]) -> Cost:
    """Run a command to its end.

    Raises:
        CommandFailed: it ended with an error; what it said last is the message.
    """
    command = [sys.executable, "-S", "-c", _LAUNCHER, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        try:
            said, _ = launcher.communicate()
        except BaseException:
            _end(launcher)
            raise
    done = json.loads(said)
    if done["code"]:
        raise CommandFailed(_reason(done["code"], done["said"].strip().splitlines()))
    return Cost(done["seconds"], done["peak"])


def _end(launcher: subprocess.Popen[str]) -> None:
    """End the launcher and the command, which would go on without it."""
    if sys.platform == "win32":
        launcher.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def _reason(code: int, said: Sequence[str]) -> str:
    """What a command said last; one that was killed says nothing of it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    return said[-1].removeprefix("error: ") if said else f"exit code {code}"
