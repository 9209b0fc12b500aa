"""onnx's own test models through load and save: whatever a model holds comes out again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

from qat2int8.ir import Model, UnsupportedModel, load_model, save_model
from qat2int8.ir.errors import InvalidModel

STORED = ("simple", "pytorch-converted", "pytorch-operator")


def normalised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto`` without the differences that mean nothing.

    - IR version 3 is written as 4, in which initializers need not be inputs, and nothing else changed.
    - Opset imports, metadata and value_info have no order; "ai.onnx" is the default domain spelt out.
    - An empty string or zero is the same as an absent field, a type without element type as no type.
    - value_info of an initializer repeats the initializer; one of a name the graph lacks speaks of nothing.
    - Optional outputs left out at the end of a list need not be listed.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    twin.ir_version = max(twin.ir_version, 4)
    imports = sorted(("" if o.domain == "ai.onnx" else o.domain, o.version) for o in twin.opset_import)
    del twin.opset_import[:]
    twin.opset_import.extend(onnx.helper.make_opsetid(*imported) for imported in imports)
    _normalise_body(twin.graph)
    for function in twin.functions:
        _normalise_body(function)
    _sort(twin.metadata_props, lambda entry: entry.key)
    _drop_empty(twin)
    return twin


def _normalise_body(body: onnx.GraphProto | onnx.FunctionProto) -> None:
    produced = set()
    for node in body.node:
        if node.domain == "ai.onnx":
            node.domain = ""
        while node.output and not node.output[-1]:
            del node.output[-1]
        produced.update(node.output)
        _drop_empty(node)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _normalise_body(inner)
    if isinstance(body, onnx.GraphProto):
        for info in (*body.input, *body.output, *body.value_info):
            _drop_empty(info)
        produced -= {info.name for info in body.output}
    meant = (info for info in body.value_info if info.name in produced and len(info.ListFields()) > 1)
    _sort(body.value_info, lambda info: info.name, meant)
    _drop_empty(body)


def _sort(field, key, items: Iterable | None = None) -> None:  # type: ignore[no-untyped-def,type-arg]
    kept = []
    for item in sorted(field if items is None else items, key=key):
        copy = type(item)()
        copy.CopyFrom(item)
        kept.append(copy)
    del field[:]
    field.extend(kept)


def _drop_empty(message) -> None:  # type: ignore[no-untyped-def]
    for field, content in message.ListFields():
        if content in ("", 0):
            message.ClearField(field.name)


def is_valid(proto: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception:
        return False
    return True


def round_trip(models: Iterable[tuple[str, onnx.ModelProto]], folder: Path) -> Counter[str]:
    """Load and save every model; what could not be loaded must have been refused for a reason that is true."""
    outcomes: Counter[str] = Counter()
    path = folder / "model.onnx"
    for name, proto in models:
        path.write_bytes(proto.SerializeToString())
        model, refusal = None, ""
        try:
            model = load_model(path)
        except (InvalidModel, UnsupportedModel) as error:
            refusal = str(error)
        opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        if model is not None:
            outcomes["loaded"] += 1
        elif opset and opset not in range(10, 27):
            assert f"opset {opset}" in refusal, name
            outcomes["other opset"] += 1
            model = Model.from_proto(proto)  # the graph itself must survive even so
        else:
            told = "onnx_ir" in refusal or "training" in refusal
            assert told or not opset or not is_valid(proto), f"{name}: {refusal}"
            outcomes["refused"] += 1
            continue
        save_model(model, path)
        written = onnx.load(path)
        assert normalised(written) == normalised(proto), name
        if is_valid(proto):
            assert is_valid(written), name
    return outcomes


def test_stored_models_survive(tmp_path: Path) -> None:
    cases = [case for kind in STORED for case in load_model_tests(kind=kind)]
    models = [(case.name, onnx.load(Path(case.model_dir) / "model.onnx")) for case in cases]
    outcomes = round_trip(models, tmp_path)
    assert outcomes.total() == len(models) > 130
    assert outcomes["refused"] <= 1


@pytest.mark.slow
def test_every_operator_survives(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    models = [(case.name, case.model) for case in cases if case.model]
    for _, proto in models:
        proto.ir_version = min(proto.ir_version, 13)  # they are stamped with whatever onnx is installed
    outcomes = round_trip(models, tmp_path)
    assert outcomes.total() == len(models) > 1500
    assert outcomes["loaded"] > 0.75 * len(models)
    assert outcomes["refused"] < 0.02 * len(models)
