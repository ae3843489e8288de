# SPDX-License-Identifier: Apache-2.0
"""What the command line of stage 1 asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trtdet.families.base import NO_HINTS, Hints
from trtdet.graph.map_op import OpMapping
from trtdet.spec import InputDtype, Layout

NmsForm = Literal["plugin", "onnx", "graph", "none", "legacy"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None takes what the model has.

    Attributes:
        batch: None: dynamic.
        opset: None: 17, or the source's where that is ONNX.
        raw_path: where the unedited conversion is kept.
        signature: of a SavedModel.
        given: options that the user named: what they settle is not warned of.
    """

    family: str = "auto"
    batch: int | None = None
    size_hw: tuple[int, int] | None = None
    dynamic_size: bool = False
    layout: Layout = "NHWC"
    input_dtype: InputDtype | None = None
    preprocessor: str | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    nms_mode: str = "model"
    nms_form: NmsForm = "plugin"
    hints: Hints = NO_HINTS
    labels: tuple[str, ...] = ()
    opset: int | None = None
    raw_path: Path | None = None
    map_ops: tuple[OpMapping, ...] = ()
    verify: bool = True
    signature: str | None = None
    given: frozenset[str] = frozenset()
