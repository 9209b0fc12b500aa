"""``qat2int8 cast-output``: give a graph output another element type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.run import execute

__all__ = ["cast_output"]


def cast_output(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model to read.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", metavar="FILE", help="Where to write the result.", show_default=False)
    ],
    name: Annotated[
        str, typer.Option("--output", metavar="NAME", help="The graph output to cast.", show_default=False)
    ],
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="TYPE", help="Its new element type, such as float32.", show_default=False),
    ],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Cast one graph output to another element type; its name and shape stay."""
    from qat2int8.pipelines.spec import PassSpec, PipelineSpec

    spec = PipelineSpec((PassSpec("change-output-dtype", {"output": name, "dtype": dtype}),))
    execute(Report(json=json, quiet=quiet, verbose=verbose), model, output, spec)
