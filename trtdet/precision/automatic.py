# SPDX-License-Identifier: Apache-2.0
"""What build_engine.py settles by itself: how weights are rounded, and which convolutions 8 bits
hurt most. Measured once and kept with the calibration cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet.images.files import find_images
from trtdet.precision import calibration, choice, moments
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.choice import Choice
from trtdet.precision.costs import COST_IMAGES, Judge, measure_costs
from trtdet.precision.feeds import image_feeds
from trtdet.precision.objective import Damage
from trtdet.precision.options import DEFAULT_SHARE, Int8Options
from trtdet.precision.quantization import QuantizationPlan
from trtdet.precision.rounding import Rounding, round_together
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)

#: Images whose activations say how weights are rounded.
ROUNDING_IMAGES = 48
#: Second moments that are in memory at a time, 4 bytes each. Where a model has more, the images are
#: run again for the rest.
MOMENTS_AT_A_TIME = 2**26


def choose(plan: QuantizationPlan, options: Int8Options, *, runs: bool = True) -> Choice | None:
    """The convolutions to leave out of 8 bits, beside those that the plan keeps.

    None where that is not asked for, or cannot be measured.

    Args:
        options: `share`, and where the images and the cache are.
        runs: ONNX Runtime runs the model.

    Raises:
        ValueError: a share is asked for that cannot be had: nothing to measure on, or too much is
            kept already.
    """
    share = least_share(options)
    if share >= 1:
        return None
    total, fixed = plan.total_macs, plan.kept_macs
    if options.share is not None and fixed > (1 - share) * total:
        raise ValueError(
            f"--int8_share {share:g}: what is kept by name, and what cannot be quantized, leaves {1 - fixed / total:.1%} of the "
            "multiply-accumulates; lower it, or keep less"
        )
    costs = _costs(plan, options, runs=runs)
    if costs is None:
        return None
    found = choice.choose(plan.layers, costs, share, total_macs=total, kept_macs=fixed)
    for line in choice.table(plan.layers, costs, found.kept):
        logger.debug(line)
    logger.info(
        "left out: %d of %d convolutions, which make %.0f %% of the error of boxes and %.0f %% of that of scores (power); -v lists them",
        len(found.kept),
        len(plan.layers),
        100 * found.box_share,
        100 * found.score_share,
    )
    return found


def choose_rounding(plan: QuantizationPlan, options: Int8Options, *, runs: bool = True) -> None:
    """Settle how the weights of pointwise convolutions are rounded, as far as the cache of the plan
    does not say it; written there.

    Without images to measure on, weights of which nothing is known go to the nearest.

    Args:
        options: where the images and the cache are.
        runs: ONNX Runtime runs the model.
    """
    cache = plan.cache
    steps = {layer: plan.in_steps(layer) for layer in plan.layers if plan.options.together}
    unknown: dict[ConvLayer, NDArray[np.float64]] = {}
    for layer, values in steps.items():
        known = cache.rounding.get(layer.name)
        if values is not None and not (known and known.fits(values)):
            unknown[layer] = values
    if not unknown:
        return
    if options.images is None or not runs:
        if cache.rounding:
            logger.warning("--calib_cache: does not say how the weights of %d convolutions are rounded: to the nearest, which costs accuracy; give --calib_input", len(unknown))  # fmt: skip
        return
    paths = _images(options.images, options, ROUNDING_IMAGES)
    for layers in _groups(unknown):
        tensors = {layer.input: unknown[layer].shape[1] for layer in layers}
        found = moments.measure_moments(plan.body, tensors, _shown(plan.body, paths))
        for layer in layers:
            placed = plan.equalized.get(layer.name)
            factors = placed.equalization.factors if placed else np.ones(tensors[layer.input])
            covariance = found[layer.input].covariance * np.outer(factors, factors)
            rounded = round_together(unknown[layer], covariance)
            cache.rounding[layer.name] = Rounding.of(unknown[layer], rounded)
        if options.cache and options.cache.is_file():
            cache.write_sidecar(options.cache)


def least_share(options: Int8Options) -> float:
    """What `options` ask for: by hand goes before by itself."""
    if options.share is not None:
        return options.share
    by_hand = options.keep_fp16 or options.keep_fp32 or options.precision_file
    return 1.0 if by_hand else DEFAULT_SHARE


def _costs(
    plan: QuantizationPlan, options: Int8Options, *, runs: bool
) -> Mapping[str, Damage] | None:
    """Of the cache as far as it has them; the rest is measured, and written there."""
    cache, kind = plan.cache, plan.options.to.name
    known = cache.costs.get(kind, {})
    if all(layer.name in known for layer in plan.layers):
        return known
    if options.images is None or not runs:
        reason = "no --calib_input to measure on" if runs else "ONNX Runtime does not run this model"  # fmt: skip
        if options.share is not None:
            raise ValueError(
                f"--int8_share {options.share:g}: {reason}, and the cache does not say what each convolution costs; give --calib_input, name "
                "convolutions with --keep_fp16, or take --int8_share 1"
            )
        logger.warning("all convolutions are %s, which costs accuracy: %s", kind, reason)
        return None

    def keep(costs: Mapping[str, Damage]) -> None:
        cache.costs[kind] = dict(costs)
        if options.cache and options.cache.is_file():
            cache.write_sidecar(options.cache)

    feeds = cost_feeds(plan.body, options.images, options)
    judge = Judge(plan.body, feeds)
    if judge.coding is None:
        logger.warning("the heads are not recognised as boxes and scores: convolutions are compared by the error of all that the heads say")  # fmt: skip
    elif not judge.finds:
        logger.warning("--calib_input: the float32 model finds nothing in these images, which says little of what convolutions matter; give images of what it is to detect")  # fmt: skip
    return measure_costs(plan, judge, known=known, keep=keep)


def cost_feeds(body: Body, source: Path, options: Int8Options) -> list[dict[str, NDArray[Any]]]:
    """At most `COST_IMAGES` of the calibration's images, spread over all, as the network takes
    them; those that cannot be read are left out.

    Raises:
        ValueError: none can be read.
    """
    chosen = _images(source, options, COST_IMAGES)
    feeds = [*image_feeds(body.model, body.spec, chosen, option="--calib_input")]
    if not feeds:
        raise ValueError(f"--calib_input: expected images that can be read, found none in {source}")
    return feeds


def _images(source: Path, options: Int8Options, count: int) -> list[Path]:
    """At most `count` of the calibration's images, spread over all."""
    paths = calibration.choose_images(
        find_images(source, option="--calib_input"),
        options.num_images,
        fraction=options.fraction,
        seed=options.seed,
    )
    return calibration.choose_images(paths, count, seed=options.seed)


def _shown(body: Body, paths: Sequence[Path]) -> Iterator[dict[str, NDArray[Any]]]:
    """As the network takes them, with a progress bar."""
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(paths), desc="rounding", unit="image", disable=no_bar()) as bar,
    ):
        for feed in image_feeds(body.model, body.spec, paths, option="--calib_input"):
            yield feed
            bar.update()


def _groups(wanted: Mapping[ConvLayer, NDArray[np.float64]]) -> list[list[ConvLayer]]:
    """Convolutions whose inputs' moments are in memory together; those of one input, in one."""
    groups: list[list[ConvLayer]] = [[]]
    free = MOMENTS_AT_A_TIME
    by_input: dict[str, list[ConvLayer]] = {}
    for layer in wanted:
        by_input.setdefault(layer.input, []).append(layer)
    for layers in by_input.values():
        size = wanted[layers[0]].shape[1] ** 2
        if size > free and groups[-1]:
            groups.append([])
            free = MOMENTS_AT_A_TIME
        groups[-1] += layers
        free -= size
    return groups
