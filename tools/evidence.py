"""How the commands tell what of a model runs in integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qat2int8.pipelines.figures import as_count, as_percent

if TYPE_CHECKING:
    from qat2int8.ir import Diagnostic
    from qat2int8.pipelines.certificate import Certificate
    from qat2int8.tools.console import Report

__all__ = ["report_certificate", "report_overflow"]


def report_certificate(report: Report, certificate: Certificate) -> None:
    """Two lines: what the runtime executes, or what the placement asks of a runtime that is not at hand."""
    macs = f"{as_percent(certificate.integer_macs_percent)} of {as_count(certificate.macs)} multiply-accumulates"
    if certificate.basis == "executed":
        report.line(f"certificate  {macs} and {as_percent(certificate.integer_nodes_percent)} of nodes")
        report.line(f"             run in integers on {certificate.runtime}")
        return
    report.line(f"placement    {macs} stand between quantizers")
    found = len(certificate.broken_rules)
    broken = f"; its rules are broken in {found} {'place' if found == 1 else 'places'}" if found else ""
    report.line(f"             ({certificate.runtime} was not asked what it makes of them{broken})")


def report_overflow(report: Report, findings: Iterable[Diagnostic]) -> None:
    """On which processors the result gives wrong numbers, if on any, and whether this is one of them."""
    from qat2int8.ir import Code
    from qat2int8.pipelines.exact_products import products_overflow

    found = next((finding for finding in findings if finding.code is Code.PRODUCT_OVERFLOW), None)
    if found is None:
        return
    here = ", and this is one of them" if products_overflow() else ""
    report.line(f"overflow     {found.reason}")
    report.line(f"             there{here}; --target ort-x86-avx2 is exact")
