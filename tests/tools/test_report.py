"""``qat2int8 report``: the file it writes, opened in a browser where there is one, and mistakes."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY, parse
from typer.testing import CliRunner, Result

from qat2int8 import convert
from qat2int8.ir.io import save_model
from qat2int8.tools.cli import app

SOURCE = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    convert(SOURCE).save(folder / "int8.onnx")
    with np.load(SOURCE.with_name("mnist500.npz")) as digits:
        images = digits["images"][:60].astype(np.float32)[:, None] / 255.0
        np.savez(folder / "digits.npz", image=images, labels=digits["labels"][:60])
    return folder


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["report", *words])


def written(folder: Path, name: str, *words: str) -> Path:
    result = invoke(str(folder / "int8.onnx"), "-o", str(folder / name), *words)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("report "))
    return folder / name


def test_of_the_model_alone(folder: Path) -> None:
    text = written(folder, "alone.html").read_text(encoding="utf-8")
    assert "As converted" in text
    assert "As it came" not in text
    assert "Answers" not in text


def test_with_reference_and_data(folder: Path) -> None:
    words = ("--reference", str(SOURCE), "--data", str(folder / "digits.npz"), "--batch-size", "10")
    text = written(folder, "whole.html", *words).read_text(encoding="utf-8").replace("<wbr>", "")
    for part in ("As it came", "Answers", "Speed", "Error by layer", "Activations", "resnet_trt_qat"):
        assert part in text


def test_as_json_it_prints_the_document(folder: Path) -> None:
    result = invoke(str(folder / "int8.onnx"), "-o", str(folder / "report.json"), "--json")
    assert json.loads(result.stdout)["model"]["name"] == "int8.onnx"
    assert json.loads((folder / "report.json").read_text())["layers"]


def test_data_without_labels_are_not_judged(folder: Path) -> None:
    np.savez(folder / "plain.npz", image=np.zeros((4, 1, 28, 28), np.float32))
    words = ("--reference", str(SOURCE), "--data", str(folder / "plain.npz"))
    report = json.loads(written(folder, "plain.json", *words).read_text())
    assert (report["accuracy"], report["notes"]) == ([], [])
    assert len(report["speed"]) == 2


def test_samples_that_fail_are_told_of_and_the_rest_is_reported(folder: Path) -> None:
    labels = np.array([3, 3, 3, 99])
    np.savez(folder / "bad.npz", image=np.zeros((4, 1, 28, 28), np.float32), labels=labels)
    result = invoke(str(folder / "int8.onnx"), "-o", str(folder / "bad.json"), "--data", str(folder / "bad.npz"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: int8: sample 3: ")
    report = json.loads((folder / "bad.json").read_text())
    assert report["accuracy"][0]["samples"] == 3
    assert report["notes"][0].startswith("left out: int8: sample 3: ")


def test_a_reference_that_the_runtime_does_not_load_is_read_first(folder: Path) -> None:
    quant = 'qonnx.custom_op.general.Quant <signed = 1, narrow = 1, rounding_mode = "ROUND">'
    text = f"""<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 2]>
        g (float[N,4] x) => (float[N,4] y) <float s = {{0.05}}, float z = {{0}}, float b = {{8}},
            float[4,4] w = {{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}}> {{
            q = {quant} (x, s, z, b)  v = {quant} (w, s, z, b)
            [m] t = MatMul (q, v)
            y = {quant} (t, s, z, b) }}"""
    save_model(parse(text), folder / "qonnx.onnx")
    convert(folder / "qonnx.onnx").save(folder / "read.onnx")
    np.savez(folder / "rows.npz", x=np.ones((6, 4), np.float32))
    words = ("--reference", str(folder / "qonnx.onnx"), "--data", str(folder / "rows.npz"))
    result = invoke(str(folder / "read.onnx"), "-o", str(folder / "read.json"), *words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "note: onnxruntime does not run qonnx as it is" in result.stdout
    report = json.loads((folder / "read.json").read_text())
    assert [row["model"] for row in report["speed"]] == ["qonnx", "read"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("int8.onnx", "-o", "report.pdf"), "cannot be written as '.pdf'"),
        (("int8.onnx", "-o", "nowhere/report.html"), "nowhere"),
        (("int8.html", "-o", "int8.html"), "would replace a file of this command"),
        (("missing.onnx", "-o", "report.html"), "missing.onnx"),
        (("int8.onnx", "-o", "report.html", "--reference", "missing.onnx"), "missing.onnx"),
        (("int8.onnx", "-o", "report.html", "--data", "missing.npz"), "missing.npz"),
        (("int8.onnx", "-o", "report.html", "--data", "digits.npz", "--metric", "best"), "no metric is called"),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (folder / "report.html").exists()


def browse(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a browser makes of ``page``: its elements on stdout, its console on stderr."""
    assert BROWSER is not None
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_it_without_an_error(folder: Path, tmp_path: Path) -> None:
    words = ("--reference", str(SOURCE), "--data", str(folder / "digits.npz"), "--batch-size", "10")
    page = written(folder, "shown.html", *words)
    done = browse(page, tmp_path)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 1 + 12 + 2 + 5  # the error of layers, values, graphs, and graphs on paper
    assert done.stdout.count('class="box integer"') > 10


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_phone_shows_it_without_scrolling_sideways(folder: Path, tmp_path: Path) -> None:
    words = ("--reference", str(SOURCE), "--data", str(folder / "digits.npz"), "--batch-size", "10")
    text = written(folder, "phone.html", *words).read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    measure = "const {scrollWidth, clientWidth} = this.contentDocument.documentElement; "
    measure += "document.body.dataset.beyond = scrollWidth - clientWidth"
    frame.write_text(f'<body><iframe width=390 srcdoc="{html.escape(text)}" onload="{measure}"></iframe>')
    assert 'data-beyond="0"' in browse(frame, tmp_path).stdout
