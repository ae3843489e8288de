# SPDX-License-Identifier: Apache-2.0
"""Triton Python model: the four outputs of a detector to boxes in source pixels, by the code that
infer.py runs.

That code lies in the folder trtdet beside this file. The server needs numpy. Slots beyond
`num_detections` are zero.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for what else runs in this process
sys.path.insert(0, str(Path(__file__).resolve().parent))  # before a trtdet that is installed

from trtdet.deploy.parameter import postprocess_parameter
from trtdet.detections import decode
from trtdet.geometry import ResizeTransform
from trtdet.spec import OUTPUT_NAMES


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.spec = postprocess_parameter(json.loads(args["model_config"])).spec()
        self.category_ids = np.asarray(self.spec.category_ids, np.int32)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        outputs = {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in OUTPUT_NAMES
        }
        transforms = pb_utils.get_input_tensor_by_name(request, "transform").as_numpy()
        rows, slots = outputs["detection_scores"].shape
        results: dict[str, NDArray[Any]] = {
            "num_detections": np.zeros((rows, 1), np.int32),
            "boxes_xyxy": np.zeros((rows, slots, 4), np.float32),
            "scores": np.zeros((rows, slots), np.float32),
            "class_ids": np.zeros((rows, slots), np.int32),
            "category_ids": np.zeros((rows, slots), np.int32),
        }
        if outputs["detection_boxes"].shape[2] == 5:
            results["angles"] = np.zeros((rows, slots), np.float32)
        used = np.flatnonzero(transforms[:, 4])  # the others: places without an image
        found = decode(
            {name: values[used] for name, values in outputs.items()},
            self.spec,
            [transform_of(numbers) for numbers in transforms[used].tolist()],
        )
        for row, one in zip(used, found, strict=True):
            n = len(one)
            results["num_detections"][row] = n
            results["boxes_xyxy"][row, :n] = one.boxes_xyxy
            results["scores"][row, :n] = one.scores
            results["class_ids"][row, :n] = one.class_ids
            results["category_ids"][row, :n] = self.category_ids[one.class_ids]
            if one.angles is not None:
                results["angles"][row, :n] = one.angles
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, value) for name, value in results.items()]
        )


def transform_of(numbers: list[float]) -> ResizeTransform:
    """The six numbers that the preprocessing passed by the detector."""
    scale_x, scale_y, offset_x, offset_y, width, height = numbers
    return ResizeTransform((int(width), int(height)), (scale_x, scale_y), (offset_x, offset_y))
