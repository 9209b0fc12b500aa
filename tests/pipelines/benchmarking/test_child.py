"""Commands in a process of their own."""

from __future__ import annotations

import sys

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
