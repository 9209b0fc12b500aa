"""Folders of images: what becomes of their pixels, and what is said of lists and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_formats import inputs_of, labels_of

from qat2int8.ir import DataError
from qat2int8.pipelines.data import InputSpec, image_folder, open_data

Image = pytest.importorskip("PIL.Image")

F32 = np.dtype(np.float32)
MODEL = InputSpec("image", F32, (None, 3, 4, 6))


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of 8 x 10 pixels, one below the folder and one with a space in its name."""
    (tmp_path / "sub").mkdir()
    names = ("a.png", "sub/b c.png", "d.png")
    for seed, name in enumerate(names):
        Image.fromarray(picture(8, 10, seed)).save(tmp_path / name)
    (tmp_path / "val_list.txt").write_text("".join(f"{name} {7 - n}\n" for n, name in enumerate(names)))
    return tmp_path


def refused(source: Any, *specs: InputSpec) -> str:
    with pytest.raises(DataError) as error:
        list(open_data(source, specs or None))
    return str(error.value)


def test_the_middle_of_each_image_with_its_label(folder: Path) -> None:
    data = open_data(f"{folder}?scale=1/255", [MODEL], batch_size=2)
    assert data.count == 3
    for _ in range(2):
        batches = list(data)
        assert [len(batch) for batch in batches] == [2, 1]
        expected = [picture(8, 10, seed)[2:6, 2:8].transpose(2, 0, 1) / np.float32(255) for seed in range(3)]
        np.testing.assert_array_equal(inputs_of(batches, "image"), expected)
        assert labels_of(batches) == [7, 6, 5]


def test_pixels_need_a_scale_unless_the_model_takes_bytes(folder: Path) -> None:
    assert "is uint8, but input 'image' of the model takes float32 (say how its integers" in refused(folder, MODEL)
    (batch,) = open_data(folder, [InputSpec("image", np.dtype(np.uint8), MODEL.shape)])
    np.testing.assert_array_equal(batch.inputs["image"][0], picture(8, 10)[2:6, 2:8].transpose(2, 0, 1))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layout_and_order_of_channels(folder: Path, layout: str, order: str) -> None:
    shape = (None, 3, 4, 6) if layout == "NCHW" else (None, 4, 6, 3)
    query = f"?scale=1&mean=1,2,3&std=2,4,8&order={order}&crop=4,6"
    pixels = picture(8, 10)[2:6, 2:8]
    pixels = pixels if order == "RGB" else pixels[..., ::-1]
    expected = ((pixels - np.array([1.0, 2.0, 3.0])) / np.array([2.0, 4.0, 8.0])).astype(np.float32)
    expected = expected if layout == "NHWC" else expected.transpose(2, 0, 1)
    for specs, more in (([InputSpec("image", F32, shape)], ""), (None, f"&layout={layout}")):
        (batch,) = open_data(f"{folder}{query}{more}", specs)
        np.testing.assert_array_equal(next(iter(batch.inputs.values()))[0], expected)


def imagenet(path: Path) -> npt.NDArray[np.float32]:
    """The steps of ``full_ILSVRC2012_val_preprocess.py``, written down once more."""
    image = Image.open(path)
    percent = 256 / min(image.size)
    image = image.resize(tuple(round(size * percent) for size in image.size), Image.LANCZOS)
    left, top = (image.size[0] - 224) // 2, (image.size[1] - 224) // 2
    image = image.crop((left, top, left + 224, top + 224)).convert("RGB")
    values = np.array(image).astype("float32").transpose(2, 0, 1) / 255
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((values - mean) / std).astype(np.float32)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_preset_is_what_imagenet_networks_are_trained_on(tmp_path: Path, mode: str) -> None:
    Image.fromarray(picture(300, 411)).convert(mode).save(tmp_path / "a.png")
    (tmp_path / "val_list.txt").write_text("a.png 1\n")
    (batch,) = open_data(f"{tmp_path}?preset=imagenet", [InputSpec("image", F32, (None, 3, 224, 224))])
    np.testing.assert_allclose(batch.inputs["image"][0], imagenet(tmp_path / "a.png"), atol=1e-6)


def test_a_list_elsewhere(folder: Path, tmp_path: Path) -> None:
    lists = folder / "lists"
    lists.mkdir()
    (lists / "few.txt").write_text("\nd.png\t3\r\n\n")
    for source in (f"{lists / 'few.txt'}?root={folder}", f"{folder}?list={lists / 'few.txt'}&root={folder}"):
        assert labels_of(list(open_data(source))) == [3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "val_list.txt: names no images"),
        ("a.png 1\nnone.png 2\n", "val_list.txt:2: there is no file"),
        ("a.png\n", "val_list.txt:1: 'a.png' is not 'path label'"),
        ("a.png one\n", "'a.png one' is not 'path label' with a whole number from 0"),
        ("a.png -1\n", "'a.png -1' is not 'path label'"),
        ("a.png 1.5\n", "'a.png 1.5' is not 'path label'"),
        ("val_list.txt 1\n", "val_list.txt: cannot be read: cannot identify image file"),
        ("small.png 1\n", "is 3 x 5 pixels, smaller than the crop of 4 x 6 (resize it first: ?resize=256)"),
        ("cut.png 1\n", "cut.png: cannot be read: image file is truncated"),
        ("sub 1\n", "there is no file"),
    ],
)
def test_lists_and_files_that_are_none(folder: Path, text: str, says: str) -> None:
    Image.fromarray(picture(3, 5)).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:150])
    (folder / "val_list.txt").write_text(text)
    assert says in refused(f"{folder}?scale=1", MODEL)


def test_a_list_that_is_no_text(folder: Path) -> None:
    (folder / "val_list.txt").write_bytes(b"\xff\xfe 1\n")
    assert "val_list.txt: is not UTF-8 text" in refused(folder)


def test_images_of_several_sizes_without_a_crop(folder: Path) -> None:
    Image.fromarray(picture(3, 5)).save(folder / "a.png")
    assert "samples of the shapes [3, 3, 5], [3, 8, 10] cannot share a batch" in refused(folder)


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "Pillow, which is not installed (pip install 'qat2int8[images]')" in refused(folder)
    assert image_folder.LIST_NAME == "val_list.txt"
