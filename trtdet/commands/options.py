# SPDX-License-Identifier: Apache-2.0
"""Options that several stages share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trtdet.commands import cli
from trtdet.commands.cli import parse_size, positive_float, positive_int, unit_interval
from trtdet.engine.options import parse_version
from trtdet.images.options import DEFAULT_MAX_SIZE
from trtdet.precision import options
from trtdet.precision.options import CALIBRATION_BATCH, FP8_METHOD, METHODS, PROVIDERS, Int8Options
from trtdet.run.options import RunOptions
from trtdet.runtimes.options import parse_devices, parse_url


def add_size_options(parser: argparse.ArgumentParser, *, size_help: str) -> None:
    """The options of the input size where a model leaves it open: for `trtdet.images.preprocess.choose_input`."""
    # fmt: off
    parser.add_argument("--size", type=parse_size, metavar="H,W", help=size_help)
    parser.add_argument("--resize", type=positive_int, metavar="SHORTER", help="for a model of free input size: scale each image by itself, its shorter side to so many pixels; a batch gets the smallest input that holds it")
    parser.add_argument("--max_size", type=positive_int, metavar="LONGER", help=f"with --resize: its longer side to no more than so many pixels (default: {DEFAULT_MAX_SIZE})")
    # fmt: on


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
    group.add_argument("--calib_input", type=Path, metavar="DIR", help="images to calibrate on, as the detector will see them; no annotations")
    group.add_argument("--calib_cache", type=Path, metavar="FILE", help="TensorRT's calibration cache: used where it exists and belongs to this model and these images, else written")
    group.add_argument("--calib_cache_version", type=parse_version, metavar="X.Y.Z", help="the TensorRT that is to read the cache (trtexec --calib, DeepStream, a DLA) and takes no other's: its first line is written for it, in an existing cache too (default: the TensorRT that builds, else 8.6.1)")
    number = group.add_mutually_exclusive_group()
    number.add_argument("--calib_num_images", type=cli.positive_int, metavar="N", help=f"at most so many, chosen at random from all (default: {options.DEFAULT_NUM_IMAGES})")
    number.add_argument("--calib_batches", type=cli.positive_int, metavar="N", help="at most so many batches of --calib_batch_size images")
    group.add_argument("--calib_fraction", type=cli.positive_unit_interval, default=1.0, metavar="F", help="at most this share of all images (default: 1)")
    group.add_argument("--calib_batch_size", type=cli.positive_int, metavar="N", help=f"images at a time; the scales do not depend on it (default: {CALIBRATION_BATCH}, or the ONNX file's)")
    group.add_argument("--calib_method", choices=METHODS, help=f"how the range of an activation is chosen (default: as in an existing cache, else {options.DEFAULT_METHOD}; for fp8, which needs no clipping, {FP8_METHOD})")
    group.add_argument("--calib_seed", type=int, default=options.DEFAULT_SEED, metavar="N", help="of the choice of images (default: %(default)s)")
    group.add_argument("--calib_provider", default="auto", choices=PROVIDERS, help="what of ONNX Runtime calibrates: a GPU is faster, and its scales differ in the last digits (default: auto, the GPU where onnxruntime-gpu is installed)")
    # fmt: on


def check_calibration_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of calibration that need another."""
    if args.calib_cache_version and not args.calib_cache:
        parser.error("--calib_cache_version goes with --calib_cache FILE")


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
        provider=args.calib_provider,
    )


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--engine and --triton, either of which is `args.engine`."""
    model = parser.add_mutually_exclusive_group(required=required)
    # fmt: off
    model.add_argument("-e", "--engine", type=Path, metavar="FILE", help="a TensorRT engine, or an ONNX file of create_onnx.py (runs on ONNX Runtime)")
    model.add_argument("--triton", dest="engine", type=parse_url, metavar="URL", help="a model on a Triton server instead, served as deploy.py triton configures it: grpc://HOST:8001/MODEL or http://HOST:8000/MODEL")
    # fmt: on


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of everything that runs a model on image files."""
    # fmt: off
    parser.add_argument("-t", "--score_threshold", "--nms_threshold", type=unit_interval, metavar="SCORE", help="leave out detections below this score; the model's own threshold already did, so it can only raise")
    parser.add_argument("--batch_size", type=positive_int, metavar="N", help="images per batch; default: what suits the model and the device")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    parser.add_argument("--resample", choices=("bilinear", "antialias"), help="bilinear as TensorFlow does it, or antialiased as Pillow does it (default: as the model was trained)")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="threads that decode and resize images; default: one per core")
    parser.add_argument("--devices", type=parse_devices, metavar="N,...", help="for an engine: the GPUs that share the images, as in 0,1, or 'all'; default: 0")
    parser.add_argument("--contexts", type=positive_int, metavar="N", help="for an engine: batches that may run at the same time on a GPU, for small models; default: 1")
    parser.add_argument("--no_cuda_graph", dest="cuda_graph", action="store_const", const=False, help="for an engine: launch its kernels one by one")
    parser.add_argument("--plugins", type=Path, nargs="+", action="extend", metavar="LIB.so", help="for an engine: libraries of plugins that it needs; may be given several times. They run with your rights")
    parser.add_argument("--allow_host_code", action="store_const", const=True, help="for an engine: let it run code of its own on the CPU, with your rights (a version-compatible engine does); only for files you trust")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help="for an ONNX file: what ONNX Runtime runs it on; default: auto, the first of these that is there")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="for an ONNX file: CPU threads of ONNX Runtime; default: one per core")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="for --triton: the engine's .json or the ONNX file, where the server's config.pbtxt is not of deploy.py")
    parser.add_argument("--requests", type=positive_int, metavar="N", help="for --triton: batches in flight; default: 4")
    parser.add_argument("--timeout", type=positive_float, metavar="SECONDS", help="for --triton: what one request may take; default: 60")
    parser.add_argument("--no_shared_memory", dest="shared_memory", action="store_const", const=False, help="for --triton: send the images in the requests also to a server on this machine")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    add_size_options(
        parser,
        size_help="run a model of free input size at this one; default: the size it was exported for, or its engine is tuned for",
    )


def parse_run_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse what has `add_run_options` and --engine; an option that the engine's runtime does not have is wrong usage."""
    args = parser.parse_args(argv)
    check_size_usage(parser, args)
    if args.engine:
        try:
            RunOptions.from_args(args).for_runtime(args.engine)
        except ValueError as error:
            parser.error(str(error))
    return args
