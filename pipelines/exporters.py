"""Which toolkit quantized a model: what its names, domains and producer give away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.paddle_ops import is_paddle
from qat2int8.passes.read_openvino_fake_quantize import OPENVINO_DOMAIN
from qat2int8.passes.read_qonnx_quant import QONNX_DOMAINS

__all__ = ["exporter_of"]


@dataclass(frozen=True)
class _Signs:
    """What a file shows: its producer, and all names of nodes and tensors as one text, a name a line."""

    producer: str
    nodes: tuple[oir.Node, ...]
    names: str

    def named(self, *parts: str) -> bool:
        """Whether some name contains one of ``parts``."""
        return any(part in self.names for part in parts)


_Test = Callable[[_Signs], bool]

_TOOLKITS: tuple[tuple[str, _Test], ...] = (
    ("AMD Quark", lambda signs: signs.producer.startswith("quark")),
    ("onnxruntime quantize_static", lambda signs: signs.producer.startswith("onnx.quantize")),
    ("Brevitas", lambda signs: any(node.domain in QONNX_DOMAINS for node in signs.nodes)),
    ("Brevitas", lambda signs: signs.named("export_handler")),
    ("NNCF", lambda signs: signs.named("__nncf_hooks", "nncf_module")),
    ("NNCF", lambda signs: any((n.domain, n.op_type) == (OPENVINO_DOMAIN, "FakeQuantize") for n in signs.nodes)),
    ("NVIDIA Model Optimizer", lambda signs: signs.named("input_quantizer", "weight_quantizer")),
    ("PaddlePaddle", lambda signs: any(is_paddle(node) for node in signs.nodes)),
    ("PaddlePaddle", lambda signs: not signs.producer and signs.named("helper.constant.", "p2o.")),
    ("TensorFlow", lambda signs: signs.producer.startswith("tf2onnx")),
    (
        "PyTorch torch.ao",
        lambda signs: signs.named("activation_post_process", "weight_fake_quant", "fake_quantize_per_"),
    ),
    ("PyTorch PT2E", lambda signs: signs.named("quantize_per_tensor", "quantize_per_channel")),
    ("PyTorch", lambda signs: signs.producer.startswith("pytorch")),
)
"""Tried in this order: an exporter of PyTorch leaves its own marks on what other toolkits prepared."""


def exporter_of(model: Model) -> str:
    """The toolkit that quantized ``model`` as far as the file tells; empty where it does not.

    Only its marks are looked at. A model without any fake quant is named after what wrote the file.
    """
    nodes = tuple(model.graph.all_nodes())
    signs = _Signs(model.ir.producer_name or "", nodes, "\n".join(_names(model, nodes)))
    return next((name for name, is_it in _TOOLKITS if is_it(signs)), "")


def _names(model: Model, nodes: tuple[oir.Node, ...]) -> Iterator[str]:
    yield from model.graph.initializers
    for node in nodes:
        yield node.name or ""
        yield from (value.name or "" for value in node.outputs)
