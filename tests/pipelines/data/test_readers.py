"""What is particular to single formats: pairing, numbering, sizes that have to be inferred, and mistakes."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_formats import LABELS, batch_file, idx, inputs_of, labels_of, mnist, mnist_gzip, paddle, pixels, tensorrt

from qat2int8.ir import DataError
from qat2int8.pipelines.data import InputSpec, open_data

F32 = np.dtype(np.float32)
X = InputSpec("x", F32, (None, 2, 3))


def refused(source: Any, *specs: InputSpec, **options: Any) -> str:
    """What is said of data that cannot be read to the end."""
    with pytest.raises(DataError) as error:
        list(open_data(source, specs or None, **options))
    return str(error.value)


# -- npz and npy ------------------------------------------------------------------------------------------------


def test_an_array_is_matched_by_name_before_anything_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(2, 3), other=np.zeros((10, 9)))
    (batch,) = open_data(tmp_path / "d.npz", [X])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(2, 3))
    assert batch.labels is None


def test_which_array_is_for_which_input_can_be_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=pixels(2, 3), b=pixels(4), answer=LABELS)
    pair = (X, InputSpec("y:0", F32, (None, 4)))
    source = f"{tmp_path / 'd.npz'}?inputs=x:a,y:0:b&labels=answer"
    (batch,) = open_data(source, pair)
    np.testing.assert_array_equal(batch.inputs["y:0"], pixels(4))
    assert labels_of([batch]) == LABELS.tolist()
    (without_a_model,) = open_data(f"{tmp_path / 'd.npz'}?inputs=z:a")
    assert list(without_a_model.inputs) == ["z"]
    assert "an array 'c', which is not there" in refused(f"{tmp_path / 'd.npz'}?inputs=c")
    (alone,) = open_data(f"{tmp_path / 'd.npz'}?inputs=a", [X])
    np.testing.assert_array_equal(alone.inputs["x"], pixels(2, 3))


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "holds the arrays 'a', 'b'; none is called 'x' like the model's input (say which one: ?inputs=a)"),
        ("?inputs=c", "an array 'c', which is not there (there is 'a', 'b')"),
        ("?inputs=z:a", "the model has no input 'z' (there is 'x')"),
        ("?inputs=a&labels=lables", "labels are to be in an array 'lables', which is not there"),
        ("?inputs=b", "a sample has the shape [4], input 'x' of the model takes [2,3]"),
        ("?inputs=a&labels=b", "different numbers of samples: 'a' 10, 'b' 11"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, query: str, says: str) -> None:
    np.savez(tmp_path / "d.npz", a=pixels(2, 3), b=np.zeros((11, 4), np.float32))
    assert says in refused(f"{tmp_path / 'd.npz'}{query}", X)


def test_an_input_of_several_that_is_not_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(2, 3), maks=pixels(2, 3))
    said = refused(tmp_path / "d.npz", X, InputSpec("mask", F32, (None, 2, 3)))
    assert "'mask', which is not there (did you mean 'maks'?)" in said


def test_a_model_input_called_labels_is_fed_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(2, 3), labels=LABELS)
    (batch,) = open_data(tmp_path / "d.npz", [X, InputSpec("labels", np.dtype(np.int64), (None, 1))])
    np.testing.assert_array_equal(batch.inputs["labels"], LABELS[:, None])
    assert labels_of([batch]) == LABELS.tolist()


def test_a_scalar_is_the_same_for_all_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(2, 3), keep=np.float32(0.5))
    batches = list(open_data(tmp_path / "d.npz", [X, InputSpec("keep", F32, ())], batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [batch.inputs["keep"].shape for batch in batches] == [(), (), ()]
    assert all(batch.inputs["keep"] == 0.5 for batch in batches)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.array(["a"]), "not numbers (store an array of numbers)"),
        (np.array([{}], object), "holds Python objects, not numbers"),
        (np.float32(1), "the first axis is the samples"),
        (np.zeros((0, 2, 3), np.float32), "has no samples"),
        (np.asfortranarray(pixels(2, 3)), "store numpy.ascontiguousarray(x)"),
        (pixels(2, 3).astype(np.uint8), "is uint8, but input 'x' of the model takes float32 (say how its"),
        (pixels(2, 3).astype(np.complex64), "holds type complex64, not numbers"),
    ],
    ids=["text", "objects", "scalar", "empty", "fortran", "integers", "complex"],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_that_are_no_samples(tmp_path: Path, array: Any, says: str, kind: str) -> None:
    path = tmp_path / f"d.{kind}"
    if kind == "npz":
        np.savez(path, x=array)
    else:
        np.save(path, array)
    assert says in refused(path, X)


def test_one_array_for_a_model_of_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    assert "input 'x' is to be in an array" in refused(tmp_path / "x.npy", X, InputSpec("y", F32, (None,)))


def test_labels_of_another_length(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    np.save(tmp_path / "y.npy", np.append(LABELS, 3))
    said = refused(f"{tmp_path / 'x.npy'}?labels={tmp_path / 'y.npy'}", X)
    assert said == f"{tmp_path / 'y.npy'}: has 11 labels for the 10 samples of {tmp_path / 'x.npy'}"


def labels_end_early(folder: Path, kind: str) -> Any:
    """Ten samples, of which the last three have no label."""
    x, few = pixels(2, 3), LABELS[:7]
    match kind:
        case "npz":
            np.savez(folder / "d.npz", x=x, labels=few)
            return folder / "d.npz"
        case "npy":
            np.save(folder / "x.npy", x)
            np.save(folder / "y.npy", few)
            return f"{folder / 'x.npy'}?labels={folder / 'y.npy'}"
        case "folder":
            np.save(folder / "x.npy", x)
            np.save(folder / "labels.npy", few)
            return folder
        case "pieces":
            return [{"x": x[:6], "labels": few[:6]}, {"x": x[6:], "labels": few[6:]}]
    return {"x": x, "labels": few}


@pytest.mark.parametrize("kind", ["npz", "npy", "folder", "pieces", "arrays"])
def test_labels_may_end_before_the_samples(tmp_path: Path, kind: str) -> None:
    source = labels_end_early(tmp_path, kind)
    batches = list(open_data(source, [X], batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [len(batch.labels) for batch in batches if batch.labels is not None] == [4, 3, 0]
    assert labels_of(batches) == LABELS[:7].tolist()
    if kind in ("npz", "npy"):
        separator = "&" if "?" in str(source) else "?"
        (late,) = open_data(f"{source}{separator}skip=8", [X], batch_size=4)
        assert (len(late), labels_of([late])) == (2, [])


def test_numbers_are_converted_where_nothing_is_lost_but_digits(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3).astype(np.float64))
    np.save(tmp_path / "i.npy", LABELS.astype(np.int64))
    (batch,) = open_data(tmp_path / "x.npy", [X])
    assert batch.inputs["x"].dtype == np.float32
    (batch,) = open_data(tmp_path / "i.npy", [InputSpec("x", np.dtype(np.int32), (None,))])
    assert batch.inputs["x"].dtype == np.int32
    np.save(tmp_path / "i.npy", LABELS + 250)
    assert "holds integers outside of uint8" in refused(
        tmp_path / "i.npy", InputSpec("x", np.dtype(np.uint8), (None,))
    )
    np.save(tmp_path / "x.npy", pixels(2, 3).astype(np.float64) * 1e300)
    assert "holds inf" in refused(tmp_path / "x.npy", X)


def test_bytes_of_another_order_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3).astype(">f4"))
    (batch,) = open_data(tmp_path / "x.npy", [X])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(2, 3))


def test_axes_of_size_one_are_put_right(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    (batch,) = open_data(tmp_path / "x.npy", [InputSpec("x", F32, (None, 1, 2, 3))])
    np.testing.assert_array_equal(batch.inputs["x"][:, 0], pixels(2, 3))
    (batch,) = open_data(tmp_path / "x.npy", [InputSpec("x", F32, (None, 2, None))])
    assert batch.inputs["x"].shape == (10, 2, 3)


def test_other_layouts_are_told_how_to_be_turned(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 5, 3), np.float32))
    said = refused(tmp_path / "x.npy", InputSpec("x", F32, (None, 3, 4, 5)))
    assert said.endswith("takes [3,4,5] (put the channels first: x.transpose(0, 3, 1, 2))")


# -- numbers ----------------------------------------------------------------------------------------------------


def test_scale_mean_and_std(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    np.save(tmp_path / "x.npy", values)
    spec = InputSpec("x", F32, (None, 1))
    (batch,) = open_data(f"{tmp_path / 'x.npy'}?scale=1/255", [spec], batch_size=256)
    np.testing.assert_array_equal(batch.inputs["x"], values / np.float32(255))
    (batch,) = open_data(f"{tmp_path / 'x.npy'}?mean=128&std=128", [spec], batch_size=256)
    np.testing.assert_array_equal(batch.inputs["x"], (values.astype(np.float32) - 128) / 128)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_mean_and_std_of_each_channel(tmp_path: Path, layout: str) -> None:
    x = pixels(2, 4, 2)
    np.save(tmp_path / "x.npy", x)
    axis = 1 if layout == "NCHW" else 3
    shape = [1, 1, 1, 1]
    shape[axis] = 2
    (batch,) = open_data(f"{tmp_path / 'x.npy'}?mean=1,2&std=4,8&layout={layout}")
    np.testing.assert_array_equal(
        batch.inputs["data"], (x - np.reshape([1.0, 2.0], shape)) / np.reshape([4.0, 8.0], shape)
    )
    assert "'mean' has 3 numbers, the array has the shape [10, 2, 4, 2]" in refused(
        f"{tmp_path / 'x.npy'}?mean=1,2,3&layout={layout}"
    )


# -- folders ----------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_taken_in_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("b", 1), ("a", 0), (".c", 9), ("d", 2)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((2, 3), value, np.float32), labels=value)
    (tmp_path / "readme.txt").write_text("no data")
    data = open_data(tmp_path, [X])
    assert inputs_of(list(data))[:, 0, 0].tolist() == [0, 1, 2]
    assert labels_of(list(data)) == [0, 1, 2]


def test_the_labels_of_batches_in_a_folder(tmp_path: Path) -> None:
    for first in (0, 6):
        np.save(tmp_path / f"b{first}.npy", pixels(2, 3)[first : first + 6])
    np.save(tmp_path / "labels.npy", LABELS)
    assert labels_of(list(open_data(tmp_path, [X], batch_size=4))) == LABELS.tolist()
    assert labels_of(list(open_data(f"{tmp_path}?skip=3", [X], batch_size=2))) == LABELS[3:].tolist()


def test_what_a_file_holds_can_be_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2, 3))
    assert open_data(tmp_path).count == 10
    assert open_data(f"{tmp_path}?each=sample").count == 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "in no format that is recognised"),
        ({"a.npy": pixels(2, 3), "b.npz": pixels(2, 3)}, "holds both .npz and .npy files"),
        ({"a.npy": pixels(2, 3)[:3], "labels.npy": LABELS}, "has 10 labels for the 3 samples"),
        ({"a.npy": pixels(2, 3), "b.npy": pixels(5, 3)}, "a sample has the shape [5,3]"),
        ({"a.npz": pixels(2, 3), "b.npz": np.zeros((0, 2, 3)), "c.npz": pixels(2)}, "the model takes [2,3]"),
    ],
    ids=["none", "both", "labels", "shapes", "one sample of another shape"],
)
def test_folders_that_do_not_fit(tmp_path: Path, files: dict[str, Any], says: str) -> None:
    for name, array in files.items():
        (np.savez if name.endswith("z") else np.save)(tmp_path / name, array)
    assert says in refused(tmp_path, X)


def test_samples_of_several_sizes_come_one_by_one(tmp_path: Path) -> None:
    for size in (3, 4):
        np.save(tmp_path / f"{size}.npy", np.zeros((2, size), np.float32))
    spec = InputSpec("x", F32, (None, 2, None))
    shapes = [batch.inputs["x"].shape for batch in open_data(tmp_path, [spec], batch_size=1)]
    assert shapes == [(1, 2, 3), (1, 2, 4)]
    said = refused(tmp_path, spec, batch_size=2)
    assert "samples of the shapes [2, 3], [2, 4] cannot share a batch" in said


# -- MNIST ------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_pair_is_enough(tmp_path: Path) -> None:
    mnist(tmp_path, pixels(1, 2, 3))
    (batch,) = open_data(tmp_path)
    assert batch.inputs["data"].shape == (10, 1, 2, 3)
    assert labels_of([batch]) == LABELS.tolist()


def test_pixels_as_they_are(tmp_path: Path) -> None:
    source, _ = mnist(tmp_path, pixels(1, 2, 3))
    (batch,) = open_data(f"{source}?scale=1")
    np.testing.assert_array_equal(batch.inputs["data"], pixels(1, 2, 3))


def test_two_pairs_in_a_folder_need_a_choice(tmp_path: Path) -> None:
    mnist(tmp_path, pixels(1, 2, 3))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(2051, pixels(2, 3)))
    said = refused(tmp_path)
    assert "are t10k-images-idx3-ubyte, train-images-idx3-ubyte (name one)" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx(2049, LABELS), "holds labels (idx1) where images (idx3) are expected, which start with 00000803"),
        (idx(2050, pixels(2, 3)), "starts with 00000802 where images"),
        (struct.pack(">4i", 2051, -1, 2, 3), "says it has the shape [-1, 2, 3]"),
        (struct.pack(">4i", 2051, 1, 2, 0), "says it has the shape [1, 2, 0]"),
        (struct.pack(">4i", 2051, 0, 2, 3), "has 10 labels for the 0 images"),
        (idx(2051, pixels(2, 3)[:9]), "has 10 labels for the 9 images"),
    ],
    ids=["labels", "magic", "count", "size", "empty", "fewer"],
)
def test_files_that_are_no_images_of_mnist(tmp_path: Path, content: bytes, says: str) -> None:
    source, images = mnist(tmp_path, pixels(1, 2, 3))
    images.write_bytes(content)
    assert says in refused(f"{source}?format=mnist")


@pytest.mark.parametrize("which", ["images", "labels"])
def test_a_compressed_file_that_goes_on(tmp_path: Path, which: str) -> None:
    source, images = mnist_gzip(tmp_path, pixels(1, 2, 3))
    file = images if which == "images" else images.with_name("t10k-labels-idx1-ubyte.gz")
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + b"\0"))
    assert refused(source) == f"{file}: goes on behind its samples (copy it again)"


def test_labels_given_by_hand(tmp_path: Path) -> None:
    source, images = mnist(tmp_path, pixels(1, 2, 3))
    (tmp_path / "other").write_bytes(idx(2049, LABELS[::-1]))
    (batch,) = open_data(f"{source}?labels={tmp_path / 'other'}")
    assert labels_of([batch]) == LABELS[::-1].tolist()
    assert "holds images (idx3) where labels" in refused(f"{source}?labels={images}")


# -- TensorRT ---------------------------------------------------------------------------------------------------


def test_the_prefix_of_batch_files_is_a_path_too(tmp_path: Path) -> None:
    tensorrt(tmp_path, pixels(1, 2, 3))
    (tmp_path / "notes").write_text("no batch")
    for source in (tmp_path / "batch", f"{tmp_path}?prefix=batch&suffix="):
        assert labels_of(list(open_data(source, batch_size=10))) == LABELS.tolist()


def test_files_are_taken_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"b{number}.batch").write_bytes(batch_file(np.full((1, 1, 1, 1), number), None))
    data = open_data(tmp_path, batch_size=5)
    assert inputs_of(list(data), "data").ravel().tolist() == list(range(10))
    assert data.notes == (f"2 samples at the end of {tmp_path} fill no batch of 5",)
    assert next(iter(data)).labels is None


def test_fewer_samples_than_a_batch_are_a_batch(tmp_path: Path) -> None:
    tensorrt(tmp_path, pixels(1, 2, 3))
    assert [len(batch) for batch in open_data(tmp_path, batch_size=32)] == [10]
    assert [len(batch) for batch in open_data(tmp_path, batch_size=32, samples=7)] == [7]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "batch1").unlink(), "'batch1' is missing, 'batch2' is there"),
        (
            lambda folder: (folder / "x0.batch").write_bytes(b""),
            "several series of batch files: 'batch0', 'x0.batch'",
        ),
        (lambda folder: (folder / "batch1").write_bytes(b""), "batch1: is cut short within its header"),
        (
            lambda folder: (folder / "batch1").write_bytes(struct.pack("<4i", 1, 0, 2, 3)),
            "batch1: says it has the shape [1, 0, 2, 3]",
        ),
        (
            lambda folder: (folder / "batch1").write_bytes(batch_file(pixels(2, 2, 3), LABELS)),
            "samples of the shape [2, 2, 3] with labels, batch0 has samples of the shape [1, 2, 3] with labels",
        ),
        (
            lambda folder: (folder / "batch1").write_bytes(batch_file(pixels(1, 2, 3), None)),
            "[1, 2, 3] without labels, batch0 has samples of the shape [1, 2, 3] with labels",
        ),
        (
            lambda folder: (folder / "batch1").write_bytes(batch_file(pixels(1, 2, 3), LABELS[:9])),
            "has 292 bytes; its header [10, 1, 2, 3] wants 256, or 296 with labels (10 samples are whole)",
        ),
    ],
    ids=["gap", "two series", "empty", "shape", "other shape", "unlabelled", "fewer labels"],
)
def test_batch_files_that_do_not_fit(tmp_path: Path, change: Any, says: str) -> None:
    tensorrt(tmp_path, pixels(1, 2, 3))
    change(tmp_path)
    assert says in refused(tmp_path)


def test_no_such_series(tmp_path: Path) -> None:
    tensorrt(tmp_path, pixels(1, 2, 3))
    assert "holds no batch files, such as 'bach0'" in refused(f"{tmp_path}?prefix=bach")


# -- Paddle -----------------------------------------------------------------------------------------------------


def test_the_size_of_images_is_inferred_given_or_the_models(tmp_path: Path) -> None:
    source, _ = paddle(tmp_path, pixels(3, 4, 4))
    for query, specs in (("", None), ("?dim=4", None), ("", [InputSpec("x", F32, (None, 3, 4, 4))])):
        (batch,) = open_data(f"{source}{query}", specs)
        np.testing.assert_array_equal(next(iter(batch.inputs.values())), pixels(3, 4, 4))
    source, _ = paddle(tmp_path, pixels(3, 2, 8))
    (batch,) = open_data(source, [InputSpec("x", F32, (None, 3, 2, 8))])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(3, 2, 8))
    assert "a sample has the shape [3,4,4]" in refused(source, InputSpec("x", F32, (None, 3, 4, 5)))


@pytest.mark.parametrize(
    ("content", "query", "says"),
    [
        (struct.pack("<q", 0), "", "has no samples"),
        (struct.pack("<q", -5) + bytes(90), "", "says it has -5 images and has 98 bytes"),
        (struct.pack("<q", 2) + bytes(90), "", "has 98 bytes, which are not 2 square images of 3 channels"),
        (struct.pack("<q", 1) + bytes(60), "?dim=4", "1 images of [3, 4, 4] with labels need 208"),
        (struct.pack("<q", 1) + bytes(48) + struct.pack("<q", -1), "", "sample 0: the label is -1"),
    ],
    ids=["empty", "count", "size", "dim", "label"],
)
def test_binaries_that_are_not_paddles(tmp_path: Path, content: bytes, query: str, says: str) -> None:
    (tmp_path / "val.bin").write_bytes(content)
    assert says in refused(f"{tmp_path / 'val.bin'}{query}")


# -- Python -----------------------------------------------------------------------------------------------------


class Reader:
    """The shape of onnxruntime's calibration readers."""

    def __init__(self) -> None:
        self.rest = list(pixels(2, 3))

    def get_next(self) -> dict[str, Any] | None:
        return {"x": self.rest.pop(0)[None]} if self.rest else None


@pytest.mark.parametrize(
    "source",
    [
        pixels(2, 3),
        {"x": pixels(2, 3), "labels": LABELS},
        [{"x": pixels(2, 3)[:7]}, {"x": pixels(2, 3)[7:]}],
        [(pixels(2, 3), LABELS)],
        [{"x": sample[None]} for sample in pixels(2, 3)],
        lambda: iter([{"x": pixels(2, 3)}]),
        lambda: Reader(),
    ],
    ids=["array", "arrays", "dicts", "pairs", "samples", "function", "get_next"],
)
def test_python_data_are_read_again_and_again(source: Any) -> None:
    data = open_data(source, [X], batch_size=4)
    for _ in range(2):
        batches = list(data)
        assert [(len(batch), batch.first) for batch in batches] == [(4, 0), (4, 4), (2, 8)]
        np.testing.assert_array_equal(inputs_of(batches), pixels(2, 3))
    assert data.count in (10, None)


@pytest.mark.parametrize("source", [iter([{"x": pixels(2, 3)}]), Reader()], ids=["iterator", "get_next"])
def test_what_can_be_gone_through_once_says_so_the_second_time(source: Any) -> None:
    data = open_data(source, [X])
    assert sum(map(len, data)) == 10
    with pytest.raises(DataError, match="can be gone through once only"):
        list(data)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "has no samples"),
        ([{}], "item 0: is an empty dict"),
        ([{"x": "text"}], "item 0: array 'x': of type str, is no array of numbers"),
        ([{"x": [[1], [1, 2]]}], "array 'x': is no array"),
        ([{"x": pixels(2, 3)}, {"y": pixels(2, 3), "z": pixels(2, 3)}], "item 1: holds the arrays 'y', 'z'"),
        ([{"x": pixels(2, 3)[:3], "labels": LABELS}], "different numbers of samples: 'labels' 10, 'x' 3"),
        ([{"x": pixels(2, 3), "labels": LABELS[:3]}, {"x": pixels(2, 3), "labels": LABELS}], "has labels again"),
        ([{"x": pixels(2, 3), "labels": LABELS}, {"x": pixels(2, 3)}], "sample 10 has no label, others have"),
        ([{"x": pixels(2, 3), "labels": 3}], "array 'labels': is one number"),
        (7, "an object of type int is no data"),
        ([7], "no array has an axis of samples"),
        (lambda: 1 // 0, "its code failed: ZeroDivisionError"),
        ((1 // 0 for _ in "a"), "its code failed: ZeroDivisionError"),
        ([{"x": np.full((1, 2, 3), np.nan, np.float32)}], "holds nan at [0, 0] and 5 more like it"),
    ],
)
def test_python_data_that_are_none(source: Any, says: str) -> None:
    assert says in refused(source, X)


def test_a_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\nNUMBER = 3\ndef make():\n    return [{'x': np.ones((2, 2, 3), np.float32)}]\n"
        "class Inner:\n    @staticmethod\n    def make():\n        return make()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("make", "Inner.make"):
        assert sum(map(len, open_data(f"my_samples:{name}", [X]))) == 2
    assert refused("my_samples:mkae", X) == "my_samples:mkae: 'mkae' is not in it (name it as module:function)"
    assert refused("my_samples:NUMBER", X) == "my_samples:NUMBER: is of type int, no function"
    assert "there is no module 'my_sample'" in refused("my_sample:make", X)


# -- batches ----------------------------------------------------------------------------------------------------


def test_a_model_with_a_fixed_batch_decides(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    data = open_data(tmp_path / "x.npy", [InputSpec("x", F32, (4, 2, 3))], batch_size=32)
    assert (data.batch_size, data.count, [len(batch) for batch in data]) == (4, 8, [4, 4])
    assert data.notes == (f"2 samples at the end of {tmp_path / 'x.npy'} fill no batch of 4",)
    assert "10 samples do not fill a batch of 11" in refused(tmp_path / "x.npy", InputSpec("x", F32, (11, 2, 3)))
    pair = (InputSpec("x", F32, (4, 2, 3)), InputSpec("y", F32, (3,)))
    assert "first dimensions of the model's inputs differ: 'x' 4, 'y' 3" in refused({"x": 1}, *pair)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "a batch of 0 samples is none"),
        ({"samples": 0}, "0 samples are none"),
    ],
)
def test_numbers_that_are_none(options: dict[str, int], says: str) -> None:
    assert says in refused({"x": pixels(2, 3)}, X, **options)


def test_fewer_samples_than_asked_for_are_told_of(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    data = open_data(tmp_path / "x.npy", [X], samples=50)
    assert data.notes == (f"{tmp_path / 'x.npy'} has 10 samples where 50 were asked for",)
    assert "has 10 samples, all of which are skipped" in refused(f"{tmp_path / 'x.npy'}?skip=10", X)


@pytest.mark.parametrize(
    ("index", "of", "says"), [(0, 2, "no shard 0 of 2"), (3, 2, "no shard 3"), (1, 20, "cut into")]
)
def test_shards_that_are_none(tmp_path: Path, index: int, of: int, says: str) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    with pytest.raises(DataError, match=says):
        open_data(tmp_path / "x.npy", [X], batch_size=4).shard(index, of)
    with pytest.raises(DataError, match="number of its samples is not known"):
        open_data([{"x": pixels(2, 3)}], [X]).shard(1, 2)


# -- how data are described -------------------------------------------------------------------------------------


def test_a_yaml_file_says_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    np.savez(folder / "d.npz", a=pixels(2, 3).astype(np.uint8), b=LABELS)
    (folder / "data.yaml").write_text("path: d.npz\ninputs: {x: a}\nlabels: b\nscale: 1/255\nskip: 4\n")
    (batch,) = open_data(folder / "data.yaml", [X])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(2, 3)[4:] / np.float32(255))
    assert (batch.first, labels_of([batch])) == (4, LABELS[4:].tolist())
    (batch,) = open_data({"path": str(folder / "d.npz"), "inputs": "a", "scale": 1}, [X])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(2, 3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path: x.npy\nscal: 1\n", "data.yaml:2: unknown key 'scal' (did you mean 'scale'?)"),
        ("path: x.npy\nscale: much\n", "data.yaml:2: scale: Value error, 'much' is not a number"),
        ("scale: 1\n", "data.yaml: the key 'path' is missing"),
        ("path: x.npy\nstd: [1, 0]\n", "'std' is 0"),
        ("- path", "a mapping is expected"),
    ],
)
def test_yaml_that_says_nothing(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    assert says in refused(tmp_path / "data.yaml", X)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("?scal=1", "unknown key 'scal' (did you mean 'scale'?)"),
        ("?scale=1/0", "scale: '1/0' is not a number"),
        ("?scale=nan", "scale: 'nan' is not a number"),
        ("?scale", "'scale' is not key=value"),
        ("?scale=1&scale=2", "the key 'scale' is given twice"),
        ("?std=0", "'std' is 0"),
        ("?skip=-1", "skip: Input should be greater than or equal to 0"),
        ("?crop=224", "the key 'crop' means nothing for data of the format 'npy' (it is for images)"),
        ("?format=nyp", "format: Input should be 'npz', 'npy'"),
        ("?crop=1,2,3", "one size, or height and width, is expected"),
    ],
)
def test_queries_that_say_nothing(tmp_path: Path, query: str, says: str) -> None:
    np.save(tmp_path / "x.npy", pixels(2, 3))
    assert says in refused(f"{tmp_path / 'x.npy'}{query}", X)


def test_a_question_mark_in_the_name_of_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x?scale=3.npy", pixels(2, 3))
    (batch,) = open_data(f"{tmp_path}/x?scale=3.npy", [X])
    np.testing.assert_array_equal(batch.inputs["x"], pixels(2, 3))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npz", b"", "is an empty file"),
        ("x.npz", b"no zip at all", "is damaged or cut short: File is not a zip file"),
        ("x.npy", b"no array at all", "is not an array of numpy"),
        ("x.data", b"something", "is in no format that is recognised"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refused(tmp_path / name, X)
    assert refused(tmp_path / "none.npz", X) == f"{tmp_path / 'none.npz'}: no such file or folder"


def test_of_a_large_file_only_what_is_needed_is_read(tmp_path: Path) -> None:
    samples = 2**21
    with (tmp_path / "large.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (samples, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + samples * 4096)  # eight gigabytes that take no room on the disk
    data = open_data(f"{tmp_path / 'large.npy'}?skip={samples - 64}", batch_size=32)
    tracemalloc.start()
    assert [batch.first for batch in data] == [samples - 64, samples - 32]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 32 * 4096
