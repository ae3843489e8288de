# SPDX-License-Identifier: Apache-2.0
"""Stands in for `triton_python_backend_utils`, which exists only inside a Triton server, and for
the server's side of a Python model.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        return self.value


class TritonError:
    def __init__(self, message: str) -> None:
        self.message = message


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.value for tensor in output_tensors}
        self.error = error


def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> Tensor:
    return Tensor(name, request[name])


def _config_as_json(path: Path) -> str:
    """The configuration as a Python model gets it: protobuf's JSON with the field names of the
    .proto.
    """
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = text_format.Parse(path.read_text(), ModelConfig())
    return json_format.MessageToJson(config, preserving_proto_field_name=True)


def _take_ours() -> dict[str, ModuleType]:
    """Take the modules of `trtdet` out of those that are loaded."""
    names = [name for name in sys.modules if name.split(".")[0] == "trtdet"]
    return {name: sys.modules.pop(name) for name in names}


class StandInServer:
    """Loads `<model>/<version>/model.py` as Triton's Python backend does, and checks what it
    answers against config.pbtxt.

    As in a process of its own, where `trtdet` is not loaded yet: what the model imports of it is
    what lies beside it.

    Attributes:
        loaded: the modules of `trtdet` that the model imported.
    """

    def __init__(self, model: Path, version: int = 1) -> None:
        utils = ModuleType("triton_python_backend_utils")
        for item in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
            setattr(utils, item.__name__, item)
        ours, path = _take_ours(), list(sys.path)
        sys.modules["triton_python_backend_utils"] = utils
        spec = importlib.util.spec_from_file_location(
            f"triton_{model.name}", model / str(version) / "model.py"
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules["triton_python_backend_utils"]
            self.loaded = _take_ours()
            sys.modules.update(ours)
            sys.path[:] = path
        text = _config_as_json(model / "config.pbtxt")
        self.config = json.loads(text)
        self._model = module.TritonPythonModel()
        self.initialize(self.config)

    def initialize(self, config: dict[str, Any]) -> None:
        """Load the model with another configuration."""
        self.config = config
        self._model.initialize({"model_config": json.dumps(config), "model_name": config["name"]})

    def infer_unchecked(self, request: dict[str, np.ndarray]) -> InferenceResponse:
        """Answer one request, of whatever shapes."""
        response: InferenceResponse = self._model.execute([request])[0]
        return response

    def infer(self, *requests: dict[str, np.ndarray]) -> list[InferenceResponse]:
        """Answer several requests at once, each with its batch dimension where the configuration
        batches.
        """
        responses = self._model.execute(list(requests))
        assert len(responses) == len(requests)
        for response in responses:
            if response.error is None:
                self._check(response)
        return responses

    def _check(self, response: InferenceResponse) -> None:
        types = {"TYPE_FP32": "float32", "TYPE_INT32": "int32", "TYPE_UINT8": "uint8"}
        expected = {output["name"]: output for output in self.config["output"]}
        assert response.outputs.keys() == expected.keys()
        for name, value in response.outputs.items():
            dims = [int(dim) for dim in expected[name]["dims"]]
            shape = list(value.shape[1:] if self.config.get("max_batch_size") else value.shape)
            assert len(shape) == len(dims)
            assert all(want in (-1, got) for want, got in zip(dims, shape, strict=True)), name
            assert value.dtype == types[expected[name]["data_type"]], name
