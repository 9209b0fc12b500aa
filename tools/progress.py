"""What a person sees while something takes its time, and how Ctrl-C ends it without loss."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from qat2int8.pipelines.observers import Observer

__all__ = ["Progress", "counting", "progress"]


@contextlib.contextmanager
def counting(label: str, total: int | None, silent: bool) -> Iterator[Callable[[int, str], None] | None]:
    """A bar on a terminal: gives what is to be told how many are done, and a text. None anywhere else."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bars(*columns, TextColumn("{task.description}")) as bars:
        task = bars.add_task("", total=total)
        yield lambda done, text: bars.update(task, completed=done, description=text)


class Progress:
    """Shows nothing; what it is told of calibration only ends it when that was asked for.

    Attributes:
        observers: for the passes.
    """

    def __init__(self) -> None:
        self.observers: Sequence[Observer] = ()
        self.interrupted = False
        self.counting = False
        """Whether batches are being counted: from the first one to the last."""

    def on_batch(self, done: int, of: int | None) -> None:
        """Told after each batch of calibration.

        Raises:
            KeyboardInterrupt: somebody pressed Ctrl-C meanwhile: between two batches nothing is half done.
        """
        self.counting = done != of
        if self.interrupted:
            raise KeyboardInterrupt


@contextlib.contextmanager
def progress(silent: bool) -> Iterator[Progress]:
    """Shows on a terminal which pass runs and how far calibration is, and nothing anywhere else."""
    if silent or not sys.stderr.isatty():
        shown = Progress()
        with _between_batches(shown):
            yield shown
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qat2int8.pipelines.observers import Quiet as Silent

    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _bars(*columns) as bars:
        task = bars.add_task("reading the model", total=None, count="")

        class Passes(Silent):
            def before(self, model: Any, pass_: Any, position: Any) -> None:
                bars.update(task, description=pass_.name, total=position.total + 1, completed=position.index)

            def finished(self, model: Any, run: Any) -> None:
                bars.update(task, description="certifying")

        class Bar(Progress):
            def __init__(self) -> None:
                super().__init__()
                self.observers = (Passes(),)
                self._samples = bars.add_task("calibrating", total=None, count="", visible=False)

            def on_batch(self, done: int, of: int | None) -> None:
                count = f"{done} samples" if of is None else f"{done}/{of} samples"
                bars.update(self._samples, completed=done, total=of, count=count, visible=done != of)
                super().on_batch(done, of)

        bar = Bar()
        with _between_batches(bar):
            yield bar


def _bars(*columns: Any) -> Bars:
    """Bars on stderr that go when they are done."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    return Bars(*columns, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def _between_batches(shown: Progress) -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of a batch where one is being counted; the second does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        if shown.interrupted or not shown.counting:
            raise KeyboardInterrupt
        shown.interrupted = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
