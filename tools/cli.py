"""The command ``qat2int8``: its subcommands, and how each way of failing ends.

Exit codes: 0 done; 1 a requirement was not met; 2 bad usage or bad input; 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qat2int8.tools.bench import bench
from qat2int8.tools.calibrate import calibrate
from qat2int8.tools.cast_output import cast_output
from qat2int8.tools.compare import compare
from qat2int8.tools.console import print_error
from qat2int8.tools.convert import convert
from qat2int8.tools.demo import demo
from qat2int8.tools.evaluate import evaluate
from qat2int8.tools.explain import explain
from qat2int8.tools.inspect_model import inspect
from qat2int8.tools.pack import pack
from qat2int8.tools.passes import passes
from qat2int8.tools.pipelines import pipelines
from qat2int8.tools.quantize import quantize
from qat2int8.tools.report import report
from qat2int8.tools.run import run
from qat2int8.tools.table import (
    apply_table,
    convert_table,
    diff_tables,
    extract_table,
    merge_tables,
    show_table,
)
from qat2int8.tools.targets import targets

__all__ = ["COMMANDS", "app", "main"]

BAD_INPUT = 2
INTERRUPTED = 130

COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "convert": (
        convert,
        "Turn a QAT model into a real INT8 model.",
        "qat2int8 convert model.onnx -o model.int8.onnx",
    ),
    "quantize": (
        quantize,
        "Turn a float model into a real INT8 model, on ranges from data.",
        "qat2int8 quantize model.onnx --data samples.npz -o model.int8.onnx",
    ),
    "calibrate": (
        calibrate,
        "Find the ranges that tensors take on data.",
        "qat2int8 calibrate model.onnx --data samples.npz -o model.table.json",
    ),
    "explain": (
        explain,
        "Tell what of a converted model runs in float, and why.",
        "qat2int8 explain model.int8.onnx --node /head/Gemm",
    ),
    "inspect": (inspect, "Tell what a model holds, and how it is fake quantized.", "qat2int8 inspect model.onnx"),
    "evaluate": (
        evaluate,
        "Compare answers and speed of models on data.",
        "qat2int8 evaluate model_fp32.onnx model.int8.onnx --data digits.npz --max-drop 1%",
    ),
    "report": (
        report,
        "Write a report that a person can look at.",
        "qat2int8 report model.int8.onnx --reference model.onnx --data digits.npz -o report.html",
    ),
    "compare": (
        compare,
        "Find the layers that went wrong in a converted model.",
        "qat2int8 compare model_qat.onnx model.int8.onnx --data digits.npz --try-skip 3",
    ),
    "run": (
        run,
        "Run a pipeline of passes on a model.",
        "qat2int8 run model.onnx -o out.onnx --passes canonicalize,cleanup",
    ),
    "cast-output": (
        cast_output,
        "Cast one graph output to another element type.",
        "qat2int8 cast-output model.onnx -o out.onnx --output labels --dtype float32",
    ),
    "targets": (targets, "List the targets, or show one.", "qat2int8 targets ort-x86"),
    "passes": (passes, "List the passes, or describe one.", "qat2int8 passes fuse-conv-bn"),
    "pipelines": (pipelines, "List the pipelines, or show one.", "qat2int8 pipelines qat-to-int8"),
    "pack": (
        pack,
        "Pack a folder of images into one file.",
        "qat2int8 pack --data-dir val --label-list val/val_list.txt -o val.bin",
    ),
    "table show": (show_table, "Show a table.", "qat2int8 table show model.table.json"),
    "table convert": (
        convert_table,
        "Write a table in another format.",
        "qat2int8 table convert model.table.json --to tensorrt -o CalibrationTable",
    ),
    "table diff": (diff_tables, "Compare two tables.", "qat2int8 table diff one.json other.json --tolerance 0.05"),
    "table merge": (
        merge_tables,
        "Merge the tables of parts of the data.",
        "qat2int8 table merge shard1.json shard2.json -o all.json",
    ),
    "table extract": (
        extract_table,
        "Take the table out of a model.",
        "qat2int8 table extract model_qat.onnx -o model.table.json",
    ),
    "table apply": (
        apply_table,
        "Quantize a float model on the ranges of a table.",
        "qat2int8 table apply CalibrationTable model.onnx -o model.int8.onnx",
    ),
    "bench": (
        bench,
        "Measure well-known networks beside published figures.",
        "qat2int8 bench resnet50 --rounds 5",
    ),
    "demo": (demo, "Convert and measure the bundled network.", "qat2int8 demo"),
}
"""Every subcommand with its line in the list of commands and the example its help shows."""

GROUPS: dict[str, str] = {
    "table": "Show, convert, compare, merge, extract and apply calibration tables: the range of each tensor.",
}
"""The first words of commands that have two."""

# Newer typer brings its own click, older ones use the installed one: this is the class of whichever it is.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class _Group(TyperGroup):
    """Ends every command the same way: one clean line on stderr and an exit code, never a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        try:
            code = super().main(words, "qat2int8", complete_var, False, windows_expand_args, **extra)
        except _ClickException as error:
            print_error(_usage(error), debug=debug)
            code = BAD_INPUT
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            print_error(_presentable(error), debug=debug)
            code = BAD_INPUT
        if code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> Exception:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "qat2int8"
    usage = ValueError(f"{command}: {error.format_message()} (see '{command} --help')")
    usage.__cause__ = error
    return usage


def _presentable(error: Exception) -> Exception:
    """``error`` itself if it was raised for people, else what a person can make of it."""
    from qat2int8.ir import Qat2Int8Error

    if isinstance(error, Qat2Int8Error):
        return error
    if isinstance(error, OSError) and error.strerror:
        shown: Exception = ValueError(f"{error.filename or 'input/output'}: {error.strerror}")
    else:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        shown = ValueError(f"unexpected {reason} (rerun with --debug and report what it prints)")
    shown.__cause__ = error
    return shown


_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_HELP,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"qat2int8 {version('qat2int8')}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=f"\b\nExample: {COMMANDS['convert'][2]}")
def front(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn quantization-aware-trained ONNX models into real, fast, faithful INT8 models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_apps = {"": app}
for _name, (_function, _summary, _example) in COMMANDS.items():
    _first, _, _last = _name.rpartition(" ")
    if _first not in _apps:
        _apps[_first] = typer.Typer(
            help=GROUPS[_first], no_args_is_help=True, rich_markup_mode=None, context_settings=_HELP
        )
        app.add_typer(_apps[_first], name=_first)
    _apps[_first].command(_last, short_help=_summary, epilog=f"\b\nExample: {_example}")(_function)


def main() -> None:
    """The console entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names in a model can hold what the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    app()
