# SPDX-License-Identifier: Apache-2.0
"""Compare two forms of a detector: what is right, and what was made of it. Anyone can check a conversion or a precision with it.

  compare.py --reference efficientdet-d0 --candidate d0.onnx --input photos --report report.html
  compare.py --reference d0.onnx --candidate d0_int8.onnx --input val2017 --annotations instances_val2017.json
  compare.py --reference d0.onnx --candidate d0.engine --input photos --output summary.json

Each is a SavedModel, an ONNX file as it was trained, an ONNX file of create_onnx.py or `build_engine.py --save_onnx`, or an engine.

  tensors     of the same name, where both are graphs: largest and mean difference, cosine, SQNR; on a CPU FP16 and BF16
              files are computed as a GPU does, every result rounded
  detections  paired by overlap and category: missing, extra, other class, differences of score and box
  AP          of both, with --annotations

A model as it was trained does its own preprocessing here. Its boxes go through the hard NMS that create_onnx.py reads from it, so that
soft NMS, which TensorRT lacks, is no difference; with --own_nms they are what the model itself puts out. What its file cannot say is taken
from the other model: --resize_mode, --rotated_nms, --input_size and --preprocessor of create_onnx.py.

Exit status: 0 within all limits; 1 a limit is broken (one line each on stderr), or an error; 2 wrong usage; 3 within the limits, but
some images could not be read.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from trtdet import files
from trtdet.commands import cli
from trtdet.parity.options import TENSOR_IMAGES, WORST_IMAGES, CompareOptions, Limits
from trtdet.run.options import RunOptions

logger = logging.getLogger(__name__)


# ---- the command


def run(
    reference_path: Path,
    candidate_path: Path,
    source: Path,
    options: CompareOptions,
    *,
    annotations_path: Path | None = None,
    output: Path | None = None,
    report_path: Path | None = None,
    worst: int = WORST_IMAGES,
) -> int:
    """Compare, print, write; see the module's docstring. Returns the exit status."""
    from trtdet.images.files import load_image
    from trtdet.parity import report
    from trtdet.parity.compare import category_labels, compare, lines
    from trtdet.parity.sides import open_sides
    from trtdet.results import coco

    inputs = [p for p in (reference_path, candidate_path, annotations_path) if p and p.is_file()]
    files.check_outputs([output, report_path], inputs)
    annotations = coco.read_annotations(annotations_path) if annotations_path else None
    with ExitStack() as stack:
        paths = (reference_path, candidate_path)
        reference, candidate = open_sides(paths, options.run, stack, own_nms=options.own_nms)
        comparison = compare(reference, candidate, source, options, annotations)
    print("\n".join(lines(comparison)))
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

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = Limits()
    # fmt: off
    parser.add_argument("-r", "--reference", type=Path, required=True, metavar="MODEL", help="what is right: a SavedModel directory, an ONNX file or an engine")
    parser.add_argument("-c", "--candidate", type=Path, required=True, metavar="MODEL", help="what is compared with it, of the same kinds")
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="PATH", help="a directory of images, or one image")
    parser.add_argument("-a", "--annotations", type=Path, metavar="FILE", help="COCO annotations of these images: compare the AP too")
    parser.add_argument("-o", "--output", "--json", type=Path, metavar="FILE", help="write everything that was measured to this file, as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page to look at: one file, pictures included")
    what = parser.add_argument_group("what is compared")
    what.add_argument("-t", "--score_threshold", type=cli.unit_interval, default=0.1, metavar="SCORE", help="detections from this score on need a partner in the other model (default: %(default)s)")
    what.add_argument("--min_iou", type=cli.positive_unit_interval, default=0.5, metavar="IOU", help="overlap from which two boxes are the same object (default: %(default)s)")
    what.add_argument("-n", "--num_images", type=cli.positive_int, metavar="N", help="so many of the images, evenly spread (default: all)")
    what.add_argument("--tensor_images", type=non_negative_int, default=TENSOR_IMAGES, metavar="N", help="so many of them to compare tensors on (default: %(default)s; 0: none)")
    what.add_argument("--own_nms", action="store_true", help="of an AutoML model as it was trained: the detections it puts out itself, by its own, often soft, NMS")
    what.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    what.add_argument("--worst", type=cli.positive_int, default=WORST_IMAGES, metavar="N", help="images that the report shows, those that differ most (default: %(default)s)")
    limit = parser.add_argument_group("limits (exit status 1 beyond); shares are of the reference's detections, differences hold for 95 %% of the pairs")
    limit.add_argument("--max_missing", type=cli.unit_interval, default=limits.max_missing, metavar="SHARE", help="detections that the candidate does not have (default: %(default)s)")
    limit.add_argument("--max_extra", type=non_negative, default=limits.max_extra, metavar="SHARE", help="detections that only the candidate has (default: %(default)s)")
    limit.add_argument("--max_flips", type=cli.unit_interval, default=limits.max_flips, metavar="SHARE", help="detections of another class (default: %(default)s)")
    limit.add_argument("--max_score_diff", type=non_negative, default=limits.max_score_diff, metavar="X", help="difference of scores (default: %(default)s)")
    limit.add_argument("--max_box_diff", type=non_negative, default=limits.max_box_diff, metavar="PIXELS", help="difference of a coordinate, in pixels of the network input (default: %(default)s)")
    limit.add_argument("--max_angle_diff", type=non_negative, default=limits.max_angle_diff, metavar="RADIANS", help="difference of the angles of turned boxes (default: %(default)s)")
    limit.add_argument("--min_cosine", type=cli.unit_interval, default=limits.min_cosine, metavar="X", help="cosine of the head tensors (default: %(default)s)")
    limit.add_argument("--max_ap_drop", type=non_negative, default=limits.max_ap_drop, metavar="X", help="by which AP may fall, 0 to 1 (default: %(default)s)")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--batch_size", type=cli.positive_int, metavar="N", help="images per batch; default: what suits the model and the device")
    how.add_argument("--plugins", type=Path, nargs="+", metavar="LIB.so", help="of an engine: libraries of plugins that it needs")
    how.add_argument("--allow_host_code", action="store_const", const=True, help="of an engine: let it run code of its own on the CPU; only for files you trust")
    how.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help="of an ONNX file: what detections run on (default: auto; tensors always run on the CPU)")
    how.add_argument("--threads", type=cli.positive_int, metavar="N", help="of an ONNX file: CPU threads")
    how.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    args = parser.parse_args(argv)
    if args.report and args.report.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--report: expected a name that ends in .html, got {args.report}")
    return args


def non_negative(text: str) -> float:
    """argparse type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return 0 if text.strip() == "0" else cli.positive_int(text)


def options_from(args: argparse.Namespace) -> CompareOptions:
    """The options of a parsed command line."""
    return CompareOptions(
        limits=Limits(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Limits)}),
        score_threshold=args.score_threshold,
        iou=args.min_iou,
        num_images=args.num_images,
        tensor_images=args.tensor_images,
        recursive=args.recursive,
        own_nms=args.own_nms,
        run=RunOptions(
            batch_size=args.batch_size,
            plugins=args.plugins,
            allow_host_code=args.allow_host_code,
            provider=args.provider,
            threads=args.threads,
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:

    args = parse_args(argv)
    cli.setup_logging(args.verbose)
    return cli.run_main(
        lambda: run(
            args.reference,
            args.candidate,
            args.input,
            options_from(args),
            annotations_path=args.annotations,
            output=args.output,
            report_path=args.report,
            worst=args.worst,
        )
    )
