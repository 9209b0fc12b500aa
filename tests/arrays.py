"""Models in ONNX text whose inputs are turned into initializers, and tables of grids by tensor name."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from support import parse

from qat2int8.ir import Model, QuantParams


def model_of(
    text: str,
    arrays: Mapping[str, npt.ArrayLike] | None = None,
    scales: Mapping[str, QuantParams] | None = None,
) -> Model:
    """The model of ``text``, its inputs named in ``arrays`` made constants of their declared type."""
    proto = parse(text).to_proto()
    inputs = {value.name: value for value in proto.graph.input}
    for name, array in (arrays or {}).items():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(inputs[name].type.tensor_type.elem_type)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        proto.graph.input.remove(inputs[name])
    onnx.checker.check_model(proto, full_check=True)
    model = Model.from_proto(proto)
    for name, params in (scales or {}).items():
        model.scales.set(model.values()[name], params)
    return model
