# SPDX-License-Identifier: Apache-2.0
"""All that is known about two models together: their tensors, their detections, their AP, and the
limits on these.

The "reference" is what is right, the "candidate" what is judged.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtdet.parity.detections import DetectionDifference, ImageComparison
from trtdet.parity.options import Limits
from trtdet.parity.tensors import TensorDifference, json_number
from trtdet.spec import ModelSpec

SCHEMA_VERSION = 1


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
            "value": json_number(self.value),
            "limit": self.limit,
            "passed": self.passed,
        }


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
