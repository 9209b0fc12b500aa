"""The question every fusion asks first: does this tensor exist for one node only?"""

from __future__ import annotations

import onnx_ir as oir

from qat2int8.ir import Model


def sole_consumer(model: Model, value: oir.Value) -> oir.Node | None:
    """The one node that reads ``value``, once; None when anything else would miss the tensor.

    Graph outputs and readers inside subgraphs count as something else: what they read must stay.
    """
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.graph is model.graph else None
