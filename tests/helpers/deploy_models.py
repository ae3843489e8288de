# SPDX-License-Identifier: Apache-2.0
"""Sidecars of engines for the tests of deploy.py, which never looks inside an engine."""

import dataclasses
from pathlib import Path
from typing import Any

from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, write_engine
from trtdet.labels import COCO_LABELS
from trtdet.spec import ModelSpec, Nms, Preprocessing

MEAN = (123.675, 116.28, 103.53)

D0 = ModelSpec(
    family="automl",
    preprocessing=Preprocessing((512, 512), mean=MEAN, std=(58.395, 57.12, 57.375), pad_rgb=MEAN),
    nms=Nms(),
    category_ids=tuple(range(1, 91)),
    labels=COCO_LABELS,
)
YOLO = ModelSpec(
    family="yolo",
    preprocessing=Preprocessing(
        (384, 640),
        layout="NCHW",
        std=(255.0, 255.0, 255.0),
        pad_rgb=(114.0, 114.0, 114.0),
        placement="center",
        rounding="round",
    ),
    nms=Nms(max_output_boxes=300, score_activation=False),
    category_ids=tuple(range(80)),
    labels=tuple(f"thing {i}" for i in range(80)),
    box_order="xyxy",
)
DETR = YOLO.replace(
    family="detr",
    preprocessing=dataclasses.replace(
        YOLO.preprocessing, resize="stretch", antialias=True, bgr=True
    ),
    boxes_normalized=True,
    selection="topk",
)


def with_input(spec: ModelSpec, **changes: Any) -> ModelSpec:
    return spec.replace(preprocessing=dataclasses.replace(spec.preprocessing, **changes))


def make_engine(
    path: Path, spec: ModelSpec = D0, batch: tuple[int, int, int] = (1, 8, 32), **fields: Any
) -> Path:
    """A file that stands for a TensorRT engine, and its real sidecar."""
    values: dict[str, Any] = {
        "flavor": "tensorrt",
        "version": "10.13.3.9",
        "precision": "fp16",
        "compute_capabilities": ("8.9",),
    }
    info = EngineInfo(spec=spec, batch=BatchRange(*batch), **(values | fields))
    write_engine(path, b"stands for a plan " + path.name.encode(), info)
    return path
