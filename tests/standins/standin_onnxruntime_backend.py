# SPDX-License-Identifier: Apache-2.0
"""Stands in for Triton's ONNX Runtime backend inside a real Triton that has none
(nvidia-pytriton's): a model of its Python backend.

`serve_in_python` turns a repository that deploy.py wrote for an ONNX file into one for this model;
name, tensors, batching and parameters of config.pbtxt stay as they are.
"""

import os
import shutil
from pathlib import Path

import numpy as np


def serve_in_python(repository: Path) -> None:
    """Let every `onnxruntime_onnx` model of a repository run in the Python backend."""
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text()
        if 'platform: "onnxruntime_onnx"' in text:
            config.write_text(text.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
            for version in config.parent.glob("[0-9]*"):
                shutil.copyfile(__file__, version / "model.py")


class TritonPythonModel:
    """What Triton's Python backend looks for in model.py."""

    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        folder = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("STANDIN_THREADS", "2"))
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def execute(self, requests: list) -> list:
        """Answer the requests that Triton's dynamic batcher put together, as one batch."""
        import triton_python_backend_utils as pb_utils

        inputs = [
            pb_utils.get_input_tensor_by_name(request, self._input).as_numpy()
            for request in requests
        ]
        values = self._session.run(self._outputs, {self._input: np.concatenate(inputs)})
        ends = np.cumsum([len(images) for images in inputs])[:-1]
        split = [np.split(value, ends) for value in values]
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, rows[i])
                    for name, rows in zip(self._outputs, split, strict=True)
                ]
            )
            for i in range(len(requests))
        ]
