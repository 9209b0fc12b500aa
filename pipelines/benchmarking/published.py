"""Figures published for INT8 inference on one core of a Xeon Gold 6271, which has VNNI."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "PUBLISHED_ON", "Published"]

PUBLISHED_ON = "Xeon Gold 6271"


@dataclass(frozen=True)
class Published:
    """Images a second, or milliseconds a sequence where ``latency``; ``ratio`` as printed, rounded there."""

    fp32: float
    int8: float
    ratio: float
    latency: bool = False


PUBLISHED = {
    "resnet50": Published(13.15, 49.33, 3.75),
    "resnet101": Published(7.15, 26.69, 3.73),
    "mobilenet_v1": Published(73.98, 227.73, 3.08),
    "mobilenet_v2": Published(86.59, 206.74, 2.39),
    "vgg16": Published(3.34, 10.15, 3.04),
    "vgg19": Published(2.83, 8.67, 3.07),
    "ernie": Published(236.72, 83.20, 2.85, latency=True),
}
"""From the documentation of PaddleSlim and Paddle Inference; none is published for GoogleNet."""
