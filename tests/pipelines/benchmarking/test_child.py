"""Commands in a process of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat2int8.pipelines.benchmarking.child import CommandFailed, measured_command


def test_memory_is_that_of_the_command_and_not_of_who_starts_it() -> None:
    ballast = bytearray(300_000_000)
    small = measured_command([sys.executable, "-S", "-c", "pass"])
    large = measured_command([sys.executable, "-S", "-c", "x = bytearray(b'1') * 200_000_000"])
    assert len(ballast) == 300_000_000
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    assert small.peak_bytes < 100_000_000 < 200_000_000 < large.peak_bytes < 290_000_000
    assert large.seconds > 0


def test_what_a_failing_command_said_last_is_told() -> None:
    with pytest.raises(CommandFailed, match=r"^too bad$"):
        measured_command([sys.executable, "-S", "-c", "import sys; sys.exit('first\\nerror: too bad')"])
    with pytest.raises(CommandFailed, match="exit code 3"):
        measured_command([sys.executable, "-S", "-c", "import sys; sys.exit(3)"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_command_that_was_killed_says_by_what() -> None:
    with pytest.raises(CommandFailed, match=r"^ended by SIGKILL, as the system does when memory runs out$"):
        measured_command([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(CommandFailed, match=r"^ended by SIGTERM$"):
        measured_command([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 15)"])


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A shell starts what runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_nothing_goes_on_when_it_is_interrupted(tmp_path: Path, heeds_interrupts: None) -> None:
    file = tmp_path / "process"
    script = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)"

    def interrupt() -> None:
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        measured_command([sys.executable, "-S", "-c", script])
    process = int(file.read_text())
    for _ in range(1000):
        if not _runs(process):
            return
        time.sleep(0.01)
    raise AssertionError(f"{process} still runs")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
