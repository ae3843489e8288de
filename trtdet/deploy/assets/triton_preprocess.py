# SPDX-License-Identifier: Apache-2.0
"""Triton Python model: encoded images (JPEG, PNG, ...) to the network input of a detector, by the
code that infer.py runs.

That code lies in the folder trtdet beside this file. The server needs numpy, pillow and
opencv-python-headless. An empty string is a place in the batch that is not used.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for what else runs in this process
sys.path.insert(0, str(Path(__file__).resolve().parent))  # before a trtdet that is installed

from trtdet.deploy.parameter import preprocess_parameter
from trtdet.images.files import decode_image
from trtdet.images.preprocess import preprocess

cv2.setNumThreads(1)  # instances and requests run side by side


class TritonPythonModel:
    """One image or a batch of them; a request with one that cannot be decoded is answered with
    an error.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.preprocessing = preprocess_parameter(config).preprocessing
        outputs = [output["name"] for output in config["output"]]
        self.input_name = next(name for name in outputs if name != "transform")

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        encoded = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        spec = self.preprocessing
        images = np.zeros((len(encoded), *spec.image_shape), spec.dtype)
        transforms = np.zeros((len(encoded), 6), np.float32)
        for row, data in enumerate(encoded):
            if not data:
                continue
            try:
                image = decode_image(data, f"image {row}")
            except ValueError as error:
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            _, transform = preprocess(image, spec, out=images[row])
            transforms[row] = (*transform.scale_xy, *transform.offset_xy, *transform.source_wh)
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(self.input_name, images),
                pb_utils.Tensor("transform", transforms),
            ]
        )
