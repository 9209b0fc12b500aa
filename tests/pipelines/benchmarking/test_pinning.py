"""One core while timing, and all of them again afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qat2int8.pipelines.benchmarking import pinning, suite
from qat2int8.pipelines.benchmarking.pinning import pinned

linux = pytest.mark.skipif(sys.platform != "linux", reason="cores are pinned on Linux only")


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """A Linux with the cores 0, 2 and 3; what the thread was put on, in turn."""
    put: list[set[int]] = [{0, 2, 3}]
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: put[-1], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: put.append(set(cores)), raising=False)
    return put


def test_the_cores_are_given_back_after_an_error_too(
    system: list[set[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pinning, "_CPUS", tmp_path)

    def interrupted() -> None:
        with pinned() as core:
            assert core == 3
            assert system[-1] == {3}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert system[-1] == {0, 2, 3}


def test_a_fast_core_is_taken(system: list[set[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pinning, "_CPUS", tmp_path)
    for core, kilohertz in ((0, 5000000), (1, 6000000), (2, 5000000), (3, 3000000)):
        file = tmp_path / f"cpu{core}" / "cpufreq" / "cpuinfo_max_freq"
        file.parent.mkdir(parents=True)
        file.write_text(f"{kilohertz}\n")
    with pinned() as core:
        assert core == 2


def test_a_system_that_does_not_pin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pinned() as core:
        assert core is None


@linux
def test_everything_is_timed_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def interleave(contenders: object, *, rounds: int, repeat: int) -> dict[str, list[float]]:
        seen.append(os.sched_getaffinity(0))
        return {}

    def caller(*_: object) -> None:
        seen.append(os.sched_getaffinity(0))

    monkeypatch.setattr(suite, "interleave", interleave)
    monkeypatch.setattr(suite, "caller", caller)
    monkeypatch.setattr(suite, "_build", lambda *_: None)
    monkeypatch.setattr(suite, "measured_command", lambda *_: seen.append(os.sched_getaffinity(0)))
    result = suite.measure("resnet50", "layer-inputs", rounds=1, repeat=1, against=[])
    assert result.core in allowed
    assert seen == [allowed, *[{result.core}] * 4]
    assert os.sched_getaffinity(0) == allowed
