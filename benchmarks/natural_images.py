"""A network of TensorFlow Lite on crops of photographs: does it answer as before, and how fast is it then.

The photographs are those that scikit-learn brings along; the model takes images with channels last.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import report
from PIL import Image
from sklearn.datasets import load_sample_images

from qat2int8 import convert
from qat2int8.pipelines.benchmarking.sketch import Array
from qat2int8.pipelines.benchmarking.stopwatch import interleave, session, speedup

CROPS = 400
FLOAT, SOURCE, ROUNDED, EXACT = "float", "as exported", "converted", "converted, --exact-weights"


def crops(count: int, side: int) -> Array:
    """Random squares from a third of the photograph's height up, mirrored half the time; uint8 (N, H, W, 3)."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    made = []
    for _ in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        size = int(rng.integers(photograph.height // 3, photograph.height + 1))
        left, top = (int(rng.integers(0, edge - size + 1)) for edge in photograph.size)
        crop = photograph.crop((left, top, left + size, top + size))
        crop = crop.resize((side, side), Image.Resampling.BILINEAR)
        made.append(np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop))
    return np.stack(made)


def answers(model: ort.InferenceSession, images: Array) -> Array:
    """The scores of each image."""
    name = model.get_inputs()[0].name
    return np.concatenate([model.run(None, {name: image[None]})[0].reshape(1, -1) for image in images])


def agreement(scores: Array, reference: Array) -> str:
    """Share of images whose largest score is the reference's; an equally large one counts."""
    chosen = np.take_along_axis(reference, scores.argmax(1)[:, None], 1)[:, 0]
    return f"{np.mean(chosen == reference.max(1)):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a TensorFlow Lite model through tf2onnx")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {form: Path(folder) / f"{index}.onnx" for index, form in enumerate((FLOAT, ROUNDED, EXACT))}
        convert(options.model, pipeline="qat-to-fp32").save(paths[FLOAT])
        convert(options.model).save(paths[ROUNDED])
        convert(options.model, options={"centre-weights": {"exact": True}}).save(paths[EXACT])
        paths[SOURCE] = options.model
        sessions = {form: session(path) for form, path in paths.items()}
        put = sessions[SOURCE].get_inputs()[0]
        images = crops(CROPS, int(put.shape[1]))
        if put.type != "tensor(uint8)":
            images = (images.astype(np.float32) - 128.0) / np.float32(128.0)
        plain = answers(session(options.model, optimize=False), images)
        deployed = answers(sessions[SOURCE], images)
        contenders = {
            form: (lambda model=model: model.run(None, {put.name: images[:1]})) for form, model in sessions.items()
        }
        runs = interleave(contenders, rounds=options.rounds, repeat=20)
        rows = [
            [form, f"{speedup(runs, form, FLOAT):.2f}x", agreement(scores, plain), agreement(scores, deployed)]
            for form in (SOURCE, ROUNDED, EXACT)
            for scores in [answers(sessions[form], images)]
        ]
    head = ["model", "speed against float", "same answer as unoptimized", "as onnxruntime runs the export"]
    text = (
        f"{report.table(head, rows)}\n\n"
        f"{options.model.stem}, {CROPS} crops of photographs, one thread, interleaved.\n"
        f"{report.circumstances('onnxruntime', 'qat2int8')}"
    )
    print(text)
    if options.write:
        report.write(report.DOCS / "benchmarks.md", "natural-images", text)


if __name__ == "__main__":
    main()
