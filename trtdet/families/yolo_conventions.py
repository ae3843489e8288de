# SPDX-License-Identifier: Apache-2.0
"""What a head of YOLO means: the conventions of who exported it, as a spec and as facts."""

import dataclasses
from collections.abc import Sequence

from trtdet.families import evidence as ev
from trtdet.families.base import SAMPLINGS, Hints, Note
from trtdet.families.evidence import Evidence
from trtdet.families.pixels import Normal, Pixels
from trtdet.families.yolo_heads import GREY, Head
from trtdet.families.yolo_metadata import LEFT_OUT, Metadata
from trtdet.labels import COCO_80_IDS, are_coco_80
from trtdet.spec import Nms, Preprocessing, Selection

#: The least score that Ultralytics, YOLOv5 and YOLOX keep when they compute mAP; for pictures they
#: take 0.25.
SCORE_THRESHOLD = 0.001
#: Ultralytics' default since v8; that of the demos of v5, v7 and YOLOX, which compute mAP with 0.6
#: (v5) and 0.65.
IOU_THRESHOLD, IOU_THRESHOLD_OBJECTNESS = 0.7, 0.45
#: Ultralytics' default.
MAX_DETECTIONS = 300
#: What YOLOX's networks take.
YOLOX_NORMAL = Normal((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=True)


def is_yolox(head: Head, metadata: Metadata) -> bool:
    """Whether the network wants YOLOX's images: BGR 0-255, top left."""
    return head.kind == "grid" and not metadata.names


def preprocessing_of(
    evidence: Evidence,
    hints: Hints,
    normal: Normal,
    size_hw: tuple[int, int],
    kind: str | None,
    *,
    is_yolox: bool,
) -> Preprocessing:
    base = _yolox_preprocessing(size_hw) if is_yolox else _ultralytics_preprocessing(size_hw)
    resize = hints.resize or base.resize
    placement = hints.placement or base.placement
    pad = hints.pad_rgb or base.pad_rgb
    given = [
        option
        for option, value in (
            ("--resize_mode", hints.resize),
            ("--placement", hints.placement),
            ("--pad_color", hints.pad_rgb),
            ("--rounding", hints.rounding),
            ("--antialias", hints.antialias),
            ("--interpolation", hints.interpolation),
            ("--longest_side", hints.longest),
        )
        if value
    ]
    text = (
        "stretch"
        if resize == "stretch"
        else f"letterbox, {placement.replace('_', ' ')} on {pad[0]:g}"
    )
    said = kind or hints.resize == "stretch" or (hints.placement and hints.pad_rgb)
    if said:
        origin = ev.GIVEN + " ".join(given) if given else f"{ev.CONVENTION}{kind}"
        evidence.add(ev.RESIZE, text, origin)
    else:  # --family yolo of rows that no framework is known by
        evidence.ask(ev.RESIZE, ev.RESIZE_OPTION, text)
    return dataclasses.replace(
        base,
        mean=normal.mean,
        std=normal.std,
        bgr=normal.bgr,
        resize=resize,
        placement=placement,
        pad_rgb=pad,
        rounding=hints.rounding or base.rounding,
        sampling="corner"
        if hints.rounding == "none"
        else SAMPLINGS.get(hints.interpolation, base.sampling),
        antialias=bool(hints.antialias),
        longest=hints.longest,
    )


def note_facts(
    evidence: Evidence,
    pixels: Pixels,
    head: Head,
    metadata: Metadata,
    kind: str,
    labels: tuple[str, ...],
    size_hw: tuple[int, int],
    *,
    declares_size: bool,
) -> None:
    evidence.add(
        ev.INPUT,
        f"'{pixels.image}' {pixels.image_layout} {size_hw[0]}x{size_hw[1]}",
        "read: its shape" if declares_size else "read: metadata imgsz, or --size",
    )
    form = "xyxy" if head.has_corners and not metadata.is_rotated else "cxcywh"
    how = (
        "the detections of the export are compared"
        if head.kind == "end_to_end"
        else "their distance from the cells of the grid"
    )
    evidence.add(
        ev.BOXES,
        f"{form}, pixels",
        f"{ev.MEASURED}{how}" if head.is_seen else f"{ev.CONVENTION}{kind}",
    )
    text = "objectness x class" if head.kind in ("objectness", "grid") else "probabilities"
    evidence.add(
        ev.SCORES,
        text,
        f"{ev.MEASURED}all are 0 to 1" if head.is_seen else f"{ev.CONVENTION}{kind}",
    )
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}{kind}")
    origin = "read: metadata names" if metadata.names else "read: the number of columns"
    evidence.add(ev.CLASSES, head.num_classes, origin)
    coco = are_coco_80(labels)
    evidence.add(
        ev.CATEGORY_IDS,
        "COCO's 80" if coco else f"1..{head.num_classes}",
        "read: COCO's names"
        if coco and metadata.names
        else "convention: COCO's ids of its 80 classes"
        if coco
        else "convention: class index + 1",
    )
    selection = {
        "topk": "the best rows, no NMS",
        "nms": "NMS per class",
        "rotated_nms": "NMS of rotated boxes",
    }[selection_of(head, metadata)]
    evidence.add(
        ev.SELECTION,
        selection,
        "read: the export selects" if head.keeps else f"{ev.CONVENTION}{kind}",
    )
    evidence.add(
        ev.KEPT,
        head.keeps or MAX_DETECTIONS,
        "read: rows of the export" if head.keeps else "default: --max_detections",
    )


def _ultralytics_preprocessing(size_hw: tuple[int, int]) -> Preprocessing:
    """RGB / 255, centred on grey.

    Images are resized in 8 bits in training, so the input has them too.
    """
    return Preprocessing(
        size_hw,
        dtype="uint8",
        std=(255.0, 255.0, 255.0),
        pad_rgb=(GREY, GREY, GREY),
        placement="center",
        rounding="round",
    )


def _yolox_preprocessing(size_hw: tuple[int, int]) -> Preprocessing:
    """BGR 0-255, top left on grey."""
    return Preprocessing(size_hw, dtype="uint8", pad_rgb=(GREY, GREY, GREY), bgr=True)


def selection_of(head: Head, metadata: Metadata) -> Selection:
    if metadata.is_rotated:
        return "rotated_nms"
    return "topk" if head.keeps else "nms"


def nms_of(head: Head, metadata: Metadata) -> Nms:
    iou = IOU_THRESHOLD if head.kind == "raw" else IOU_THRESHOLD_OBJECTNESS
    return Nms(
        score_threshold=SCORE_THRESHOLD,
        iou_threshold=1.0 if head.keeps else iou,  # of rotated boxes: nothing is suppressed
        max_output_boxes=head.keeps or MAX_DETECTIONS,
        score_activation=False,
        class_agnostic=head.kind == "end_to_end",  # every row has one class
        box_coding=0 if head.has_corners or metadata.is_rotated else 1,
    )


def category_ids_of(labels: tuple[str, ...], num_classes: int) -> tuple[int, ...]:
    """COCO's ids for COCO's classes, else 1, 2, 3, ..."""
    return COCO_80_IDS if are_coco_80(labels) else tuple(range(1, num_classes + 1))


def notes_of(metadata: Metadata, head: Head, unknown: Sequence[str]) -> tuple[Note, ...]:
    notes = []
    if unknown:
        text = (
            f"ONNX Runtime does not know {', '.join(unknown)}: '{head.tensor}' is taken by its shape {list(head.values.shape)} for "
            f"the head '{head.kind}', its values are not looked at"
        )
        notes.append(Note(text, ""))
    if left_out := LEFT_OUT.get(metadata.task):
        notes.append(
            Note(
                f"{left_out} of the '{metadata.task}' model are left out, its boxes are kept",
                "family",
            )
        )
    if metadata.nms_inside:
        text = (
            f"the NMS inside the export is replaced; its thresholds are not known: taking score {SCORE_THRESHOLD}, IoU {IOU_THRESHOLD}: "
            "--score_threshold, --iou_threshold"
        )
        notes.append(Note(text, "score_threshold"))
    return tuple(notes)
