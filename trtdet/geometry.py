# SPDX-License-Identifier: Apache-2.0
"""Box formats and the way back from network pixels to source pixels.

Pure NumPy; every function returns a new array.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.spec import Layout

FloatArray = NDArray[np.float32]


def yxyx_to_xyxy(boxes: FloatArray) -> FloatArray:
    """Swap the axes of corner boxes: (..., 4) y1 x1 y2 x2 <-> x1 y1 x2 y2. Its own inverse."""
    return boxes[..., [1, 0, 3, 2]]


def xyxy_to_xywh(boxes: FloatArray) -> FloatArray:
    """Corners (..., 4) x1 y1 x2 y2 to COCO's top-left corner and size x y w h."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """COCO's x y w h (..., 4) to corners x1 y1 x2 y2."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def box_iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union of every pair of corner boxes; either axis order, the same for both.

    Args:
        a: (n, 4). b: (m, 4). Boxes with a negative side count as empty.

    Returns:
        (n, m) float32 in 0..1; 0 where both areas are 0.
    """
    size_a, size_b = (np.maximum(x[:, 2:] - x[:, :2], 0) for x in (a, b))
    lower = np.maximum(a[:, None, :2], b[None, :, :2])
    upper = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.maximum(upper - lower, 0), axis=-1)
    union = size_a.prod(-1)[:, None] + size_b.prod(-1)[None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def rotated_corners(
    boxes_xyxy: NDArray[np.floating[Any]], angles: NDArray[np.floating[Any]]
) -> NDArray[Any]:
    """The corners of rotated boxes.

    Args:
        boxes_xyxy: (..., 4), the boxes before rotation about their centres.
        angles: (...), radians; positive turns clockwise on the screen, where y points down.

    Returns:
        (..., 4, 2) x y after rotation: what were top left, bottom left, bottom right and top right
        before it. ODTK's order.
    """
    centre = (boxes_xyxy[..., None, :2] + boxes_xyxy[..., None, 2:]) / 2
    x, y = np.split(boxes_xyxy[..., [[0, 1], [0, 3], [2, 3], [2, 1]]] - centre, 2, axis=-1)
    cos, sin = np.cos(angles)[..., None, None], np.sin(angles)[..., None, None]
    return np.concatenate([x * cos - y * sin, x * sin + y * cos], axis=-1) + centre


@dataclass(frozen=True)
class ResizeTransform:
    """How one image was placed in the network input: network = source * scale + offset, per
    axis.
    """

    source_wh: tuple[int, int]
    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float] = (0.0, 0.0)

    def to_source(self, boxes_xyxy: FloatArray, *, clip: bool = True) -> FloatArray:
        """Undo scale and offset, then clip to the image.

        Args:
            boxes_xyxy: (n, 4) float32, pixels of the network input.

        Returns:
            (n, 4) float32, xyxy, pixels of the source image, within 0..width and 0..height if
            `clip`.
        """
        found = to_sources(boxes_xyxy[None], [self])
        return (clip_to_sources(found, [self]) if clip else found)[0]


def to_sources(boxes_xyxy: FloatArray, transforms: Sequence[ResizeTransform]) -> FloatArray:
    """`ResizeTransform.to_source` for the boxes of a batch, (n, k, 4), not clipped."""
    scale = _per_corner([transform.scale_xy for transform in transforms])
    offset = _per_corner([transform.offset_xy for transform in transforms])
    return ((boxes_xyxy - offset) / scale).astype(np.float32)


def clip_to_sources(boxes_xyxy: FloatArray, transforms: Sequence[ResizeTransform]) -> FloatArray:
    """Boxes of a batch, (n, k, 4), in pixels of their source images, cut to these."""
    return np.clip(boxes_xyxy, 0, _per_corner([transform.source_wh for transform in transforms]))


def _per_corner(pairs: Sequence[tuple[float, float]]) -> FloatArray:
    """x and y of each image for both corners of its boxes, (n, 1, 4)."""
    return np.array([[*pair, *pair] for pair in pairs], np.float32)[:, None]


def in_layout(images: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """NHWC images in another layout."""
    return np.ascontiguousarray(images if layout == "NHWC" else images.transpose(0, 3, 1, 2))
