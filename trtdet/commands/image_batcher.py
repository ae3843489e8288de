# SPDX-License-Identifier: Apache-2.0
"""Show what the network sees of images.

    image_batcher.py --model model.onnx --input photos --output seen

writes one PNG per image with the pixels that the network gets (rounded, if it takes floats), and
prints how each image was scaled.

Exit status: 0 every image is shown; 1 an error, or no image could be read; 2 wrong usage; 3 done,
but some images could not be read.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtdet.commands.cli import SOME_SKIPPED, ArgumentParser, run_main, setup_logging
from trtdet.commands.options import add, add_several, add_verbose, check_size_usage
from trtdet.files import printable
from trtdet.images.options import Resample
from trtdet.spec import Preprocessing

if TYPE_CHECKING:
    from trtdet.geometry import ResizeTransform
    from trtdet.images.preprocess import ShorterSide

logger = logging.getLogger(__name__)


#: Pictures at a time, and bytes of them; nothing else depends on it here.
BATCH_SIZE, BATCH_BYTES = 8, 1 << 30


def show(
    names: Mapping[Path, str],
    output: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int = BATCH_SIZE,
    resample: Resample | None = None,
    workers: int | None = None,
    resize: ShorterSide | None = None,
) -> int:
    """Write what the network sees of each image, and print how it was scaled.

    Args:
        names: image -> its output name without suffix, relative to `output`.

    Returns:
        The number of images that could not be read.

    Raises:
        ValueError: not one could be read.
    """
    from trtdet.images.batcher import ImageBatcher
    from trtdet.images.files import check_read
    from trtdet.images.preprocess import to_picture
    from trtdet.results.naming import write_picture

    targets = {path: output / f"{name}.png" for path, name in names.items()}
    height, width = preprocessing.size_hw
    size = f"of {resize.shorter} to {resize.longer}" if resize else f"{width} x {height}"
    print(
        f"network input {size} {preprocessing.layout} {preprocessing.dtype}, "
        f"{preprocessing.resize}, padding {preprocessing.pad_rgb}"
    )
    print(f"{'source':>13} {'scale x':>9} {'scale y':>9} {'in network':>13}  picture")
    with ImageBatcher(
        list(names), preprocessing, batch_size, resample=resample, resize=resize, workers=workers
    ) as batches:
        for batch in batches:
            for seen, path, transform in zip(
                batch.images, batch.paths, batch.transforms, strict=True
            ):
                write_picture(targets[path], to_picture(seen, preprocessing))
                print(
                    _table_row(transform, preprocessing, resize),
                    printable(targets[path].relative_to(output)),
                )
            batch.release()
    failed = len(batches.failures)
    check_read(batches.failures, len(names) - failed)
    return failed


def batch_size_of(preprocessing: Preprocessing) -> int:
    """Pictures at a time, fewer where they are large."""
    size = 4 * math.prod(preprocessing.image_shapes[-1])
    return max(1, min(BATCH_SIZE, BATCH_BYTES // size))


def _table_row(
    transform: ResizeTransform, preprocessing: Preprocessing, resize: ShorterSide | None
) -> str:
    from trtdet.images.preprocess import placement_of

    source_w, source_h = transform.source_wh
    scale = resize.scale((source_h, source_w)) if resize else None
    (height, width), _ = placement_of((source_h, source_w), preprocessing, scale)
    source, inside = f"{source_w} x {source_h}", f"{width} x {height}"
    scale_x, scale_y = transform.scale_xy
    return f"{source:>13} {scale_x:>9.5f} {scale_y:>9.5f} {inside:>13} "


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add(parser, "--model file", note="it says how images are prepared")
    add(parser, "--input", required=True)
    add(parser, "--output", "-o", required=True)
    add_several(parser, "--batch_size", "--size", "--resize", "--max_size", "--resample", "--workers", "--recursive", "--num_images")  # fmt: skip
    add_verbose(parser)
    args = parser.parse_args(argv)
    check_size_usage(parser, args)
    if not args.model and not args.size:
        parser.error("give --model, or --size H,W to see AutoML's letterbox without a model")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose, args.quiet)

    def run() -> int:
        from trtdet.engine.sidecar import read_spec
        from trtdet.files import check_folder
        from trtdet.images.files import find_images, root_of
        from trtdet.images.preprocess import IMAGENET_MEAN, choose_input
        from trtdet.results.naming import check_apart, output_names
        from trtdet.runtimes.kinds import check_model

        if args.model:
            check_model(args.model)
            preprocessing, resize = choose_input(
                read_spec(args.model).preprocessing,
                size=args.size,
                resize=args.resize,
                max_size=args.max_size,
            )
        else:
            preprocessing, resize = Preprocessing(args.size, pad_rgb=IMAGENET_MEAN), None
        images = find_images(args.input, recursive=args.recursive, num_images=args.num_images)
        root = root_of(args.input)
        names = dict(zip(images, output_names(images, root), strict=True))
        check_folder(args.output)
        check_apart(args.output, names, args.input, recursive=args.recursive)
        failed = show(
            names,
            args.output,
            preprocessing,
            batch_size=args.batch_size or batch_size_of(preprocessing),
            resample=args.resample,
            workers=args.workers,
            resize=resize,
        )
        logger.info("%d of %d images shown", len(images) - failed, len(images))
        print(args.output)
        return SOME_SKIPPED if failed else 0

    return run_main(run)
