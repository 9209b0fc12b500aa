"""``qat2int8 pack``: images as readers of both formats see them, and what becomes of those that cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_formats import labels_of
from support import REPOSITORY
from typer.testing import CliRunner, Result

from qat2int8.pipelines.data import open_data
from qat2int8.tools.cli import app

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of which is cut off, and a line for one that is not there."""
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 31, 3)), ("b.png", (40, 22, 3)), ("c.png", (20, 20, 3))):
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:200])
    (tmp_path / "val_list.txt").write_text("c.png 1\na.png 7\nnone.png 3\nb.png 5\n")
    return tmp_path


def invoke(folder: Path, output: str, *words: str) -> Result:
    command = [
        "pack",
        "--data-dir",
        folder,
        "--label-list",
        folder / "val_list.txt",
        "-o",
        folder / output,
        *words,
    ]
    return CliRunner().invoke(app, [str(word) for word in command])


@pytest.mark.parametrize("name", ["val.bin", "val.npz"])
def test_the_packed_file_is_what_the_folder_gives_without_holes(folder: Path, name: str) -> None:
    result = invoke(folder, name, "--data-dim", "14", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["images"], told["shape"]) == (2, [3, 14, 14])
    assert told["bytes"] == (folder / name).stat().st_size
    assert [re.sub(r"^.*/", "", line.split(": ")[0]) for line in told["skipped"]] == [
        "val_list.txt:1",
        "val_list.txt:3",
    ]
    (batch,) = open_data(folder / name)
    assert labels_of([batch]) == [7, 5]
    (folder / "good.txt").write_text("a.png 7\nb.png 5\n")
    (expected,) = open_data(f"{folder / 'good.txt'}?preset=imagenet&resize=16&crop=14")
    packed, unpacked = (next(iter(one.inputs.values())) for one in (batch, expected))
    np.testing.assert_array_equal(packed, unpacked)


def test_the_size_asked_for_is_the_size_of_the_pixels(folder: Path) -> None:
    assert (
        invoke(folder, "val.bin", "--data-dim", "6", "--resize", "9", "--mean", "0", "--std", "1").exit_code == 0
    )
    assert (folder / "val.bin").stat().st_size == 8 + 2 * (3 * 6 * 6 * 4 + 8)
    (batch,) = open_data(folder / "val.bin")
    assert batch.inputs["data"].min() >= 0
    assert 0.5 < batch.inputs["data"].max() <= 1


def test_what_is_left_out_is_named_and_counted(folder: Path) -> None:
    said = invoke(folder, "val.bin").stdout
    assert f"{folder / 'val.bin'}: 2 of 4 images of [3, 224, 224]" in said
    assert "left out     2:" in said
    assert "val_list.txt:3: " in said
    assert "none.png: no such file" in said
    assert "c.png: cannot be read: image file is truncated" in said


@pytest.mark.parametrize(
    ("output", "lines", "words", "says"),
    [
        ("val.tar", "a.png 1", (), "the suffix '.tar' names no format to pack into (end it with .bin"),
        ("no/val.bin", "a.png 1", (), "does not exist (create it first)"),
        ("val.bin", "none.png 1\nc.png 1", (), "none of 2 images can be read"),
        ("val.bin", "a.png", (), "val_list.txt:1: 'a.png' is not 'path label'"),
        ("val.bin", "", (), "val_list.txt: names no images"),
        ("val.bin", "a.png 1", ("--mean", "half"), "mean: 'half' is not a number"),
        ("val.bin", "a.png 1", ("--std", "0"), "'std' is 0"),
        ("val.bin", "a.png 1", ("--mean", "1,2"), "'mean' has 2 numbers"),
        ("val.bin", "a.png 1", ("--resize", "100"), "none of 1 images can be read"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, output: str, lines: str, words: tuple[str, ...], says: str
) -> None:
    (folder / "val_list.txt").write_text(lines)
    (folder / "val.bin").write_bytes(b"what was there")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = invoke(folder, output, *words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert says in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_document_is_told_of(folder: Path) -> None:
    told: dict[str, Any] = json.loads(invoke(folder, "val.npz", "--json").stdout)
    page = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.split("<!-- begin json-pack -->")[1].split("<!-- end json-pack -->")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(told)
