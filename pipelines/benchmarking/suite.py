"""Eight networks that INT8 figures are commonly published for, measured in every form that can be had here."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from qat2int8.ir import DataError
from qat2int8.pipelines.benchmarking import bert, networks, peer
from qat2int8.pipelines.benchmarking.builder import Builder
from qat2int8.pipelines.benchmarking.child import Cost, measured_command
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.benchmarking.pinning import pinned
from qat2int8.pipelines.benchmarking.published import PUBLISHED, Published
from qat2int8.pipelines.benchmarking.sketch import Array
from qat2int8.pipelines.benchmarking.stopwatch import Runs, caller, interleave, speedup
from qat2int8.pipelines.target_files import NATIVE

__all__ = [
    "EXPORTED",
    "FLOAT",
    "OPENVINO",
    "OURS",
    "QUICK",
    "STATIC",
    "STYLES",
    "SUITE",
    "Network",
    "Result",
    "chosen_networks",
    "measure",
    "peers",
]

FLOAT, EXPORTED, OURS = "float", "as exported", "qat2int8"
STATIC, OPENVINO = "quantize_static", "openvino"

STYLES = {
    "layer-inputs": "int8 fake quant on inputs and weights of layers only, as TensorRT's toolkits export it",
    "every-tensor": "uint8 fake quant behind layers too, after Relu, as PyTorch exports it",
}


Write: TypeAlias = Callable[[str | None], onnx.ModelProto]


@dataclass(frozen=True)
class Network:
    """How to build one network and what it is fed with.

    Attributes:
        title: for people.
        draw: makes the weights, once; what it returns writes the form in a style, None for the float form.
        samples: inputs for it, by count and seed.
        unit: what one of them is.
        calibration: how many of them quantize_static sees.
    """

    title: str
    draw: Callable[[], Write]
    samples: Callable[[int, int], Array]
    unit: str = "image"
    calibration: int = 8


def _pictures(title: str, build: Builder[...]) -> Network:
    def draw() -> Write:
        drawn = build.drawn()

        def write(style: str | None) -> onnx.ModelProto:
            if style is None:
                return drawn.write(fake_quant=False, bn_folded=True)
            return drawn.write(every_tensor=style == "every-tensor")

        return write

    return Network(title, draw, lambda count, seed: images(count, 224, seed))


def _ernie() -> Network:
    def draw() -> Write:
        drawn = bert.drawn()
        return lambda style: drawn.write(fake_quant=style is not None, every_tensor=style == "every-tensor")

    return Network("ERNIE", draw, lambda count, seed: bert.tokens(count, seed=seed), "sequence", 2)


SUITE: dict[str, Network] = {
    "googlenet": _pictures("GoogleNet", networks.googlenet),
    "mobilenet_v1": _pictures("MobileNet-V1", networks.mobilenet_v1),
    "mobilenet_v2": _pictures("MobileNet-V2", networks.mobilenet_v2),
    "resnet50": _pictures("ResNet-50", networks.resnet50),
    "resnet101": _pictures("ResNet-101", networks.resnet101),
    "vgg16": _pictures("VGG-16", networks.vgg16),
    "vgg19": _pictures("VGG-19", networks.vgg19),
    "ernie": _ernie(),
}
QUICK = ("googlenet", "mobilenet_v1", "mobilenet_v2", "resnet50")
"""Those that take seconds each."""


@dataclass(frozen=True)
class Result:
    """What was measured of one network.

    Attributes:
        network: its name in :data:`SUITE`.
        style: how the fake-quant form was written.
        runs: seconds a call by contender, one for each round.
        costs: of making the integer model, by contender that makes one.
        left_out: why a peer did not take part, by peer.
        core: all of it was timed on, None where the system does not pin.
    """

    network: str
    style: str
    runs: Runs
    costs: dict[str, Cost]
    left_out: dict[str, str]
    core: int | None

    @property
    def title(self) -> str:
        return SUITE[self.network].title

    @property
    def published(self) -> Published | None:
        return PUBLISHED.get(self.network)

    def milliseconds(self, contender: str) -> float:
        """Median over rounds."""
        return 1000 * statistics.median(self.runs[contender])

    def speedup(self, contender: str) -> float:
        """Against the float network: the median over rounds of the ratio within a round."""
        return speedup(self.runs, contender, FLOAT)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        contenders = {
            name: {"milliseconds": self.milliseconds(name), "speedup": self.speedup(name), "seconds": times}
            for name, times in self.runs.items()
        }
        return {
            "network": self.network,
            "style": self.style,
            "unit": SUITE[self.network].unit,
            "contenders": contenders,
            "conversion": {name: asdict(cost) for name, cost in self.costs.items()},
            "published": asdict(self.published) if self.published else None,
            "left_out": self.left_out,
            "core": self.core,
        }


def chosen_networks(names: Sequence[str], *, quick: bool) -> list[str]:
    """The networks to measure, in the order of :data:`SUITE`.

    Raises:
        DataError: there is none of a name.
    """
    for name in names:
        if name not in SUITE:
            raise DataError(f"no network is called '{name}'", remedy=f"there are {', '.join(SUITE)}")
    wanted = names or (QUICK if quick else list(SUITE))
    return [name for name in SUITE if name in wanted]


def peers() -> list[str]:
    """What else is installed here that makes or runs integer models."""
    return [STATIC, *([OPENVINO] if find_spec("openvino") else [])]


def measure(
    name: str,
    style: str,
    *,
    rounds: int,
    repeat: int,
    against: Sequence[str],
    tell: Callable[[str], object] = lambda doing: None,
) -> Result:
    """Build one network, convert it, and time its forms in turns, on one thread that keeps to one core.

    A peer that fails is left out; its error is told.

    Args:
        against: names of :func:`peers`.
        tell: told what is being done, before it is done.

    Raises:
        Qat2Int8Error: the network could not be converted.
    """
    network = SUITE[name]
    costs: dict[str, Cost] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="qat2int8-bench-") as place:
        paths = {form: Path(place) / f"{form.replace(' ', '_')}.onnx" for form in (FLOAT, EXPORTED, OURS, STATIC)}
        tell("building")
        _build(network, style, paths)
        tell("converting")
        # For this machine: a model whose numbers are wrong here is no contender.
        words = ("convert", str(paths[EXPORTED]), "-o", str(paths[OURS]), "--target", NATIVE, "--quiet")
        costs[OURS] = measured_command([sys.executable, "-m", "qat2int8", *words])
        if STATIC in against:
            tell(STATIC)
            with _left_out(STATIC, left_out):
                samples = network.samples(network.calibration, 1)
                costs[STATIC] = peer.cost_of(samples, paths[FLOAT], paths[STATIC])
        tell("timing")
        sample = network.samples(1, 2)
        with pinned() as core:
            contenders = {form: caller(paths[form], sample) for form in (FLOAT, EXPORTED, OURS)}
            if STATIC in costs:
                contenders[STATIC] = caller(paths[STATIC], sample)
            if OPENVINO in against:
                with _left_out(OPENVINO, left_out):
                    contenders[OPENVINO] = peer.openvino_caller(paths[EXPORTED], sample)
            runs = interleave(contenders, rounds=rounds, repeat=repeat)
    return Result(name, style, runs, costs, left_out, core)


def _build(network: Network, style: str, paths: Mapping[str, Path]) -> None:
    """Draw and write a network; when this returns, nothing of it is in memory any more."""
    write = network.draw()
    onnx.save(write(None), paths[FLOAT])
    onnx.save(write(style), paths[EXPORTED])


@contextmanager
def _left_out(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """Go on without a peer that fails; peers raise what they like."""
    try:
        yield
    except Exception as error:
        reasons[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
