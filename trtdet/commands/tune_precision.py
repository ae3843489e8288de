# SPDX-License-Identifier: Apache-2.0
"""Find the fewest convolutions that must stay in FP16 so that INT8 keeps AP within a limit.

  tune_precision.py --model d0.onnx --calib_input photos --calib_cache d0.cache \\
      --input val --annotations val.json --max_ap_drop 0.005 --output precision.json

writes precision.json for build_engine.py --precision_json, and prints what it costs. It runs in
ONNX Runtime, on the CPU, without TensorRT.

It tries everything in INT8 first. If that loses too much AP, it puts each convolution in INT8 alone
and measures on a few images what that does to the boxes and scores, its noise. Those that lose most
stay in FP16, more and more of them until AP is within the limit; those that were not needed go back
into INT8. --table and --plot write the noise of every convolution.

Every result goes to <output>.journal at once: after an interruption, the same command continues.

The set is chosen by its AP on these images. Measure it on others (build_engine.py --save_onnx,
eval_coco.py) before you rely on small differences.

Exit status: 0 written; 1 an error, or there is no such set and nothing is written; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtdet import files
from trtdet.commands import cli
from trtdet.commands.cli import ArgumentParser, check_plot
from trtdet.commands.options import (
    add,
    add_calibration_options,
    add_several,
    add_verbose,
    calibration_from,
    check_calibration_usage,
)
from trtdet.commands.values import positive_int
from trtdet.precision.options import DEFAULT_SHARE, Int8Options
from trtdet.run.options import (
    FEW_IMAGES,
    METRICS,
    NOISE_IMAGES,
    VIEWS_OF_FEW,
    TuneOptions,
)

if TYPE_CHECKING:
    from trtdet.images.files import Sources

logger = logging.getLogger(__name__)


def run(
    onnx_path: Path,
    int8: Int8Options,
    annotations_path: Path,
    source: Sources,
    output: Path,
    options: TuneOptions = TuneOptions(),
    *,
    table: Path | None = None,
    plot: Path | None = None,
    recursive: bool = False,
    num_images: int | None = None,
) -> None:
    """Tune; see the module's docstring.

    Raises:
        OSError, GraphError: the ONNX file is missing, or not what stage 1 writes.
        ValueError: a cache, images or annotations that do not fit; or no set of convolutions is
            good enough.
    """
    from trtdet.images.files import check_no_image
    from trtdet.precision import automatic, sensitivity
    from trtdet.precision.body import Body
    from trtdet.precision.prepare import load_model, scales_of
    from trtdet.precision.sensitivity import Journal
    from trtdet.results import coco
    from trtdet.results.categories import match_categories
    from trtdet.run.evaluate import annotated_images
    from trtdet.run.tune import Tuner, context_of
    from trtdet.runtimes.kinds import ONNX, check_model

    journal_path = output.with_name(output.name + ".journal")
    files.check_outputs([output, journal_path, table, plot], [onnx_path, annotations_path, int8.cache])  # fmt: skip
    check_no_image([output, table, plot], source)
    check_plot(plot)
    check_model(onnx_path, what=ONNX)
    body = Body(*load_model(onnx_path))
    annotations = coco.read_annotations(annotations_path)
    spec = body.spec
    categories = match_categories(
        spec.labels, spec.category_ids, annotations.categories, annotations_path
    )
    images = annotated_images(source, annotations, recursive=recursive, num_images=num_images)
    coco.check_objects(annotations, images.values())
    output.parent.mkdir(parents=True, exist_ok=True)  # for the journal
    plan = sensitivity.plan(body, scales_of(body, int8))
    automatic.choose_rounding(plan, int8)
    context = context_of(plan, annotations_path, list(images))
    journal = Journal(journal_path, context)
    if len(journal):
        logger.info("%s: %d measurements to go on from", journal_path, len(journal))

    tuner = Tuner(plan, annotations, categories, images, journal, options)
    kept, found = tuner.tune(rank=bool(table or plot))
    if kept is None:
        raise ValueError(
            f"--max_ap_drop {options.max_drop:g}: {options.metric} falls further below float32's {tuner.mean(None):.4f} even with all but the least "
            f"noisy of {len(plan.layers)} convolutions in FP16; allow more, give more --input images, or build with build_engine.py --precision fp16"
        )
    tuner.precision(kept).write(output)
    if table:
        files.write_text(table, sensitivity.table(found, kept))
    if plot:
        title = f"{onnx_path.name}: each convolution alone in INT8"
        sensitivity.plot(plot, found, kept, title=title)
    print(files.printable_lines(tuner.summary(kept)))
    print(output)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add(parser, "--model onnx", "--onnx", required=True, dest="onnx")
    add(parser, "--input", required=True, note="not those used for calibration")
    add(parser, "--annotations", required=True)
    add(
        parser,
        "--output file",
        "-o",
        required=True,
        note="for build_engine.py --precision_json; FILE.journal is written beside it",
    )
    add(parser, "--max_ap_drop", note="below float32's, in the AP that --metric names")
    # fmt: off
    parser.add_argument("--metric", choices=METRICS, default="AP", help="AP75 where boxes have to be tight (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the noise of every convolution to this file, tab separated (default: none)")
    # fmt: on
    add(parser, "--plot", note="here the noise of every convolution")
    # fmt: off
    parser.add_argument("--views", type=positive_int, metavar="N", help=f"show each image N times, as it is, mirrored, and a little darker: AP on few images scatters (default: {VIEWS_OF_FEW} for less than {FEW_IMAGES} images, else 1)")
    parser.add_argument("--noise_images", type=positive_int, default=NOISE_IMAGES, metavar="N", help="annotated images on which the noise is measured (default: %(default)s)")
    # fmt: on
    add_several(parser, "--recursive", "--num_images", "--threads")
    add_verbose(parser)
    add_calibration_options(parser.add_argument_group("calibration, as in build_engine.py"))
    args = parser.parse_args(argv)
    check_calibration_usage(parser, args)
    if not args.calib_input and not (args.calib_cache and args.calib_cache.is_file()):
        parser.error("give images to calibrate on, --calib_input DIR, or an existing --calib_cache FILE")  # fmt: skip
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose, args.quiet)
    options = TuneOptions(
        args.max_ap_drop,
        args.metric,
        args.views,
        args.noise_images,
        args.threads,
        DEFAULT_SHARE if args.int8_share is None else args.int8_share,
    )
    return cli.run_main(
        lambda: run(
            args.onnx,
            calibration_from(args),
            args.annotations,
            args.input,
            args.output,
            options,
            table=args.table,
            plot=args.plot,
            recursive=args.recursive,
            num_images=args.num_images,
        )
    )
