"""``qat2int8 passes`` and ``qat2int8 pipelines`` show what can run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from support import REPOSITORY
from typer.testing import CliRunner, Result

from qat2int8.ir import Fact, Model
from qat2int8.passes import Context, Numerics, Pass, PassResult, all_passes, register
from qat2int8.pipelines.order import check_order
from qat2int8.pipelines.shipped import load_pipeline, pipeline_names
from qat2int8.pipelines.spec import PipelineSpec, option_fields
from qat2int8.tools.cli import app
from qat2int8.tools.passes import meanings, summary


@register
@dataclass(frozen=True)
class Shown(Pass):
    """Show ``markup`` in a list,
    on one line.

    More about :mod:`qat2int8.ir` and [brackets].

    Options:
        first: what it is
            for, on two lines.
        second (int): with a type.
    """

    name = "test-passes-shown"
    requires = frozenset({Fact.WEIGHT_SCALES, Fact.FLOAT_WEIGHTS})
    provides = frozenset({Fact.BN_FOLDED})
    invalidates = frozenset({Fact.PROPAGATED})
    numerics = Numerics.CLOSE

    first: str = "a b"
    second: int = 3
    third: bool = False
    """The string below the field."""
    fourth: float | None = None

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_all_passes_are_listed_with_what_they_do() -> None:
    result = invoke("passes")
    assert result.exit_code == 0
    for name in all_passes():
        assert name in result.stdout
    assert "Show 'markup' in a list, on one line." in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_pass_is_described_in_full() -> None:
    shown = " ".join(invoke("passes", "test-passes-shown").stdout.split())
    assert "More about qat2int8.ir and [brackets]." in shown
    assert "Options:" not in shown
    assert 'first "a b" text: what it is for, on two lines.' in shown
    assert "second 3 a whole number: with a type." in shown
    assert "third false true or false: The string below the field." in shown
    assert "fourth none a number or none" in shown
    assert "requires float-weights, weight-scales provides bn-folded invalidates scales-propagated" in shown
    assert "numerics close runs for every target" in shown
    assert "runs where the target's rewrites name it" in " ".join(invoke("passes", "optimize-int8").stdout.split())


def test_the_description_is_there_for_machines() -> None:
    document = json.loads(invoke("passes", "test-passes-shown", "--json").stdout)
    assert document["options"][0] == {
        "name": "first",
        "expects": "text",
        "default": '"a b"',
        "meaning": "what it is for, on two lines.",
    }
    assert document["requires"] == ["float-weights", "weight-scales"]
    listed = json.loads(invoke("passes", "--json").stdout)
    assert [one["name"] for one in listed] == list(all_passes())
    assert invoke("passes", "--quiet").output == ""


@pytest.mark.parametrize("command", ["passes", "pipelines"])
def test_an_unknown_name_is_told_the_nearest(command: str) -> None:
    name = "canonicalise" if command == "passes" else "qat-to-int"
    near = "canonicalize" if command == "passes" else "qat-to-int8"
    result = invoke(command, name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert f"did you mean '{near}'?" in result.stderr


@pytest.mark.parametrize("name", sorted(all_passes()))
def test_every_pass_says_what_it_does_and_speaks_of_each_option(name: str) -> None:
    cls = all_passes()[name]
    if cls.__module__.startswith("qat2int8.passes."):
        assert summary(cls)
        for option in option_fields(cls):
            assert option in meanings(cls) or f"``{option}``" in (cls.__doc__ or "")


def test_shipped_pipelines_are_listed() -> None:
    result = invoke("pipelines")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in pipeline_names())
    listed = json.loads(invoke("pipelines", "--json").stdout)
    assert [one["name"] for one in listed] == list(pipeline_names())


@pytest.mark.parametrize("name", pipeline_names())
def test_a_shipped_pipeline_is_shown_in_order_and_as_text(name: str) -> None:
    spec = load_pipeline(name)
    document = json.loads(invoke("pipelines", name, "--json").stdout)
    assert PipelineSpec.parse(document["text"]).passes == spec.passes
    lines = invoke("pipelines", name).stdout.splitlines()
    assert lines[-1] == document["text"]
    shown = re.findall(r"^ ?\d+ +([a-z0-9-]+)", "\n".join(lines), re.MULTILINE)
    assert shown == [one["name"] for one in document["passes"]]


@pytest.mark.parametrize("name", pipeline_names())
def test_a_shipped_pipeline_is_called_like_its_file_and_stands_in_order(name: str) -> None:
    spec = load_pipeline(name)
    assert spec.name == name
    assert spec.description
    # A pipeline for float models finds what others establish first.
    starts = {"post-training": frozenset({Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT})}
    check_order(spec.build(), starts.get(name, frozenset()))


def test_a_fixpoint_is_marked_and_a_pass_that_is_missing_named() -> None:
    shown = " ".join(invoke("pipelines", "canonicalize,fixpoint(cleanup,acme-polish)").stdout.split())
    assert "2 cleanup (until settled)" in shown
    assert "3 acme-polish (until settled) not installed" in shown


def test_both_commands_run_as_processes() -> None:
    for words in (["passes", "canonicalize"], ["pipelines", "qat-to-int8"]):
        done = subprocess.run(
            [sys.executable, "-m", "qat2int8", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert words[1] in done.stdout
