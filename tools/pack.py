"""``qat2int8 pack``: a folder of images into one file that reads fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat2int8.pipelines.figures import as_bytes
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.progress import counting

__all__ = ["pack"]

_SHOWN = 10


def pack(
    data_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the paths of the list start from.", show_default=False)
    ],
    label_list: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A line 'path label' for each image, such as val_list.txt.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write: .bin for PaddlePaddle's binary, or .npz.",
            show_default=False,
        ),
    ],
    data_dim: Annotated[int, typer.Option(metavar="PIXELS", min=1, help="Height and width of the result.")] = 224,
    resize: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=1,
            help="What the short side becomes before the middle is cut out; 8/7 of --data-dim if not given.",
        ),
    ] = None,
    mean: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Subtracted from each channel, after pixels became 0 to 1.")
    ] = "0.485,0.456,0.406",
    std: Annotated[str, typer.Option(metavar="NUMBERS", help="Each channel is divided by it.")] = (
        "0.229,0.224,0.225"
    ),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Prepare the images of a list as networks trained on ImageNet want them, and pack them into one file.

    Resized by the short side, the middle cut out, RGB, float32, channels first. Images that cannot be read are
    left out and named.
    """
    from qat2int8.pipelines.data.image_folder import Preparation, read_list
    from qat2int8.pipelines.data.options import parse
    from qat2int8.pipelines.data.packing import pack as pack_images

    report = Report(json=json, quiet=quiet, verbose=verbose)
    options = parse({"path": str(data_dir), "scale": "1/255", "mean": mean, "std": std})
    normalise = options.normalise()
    assert normalise is not None
    images = read_list(label_list, data_dir)
    preparation = Preparation(resize or round(data_dim * 8 / 7), (data_dim, data_dim))
    with counting("packing images", len(images), quiet or json) as show:
        packed = pack_images(
            images, preparation, normalise, output, on_image=None if show is None else lambda done: show(done, "")
        )
    size = output.stat().st_size
    report.line(
        f"written      {output}: {packed.count} of {len(images)} images of {list(packed.shape)}, {as_bytes(size)}"
    )
    if packed.skipped:
        report.line(f"left out     {len(packed.skipped)}:")
        shown = packed.skipped if verbose else packed.skipped[:_SHOWN]
        for line in shown:
            report.line(f"  {line}")
        if len(packed.skipped) > len(shown):
            report.line(f"  and {len(packed.skipped) - len(shown)} more (--verbose shows them)")
    report.data(
        {
            "output": str(output),
            "bytes": size,
            "images": packed.count,
            "shape": list(packed.shape),
            "skipped": list(packed.skipped),
        }
    )
