# SPDX-License-Identifier: Apache-2.0
"""How far two models are apart: their tensors, their detections, their AP, and the limits on these.

The "reference" is what is right, the "candidate" what is judged. Detections carry category ids
here, not class ids: models that count classes differently can be compared, and one that counts them
wrongly is found out.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.detections import Detections
from trtdet.geometry import FloatArray, box_iou
from trtdet.nms.rotated_reference import iou_exact
from trtdet.parity.options import Limits
from trtdet.spec import ModelSpec

SCHEMA_VERSION = 1

#: Share of the matched pairs that a limit on their differences holds for. The rest is where NMS
#: decides otherwise on a hair's breadth.
PERCENTILE = 95

#: Values compared at a time: float64 copies stay in a core's cache, and BLAS starts no threads for
#: them.
BLOCK = 2**13

# ---- tensors


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both models, over all images that were run.

    Attributes:
        head: whether the network ends in it.
        maximum, mean: of the absolute difference.
        cosine: of the angle between both, 1 where they are parallel; NaN where one of them is zero.
        sqnr_db: signal power of the reference to power of the difference, in decibels; infinite
            where they are equal.
        non_finite: values that are infinite or NaN in the candidate alone; they count in none of
            the above.
        shapes: of one image, where the models disagree on it; then nothing else is known.
    """

    name: str
    head: bool = False
    maximum: float = math.nan
    mean: float = math.nan
    cosine: float = math.nan
    sqnr_db: float = math.nan
    non_finite: int = 0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def equal(self) -> bool:
        return self.maximum == 0 and not self.non_finite

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "head": self.head,
            "max": _json_number(self.maximum),
            "mean": _json_number(self.mean),
            "cosine": _json_number(self.cosine),
            "sqnr_db": _json_number(self.sqnr_db),
            "equal": self.equal,
            "non_finite": self.non_finite,
            "shapes": self.shapes,
        }


class TensorStatistics:
    """Sums over images, from which a `TensorDifference` follows. Holds no tensor."""

    def __init__(self, name: str, *, head: bool = False) -> None:
        self.name, self.head = name, head
        self._count = self._non_finite = 0
        self._maximum = self._absolute = 0.0
        self._reference2 = self._candidate2 = self._product = self._difference2 = 0.0
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Count one image in; both arrays floating point, of any shape, which should be the
        same.
        """
        if reference.shape != candidate.shape:
            self._shapes = (reference.shape, candidate.shape)
            return
        left, right = np.ravel(reference), np.ravel(candidate)
        for start in range(0, left.size, BLOCK):
            block = slice(start, start + BLOCK)
            self._add(left[block].astype(np.float64), right[block].astype(np.float64))

    def _add(self, r: NDArray[np.float64], c: NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore"):  # of two infinities
            gap = r - c
            difference2 = float(gap @ gap)
        if not math.isfinite(difference2):
            usable = np.isfinite(r) & np.isfinite(c)
            self._non_finite += int((np.isfinite(r) & ~np.isfinite(c)).sum())
            r, c, gap = r[usable], c[usable], gap[usable]
            difference2 = float(gap @ gap)
        np.abs(gap, out=gap)
        self._count += len(r)
        self._maximum = max(self._maximum, float(gap.max(initial=0.0)))
        self._absolute += float(gap.sum())
        self._reference2 += float(r @ r)
        self._candidate2 += float(c @ c)
        self._product += float(r @ c)
        self._difference2 += difference2

    def result(self) -> TensorDifference:
        if self._shapes or not self._count:
            return TensorDifference(
                self.name, self.head, non_finite=self._non_finite, shapes=self._shapes
            )
        norms = math.sqrt(self._reference2) * math.sqrt(self._candidate2)
        return TensorDifference(
            self.name,
            self.head,
            self._maximum,
            self._absolute / self._count,
            self._cosine(norms),
            _decibels(self._reference2, self._difference2),
            self._non_finite,
        )

    def _cosine(self, norms: float) -> float:
        if self._difference2 == 0:
            return 1.0  # equal, both zero included
        return min(1.0, self._product / norms) if norms else math.nan


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def worst_first(tensors: Iterable[TensorDifference]) -> list[TensorDifference]:
    """By what is wrong with them: other shapes, values that are not finite, then low SQNR."""
    return sorted(
        tensors,
        key=lambda t: (t.shapes is None, -t.non_finite, math.inf if math.isnan(t.sqnr_db) else t.sqnr_db),
    )  # fmt: skip


# ---- detections


@dataclass(frozen=True)
class Matching:
    """Which detections of one image are the same in both models: indices into them.

    Attributes:
        pairs: (n, 2) reference, candidate: same category.
        flips: (n, 2) reference, candidate: another category at the same place.
        missing: of the reference, without a partner.
        extra: of the candidate, without a partner.
    """

    pairs: NDArray[np.intp]
    flips: NDArray[np.intp]
    missing: NDArray[np.intp]
    extra: NDArray[np.intp]


def match(
    reference: Detections, candidate: Detections, *, min_iou: float, score_threshold: float
) -> Matching:
    """Pair the detections of one image.

    A detection needs `score_threshold` to count, its partner of the same category may be below: one
    that sank from 0.31 to 0.29 is a score difference, not a loss. Pairs of great overlap and little
    score difference come first; each detection is in one at most.
    """
    iou = overlap(reference, candidate)
    same = reference.class_ids[:, None] == candidate.class_ids[None]
    high_r, high_c = (x.scores >= score_threshold for x in (reference, candidate))
    gap = np.abs(reference.scores[:, None] - candidate.scores[None])
    fit = iou - gap
    pairs = _greedy(fit, (iou >= min_iou) & same & (high_r[:, None] | high_c[None]))
    free_r, free_c = high_r.copy(), high_c.copy()
    free_r[pairs[:, 0]] = free_c[pairs[:, 1]] = False
    flips = _greedy(fit, (iou >= min_iou) & free_r[:, None] & free_c[None])
    free_r[flips[:, 0]] = free_c[flips[:, 1]] = False
    return Matching(pairs, flips, np.flatnonzero(free_r), np.flatnonzero(free_c))


def overlap(reference: Detections, candidate: Detections) -> FloatArray:
    """(n, m) IoU of every pair, of rotated boxes that of their polygons.

    Boxes cut to (almost) nothing by the edge of the image have no IoU to speak of: of these, the
    ones less than a pixel apart are the same, IoU 1.
    """
    left, right = reference.boxes_xyxy, candidate.boxes_xyxy
    if reference.angles is None and candidate.angles is None:
        iou = box_iou(left, right)
    else:
        rotated = [np.concatenate([d.boxes_xyxy, _angles(d)[:, None]], 1) for d in (reference, candidate)]  # fmt: skip
        rows = [iou_exact(box, rotated[1]) for box in rotated[0]]
        iou = np.array(rows, np.float32).reshape(len(left), len(right))
    thin_left, thin_right = ((x[:, 2:] - x[:, :2]).min(1, initial=np.inf) < 1 for x in (left, right))  # fmt: skip
    gap = np.abs(left[:, None] - right[None]).max(axis=2, initial=0)
    iou[(gap < 1) & (thin_left[:, None] | thin_right[None])] = 1
    return iou


def _angles(detections: Detections) -> FloatArray:
    if detections.angles is None:
        return np.zeros(len(detections), np.float32)
    return detections.angles


def _greedy(fit: FloatArray, allowed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(n, 2) rows and columns, the best fit first, every row and every column once at most."""
    rows, columns = np.nonzero(allowed)
    chosen: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for i in np.argsort(-fit[rows, columns], kind="stable"):
        row, column = int(rows[i]), int(columns[i])
        if row not in used_rows and column not in used_columns:
            chosen.append((row, column))
            used_rows.add(row)
            used_columns.add(column)
    return np.array(chosen, np.intp).reshape(-1, 2)


@dataclass(frozen=True)
class ImageComparison:
    """One image by both models.

    Attributes:
        reference, candidate: source pixels; class_ids are category ids.
        scale_xy: pixels of the network input per source pixel.
    """

    path: Path
    reference: Detections
    candidate: Detections
    matching: Matching
    scale_xy: tuple[float, float]

    @property
    def score_differences(self) -> FloatArray:
        """(n,) candidate minus reference, one per pair."""
        r, c = self.matching.pairs.T
        return self.candidate.scores[c] - self.reference.scores[r]

    @property
    def box_differences(self) -> FloatArray:
        """(n,) largest of the four coordinate differences of each pair, in pixels of the network
        input.
        """
        r, c = self.matching.pairs.T
        gap = np.abs(self.candidate.boxes_xyxy[c] - self.reference.boxes_xyxy[r])
        return (gap * np.array([*self.scale_xy, *self.scale_xy], np.float32)).max(axis=1)

    @property
    def angle_differences(self) -> FloatArray:
        """(n,) candidate minus reference, radians, one per pair; none where boxes are not rotated.

        A box is the same after half a turn, and one whose sides differ by less than a pixel after a
        quarter.
        """
        if self.reference.angles is None and self.candidate.angles is None:
            return np.zeros(0, np.float32)
        r, c = self.matching.pairs.T
        square = np.ones(len(r), bool)
        for boxes in (self.reference.boxes_xyxy[r], self.candidate.boxes_xyxy[c]):
            square &= np.abs((boxes[:, 2] - boxes[:, 0]) - (boxes[:, 3] - boxes[:, 1])) < 1
        period = np.where(square, np.pi / 2, np.pi)
        gap = _angles(self.candidate)[c].astype(np.float64) - _angles(self.reference)[r]
        return (gap - period * np.round(gap / period)).astype(np.float32)

    @property
    def badness(self) -> tuple[int, float]:
        """To sort by, worst largest: detections that have no partner, then the largest
        difference of those that do.
        """
        m = self.matching
        worst = np.abs(self.score_differences).max(initial=0) + self.box_differences.max(initial=0) / 100  # fmt: skip
        return len(m.flips) + len(m.missing) + len(m.extra), float(worst)

    def to_dict(self) -> dict[str, Any]:
        m = self.matching
        return {
            "image": self.path.name,
            "matched": len(m.pairs),
            "missing": len(m.missing),
            "extra": len(m.extra),
            "class_flips": len(m.flips),
            "max_score_diff": float(np.abs(self.score_differences).max(initial=0)),
            "max_box_diff": float(self.box_differences.max(initial=0)),
            "max_angle_diff": float(np.abs(self.angle_differences).max(initial=0)),
        }


@dataclass(frozen=True)
class Spread:
    """Absolute differences over all matched pairs; zeros where there are none."""

    maximum: float
    percentile: float  # the 95th
    mean: float
    bias: float  # the mean with its sign

    @classmethod
    def of(cls, values: FloatArray) -> "Spread":
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        size = np.abs(values)
        return cls(
            float(size.max()), float(np.percentile(size, PERCENTILE)), float(size.mean()), float(values.mean())
        )  # fmt: skip


@dataclass(frozen=True)
class DetectionDifference:
    """All images together. Shares are of the reference's detections.

    Attributes:
        angle: None where boxes are not rotated.
    """

    reference: int
    candidate: int
    matched: int
    missing: int
    extra: int
    class_flips: int
    score: Spread
    box: Spread
    angle: Spread | None

    @classmethod
    def of(cls, images: Sequence[ImageComparison], score_threshold: float) -> "DetectionDifference":
        nothing = [np.zeros(0, np.float32)]
        angles = np.concatenate([i.angle_differences for i in images] or nothing)
        return cls(
            reference=sum(int((i.reference.scores >= score_threshold).sum()) for i in images),
            candidate=sum(int((i.candidate.scores >= score_threshold).sum()) for i in images),
            matched=sum(len(i.matching.pairs) for i in images),
            missing=sum(len(i.matching.missing) for i in images),
            extra=sum(len(i.matching.extra) for i in images),
            class_flips=sum(len(i.matching.flips) for i in images),
            score=Spread.of(np.concatenate([i.score_differences for i in images] or nothing)),
            box=Spread.of(np.concatenate([i.box_differences for i in images] or nothing)),
            angle=Spread.of(angles) if len(angles) else None,
        )

    def share(self, count: int) -> float:
        return count / max(1, self.reference)


@dataclass(frozen=True)
class Check:
    """One limit and what it was held against.

    Attributes:
        name: what was measured.
        metric: its key in the summary.
        option: the command-line option of the limit; empty: it has none.
        at_least: the limit is a lower one.
    """

    name: str
    metric: str
    option: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """For the log: one broken limit."""
        bound = "at least" if self.at_least else "at most"
        option = f" ({self.option})" if self.option else ""
        return f"{self.name}: {self.text(self.value)}, expected {bound} {self.text(self.limit)}{option}"

    def text(self, value: float) -> str:
        """A value or limit of this check, with its unit."""
        if math.isnan(value):
            return "undefined"
        if self.unit == "%":
            return f"{100 * value:.4g} %"
        # A cosine is all in its nines.
        digits = f"{value:.6f}" if self.at_least else f"{value:.4g}"
        return f"{digits}{' ' + self.unit if self.unit else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "option": self.option,
            "value": _json_number(self.value),
            "limit": self.limit,
            "passed": self.passed,
        }


# ---- everything together


@dataclass(frozen=True)
class SideInfo:
    """One of the two models."""

    name: str
    kind: str  # what it is and what ran it: "SavedModel, TensorFlow 2.21"
    spec: ModelSpec
    precision: str = "fp32"  # a name as build_engine.py --precision has it

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "kind": self.kind, "precision": self.precision}


@dataclass(frozen=True)
class Comparison:
    """All that is known about two models.

    Attributes:
        images: in the order they were run.
        tensors: in the order of the candidate's graph; empty where one of the two is an engine.
        tensor_images: images that the tensors were computed on.
        ap: (reference, candidate) COCO metrics, where there are annotations.
        ap_images: images that they are of: those that are annotated.
        skipped: images that could not be read.
    """

    reference: SideInfo
    candidate: SideInfo
    images: tuple[ImageComparison, ...]
    limits: Limits
    score_threshold: float
    min_iou: float
    tensors: tuple[TensorDifference, ...] = ()
    tensor_images: int = 0
    ap: tuple[Mapping[str, float], Mapping[str, float]] | None = None
    ap_images: int = 0
    skipped: tuple[str, ...] = ()
    detections: DetectionDifference = field(init=False)
    checks: tuple[Check, ...] = field(init=False)

    def __post_init__(self) -> None:
        difference = DetectionDifference.of(self.images, self.score_threshold)
        object.__setattr__(self, "detections", difference)
        object.__setattr__(self, "checks", tuple(self._checks()))

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def _checks(self) -> Iterable[Check]:
        d, limits = self.detections, self.limits
        yield Check("missing detections", "missing", "--max_missing", d.share(d.missing), limits.max_missing, unit="%")  # fmt: skip
        yield Check("extra detections", "extra", "--max_extra", d.share(d.extra), limits.max_extra, unit="%")  # fmt: skip
        yield Check("class flips", "class_flips", "--max_flips", d.share(d.class_flips), limits.max_flips, unit="%")  # fmt: skip
        if d.matched:
            yield Check("score difference (95 %)", "score_diff", "--max_score_diff", d.score.percentile, limits.max_score_diff)  # fmt: skip
            yield Check("box difference (95 %)", "box_diff", "--max_box_diff", d.box.percentile, limits.max_box_diff, unit="px")  # fmt: skip
        if d.angle:
            yield Check("angle difference (95 %)", "angle_diff", "--max_angle_diff", d.angle.percentile, limits.max_angle_diff, unit="rad")  # fmt: skip
        for tensor in self.tensors:
            if tensor.head:
                name = f"cosine of {tensor.name}"
                if tensor.shapes:
                    name += f" (shapes {tensor.shapes[0]} and {tensor.shapes[1]})"
                yield Check(name, f"cosine:{tensor.name}", "--min_cosine", tensor.cosine, limits.min_cosine, at_least=True)  # fmt: skip
        if self.tensors:
            bad = [t for t in self.tensors if t.non_finite]
            name = "tensors with infinity or NaN" + (f" (first: {bad[0].name})" if bad else "")
            yield Check(name, "non_finite", "", len(bad), 0)
        if self.ap:
            reference, candidate = (metrics["AP"] for metrics in self.ap)
            yield Check("drop of AP", "ap_drop", "--max_ap_drop", reference - candidate, limits.max_ap_drop)  # fmt: skip

    def worst_images(self, count: int) -> list[ImageComparison]:
        """The images that differ most, worst first."""
        return sorted(self.images, key=lambda image: image.badness, reverse=True)[:count]

    def to_dict(self) -> dict[str, Any]:
        """The summary, JSON-ready."""
        d = self.detections
        return {
            "schema": SCHEMA_VERSION,
            "passed": self.passed,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "images": len(self.images),
            "skipped": list(self.skipped),
            "score_threshold": self.score_threshold,
            "min_iou": self.min_iou,
            "limits": [check.to_dict() for check in self.checks],
            "detections": dataclasses.asdict(d),
            "ap": _ap_dict(self.ap, self.ap_images),
            "spec_differences": [list(row) for row in spec_differences(self.reference.spec, self.candidate.spec)],
            "tensor_images": self.tensor_images,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "worst_images": [image.to_dict() for image in self.worst_images(len(self.images))],
        }  # fmt: skip


def _ap_dict(
    ap: tuple[Mapping[str, float], Mapping[str, float]] | None, images: int
) -> dict[str, Any] | None:
    if ap is None:
        return None
    reference, candidate = ap
    return {
        "images": images,
        "reference": dict(reference),
        "candidate": dict(candidate),
        "difference": {name: candidate[name] - reference[name] for name in reference},
    }


#: Fields of a `ModelSpec` that may differ without a consequence for what is detected.
_NEUTRAL = (
    "choices.",
    "source",
    "evidence",
    "preprocessing.layout",
    "preprocessing.dtype",
    "sensitive_nodes",
    "labels",
)


def spec_differences(reference: ModelSpec, candidate: ModelSpec) -> list[tuple[str, str, str]]:
    """(field, reference's value, candidate's) of what both say they are: a hint at why they
    differ.
    """
    left, right = (_flat(spec.to_dict()) for spec in (reference, candidate))
    return [
        (name, _short(left.get(name)), _short(right.get(name)))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(_NEUTRAL)
    ]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _json_number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
