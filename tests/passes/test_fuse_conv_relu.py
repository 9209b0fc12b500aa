import numpy as np
import onnx
import onnx_ir as oir
import pytest
from support import apply, check_pass, graph_text, parse, run

from qat2int8.ir import ChannelMoments, Code, Model, QuantParams, Severity
from qat2int8.passes.fuse_conv_relu import FuseConvRelu

BOUNDS = (
    "float zero = {0}, float six = {6}, float one = {1}, float minus = {-1}, float[1] uno = {0}, float inf = {7},"
    " float huge = {3.4028234663852886e38}, float low = {-3.4028234663852886e38},"
    " float[4] row = {0, 0, 0, 0}"
)
SPECIAL = np.array([-3e38, -7.5, -1.0, -0.5, 0.0, 0.5, 6.0, 6.5, 3e38], np.float32)


def clamps(body: str, shape: str = "9", outputs: str = "") -> Model:
    """A model of ``body``; ONNX text has no way to write infinity, so that constant is put in afterwards."""
    model = parse(f"g (float[{shape}] x) => (float[{shape}] y{outputs}) <{BOUNDS}> {{ {body} }}")
    model.values()["inf"].const_value = oir.tensor(np.float32(np.inf), name="inf")
    return model


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def clip_bounds(model: Model) -> list[float | None]:
    (clip,) = model.nodes("Clip")
    constants = [model.constant(value) for value in clip.inputs[1:]]
    return [None if constant is None else float(constant) for constant in constants]


def exactly(before: Model, body: str) -> Model:
    """Run the pass on ``body`` and compare on every special value, bit for bit."""
    proto = before.to_proto()
    apply(FuseConvRelu(), before)
    feeds = {"x": SPECIAL}
    np.testing.assert_array_equal(run(proto, feeds)[0], run(before, feeds)[0], err_msg=body)
    return before


@pytest.mark.parametrize(
    "body",
    [
        "y = Max (x, zero)",
        "y = Max (zero, x)",
        "y = Max (x, uno)",
        "y = Clip (x, zero)",
        "y = Clip (x, zero, inf)",
        "a = Relu (x) y = Relu (a)",
        "a = Clip (x, minus) y = Relu (a)",
        "a = Relu (x) b = Max (a, zero) y = Clip (b, minus)",
    ],
)
def test_a_lower_bound_of_zero_is_a_relu(body: str) -> None:
    model = exactly(clamps(body), body)
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        ("a = Relu (x) y = Min (a, six)", [0, 6]),
        ("a = Relu (x) y = Min (six, a)", [0, 6]),
        ("a = Max (x, zero) y = Min (a, six)", [0, 6]),
        ("a = Min (x, six) y = Max (a, zero)", [0, 6]),
        ("a = Relu (x) y = Clip (a, zero, six)", [0, 6]),
        ("a = Clip (x, zero, six) y = Relu (a)", [0, 6]),
        ("a = Clip (x, minus, six) y = Clip (a, zero)", [0, 6]),
        ("a = Clip (x, minus, one) y = Clip (a, zero, six)", [0, 1]),
        ("a = Clip (x, , six) y = Clip (a, minus, one)", [-1, 1]),
        ("a = Clip (x, one, six) y = Min (a, zero)", [0, 0]),
        ("a = Min (x, minus) y = Relu (a)", [0, 0]),
        ("y = Max (x, one)", [1]),
        ("y = Min (x, one)", [None, 1]),
    ],
)
def test_runs_of_clamps_become_one_clip(body: str, bounds: list[float | None]) -> None:
    model = exactly(clamps(body), body)
    assert ops(model) == ["Clip"]
    assert clip_bounds(model) == bounds


def test_the_largest_finite_number_means_no_bound() -> None:
    model = clamps("y = Clip (x, zero, huge)")
    apply(FuseConvRelu(), model)
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu (x)",
        "y = Clip (x, zero, six)",
        "y = Clip (x, low, six)",
        "y = Clip (x)",
        "y = Clip (x, six, zero)",
        "y = Clip (x, inf)",
        "y = Max (x, row)",
        "y = Max (x)",
        "y = Max (x, zero, one)",
        "y = Max (x, x)",
        "n = Neg (zero) y = Max (x, n)",
        "n = Neg (zero) y = Clip (x, n)",
        "y = Min (x, inf)",
        "a = Relu (x) b = Neg (a) y = Max (a, b)",
        "a = Clip (x, six, zero) y = Relu (a)",
        "a = Relu (x) y = Clip (a, inf)",
        "k = Constant <value = float {0.0}> () y = Max (x, k)",
    ],
)
def test_what_is_no_clamp_or_in_form_already_stays(body: str) -> None:
    model = clamps(body, "2, 4")
    before = graph_text(model)
    assert not apply(FuseConvRelu(), model).modified
    assert graph_text(model) == before


def test_a_bound_that_adds_a_dimension_stays() -> None:
    model = parse("g (float x) => (float[1] y) <float[1] zero = {0}> { y = Max (x, zero) }")
    assert not apply(FuseConvRelu(), model).modified


def test_integers_stay() -> None:
    model = parse("g (int32[4] x) => (int32[4] y) <int32 zero = {0}> { y = Max (x, zero) }")
    assert not apply(FuseConvRelu(), model).modified


@pytest.mark.parametrize("clip", ["Clip <min = 0.0, max = 6.0> (a)", "Min (a, six)"])
def test_a_model_with_bounds_in_attributes_stays(clip: str) -> None:
    model = parse(
        '<ir_version: 5, opset_import: ["" : 10]>'
        f"g (float[4] x) => (float[4] y) <float six = {{6}}> {{ a = Relu (x) y = {clip} }}"
    )
    assert not apply(FuseConvRelu(), model).modified


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a = Clip (x, minus, one) y = Relu (a)", ", float[9] a"),
        ("a = Clip (x, minus, one) y = Relu (a) z = Neg (a)", ", float[9] z"),
    ],
)
def test_a_clamp_that_others_read_is_not_merged(body: str, outputs: str) -> None:
    model = clamps(body, outputs=outputs)
    assert not apply(FuseConvRelu(), model).modified


def test_bounds_keep_the_type_of_the_tensor() -> None:
    model = parse("g (float16[4] x) => (float16[4] y) <float16 six = {6}> { a = Relu (x) y = Min (a, six) }")
    apply(FuseConvRelu(), model)
    assert {str(v.dtype) for v in next(model.nodes("Clip")).inputs} == {"FLOAT16"}


# Grids of merged clamps


def test_the_result_of_a_merge_keeps_its_own_grid() -> None:
    model = clamps("a = Relu (x) y = Min (a, six)")
    values, own = model.values(), QuantParams.make(0.25)
    model.scales.set(values["y"], own)
    model.scales.set(values["x"], input_grid := QuantParams.make(0.125))
    model.scales.set(values["a"], QuantParams.make(0.5))
    result = apply(FuseConvRelu(), model)
    assert {v.name: g for v, g in model.scales.items()} == {"y": own, "x": input_grid}
    assert [(d.code, d.severity, d.value) for d in result.diagnostics] == [
        (Code.FAKE_QUANT_DROPPED, Severity.NOTE, "a")
    ]


def test_the_result_of_a_merge_inherits_a_grid_when_it_has_none() -> None:
    model = clamps("a = Relu (x) y = Min (a, six)")
    inherited = QuantParams.make(0.5)
    model.scales.set(model.values()["a"], inherited)
    result = apply(FuseConvRelu(), model)
    assert {v.name: g for v, g in model.scales.items()} == {"y": inherited}
    assert result.diagnostics == ()


# Moving

LAYERS = {
    "Conv": "Conv (x, w)",
    "ConvTranspose": "ConvTranspose (x, w)",
    "Add": "Add (x, x)",
    "MatMul": "MatMul (x, m)",
}
MOVES = {
    "MaxPool": ("MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)", "1, 1, 2, 2"),
    "padded MaxPool": ("MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (c)", "1, 1, 2, 2"),
    "Reshape": ("Reshape (c, shape)", "1, 16"),
    "Flatten": ("Flatten (c)", "1, 16"),
    "Transpose": ("Transpose <perm = [0, 2, 3, 1]> (c)", "1, 4, 4, 1"),
    "Squeeze": ("Squeeze (c)", "4, 4"),
    "Unsqueeze": ("Unsqueeze (c, axes)", "1, 1, 1, 4, 4"),
}
IMAGE = {"x": np.random.default_rng(2).normal(size=(1, 1, 4, 4)).astype(np.float32)}


def image(body: str, shape: str, outputs: str = "") -> str:
    matrix = ", ".join(map(str, range(-8, 8)))
    return f"""
    g (float[1, 1, 4, 4] x) => (float[{shape}] y{outputs})
      <float[1, 1, 1, 1] w = {{-3}}, float[4, 4] m = {{{matrix}}},
       int64[2] shape = {{1, 16}}, int64[1] axes = {{0}}, float zero = {{0}}, float six = {{6}}>
      {{ {body} }}
    """


@pytest.mark.parametrize("activation", ["Relu (p)", "Clip (p, zero, six)", "Max (p, zero)"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_clamp_moves_behind_the_layer(layer: str, move: str, activation: str) -> None:
    mover, shape = MOVES[move]
    model = parse(image(f"c = {LAYERS[layer]} p = {mover} y = {activation}", shape))
    before = model.to_proto()
    assert apply(FuseConvRelu(), model).counts["moved"] == 1
    clamp = "Clip" if "Clip" in activation else "Relu"
    assert ops(model) == [layer, clamp, move.split()[-1]]
    np.testing.assert_array_equal(run(before, IMAGE)[0], run(model, IMAGE)[0])


def test_the_golden_form() -> None:
    conv = "float[2, 1, 1, 1] w = {3, 4}"
    _, result = check_pass(
        FuseConvRelu(),
        f"""
        g (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y) <{conv}> {{
          [conv] c = Conv (x, w)
          [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
          [relu] y = Relu (p)
        }}
        """,
        f"""
        g (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y) <{conv}> {{
          [conv] c = Conv (x, w)
          [relu] c_clamped = Relu (c)
          [pool] y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c_clamped)
        }}
        """,
    )
    assert dict(result.counts) == {"canonicalised": 0, "moved": 1}


def test_a_clamp_moves_across_several_at_once_and_its_shape_is_that_of_the_layer() -> None:
    text = image(f"c = Conv (x, w) a = {MOVES['Transpose'][0]} p = Flatten (a) y = Relu (p)", "1, 16")
    before = onnx.shape_inference.infer_shapes(parse(text).to_proto())
    model = Model.from_proto(before)
    apply(FuseConvRelu(), model)
    assert ops(model) == ["Conv", "Relu", "Transpose", "Flatten"]
    assert list(next(model.nodes("Relu")).outputs[0].shape or ()) == [1, 1, 4, 4]
    np.testing.assert_array_equal(run(before, IMAGE)[0], run(model, IMAGE)[0])


def test_grids_stay_with_the_numbers_they_describe() -> None:
    model = parse(image(f"c = Conv (x, w) a = {MOVES['Transpose'][0]} p = Flatten (a) y = Relu (p)", "1, 16"))
    values = model.values()
    grids = {name: QuantParams.make(step) for name, step in zip("capy", (1, 2, 3, 4), strict=True)}
    moments: dict[str, ChannelMoments] = {}
    for name, grid in grids.items():
        model.scales.set(values[name], grid)
        moments[name] = ChannelMoments(np.zeros(1, np.float32), np.ones(1, np.float32), 1, name)
        model.moments[values[name]] = moments[name]
    result = apply(FuseConvRelu(), model)
    assert {v.name: m for v, m in model.moments.items()} == {"c": moments["c"], "y": moments["y"]}
    assert {v.name: g for v, g in model.scales.items()} == {"c": grids["c"], "y": grids["y"]}
    assert model.scales[model.graph.outputs[0]] is grids["y"]
    assert sorted(d.value for d in result.diagnostics) == ["a", "p"]


def test_a_clamped_tensor_without_a_grid_inherits_that_of_the_pool() -> None:
    model = parse(image(f"c = Conv (x, w) p = {MOVES['MaxPool'][0]} y = Relu (p)", "1, 1, 2, 2"))
    inherited = QuantParams.make(0.5)
    model.scales.set(model.values()["p"], inherited)
    assert apply(FuseConvRelu(), model).diagnostics == ()
    assert {v.name: g for v, g in model.scales.items()} == {"y": inherited}


POOL = "MaxPool <kernel_shape = [2, 2], strides = [2, 2]"


@pytest.mark.parametrize(
    ("body", "shape", "outputs"),
    [
        (f"c = Conv (x, w) p = {POOL}> (c) y = Relu (p) z = Neg (p)", "1, 1, 2, 2", ", float[1, 1, 2, 2] z"),
        (f"c = Conv (x, w) p = {POOL}> (c) y = Relu (p)", "1, 1, 2, 2", ", float[1, 1, 2, 2] p"),
        (f"c = Conv (x, w) p = {POOL}> (c) y = Relu (p) z = Neg (c)", "1, 1, 2, 2", ", float[1, 1, 4, 4] z"),
        (f"c = Conv (x, w) p = {POOL}> (c) y = Relu (p)", "1, 1, 2, 2", ", float[1, 1, 4, 4] c"),
        (f"c = Conv (x, w) p, z = {POOL}> (c) y = Relu (p)", "1, 1, 2, 2", ", int64[1, 1, 2, 2] z"),
        (f"c = Conv (x, w) p = {POOL}, ceil_mode = 1> (c) y = Relu (p)", "1, 1, 2, 2", ""),
        (f"c = Conv (x, w) p = {POOL}, dilations = [2, 2]> (c) y = Relu (p)", "1, 1, 1, 1", ""),
        ("c = Conv (x, w) p = AveragePool <kernel_shape = [2, 2]> (c) y = Relu (p)", "1, 1, 3, 3", ""),
        (f"c = Neg (x) p = {POOL}> (c) y = Relu (p)", "1, 1, 2, 2", ""),
        (f"p = {POOL}> (x) y = Relu (p)", "1, 1, 2, 2", ""),
        (f"c = Conv (x, w) p = {POOL}> (c) y = LeakyRelu (p)", "1, 1, 2, 2", ""),
        ("c = Conv (x, w) y = Relu (c)", "1, 1, 4, 4", ""),
    ],
)
def test_what_may_not_move(body: str, shape: str, outputs: str) -> None:
    model = parse(image(body, shape, outputs))
    before = graph_text(model)
    assert not apply(FuseConvRelu(), model).modified
    assert graph_text(model) == before
