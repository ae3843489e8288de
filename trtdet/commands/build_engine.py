# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT engine from an ONNX file that create_onnx.py wrote.

  build_engine.py --model d0.onnx --engine d0.engine --precision fp16 --batch_size 1:4:8

writes d0.engine, which trtexec, Triton and DeepStream load too, and d0.engine.json, which tells
infer.py and eval_coco.py about it. TensorRT-RTX builds without a GPU.

  build_engine.py --model d0.onnx --engine d0.engine --precision int8 \\
      --calib_input photos --calib_cache d0.cache

measures the activations in ONNX Runtime and puts convolutions in INT8 (with QuantizeLinear and
DequantizeLinear nodes) and the rest in FP16. docs/int8.md says what it costs. --precision fp8 does
the same in FP8, for GPUs from Ada (8.9) on.

--save_onnx writes the ONNX model with its precision applied, which runs in ONNX Runtime (BF16 not
on a CPU). On a Jetson without Python, trtexec builds the same engine from it:
`trtexec --onnx=FILE --stronglyTyped --saveEngine=d0.engine`. With --engine, it is the model as that
TensorRT takes it: 8.6, --dla_core and --weak_typing take FP16 and INT8 as flags, which are logged
for trtexec; the scales of --dla_core and --weak_typing are in no ONNX file, so --save_onnx is
refused there for INT8.

--dry_run says what the same command would build, in seconds, and refuses what it would refuse.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from trtdet.commands import cli
from trtdet.commands.cli import ArgumentParser
from trtdet.commands.options import (
    add,
    add_calibration_options,
    add_verbose,
    calibration_from,
    check_calibration_usage,
)
from trtdet.commands.values import dla_core, non_negative_int
from trtdet.engine.flavor import FLAVORS
from trtdet.engine.options import (
    BuildOptions,
    parse_batch_range,
    parse_gib,
)
from trtdet.files import printable_lines
from trtdet.precision.options import PRECISIONS, QUANTIZED_PRECISIONS, RESTS, Int8Options

logger = logging.getLogger(__name__)


def run(
    onnx_path: Path,
    options: BuildOptions,
    *,
    engine_path: Path | None,
    save_onnx: Path | None = None,
    flavor_name: str | None = None,
    check_input: Path | None = None,
    int8: Int8Options = Int8Options(),
    dry_run: bool = False,
) -> None:
    """Build `onnx_path` into `engine_path`, or only prepare it as `save_onnx`, and print what
    came out.
    """
    from trtdet.engine.dry_run import plan_file
    from trtdet.engine.stage import build_file, prepare_file
    from trtdet.onnx_files import naming
    from trtdet.runtimes.kinds import ONNX, check_model

    check_model(onnx_path, what=ONNX)
    if dry_run:
        with naming(onnx_path):
            text = plan_file(
                onnx_path,
                engine_path,
                options,
                int8,
                save_onnx=save_onnx,
                flavor_name=flavor_name,
                check_input=check_input,
            )
        print(text)
    elif engine_path:
        with naming(onnx_path):
            built = build_file(
                onnx_path,
                engine_path,
                options,
                int8,
                save_onnx=save_onnx,
                flavor_name=flavor_name,
                check_input=check_input,
            )
        print(printable_lines(str(built)))
        print(engine_path)
    elif save_onnx:
        with naming(onnx_path):
            prepare_file(onnx_path, save_onnx, options, int8, check_input)
        print(save_onnx)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add(parser, "--model onnx", "--onnx", "-o", required=True, dest="onnx")
    # fmt: off
    parser.add_argument("--engine", "--output", "-e", dest="engine", type=Path, metavar="FILE", help="write the engine to this file, and FILE.json beside it (default: none, see --save_onnx)")
    parser.add_argument("--precision", "-p", default="fp16", choices=PRECISIONS, help="precision of the network; preprocessing, box decoding and NMS are always float32 (default: fp16)")
    parser.add_argument("--rest_precision", dest="rest", default="fp16", choices=RESTS, help="with int8 and fp8: precision of the layers that are not in 8 bits (default: %(default)s)")
    # fmt: on
    add(parser, "--batch_size range", "-b")
    # fmt: off
    parser.add_argument("--dynamic_batch_size", "-d", dest="batch_size", type=parse_batch_range, metavar="MIN,OPT,MAX", help="the same as --batch_size MIN:OPT:MAX (default: none)")
    # fmt: on
    add(parser, "--size range")
    # fmt: off
    parser.add_argument("--save_onnx", type=Path, metavar="FILE", help="write the ONNX model with its precision applied; without --engine nothing else is written, and TensorRT is not needed (default: none)")
    parser.add_argument("--fp16_check_input", type=Path, metavar="PATH", help="images on which to check that activations fit in FP16 (default: a photograph of the package)")
    keep = parser.add_argument_group("layers that keep a higher precision", "PATTERN matches names of nodes in the ONNX file, such as '*/stem/*'; with int8 and fp8, of convolutions. Each option may be given several times.")
    keep.add_argument("--keep_fp16", nargs="+", action="extend", default=[], metavar="PATTERN", help="keep these in FP16 with int8 or fp8 (default: those that the ONNX file marks as sensitive; they are always kept)")
    keep.add_argument("--keep_fp32", nargs="+", action="extend", default=[], metavar="PATTERN", help="keep these in float32 (default: none)")
    # fmt: on
    add(keep, "--precision_json")
    int8 = parser.add_argument_group("INT8 and FP8")
    add_calibration_options(int8)
    # fmt: off
    int8.add_argument("--weak_typing", action="store_true", help="INT8 through TensorRT's calibrator, and FP16 by flag (TensorRT to 10; always with --dla_core)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--flavor", choices=list(FLAVORS), help="which TensorRT builds it (default: the first of these that is installed)")
    where.add_argument("--compute_capability", type=lambda text: tuple(text.split(",")), default=(), metavar="8.9[,12.0]", help="GPUs that TensorRT-RTX builds for; none has to be in this machine (default: all from 8.0 on)")
    where.add_argument("--dla_core", type=dla_core, metavar="N", help="build for this DLA core of a Jetson; the GPU runs the layers that it cannot (default: none)")
    where.add_argument("--version_compatible", action="store_true", help="the engine runs on later releases of TensorRT too")
    where.add_argument("--hardware_compatible", action="store_true", help="the engine runs on every GPU from Ampere on")
    where.add_argument("--strip", action="store_true", help="leave the weights out; your application refits them from the ONNX file, infer.py cannot")
    how = parser.add_argument_group("how it is built")
    how.add_argument("--workspace", "-w", type=parse_gib, metavar="GIB", help="scratch memory that a layer may use, in GiB (default: the GPU's memory)")
    how.add_argument("--timing_cache", type=Path, metavar="FILE", help="reuse the timings in this file and add new ones: later builds are faster (default: none)")
    how.add_argument("--optimization_level", type=non_negative_int, choices=range(6), metavar="0..5", help="0 builds fastest, 5 gives the fastest engine (default: TensorRT's, 3)")
    # fmt: on
    add(how, "--plugins")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be built: layers per precision, input sizes, calibration images, memory; nothing is calibrated, built or written")  # fmt: skip
    add_verbose(parser)
    args = parser.parse_args(argv)
    if not args.engine and not args.save_onnx:
        parser.error("nothing to write: give --engine, --save_onnx or both")
    if not args.engine and (
        args.flavor or options_from(args) != BuildOptions(args.precision, rest=args.rest)
    ):
        parser.error(
            "without --engine nothing is built: leave out all but --model, --precision, --rest_precision, --save_onnx, --fp16_check_input, "
            "--calib_..., --keep_..., --int8_share and --precision_json"
        )
    if args.fp16_check_input and "fp16" not in (args.precision, args.rest if args.precision in QUANTIZED_PRECISIONS else ""):  # fmt: skip
        parser.error(
            "--fp16_check_input goes with --precision fp16, or int8 and fp8 with the rest in fp16"
        )
    check_kept_usage(parser, args)
    check_int8_usage(parser, args)
    written = [path for path in (args.engine, args.save_onnx, args.calib_cache) if path]
    if args.engine and args.engine.suffix.lower() == ".onnx":
        parser.error(f"--engine: an engine, not ONNX; did you mean --save_onnx {args.engine}?")
    if args.onnx in written or len(set(written)) < len(written):
        parser.error("--model, --engine, --save_onnx and --calib_cache: expected different files")
    return args


def check_kept_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """What stays out of a precision, with a precision that it can stay out of."""
    if args.keep_fp16 and (args.precision not in QUANTIZED_PRECISIONS or args.rest != "fp16"):
        parser.error("--keep_fp16 goes with --precision int8 and fp8, with the rest in fp16")
    if (args.keep_fp32 or args.precision_json) and args.precision in ("fp32", "tf32"):
        parser.error(f"--keep_fp32 and --precision_json do not go with --precision {args.precision}: all of it is float32")  # fmt: skip
    if args.rest != "fp16" and args.precision not in QUANTIZED_PRECISIONS:
        parser.error("--rest_precision goes with --precision int8 and fp8")


def check_int8_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Options of calibration with INT8 and FP8 alone.

    Whether these need any depends on the model: `precision.prepare` finds out.
    """
    if args.precision not in QUANTIZED_PRECISIONS:
        if args.int8_share is not None:
            parser.error("--int8_share goes with --precision int8 and fp8")
        if calibration_from(args) != Int8Options() or args.calib_batches:
            parser.error("--calib_... goes with --precision int8 and fp8")
        return
    check_calibration_usage(parser, args)


def int8_from(args: argparse.Namespace) -> Int8Options:
    """The options of calibration, and of what is kept, of a parsed command line."""
    return dataclasses.replace(
        calibration_from(args),
        keep_fp16=tuple(args.keep_fp16),
        keep_fp32=tuple(args.keep_fp32),
        precision_file=args.precision_json,
    )


def options_from(args: argparse.Namespace) -> BuildOptions:
    """The build options of a parsed command line."""
    return BuildOptions(
        precision=args.precision,
        rest=args.rest,
        weak_typing=args.weak_typing,
        batch=args.batch_size,
        size=args.size,
        workspace_gib=args.workspace,
        timing_cache=args.timing_cache,
        compute_capabilities=args.compute_capability,
        dla_core=args.dla_core,
        plugins=tuple(args.plugins or ()),
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        strip=args.strip,
        optimization_level=args.optimization_level,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose, args.quiet)
    return cli.run_main(
        lambda: run(
            args.onnx,
            options_from(args),
            engine_path=args.engine,
            save_onnx=args.save_onnx,
            flavor_name=args.flavor,
            check_input=args.fp16_check_input,
            int8=int8_from(args),
            dry_run=args.dry_run,
        )
    )
