# SPDX-License-Identifier: Apache-2.0
"""Triton Python model: encoded images (JPEG, PNG, ...) to the network input of a detector, as image_batcher.py makes it.

Stands alone: it needs numpy, pillow and opencv-python-headless in the server. An empty string is a place in the batch that is not used.
"""

import io
import json
import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything here imports ONNX Runtime

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
Spec = dict[str, Any]  # trtdet.spec.Preprocessing, as JSON

cv2.setNumThreads(1)  # instances and requests run side by side


def decode(data: bytes) -> Pixels:
    """An encoded image as upright (h, w, 3) uint8 RGB; 16 bits are scaled to 8."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
            grey = np.asarray(upright).astype(np.uint32)
            return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
        if upright.mode in ("I", "F"):
            raise ValueError(f"expected 8 or 16 bits per channel, found 32 ({upright.mode})")
        if upright.mode == "P":
            upright = upright.convert("RGBA")
        return np.asarray(upright.convert("RGB"))


def place(
    source_hw: tuple[int, int], spec: Spec
) -> tuple[tuple[int, int], tuple[float, float], tuple[int, int]]:
    """Size of the picture inside the network input, and scale x y and offset x y of source -> network."""
    source_h, source_w = source_hw
    input_h, input_w = spec["size_hw"]
    scale_y = np.float32(input_h) / np.float32(source_h)
    scale_x = np.float32(input_w) / np.float32(source_w)
    if spec["resize"] == "stretch":
        return (input_h, input_w), (float(scale_x), float(scale_y)), (0, 0)
    if spec["rounding"] == "floor":
        scale = min(scale_y, scale_x)
        height = max(1, int(np.float32(source_h) * scale))
        width = max(1, int(np.float32(source_w) * scale))
        scales = (float(scale), float(scale))
    else:
        ratio = min(input_h / source_h, input_w / source_w)
        height, width = max(1, round(source_h * ratio)), max(1, round(source_w * ratio))
        scales = (width / source_w, height / source_h)
    offset = (0, 0)
    if spec["placement"] == "center":
        offset = ((input_w - width) // 2, (input_h - height) // 2)
    return (height, width), scales, offset


def resize(image: Pixels, size_hw: tuple[int, int], spec: Spec) -> NDArray[Any]:
    """(h, w, 3) uint8 to `size_hw`, in the dtype of the network input."""
    height, width = size_hw
    if image.shape[:2] == (height, width):
        return image.astype(spec["dtype"])
    if spec["antialias"]:
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized).astype(spec["dtype"])
    return cv2.resize(image.astype(spec["dtype"]), (width, height), interpolation=cv2.INTER_LINEAR)


def preprocess(image: Pixels, spec: Spec) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The network input of one image, and the six numbers that lead back to source pixels."""
    source_h, source_w = image.shape[:2]
    (height, width), scales, offset = place((source_h, source_w), spec)
    left, top = offset
    padding = np.asarray(spec["pad_rgb"], np.float32)
    if spec["dtype"] == "uint8":
        padding = np.rint(padding)
    placed = np.empty((*spec["size_hw"], 3), spec["dtype"])
    placed[:] = padding.astype(spec["dtype"])
    placed[top : top + height, left : left + width] = resize(image, (height, width), spec)
    if spec["layout"] == "NCHW":
        placed = placed.transpose(2, 0, 1)
    return placed, np.array([*scales, *offset, source_w, source_h], np.float32)


class TritonPythonModel:
    """One image or a batch of them; a request with one that cannot be decoded is answered with an error."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        text = config["parameters"]["trtdet"]["string_value"]
        self.spec: Spec = json.loads(text)["preprocessing"]
        outputs = [output["name"] for output in config["output"]]
        self.input_name = next(name for name in outputs if name != "transform")

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        encoded = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        height, width = self.spec["size_hw"]
        shape = (height, width, 3) if self.spec["layout"] == "NHWC" else (3, height, width)
        images = np.zeros((len(encoded), *shape), self.spec["dtype"])
        transforms = np.zeros((len(encoded), 6), np.float32)
        for row, data in enumerate(encoded):
            if not data:
                continue
            try:
                images[row], transforms[row] = preprocess(decode(data), self.spec)
            except (
                Exception
            ) as error:  # on a damaged file Pillow's readers raise errors of many kinds
                reason = f"image {row} cannot be decoded: {type(error).__name__}: {error}"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason))
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(self.input_name, images),
                pb_utils.Tensor("transform", transforms),
            ]
        )
