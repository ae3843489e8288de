# SPDX-License-Identifier: Apache-2.0
"""Triton Python model: the four outputs of a detector to boxes in source pixels, as trtdet.detections.decode makes them.

Stands alone: it needs numpy. Slots beyond `num_detections` are zero.
"""

import json
import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything here imports ONNX Runtime

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ClassIds = NDArray[np.int32]


def decode(
    count: int,
    boxes: Floats,
    scores: Floats,
    class_ids: ClassIds,
    transform: Floats,
    spec: dict[str, Any],
) -> dict[str, NDArray[Any]]:
    """Detections of one image.

    Args:
        boxes: (K, 4) float32, (K, 5) with an angle; scores, class_ids: (K,). Those beyond `count`, and those with a score of 0, are
            free slots.
        transform: scale x y, offset x y, source width and height; all zero where there is no image.
    """
    keep = np.flatnonzero(scores[:count] > 0)
    if not transform[4]:
        keep = keep[:0]
    kept = boxes[keep].astype(np.float32)
    found: dict[str, NDArray[Any]] = {"scores": scores[keep], "class_ids": class_ids[keep]}
    corners, turned = kept[:, :4], kept.shape[1] == 5
    if turned:
        found["angles"] = kept[:, 4]
    if spec["box_order"] == "yxyx":
        corners = corners[:, [1, 0, 3, 2]]
    if spec["boxes_normalized"]:
        height, width = spec["size_hw"]
        corners = corners * np.array([width, height, width, height], np.float32)
    if len(keep):
        scale, offset, limit = (np.tile(part, 2) for part in np.split(transform, 3))
        # ODTK counts the last pixel of a box, in the source image too.
        inclusive = spec["inclusive_corners"] and not turned
        last_pixel = np.array([0, 0, 1, 1] if inclusive else [0, 0, 0, 0], np.float32)
        corners = (corners - last_pixel - offset) / scale + last_pixel
        if not turned:
            corners = np.clip(corners, 0, limit)
    return {**found, "boxes_xyxy": corners.astype(np.float32)}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.spec = json.loads(config["parameters"]["trtdet"]["string_value"])
        self.category_ids = np.asarray(self.spec["category_ids"], np.int32)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        names = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
        counts, boxes, scores, classes, transforms = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in (*names, "transform")
        )
        rows, slots = scores.shape
        results: dict[str, NDArray[Any]] = {
            "num_detections": np.zeros((rows, 1), np.int32),
            "boxes_xyxy": np.zeros((rows, slots, 4), np.float32),
            "scores": np.zeros((rows, slots), np.float32),
            "class_ids": np.zeros((rows, slots), np.int32),
            "category_ids": np.zeros((rows, slots), np.int32),
        }
        if boxes.shape[2] == 5:
            results["angles"] = np.zeros((rows, slots), np.float32)
        for row in range(rows):
            count = int(counts[row].reshape(-1)[0])
            image = (boxes[row], scores[row], classes[row], transforms[row])
            found = decode(count, *image, self.spec)
            found["category_ids"] = self.category_ids[found["class_ids"]]
            n = len(found["scores"])
            results["num_detections"][row] = n
            for name, values in found.items():
                results[name][row, :n] = values
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, value) for name, value in results.items()]
        )
