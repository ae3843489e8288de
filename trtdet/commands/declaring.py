# SPDX-License-Identifier: Apache-2.0
"""Options of create_onnx.py that say what a file cannot: the outputs of any detector, and how
images come in.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from trtdet.commands.values import non_negative_int, positive_int
from trtdet.spec import COLUMN_NAMES

if TYPE_CHECKING:
    from trtdet.families.base import Declaration

COLUMNS = {
    *(c for names in COLUMN_NAMES.values() for c in names),
    "score",
    "scores",
    "label",
    "objectness",
    "unused",
}


def parse_columns(text: str) -> tuple[str, ...]:
    """argparse type: 'x1,y1,x2,y2,score,label'."""
    columns = tuple(word.strip() for word in text.split(","))
    if unknown := [c for c in columns if c not in COLUMNS]:
        raise argparse.ArgumentTypeError(
            f"expected columns such as x1,y1,x2,y2,score,label or cx,cy,w,h,scores, unknown: {', '.join(unknown)}"
        )
    return columns


def parse_color(text: str) -> tuple[float, float, float]:
    """argparse type: '114' or '114,114,114', RGB 0-255."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise argparse.ArgumentTypeError(f"expected R,G,B or one level, 0 to 255, got {text!r}")
    red, green, blue = values
    return red, green, blue


def add_declaring_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    images = parser.add_argument_group("images, where the file does not say it")
    images.add_argument("--channel_order", choices=["rgb", "bgr"], help="order of the colours in the network's input (default: as its family takes it, else rgb)")
    images.add_argument("--placement", choices=["top_left", "center"], help="where a letterboxed picture lies in the input (default: as its family places it, else you must give it)")
    images.add_argument("--pad_color", type=parse_color, metavar="R,G,B", help="colour of the padding beside a letterboxed picture, 0-255 (default: as its family pads, else you must give it)")
    images.add_argument("--rounding", choices=["floor", "round"], help="how the size of a letterboxed picture becomes whole numbers (default: as its family does it, else round)")
    images.add_argument("--longest_side", type=positive_int, metavar="PIXELS", help="where the longer side of a letterboxed picture ends, in an input that is larger: 636 of 640 for YOLO-NAS (default: as its family does it, else at the input's)")
    images.add_argument("--antialias", nargs="?", const="yes", choices=["yes", "no"], help="yes: images were resized in training with averaging over the area, as Pillow does it; no: as OpenCV does it (default: as its family does it, else no)")
    images.add_argument("--interpolation", choices=["linear", "cubic"], help="how OpenCV resized images in training: INTER_LINEAR or INTER_CUBIC, which PaddleDetection's infer_cfg.yml calls interp 1 and 2 (default: as its family does it, else linear)")
    outputs = parser.add_argument_group("outputs of any other detector (ONNX)")
    outputs.add_argument("--boxes_output", metavar="NAME", help="boxes [N, A, 4], or [n, 4] of one picture; goes with --scores_output (default: detected by shape)")
    outputs.add_argument("--scores_output", metavar="NAME", help="scores [N, A, C] or [N, C, A]; with --labels_output [N, A] or [n] (default: detected by shape)")
    outputs.add_argument("--labels_output", metavar="NAME", help="class ids [N, A] or [n] (default: none)")
    outputs.add_argument("--rows_output", metavar="NAME", help="one output with all of it, [N, A, columns] or [n, columns] (default: detected by shape)")
    outputs.add_argument("--columns", type=parse_columns, metavar="NAMES", help="the columns of --rows_output, in their order: a box (x1,y1,x2,y2 or y1,x1,y2,x2 or cx,cy,w,h or x,y,w,h), score or scores, label, objectness, and unused for one that is not read (default: read from the graph)")
    outputs.add_argument("--box_format", choices=["xyxy", "yxyx", "xywh", "cxcywh"], help="corners, corner and size, or centre and size (default: measured)")
    outputs.add_argument("--box_units", choices=["pixels", "unit"], help="pixels of the network input, or 0 to 1 (default: measured)")
    outputs.add_argument("--score_activation", choices=["none", "sigmoid", "softmax", "clip"], help="what turns the scores into probabilities; clip: they are cut to 0..1, as those of YOLOv1, which nothing holds there (default: none if they are probabilities)")
    outputs.add_argument("--background", choices=["first", "last", "none"], help="which score means no object (default: none, unless the scores add up to 1: then you must give it)")
    outputs.add_argument("--scores_layout", choices=["NAC", "NCA"], help="boxes before classes, or after (default: by the number of boxes)")
    outputs.add_argument("--label_base", type=non_negative_int, choices=[0, 1], help="number of the first class (default: 0)")
    outputs.add_argument("--num_classes", type=positive_int, metavar="N", help="number of classes, of a model that outputs only class ids; --labels gives it too (default: read from the graph)")
    outputs.add_argument("--selected", nargs="?", const="yes", choices=["yes", "no"], help="yes: the detections need no NMS; no: they do (default: measured)")
    outputs.add_argument("--clip_boxes", action="store_true", help="boxes are clipped to the picture before the NMS, and those of which nothing is left are dropped (default: they are not)")
    outputs.add_argument("--assume", action="store_true", help="take the usual choice where the file does not say, with a warning for each")
    # fmt: on


def placing_from(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Hints` that say how a letterboxed picture lies in the input."""
    if args.resize_mode == "warp":
        placement, color = args.placement or "center", args.pad_color or (0.0, 0.0, 0.0)
        return {"placement": placement, "pad_rgb": color, "rounding": "none"}
    rounding = "floor64" if args.rounding == "floor" else args.rounding
    return {"placement": args.placement, "pad_rgb": args.pad_color, "rounding": rounding}


def maybe_yes(text: str | None) -> bool | None:
    """Of an option that is yes, no, or left out."""
    return None if text is None else text == "yes"


def declaration_from(args: argparse.Namespace) -> Declaration | None:
    """What was declared of the outputs; None: nothing."""
    from trtdet.families.base import Declaration

    found: dict[str, Any] = {
        "boxes": args.boxes_output or "",
        "scores": args.scores_output or "",
        "labels": args.labels_output or "",
        "rows": args.rows_output or "",
        "columns": args.columns or (),
        "box_format": args.box_format,
        "box_units": args.box_units,
        "activation": args.score_activation,
        "background": args.background,
        "scores_layout": args.scores_layout,
        "label_base": args.label_base,
        "selected": maybe_yes(args.selected),
    }
    return Declaration(**found) if any(v not in (None, "", ()) for v in found.values()) else None


def check_declaring(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Options that need each other, or exclude each other."""
    if args.rows_output and (args.boxes_output or args.scores_output):
        parser.error(
            "--rows_output is one output with all of it; leave out --boxes_output and --scores_output"
        )
    if bool(args.boxes_output) != bool(args.scores_output):
        parser.error("--boxes_output and --scores_output go together")
    if args.columns and not args.rows_output:
        parser.error("--columns names the columns of --rows_output; give both")
    if args.labels_output and not args.boxes_output:
        parser.error("--labels_output goes with --boxes_output and --scores_output")
    if args.antialias == "yes" and args.resize_mode == "warp":
        parser.error("--antialias: an affine warp has none; leave it out")
    if args.interpolation and (args.antialias == "yes" or args.resize_mode == "warp"):
        other = "--antialias" if args.antialias == "yes" else "--resize_mode warp"
        parser.error(f"--interpolation goes with resizing as OpenCV does it, not with {other}")
    if args.rounding and args.resize_mode in ("warp", "stretch"):
        parser.error(f"--rounding is of a letterbox, not of --resize_mode {args.resize_mode}")
