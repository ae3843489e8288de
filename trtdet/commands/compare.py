# SPDX-License-Identifier: Apache-2.0
"""Compare two forms of a detector, such as a trained model and its ONNX file, or FP32 and INT8.

  compare.py --reference efficientdet-d0 --candidate d0.onnx --input photos --report report.html
  compare.py --reference d0.onnx --candidate d0_int8.onnx --input val2017 \\
      --annotations instances_val2017.json
  compare.py --reference d0.onnx --candidate d0.engine --input photos --json summary.json

Each model is a SavedModel, an ONNX file as it was trained, an ONNX file of create_onnx.py or of
`build_engine.py --save_onnx`, or an engine.

  tensors     of the same name, if neither model is an engine: largest and mean difference,
              cosine, SQNR; on a CPU, FP16 and BF16 files are computed with every result rounded,
              as a GPU does; channels that INT8 rescales are scaled back first
  detections  paired by overlap and category: missing, extra, other class, differences of score
              and box
  AP          of both, with --annotations

A model as it was trained does its own preprocessing. Its boxes go through the hard NMS that
create_onnx.py would give it, because TensorRT has no soft NMS; --own_nms takes the detections of
the model itself. Settings that its file does not contain come from the other model: --resize_mode,
--rotated_nms, --size and --preprocessor of create_onnx.py.

Exit status: 0 within all limits; 1 a limit is exceeded (one line each on stderr), or an error;
2 wrong usage; 3 within the limits, but some images could not be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from trtdet import files
from trtdet.commands import cli
from trtdet.commands.cli import ArgumentParser
from trtdet.commands.options import add, add_several, add_verbose
from trtdet.commands.values import (
    non_negative,
    non_negative_int,
    positive_int,
    positive_unit_interval,
    unit_interval,
)
from trtdet.parity.options import (
    BOX_SHARE_8_BITS,
    LIMITS_8_BITS,
    MIN_SCORE,
    TENSOR_IMAGES,
    WORST_IMAGES,
    CompareOptions,
    Limits,
)
from trtdet.run.options import RunOptions

if TYPE_CHECKING:
    from trtdet.images.files import Sources

logger = logging.getLogger(__name__)


# ---- the command


def run(
    reference_path: Path,
    candidate_path: Path,
    source: Sources,
    options: CompareOptions,
    *,
    annotations_path: Path | None = None,
    output: Path | None = None,
    report_path: Path | None = None,
    worst: int = WORST_IMAGES,
) -> int:
    """Compare, print, write; see the module's docstring. Returns the exit status."""
    from trtdet.images.files import check_no_image, load_image
    from trtdet.parity import report
    from trtdet.parity.compare import category_labels, compare, lines
    from trtdet.parity.sides import open_sides
    from trtdet.results import coco

    inputs = [p for p in (reference_path, candidate_path, annotations_path) if p and p.is_file()]
    files.check_outputs([output, report_path], inputs)
    check_no_image([output], source)
    annotations = coco.read_annotations(annotations_path) if annotations_path else None
    with ExitStack() as stack:
        paths = (reference_path, candidate_path)
        reference, candidate = open_sides(paths, options.run, stack, own_nms=options.own_nms)
        comparison = compare(reference, candidate, source, options, annotations)
    print("\n".join(map(files.printable, lines(comparison))))
    if output:
        files.write_text(output, json.dumps(comparison.to_dict(), indent=2) + "\n")
        print(output)
    if report_path:
        labels = category_labels(comparison, annotations)
        page = report.render(comparison, labels=labels, load=load_image, worst=worst)
        files.write_text(report_path, page)
        print(report_path)
    for check in comparison.broken:
        logger.error("%s", check.line())
    if comparison.broken:
        return 1
    return cli.SOME_SKIPPED if comparison.skipped else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:

    parser = ArgumentParser(description=__doc__)
    limits = Limits()

    def rule(name: str) -> str:
        return f"(default: {getattr(limits, name)} [{getattr(LIMITS_8_BITS, name)}])"

    # fmt: off
    parser.add_argument("--reference", type=Path, required=True, metavar="MODEL", help="the model taken as correct: a SavedModel folder, an ONNX file or an engine")
    parser.add_argument("--candidate", type=Path, required=True, metavar="MODEL", help="the model compared with it, of the same kinds")
    # fmt: on
    add(parser, "--input", required=True)
    add(parser, "--annotations", note="AP is compared too")
    add_several(parser, "--json", "--report")
    what = parser.add_argument_group("what is compared")
    # fmt: off
    what.add_argument("--min_score", type=unit_interval, default=MIN_SCORE, metavar="SCORE", help="detections of at least this score must be in the other model too (default: %(default)s)")
    what.add_argument("--min_iou", type=positive_unit_interval, default=0.5, metavar="IOU", help="overlap from which two boxes are the same object (default: %(default)s)")
    # fmt: on
    add_several(what, "--num_images", "--recursive")
    # fmt: off
    what.add_argument("--tensor_images", type=non_negative_int, default=TENSOR_IMAGES, metavar="N", help="compare tensors on this many images (default: %(default)s; 0: none)")
    what.add_argument("--own_nms", action="store_true", help="for an AutoML model as it was trained: take its own detections, with its own, often soft, NMS")
    what.add_argument("--worst", type=positive_int, default=WORST_IMAGES, metavar="N", help="show this many images in the report, those that differ most first (default: %(default)s)")
    limit = parser.add_argument_group("limits", "Exit status 1 if one is exceeded. Shares are shares of the reference's detections. 95 % of the pairs must stay within a limit of a difference. The defaults depend on the candidate: those in brackets are for INT8 and FP8. docs/parity.md has the measurements behind them.")
    limit.add_argument("--max_missing", type=unit_interval, metavar="SHARE", help=f"detections that the candidate does not have {rule('max_missing')}")
    limit.add_argument("--max_extra", type=non_negative, metavar="SHARE", help=f"detections that only the candidate has {rule('max_extra')}")
    limit.add_argument("--max_flips", type=unit_interval, metavar="SHARE", help=f"detections of another class {rule('max_flips')}")
    limit.add_argument("--max_score_diff", type=non_negative, metavar="X", help=f"difference of scores {rule('max_score_diff')}")
    limit.add_argument("--max_box_diff", type=non_negative, metavar="PIXELS", help=f"difference of a coordinate, in pixels of the network input (default: {limits.max_box_diff} [1/{1 / BOX_SHARE_8_BITS:g} of the shorter side])")
    limit.add_argument("--max_angle_diff", type=non_negative, metavar="RADIANS", help=f"difference of the angles of rotated boxes {rule('max_angle_diff')}")
    limit.add_argument("--min_cosine", type=unit_interval, metavar="X", help=f"cosine of the head tensors {rule('min_cosine')}")
    # fmt: on
    add(
        limit,
        "--max_ap_drop",
        default=None,
        rule=f"{limits.max_ap_drop} [{LIMITS_8_BITS.max_ap_drop}]",
    )
    how = parser.add_argument_group("how it is run")
    add_several(how, "--batch_size", "--resample", "--workers", "--devices", "--plugins", "--allow_host_code")  # fmt: skip
    add(how, "--provider", note="tensors always run on the CPU")
    add(how, "--threads")
    add_verbose(parser)
    return parser.parse_args(argv)


def options_from(args: argparse.Namespace) -> CompareOptions:
    """The options of a parsed command line."""
    names = [field.name for field in dataclasses.fields(Limits)]
    return CompareOptions(
        limits={name: value for name in names if (value := getattr(args, name)) is not None},
        score_threshold=args.min_score,
        iou=args.min_iou,
        num_images=args.num_images,
        tensor_images=args.tensor_images,
        recursive=args.recursive,
        own_nms=args.own_nms,
        run=RunOptions(
            batch_size=args.batch_size,
            resample=args.resample,
            workers=args.workers,
            devices=args.devices,
            plugins=args.plugins,
            allow_host_code=args.allow_host_code,
            provider=args.provider,
            threads=args.threads,
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:

    args = parse_args(argv)
    cli.setup_logging(args.verbose, args.quiet)
    return cli.run_main(
        lambda: run(
            args.reference,
            args.candidate,
            args.input,
            options_from(args),
            annotations_path=args.annotations,
            output=args.json,
            report_path=args.report,
            worst=args.worst,
        )
    )
