"""``qat2int8 targets``: which targets there are, and what one of them takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.ir import Target

__all__ = ["targets"]


def targets(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A target's name or .yaml file; all shipped ones without.", show_default=False
        ),
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the shipped targets, or show what one of them takes and which rewrites it asks for."""
    from qat2int8.pipelines.target_files import load_target, native_target, target_names

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if name:
        target = load_target(name)
        _show(report, target)
        report.data(_document(target))
        return
    shipped = [load_target(each) for each in target_names()]
    report.table(("target", "what it is for"), [(target.name, target.description) for target in shipped])
    report.line()
    report.line(f"native stands for the one for this machine: {native_target()}.")
    report.data([_document(target) for target in shipped])


def _show(report: Report, target: Target) -> None:
    report.line(f"{target.name}: {target.description}")
    report.line()
    fields = {key: value for key, value in _document(target).items() if key not in ("name", "description", "ops")}
    report.table(("field", "value"), [(key, _spelt(value)) for key, value in fields.items()])
    report.line()
    rows = [
        (op, rule.contract, ", ".join(rule.absorbs) or "-", "yes" if rule.float_output else "no")
        for op, rule in target.ops.items()
    ]
    report.table(("op", "contract", "absorbs", "float output"), rows)


def _spelt(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "-" if isinstance(value, list) else str(value)


def _document(target: Target) -> dict[str, Any]:
    """The fields of a target file, ready for JSON."""
    document = _with_lists(dataclasses.asdict(target))
    document["ops"] = {op: _with_lists(rule) for op, rule in document["ops"].items()}
    return document


def _with_lists(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
