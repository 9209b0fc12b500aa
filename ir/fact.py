"""What is known to hold for a graph at one point of a pipeline; the order of passes is checked with these."""

from __future__ import annotations

import enum


class Fact(enum.StrEnum):
    """A property passes establish, need, or destroy."""

    CONSTANTS_LIFTED = "constants-lifted"
    """Constants, scales and zero points are initializers; functions are inlined."""
    WEIGHT_SCALES = "weight-scales"
    """The scale table holds the grid of every weight that has one."""
    INPUT_SCALES = "input-scales"
    """The grids of fake quants on activations were gathered."""
    OUTPUT_SCALES = "output-scales"
    """Grids recorded on nodes (out_threshold and the like) were gathered."""
    NO_FAKE_QUANT = "no-fake-quant"
    """No fake quant is left on activations."""
    FLOAT_WEIGHTS = "float-weights"
    """Every weight is a float initializer."""
    BN_FOLDED = "bn-folded"
    """Every BatchNormalization that can be folded into a convolution is."""
    PROPAGATED = "scales-propagated"
    """Tensors that must share a grid do."""
    COMPLETE_SCALES = "complete-scales"
    """Every tensor that can get a grid without data has one."""
    QDQ_PLACED = "qdq-placed"
    """Quantize and Dequantize stand where the target wants them."""
