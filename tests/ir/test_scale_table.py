from __future__ import annotations

import json

import numpy as np
import onnx_ir as oir
import pytest

from qat2int8.ir import (
    INT8,
    UINT8,
    Code,
    DataError,
    Provenance,
    QuantDType,
    QuantParams,
    ScaleTable,
    TrainedTensor,
)

X, Y, Z = (oir.Value(name=name) for name in "xyz")
NARROW = QuantParams.make(0.1, 0, INT8, origin="a")
WIDE = QuantParams.make(0.2, 0, INT8, origin="b")


def test_a_first_write_stands() -> None:
    table = ScaleTable()
    assert table.record(X, NARROW) is None
    assert table[X] is NARROW
    assert X in table
    assert len(table) == 1
    assert list(table) == [X]


def test_values_are_told_apart_by_identity() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    assert table.get(oir.Value(name="x")) is None
    assert table.get(None) is None


@pytest.mark.parametrize(("first", "second"), [(NARROW, WIDE), (WIDE, NARROW)])
def test_of_two_trained_grids_the_wider_stays_and_the_conflict_is_told(
    first: QuantParams, second: QuantParams
) -> None:
    table = ScaleTable()
    table.record(X, first)
    found = table.record(X, second, node="q2")
    assert table[X] is WIDE
    assert found is not None
    assert (found.code, found.node, found.value) == (Code.SCALE_CONFLICT, "q2", "x")
    assert "from b is used" in found.reason
    assert "from a is not" in found.reason
    assert found.remedy


def test_the_same_grid_twice_is_no_conflict() -> None:
    table = ScaleTable()
    table.record(X, NARROW)
    assert table.record(X, NARROW.with_(origin="again")) is None
    assert table[X].origin == "a"


def test_the_stronger_of_two_equal_grids_gives_its_name() -> None:
    table = ScaleTable()
    table.record(X, NARROW.with_(source=Provenance.DERIVED))
    assert table.record(X, NARROW) is None
    assert table[X].source is Provenance.TRAINED


@pytest.mark.parametrize("flip", [False, True])
def test_a_stronger_source_wins_however_narrow(flip: bool) -> None:
    table = ScaleTable()
    pair = [WIDE.with_(source=Provenance.CALIBRATED), NARROW]
    outcomes = [table.record(X, params) for params in (reversed(pair) if flip else pair)]
    assert table[X] is NARROW
    assert outcomes[1] is not None


def test_a_derived_grid_yields_to_a_calibrated_one_without_a_word() -> None:
    table = ScaleTable()
    table.record(X, WIDE.with_(source=Provenance.DERIVED))
    assert table.record(X, NARROW.with_(source=Provenance.CALIBRATED)) is None
    assert table[X].source is Provenance.CALIBRATED


def test_set_and_discard_ask_nobody() -> None:
    table = ScaleTable()
    table.record(X, WIDE)
    table.set(X, NARROW)
    assert table[X] is NARROW
    assert table.discard(X) is NARROW
    assert table.discard(X) is None
    assert len(table) == 0


def test_move_follows_a_rewiring() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    table.set(Y, WIDE)
    table.move(X, Y)
    assert X not in table
    assert table[Y] is NARROW
    table.move(Z, Y)
    assert table[Y] is NARROW


def test_a_copy_is_independent() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    twin = table.copy()
    twin.set(X, WIDE)
    twin.set(Y, WIDE)
    assert table[X] is NARROW
    assert Y not in table


def test_items_may_be_changed_while_walked() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    for value, params in table.items():
        table.set(Y, params)
        table.discard(value)
    assert list(table) == [Y]


def test_json_round_trip_is_bit_exact() -> None:
    table = ScaleTable()
    odd = np.float32(1) / np.float32(3)
    table.set(X, QuantParams.make(odd, 7, UINT8, source=Provenance.CALIBRATED, origin="entropy"))
    table.set(Y, QuantParams.make([odd, 1e-7], [0, 0], QuantDType(4, True, True), axis=1, origin="é"))
    text = table.to_json("abc")
    back = ScaleTable.from_json(text, {"x": X, "y": Y}, "abc")
    assert list(back) == [X, Y]
    for value, params in table.items():
        assert back[value].same_grid(params)
        assert (back[value].source, back[value].origin) == (params.source, params.origin)
    assert back.to_json("abc") == text


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", "3", '{"scales": {}, "model": "other"}'])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        ScaleTable.from_json(text, {}, "abc")


def test_a_table_for_another_model_is_refused() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    with pytest.raises(DataError, match="another model"):
        ScaleTable.from_json(table.to_json("abc"), {"x": X}, "def")
    with pytest.raises(DataError, match="'x'"):
        ScaleTable.from_json(table.to_json("abc"), {"y": X}, "abc")
    assert json.loads(table.to_json("abc"))["model"] == "abc"


def test_rows_are_for_people() -> None:
    table = ScaleTable()
    table.set(X, NARROW)
    ((name, grid, span, origin),) = table.rows()
    assert (name, origin) == ("x", "a")
    assert "0.1" in grid
    assert span == "[-12.8, 12.7]"


def test_an_entry_that_is_no_grid_is_named() -> None:
    value = oir.val("x", oir.DataType.FLOAT, [2])
    table = ScaleTable()
    table.set(value, QuantParams.make(0.5, 0, QuantDType(8, signed=False, top=99)))
    text = table.to_json("0")
    assert ScaleTable.from_json(text, {"x": value}, "0")[value].dtype.qmax == 99
    for broken in (
        text.replace('"bits"', '"bitten"'),
        text.replace("0.5", '"half"'),
        text.replace("trained", "guessed"),
    ):
        with pytest.raises(DataError, match=r"tensor 'x'.*not a grid"):
            ScaleTable.from_json(broken, {"x": value}, "0")


def traced_table() -> tuple[ScaleTable, list[oir.Value], TrainedTensor]:
    table, values = ScaleTable(), [oir.Value(name=name) for name in "abc"]
    tensor = TrainedTensor("x", "xq", QuantParams.make(0.5))
    table.trace(values[0], tensor)
    return table, values, tensor


def test_a_trace_follows_its_value() -> None:
    table, (a, b, c), tensor = traced_table()
    table.set(a, tensor.grid)
    table.move(a, b)
    assert (table.traced(a), table.traced(b), table.get(b)) == (None, tensor, tensor.grid)
    table.move_trace(b, c)
    assert (table.traced(b), table.traced(c), table.get(b)) == (None, tensor, tensor.grid)
    assert list(table.traces()) == [(c, tensor)]
    assert list(table.copy().traces()) == [(c, tensor)]


def test_a_trace_gives_way_to_the_one_that_is_there_and_goes_with_its_value() -> None:
    table, (a, b, *_), tensor = traced_table()
    other = TrainedTensor("y", "yq", tensor.grid)
    table.trace(b, other)
    table.move_trace(a, b)
    assert list(table.traces()) == [(b, other)]
    table.discard(b)
    assert list(table.traces()) == []
