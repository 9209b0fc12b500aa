"""Integer tensors beside what training put on their grids: by hand, and with errors planted into a result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import parse

from qat2int8 import convert
from qat2int8.ir import INT8, UINT8, QuantDType, QuantParams, TrainedTensor
from qat2int8.pipelines.convert import Conversion
from qat2int8.pipelines.fidelity import Fidelity, compare
from qat2int8.pipelines.instrument import Instrumented
from qat2int8.pipelines.levels import LevelCount, Levels, Pair, TensorLevels, pairs_of

NETWORK = """g (float[N,3,8,8] x, float[6,3,3,3] V, float[4,6,1,1] W, float[4] b) => (float[N,4] y) <
  float sx = {0.05}, int8 zero = {0}, float sr = {0.3}, float sp = {0.4}, float sf = {0.02},
  float[4] sw = {0.010, 0.012, 0.014, 0.016}, int8[4] zw = {0, 0, 0, 0},
  float[6] sv = {0.02, 0.021, 0.022, 0.023, 0.024, 0.025}, int8[6] zv = {0, 0, 0, 0, 0, 0}
> {
  xq = QuantizeLinear (x, sx, zero)
  xd = DequantizeLinear (xq, sx, zero)
  v = QuantizeLinear <axis = 0> (V, sv, zv)
  vd = DequantizeLinear <axis = 0> (v, sv, zv)
  c = Conv <pads = [1, 1, 1, 1]> (xd, vd)
  r = Relu (c)
  rq = QuantizeLinear (r, sr, zero)
  rd = DequantizeLinear (rq, sr, zero)
  w = QuantizeLinear <axis = 0> (W, sw, zw)
  wd = DequantizeLinear <axis = 0> (w, sw, zw)
  p = Conv (rd, wd, b)
  pq = QuantizeLinear (p, sp, zero)
  pd = DequantizeLinear (pq, sp, zero)
  a = GlobalAveragePool (pd)
  f = Flatten (a)
  y = Mul (f, sf)
}"""
STEPS = np.asarray([0.02, 0.021, 0.022, 0.023, 0.024, 0.025]).reshape(6, 1, 1, 1)
"""Of V."""


def network(rng: np.random.Generator) -> onnx.ModelProto:
    """Two convolutions with fake quant on everything between them."""
    proto = parse(NETWORK).to_proto()
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.uniform(-1, 1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del proto.graph.input[1:]
    return proto


def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.uniform(-6, 6, (4, 3, 8, 8)).astype(np.float32)}


def converted(seed: int = 0) -> tuple[onnx.ModelProto, Conversion]:
    source = network(np.random.default_rng(seed))
    return source, convert(source)


def shares(levels: Levels | None) -> dict[str, tuple[int, int, int]]:
    assert levels is not None
    return {one.tensor: (one.equal, one.one, one.more) for one in levels.tensors}


def measured(source: onnx.ModelProto, result: onnx.ModelProto, conversion: Conversion) -> Fidelity:
    batch = feeds(np.random.default_rng(7))
    files = source.SerializeToString(), result.SerializeToString()
    return compare(*files, [batch], pairs=pairs_of(conversion.model))


def pair(grid: QuantParams, scale: float, zero_point: int, dtype: type = np.uint8) -> Pair:
    return Pair(TrainedTensor("t", "tq", grid), "i", np.dtype(dtype), scale, zero_point)


def errors(one: Pair, values: list[float], integers: list[int]) -> list[float]:
    floats = {"t": np.asarray(values, np.float32)}
    found: list[float] = one.errors(one.bounds(floats), np.asarray(integers, one.dtype)).tolist()
    return found


def test_levels_are_counted_from_the_zero_points() -> None:
    moved = pair(QuantParams.make(0.5, 0, INT8), 0.5, 128)
    assert errors(moved, [-1.0, 0.0, 1.1, 1.1], [126, 128, 130, 133]) == [0, 0, 0, 3]


def test_a_tie_rounds_either_way_and_no_further() -> None:
    halves = pair(QuantParams.make(1.0, 0, INT8), 1.0, 0, np.int8)
    assert errors(halves, [2.5, 2.5, 2.5, 2.5], [1, 2, 3, 4]) == [1, 0, 0, 1]
    assert errors(halves, [2.5005, 2.4995, 2.49, 2.51], [2, 3, 3, 2]) == [0, 0, 1, 1]


def test_what_training_saturated_must_saturate() -> None:
    grid = QuantParams.make(1.0, 0, QuantDType(4, signed=True))
    assert errors(pair(grid, 1.0, 128), [100.0, 100.0, -100.0, -9.0], [135, 136, 120, 119]) == [0, 1, 0, 1]


def test_another_grid_is_measured_in_trained_steps() -> None:
    finer = pair(QuantParams.make(1.0, 0, INT8), 0.5, 0)
    assert not finer.same_grid
    assert errors(finer, [3.0, 3.2, 3.2], [6, 7, 9]) == [0, 0.5, 1.5]
    count = LevelCount(finer)
    count.add(finer.bounds({"t": np.asarray([3.0, 3.2, 3.2], np.float32)}), np.asarray([6, 7, 9], np.uint8))
    assert count.result() == TensorLevels("t", "i", False, 3, 2, 0, 1, 1.5)


def test_a_grid_per_channel() -> None:
    grid = QuantParams.make([1.0, 2.0], [0, 1], INT8, axis=0)
    one = pair(grid, 1.0, 0, np.int8)
    values = {"t": np.asarray([[3.0], [8.0]], np.float32)}
    low, high = one.bounds(values)
    assert (low.tolist(), high.tolist()) == ([[3], [4]], [[3], [4]])


def test_integers_of_the_source_are_taken_where_there_are_no_floats() -> None:
    one = pair(QuantParams.make(0.5, 10, UINT8), 0.5, 10)
    bounds = one.bounds({"tq": np.asarray([10, 12], np.uint8)})
    assert [bound.tolist() for bound in bounds] == [[0, 2], [0, 2]]
    assert one.fed({"tq": np.asarray([10, 12], np.uint8)}).tolist() == [10, 12]


def test_channels_that_the_source_does_not_have_are_fed_zeros_and_not_compared() -> None:
    one = pair(QuantParams.make(1.0, 0, INT8), 1.0, 128)
    values = {"t": np.asarray([[[1.0], [2.0]]], np.float32)}
    assert one.fed(values, 3).tolist() == [[[129], [130], [128]]]
    assert one.fed(values, 2).tolist() == one.fed(values).tolist() == [[[129], [130]]]
    integers = np.asarray([[[129], [131], [7]]], np.uint8)
    assert one.errors(one.bounds(values), integers).tolist() == [[[0], [1]]]


def test_what_is_fed_are_the_levels_of_the_source() -> None:
    moved = pair(QuantParams.make(0.5, 0, INT8), 0.5, 128)
    assert moved.fed({"t": np.asarray([-1.0, 0.26, 1000.0], np.float32)}).tolist() == [126, 129, 255]
    coarser = pair(QuantParams.make(0.5, 0, INT8), 1.0, 3)
    assert coarser.fed({"t": np.asarray([1.0, -100.0], np.float32)}).tolist() == [4, 0]


def test_the_worst_tensor_and_the_shares() -> None:
    rough = TensorLevels("a", "a", True, 10, 5, 3, 2, 4.0)
    fine = TensorLevels("b", "b", True, 90, 90, 0, 0, 0.0)
    levels = Levels((fine, rough))
    assert levels.worst is rough
    assert (levels.positions, levels.equal_percent, levels.within_one_percent) == (100, 95.0, 98.0)
    assert levels.largest == 4.0
    assert json.loads(json.dumps(levels.as_dict()))["tensors"][1]["more"] == 2
    assert Levels(()).worst is None


def test_a_sound_conversion_is_right_at_every_level() -> None:
    source, conversion = converted()
    found = measured(source, conversion.model.to_proto(), conversion)
    assert list(shares(found.local_levels)) == ["x", "r", "p"]
    for name, (equal, one, more) in shares(found.local_levels).items():
        assert more == 0
        assert one <= 0.002 * equal, name
    assert found.levels is not None
    assert found.levels.within_one_percent == 100.0
    assert all(tensor.same_grid for tensor in found.levels.tensors)


def test_operators_on_integers_hold_the_same_tensors() -> None:
    source = network(np.random.default_rng(0))
    found = [
        convert(source, format=form).fidelity_on([feeds(np.random.default_rng(1))])
        for form in ("qdq", "qoperator")
    ]
    assert shares(found[0].local_levels) == shares(found[1].local_levels)
    assert list(shares(found[1].levels)) == ["x", "r", "p"]


def test_the_fidelity_of_a_conversion_has_the_levels(tmp_path: Path) -> None:
    source, conversion = converted()
    onnx.save(source, tmp_path / "source.onnx")
    for one in (conversion, convert(tmp_path / "source.onnx")):
        assert one.fidelity.levels is not None
        assert len(one.fidelity.levels.tensors) == 3
    assert conversion.fidelity_on([feeds(np.random.default_rng(1))]).local_levels is not None
    assert json.loads(json.dumps(conversion.fidelity.as_dict()))["levels"]["within_one_percent"] == 100.0


def test_looking_inside_changes_no_output() -> None:
    source, conversion = converted()
    batch = feeds(np.random.default_rng(3))
    files = source.SerializeToString(), conversion.model.to_proto().SerializeToString()
    plain, probed = (compare(*files, [batch], pairs=pairs) for pairs in ((), pairs_of(conversion.model)))
    assert dataclasses.replace(probed, levels=None, local_levels=None) == plain


def planted(conversion: Conversion, node: onnx.NodeProto, index: int, array: np.ndarray) -> onnx.ModelProto:
    """The result with another parameter for one node, and only for that one."""
    proto = conversion.model.to_proto()
    (wrong,) = [each for each in proto.graph.node if each.output[0] == node.output[0]]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "planted"))
    wrong.input[index] = "planted"
    return proto


def parameter(proto: onnx.ModelProto, name: str) -> np.ndarray:
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    return np.array(onnx.numpy_helper.to_array(tensor))


def quantizer_of(conversion: Conversion, tensor: str) -> onnx.NodeProto:
    (name,) = [one.integers for one in pairs_of(conversion.model) if one.trained.tensor == tensor]
    writers = {node.output[0]: node for node in conversion.model.to_proto().graph.node}
    node = writers[name]
    while node.op_type != "QuantizeLinear":
        node = writers[node.input[0]]
    return node


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), tensor=st.sampled_from(["r", "p"]))
def test_a_zero_point_off_by_one_is_one_level_everywhere(seed: int, tensor: str) -> None:
    source, conversion = converted(seed)
    node = quantizer_of(conversion, tensor)
    zero = parameter(conversion.model.to_proto(), node.input[2])
    found = measured(source, planted(conversion, node, 2, np.asarray(zero + 1, zero.dtype)), conversion)
    equal, one, more = shares(found.local_levels)[tensor]
    assert one > 0.4 * (equal + one + more), "all but what saturates, and what a Relu leaves at the lowest level"
    assert found.levels is not None
    assert found.levels.equal_percent < 90.0
    assert found.levels.within_one_percent > 90.0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), tensor=st.sampled_from(["r", "p"]), factor=st.sampled_from([0.98, 1.02]))
def test_a_scale_off_by_two_percent_is_seen_in_its_tensor_alone(seed: int, tensor: str, factor: float) -> None:
    source, conversion = converted(seed)
    node, proto = quantizer_of(conversion, tensor), conversion.model.to_proto()
    scale = parameter(proto, node.input[1])
    wrong = planted(conversion, node, 1, np.asarray(scale * factor, np.float32))
    right, found = (shares(measured(source, model, conversion).local_levels) for model in (proto, wrong))
    equal, one, more = found[tensor]
    assert one + more > 0.1 * (equal + one + more), "levels above 25 move by one half and more"
    assert {name: found[name] for name in found if name != tensor} == {
        name: right[name] for name in right if name != tensor
    }


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), channel=st.integers(0, 5))
def test_a_channel_rounded_the_wrong_way_is_seen_in_the_tensor_behind_it(seed: int, channel: int) -> None:
    source, conversion = converted(seed)
    proto = conversion.model.to_proto()
    (weight,) = [one for one in proto.graph.initializer if one.dims[:1] == [6] and len(one.dims) == 4]
    levels = np.array(onnx.numpy_helper.to_array(weight))
    exact = parameter(source, "V") / STEPS
    wrong_way = np.floor(exact) + np.ceil(exact) - np.rint(exact)
    # A stem is padded with zeros to four channels.
    levels[channel, :3] = wrong_way[channel]
    weight.CopyFrom(onnx.numpy_helper.from_array(levels, weight.name))
    right, found = (
        shares(measured(source, model, conversion).local_levels) for model in (conversion.model.to_proto(), proto)
    )
    assert found["r"][1] + found["r"][2] > right["r"][1] + right["r"][2] + 20
    assert found["p"] == right["p"]


def test_a_model_too_large_to_be_looked_into_is_compared_by_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        def SerializeToString(self) -> bytes:
            raise ValueError("Failed to serialize proto")

    source, conversion = converted()
    files = source.SerializeToString(), conversion.model.to_proto().SerializeToString()
    load = Instrumented.__init__

    def load_large(self: Instrumented, model: bytes, shown: list[str]) -> None:
        load(self, model, shown)
        self._proto = Large()

    monkeypatch.setattr(Instrumented, "__init__", load_large)
    fidelity = compare(*files, [feeds(np.random.default_rng(7))], pairs=pairs_of(conversion.model))
    assert fidelity.levels is fidelity.local_levels is None
    assert fidelity.outputs[0].sqnr_db > 20.0
