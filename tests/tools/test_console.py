"""How findings are told: what differs in its numbers only is told once."""

from __future__ import annotations

import pytest

from qat2int8.ir import Code, Diagnostic, Severity
from qat2int8.tools.console import Report


def finding(reason: str, node: str, remedy: str = "") -> Diagnostic:
    return Diagnostic(Code.KEPT_FLOAT, Severity.WARNING, reason, node=node, remedy=remedy)


def told(capsys: pytest.CaptureFixture[str], *findings: Diagnostic) -> list[str]:
    Report().findings(findings)
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_numbers_that_differ_become_a_span(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("0.32", "0.012", "0.4")
    moved = [finding(f"grid 8 moved by {step} of a step", f"n{index}") for index, step in enumerate(steps)]
    assert told(capsys, *moved) == [
        "Q301 warning: grid 8 moved by 0.012 to 0.4 of a step",
        "  n0, n1, n2",
    ]


def test_other_words_other_names_and_other_remedies_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        finding("moved by 1 step", "a"),
        finding("went by 1 step", "b"),
        finding("moved by 1 step", "c", remedy="stay"),
        finding("reads 'conv.1'", "d"),
        finding("reads 'conv.2'", "e"),
        finding("is int8", "f"),
        finding("is int16", "g"),
        finding("lies behind /l1/Conv_1", "h"),
        finding("lies behind /l1/Conv_2", "i"),
    ]
    heads = [line for line in told(capsys, *findings) if line.startswith("Q301")]
    assert len(heads) == len(findings)
