# SPDX-License-Identifier: Apache-2.0
"""Whether a converted model finds what its source finds: end-to-end comparison, on
photographs.

Where the source selects detections itself, its own selection is applied in NumPy to our heads, and
must give its detections. Where it does not, what the heads hold must at least be detections:
probabilities that differ, boxes with positive sides that lie in the picture.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.conversion.convert import Converted
from trtdet.errors import GraphError
from trtdet.families.base import CLASS_LOGITS, RAW_BOXES, Final, Found, Reading
from trtdet.families.outputs import photographs, prepared
from trtdet.families.pixels import Normal
from trtdet.geometry import in_layout, yxyx_to_xyxy
from trtdet.graph import tidy
from trtdet.graph.map_op import custom_ops
from trtdet.nms import lowering, reference
from trtdet.onnx_files import fixed_batch
from trtdet.sources.base import Source, run_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing

logger = logging.getLogger(__name__)

#: Limits for two detections to be one: pixels of the network input (a share of its size, if that is
#: more), and score.
BOX_TOLERANCE, BOX_SHARE, SCORE_TOLERANCE = 0.5, 1e-3, 5e-3
#: The least share of the source's detections that have to be there: scores that are equal may come
#: out in another order at the end.
LEAST_SHARE = 0.98
#: Detections of a photograph that are compared.
COMPARED = 100
#: Scores below this are not compared: rounding decides them.
NOISE = 1e-4
#: Of boxes with the best scores: how many must have positive sides, and their centre in the picture
#: or near it.
LEAST_ORDERED, LEAST_NEAR, BEST = 0.9, 0.5, 100


#: (boxes [A, 4], x1 y1 x2 y2 in pixels of the network input; probabilities [A, C])
Heads = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Agreement:
    """How many of the source's detections are among ours, over all photographs.

    Attributes:
        missing: the first that are not, with the nearest of ours.
    """

    found: int
    total: int
    missing: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.found / self.total if self.total else 1.0

    def __add__(self, other: "Agreement") -> "Agreement":
        missing = (*self.missing, *other.missing)[:3]
        return Agreement(self.found + other.found, self.total + other.total, missing)


def compare_to_the_end(source: Source, converted: Converted) -> list[str]:
    """Compare detections; returns what was seen, in lines.

    Raises:
        GraphError: the source's detections do not come out, or what comes out can be none; with the
            first pairs.
    """
    reading, spec = converted.reading, converted.spec
    final, preprocessing = reading.final, spec.preprocessing
    images = photographs(preprocessing.size_hw)
    runnable = dataclasses.replace(converted, model=lowering.for_onnxruntime(converted.model))
    runs = can_run(runnable.model)
    results = [our_results(runnable, image, runs=runs) for image in images]
    heads, ours = [h for h, _ in results], [found for _, found in results if found]
    check_plausible(source, spec, heads)
    if final is None:
        return [
            "the source selects no detections itself: scores and boxes of four photographs are plausible"
        ]
    if converted.normalisation_replaced:
        return ["detections not compared: --preprocessor replaces the source's own normalisation"]
    theirs = [their_detections(source, reading, final, preprocessing, image) for image in images]
    total = sum(len(t.scores) for t in theirs)
    if final.remedy and not total:
        raise GraphError(
            f"{source.path} finds nothing on four photographs, so what comes behind its NMS cannot be checked; {final.remedy}, or export a trained model"
        )
    if not runs and final.select is None:
        return ["detections not compared: ONNX Runtime does not know the plugin that selects"]
    selected = [final.select(*one) for one in heads] if final.select else ours
    if final.select is None:  # what options leave out is no difference
        theirs = [kept_by(spec, one) for one in theirs]
    agreement = sum_agreements(theirs, selected, preprocessing.size_hw)
    if agreement.share < LEAST_SHARE and final.other_read:
        other = dataclasses.replace(final, read=final.other_read)
        again = [their_detections(source, reading, other, preprocessing, image) for image in images]
        second = sum_agreements(again, selected, preprocessing.size_hw)
        if second.share > agreement.share:
            theirs, agreement = again, second
    if agreement.share < LEAST_SHARE:
        raise GraphError(
            f"end-to-end comparison failed: its own selection, applied to our heads, reproduces {agreement.found} of the {agreement.total} detections of "
            f"{source.path} on four photographs: {'; '.join(agreement.missing)}; no model was written. Is the reading right? The table above "
            f"says where each fact comes from{'; or ' * bool(final.remedy)}{final.remedy}"
        )
    lines = [
        f"detections of the source on four photographs: {agreement.found} of {agreement.total} compared come out of our heads ({total} in all)"
    ]
    if runs and (final.select is not None or final.differs):
        theirs = [clipped(kept_by(spec, one), preprocessing.size_hw) for one in theirs]
        ours = [clipped(one, preprocessing.size_hw) for one in ours]
        hard = sum_agreements(theirs, ours, preprocessing.size_hw)
        lines.append(
            f"{final.differs or 'selection by TensorRT'}: {hard.found} of {hard.total} are the same in box, class and score"
        )
    return lines


def kept_by(spec: ModelSpec, found: Found) -> Found:
    """Those of the source's detections that the thresholds of the converted file let through."""
    order = np.argsort(-found.scores, kind="stable")
    order = order[
        found.scores[order]
        > spec.nms.score_threshold + SCORE_TOLERANCE * (spec.nms.score_threshold > NOISE)
    ]
    order = order[: spec.nms.max_output_boxes]
    return Found(found.boxes[order], found.scores[order], found.class_ids[order])


def clipped(found: Found, size_hw: tuple[int, int]) -> Found:
    """The same with boxes that end at the borders of the picture, as they do in every result."""
    limit = np.array([*size_hw[::-1]] * 2, np.float32)
    return dataclasses.replace(found, boxes=np.clip(found.boxes, 0, limit))


def sum_agreements(
    theirs: Sequence[Found], ours: Sequence[Found], size_hw: tuple[int, int]
) -> Agreement:
    """`agree` over several images."""
    total = Agreement(0, 0)
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        total += agree(their, our, size_hw, f"photograph {number + 1}")
    return total


def agree(theirs: Found, ours: Found, size_hw: tuple[int, int], where: str = "") -> Agreement:
    """How many of the best of `theirs` are among `ours`: class, score and box; each of ours counts
    once.

    What lies within the score tolerance of the last of `theirs` is left aside: which of equals made
    it is chance.
    """
    order = np.argsort(-theirs.scores, kind="stable")[:COMPARED]
    order = order[theirs.scores[order] > NOISE]
    if len(order) == COMPARED or len(order) == len(theirs.scores):
        last = theirs.scores[order[-1]] if len(order) else 0.0
        certain = order[theirs.scores[order] > last + NOISE]
        order = certain if len(certain) else order
    limit = max(BOX_TOLERANCE, BOX_SHARE * max(size_hw))
    free = np.ones(len(ours.scores), bool)
    found, missing = 0, list[str]()
    for i in order:
        near = np.flatnonzero(
            free
            & (ours.class_ids == theirs.class_ids[i])
            & (np.abs(ours.scores - theirs.scores[i]) <= SCORE_TOLERANCE)
        )
        gaps = np.abs(ours.boxes[near] - theirs.boxes[i]).max(axis=1)
        if len(near) and gaps.min() <= limit * _scale(theirs.boxes[i], size_hw):
            free[near[gaps.argmin()]] = False
            found += 1
        elif len(missing) < 3:
            missing.append(
                f"{where}: {_text(theirs, int(i))}, nearest of ours {_nearest(theirs, int(i), ours)}"
            )
    return Agreement(found, len(order), tuple(missing))


def _scale(box: NDArray[np.float32], size_hw: tuple[int, int]) -> float:
    """Boxes beyond the input count in proportion: float32 has seven digits."""
    return max(1.0, float(np.abs(box).max()) / max(size_hw))


def _text(found: Found, i: int) -> str:
    box = ", ".join(f"{x:.1f}" for x in found.boxes[i])
    return f"class {found.class_ids[i]} {found.scores[i]:.3f} [{box}]"


def _nearest(theirs: Found, i: int, ours: Found) -> str:
    if not len(ours.scores):
        return "none at all"
    same = ours.class_ids == theirs.class_ids[i]
    gaps = np.abs(ours.boxes - theirs.boxes[i]).max(axis=1) + np.where(same, 0, 1e6)
    return _text(ours, int(gaps.argmin()))


# ---- what both sides find


def our_results(
    converted: Converted, image: NDArray[np.uint8], *, runs: bool
) -> tuple[Heads, Found | None]:
    """The heads of the converted file, and what it finds, of one run.

    None where ONNX Runtime cannot select.

    Args:
        converted: with a model of `for_onnxruntime`.
    """
    model, spec = converted.model, converted.spec
    fetches = [RAW_BOXES, CLASS_LOGITS, *(OUTPUT_NAMES if runs else ())]
    raw, scores, *found = run_onnx(model, fetches, {tidy.INPUT: fed_to(model, spec, image)})
    if spec.selection == "rotated_nms":
        corners = raw[:1, :, :4]
    else:
        boxes = raw[:1].reshape(1, -1, 4)
        corners = reference.decode_boxes(boxes, spec.nms.box_coding, converted.anchors)
    probabilities = scores[0].astype(np.float32)
    if spec.nms.score_activation:
        probabilities = (1 / (1 + np.exp(-probabilities.astype(np.float64)))).astype(np.float32)
    heads = in_pixels(corners[0], spec), probabilities
    if not runs:
        return heads, None
    count, boxes, scores, classes = found
    n = int(count.reshape(-1)[0])
    classes = classes[0, :n].astype(np.int64)
    return heads, Found(in_pixels(boxes[0, :n, :4], spec), scores[0, :n], classes)


def can_run(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime knows all of a model of `for_onnxruntime`: not where it ends in
    another plugin, or in no selection.
    """
    outputs = {o.name for o in model.graph.output}
    return outputs.issuperset(OUTPUT_NAMES) and not custom_ops(model)


def fed_to(
    model: onnx.ModelProto, spec: ModelSpec, image: NDArray[np.uint8]
) -> NDArray[np.generic]:
    """A batch of one picture, as the file takes it."""
    batch = fixed_batch(model) or 1
    images = np.repeat(image[None].astype(spec.preprocessing.dtype), batch, axis=0)
    return in_layout(images, spec.preprocessing.layout)


def in_pixels(boxes: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
    """Corners in the spec's order and units as x1 y1 x2 y2 in pixels of the network input."""
    boxes = yxyx_to_xyxy(boxes) if spec.box_order == "yxyx" else boxes
    height, width = spec.preprocessing.size_hw
    return boxes * np.array([width, height] * 2, np.float32) if spec.boxes_normalized else boxes


def their_detections(
    source: Source,
    reading: Reading,
    final: Final,
    preprocessing: Preprocessing,
    image: NDArray[np.uint8],
) -> Found:
    """What the source finds in a picture that fills its input."""
    n = reading.batch or 1
    fed: NDArray[Any]
    if reading.network_input == reading.image_input:
        fed = prepared(image, reading.network_layout, Normal.of(preprocessing), n)
    else:
        fed = in_layout(np.repeat(image[None], n, axis=0), reading.image_layout)
    others = {**final.feeds, **{k: v for k, v in reading.feeds.items() if k not in final.feeds}}
    feeds = {reading.image_input: fed, **{k: np.repeat(v, n, axis=0) for k, v in others.items()}}
    found = final.read(source.run(list(final.fetches), feeds))
    for name, value in (("boxes", found.boxes), ("scores", found.scores)):
        if not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinity"
            raise GraphError(
                f"{source.path}: the source itself yields {kind} in the {name} of its detections for a photograph; export it from a sound checkpoint"
            )
    keep = found.scores > 0
    return dataclasses.replace(
        found, boxes=found.boxes[keep], scores=found.scores[keep], class_ids=found.class_ids[keep]
    )


def check_plausible(
    source: Source,
    spec: ModelSpec,
    heads: Sequence[Heads],
) -> None:
    """Refuse what can be no detections.

    Raises:
        GraphError: scores outside of 0 to 1 or all equal, boxes without positive sides or far from
            the picture, NaN or infinity.
    """
    boxes = np.concatenate([b for b, _ in heads]).astype(np.float64)
    scores = np.concatenate([s for _, s in heads])
    for name, value in (("boxes", boxes), ("scores", scores)):
        if not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinity"
            raise GraphError(
                f"{source.path}: the source itself yields {kind} in its {name} for a photograph; export it from a sound checkpoint"
            )
    if scores.min() < -1e-5 or scores.max() > 1 + 1e-5:
        raise GraphError(
            f"{source.path}: with this reading the scores are {scores.min():.3g} to {scores.max():.3g} on four photographs, so they are not probabilities; export the model with its "
            "activation, or say it with --score_activation"
        )
    if np.ptp(scores) == 0 and not scores.any():
        logger.warning(
            "no score above 0 on four photographs: nothing was compared but the heads. Are these trained weights?"
        )
        return
    if np.ptp(scores) == 0:
        raise GraphError(
            f"{source.path}: all scores are {scores.flat[0]:.3g} on four photographs; are these trained weights?"
        )
    if spec.selection == "rotated_nms":
        return
    best = np.concatenate(
        [
            np.argsort(-s.max(axis=1), kind="stable")[:BEST] + i * len(s)
            for i, (_, s) in enumerate(heads)
        ]
    )
    best = best[scores[best].max(axis=1) > 0]
    chosen = boxes[best]
    limit = np.array(spec.preprocessing.size_hw[::-1], np.float64)
    ordered = 1.0  # a set prediction may give its queries any size
    if spec.selection == "nms" and len(chosen):
        ordered = (chosen[:, 2:] >= chosen[:, :2]).all(axis=1).mean()
    centre = (chosen[:, :2] + chosen[:, 2:]) / 2
    near = (
        ((centre > -0.5 * limit) & (centre < 1.5 * limit)).all(axis=1).mean()
        if len(chosen)
        else 1.0
    )
    if ordered < LEAST_ORDERED or near < LEAST_NEAR:
        what = "positive sides" if ordered < LEAST_ORDERED else "their centre near the picture"
        raise GraphError(
            f"{source.path}: read so, only {100 * min(ordered, near):.0f} % of the best boxes on four photographs have {what}; is the box format right? "
            "--box_format and --box_units declare another. --no_verify writes the file all the same"
        )
