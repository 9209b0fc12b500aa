"""What is told of the machine, on machines of other kinds than this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat2int8.pipelines import environment as module
from qat2int8.pipelines.environment import Environment, environment


def machine(*flags: str, load: float | None = 0.1, cores: int = 4) -> Environment:
    return Environment("A processor", flags, cores, load, {"onnxruntime": "1.0"}, "2026-01-31")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("avx512_vnni",), "3 to 5 times"),
        (("amx_int8",), "3 to 5 times"),
        (("asimddp",), "2 to 4 times"),
        ((), "no instruction for products of bytes (VNNI): expect 1 to 2 times"),
    ],
)
def test_what_to_expect_follows_from_the_instructions(
    flags: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "products_overflow", lambda: True)
    assert told in machine(*flags).expectation


def test_a_busy_machine_is_warned_of() -> None:
    assert machine(load=0.9, cores=1).warnings == ()
    assert machine(load=3.0, cores=8).warnings == ()
    assert machine(load=None).warnings == ()
    (warning,) = machine(load=3.0, cores=4).warnings
    assert "load 3.0 on 4 cores" in warning


def test_the_summary_is_one_line() -> None:
    assert machine("avx_vnni").summary == "A processor (avx_vnni); onnxruntime 1.0; 2026-01-31."


@pytest.mark.parametrize(("overflows", "told"), [(True, "no VNNI"), (False, "VNNI not known")])
def test_a_system_that_names_no_flags_is_not_taken_at_its_word(
    overflows: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "products_overflow", lambda: overflows)
    assert f"({told})" in machine().summary
    assert ("not known" in machine().expectation) != overflows


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        ("model name : Xeon\nflags : fpu avx_vnni amx_int8\n\nmodel name : b", "Xeon", ("avx_vnni", "amx_int8")),
        ("BogoMIPS\t: 100\nFeatures\t: fp asimddp i8mm\n", None, ("asimddp", "i8mm")),
        ("", None, ()),
    ],
    ids=["x86", "arm", "empty"],
)
def test_linux_tells_name_and_flags(
    text: str, name: str | None, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(module, "_CPUINFO", path)
    found = environment()
    assert found.flags == flags
    assert found.processor == name if name else found.processor


def test_nothing_breaks_without_linux_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(module, "_PACKAGES", ("numpy", "no-such-package-here"))
    monkeypatch.delattr(module.os, "getloadavg", raising=False)
    found = environment()
    assert found.processor
    assert list(found.versions) == ["numpy"]
    assert found.load is None
    assert found.as_dict()["expectation"] == found.expectation
