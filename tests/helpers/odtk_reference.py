# SPDX-License-Identifier: Apache-2.0
"""What ODTK makes of a picture and of its network's outputs, in NumPy, one image at a time.

Source: NVIDIA/retinanet-examples odtk/data.py, odtk/box.py, odtk/infer.py, csrc/cuda/decode.cu,
decode_rotate.cu, nms.cu, nms_iou.cu (their facts, no line of them).
"""

import numpy as np
from PIL import Image

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
THRESHOLD, TOP_N, NMS, DETECTIONS = 0.05, 1000, 0.5, 100


def preprocess(image: Image.Image, size_hw: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A picture as the network sees it, [3, H, W], and the ratio it was resized by."""
    width, height = image.size
    ratio = min(size_hw[0] / height, size_hw[1] / width)
    resized = image.convert("RGB").resize((int(ratio * width), int(ratio * height)), Image.Resampling.BILINEAR)  # fmt: skip
    pixels = (np.asarray(resized, np.float32) / 255 - MEAN) / STD
    padded = np.zeros((*size_hw, 3), np.float32)
    padded[: resized.height, : resized.width] = pixels
    return padded.transpose(2, 0, 1), ratio


def anchors(stride: int, *, rotated: bool) -> np.ndarray:
    """Corners (A, 4) of one cell's anchors."""
    rows = []
    for _ in range(3 if rotated else 1):
        for scale in (4 * 2 ** (i / 3) for i in range(3)):
            for ratio in (1.0, 2.0, 0.5):
                width = np.sqrt(stride * stride / ratio)
                width = np.round(width) if rotated else width
                height = np.round(width * ratio) if rotated else width * ratio
                size = np.array([width, height]) * scale
                rows.append([*(stride - size) / 2, *((stride + size) / 2 - rotated)])
    return np.array(rows)


def decode(score: np.ndarray, box: np.ndarray, stride: int) -> tuple[np.ndarray, ...]:
    """One level: the best scores, their boxes x1 y1 x2 y2 (inclusive), (sin, cos) of rotated
    ones, and classes.
    """
    rotated = box.shape[0] == 162
    cell_anchors = anchors(stride, rotated=rotated)
    _, height, width = score.shape
    count = len(cell_anchors)
    score = score.reshape(count, -1, height, width)
    box = box.reshape(count, -1, height, width)
    picked = np.flatnonzero(score.reshape(-1) > np.float32(THRESHOLD))
    picked = picked[np.argsort(-score.reshape(-1)[picked], kind="stable")[:TOP_N]]
    a, c, y, x = np.unravel_index(picked, score.shape)
    delta = box[a, :, y, x].astype(np.float64)
    low = cell_anchors[a, :2] + np.stack([x, y], 1) * stride
    high = cell_anchors[a, 2:] + np.stack([x, y], 1) * stride
    size = high - low + 1
    centre = delta[:, :2] * size + low + size / 2
    half = np.exp(delta[:, 2:4]) * size / 2
    last = np.array([width, height]) * stride - 1
    boxes = np.concatenate([np.maximum(centre - half, 0), np.minimum(centre + half - 1, last)], 1)
    return score[a, c, y, x], boxes, delta[:, 4:], c


def suppress(scores, boxes, classes, overlap) -> np.ndarray:
    """Positions that stay, best first.

    `overlap(i, others)` is the IoU of box i with others of lower score.
    """
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order) and len(kept) < DETECTIONS:
        best, rest = order[0], order[1:]
        kept.append(best)
        rivals = classes[rest] == classes[best]
        gone = np.zeros(len(rest), bool)
        if rivals.any():
            gone[rivals] = overlap(best, rest[rivals]) > NMS
        order = rest[~gone]
    return np.array(kept, np.int64)


def iou_plus_one(boxes, i, others) -> np.ndarray:
    """IoU where a box from x1 to x2 is x2 - x1 + 1 wide."""
    low = np.maximum(boxes[i, :2], boxes[others, :2])
    high = np.minimum(boxes[i, 2:], boxes[others, 2:])
    shared = np.maximum(high - low + 1, 0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return shared / (area[i] + area[others] - shared)


def detect(scores, boxes, overlap=None):
    """All levels of one image, scores and boxes [channels, h, w] each: (scores, boxes, (sin, cos),
    classes) that ODTK keeps.

    Args:
        overlap: f(boxes, sin_cos, i, others); None: that of boxes that are not rotated.
    """
    strides = (8, 16, 32, 64, 128)
    parts = zip(*(decode(s, b, stride) for s, b, stride in zip(scores, boxes, strides, strict=True)), strict=True)  # fmt: skip
    score, box, sin_cos, class_id = (np.concatenate(part) for part in parts)
    if overlap is None:
        kept = suppress(score, box, class_id, lambda i, others: iou_plus_one(box, i, others))
    else:
        kept = suppress(score, box, class_id, lambda i, others: overlap(box, sin_cos, i, others))
    return score[kept], box[kept], sin_cos[kept], class_id[kept]


def to_results(scores, boxes, sin_cos, classes, ratio: float) -> list[dict]:
    """As ODTK's detections.json has them, less the image: bbox, score, category_id (class + 1),
    segmentation of rotated ones.
    """
    results = []
    for score, box, (*turn,), class_id in zip(scores, boxes, sin_cos, classes, strict=True):
        x1, y1, x2, y2 = box / ratio
        width, height = x2 - x1 + 1, y2 - y1 + 1
        result = {"bbox": [x1, y1, width, height], "score": float(score), "category_id": int(class_id) + 1}  # fmt: skip
        if turn:
            theta = np.arctan2(*turn)
            cx, cy = x1 + (width - 1) / 2, y1 + (height - 1) / 2
            corners = []
            for x, y in ((x1, y1), (x1, y1 + height - 1), (x1 + width - 1, y1 + height - 1), (x1 + width - 1, y1)):  # fmt: skip
                dx, dy = x - cx, y - cy
                corners += [cx + np.cos(theta) * dx - np.sin(theta) * dy, cy + np.sin(theta) * dx + np.cos(theta) * dy]  # fmt: skip
            result["bbox"].append(theta)
            result["segmentation"] = [corners]
        results.append(result)
    return results
