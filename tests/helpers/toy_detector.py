# SPDX-License-Identifier: Apache-2.0
"""A detector whose answers can be read off the image: for the tests of everything behind stage 1.

The colour of the top left pixel says what is found:

    red    score of the best of four detections, in 1/255; the others have 3/4, 2/4 and 1/4 of it
    green  how many of the four count
    blue   class of detections 0 and 2; detections 1 and 3 have the next class

The boxes are always `BOXES_YXYX`, in pixels of the 32 x 48 network input.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx.numpy_helper
import onnx.parser

from trtdet.spec import ModelSpec, Nms, Preprocessing

SIZE_HW = (32, 48)
BOXES_YXYX = ((2, 4, 10, 20), (0, 0, 32, 48), (8, 8, 16, 16), (1, 1, 3, 5))
CATEGORY_IDS = (10, 20, 30)
LABELS = ("apple", "pear", "plum")


def model(
    *, batch: int | str = "N", dtype: str = "float", score_threshold: float = 0.001
) -> onnx.ModelProto:
    """The detector with its `ModelSpec`.

    Args:
        batch: a number for a static batch.
        dtype: of the input: float or uint8.
    """
    height, width = SIZE_HW
    boxes = ", ".join(str(x) for box in BOXES_YXYX for x in box)
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        toy_detector ({dtype}[{batch}, {height}, {width}, 3] images)
          => (int32[{batch}, 1] num_detections, float[{batch}, 4, 4] detection_boxes,
              float[{batch}, 4] detection_scores, int32[{batch}, 4] detection_classes)
          <int64[2] first = {{0, 0}}, int64[2] second = {{1, 1}}, int64[2] height_width = {{1, 2}},
           int64[2] rgb = {{-1, 3}}, int64[3] split = {{1, 1, 1}}, int64[3] per_image = {{-1, 1, 1}},
           float[4] shares = {{1, 0.75, 0.5, 0.25}}, float full = {{255}}, float zero = {{0}},
           float[4] class_steps = {{0, 1, 0, 1}}, float[1, 4, 4] fixed_boxes = {{{boxes}}}>
        {{
          pixel = Slice(images, first, second, height_width)
          pixel_rgb = Reshape(pixel, rgb)
          colour = Cast<to = 1>(pixel_rgb)
          red, green, blue = Split<axis = 1>(colour, split)
          num_detections = Cast<to = 6>(green)
          best = Div(red, full)
          detection_scores = Mul(best, shares)
          class_values = Add(blue, class_steps)
          detection_classes = Cast<to = 6>(class_values)
          none = Mul(red, zero)
          nothing = Reshape(none, per_image)
          detection_boxes = Add(fixed_boxes, nothing)
        }}
    """)
    spec = ModelSpec(
        family="toy",
        preprocessing=Preprocessing(SIZE_HW, dtype="uint8" if dtype == "uint8" else "float32"),
        nms=Nms(score_threshold=score_threshold, max_output_boxes=4),
        category_ids=CATEGORY_IDS,
        labels=LABELS,
    )
    spec.attach(proto)
    return proto


def save(path: Path, **options: int | str | float) -> Path:
    """Write `model(**options)` to `path`."""
    onnx.save(model(**options), path)
    return path


def save_split(path: Path, shares: Sequence[float] = (1, 0.75, 0.5, 0.25)) -> Path:
    """The same with the weights that scores are made with in `weights.bin` beside it."""
    proto = model()
    weights = next(w for w in proto.graph.initializer if w.name == "shares")
    weights.CopyFrom(onnx.numpy_helper.from_array(np.array(shares, np.float32), "shares"))
    (path.parent / "weights.bin").unlink(missing_ok=True)  # it would be appended to
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def image(
    path: Path, *, red: int, green: int, blue: int, size_wh: tuple[int, int] = (48, 32)
) -> Path:
    """Write a PNG of one colour."""
    width, height = size_wh
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = (blue, green, red)  # OpenCV's order
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"cannot write {path}")
    return path
