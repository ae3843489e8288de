# SPDX-License-Identifier: Apache-2.0
"""Draw detections into images. Run alone, it draws from TSVs that infer.py wrote:

    visualize.py --input photos --detections found --output pictures
    visualize.py --input photos --detections found --output pictures --annotations instances.json

With --annotations each picture shows the detections on the left and the ground truth on the right.

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
from trtdet.commands.cli import SOME_SKIPPED, run_main, setup_logging, unit_interval
from trtdet.labels import Labels, read_labels
from trtdet.machine import available_cores

if TYPE_CHECKING:
    from trtdet.detections import Detections
    from trtdet.images.files import ImageArray

logger = logging.getLogger(__name__)


# ---- run alone


def run(
    source: Path,
    detections: Path,
    output: Path,
    *,
    labels: Labels = (),
    annotations: Path | None = None,
    score_threshold: float = 0.0,
    recursive: bool = False,
    font_path: Path | None = None,
) -> int:
    """Draw every image that has a TSV; see the module's docstring. Returns the exit status: 0, or `SOME_SKIPPED`."""
    from trtdet.images.files import find_images
    from trtdet.results import coco
    from trtdet.results.coco import ANNOTATIONS, class_ids_of, ground_truth, labels_of
    from trtdet.results.naming import check_not_inputs, output_names, with_suffix_added, write_png

    if not detections.is_dir():
        there = "a file" if detections.exists() else "nothing"
        raise FileNotFoundError(f"--detections: expected a directory with TSVs of infer.py, found {there} at {detections}")  # fmt: skip
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)
    paths = find_images(source, recursive=recursive)
    names = dict(zip(paths, output_names(paths, source), strict=True))
    check_not_inputs((output / with_suffix_added(n, ".png") for n in names.values()), paths)
    truth: dict[Path, Detections] | None = None
    if annotations:
        known = coco.read_annotations(annotations)
        labels = labels or labels_of(known.categories)
        found = ground_truth(known, class_ids_of(known.categories, labels))
        ids = coco.match_images(known, paths, source)
        truth = {path: found[i] for path, i in ids.items() if i in found}
    draw_file = partial(
        _draw_file, labels=labels, score_threshold=score_threshold, font_path=font_path
    )

    def draw_one(path: Path) -> bool:
        """False where an image or its TSV cannot be read; an output that cannot be written is an error."""
        tsv = detections / with_suffix_added(names[path], ".tsv")
        try:
            picture = draw_file(path, tsv, truth)
        except (OSError, ValueError) as error:
            logger.warning("skipped: %s", error)
            return False
        write_png(output / with_suffix_added(names[path], ".png"), picture)
        return True

    pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="draw")
    try:
        drawn = sum(pool.map(draw_one, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    if not drawn:
        raise ValueError(
            f"--detections: expected TSVs of infer.py for the images of {source}, found none in {detections}"
        )
    logger.info("%d of %d images drawn", drawn, len(paths))
    print(output)
    return 0 if drawn == len(paths) else SOME_SKIPPED


def _draw_file(
    path: Path,
    tsv: Path,
    truth: Mapping[Path, Detections] | None,
    *,
    labels: Labels,
    score_threshold: float,
    font_path: Path | None,
) -> ImageArray:
    """One picture: the detections, beside the ground truth where there is one for this run."""
    import numpy as np

    from trtdet.detections import Detections, read_tsv
    from trtdet.images.files import load_image
    from trtdet.results.draw import draw, side_by_side

    image = load_image(path)
    found = read_tsv(tsv).above(score_threshold)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="PATH", help="an image, or a directory of images")
    parser.add_argument("-d", "--detections", type=Path, required=True, metavar="DIR", help="directory with the TSVs of infer.py")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the pictures go; made if missing")
    parser.add_argument("-l", "--labels", metavar="FILE", help="class names, one per line; 'coco' for COCO's; default: those of --annotations, else class numbers")
    parser.add_argument("-a", "--annotations", type=Path, metavar="FILE", help="COCO annotations: draw the ground truth beside")
    parser.add_argument("-t", "--score_threshold", type=unit_interval, default=0.0, metavar="SCORE", help="draw no detections below this score (default: all of the TSV)")
    parser.add_argument("--font", type=Path, metavar="FILE", help="a TrueType font for labels that are not in Latin letters")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose)
    return run_main(
        lambda: run(
            args.input,
            args.detections,
            args.output,
            labels=read_labels(args.labels) if args.labels else (),
            annotations=args.annotations,
            score_threshold=args.score_threshold,
            recursive=args.recursive,
            font_path=args.font,
        ),
    )
