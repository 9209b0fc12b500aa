"""``qat2int8 passes``: which passes there are, and what one of them does, needs and takes."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.passes import Pass

__all__ = ["meanings", "passes", "summary"]

_SECTION = re.compile(r"^(?:Options|Args|Attributes):\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?:\s*(.*(?:\n[ \t]+.*)*)", re.MULTILINE)


def passes(
    name: Annotated[
        str,
        typer.Argument(metavar="PASS", help="A pass to describe; all are listed without.", show_default=False),
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the passes, or describe one: what it does, its options, what it requires and provides."""
    from qat2int8.passes import all_passes, find_pass

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if name:
        described = describe(find_pass(name))
        _print(report, described)
        report.data(described)
        return
    known = all_passes()
    report.table(("pass", "what it does"), [(key, summary(cls)) for key, cls in known.items()])
    report.data([{"name": key, "summary": summary(cls)} for key, cls in known.items()])


def summary(cls: type[Pass]) -> str:
    """The first paragraph of a pass's docstring on one line, as it stands in a list."""
    first, *_ = (cls.__doc__ or "").strip().split("\n\n")
    return _unmarked(" ".join(first.split()))


def describe(cls: type[Pass]) -> dict[str, Any]:
    """Everything a person may want to know about a pass, ready for JSON."""
    from qat2int8.pipelines.spec import option_fields, spell

    document = inspect.cleandoc(cls.__doc__ or "")
    told = meanings(cls)
    return {
        "name": cls.name,
        "summary": summary(cls),
        "description": _unmarked(_SECTION.sub("", document).strip()),
        "options": [
            {
                "name": option.name,
                "expects": option.expects,
                "default": spell(option.default),
                "meaning": told.get(option.name, ""),
            }
            for option in option_fields(cls).values()
        ],
        "requires": sorted(cls.requires),
        "provides": sorted(cls.provides),
        "invalidates": sorted(cls.invalidates),
        "numerics": cls.numerics.value,
        "per_target": cls.per_target,
    }


def meanings(cls: type[Pass]) -> dict[str, str]:
    """What each option is for: from the ``Options:`` of the class docstring, or the string below the field."""
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        told |= _field_strings(base)
        for section in _SECTION.findall(inspect.cleandoc(base.__doc__ or "")):
            for key, text in _ENTRY.findall(textwrap.dedent(section)):
                told[key] = _unmarked(" ".join(text.split()))
    return told


def _unmarked(text: str) -> str:
    """Docstring markup as it reads on a terminal."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "'")


def _field_strings(cls: type) -> dict[str, str]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}  # no source at hand: defined by hand, or shipped without
    told = {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                told[field.target.id] = _unmarked(" ".join(text.value.split()))
    return told


def _print(report: Report, described: dict[str, Any]) -> None:
    report.line(described["name"])
    report.line()
    report.line(textwrap.indent(described["description"], "  "))
    report.line()
    if described["options"]:
        report.table(
            ("option", "default", "meaning"),
            [
                (o["name"], o["default"], f"{o['expects']}: {o['meaning']}" if o["meaning"] else o["expects"])
                for o in described["options"]
            ],
        )
        report.line()
    facts = [(key, ", ".join(described[key]) or "-") for key in ("requires", "provides", "invalidates")]
    runs = "where the target's rewrites name it" if described["per_target"] else "for every target"
    report.table(("contract", ""), [*facts, ("numerics", described["numerics"]), ("runs", runs)])
