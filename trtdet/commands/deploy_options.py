# SPDX-License-Identifier: Apache-2.0
"""The command line of deploy.py: a parser for each of its sub-commands."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trtdet.commands.cli import ArgumentParser
from trtdet.commands.options import add, add_verbose, one_device
from trtdet.commands.values import (
    non_negative_int,
    positive_int,
    side,
    thread_count,
    unit_interval,
)
from trtdet.deploy.options import DEFAULT_MAX_BATCH
from trtdet.machine import parse_version


def parse_trt_version(text: str) -> tuple[int, ...]:
    """argparse type: "10.13" -> (10, 13)"""
    try:
        return parse_version(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_class_threshold(text: str) -> tuple[int, float]:
    """argparse type: "0=0.5" -> (0, 0.5)"""
    class_id, _, threshold = text.partition("=")
    try:
        return int(class_id), unit_interval(threshold)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected CLASS_ID=SCORE such as 0=0.5, got {text!r}"
        ) from error


def parse_name(text: str) -> str:
    """argparse type: a name that is a folder's."""
    if not text or not all(c.isalnum() or c in "_-." for c in text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ - and ., got {text!r}")
    return text


def parse_args(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what does not go together refused."""
    parser = ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> ArgumentParser:
        made: ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")  # fmt: skip
        add_verbose(made)
        return made

    triton = command("triton", "write a model repository for Triton, and print the command that serves it")  # fmt: skip
    add_triton_options(triton)
    deepstream = command("deepstream", "write a folder for DeepStream, and print the commands that run it")  # fmt: skip
    add_deepstream_options(deepstream)
    trtexec = command("trtexec", "print the trtexec command for a model, run it, or show its results like infer.py --benchmark")  # fmt: skip
    add_trtexec_options(trtexec)
    check_ = command("check", "check a model repository, or a folder for DeepStream")
    add(check_, "--output written", required=True)
    pad = command("pad_color", "make an ONNX file accept frames padded with black, as DeepStream pads")  # fmt: skip
    add(pad, "--model onnx", "--onnx", required=True)
    add(pad, "--output file", "-o", required=True)
    args = parser.parse_args(argv)
    if args.command == "triton":
        check_triton_usage(triton, args)
    if args.command == "deepstream":
        args.gpu = one_device(deepstream, args)
    if args.command == "trtexec":
        check_trtexec_usage(trtexec, args)
        args.device = one_device(trtexec, args)
    return args


def add_triton_options(to: ArgumentParser) -> None:
    add(
        to,
        "--model file",
        "--engine",
        "--onnx",
        required=True,
        nargs="+",
        action="extend",
        note="both, or several engines: the same model for several kinds of GPU",
    )
    add(
        to,
        "--output",
        "-o",
        required=True,
        note="an existing model repository is kept, a model of that name gets a new version",
    )
    add(to, "--name", required=True, type=parse_name)
    add(to, "--labels")
    add(to, "--batch_size", note=f"at most; an ONNX file of dynamic batch gets {DEFAULT_MAX_BATCH}")
    add(to, "--devices", rule="all")
    add(to, "--no_cuda_graph")
    # fmt: off
    to.add_argument("--ensemble", action="store_true", help="also NAME_ensemble: encoded images in, boxes in source pixels out (the server needs pillow and opencv-python-headless)")
    to.add_argument("--instances", type=thread_count, default=1, metavar="N", help="execution contexts per GPU (default: %(default)s)")
    to.add_argument("--queue_delay_us", type=non_negative_int, default=1000, metavar="US", help="how long a request waits for others to share its batch (default: %(default)s)")
    # fmt: on


def add_deepstream_options(to: ArgumentParser) -> None:
    add(
        to,
        "--model file",
        "--engine",
        "--onnx",
        required=True,
        note="from an ONNX file, nvinfer builds the engine when it first starts",
    )
    add(to, "--output", "-o", required=True)
    add(to, "--name", type=parse_name, default="detector")
    add(to, "--labels")
    add(to, "--batch_size", note="frames here: the number of streams")
    add(to, "--devices", note="one here")
    add(to, "--score_threshold")
    # fmt: off
    to.add_argument("--class_threshold", type=parse_class_threshold, nargs="+", default=[], metavar="ID=SCORE", help="the same for single classes (default: --score_threshold)")
    to.add_argument("--stream_height", type=side, default=1080, metavar="PIXELS", help="of the video in the sample pipeline (default: %(default)s)")
    to.add_argument("--stream_width", type=side, default=1920, metavar="PIXELS", help="of the video in the sample pipeline (default: %(default)s)")
    # fmt: on


def add_trtexec_options(to: ArgumentParser) -> None:
    what = to.add_mutually_exclusive_group(required=True)
    add(
        what,
        "--model file",
        "--engine",
        "--onnx",
        note="or of build_engine.py --save_onnx",
        rule="none",
    )
    # fmt: off
    what.add_argument("--parse_times", type=Path, metavar="FILE", help="show a file of trtexec --exportTimes (default: none)")
    what.add_argument("--parse_log", type=Path, metavar="FILE", help="show a log of trtexec (default: none)")
    to.add_argument("--tensorrt_version", type=parse_trt_version, metavar="10.13", help="print the command for this TensorRT (default: the installed trtexec's)")
    to.add_argument("--run", action="store_true", help="run it too, and show the table")
    # fmt: on
    add(to, "--batch_size", note="with --parse_log what its --shapes says")
    # fmt: off
    to.add_argument("--precision", choices=["typed", "fp32", "fp16", "int8"], help="for an ONNX file: as the types in it say, or weakly typed (before TensorRT 11) (default: typed)")
    # fmt: on
    add(
        to,
        "--output file",
        "-o",
        note="the engine that trtexec builds from an ONNX file; it has no .json",
    )
    # fmt: off
    to.add_argument("--times", type=Path, metavar="FILE", help="write the time of every batch to this file (default: none)")
    to.add_argument("--iterations", type=positive_int, default=200, metavar="N", help="batches measured (default: %(default)s)")
    # fmt: on
    add(to, "--devices", note="one here")
    add(to, "--plugins", note="without it the loader finds those that the engine's .json names")


def is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def check_triton_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Sort the models into engines and one ONNX file."""
    args.engines = [path for path in args.model if not is_onnx(path)]
    onnx = [path for path in args.model if is_onnx(path)]
    if len(onnx) > 1:
        parser.error(
            f"--model: expected one ONNX file, got {' and '.join(map(str, onnx))}; each gets a --name of its own"
        )
    args.onnx = onnx[0] if onnx else None


def check_trtexec_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Options that do not go together, or would have no effect, are wrong usage."""

    if args.run and args.tensorrt_version:
        parser.error("--run measures with the installed trtexec; leave --tensorrt_version out")
    if not (args.model and is_onnx(args.model)) and (args.precision or args.output):
        parser.error("--precision and --output go with an ONNX file as --model")
    if args.run and (args.parse_times or args.parse_log):
        parser.error("--run goes with --model")
    if args.parse_times and not args.batch_size:
        parser.error("--parse_times needs --batch_size: the file does not say it")
