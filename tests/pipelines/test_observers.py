"""What the instruments write, and that a reproducer reproduces."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from support import REPOSITORY, TARGET, parse

from qat2int8.ir import (
    Model,
    OutputError,
    UnsupportedModel,
)
from qat2int8.ir.text import to_text
from qat2int8.passes import Context, Pass, PassResult
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.observers import Counts, Dumps, Observer, PrintAfter, Reproducer, Timing
from qat2int8.pipelines.spec import Fixpoint

CTX = Context(TARGET)
CHAIN = "g (float[4] x) => (float[4] y) { [a] t = Neg (x) [b] u = Neg (t) [c] y = Relu (u) }"


@dataclass(frozen=True)
class DropOneNeg(Pass):
    """Removes one Neg a run."""

    name = "drop-one-neg"

    def run(self, model: Model, ctx: Context) -> PassResult:
        for node in model.nodes("Neg"):
            model.bypass(node)
            return PassResult({"dropped": 1})
        return PassResult({"dropped": 0})


@dataclass(frozen=True)
class Idle(Pass):
    name = "idle"

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult()


def watch(*passes: Pass | Fixpoint[Pass], observer: Observer, text: str = CHAIN) -> Model:
    model = parse(text)
    run_pipeline(model, passes, CTX, observers=[observer])
    return model


# -- timing and counts ----------------------------------------------------------------------------------------


def test_timing_is_a_tree_whose_leaves_add_up() -> None:
    timing = Timing()
    watch(Idle(), Fixpoint((DropOneNeg(), Idle())), Fixpoint((Idle(),)), Idle(), observer=timing)
    rows = timing.rows()
    assert [(row.depth, row.name, row.runs) for row in rows] == [
        (0, "total", 1),
        (1, "idle", 1),
        (1, "fixpoint", 3),
        (2, "drop-one-neg", 3),
        (2, "idle", 3),
        (1, "fixpoint", 1),
        (2, "idle", 1),
        (1, "idle", 1),
        (1, "between passes", 9),
    ]
    first = [row for row in rows if row.depth == 1]
    assert sum(row.seconds for row in first) == pytest.approx(rows[0].seconds)
    assert sum(row.share for row in first) == pytest.approx(1.0)
    assert rows[2].seconds == pytest.approx(rows[3].seconds + rows[4].seconds)
    assert all(row.seconds >= 0 for row in rows)


def test_timing_of_nothing_is_a_total_of_zero() -> None:
    assert [(row.name, row.seconds) for row in Timing().rows()] == [("total", 0.0), ("between passes", 0.0)]


def test_counts_add_up_over_rounds_and_leave_out_what_did_nothing() -> None:
    counts = Counts()
    watch(Idle(), Fixpoint((DropOneNeg(),)), observer=counts)
    assert counts.rows() == (("drop-one-neg", "dropped", 2),)


# -- text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "headlines"),
    [
        ("all", ["drop-one-neg (position 1)", "idle (position 2)", "drop-one-neg (position 3)"]),
        ("changed", ["drop-one-neg (position 1)", "drop-one-neg (position 3)"]),
        ("idle", ["idle (position 2)"]),
        ("other", []),
    ],
)
def test_print_after(which: str, headlines: list[str]) -> None:
    stream = io.StringIO()
    watch(DropOneNeg(), Idle(), DropOneNeg(), observer=PrintAfter(which, stream))
    lines = stream.getvalue().splitlines()
    assert [line.removeprefix("// after ") for line in lines if line.startswith("// after")] == headlines
    assert stream.getvalue().count("Relu") == len(headlines)


def test_print_after_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Idle(), observer=PrintAfter("all"))
    captured = capsys.readouterr()
    assert "// after idle (position 1)" in captured.err
    assert captured.out == ""


def test_dumps_are_numbered_and_show_what_each_pass_did(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dumps"
    watch(DropOneNeg(), Idle(), observer=Dumps(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-input.onnx",
        "00-input.onnx.txt",
        "01-drop-one-neg.diff",
        "01-drop-one-neg.onnx",
        "01-drop-one-neg.onnx.txt",
        "02-idle.diff",
        "02-idle.onnx",
        "02-idle.onnx.txt",
    ]
    assert (folder / "00-input.onnx.txt").read_text() == to_text(parse(CHAIN))
    assert len(onnx.load(folder / "00-input.onnx").graph.node) == 3
    assert len(onnx.load(folder / "01-drop-one-neg.onnx").graph.node) == 2
    changed = [line for line in (folder / "01-drop-one-neg.diff").read_text().splitlines() if line[:1] in "+-"]
    assert any(line.startswith("-") and "Neg" in line for line in changed)
    assert (folder / "02-idle.diff").read_text() == ""


def test_dumps_that_cannot_be_written_stop_the_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        watch(Idle(), observer=Dumps(file / "dumps"))


# -- the reproducer -------------------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from qat2int8.ir import Fact, INT8, Provenance, QuantParams, UnsupportedModel
from qat2int8.passes import Pass, PassResult, register

@register
@dataclass(frozen=True)
class DropOneNeg(Pass):
    """Removes one Neg."""
    name = "drop-one-neg"
    def run(self, model, ctx):
        for node in model.nodes("Neg"):
            model.bypass(node)
            return PassResult({"dropped": 1})
        return PassResult()

@register
@dataclass(frozen=True)
class Gather(Pass):
    """Puts a grid on the table."""
    name = "test-gather"
    def run(self, model, ctx):
        value = model.values()["x"]
        if value in model.scales:
            return PassResult()
        model.scales.set(value, QuantParams.make(0.5, 0, INT8, source=Provenance.USER, origin="test"))
        return PassResult({"gathered": 1})

@register
@dataclass(frozen=True)
class Refuse(Pass):
    """Refuses a model with a Relu."""
    name = "test-refuse"
    word: str = "no"
    scales: bool = False
    def run(self, model, ctx):
        for node in model.nodes("Relu"):
            if len(list(model.nodes("Neg"))) == 1 and (len(model.scales) or not self.scales):
                raise UnsupportedModel(self.word, where=f"node '{node.name}'")
        return PassResult()

@register
@dataclass(frozen=True)
class Needy(Refuse):
    """As test-refuse, and requires what no model has from the start."""
    name = "test-needy"
    requires = frozenset({Fact.WEIGHT_SCALES})

@register
@dataclass(frozen=True)
class Provide(Pass):
    """Provides that."""
    name = "test-provide"
    provides = frozenset({Fact.WEIGHT_SCALES})
    def run(self, model, ctx):
        return PassResult()
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has the passes of PLUGIN installed."""
    site = tmp_path / "site"
    info = site / "acme_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_passes.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qat2int8.passes]\nacme = acme_passes\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def qat2int8(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qat2int8", *words],
        env=env,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.mark.parametrize(
    ("passes", "nodes_before", "reproduced"),
    [
        # The failing pass alone fails on the graph it saw ...
        ('drop-one-neg,test-refuse{word="never, ever"}', 2, 'test-refuse{word="never, ever"}'),
        # ... unless it reads the scale table, or requires something only a pass provides.
        (
            "test-gather,drop-one-neg,test-refuse{scales=true}",
            3,
            "test-gather,drop-one-neg,test-refuse{scales=true}",
        ),
        ("test-provide,drop-one-neg,test-needy,drop-one-neg", 3, "test-provide,drop-one-neg,test-needy"),
    ],
)
def test_the_command_of_the_reproducer_fails_in_the_same_way(
    tmp_path: Path, plugin: dict[str, str], passes: str, nodes_before: int, reproduced: str
) -> None:
    model, folder = tmp_path / "model.onnx", tmp_path / "a folder"
    onnx.save(parse(CHAIN).to_proto(), model)
    words = ["run", str(model), "-o", str(tmp_path / "out.onnx"), "--passes", passes, "--dump-dir", str(folder)]
    first = qat2int8(words, plugin)
    assert first.returncode == 2
    assert "node 'c'" in first.stderr
    assert "Traceback" not in first.stderr

    (command,) = folder.glob("*/command.txt")
    argv = shlex.split(command.read_text())
    assert command.read_text().strip() in first.stderr
    assert argv[:2] == ["qat2int8", "run"]
    assert argv[argv.index("--passes") + 1] == reproduced
    assert len(onnx.load(argv[2]).graph.node) == nodes_before
    second = qat2int8(argv[1:], plugin)
    assert second.returncode == 2
    what = first.stderr.splitlines()[0].split("): ", 1)[1]
    assert second.stderr.splitlines()[0].split("): ", 1)[1] == what


@dataclass(frozen=True)
class Refuse(Pass):
    name = "refuse"
    options: tuple[object, ...] = ()

    def run(self, model: Model, ctx: Context) -> PassResult:
        next(model.nodes("Relu")).name = "touched"
        raise UnsupportedModel("no")


def test_the_reproducer_keeps_the_model_as_it_was_before_the_pass_touched_it(tmp_path: Path) -> None:
    reproducer = Reproducer(tmp_path, ("--target", "ort-x86"))
    with pytest.raises(UnsupportedModel):
        watch(DropOneNeg(), Refuse(), observer=reproducer)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    assert [node.name for node in onnx.load(before).graph.node] == ["b", "c"]
    assert shlex.split(reproducer.command) == [
        *("qat2int8", "run", str(before), "-o", str(after), "--passes", "refuse", "--target", "ort-x86")
    ]


def test_a_run_that_succeeds_leaves_no_reproducer(tmp_path: Path) -> None:
    reproducer = Reproducer(tmp_path / "none")
    watch(DropOneNeg(), observer=reproducer)
    assert (reproducer.command, reproducer.problem) == ("", "")
    assert not (tmp_path / "none").exists()


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reproducer = Reproducer(tmp_path / "file")
    with pytest.raises(UnsupportedModel):
        watch(Refuse(), observer=reproducer)
    assert reproducer.command == ""
    assert "cannot be written" in reproducer.problem


def test_a_pass_with_options_text_cannot_hold_has_no_reproducer(tmp_path: Path) -> None:
    reproducer = Reproducer(tmp_path)
    with pytest.raises(UnsupportedModel):
        watch(Refuse((object(),)), observer=reproducer)
    assert reproducer.command == ""
    assert "no option value" in reproducer.problem
