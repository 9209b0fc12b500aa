"""The configuration file of post-training quantization: ours, and PaddleSlim's."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from qat2int8 import quantize
from qat2int8.ir import DataError, PipelineError
from qat2int8.pipelines.quantize_config import QuantizeConfig

PADDLE = """\
version: 1.0
strategies:
    mkldnn_post_training_strategy:
        class: 'MKLDNNPostTrainingQuantStrategy' # required, class name of MKL-DNN INT8 Post-training quantization strategy
        int8_model_save_path: 'OUTPUT_PATH' # required, int8 ProgramDesc with fp32 weights
        fp32_model_path: 'MODEL_PATH' # required, fp32 ProgramDesc with fp32 weights
        cpu_math_library_num_threads: 1 # required, The number of cpu math library threads
compressor:
    epoch: 0 # not required, set to 0
    checkpoint_path: '' # not required, set to ''
    strategies:
        - mkldnn_post_training_strategy
"""  # noqa: E501
"""As PaddleSlim documents it."""


def read(folder: Path, text: str) -> QuantizeConfig:
    path = folder / "ptq.yaml"
    path.write_text(text)
    return QuantizeConfig.read(path)


def test_what_is_said_is_read_and_the_rest_is_as_without_a_file(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "model: m.onnx\noutput: out.onnx\ndata: {path: d.npz, scale: 0.5}\ncalibrator: percentile{percent=99.9}\n"
        "per_channel: false\nquantize_ops: [Conv]\nrelu_encoding: refine\nrequire_int8: 90\n"
        "options: {complete-scales: {sigmas: 4.0}}\n",
    )
    assert config.files() == (Path("m.onnx"), Path("out.onnx"))
    assert config.data == {"path": "d.npz", "scale": 0.5}
    assert config.require_int8 == 90.0
    options = config.options_of_quantize()
    assert (options["per_channel"], options["quantize_ops"], options["samples"]) == (False, ["Conv"], None)
    assert options["options"] == {
        "update-relu-output-scales": {"encoding": "refine"},
        "complete-scales": {"sigmas": 4.0},
    }


def test_its_keys_and_defaults_are_those_of_the_function() -> None:
    parameters = inspect.signature(quantize).parameters
    options = QuantizeConfig().options_of_quantize()
    assert set(options) == set(parameters) - {"model", "data", "table", "on_batch", "observers"}
    for name, value in options.items():
        default = parameters[name].default
        assert value == (list(default) if isinstance(default, tuple) else default) or (name, value) == (
            "options",
            {},
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibrater: mse\n", r"ptq.yaml:1: unknown key 'calibrater' \(did you mean 'calibrator'\?\)"),
        ("model: m.onnx\nsamples: 0\n", "ptq.yaml:2: samples: "),
        ("samples: many\n", "ptq.yaml:1: samples: "),
        ("on_missing_scale: ignore\n", "ptq.yaml:1: on_missing_scale: "),
        ("model: [\n", "not YAML"),
        ("- model\n", "a mapping is expected"),
        ("model: a\nmodel: b\n", "the key 'model' is given twice"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be read: No such file"):
        QuantizeConfig.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="cannot be read: not UTF-8 text"):
        QuantizeConfig.read(tmp_path / "binary.yaml")


def test_model_and_output_have_to_come_from_somewhere() -> None:
    with pytest.raises(DataError, match="no model was given"):
        QuantizeConfig().files()
    with pytest.raises(DataError, match="no output was given"):
        QuantizeConfig(model="m.onnx").files()


def test_the_strategy_of_paddleslim_is_taken_as_it_is(tmp_path: Path) -> None:
    config = read(tmp_path, PADDLE)
    assert config.files() == (Path("MODEL_PATH"), Path("OUTPUT_PATH/model.onnx"))
    assert (config.threads, config.keep_fp32_weights, config.calibrator) == (1, True, "entropy")


def test_a_folder_stands_for_the_model_in_it(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "network.onnx").touch()
    config = read(tmp_path, PADDLE.replace("MODEL_PATH", str(models)).replace("OUTPUT_PATH", "int8.onnx"))
    assert config.files() == (models / "network.onnx", Path("int8.onnx"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fp32_model_path", "fp32_modle_path", "ptq.yaml:6: unknown key .*did you mean 'fp32_model_path'"),
        ("cpu_math_library_num_threads: 1", "cpu_math_library_num_threads: one", "ptq.yaml:7: "),
        ("'MKLDNNPostTrainingQuantStrategy'", "'QuantizationStrategy'", "ptq.yaml:4: .*MKLDNNPostTraining"),
        ("epoch:", "epochs:", r"unknown key 'compressor.epochs' \(did you mean 'epoch'"),
        ("- mkldnn_post_training_strategy", "- another", "names 1 strategies, of which it has mkldnn_post"),
    ],
)
def test_mistakes_in_it_are_told_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        read(tmp_path, PADDLE.replace(old, new))
