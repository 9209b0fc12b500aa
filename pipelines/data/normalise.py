"""From stored numbers to the numbers a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError

__all__ = ["IMAGENET", "Normalise"]


@dataclass(frozen=True)
class Normalise:
    """``(value * scale - mean) / std``, in float64, rounded once to float32.

    Attributes:
        mean: one number, or one a channel.
        std: likewise; not 0.
        channels_last: whether the channels are the last axis; else they are the one behind the samples.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels_last: bool = False

    def __call__(self, array: npt.NDArray[Any], where: str) -> npt.NDArray[np.float32]:
        """The numbers of ``array``, whose first axis is the samples.

        Raises:
            DataError: the array has other channels than ``mean`` and ``std``.
        """
        values = array.astype(np.float64)
        values *= self.scale
        values -= self._spread(self.mean, values.shape, "mean", where)
        values /= self._spread(self.std, values.shape, "std", where)
        return values.astype(np.float32)

    def _spread(
        self, numbers: tuple[float, ...], shape: tuple[int, ...], key: str, where: str
    ) -> npt.NDArray[np.float64]:
        each = np.asarray(numbers, np.float64)
        if each.size == 1:
            return each.reshape(())
        axis = len(shape) - 1 if self.channels_last else 1
        if len(shape) <= axis or axis < 1 or shape[axis] != each.size:
            raise DataError(
                f"'{key}' has {each.size} numbers, the array has the shape {list(shape)}",
                where=where,
                remedy="give one number, or one a channel, and say with 'layout' where the channels are",
            )
        spread = [1] * len(shape)
        spread[axis] = each.size
        return each.reshape(spread)


IMAGENET = Normalise(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What networks trained on ImageNet with torchvision, PaddlePaddle and others want of pixels in RGB order."""
