"""``qat2int8 run``: any pipeline on any model."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.ir.verify import VerifyLevel
    from qat2int8.pipelines.manager import PipelineRun
    from qat2int8.pipelines.observers import Timing
    from qat2int8.pipelines.spec import PipelineSpec

__all__ = ["execute", "run"]

PRINT_AFTER = ("all", "changed")


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model to read.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the result.", show_default=False)
    ],
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            metavar="PIPELINE",
            help="Pipeline text such as a,b{option=1},fixpoint(c,d), a shipped pipeline's name, or a .yaml file.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="A target's name or .yaml file; else the pipeline's own, else ort-x86."
        ),
    ] = "",
    print_after: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Write the graph to stderr after 'all' passes, those that 'changed' it, or one by name.",
        ),
    ] = "",
    dump_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the graph before and after each pass here, and on failure what reproduces it.",
        ),
    ] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print where the time went.")] = False,
    verify: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help="What is checked after each pass: none, structure, checker or numeric."
        ),
    ] = "checker",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline of passes on a model and write what comes out."""
    from qat2int8.pipelines.shipped import load_pipeline

    report = Report(json=json, quiet=quiet, verbose=verbose)
    execute(
        report,
        model,
        output,
        load_pipeline(passes),
        target=target,
        verify=verify,
        print_after=print_after,
        dump_dir=dump_dir,
        time_passes=time_passes,
    )


def execute(
    report: Report,
    path: Path,
    output: Path,
    spec: PipelineSpec,
    *,
    target: str = "",
    verify: str = "checker",
    print_after: str = "",
    dump_dir: Path | None = None,
    time_passes: bool = False,
) -> None:
    """Read ``path``, run ``spec`` on it, write ``output`` and report.

    Everything that can be wrong with the command itself is found before the model is read.

    Raises:
        Qat2Int8Error: with what reproduces it in its notes, when a pass failed and ``dump_dir`` was given.
    """
    from qat2int8.ir import PassFailed, Qat2Int8Error
    from qat2int8.ir.io import check_output_path, load_model, save_model
    from qat2int8.passes import Context
    from qat2int8.pipelines.manager import run_pipeline
    from qat2int8.pipelines.observers import Dumps, Observer, PrintAfter, Reproducer, Timing
    from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

    level = _level(verify)
    target = target or spec.target or DEFAULT_TARGET
    ctx = Context(load_target(target))
    spec.build()
    check_output_path(output, source=path)

    timing = Timing()
    observers: list[Observer] = [timing]
    if print_after:
        observers.append(PrintAfter(_print_after(print_after, spec)))
    reproducer = None
    if dump_dir is not None:
        reproducer = Reproducer(dump_dir / "reproducer", ("--target", target, "--verify", level.value))
        observers += [Dumps(dump_dir), reproducer]

    model = load_model(path)
    try:
        done = run_pipeline(model, spec, ctx, verify=level, observers=observers)
    except Qat2Int8Error as error:
        if reproducer is not None and reproducer.command:
            error.add_note(f"reproduce it with: {reproducer.command}")
        elif reproducer is not None and reproducer.problem:
            error.add_note(f"no reproducer was written: {reproducer.problem}")
        elif isinstance(error, PassFailed):
            error.add_note("rerun with --dump-dir DIR to keep what reproduces it")
        raise
    save_model(model, output)

    _print(report, done, ctx.target.name, timing if time_passes else None)
    report.line(f"wrote {output}")
    report.data(_document(done, spec, ctx.target.name, output))


def _level(name: str) -> VerifyLevel:
    from qat2int8.ir import PipelineError
    from qat2int8.ir.verify import VerifyLevel

    try:
        return VerifyLevel(name)
    except ValueError:
        raise PipelineError(
            f"no level is called '{name}'", where="--verify", remedy=f"one of {', '.join(VerifyLevel)}"
        ) from None


def _print_after(which: str, spec: PipelineSpec) -> str:
    from qat2int8.ir import PipelineError
    from qat2int8.pipelines.spec import flatten

    known = [*PRINT_AFTER, *(one.name for one in flatten(spec.passes))]
    if which in known:
        return which
    near = difflib.get_close_matches(which, known, n=1)
    raise PipelineError(
        f"the pipeline has no pass '{which}'",
        where="--print-after",
        remedy=f"did you mean '{near[0]}'?" if near else "all, changed, or the name of one of its passes",
    )


def _print(report: Report, done: PipelineRun, target: str, timing: Timing | None) -> None:
    counts = done.counts
    if counts:
        rows = [(name, ", ".join(f"{n} {what}" for what, n in kinds.items())) for name, kinds in counts.items()]
        report.table(("pass", "what it did"), rows)
    else:
        report.line("nothing to do: no pass changed the model")
    if done.left_out:
        report.line(f"left out for {target}: {', '.join(done.left_out)}")
    if timing is not None:
        report.line()
        report.table(
            ("where the time went", "runs", "ms", "%"),
            [
                ("  " * row.depth + row.name, row.runs, f"{1000 * row.seconds:.1f}", f"{100 * row.share:.0f}")
                for row in timing.rows()
            ],
            right=(1, 2, 3),
        )
    report.findings(done.diagnostics)


def _document(done: PipelineRun, spec: PipelineSpec, target: str, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "pipeline": str(spec),
        "target": target,
        "changed": done.changed,
        "left_out": list(done.left_out),
        "passes": [
            {
                "name": one.name,
                "position": one.position.index,
                "round": one.position.round,
                "seconds": round(one.seconds, 6),
                "counts": dict(one.result.counts),
            }
            for one in done.runs
        ],
        "diagnostics": [finding.as_dict() for finding in done.diagnostics],
    }
