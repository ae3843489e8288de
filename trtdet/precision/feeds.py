# SPDX-License-Identifier: Apache-2.0
"""Images as a network takes them, for what is measured while a precision is prepared."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.onnx_files import feed_of, fixed_batch
from trtdet.precision.body import Body
from trtdet.precision.options import CALIBRATION_BATCH
from trtdet.precision.suitability import Suitability
from trtdet.spec import ModelSpec
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)


def image_feeds(
    model: onnx.ModelProto,
    spec: ModelSpec,
    paths: Iterable[Path],
    *,
    option: str,
    read: list[Path] | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """One image at a time. Those that cannot be read are logged and left out.

    Args:
        option: that named the images, for messages.
        read: gets the paths of those that can be read.
    """
    for path in paths:
        try:
            image, _ = preprocess(load_image(path), spec.preprocessing)
        except (OSError, ValueError) as error:
            logger.warning("%s: %s is left out: %s", option, path, error)
            continue
        if read is not None:
            read.append(path)
        yield feed_of(model, image)


def calibration_feeds(
    body: Body,
    paths: Sequence[Path],
    batch_size: int | None,
    seen: list[Path],
) -> Iterator[dict[str, NDArray[Any]]]:
    """The images, preprocessed as for inference; in a model of a fixed batch, one at a time fills
    every row.

    An image that cannot be read is logged by the batcher and left out, each time: the scales are
    the same again. `seen` gets the others.

    Raises:
        ValueError: a batch size that the model does not take, or no image can be read.
    """
    fixed = fixed_batch(body.model)
    name = body.model.graph.input[0].name
    if fixed and batch_size not in (None, fixed):
        raise ValueError(f"--calib_batch_size {batch_size}: the ONNX file has a fixed batch of {fixed}; leave it out")  # fmt: skip
    size, repeats = (1, fixed) if fixed else (batch_size or CALIBRATION_BATCH, 1)
    suitability = Suitability(body.spec.preprocessing.size_hw)
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(paths), desc="calibrating", unit="image", disable=no_bar()) as bar,
        ImageBatcher(paths, body.spec.preprocessing, size) as batches,
    ):
        for batch in batches:
            yield {name: np.repeat(batch.images, repeats, axis=0)}
            seen.extend(batch.paths)
            for image, transform in zip(batch.images, batch.transforms, strict=False):
                planes_last = body.spec.preprocessing.layout == "NHWC"
                suitability.add(
                    image if planes_last else image.transpose(1, 2, 0), transform.source_wh
                )
            bar.update(len(batch.images))
        skipped = len(batches.failures)
    if skipped == len(paths):
        raise ValueError(f"--calib_input: expected images that can be read, found {skipped} that cannot, the first of them {batches.failures[0][0]}")  # fmt: skip
    for line in suitability.warnings():
        logger.warning("--calib_input: %s; give images of what the detector is to see", line)
    if skipped:
        logger.warning("calibrated on %d of %d images: the others cannot be read", len(paths) - skipped, len(paths))  # fmt: skip
