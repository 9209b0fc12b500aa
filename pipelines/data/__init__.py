"""Data to calibrate and evaluate on, in whatever format it comes, as batches that fit a model."""

from qat2int8.pipelines.data.dataset import Batch, Dataset
from qat2int8.pipelines.data.inputs import InputSpec, input_specs
from qat2int8.pipelines.data.opening import open_data

__all__ = ["Batch", "Dataset", "InputSpec", "input_specs", "open_data"]
