"""Post-training quantization as a file: our own YAML, and that of PaddleSlim's strategy of the same purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qat2int8.ir import DataError, PipelineError
from qat2int8.pipelines.calibration.algorithms import DEFAULT_ALGORITHM
from qat2int8.pipelines.calibration.steps import POST_TRAINING
from qat2int8.pipelines.spec import read_document
from qat2int8.pipelines.target_files import DEFAULT_TARGET

__all__ = ["QuantizeConfig"]


class QuantizeConfig(BaseModel):
    """Everything that ``qat2int8 quantize`` can be told; see :func:`qat2int8.quantize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    output: str | None = None
    data: str | dict[str, Any] | None = None
    table: str | None = None
    trust_table: bool = False
    calibrator: str = DEFAULT_ALGORITHM
    samples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)
    target: str = DEFAULT_TARGET
    pipeline: str = POST_TRAINING
    per_channel: bool = True
    symmetric: bool = False
    keep_fp32_weights: bool = False
    skip_first_conv: bool = False
    bias_correction: bool = False
    quantize_ops: list[str] = []
    skip_nodes: list[str] = []
    on_missing_scale: Literal["error", "float"] = "error"
    relu_encoding: Literal["exact", "refine", "same-grid"] | None = None
    format: Literal["qdq", "qoperator"] | None = None
    options: dict[str, dict[str, Any]] = {}
    verify: Literal["none", "structure", "checker", "numeric"] = "checker"
    require_int8: float | None = Field(default=None, ge=0.0, le=100.0, strict=False)

    @classmethod
    def read(cls, path: Path) -> QuantizeConfig:
        """A file of ours, or one with PaddleSlim's ``MKLDNNPostTrainingQuantStrategy``.

        Raises:
            PipelineError: it cannot be read, is no YAML, or has an unknown key or value; names the line.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise PipelineError(f"cannot be read: {reason}", where=str(path)) from error
        if _is_paddle(text):
            return read_document(text, _PaddleFile, where=str(path)).settings(str(path))
        return read_document(text, cls, where=str(path))

    def files(self) -> tuple[Path, Path]:
        """The model and where the result goes.

        Raises:
            DataError: one of them was not given.
        """
        if self.model is None:
            raise DataError("no model was given", remedy="name it, or give the key 'model' in --config")
        if self.output is None:
            raise DataError("no output was given", remedy="say -o FILE, or give the key 'output' in --config")
        return Path(self.model), Path(self.output)

    def options_of_quantize(self) -> dict[str, Any]:
        """What :func:`qat2int8.quantize` takes by keyword, but for its inputs."""
        apart = {"model", "output", "data", "table", "relu_encoding", "require_int8"}
        settings = {name: getattr(self, name) for name in type(self).model_fields if name not in apart}
        if self.relu_encoding is not None:
            settings["options"] = {"update-relu-output-scales": {"encoding": self.relu_encoding}, **self.options}
        return settings


class _PaddleStrategy(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    class_: Literal["MKLDNNPostTrainingQuantStrategy"] = Field(alias="class")
    int8_model_save_path: str
    fp32_model_path: str
    cpu_math_library_num_threads: int = Field(default=1, ge=0)


class _PaddleCompressor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epoch: int = 0
    checkpoint_path: str | None = ""
    strategies: list[str] = []


class _PaddleFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: float = 1.0
    strategies: dict[str, _PaddleStrategy]
    compressor: _PaddleCompressor = _PaddleCompressor()

    def settings(self, where: str) -> QuantizeConfig:
        """The same in our terms.

        Paddle's quantizer uses the KL divergence, and what it writes keeps float weights. Folders stand for the
        model in them. Data are no part of the file; Paddle takes a reader in Python, and here it is ``--data``.

        Raises:
            PipelineError: there is not exactly one strategy.
        """
        named = self.compressor.strategies or list(self.strategies)
        if len(named) != 1 or named[0] not in self.strategies:
            raise PipelineError(
                f"names {len(named)} strategies, of which it has {', '.join(self.strategies) or 'none'}",
                where=where,
                remedy="name one of them under compressor: strategies",
            )
        strategy = self.strategies[named[0]]
        return QuantizeConfig(
            model=str(_model_in(Path(strategy.fp32_model_path))),
            output=str(_result_in(Path(strategy.int8_model_save_path))),
            threads=strategy.cpu_math_library_num_threads,
            keep_fp32_weights=True,
        )


def _is_paddle(text: str) -> bool:
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return False
    return isinstance(document, dict) and "strategies" in document


def _model_in(path: Path) -> Path:
    """The only ONNX model of a folder; a file is taken as it is."""
    models = sorted(path.glob("*.onnx")) if path.is_dir() else []
    return models[0] if len(models) == 1 else path


def _result_in(path: Path) -> Path:
    """A model in a folder, where the path does not name a file."""
    return path if path.suffix == ".onnx" else path / "model.onnx"
