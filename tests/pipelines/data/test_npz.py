"""``.npz`` files: names, shapes and types against the model, in pieces, and damaged in every way."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat2int8.ir import DataError
from qat2int8.pipelines.data import Batch, InputSpec, open_data

F32 = np.dtype(np.float32)
X = InputSpec("x", F32, (None, 3, 4))


def numbers(count: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)


def joined(batches: list[Batch], name: str = "x") -> np.ndarray[Any, Any]:
    return np.concatenate([batch.inputs[name] for batch in batches])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_hold_all_samples_in_order(tmp_path: Path, save: Any) -> None:
    x = numbers(10, 3, 4)
    save(tmp_path / "d.npz", x=x, labels=np.arange(10), unused=np.zeros(3))
    data = open_data(tmp_path / "d.npz", [X], batch_size=4)
    for _ in range(2):
        batches = list(data)
        assert [(len(batch), batch.first) for batch in batches] == [(4, 0), (4, 4), (2, 8)]
        np.testing.assert_array_equal(joined(batches), x)
        labels = [label for batch in batches if batch.labels is not None for label in batch.labels]
        assert labels == list(range(10))
    assert data.count == 10


def test_a_single_array_fits_a_single_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=numbers(2, 3, 4), labels=[0, 1])
    (batch,) = open_data(tmp_path / "d.npz", [X], batch_size=8)
    np.testing.assert_array_equal(batch.inputs["x"], numbers(2, 3, 4))


@pytest.mark.parametrize("length", range(0, 900, 13))
def test_a_file_cut_short_anywhere_is_an_error(tmp_path: Path, length: int) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=numbers(10, 3, 4), labels=np.arange(10))
    content = buffer.getvalue()
    (tmp_path / "d.npz").write_bytes(content[: min(length, len(content) - 1)])
    with pytest.raises(DataError, match=r"d\.npz"):
        list(open_data(tmp_path / "d.npz", [X]))
