import numpy as np
from support import apply, parse

from qat2int8.ir import Code, Provenance, QuantParams
from qat2int8.passes.compute_weight_scales import ComputeWeightScales


def test_each_output_channel_gets_its_largest_magnitude_over_127() -> None:
    model = parse(
        "g (float[1, 1, 4, 4] x) => (float[1, 3, 4, 4] y) <float[3, 1, 1, 2] w = {1, -127, 0, 0, 2, 0.5}>"
        "{ [conv] y = Conv <pads = [0, 0, 0, 1]> (x, w) }"
    )
    values = model.values()
    model.scales.set(values["x"], QuantParams.make(0.1))
    result = apply(ComputeWeightScales(), model)
    grid = model.scales[values["w"]]
    np.testing.assert_array_equal(grid.scale, np.array([1, 1, 2 / 127], np.float32))
    assert (grid.axis, grid.source, grid.dtype.narrow_range) == (0, Provenance.COMPUTED, True)
    assert [(d.code, d.node, d.value) for d in result.diagnostics] == [(Code.WEIGHT_GRID_COMPUTED, "conv", "w")]
