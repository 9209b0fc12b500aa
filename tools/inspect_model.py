"""``qat2int8 inspect``: what a model holds before anything is done to it, its fake quantization above all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.pipelines.figures import as_bytes, as_count
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.pipelines.inspection import Form, Inspection, Tensor

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Any model, fake quantized or not.", show_default=False)
    ],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tell what a model holds: versions, tensors, ops, and where and how it is fake quantized.

    With --verbose every op type is listed, and the table of the grids that were trained.
    """
    from qat2int8.pipelines.inspection import inspect as inspect_model

    report = Report(json=json, quiet=quiet, verbose=verbose)
    seen = inspect_model(model)
    report.data({"model": str(model), **seen.as_dict()})
    _report_surface(report, seen)
    report.line()
    _report_fake_quant(report, seen)
    report.findings(seen.diagnostics)


_SHOWN_OPS = 8


def _report_surface(report: Report, seen: Inspection) -> None:
    report.line(f"exporter     {seen.exporter or 'not told'}")
    report.line(f"producer     {seen.producer or 'not told'}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in seen.opsets.items())
    report.line(f"versions     IR {seen.ir_version}, opset {opsets}")
    report.line(f"size         {as_bytes(seen.bytes)}, {as_count(seen.weights)} weights")
    for label, tensors in (("input", seen.inputs), ("output", seen.outputs)):
        for tensor in tensors:
            report.line(f"{label:13}{_signature(tensor)}")
    shown = list(seen.ops.items())
    rest = shown[_SHOWN_OPS:] if len(shown) > _SHOWN_OPS + 1 and not report.verbose else []
    ops = [f"{count} {kind}" for kind, count in shown[: len(shown) - len(rest)]]
    if rest:
        ops.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
    report.line(f"nodes        {sum(seen.ops.values())}: {', '.join(ops)}")


def _report_fake_quant(report: Report, seen: Inspection) -> None:
    if not seen.fake_quant:
        report.line("fake quant   none: a float model")
    else:
        spelt = [f"{count} {name}" for name, count in seen.dialects.items()]
        if seen.thresholds:
            spelt.append(f"{seen.thresholds} recorded thresholds")
        report.line(f"fake quant   {', '.join(spelt) or 'of a form that is not read, see below'}")
    for form in seen.forms:
        report.line(f"             {_form(form)}")
    if seen.problem:
        report.line(f"             cannot be read further: {seen.problem}")
    if seen.batch_norms:
        report.line(f"not folded   {seen.batch_norms} BatchNormalization")
    if seen.layers:
        report.line()
        rows = [
            (layer.op_type, layer.count, layer.input, layer.weight, layer.bias, layer.output)
            for layer in seen.layers
        ]
        headers = ("layer", "nodes", "input on a grid", "weight", "bias", "output")
        report.table(headers, rows, right=(1, 2, 3, 4, 5))
    if seen.scales and not report.verbose:
        report.line(f"grids        {len(seen.scales)} trained ones (--verbose lists them)")
    elif seen.scales:
        report.line()
        for tensor, grid, span, origin in seen.scales:
            report.line(f"{tensor}: {grid} {span} from {origin}")


def _signature(tensor: Tensor) -> str:
    shape = "of unknown rank" if tensor.shape is None else f"[{', '.join(map(str, tensor.shape))}]"
    return f"{tensor.name}: {tensor.type} {shape}"


def _form(form: Form) -> str:
    role = {"activation": "activations", "weight": "weights", "bias": "biases"}[form.role]
    steps = "per tensor" if form.axis is None else f"per channel of axis {form.axis}"
    zero = "with zero points" if form.zero_points else "zero point 0"
    return f"{form.count} {role}: {form.type}, {steps}, {zero}"
