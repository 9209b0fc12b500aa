import numpy as np
import pytest
from support import TARGET, apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import UINT8, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.reduce_mean_to_global_average_pool import ReduceMeanToGlobalAveragePool

GRID = QuantParams.make(0.25, 3, UINT8)
OLD = '<ir_version: 8, opset_import: ["" : 13]>'
NEW = '<ir_version: 8, opset_import: ["" : 18]>'


def mean(attributes: str, *, shape: str = "2,3,4,5", result: str = "2,3,1,1", header: str = OLD) -> str:
    return f"{header} g (float[{shape}] x) => (float[{result}] y) {{ [m] y = ReduceMean <{attributes}> (x) }}"


def test_kept_dimensions_make_a_pool() -> None:
    model, result = check_pass(
        ReduceMeanToGlobalAveragePool(),
        mean("axes = [2,3]"),
        f"{OLD} g (float[2,3,4,5] x) => (float[2,3,1,1] y) {{ [m] y = GlobalAveragePool (x) }}",
        scales={"y": GRID},
    )
    assert result.counts == {"replaced": 1}
    assert model.scales[model.values()["y"]].same_grid(GRID)


def test_dropped_dimensions_are_flattened_and_both_tensors_have_the_grid() -> None:
    model, _ = check_pass(
        ReduceMeanToGlobalAveragePool(),
        mean("axes = [-1,-2], keepdims = 0", result="2,3"),
        f"""{OLD} g (float[2,3,4,5] x) => (float[2,3] y) {{
          [m] y_pooled = GlobalAveragePool (x)
          [m_Flatten] y = Flatten <axis = 1> (y_pooled)
        }}""",
        scales={"y": GRID},
    )
    assert {value.name for value in model.scales} == {"y", "y_pooled"}


@pytest.mark.parametrize(
    "text",
    [
        mean("axes = [2,3]"),
        mean("axes = [3,2], keepdims = 0", result="2,3"),
        mean("axes = [2,3,4]", shape="2,3,2,3,4", result="2,3,1,1,1"),
        f"""{NEW} g (float[2,3,4,5] x) => (float[2,3] y) <int64[2] axes = {{-2,3}}> {{
          [m] y = ReduceMean <keepdims = 0> (x, axes)
        }}""",
    ],
    ids=["kept", "dropped", "three axes", "axes as input"],
)
def test_the_numbers_stay_the_same(text: str) -> None:
    model = parse(text)
    before = model.to_proto()
    assert apply(ReduceMeanToGlobalAveragePool(), model).counts == {"replaced": 1}
    shape = tuple(dim.dim_value for dim in before.graph.input[0].type.tensor_type.shape.dim)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_same_numbers(before, model, {"x": x})


@pytest.mark.parametrize(
    "text",
    [
        mean("axes = [3]", result="2,3,4,1"),
        mean("axes = [1,2,3]", result="2,1,1,1"),
        mean("axes = [1,2]", result="2,1,1,5"),
        mean("keepdims = 1", result="1,1,1,1"),
        mean("axes = [-1]", shape="2,3,6", result="2,3,1"),
        mean("axes = [2,3]").replace("float[", "double["),
        f"""{NEW} g (float[2,3,4,5] x, int64[2] axes) => (float[a,b,c,d] y) {{ [m] y = ReduceMean (x, axes) }}""",
        mean("axes = [2,3]").replace("ReduceMean", "ReduceMax"),
    ],
    ids=["one of two", "channels too", "channels last", "all", "rank 3", "double", "computed axes", "maximum"],
)
def test_other_means_stay(text: str) -> None:
    assert not ReduceMeanToGlobalAveragePool().run(parse(text), Context(TARGET)).modified
