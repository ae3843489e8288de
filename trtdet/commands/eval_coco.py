# SPDX-License-Identifier: Apache-2.0
"""Measure mAP with COCO's metric: run a detector over annotated images, or read its detections.

    eval_coco.py --model model.engine --input val2017 --annotations instances_val2017.json
    eval_coco.py --detections detections.json --annotations instances_val2017.json

The metric is pycocotools', over ALL images that are both in --input and in the annotation file,
also those without a detection. Images are found by file_name in the annotation file.

--detections FILE with --model writes the detections, in COCO's results format. Without --model it
evaluates that file, of infer.py or any other program: over the images in --input if that is given,
else over all images of the annotation file.

mAP needs detections of low score too: convert with create_onnx.py --score_threshold 0.001.

Exit status: 0 done; 1 an error, or no image could be read; 2 wrong usage; 3 done, but some images
could not be read (each is named on stderr; all their objects count as missed).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtdet import files
from trtdet.commands.cli import SOME_SKIPPED, ArgumentParser, check_plot, run_main, setup_logging
from trtdet.commands.options import add, add_model_option, add_run_options, parse_run_args
from trtdet.run.options import RunOptions
from trtdet.runtimes.options import TritonUrl

if TYPE_CHECKING:
    from trtdet.images.files import Sources
    from trtdet.results.coco import Annotations, Evaluation
    from trtdet.run.evaluate import Run

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_model_option(parser, required=False)
    add(parser, "--input", "-i")
    add(parser, "--annotations", "-a", required=True)
    # fmt: off
    parser.add_argument("--detections", type=Path, metavar="FILE", help="with --model: write the detections to this file (COCO results format); without: evaluate those in it (default: none)")
    # fmt: on
    add(parser, "--json")
    add(parser, "--plot")
    add(parser, "--report", note="missed, false and matched objects, AP of each class")
    add(parser, "--embed")
    # fmt: off
    parser.add_argument("--automl_path", "-p", type=Path, metavar="DIR", help="run AutoML's own coco_metric too, from this checkout of google/automl (default: none; needs TensorFlow)")
    # fmt: on
    add_run_options(parser)
    args = parse_run_args(parser, argv)
    if args.engine and not args.input:
        parser.error("--model needs --input, the images")
    if not args.engine and not args.detections:
        parser.error("--model is required (or --detections alone, to evaluate a file)")
    if args.report and not args.input:
        parser.error("--report needs --input, the images")
    if args.embed and not args.report:
        parser.error("--embed goes with --report")
    return args


def run(
    annotations_path: Path,
    options: RunOptions,
    *,
    engine: Path | TritonUrl | None = None,
    source: Sources | None = None,
    detections: Path | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    automl_path: Path | None = None,
    report_path: Path | None = None,
    embed: bool = False,
) -> int:
    """Evaluate; see the module's docstring. Returns the exit status: 0, or `SOME_SKIPPED`."""
    from trtdet.results import coco
    from trtdet.run.evaluate import (
        NO_ROTATED_AUTOML,
        SCHEMA,
        check_matches,
        read_detections,
        run_model,
    )

    check_files(annotations_path, engine, source, detections, [output, plot, report_path], automl_path)  # fmt: skip
    check_plot(plot)
    annotations = coco.read_annotations(annotations_path)
    if automl_path and any(map(coco.is_rotated, annotations.objects)):
        raise ValueError(NO_ROTATED_AUTOML)
    if engine is not None and source is not None:
        done = run_model(engine, source, annotations, options)
        if detections:
            files.write_text(detections, json.dumps(done.results) + "\n")
    elif detections is not None:
        done = read_detections(detections, source, annotations, options)
    else:
        raise ValueError("expected engine and source, or detections")
    if not done.results:
        logger.warning("no detections at all")
    evaluation = coco.evaluate(annotations, done.results, done.image_ids)
    check_matches(done, annotations, evaluation.metrics)
    report = {"schema": SCHEMA, **evaluation.metrics, "images": len(done.image_ids), **done.report}
    rotated = evaluation.iou_type == "segm"
    if rotated:
        report["iou_type"] = evaluation.iou_type
    print(f"{len(done.image_ids)} images, {len(done.results)} detections" + (" (rotated boxes: overlap of their corners' polygons)" if rotated else ""))  # fmt: skip
    print(coco.metrics_table(evaluation.metrics))
    automl_error = add_automl(report, automl_path, annotations, done) if automl_path else None
    if output:
        files.write_text(output, json.dumps(report, indent=2) + "\n")
        logger.info("wrote %s", output)
    if plot:
        title = f"{(engine or detections or annotations_path).name}: AP {report['AP']:.4f}, {len(done.image_ids)} images"
        coco.plot_precision_recall(plot, evaluation, title=title)
        logger.info("wrote %s", plot)
    if report_path and source is not None:
        title = f"{(engine or detections or annotations_path).name}: AP {report['AP']:.4f}"
        write_report(report_path, title, source, annotations, done, evaluation, embed=embed)
    if automl_error:
        raise automl_error
    return SOME_SKIPPED if done.skipped else 0


def add_automl(
    report: dict[str, Any], checkout: Path, annotations: Annotations, done: Run
) -> ValueError | None:
    """AutoML's figures, printed and put into `report`. What it fails with is for who has written
    the others.
    """
    from trtdet.results import coco
    from trtdet.run.evaluate import AUTOML_CAVEAT, automl_metrics

    if not done.results:
        return None
    try:
        report["automl"] = automl_metrics(checkout, annotations, done.results)
    except ValueError as error:
        return error
    print(f"\nAutoML's coco_metric. {AUTOML_CAVEAT}.")
    print(coco.metrics_table(report["automl"]))
    return None


def check_files(
    annotations: Path,
    engine: Path | TritonUrl | None,
    source: Sources | None,
    detections: Path | None,
    outputs: Sequence[Path | None],
    automl_path: Path | None,
) -> None:
    """Find out before anything is run whether what is to be read is there, and what is to be
    written can be.
    """
    from trtdet.images.files import check_no_image
    from trtdet.results.coco import ANNOTATIONS

    if automl_path and not (automl_path / "efficientdet" / "coco_metric.py").is_file():
        raise ValueError(
            f"--automl_path: expected efficientdet/coco_metric.py in {automl_path}, found none; "
            "clone https://github.com/google/automl"
        )
    if engine:
        model = engine if isinstance(engine, Path) else None
        files.check_outputs([*outputs, detections], [annotations, model])
    else:
        files.check_outputs(outputs, [annotations, detections])
    if source is not None:
        check_no_image(outputs, source)
    files.check_input(annotations, *ANNOTATIONS)
    if detections is not None and not engine:
        files.check_input(detections, "--detections", "detections in COCO's results format, such as infer.py's detections.json")  # fmt: skip


def write_report(
    path: Path,
    title: str,
    source: Sources,
    annotations: Annotations,
    done: Run,
    evaluation: Evaluation,
    *,
    embed: bool,
) -> None:
    """The page of missed, false and matched objects."""
    from trtdet.images.files import root_of
    from trtdet.results.gallery import Page, write_gallery
    from trtdet.results.gallery_items import items_of_evaluation

    items, classes = items_of_evaluation(done.images, root_of(source), annotations, done.results)
    page = Page(
        title,
        f"{len(items)} images of {annotations.path.name}; a match overlaps by an IoU of 0.5 or more",
        {i: annotations.categories[category] for category, i in classes.items()},
        evaluation.metrics,
        {classes[category]: figures for category, figures in evaluation.by_category.items()},
        evaluation.precision[0].tolist(),
    )
    write_gallery(path, items, page, embed=embed)
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose, args.quiet)
    return run_main(
        lambda: run(
            args.annotations,
            RunOptions.from_args(args),
            engine=args.engine,
            source=args.input,
            detections=args.detections,
            output=args.json,
            plot=args.plot,
            automl_path=args.automl_path,
            report_path=args.report,
            embed=args.embed,
        ),
    )
