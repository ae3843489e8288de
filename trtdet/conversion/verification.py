# SPDX-License-Identifier: Apache-2.0
"""Whether a converted model still is the model it came from: TensorFlow, or the source ONNX,
against ONNX Runtime on a photograph.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import about
from trtdet.conversion.convert import Converted
from trtdet.errors import GraphError
from trtdet.families.base import RAW_BOXES, Reading
from trtdet.families.outputs import prepared
from trtdet.families.pixels import Normal
from trtdet.geometry import in_layout
from trtdet.graph import deformable_attention, tidy
from trtdet.nms import lowering, reference
from trtdet.onnx_files import fixed_batch
from trtdet.sources.base import Source, run_onnx
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)


#: Largest absolute difference of raw boxes and class logits that passes, in float32 on a
#: photograph.
HEAD_TOLERANCE = 5e-3
#: Where the model itself answers rounding with more than a tenth of that, this many times the
#: answer passes,
ROUNDING_MARGIN = 10
#: as long as the answer is at most this part of the largest logit.
MAX_ROUNDING_SHARE = 1e-2
#: The share of rows that must have a counterpart, where rows may come in another order.
MATCHED_ROWS = 0.98
#: More rows are of a grid, whose order is fixed.
MOST_ROWS = 6000
#: Pixels of the network input, for boxes up to its size.
DECODE_TOLERANCE = 0.05
#: A public-domain photograph (NASA, Eileen Collins) that the result is verified on.
VERIFY_IMAGE = about.PHOTOGRAPH


@dataclass(frozen=True)
class Difference:
    """How far two tensors of the same shape are apart."""

    name: str
    maximum: float
    mean: float

    @classmethod
    def of(cls, name: str, expected: NDArray[Any], actual: NDArray[Any]) -> "Difference":
        gap = np.abs(expected.astype(np.float64) - actual)
        return cls(name, float(gap.max()), float(gap.mean()))


def verify(source: Source, converted: Converted) -> list[Difference]:
    """Compare the result with the source, at two sizes where the input's size is dynamic.

    Compared are the heads, and where the source shows it the decoding of boxes with the anchors in
    the file against the source's own. The source is fed the image, so its own normalisation is part
    of the comparison, unless --preprocessor replaced it. Images of a batch differ, so that rows
    cannot leak into one another.

    Raises:
        GraphError: the model is malformed, or something differs by more than its limit.
    """
    check(converted.model)
    preprocessing = converted.spec.preprocessing
    differences = verify_at(source, converted, preprocessing)
    if preprocessing.size_range:
        multiple = preprocessing.size_multiple
        height, width = preprocessing.size_hw
        smaller = dataclasses.replace(
            preprocessing, size_hw=(height, max(multiple, width // 2 // multiple * multiple))
        )
        differences += verify_at(source, converted, smaller)
    return differences


def verify_at(
    source: Source, converted: Converted, preprocessing: Preprocessing
) -> list[Difference]:
    """`verify` at the size that `preprocessing` names."""
    reading, model = converted.reading, converted.model
    image = verification_image(preprocessing)
    batch = fixed_batch(model) or 2
    images = np.stack([image if row % 2 == 0 else image[:, ::-1] for row in range(batch)])
    by_image = [source_heads(source, reading, preprocessing, x)[0] for x in images[:2]]
    expected = [np.stack(values) for values in zip(*by_image, strict=True)]
    fed = in_layout(images.astype(preprocessing.dtype), preprocessing.layout)
    actual = run_onnx(deformable_attention.lower(model), list(reading.heads), {tidy.INPUT: fed})
    differences = []
    limit = HEAD_TOLERANCE
    for name, want, got in zip(reading.heads, expected, actual, strict=True):
        if got.shape[1:] != want.shape[1:]:
            raise GraphError(
                f"'{name}': expected shape {want.shape[1:]} as in the source, the ONNX gives {got.shape[1:]}"
            )
        differences.append(Difference.of(name, want, got[: len(want)]))
    if reading.one_by_one:  # selected detections, which are compared as such
        return rows_in_any_order(reading, expected, actual) or differences
    if not max(d.maximum for d in differences) <= limit:  # also where it is NaN
        reordered = rows_in_any_order(reading, expected, actual)
        if reordered and max(d.maximum for d in reordered) <= limit:
            differences = reordered
        else:
            limit, any_order = relaxed_limit(source, reading, preprocessing, image)
            differences = reordered if any_order else differences
    if reading.decoded_boxes:
        differences.append(compare_decoding(source, converted, image))
    allowances = [*[limit] * len(reading.heads), DECODE_TOLERANCE]
    for difference, allowed in zip(differences, allowances, strict=False):
        if not difference.maximum <= allowed:
            raise GraphError(
                f"verification failed: {difference.name} of the ONNX differ from {source.path} by up to {difference.maximum:.3g} "
                f"(mean {difference.mean:.3g}), expected at most {allowed:.3g}; no model was written. Please report it, or look "
                "at the model with --no_verify"
            )
    return differences


def rows_in_any_order(
    reading: Reading, expected: list[NDArray[Any]], actual: list[NDArray[Any]]
) -> list[Difference]:
    """The differences of heads whose rows are matched first: queries that a network chooses by
    score swap where scores are nearly equal.

    Returns:
        Of the `MATCHED_ROWS` that lie nearest to a counterpart; empty where the heads have no rows
        in common.
    """
    if any(e.ndim != 3 or e.shape[1] != expected[0].shape[1] for e in expected):
        return []
    if expected[0].shape[1] > MOST_ROWS:
        return []
    gaps: list[list[float]] = [[] for _ in expected]
    for i in range(len(expected[0])):
        total = np.zeros((expected[0].shape[1],) * 2)
        for want, got in zip(expected, actual, strict=True):
            for column in range(want.shape[2]):
                gap = np.abs(want[i, :, column, None].astype(np.float64) - got[i, None, :, column])
                np.maximum(total, gap, out=total)
        nearest = total.argmin(axis=1)
        near = np.argsort(total.min(axis=1), kind="stable")[
            : int(np.ceil(MATCHED_ROWS * len(nearest)))
        ]
        for part, want, got in zip(gaps, expected, actual, strict=True):
            part.append(float(np.abs(want[i, near] - got[i, nearest[near]]).max()))
    return [
        Difference(f"{name} (rows in any order)", max(part), float(np.mean(part)))
        for name, part in zip(reading.heads, gaps, strict=True)
    ]


def compare_decoding(source: Source, converted: Converted, image: NDArray[np.uint8]) -> Difference:
    """Boxes decoded from the source's own regression, with the anchors in the file, against what
    enters the source's NMS.

    In pixels of the network input; boxes larger than it count in proportion (float32 has 7 digits).
    """
    reading, spec = converted.reading, converted.spec
    batch = in_layout(np.repeat(image[None], reading.batch or 1, axis=0), reading.image_layout)
    fetches = [reading.heads[RAW_BOXES], reading.decoded_boxes or ""]
    raw, decoded = source.run(fetches, {reading.image_input: batch})
    ours = reference.decode_boxes(raw[:1], spec.nms.box_coding, converted.anchors)[0]
    unit_y, unit_x = reading.decoded_unit_yx
    theirs = decoded.reshape(-1, 4)[: len(ours)] * np.array([unit_y, unit_x] * 2)
    scale = np.maximum(1, np.abs(theirs) / max(spec.preprocessing.size_hw))
    return Difference.of("decoded boxes (pixels)", theirs / scale, ours / scale)


def relaxed_limit(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> tuple[float, bool]:
    """The limit for heads of a model that is itself less stable than HEAD_TOLERANCE; that limit for
    any other. And whether it holds for rows in any order: where the model sorts them itself, and
    rounding is enough to change the order.

    Raises:
        GraphError: so unstable that nothing could be told.
    """
    floor, floor_any, largest = rounding_floor(source, reading, preprocessing, image)
    if floor <= HEAD_TOLERANCE / ROUNDING_MARGIN:
        return HEAD_TOLERANCE, False
    any_order = floor_any * ROUNDING_MARGIN <= floor
    if any_order:
        floor = floor_any
    if floor > MAX_ROUNDING_SHARE * largest:
        raise GraphError(
            f"verification failed: the model is numerically unstable; a change of its input in float32's last digit moves logits by "
            f"{floor:.3g} of {largest:.3g}. Are these trained weights? --no_verify writes the file all the same"
        )
    limit = max(HEAD_TOLERANCE, ROUNDING_MARGIN * floor)
    logger.warning(
        "a change of the input in float32's last digit moves this model's logits by %.3g, so no two frameworks agree on it to %g; "
        "the limit is raised to %.3g",
        floor, HEAD_TOLERANCE, limit,
    )  # fmt: skip
    return limit, any_order


def rounding_floor(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> tuple[float, float, float]:
    """How far the source's own heads move when the normalised pixels change by float32's
    resolution, about 1e-6; the same with rows in any order; and the largest value.

    A trained network damps rounding (EfficientDet-D0: 1e-5 in the logits); one with unsuitable
    weights amplifies it.
    """
    heads, pixels = source_heads(source, reading, preprocessing, image)
    noise = np.random.default_rng(0).normal(scale=1e-6, size=pixels.shape).astype(np.float32)
    moved = source.run(
        list(reading.heads.values()),
        {reading.network_input: pixels + noise, **_other_feeds(reading, len(pixels))},
    )
    answer = max(float(np.abs(m[0] - h).max()) for m, h in zip(moved, heads, strict=True))
    matched = rows_in_any_order(reading, [h[None] for h in heads], [m[:1] for m in moved])
    answer_any = max((d.maximum for d in matched), default=answer)
    return answer, answer_any, max(float(np.abs(h).max()) for h in heads)


def check(model: onnx.ModelProto) -> None:
    """onnx.checker with strict shape inference, the plugin (which it cannot know) replaced by
    operators that compute the same.

    Raises:
        GraphError: what the checker says.
    """
    try:
        onnx.checker.check_model(lowering.for_onnxruntime(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the converted model is not valid ONNX: {error}") from error


def verification_image(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The photograph at the size of the network input, uint8 [h,w,3] RGB."""
    from PIL import Image

    height, width = preprocessing.size_hw
    with Image.open(VERIFY_IMAGE) as photograph:
        return np.asarray(
            photograph.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        )


def source_heads(
    source: Source, reading: Reading, preprocessing: Preprocessing, image: NDArray[np.uint8]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """(the heads of one image by the source, the normalised pixels behind them as a batch of the
    source's size).
    """
    batch = reading.batch or 1
    measured = reading.spec.preprocessing
    replaced = (preprocessing.mean, preprocessing.std) != (measured.mean, measured.std)
    if replaced or reading.network_input == reading.image_input:
        pixels = prepared(image, reading.network_layout, Normal.of(preprocessing), batch)
    else:
        fed = in_layout(np.repeat(image[None], batch, axis=0), reading.image_layout)
        (pixels,) = source.run([reading.network_input], {reading.image_input: fed})
    feeds = {reading.network_input: pixels, **_other_feeds(reading, len(pixels))}
    heads = source.run(list(reading.heads.values()), feeds)
    return [value[0] for value in heads], pixels


def _other_feeds(reading: Reading, batch: int) -> dict[str, NDArray[Any]]:
    return {name: np.repeat(value, batch, axis=0) for name, value in reading.feeds.items()}
