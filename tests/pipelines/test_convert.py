"""``qat2int8.convert``: a call, its result, and the evidence that comes with it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import REPOSITORY

import qat2int8
from qat2int8 import Conversion, DataError, OutputError, PipelineError, UnsupportedModel
from qat2int8.ir import Format, io
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.target_files import load_target


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return networks.tiny_resnet()


@pytest.fixture
def source(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


def batch() -> dict[str, np.ndarray]:
    return {"image": images(4, 16)}


# -- what goes in -----------------------------------------------------------------------------------------------


def test_a_file_and_a_model_in_memory_give_the_same(source: Path, proto: onnx.ModelProto) -> None:
    results = [qat2int8.convert(model).model.to_proto().graph for model in (source, str(source), proto)]
    assert results[0] == results[1] == results[2]


def test_the_source_is_left_as_it_is(source: Path, proto: onnx.ModelProto) -> None:
    content, copy = source.read_bytes(), onnx.ModelProto()
    copy.CopyFrom(proto)
    for model in (source, proto):
        conversion = qat2int8.convert(model)
        assert conversion.certificate
        assert conversion.fidelity
    assert source.read_bytes() == content
    assert proto == copy


def test_target_and_pipeline_can_be_names_paths_or_values(proto: onnx.ModelProto) -> None:
    pipelines = REPOSITORY / "pipelines"
    ways = [
        {},
        {"target": "ort-x86", "pipeline": "qat-to-int8"},
        {"target": pipelines / "targets" / "ort-x86.yaml", "pipeline": pipelines / "qat-to-int8.yaml"},
        {"target": load_target("ort-x86"), "pipeline": load_pipeline("qat-to-int8")},
        {"pipeline": str(load_pipeline("qat-to-int8"))},
    ]
    graphs = [qat2int8.convert(proto, **way).model.to_proto().graph for way in ways]  # type: ignore[arg-type]
    assert all(graph == graphs[0] for graph in graphs)


def test_options_reach_their_pass(proto: onnx.ModelProto) -> None:
    plain = qat2int8.convert(proto)
    skipped = qat2int8.convert(proto, options={"insert-quantize-dequantize": {"skip_nodes": ["Gemm_*"]}})
    named = qat2int8.convert(proto, skip_nodes=["Gemm_*"])
    assert len(skipped.certificate.float_compute) == len(plain.certificate.float_compute) + 1
    assert named.model.to_proto().graph == skipped.model.to_proto().graph


@pytest.mark.parametrize(
    "wrong",
    [
        {"options": {"fuse-nothing": {}}},
        {"options": {"cleanup": {"speed": 1}}},
        {"verify": "much"},
        {"target": "abacus"},
        {"pipeline": "qat-to-int3"},
        {"on_missing_scale": "ignore"},
        {"format": "qonnx"},
        {"pipeline": "qat-to-fp32", "format": "qoperator"},
        {"target": replace(load_target("ort-x86"), formats=(Format.QDQ,)), "format": "qoperator"},
        {"pipeline": "cleanup", "skip_nodes": ["a"]},
    ],
    ids=str,
)
def test_misspelt_arguments(wrong: dict[str, object]) -> None:
    """Found before the model is read, which is not there."""
    with pytest.raises(PipelineError):
        qat2int8.convert("no such file", **wrong)  # type: ignore[arg-type]


def test_formats(proto: onnx.ModelProto, tmp_path: Path) -> None:
    default, qdq, lowered = (qat2int8.convert(proto, format=name) for name in (None, "qdq", "qoperator"))
    assert default.after == qdq.after
    assert default.after["Conv"] == lowered.after["QLinearConv"]
    assert not {"Conv", "Gemm", "DequantizeLinear"} & set(lowered.after)
    again = qat2int8.convert(proto, pipeline=str(lowered.pipeline))
    assert again.model.to_proto().graph == lowered.model.to_proto().graph
    given = qat2int8.convert(proto, options={"lower-to-qoperators": {"format": "qoperator"}})
    assert given.after == lowered.after
    lowered.save(tmp_path / "int8.onnx")
    assert lowered.fidelity.as_dict() == default.fidelity.as_dict()
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "int8.onnx").opset_import} == {
        "": 17,
        "com.microsoft": 1,
    }
    assert (tmp_path / "int8.onnx").stat().st_size < len(default.model.to_proto().SerializeToString())


def test_an_unknown_format_is_told_which_there_are() -> None:
    with pytest.raises(PipelineError, match="one of qdq, qoperator, not qonnx"):
        qat2int8.convert("no such file", format="qonnx")


def test_a_model_in_memory_that_is_too_large(proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> bytes:
        raise ValueError("exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", refuse)
    with pytest.raises(UnsupportedModel, match=r"larger than 2 GiB .*convert the file"):
        qat2int8.convert(proto)


# -- what comes out ---------------------------------------------------------------------------------------------


def test_what_a_conversion_tells(source: Path) -> None:
    conversion = qat2int8.convert(source)
    assert isinstance(conversion, Conversion)
    assert conversion.target.name == "ort-x86"
    assert conversion.source_bytes == source.stat().st_size
    assert conversion.before["QuantizeLinear"] == 14
    assert conversion.before["BatchNormalization"] > 0
    assert "BatchNormalization" not in conversion.after
    assert sum(conversion.after.values()) == len(conversion.model.to_proto().graph.node)
    assert conversion.certificate.integer_macs_percent == 100.0
    assert conversion.certificate is conversion.certificate
    assert conversion.fidelity is conversion.fidelity
    assert conversion.fidelity.samples > 0
    assert conversion.diagnostics == conversion.run.diagnostics
    assert any(len(conversion.model.scales.get(value).scale.shape) == 0 for value in conversion.model.scales)


def test_the_file_explains_itself(source: Path, tmp_path: Path) -> None:
    conversion = qat2int8.convert(source, skip_nodes=["Gemm_*"])
    conversion.save(tmp_path / "int8.onnx")
    stamp = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert stamp["qat2int8.version"] == qat2int8.__version__
    assert stamp["qat2int8.pipeline"] == str(conversion.pipeline)
    assert "skip_nodes" in stamp["qat2int8.pipeline"]
    assert stamp["qat2int8.target"] == "ort-x86"
    assert stamp["qat2int8.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    told = json.loads(stamp["qat2int8.diagnostics"])
    assert told == [finding.as_dict() for finding in conversion.diagnostics]
    assert "Q303" in {finding["code"] for finding in told}


def test_fidelity_on_data(source: Path) -> None:
    conversion = qat2int8.convert(source)
    measured = conversion.fidelity_on((batch() for _ in range(3)), "smooth noise")
    assert (measured.samples, measured.data) == (12, "smooth noise")
    assert measured.sqnr_db > 20
    with pytest.raises(DataError):
        conversion.fidelity_on([{"picture": batch()["image"]}])
    with pytest.raises(DataError, match="no samples"):
        conversion.fidelity_on([])


# -- evidence and files -----------------------------------------------------------------------------------------


def test_evidence_does_not_need_the_saved_file(source: Path, tmp_path: Path) -> None:
    conversion = qat2int8.convert(source)
    conversion.save(tmp_path / "int8.onnx")
    (tmp_path / "int8.onnx").unlink()
    assert conversion.certificate.integer_macs_percent == 100.0
    assert conversion.fidelity_on([batch()]).sqnr_db > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_evidence_is_of_this_conversion_when_another_took_its_file(source: Path, tmp_path: Path) -> None:
    whole, part = qat2int8.convert(source), qat2int8.convert(source, skip_nodes=["*"])
    whole.save(tmp_path / "int8.onnx")
    part.save(tmp_path / "int8.onnx")
    assert whole.certificate.executed["QLinearConv"] > 0
    assert "QLinearConv" not in part.certificate.executed


@pytest.mark.parametrize("change", [os.unlink, os.utime], ids=["deleted", "changed"])
def test_fidelity_needs_the_source_as_it_was(source: Path, change: Callable[[Path], None]) -> None:
    conversion = qat2int8.convert(source)
    assert conversion.certificate
    change(source)
    with pytest.raises(DataError, match="changed or deleted since it was converted"):
        _ = conversion.fidelity
    with pytest.raises(DataError, match=str(source)):
        conversion.fidelity_on([batch()])


def test_the_source_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    (tmp_path / "link.onnx").symlink_to(source)
    conversion = qat2int8.convert(source)
    for path in (source, tmp_path / "link.onnx"):
        with pytest.raises(OutputError, match="is the input model itself"):
            conversion.save(path)
    assert source.read_bytes() == content


@pytest.fixture
def external(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    """The network with its weights in a file beside it."""
    folder = tmp_path / "external"
    folder.mkdir()
    path, copy = folder / "model.onnx", onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(external: Path, source: Path, tmp_path: Path) -> None:
    conversion = qat2int8.convert(external)
    assert conversion.source_bytes > 0.9 * source.stat().st_size
    assert conversion.certificate.integer_macs_percent == 100.0
    assert conversion.fidelity.sqnr_db > 10
    conversion.save(tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx.data").exists()
    assert conversion.certificate.executed == qat2int8.convert(source).certificate.executed


def test_large_models_need_no_protobuf_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit weights go to a file of their own, for the evidence too."""
    monkeypatch.setattr(io, "INLINE_LIMIT", 1000)
    written: list[Path] = []
    save = io.save_model

    def spy(model: qat2int8.Model, path: Path) -> None:
        save(model, path)
        written.extend(Path(path).parent.iterdir())

    monkeypatch.setattr("qat2int8.pipelines.convert.save_model", spy)
    conversion = qat2int8.convert(source)
    assert conversion.certificate.integer_macs_percent == 100.0
    assert sorted(path.name for path in written) == ["model.onnx", "model.onnx.data"]
    assert conversion.fidelity_on([batch()]).sqnr_db > 20
    assert len(written) == 2


def test_nothing_is_left_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    conversion = qat2int8.convert(source)
    assert conversion.certificate
    assert list(scratch.iterdir())
    del conversion
    gc.collect()
    assert not list(scratch.iterdir())


# -- the manager under it ---------------------------------------------------------------------------------------


def test_the_order_of_initializers_is_no_change(proto: onnx.ModelProto) -> None:
    """A canonical model with its initializers in another order: canonicalize finds nothing to do."""
    settled = qat2int8.convert(proto, pipeline="canonicalize").model.to_proto()
    tensors = sorted(settled.graph.initializer, key=lambda tensor: hashlib.sha256(tensor.name.encode()).digest())
    del settled.graph.initializer[:]
    settled.graph.initializer.extend(tensors)
    again = qat2int8.convert(settled, pipeline="canonicalize")
    assert not again.run.changed
