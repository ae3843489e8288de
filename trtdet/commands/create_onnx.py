# SPDX-License-Identifier: Apache-2.0
"""Convert a trained detector to an ONNX file that ends in NMS, for build_engine.py or infer.py.

  create_onnx.py --saved_model efficientdet-d0 --onnx d0.onnx
  create_onnx.py --source_onnx yolo.onnx --onnx yolo_nms.onnx

Input size, normalisation, anchors, classes and NMS are read from the model; options override them.
A table says where each fact comes from: read, measured, given by an option, or the convention of a
known family. If a fact is missing, an error names the option to give. The result is compared with
the source on photographs before it is written, down to the detections if the source selects some
itself. If they differ, nothing is written and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtdet import files
from trtdet.commands import cli
from trtdet.commands.cli import ArgumentParser
from trtdet.commands.declaring import (
    add_declaring_options,
    check_declaring,
    declaration_from,
    maybe_yes,
    placing_from,
)
from trtdet.commands.options import add, add_verbose
from trtdet.commands.values import positive_int
from trtdet.families import FAMILIES
from trtdet.files import printable
from trtdet.labels import read_labels
from trtdet.spec import PREPROCESSORS, Layout, parse_preprocessor

if TYPE_CHECKING:
    from trtdet.conversion.options import Options
    from trtdet.graph.map_op import OpMapping


def run(source_path: Path, onnx_path: Path, options: Options, *, is_onnx: bool) -> None:
    """Convert, verify, write; on stdout the differences and the path of the file."""
    from trtdet.conversion.stage import convert_file

    done = convert_file(source_path, onnx_path, options, is_onnx=is_onnx)
    for difference in done.differences:
        print(f"{printable(difference.name)}: max abs difference {difference.maximum:.3g}, mean {difference.mean:.3g}")  # fmt: skip
    for line in done.compared:
        print(printable(line))
    print(done.path)


def checked_preprocessor(text: str) -> str:
    """argparse type: a name, or six numbers."""
    try:
        parse_preprocessor(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse_input_shape(text: str) -> tuple[int | None, tuple[int, int] | None, Layout]:
    """argparse type: '1,512,512,3', 'N,3,512,512', '-1,-1,-1,3' -> batch, (height, width),
    layout; None: dynamic.
    """
    fields = [field.strip() for field in text.split(",")]
    free = fields[0] in ("N", "n", "-1", "")
    try:
        batch = None if free else int(fields[0])
        a, b, c = (int(field) for field in fields[1:])
    except ValueError:
        a = b = c = 0
        batch = None
    size_hw = (a, b) if c == 3 else (b, c)
    wrong_size = min(size_hw) < 1 and size_hw != (-1, -1)
    if (c == 3) == (a == 3) or wrong_size or (batch is not None and batch < 1):
        raise argparse.ArgumentTypeError(
            "expected N,HEIGHT,WIDTH,3 or N,3,HEIGHT,WIDTH, N a number or -1 for a dynamic batch, HEIGHT and WIDTH numbers or both -1, "
            f"got {text!r}"
        )
    return batch, None if size_hw == (-1, -1) else size_hw, "NHWC" if c == 3 else "NCHW"


def parse_family(text: str) -> str:
    """argparse type: 'auto', the name of a family, or a Python file."""
    if text == "auto" or text in FAMILIES or text.endswith(".py"):
        return text
    raise argparse.ArgumentTypeError(
        f"expected auto, one of {', '.join(FAMILIES)}, or a Python file (.py), got {text!r}"
    )


def parse_mapping(text: str) -> OpMapping:
    """argparse type: 'CustomOp=PluginName[:version]'."""
    from trtdet.graph.map_op import OpMapping

    try:
        return OpMapping.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    # fmt: off
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--saved_model", "--model", "-m", dest="saved_model", type=Path, metavar="DIR|FILE", help="the model: a SavedModel folder, or an ONNX file as with --source_onnx")
    source.add_argument("--source_onnx", type=Path, metavar="FILE", help="the model as an ONNX file (YOLO, DETR, ...): needs no TensorFlow")
    parser.add_argument("--signature", metavar="NAME", help="which function of a SavedModel (default: serving_default, or the only one there is)")
    parser.add_argument("--onnx", "--output", "-o", dest="onnx", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--family", default="auto", type=parse_family, metavar="NAME|FILE.py", help=f"kind of detector, one of {', '.join(FAMILIES)}, or a Python file with a family of your own (default: auto, it is detected)")
    shape = parser.add_argument_group("input")
    shape.add_argument("--input_shape", type=parse_input_shape, metavar="N,H,W,3|N,3,H,W", help="batch, size and layout; N or -1 for a dynamic batch; -1,-1 for H,W: a dynamic size, if the model allows it (default: dynamic batch, the model's size, NHWC)")
    # fmt: on
    add(
        shape,
        "--size",
        "--input_size",
        "-i",
        note="a fixed size cannot be changed",
        dest="input_size",
    )
    # fmt: off
    shape.add_argument("--input_format", "-f", choices=["NHWC", "NCHW"], help="the layout, without a shape (default: NHWC)")
    shape.add_argument("--input_dtype", choices=["float32", "uint8"], help="uint8 moves a quarter of the bytes (default: as the model's own code resizes: uint8 for YOLO, else float32)")
    shape.add_argument("--preprocessor", "-p", type=checked_preprocessor, metavar="|".join([*sorted(PREPROCESSORS), "MEAN/STD"]), help="normalisation, in place of the model's own; unit: 0 to 1, raw: 0 to 255; or six numbers, R,G,B/R,G,B, on the scale of 0 to 255 (default: the model's, or the convention of its family)")
    shape.add_argument("--resize_mode", choices=["letterbox", "stretch", "warp"], help="keep the aspect ratio of images or not; warp: keep it, by an affine warp, as CenterNet does (default: as the model was trained)")
    # fmt: on
    detections = parser.add_argument_group("detections")
    add(detections, "--score_threshold", "--nms_threshold", "-t")
    add(detections, "--iou_threshold")
    add(detections, "--max_detections", "--nms_detections", "-d")
    # fmt: off
    detections.add_argument("--nms_mode", default="model", choices=["model", "per_class", "class_agnostic", "best_class"], help="whether boxes of different classes suppress each other; best_class: a box counts for its best class alone, then NMS per class (default: model, as it was trained)")
    detections.add_argument("--nms", default="plugin", choices=["plugin", "onnx", "graph", "none"], help="EfficientNMS_TRT, ONNX NonMaxSuppression, ordinary operators, or no NMS (default: plugin; later stages replace it where it is missing)")
    detections.add_argument("--legacy_plugins", action="store_true", help="BatchedNMS_TRT instead, for TensorRT before 8")
    # fmt: on
    add(detections, "--labels", note="they are stored in the ONNX file")
    # fmt: off
    detections.add_argument("--rotated_nms", choices=["exact", "odtk", "probiou"], help="how the overlap of rotated boxes is computed: exactly, as ODTK's kernel does, or as Ultralytics does (default: probiou for YOLO, else exact)")
    add_declaring_options(parser)
    other = parser.add_argument_group("other")
    other.add_argument("--opset", type=positive_int, choices=range(11, 19), metavar="11..18", help="ONNX opset (default: 17, or 11 with --legacy_plugins; an ONNX source keeps its own if that is at least 13)")
    other.add_argument("--tf2onnx", type=Path, metavar="FILE", help="keep the raw conversion of the network in this file (default: it is not kept)")
    other.add_argument("--deformable_attention", choices=["keep", "plugin", "gather"], help="GridSample as it is, as MultiscaleDeformableAttnPlugin_TRT, or in ordinary operators (default: gather)")
    other.add_argument("--map_op", type=parse_mapping, action="append", default=[], metavar="OP=PLUGIN[:VERSION]", help="replace a custom operator of an ONNX source by a TensorRT plugin; may be repeated; needs --no_verify, as ONNX Runtime cannot run plugins (default: none)")
    other.add_argument("--no_verify", action="store_true", help="write without comparing with the source")
    # fmt: on
    add_verbose(parser)
    words = _bind_input_shape(sys.argv[1:] if argv is None else argv)
    args, given = cli.parse_given(parser, words)
    args.given = given
    names_size = args.input_shape and args.input_shape[1]
    if args.input_shape and (args.input_format or (names_size and args.input_size)):
        parser.error("--input_shape says size and layout; leave out --size and --input_format")
    if args.onnx.suffix.lower() in cli.ENGINE_SUFFIXES:
        parser.error(f"--onnx: an ONNX file, not an engine; write {args.onnx.with_suffix('.onnx')}, then build_engine.py --engine {args.onnx}")  # fmt: skip
    check_declaring(args, parser)
    if args.signature and (args.source_onnx or args.saved_model.suffix.lower() == ".onnx"):
        parser.error("--signature goes with a SavedModel; leave it out")
    if args.map_op and not args.source_onnx:
        parser.error("--map_op edits an ONNX file; give --source_onnx")
    if args.map_op and not args.no_verify:
        parser.error(
            "--map_op puts in plugins that ONNX Runtime cannot run, so nothing can be compared; add --no_verify"
        )
    if args.legacy_plugins and args.nms != "plugin":
        parser.error(f"--legacy_plugins is a form of NMS of its own; leave out --nms {args.nms}")
    return args


def _bind_input_shape(argv: Sequence[str]) -> list[str]:
    """'--input_shape', '-1,512,512,3' as one word: argparse takes a value that starts with a
    dash for an option.
    """
    words = list(argv)
    for position, word in enumerate(words[:-1]):
        if word == "--input_shape":
            words[position : position + 2] = [f"{word}={words[position + 1]}"]
            break
    return words


def options_from(args: argparse.Namespace) -> Options:
    """The options of a parsed command line.

    Raises:
        ValueError, OSError: the label file cannot be read.
    """
    from trtdet.conversion.options import Options
    from trtdet.families.base import Hints

    batch: int | None = None
    layout: Layout = args.input_format or "NHWC"
    size_hw: tuple[int, int] | None = args.input_size
    if args.input_shape:
        batch, named, layout = args.input_shape
        size_hw = named or size_hw
    files.check_outputs([args.onnx, args.tf2onnx], [args.labels])
    labels = tuple(read_labels(args.labels)) if args.labels else ()
    return Options(
        family=args.family,
        batch=batch,
        size_hw=size_hw,
        dynamic_size=bool(args.input_shape and not args.input_shape[1]),
        layout=layout,
        input_dtype=args.input_dtype,
        preprocessor=args.preprocessor,
        score_threshold=args.score_threshold,
        iou_threshold=args.iou_threshold,
        max_detections=args.max_detections,
        nms_mode=args.nms_mode,
        nms_form="legacy" if args.legacy_plugins else args.nms,
        labels=labels,
        hints=Hints(
            size_hw=size_hw,
            preprocessor=args.preprocessor,
            resize="letterbox" if args.resize_mode == "warp" else args.resize_mode,
            labels=labels,
            rotated_nms=args.rotated_nms,
            deformable_attention=args.deformable_attention,
            channel_order=args.channel_order,
            **placing_from(args),
            antialias=maybe_yes(args.antialias),
            interpolation=args.interpolation,
            longest=args.longest_side,
            clipped=args.clip_boxes or None,
            num_classes=args.num_classes,
            max_detections=args.max_detections,
            declared=declaration_from(args),
            assume=args.assume,
        ),
        opset=args.opset or (11 if args.legacy_plugins else None),
        raw_path=args.tf2onnx,
        map_ops=tuple(args.map_op),
        verify=not args.no_verify,
        signature=args.signature,
        given=args.given,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose, args.quiet)
    source = args.saved_model or args.source_onnx
    is_onnx = source is args.source_onnx or source.suffix.lower() == ".onnx"
    return cli.run_main(lambda: run(source, args.onnx, options_from(args), is_onnx=is_onnx))
