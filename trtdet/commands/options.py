# SPDX-License-Identifier: Apache-2.0
"""Options that several stages share.

Each is one row of `SHARED`: one name, one form, one default rule, one help text.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from trtdet.commands.cli import ArgumentParser
from trtdet.commands.values import (
    batch_size,
    box_count,
    parse_devices,
    parse_model,
    parse_page,
    parse_plot,
    positive_float,
    positive_int,
    positive_unit_interval,
    seed,
    side,
    thread_count,
    unit_interval,
)
from trtdet.engine.options import parse_batch, parse_sizes, parse_version
from trtdet.images.options import DEFAULT_MAX_SIZE, Decode, Resample, parse_size
from trtdet.labels import COCO_LABELS
from trtdet.precision import options
from trtdet.precision.options import CALIBRATION_BATCH, FP8_METHOD, METHODS, Int8Options
from trtdet.results.options import DRAW_THRESHOLD
from trtdet.run.options import MAX_AP_DROP, PROVIDERS, RunOptions
from trtdet.video.options import parse_source

#: What options are added to.
Target = argparse.ArgumentParser | argparse._ActionsContainer


@dataclass(frozen=True)
class Row:
    """One shared option.

    Attributes:
        rule: what is taken by default, in words; "" for a switch, which is off.
        keywords: of `add_argument`.
    """

    name: str
    metavar: str | None
    help: str
    rule: str = ""
    keywords: Mapping[str, Any] = field(default_factory=dict)


def _row(name: str, metavar: str | None, text: str, rule: str = "", **keywords: Any) -> Row:
    return Row(name, metavar, text, rule, keywords)


FILE = {"type": Path}
SWITCH = {"action": "store_true"}
SEVERAL = {"nargs": "+", "action": "extend"}

# fmt: off
#: Key -> option. A key is the option's name, with a word behind it where one name has two forms: a
#: model that is run or read, one value or a range, a folder or a file.
SHARED = {
    "--model": _row("--model", "FILE|URL", "an engine with its .json, an ONNX file of create_onnx.py, or a model on a Triton server: grpc://HOST:8001/NAME or http://HOST:8000/NAME", "none", type=parse_model),
    "--model onnx": _row("--model", "FILE", "an ONNX file of create_onnx.py", "none", **FILE),
    "--model engine": _row("--model", "FILE", "an engine with its .json", "none", **FILE),
    "--model file": _row("--model", "FILE", "an engine with its .json, or an ONNX file of create_onnx.py", "none", **FILE),
    "--input": _row("--input", "PATH", "images: files, folders and globs such as 'photos/*.jpg', one or several", "none", type=Path, **SEVERAL),
    "--input video": _row("--input", "PATH", "images: files, folders and globs such as 'photos/*.jpg', one or several; or one video: a file such as clip.mp4, a camera (0, /dev/video0), rtsp://HOST/PATH", "none", type=parse_source, **SEVERAL),
    "--output": _row("--output", "DIR", "the folder to write to; made if missing", "none", **FILE),
    "--output file": _row("--output", "FILE", "the file to write", "none", **FILE),
    "--output written": _row("--output", "DIR", "the folder that deploy.py wrote", "none", **FILE),
    "--annotations": _row("--annotations", "FILE", "COCO annotations of the images, such as instances_val2017.json", "none", **FILE),
    "--labels": _row("--labels", "FILE", "class names, one per line; 'coco' for COCO's", f"the model's, COCO's for {len(COCO_LABELS)} classes", **FILE),
    "--batch_size": _row("--batch_size", "N", "images per batch", "what suits the model", type=batch_size),
    "--batch_size range": _row("--batch_size", "N|MIN:OPT:MAX", "images per batch, or a range; TensorRT tunes for OPT", "the ONNX file's, 1 where that is dynamic", type=parse_batch),
    "--size": _row("--size", "H,W", "input size, for a model that leaves it open: H,W or HxW, or one number for a square", "the model's", type=parse_size),
    "--size range": _row("--size", "SIZE|MIN:OPT:MAX", "input size, for a model that leaves it open: H,W or HxW, or one number for a square; or a range; TensorRT tunes for OPT", "the ONNX file's", type=parse_sizes),
    "--resize": _row("--resize", "SHORTER", "for a model of dynamic input size: scale the shorter side of each image to this many pixels; a batch gets the smallest input that holds all its images", "as the model says, else off", type=side),
    "--max_size": _row("--max_size", "LONGER", "with --resize: the longer side has at most this many pixels", str(DEFAULT_MAX_SIZE), type=side),
    "--resample": _row("--resample", None, "how images are scaled: bilinear as TensorFlow does it, antialias as Pillow does it", "as the model was trained", choices=get_args(Resample)),
    "--score_threshold": _row("--score_threshold", "SCORE", "leave out detections below this score", "the model's threshold", type=unit_interval),
    "--iou_threshold": _row("--iou_threshold", "IOU", "overlap from which NMS suppresses a box", "the model's", type=positive_unit_interval),
    "--max_detections": _row("--max_detections", "N", "detections per image", "the model's", type=box_count),
    "--draw_threshold": _row("--draw_threshold", "SCORE", "draw only detections of at least this score", str(DRAW_THRESHOLD), type=unit_interval, default=DRAW_THRESHOLD),
    "--max_ap_drop": _row("--max_ap_drop", "DROP", "how far AP, 0 to 1, may fall", str(MAX_AP_DROP), type=unit_interval, default=MAX_AP_DROP),
    "--recursive": _row("--recursive", None, "search the folders below --input too", **SWITCH),
    "--num_images": _row("--num_images", "N", "use at most N of the images, evenly spread", "all", type=positive_int),
    "--decode": _row("--decode", None, "what decodes JPEGs and scales images, on the GPU that runs the model: gpu needs nvImageCodec (requirements-gpu.txt); other images are decoded on the CPU", "auto: gpu where it is there, for many JPEGs", choices=get_args(Decode), default="auto"),
    "--workers": _row("--workers", "N", "threads that decode and resize images; processes, for an engine on 8 cores or more and 8,000 images or more (2,000 with pictures)", "one per core", type=thread_count),
    "--devices": _row("--devices", "N,...", "GPUs, as in 0,1, or 'all'", "0", type=parse_devices),
    "--provider": _row("--provider", None, "what ONNX Runtime runs on", "auto, the first of the others that is there", choices=PROVIDERS),
    "--threads": _row("--threads", "N", "CPU threads of ONNX Runtime; of many batches, each runs one of its own", "one per core", type=thread_count),
    "--contexts": _row("--contexts", "N", "batches of an engine that may run at the same time on a GPU, for small models", "1", type=thread_count),
    "--no_cuda_graph": _row("--no_cuda_graph", None, "launch the kernels of an engine one by one", dest="cuda_graph", action="store_const", const=False),
    "--plugins": _row("--plugins", "LIB.so", "libraries with TensorRT plugins that the model needs; they run with your permissions", "none", type=Path, **SEVERAL),
    "--allow_host_code": _row("--allow_host_code", None, "let an engine run its own code on the CPU with your permissions, as a version-compatible engine does; only for files you trust", action="store_const", const=True),
    "--json": _row("--json", "FILE", "write the result to this file as JSON", "none", **FILE),
    "--report": _row("--report", "FILE.html", "write the result to this file as a page, pictures included", "none", type=parse_page),
    "--embed": _row("--embed", None, "with --report: put the pictures into the page, at up to 1600 pixels; else they are links to the files", **SWITCH),
    "--plot": _row("--plot", "FILE", "draw the result to this picture file (.png, .svg, .pdf)", "none", type=parse_plot),
    "--precision_json": _row("--precision_json", "FILE", "what tune_precision.py found for this model", "none", **FILE),
    "--name": _row("--name", "NAME", "what the model is called there", "detector"),
    "--verbose": _row("--verbose", None, "log details", **SWITCH),
    "--quiet": _row("--quiet", None, "log only warnings and errors, and show no progress", **SWITCH),
}
# fmt: on


def add(
    to: Target,
    key: str,
    *others: str,
    required: bool = False,
    note: str = "",
    rule: str = "",
    **changes: Any,
) -> None:
    """Add a row of `SHARED`.

    Args:
        others: further names of the option in this stage.
        note: what more there is to say of it in this stage.
        rule: what is taken by default, where this stage cannot have the usual one.
        changes: to the keywords of `add_argument`.
    """
    row = SHARED[key]
    text = f"{row.help}; {note}" if note else row.help
    if row.rule and not required:
        text += f" (default: {rule or row.rule})"
    keywords = {**row.keywords, **changes}
    if row.metavar:
        keywords["metavar"] = row.metavar
    if required:
        keywords["required"] = True
    to.add_argument(row.name, *others, help=text.replace("%", "%%"), **keywords)


def add_several(to: Target, *keys: str) -> None:
    """Add rows of `SHARED` as they are."""
    for key in keys:
        add(to, key)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """-v, --verbose, and --quiet; one of the two."""
    group = parser.add_mutually_exclusive_group()
    add(group, "--verbose", "-v")
    add(group, "--quiet")


def one_device(parser: ArgumentParser, args: argparse.Namespace) -> int:
    """The GPU of a stage that takes one."""
    devices = args.devices or (0,)
    if devices == "all" or len(devices) > 1:
        parser.error("--devices: expected one GPU here, such as 0")
    return int(devices[0])


def add_size_options(to: Target) -> None:
    """The options of the input size where a model leaves it open: for
    `trtdet.images.preprocess.choose_input`.
    """
    add_several(to, "--size", "--resize", "--max_size")


def check_size_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of `add_size_options` that do not go together are wrong usage."""
    if args.size and args.resize:
        parser.error("--size gives every image the same input, --resize does not; leave one out")
    if args.max_size and not args.resize:
        parser.error("--max_size goes with --resize")
    if args.resize and args.resize > (args.max_size or DEFAULT_MAX_SIZE):
        parser.error(
            f"--resize {args.resize}: expected no more than --max_size, {args.max_size or DEFAULT_MAX_SIZE}"
        )


def add_calibration_options(group: argparse._ArgumentGroup) -> None:
    """Where the scales come from; see `calibration_from`."""
    # fmt: off
    group.add_argument("--calib_input", type=Path, metavar="DIR", help="images to calibrate on, as the detector will see them; no annotations are needed (default: none, --calib_cache has the scales)")
    group.add_argument("--calib_cache", type=Path, metavar="FILE", help="TensorRT's calibration cache: used if it was made for this model and these images, else written (default: the scales are not kept)")
    group.add_argument("--calib_cache_version", type=parse_version, metavar="X.Y.Z", help="the TensorRT version that will read the cache (trtexec --calib, DeepStream, a DLA), as each reads only its own; changes the first line of an existing cache too (default: the TensorRT that builds, else 8.6.1)")
    number = group.add_mutually_exclusive_group()
    number.add_argument("--calib_num_images", type=positive_int, metavar="N", help=f"calibrate on at most N images, chosen at random (default: {options.DEFAULT_NUM_IMAGES})")
    number.add_argument("--calib_batches", type=positive_int, metavar="N", help="calibrate on at most N batches of --calib_batch_size images (default: --calib_num_images decides)")
    group.add_argument("--calib_fraction", type=positive_unit_interval, default=1.0, metavar="F", help="calibrate on at most this share of the images (default: 1)")
    group.add_argument("--calib_batch_size", type=batch_size, metavar="N", help=f"images at a time; the scales do not depend on it (default: {CALIBRATION_BATCH}, or the ONNX file's)")
    group.add_argument("--calib_method", choices=METHODS, help=f"how the range of an activation is chosen (default: as in an existing cache, else {options.DEFAULT_METHOD}; for fp8 {FP8_METHOD}, as fp8 needs no clipping)")
    group.add_argument("--calib_seed", type=seed, default=options.DEFAULT_SEED, metavar="N", help="seed of the choice of images (default: %(default)s)")
    group.add_argument("--int8_share", type=positive_unit_interval, metavar="SHARE", help=f"leave the convolutions that hurt most out of int8 or fp8, but keep at least this share of the multiply-accumulates in it; measured on 16 images of --calib_input and kept with --calib_cache; 1 leaves nothing out (default: {options.DEFAULT_SHARE}; 1 if --keep_fp16, --keep_fp32 or --precision_json say what stays out)")
    # fmt: on
    add(group, "--provider", note="a GPU calibrates faster, its scales differ in the last digits")


def check_calibration_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of calibration that need another."""
    if args.calib_cache_version and not args.calib_cache:
        parser.error("--calib_cache_version goes with --calib_cache FILE")
    if args.provider is not None and args.provider not in options.PROVIDERS:
        parser.error(
            f"--provider {args.provider}: calibration runs on cpu or cuda; leave it out, or choose one of these"
        )


def calibration_from(args: argparse.Namespace) -> Int8Options:
    """The options of `add_calibration_options` of a parsed command line."""
    num_images = args.calib_num_images or options.DEFAULT_NUM_IMAGES
    if args.calib_batches:
        num_images = args.calib_batches * (args.calib_batch_size or CALIBRATION_BATCH)
    return Int8Options(
        images=args.calib_input,
        cache=args.calib_cache,
        cache_version=args.calib_cache_version,
        num_images=num_images,
        fraction=args.calib_fraction,
        batch_size=args.calib_batch_size,
        method=args.calib_method,
        seed=args.calib_seed,
        provider=args.provider if args.provider in options.PROVIDERS else "auto",
        share=args.int8_share,
    )


def add_model_option(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--model, which is `args.engine`; --engine is its name in NVIDIA's sample."""
    add(parser, "--model", "--engine", "-e", required=required, dest="engine")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of everything that runs a model on image files."""
    images = parser.add_argument_group("images and detections")
    add(
        images,
        "--score_threshold",
        "--nms_threshold",
        "-t",
        note="what the model itself leaves out stays out",
    )
    add_several(images, "--batch_size", "--size", "--resize", "--max_size", "--resample", "--decode", "--workers", "--recursive", "--num_images")  # fmt: skip
    engine = parser.add_argument_group("for an engine")
    add_several(engine, "--devices", "--contexts", "--no_cuda_graph", "--plugins", "--allow_host_code")  # fmt: skip
    onnx = parser.add_argument_group("for an ONNX file")
    add_several(onnx, "--provider", "--threads")
    server = parser.add_argument_group("for a model on a Triton server")
    # fmt: off
    server.add_argument("--spec", type=Path, metavar="FILE", help="the engine's .json or the ONNX file, if the server's config.pbtxt was not written by deploy.py (default: what the server says)")
    server.add_argument("--requests", type=thread_count, metavar="N", help="batches in flight (default: 4)")
    server.add_argument("--timeout", type=positive_float, metavar="SECONDS", help="what one request may take (default: 60)")
    server.add_argument("--no_shared_memory", dest="shared_memory", action="store_const", const=False, help="send the images in the requests, even to a server on this machine")
    # fmt: on
    add_verbose(parser)


def parse_run_args(parser: ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse what has `add_run_options` and --model; an option that the model's runtime does not
    have is wrong usage.
    """
    args = parser.parse_args(argv)
    check_size_usage(parser, args)
    if args.engine:
        try:
            RunOptions.from_args(args).for_runtime(args.engine)
        except ValueError as error:
            parser.error(str(error))
    return args
