"""Models that onnxruntime computes wrongly or cannot run as they were exported, and what becomes of them here.

Each trap is shown to be one first: with the runtime's default optimisation the source gives other numbers than
node by node, or none. The converted model, run with default optimisation, has to give the source's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from support import Feeds, run

import qat2int8
from qat2int8.ir import Code, UnsupportedModel
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.sessions import session

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (4, 16)).astype(np.float32)
IMAGE = RNG.normal(0, 1, (1, 16, 5, 5)).astype(np.float32)
STEP = 1 / 4
CONSTANTS: dict[str, Array] = {
    "xs": np.float32(1 / 32),
    "xz": np.uint8(128),
    "ws": np.float32(1 / 64),
    "wz": np.int8(0),
    "ys": np.float32(STEP),
    "yz": np.uint8(128),
    "W": RNG.integers(-127, 128, (16, 8)).astype(np.int8),
    "K": RNG.integers(-127, 128, (8, 16, 1, 1)).astype(np.int8),
    "W2": RNG.integers(-30, 31, (8, 8)).astype(np.int8),
    "B": RNG.integers(-3000, 3000, 8).astype(np.int32),
    "columns": np.linspace(0.01, 0.02, 8).astype(np.float32),
    "zeros": np.zeros(8, np.int8),
}
INPUT = "[xq] xq = QuantizeLinear (x, xs, xz) [xd] xd = DequantizeLinear (xq, xs, xz)"
LAYER = f"{INPUT} [wd] wd = DequantizeLinear (W, ws, wz)"
CONV = f"{INPUT} [kd] kd = DequantizeLinear (K, ws, wz)"
OUTPUT = "[yq] yq = QuantizeLinear (o, ys, yz) [yd] y = DequantizeLinear (yq, ys, yz)"
FLOAT_OUTPUT = "[neg] y = Neg (o)"


@dataclass(frozen=True)
class Trap:
    """A source, and how it is told that its numbers are right.

    Attributes:
        step: of the output's grid; where it has none, what counts as float rounding.
        fails: whether the runtime cannot even run the source, instead of giving wrong numbers.
        codes: the findings that tell the user.
        executed: what has to be in the graph that is executed in the end.
        never: what must not.
    """

    body: str
    constants: Mapping[str, Array] = field(default_factory=dict)
    step: float = STEP
    image: bool = False
    fails: bool = False
    opset: int = 17
    skip: tuple[str, ...] = ()
    codes: tuple[Code, ...] = ()
    executed: tuple[str, ...] = ()
    never: tuple[str, ...] = ("MatMulNBits",)

    def source(self) -> onnx.ModelProto:
        shapes = ("1,16,5,5", "1,8,5,5") if self.image else ("4,16", "4,8")
        header = f'<ir_version: {8 if self.opset < 19 else 10}, opset_import: ["" : {self.opset}]>'
        model = onnx.parser.parse_model(
            f"{header} g (float[{shapes[0]}] x) => (float[{shapes[1]}] y) {{ {self.body} }}"
        )
        read = {name for node in model.graph.node for name in node.input}
        constants = {**CONSTANTS, **self.constants}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(constants[name]), name) for name in sorted(read & constants.keys())
        )
        return model

    @property
    def feeds(self) -> Feeds:
        return {"x": IMAGE if self.image else X}


def gemm(bias: str, output: str = OUTPUT) -> str:
    return f"{LAYER} {bias} [layer] o = Gemm (xd, wd, b) {output}"


def conv(bias: str) -> str:
    return f"{CONV} {bias} [layer] o = Conv (xd, kd, b) {OUTPUT}"


BIAS = "[bd] b = DequantizeLinear <axis = 0> (B, bs)"
BIAS_WITH_ZERO = "[bd] b = DequantizeLinear <axis = 0> (B, bs, bz)"
PRODUCT = np.float32(1 / 32 / 64)
CHANNELS = (np.linspace(1, 4, 8) * PRODUCT).astype(np.float32)
SECOND = "[h] h = Erf (o) [vd] vd = DequantizeLinear <axis = 1> (W2, columns, zeros)"
FIRST = f"""{LAYER} [first] f = MatMul (xd, wd)
    [hq] hq = QuantizeLinear (f, ys, yz) [hd] h = DequantizeLinear (hq, ys, yz)"""
FIRST_CONV = f"""{CONV} [first] f = Conv (xd, kd)
    [hq] hq = QuantizeLinear (f, ys, yz) [hd] h = DequantizeLinear (hq, ys, yz)"""
BLOCKS = np.stack([np.linspace(0.01, 0.02, 8), np.linspace(0.03, 0.01, 8)]).astype(np.float32)
FLOAT8 = ml_dtypes.float8_e4m3fn
MIB = 1 << 20
OUTLIER = np.asarray([40] + [1] * 7).reshape(8, 1, 1, 1)


def huge(bias: float) -> Trap:
    """A float bias that does not fit int32 at the step it gets."""
    values = np.full(8, bias, np.float32)
    values[1::2] = -bias / 3
    constants = {"b": values, "ws": np.float32(1e-8), "ys": np.float32(bias / 100)}
    return Trap(gemm(""), constants, bias / 100, codes=(Code.BIAS_OVERFLOW,), executed=("QGemm",))


def near_the_wrap(body: str, *, image: bool) -> Trap:
    """An int32 bias that fits, and products that do not fit beside it."""
    constants = {"B": np.full(8, 2**31 - 1000, np.int32), "bs": PRODUCT, "ys": np.float32(MIB / 100)}
    return Trap(body, constants, MIB / 100, image, codes=(Code.BIAS_OVERFLOW,))


WRONG: dict[str, Trap] = {
    "gemm bias of twice the step": Trap(gemm(BIAS), {"bs": 2 * PRODUCT}, executed=("QGemm",)),
    "gemm bias of twice the step, float output": Trap(
        gemm(BIAS, FLOAT_OUTPUT), {"bs": 2 * PRODUCT}, 0.001, executed=("QGemm",)
    ),
    "gemm bias with a zero point": Trap(
        gemm(BIAS_WITH_ZERO), {"bs": PRODUCT, "bz": np.int32(2000)}, executed=("QGemm",)
    ),
    "gemm bias with a step per channel, weight without": Trap(gemm(BIAS), {"bs": CHANNELS}, executed=("QGemm",)),
    "gemm bias one percent off": Trap(
        gemm(BIAS, FLOAT_OUTPUT),
        {"bs": np.float32(1.009) * PRODUCT, "B": CONSTANTS["B"] * 300},
        0.001,
        executed=("QGemm",),
    ),
    "conv bias one percent off": Trap(
        conv(BIAS),
        {"bs": np.float32(1.009) * PRODUCT, "B": CONSTANTS["B"] * 300, "ys": np.float32(4)},
        2,  # one per cent of 128 levels is one level, so it has to be exact
        image=True,
        executed=("QLinearConv",),
    ),
    "bias of 1e3": huge(1e3),
    "bias of 1e6": huge(1e6),
    "gemm accumulator near the wrap": near_the_wrap(gemm(BIAS), image=False),
    "conv accumulator near the wrap": near_the_wrap(conv(BIAS), image=True),
    "float weight between quantizers": Trap(
        f"""{FIRST_CONV} [layer] l = Conv (h, floats)
        [lq] lq = QuantizeLinear (l, ys, yz) [ld] ld = DequantizeLinear (lq, ys, yz)
        [vd] vd = DequantizeLinear (K2, ws, wz) [last] o = Conv (ld, vd) {OUTPUT}""",
        {
            "floats": np.asarray(RNG.normal(0, 0.1, (8, 8, 1, 1)) * OUTLIER, np.float32),
            "K2": RNG.integers(-30, 31, (8, 8, 1, 1)).astype(np.int8),
            "ys": np.float32(0.0613),
        },
        0.0613,
        image=True,
        skip=("layer",),
        codes=(Code.NODE_SKIPPED,),
        executed=("QLinearConv", "Conv"),
    ),
    "weight alone, matmul": Trap(
        f"[wd] wd = DequantizeLinear <axis = 1> (W, columns, zeros) [layer] o = MatMul (x, wd) {FLOAT_OUTPUT}",
        step=1e-4,
        executed=("MatMul",),
    ),
    "weight alone, gemm": Trap(
        f"[wd] wd = DequantizeLinear <axis = 1> (W, columns, zeros) [layer] o = Gemm (x, wd, b) {FLOAT_OUTPUT}",
        {"b": np.linspace(-1, 1, 8).astype(np.float32)},
        1e-4,
        executed=("Gemm",),
    ),
    "second layer without a grid on its input": Trap(
        f"{LAYER} [first] o = MatMul (xd, wd) {SECOND} [second] y = MatMul (h, vd)",
        step=1e-4,
        codes=(Code.KEPT_FLOAT,),
        executed=("MatMulIntegerToFloat", "MatMul"),
    ),
    "second layer without a grid, step per block": Trap(
        f"{LAYER} [first] o = MatMul (xd, wd) [h] h = Erf (o) [cat] hh = Concat <axis = 1> (h, h, h, h)"
        " [vd] vd = DequantizeLinear <axis = 0, block_size = 16> (blocked, blocks) [second] y = MatMul (hh, vd)",
        {"blocked": RNG.integers(-30, 31, (32, 8)).astype(np.int8), "blocks": BLOCKS},
        1e-4,
        opset=21,
        codes=(Code.UNSUPPORTED_FAKE_QUANT, Code.KEPT_FLOAT),
        executed=("MatMulIntegerToFloat", "MatMul"),
    ),
}

FAILS: dict[str, Trap] = {
    f"{name}, {end}": Trap(f"{body} {output}", constants, fails=True, opset=opset, codes=codes)
    for end, output in {"output on a grid": OUTPUT, "float output": FLOAT_OUTPUT}.items()
    for name, body, opset, codes, constants in (
        (
            "step per row of the weight",
            f"{INPUT} [wd] wd = DequantizeLinear <axis = 0> (W, rows, sixteen) [layer] o = MatMul (xd, wd)",
            17,
            (Code.KEPT_FLOAT,),
            {"rows": np.linspace(0.01, 0.02, 16).astype(np.float32), "sixteen": np.zeros(16, np.int8)},
        ),
        (
            "step per block of the weight",
            f"{FIRST} [vd] vd = DequantizeLinear <axis = 0, block_size = 4> (W2, blocks, blockzeros)"
            " [second] o = MatMul (h, vd)",
            21,
            (Code.UNSUPPORTED_FAKE_QUANT, Code.KEPT_FLOAT),
            {
                "blocks": BLOCKS / 4,
                "blockzeros": np.zeros((2, 8), np.int8),
            },
        ),
    )
}
FAILS["float8 weight and input"] = Trap(
    f"{FIRST} [e] e = Erf (h) [eq] eq = QuantizeLinear (e, es, fz) [ed] ed = DequantizeLinear (eq, es, fz)"
    " [vd] vd = DequantizeLinear (W8, es, fz) [second] y = MatMul (ed, vd)",
    {
        "W8": RNG.normal(0, 50, (8, 8)).astype(FLOAT8),
        "es": np.float32(0.01),
        "fz": np.zeros((), FLOAT8),
    },
    1e-3,
    fails=True,
    opset=21,
    codes=(Code.UNSUPPORTED_FAKE_QUANT,),
    executed=("QLinearMatMul", "MatMul"),
)
FAILS["float8 on both sides"] = Trap(
    f"{FIRST} [e] e = Erf (h) [eq] eq = QuantizeLinear (e, es, fz) [ed] ed = DequantizeLinear (eq, es, fz)"
    " [vd] vq = QuantizeLinear (h, es, fz) [v] v = DequantizeLinear (vq, es, fz)"
    " [turn] t = Transpose (ed) [pq] pq = QuantizeLinear (t, es, fz) [pd] pd = DequantizeLinear (pq, es, fz)"
    " [product] p = MatMul (pd, v) [last] y = MatMul (v, p)",
    {"es": np.float32(0.1), "fz": np.zeros((), FLOAT8)},
    1e-2,
    fails=True,
    opset=21,
    codes=(Code.UNSUPPORTED_FAKE_QUANT,),
)

TRAPS = WRONG | FAILS


@cache
def reference(name: str) -> Array:
    trap = TRAPS[name]
    answer: Array = run(trap.source(), trap.feeds)[0]
    return answer


def executed(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph that the runtime makes of ``model``."""
    session(model.SerializeToString(), optimized=folder / "executed.onnx")
    return onnx.load(folder / "executed.onnx")


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", TRAPS)
def test_the_runtime_falls_into_it(name: str) -> None:
    trap = TRAPS[name]
    assert np.all(np.isfinite(reference(name)))
    try:
        answer = run(trap.source(), trap.feeds, optimize=True)[0]
    except Exception:  # onnxruntime raises types of its own, with no common base
        assert trap.fails, "it used to run, with wrong numbers"
        return
    if not np.abs(answer - reference(name)).max() > 1.01 * trap.step:
        pytest.skip("this onnxruntime computes it as written")


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("name", TRAPS)
def test_the_converted_model_does_not(name: str, form: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    conversion = qat2int8.convert(trap.source(), format=form, skip_nodes=list(trap.skip))
    model = conversion.model.to_proto()
    answer = run(model, trap.feeds, optimize=True)[0]
    np.testing.assert_allclose(answer, reference(name), rtol=1e-5, atol=1.01 * trap.step)
    found = ops(executed(model, tmp_path))
    assert not set(trap.never) & set(found)
    assert set(trap.executed) <= set(found)
    assert set(trap.codes) <= {finding.code for finding in conversion.diagnostics}


# -- two quantizers in a row ------------------------------------------------------------------------------------

PAIR = """[q1] q1 = QuantizeLinear (o, as, az) [d1] d1 = DequantizeLinear (q1, as, az)
    [q2] q2 = QuantizeLinear (d1, bs, bz) [d2] d2 = DequantizeLinear (q2, bs, bz)"""
# The runtime's grid is what both ranges share; where one lies within the other it is one of the two.
PAIR_GRIDS = {"as": np.float32(1 / 20), "az": np.uint8(60), "bs": np.float32(1 / 33), "bz": np.uint8(140)}
NARROW_FIRST = {**PAIR_GRIDS, "as": np.float32(1 / 64), "az": np.uint8(20)}
READER = f"[vd] vd = DequantizeLinear (W2, columns0, wz) [last] l = MatMul (d2, vd) {OUTPUT.replace('(o', '(l')}"
SMALLER = f"{LAYER} [first] f = MatMul (xd, wd) [less] o = Mul (f, quarter)"
PAIRS = {
    "behind a layer": Trap(f"{SMALLER} {PAIR} {READER}", PAIR_GRIDS),
    "behind a layer, the first one narrower": Trap(f"{SMALLER} {PAIR} {READER}", NARROW_FIRST),
    "behind a float op": Trap(f"{LAYER} [first] f = MatMul (xd, wd) [e] o = Erf (f) {PAIR} {READER}", PAIR_GRIDS),
    "in front of a sum": Trap(
        f"{SMALLER} {PAIR} [vd] vd = DequantizeLinear (W2, columns0, wz) [m] m = MatMul (d2, vd)"
        " [mq] mq = QuantizeLinear (m, xs, xz) [md] md = DequantizeLinear (mq, xs, xz) [sum] s = Add (md, d2)"
        f" {OUTPUT.replace('(o', '(s')}",
        PAIR_GRIDS,
    ),
    "three": Trap(
        f"{SMALLER} {PAIR} [q3] q3 = QuantizeLinear (d2, xs, xz) [d3] d3 = DequantizeLinear (q3, xs, xz)"
        f" {READER.replace('d2', 'd3')}",
        PAIR_GRIDS,
    ),
}


def pairs_in_a_row(model: onnx.ModelProto) -> list[str]:
    """Quantize, Dequantize, Quantize with no other reader in between: where the runtime makes a grid of its own.

    Its DoubleQDQPairsRemover; it looks at pairs of one integer type only.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for second in model.graph.node:
        middle = makers.get(second.input[0]) if second.op_type == "QuantizeLinear" else None
        if middle is None or middle.op_type != "DequantizeLinear" or readers[middle.output[0]] > 1:
            continue
        first = makers.get(middle.input[0])
        if first is not None and first.op_type == "QuantizeLinear" and readers[first.output[0]] == 1:
            found.append(middle.name)
    return found


def numbers(model: onnx.ModelProto) -> set[float]:
    """All float constants of one element, the steps of activations among them."""
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return {float(array.item()) for array in arrays if array.dtype == np.float32 and array.size == 1}


def paired(name: str) -> onnx.ModelProto:
    trap = PAIRS[name]
    more = {"columns0": np.float32(1 / 60), "quarter": np.float32(1 / 4)}
    return Trap(trap.body, {**trap.constants, **more}).source()


@pytest.mark.parametrize("name", PAIRS)
def test_the_runtime_makes_one_grid_of_two(name: str, tmp_path: Path) -> None:
    source = paired(name)
    assert pairs_in_a_row(source)
    if numbers(executed(source, tmp_path)) <= numbers(source):
        pytest.skip("this onnxruntime leaves both as they are")


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_converted_model_has_no_pair_to_merge(name: str, form: str, tmp_path: Path) -> None:
    source = paired(name)
    conversion = qat2int8.convert(source, format=form)
    model = conversion.model.to_proto()
    assert not pairs_in_a_row(model)
    assert numbers(executed(model, tmp_path)) <= numbers(model)
    answer = run(model, {"x": X}, optimize=True)[0]
    np.testing.assert_allclose(answer, run(source, {"x": X})[0], atol=1.01 * STEP)
    assert any(finding.code is Code.SCALE_CONFLICT for finding in conversion.diagnostics)


# -- whole networks ---------------------------------------------------------------------------------------------

NETWORKS = {
    "tiny_resnet": networks.tiny_resnet,
    "mobilenet_v3": lambda: networks.mobilenet_v3(width=0.25, size=32, classes=10),
    "inception_like": lambda: networks.inception_like(width=8, modules=2, size=32, classes=10),
}


def floats_behind_dequantize(model: onnx.ModelProto) -> list[str]:
    """Layers that the runtime computes in float from a weight that it dequantizes at every run."""
    constants = {tensor.name for tensor in model.graph.initializer}
    dequantized = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type.endswith(("Conv", "Gemm", "MatMul", "Gather"))
        and not node.op_type.startswith("Q")
        and dequantized & set(node.input)
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_holds_no_trap(name: str, tmp_path: Path) -> None:
    source = NETWORKS[name]()
    layer = next(node.name for node in source.graph.node[len(source.graph.node) // 2 :] if node.op_type == "Conv")
    for skipped in ([], [layer]):
        model = qat2int8.convert(source, skip_nodes=skipped).model.to_proto()
        assert not pairs_in_a_row(model)
        found = executed(model, tmp_path)
        assert not {"MatMulNBits", "DynamicQuantizeMatMul"} & set(ops(found))
        assert not floats_behind_dequantize(found)


# -- an activation that no grid does ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["Relu (h)", "Clip (h, lo, hi)"])
@pytest.mark.parametrize("layer", ["MatMul (xd, wd)", "Gemm (xd, wd, b)"])
def test_an_activation_on_a_grid_with_negatives_runs_in_integers(
    layer: str, activation: str, tmp_path: Path
) -> None:
    """The runtime itself computes the layer in float: its grid does not clamp."""
    constants = {"b": np.ones(8, np.float32), "lo": np.float32(0), "hi": np.float32(6)}
    trap = Trap(f"{LAYER} [layer] h = {layer} [act] o = {activation} {OUTPUT}", constants)
    source = trap.source()
    assert not {"QGemm", "QLinearMatMul"} & set(ops(executed(source, tmp_path)))
    for form in ("qdq", "qoperator"):
        model = qat2int8.convert(source, format=form).model.to_proto()
        assert {"QGemm", "QLinearMatMul"} & set(ops(executed(model, tmp_path)))
        answer = run(model, trap.feeds, optimize=True)[0]
        np.testing.assert_allclose(answer, run(source, trap.feeds)[0], atol=1.01 * STEP)


# -- nothing else to convert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block", "float8"])
def test_what_has_no_other_layer_is_refused_with_the_reason(name: str) -> None:
    if name == "block":
        weight = "[wd] wd = DequantizeLinear <axis = 0, block_size = 8> (W, blocks, blockzeros)"
        constants = {"blocks": BLOCKS, "blockzeros": np.zeros((2, 8), np.int8)}
    else:
        weight = "[wd] wd = DequantizeLinear (W8, ws, fz)"
        constants = {"W8": RNG.normal(0, 9, (16, 8)).astype(FLOAT8), "fz": np.zeros((), FLOAT8)}
    trap = Trap(f"{INPUT} {weight} [layer] o = MatMul (xd, wd) {OUTPUT}", constants, opset=21)
    with pytest.raises(UnsupportedModel, match="nothing to convert") as refused:
        qat2int8.convert(trap.source())
    assert {"block": "per block", "float8": "FLOAT8"}[name] in refused.value.what
