# SPDX-License-Identifier: Apache-2.0
"""Draw the detections of infer.py into the images again, from its TSV files.

    visualize.py --input photos --detections found --output pictures
    visualize.py --input photos --detections found --output pictures --annotations instances.json

With --annotations, each picture shows the detections on the left and the ground truth on the right.

Exit status: 0 every image is drawn; 1 an error, or nothing could be drawn; 2 wrong usage;
3 done, but some images could not be read or had no TSV (each is named on stderr).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trtdet import files
from trtdet.commands.cli import SOME_SKIPPED, ArgumentParser, run_main, setup_logging
from trtdet.commands.options import add, add_several, add_verbose
from trtdet.labels import LABELS_FILE, Labels, read_labels
from trtdet.machine import available_cores
from trtdet.results.options import DRAW_THRESHOLD

if TYPE_CHECKING:
    from trtdet.detections import Detections
    from trtdet.images.files import ImageArray, Sources

logger = logging.getLogger(__name__)


def run(
    source: Sources,
    detections: Path,
    output: Path,
    *,
    labels: Labels = (),
    annotations: Path | None = None,
    draw_threshold: float = DRAW_THRESHOLD,
    recursive: bool = False,
    num_images: int | None = None,
    font_path: Path | None = None,
) -> int:
    """Draw every image that has a TSV; see the module's docstring.

    Returns the exit status: 0, or `SOME_SKIPPED`.
    """
    from trtdet.files import check_folder
    from trtdet.images.files import find_images, root_of
    from trtdet.results.naming import check_apart, output_names, write_picture

    check_inputs(detections, annotations, font_path)
    paths = find_images(source, recursive=recursive, num_images=num_images)
    root = root_of(source)
    names = dict(zip(paths, output_names(paths, root), strict=True))
    check_folder(output)
    check_apart(output, names, source, recursive=recursive)
    labels = labels_beside(detections, labels)
    truth: dict[Path, Detections] | None = None
    if annotations:
        labels, truth = truth_of(annotations, paths, root, labels)
    draw_file = partial(
        _draw_file, labels=labels, draw_threshold=draw_threshold, font_path=font_path
    )

    def draw_one(path: Path) -> bool:
        """False where an image or its TSV cannot be read; an output that cannot be written is an
        error.
        """
        tsv = detections / f"{names[path]}.tsv"
        try:
            picture = draw_file(path, tsv, truth)
        except (OSError, ValueError) as error:
            logger.warning("skipped: %s", files.message_of(error))
            return False
        write_picture(output / f"{names[path]}.png", picture)
        return True

    pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="draw")
    try:
        drawn = sum(pool.map(draw_one, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    if not drawn:
        raise ValueError(
            f"--detections: expected TSVs of infer.py for the images of {root}, found none in {detections}"
        )
    logger.info("%d of %d images drawn", drawn, len(paths))
    print(output)
    return 0 if drawn == len(paths) else SOME_SKIPPED


def check_inputs(detections: Path, annotations: Path | None, font_path: Path | None) -> None:
    """Find out before the first picture whether what is to be read is there."""
    from trtdet.results.coco import ANNOTATIONS
    from trtdet.results.draw import check_font

    if not detections.is_dir():
        there = "a file" if detections.exists() else "nothing"
        raise FileNotFoundError(f"--detections: expected a folder with TSVs of infer.py, found {there} at {detections}")  # fmt: skip
    if font_path:
        check_font(font_path)
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)


def labels_beside(detections: Path, labels: Labels) -> Labels:
    """`labels`, or the class names that infer.py left beside the TSVs."""
    known = detections / LABELS_FILE
    if not files.is_beside(known):
        return labels
    there = read_labels(known)
    if labels and len(labels) != len(there):
        logger.warning("--labels has %d names, the model %d (%s); classes without a name are drawn as numbers", len(labels), len(there), known)  # fmt: skip
    return labels or there


def truth_of(
    annotations: Path, paths: Sequence[Path], root: Path, labels: Labels
) -> tuple[Labels, dict[Path, Detections]]:
    """`labels`, or the names of the categories; what is annotated in each image."""
    from trtdet.results import coco
    from trtdet.results.coco import class_ids_of, ground_truth, labels_of

    known = coco.read_annotations(annotations)
    labels = labels or labels_of(known.categories)
    found = ground_truth(known, class_ids_of(known.categories, labels))
    ids = coco.match_images(known, paths, root)
    return labels, {path: found[i] for path, i in ids.items() if i in found}


def _draw_file(
    path: Path,
    tsv: Path,
    truth: Mapping[Path, Detections] | None,
    *,
    labels: Labels,
    draw_threshold: float,
    font_path: Path | None,
) -> ImageArray:
    """One picture: the detections, beside the ground truth where there is one for this run."""
    import numpy as np

    from trtdet.detections import Detections, read_tsv
    from trtdet.images.files import load_image
    from trtdet.results.draw import draw, side_by_side

    image = load_image(path)
    found = read_tsv(tsv).above(draw_threshold)
    picture = draw(image, found, labels, font_path=font_path)
    if truth is None:
        return picture
    nothing = Detections(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    )
    annotated = truth.get(path, nothing)
    right = draw(image, annotated, labels, show_scores=False, font_path=font_path)
    titles = (f"detections: {len(found)}", f"ground truth: {len(annotated)}")
    return side_by_side(picture, right, titles, font_path=font_path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add(parser, "--input", required=True)
    # fmt: off
    parser.add_argument("--detections", type=Path, required=True, metavar="DIR", help="folder with the TSVs of infer.py")
    # fmt: on
    add(parser, "--output", "-o", required=True)
    add(
        parser,
        "--labels",
        note="infer.py leaves the model's in labels.txt beside the TSVs, else those of --annotations are taken",
    )
    add(parser, "--annotations", note="draws the ground truth beside the detections")
    add_several(parser, "--draw_threshold", "--recursive", "--num_images")
    # fmt: off
    parser.add_argument("--font", type=Path, metavar="FILE", help="a TrueType font, for labels that are not in Latin letters (default: one that comes with Pillow)")
    # fmt: on
    add_verbose(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose, args.quiet)
    return run_main(
        lambda: run(
            args.input,
            args.detections,
            args.output,
            labels=read_labels(args.labels) if args.labels else (),
            annotations=args.annotations,
            draw_threshold=args.draw_threshold,
            recursive=args.recursive,
            num_images=args.num_images,
            font_path=args.font,
        ),
    )
