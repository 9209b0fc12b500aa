"""However fake quantization is spelt, the same network becomes the same INT8 model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import spellings
from spellings import ALL, S8, S8_NARROW, U4, U7, U8, U8_ZERO, Family, Spelling
from support import run

from qat2int8 import Conversion, convert

FAMILIES: dict[str, Family] = {"u8": U8, "u8_zero": U8_ZERO, "s8": S8, "s8_narrow": S8_NARROW, "u7": U7, "u4": U4}
INPUTS = [np.random.default_rng(seed).normal(0, 1.5, (1, 2, 8, 8)).astype(np.float32) for seed in range(8)]


def answers(conversion: Conversion) -> list[npt.NDArray[Any]]:
    model = conversion.model.to_proto()
    return [run(model, {"x": x}, optimize=True)[0] for x in INPUTS]


@cache
def plain(family: str, per_tensor: bool = False, highest: int = 127) -> list[npt.NDArray[Any]]:
    model = spellings.build(Spelling(), FAMILIES[family], per_tensor=per_tensor, highest=highest)
    return answers(convert(model))


def family_of(grids: Family) -> str:
    return next(name for name, family in FAMILIES.items() if family is grids)


def written(name: str) -> onnx.ModelProto:
    spelling, grids = ALL[name]
    model = spellings.build(spelling(), grids)
    return spellings.with_function(model) if name == "function" else model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_spelling_runs_in_integers_and_is_faithful(family: str) -> None:
    model = spellings.build(Spelling(), FAMILIES[family])
    conversion = convert(model)
    assert conversion.certificate.integer_macs_percent == 100
    step = FAMILIES[family]["out"].scale
    references = [run(model, {"x": x})[0] for x in INPUTS]
    assert np.abs(references).max() > 5 * step
    np.testing.assert_allclose(answers(conversion), references, atol=2.01 * step)


@pytest.mark.parametrize("name", ALL)
def test_a_spelling_gives_the_numbers_of_the_plain_one(name: str) -> None:
    conversion = convert(written(name))
    assert conversion.certificate.integer_macs_percent == 100
    for expected, actual in zip(plain(family_of(ALL[name][1])), answers(conversion), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("opset", [10, 11, 12])
def test_opsets_without_steps_per_channel_give_the_same_numbers(opset: int) -> None:
    model = spellings.build(Spelling(opset), U8, per_tensor=True)
    for expected, actual in zip(plain("u8", per_tensor=True), answers(convert(model)), strict=True):
        np.testing.assert_array_equal(actual, expected)


NARROW = {
    "int4": (lambda: spellings.NarrowTypes(21), 7),
    "quantized_int4": (lambda: spellings.QuantizedNarrowTypes(21), 7),
    "int2": (lambda: spellings.TwoBits(25), 1),
}


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_fewer_bits_give_the_numbers_of_their_levels_in_int8(name: str) -> None:
    spelling, highest = NARROW[name]
    conversion = convert(spellings.build(spelling(), U8, highest=highest))
    assert conversion.certificate.integer_macs_percent == 100
    for expected, actual in zip(plain("u8", highest=highest), answers(conversion), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_activations_of_four_bits_give_the_numbers_of_their_levels_in_uint8() -> None:
    conversion = convert(spellings.build(spellings.Uint4(21), U4))
    assert conversion.certificate.integer_macs_percent == 100
    for expected, actual in zip(plain("u4"), answers(conversion), strict=True):
        np.testing.assert_array_equal(actual, expected)
