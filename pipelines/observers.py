"""Instruments of the pass manager: they watch a pipeline run and never change what it does."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from qat2int8.ir import Model, OutputError, PipelineError, Qat2Int8Error
from qat2int8.ir.io import save_model
from qat2int8.ir.text import text_diff, to_text
from qat2int8.passes import Pass
from qat2int8.pipelines.manager import PassRun, PipelineRun, Position, total_counts
from qat2int8.pipelines.order import check_order, facts_of
from qat2int8.pipelines.spec import FIXPOINT, PipelineSpec

__all__ = ["Counts", "Dumps", "Observer", "PrintAfter", "Quiet", "Reproducer", "Timing", "TimingRow"]


class Observer(Protocol):
    """What the manager tells. An observer reads the model and must not change it."""

    def before(self, model: Model, pass_: Pass, position: Position) -> None:
        """``pass_`` is about to run."""

    def after(self, model: Model, run: PassRun) -> None:
        """A pass ran and what it left was verified."""

    def failed(self, model: Model, pass_: Pass, position: Position, error: Qat2Int8Error) -> None:
        """``pass_`` failed; ``model`` is in whatever state that left it."""

    def finished(self, model: Model, run: PipelineRun) -> None:
        """Every pass ran."""


class Quiet:
    """An observer that does nothing: the base of those that care about some of the events."""

    def before(self, model: Model, pass_: Pass, position: Position) -> None: ...

    def after(self, model: Model, run: PassRun) -> None: ...

    def failed(self, model: Model, pass_: Pass, position: Position, error: Qat2Int8Error) -> None: ...

    def finished(self, model: Model, run: PipelineRun) -> None: ...


@dataclass(frozen=True)
class TimingRow:
    """One line of the timing tree."""

    name: str
    depth: int
    seconds: float
    share: float
    """Of the whole, between 0 and 1."""
    runs: int = 1


class Timing(Quiet):
    """Where the time went: passes, fixpoints with their passes below them, and what is checked between."""

    def __init__(self) -> None:
        self._runs: list[PassRun] = []
        self._started = 0.0
        self._seconds = 0.0

    def before(self, model: Model, pass_: Pass, position: Position) -> None:
        self._started = self._started or time.perf_counter()

    def after(self, model: Model, run: PassRun) -> None:
        self._runs.append(run)
        self._seconds = time.perf_counter() - self._started

    def rows(self) -> tuple[TimingRow, ...]:
        """The tree, top down; its leaves add up to its root."""
        whole = self._seconds or 1.0
        leaves: dict[Position, list[PassRun]] = {}
        loops: dict[int, list[PassRun]] = {}
        for run in self._runs:
            leaves.setdefault(run.position.settled, []).append(run)
            if run.position.loop:
                loops.setdefault(run.position.loop, []).append(run)
        rows = [TimingRow("total", 0, self._seconds, self._seconds / whole)]
        for position, runs in leaves.items():
            if position.loop and (inner := loops.pop(position.loop, None)):
                seconds, rounds = sum(run.seconds for run in inner), max(run.position.round for run in inner)
                rows.append(TimingRow(FIXPOINT, 1, seconds, seconds / whole, rounds))
            seconds = sum(run.seconds for run in runs)
            rows.append(TimingRow(runs[0].name, 2 if position.loop else 1, seconds, seconds / whole, len(runs)))
        rest = self._seconds - sum(run.seconds for run in self._runs)
        rows.append(TimingRow("between passes", 1, rest, rest / whole, len(self._runs)))
        return tuple(rows)


class Counts(Quiet):
    """What each pass changed and how often, also when a later one failed."""

    def __init__(self) -> None:
        self._runs: list[PassRun] = []

    def after(self, model: Model, run: PassRun) -> None:
        self._runs.append(run)

    def rows(self) -> tuple[tuple[str, str, int], ...]:
        """(pass, what, how often), in pipeline order; nothing for passes that changed nothing."""
        return tuple(
            (name, what, count)
            for name, counts in total_counts(self._runs).items()
            for what, count in counts.items()
        )


class PrintAfter(Quiet):
    """Write the graph as text after ``all`` passes, after those that ``changed`` it, or after one by name."""

    def __init__(self, which: str, stream: TextIO | None = None) -> None:
        self._which = which
        self._stream = stream

    def after(self, model: Model, run: PassRun) -> None:
        if self._which in ("all", run.name) or (self._which == "changed" and run.result.modified):
            # sys.stderr is looked up when it is used: it can be replaced between construction and run.
            stream = self._stream or sys.stderr
            stream.write(f"// after {run.name} ({run.position})\n{to_text(model, scales=True)}\n")


class Dumps(Quiet):
    """Numbered files in a folder: the graph as text and as ``.onnx`` before the first pass and after each, with
    the difference each pass made.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._text = ""
        self._written = 0

    def before(self, model: Model, pass_: Pass, position: Position) -> None:
        if not self._written:
            self._text = self._dump(model, "input")

    def after(self, model: Model, run: PassRun) -> None:
        diff = self._directory / f"{self._written:02}-{run.name}.diff"
        text = self._dump(model, run.name)
        with _writing(self._directory):
            diff.write_text(text_diff(self._text, text), encoding="utf-8")
        self._text = text

    def _dump(self, model: Model, name: str) -> str:
        stem = f"{self._written:02}-{name}.onnx"
        text = to_text(model, scales=True)
        with _writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / f"{stem}.txt").write_text(text, encoding="utf-8")
        save_model(model, self._directory / stem)
        self._written += 1
        return text


class Reproducer(Quiet):
    """On failure, leave a model and the one command that fails on it in the same way.

    That is the model as it was before the failing pass, with this pass alone. A pass that reads grids gathered
    before it cannot be told them by a model file: then it is the pipeline's input with every pass up to it.

    Args:
        options: further words of the command, such as ``("--target", "ort-x86")``.
    """

    def __init__(self, directory: Path, options: Sequence[str] = ()) -> None:
        self._directory = directory
        self._options = options
        self._start: Model | None = None
        self._latest: Model | None = None
        self._done: list[Pass] = []
        self.command = ""
        """The command, once something failed."""
        self.problem = ""
        """Why there is none although something failed."""

    def before(self, model: Model, pass_: Pass, position: Position) -> None:
        self._latest = model.clone()
        if self._start is None:
            self._start = self._latest

    def after(self, model: Model, run: PassRun) -> None:
        self._done.append(run.pass_)

    def failed(self, model: Model, pass_: Pass, position: Position, error: Qat2Int8Error) -> None:
        assert self._start is not None, "before is called first"
        assert self._latest is not None, "before is called first"
        source, passes = self._latest, [pass_]
        if not _stands_alone(pass_, source):
            source, passes = self._start, [*self._done, *passes]
        before, after = self._directory / "before.onnx", self._directory / "after.onnx"
        try:
            text = str(PipelineSpec.of(passes))
            words = ["qat2int8", "run", str(before), "-o", str(after), "--passes", text, *self._options]
            with _writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                (self._directory / "command.txt").write_text(f"{shlex.join(words)}\n", encoding="utf-8")
            save_model(source, before)
        except (OutputError, PipelineError) as unwritable:
            # The failure of the pass is what the reader has to hear of first.
            self.problem = str(unwritable)
        else:
            self.command = shlex.join(words)


def _stands_alone(pass_: Pass, model: Model) -> bool:
    """Whether all ``pass_`` works on is in the model file."""
    try:
        check_order((pass_,), facts_of(model))
    except PipelineError:
        return False
    return not len(model.scales) and not model.moments


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}", where=str(directory), remedy="choose another folder"
        ) from error
