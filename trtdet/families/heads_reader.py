# SPDX-License-Identifier: Apache-2.0
"""What boxes, scores and labels of a foreign export are: measured on photographs, and held
against what was declared.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.box_formats import (
    distance_from_cells,
    formats_that_fit,
    maybe_levels,
    measure_format,
    measure_units,
)
from trtdet.families.heads_finder import Finder
from trtdet.families.heads_plan import Plan
from trtdet.families.outputs import attribute, is_sorted, selected_from, unexplained
from trtdet.labels import COCO_80_LABELS, fit_labels
from trtdet.spec import (
    BoxFormat,
)

logger = logging.getLogger(__name__)

#: What the table of facts says of each.
ACTIVATIONS = {
    "none": "probabilities",
    "clip": "cut to 0..1",
    "sigmoid": "sigmoid of logits",
    "softmax": "softmax of logits",
}


#: Attributes of a declaration whose option has another name.
OPTIONS = {"activation": "score_activation"}
#: Strides from its cell at which no box is trained to lie, in the median.
FAR = 4.0
#: Detections that may have one score by chance.
FEW = 3


class Reader(Finder):
    """Completes a `Plan`: format and units of boxes, activation, background, selection, classes."""

    def plan(self) -> Plan:
        """The plan, every fact of it noted.

        Raises:
            GraphError: the outputs have none of the forms, or contradict what was declared.
        """
        d = self.declared
        if d.rows:
            plan = self._of_rows(d.rows)
        elif d.boxes:
            plan = self._of_pair(d.boxes, d.scores, d.labels)
        elif self.rows is not None and not self.rows.columns:
            plan = self._of_pair(self.rows.boxes, self.rows.scores, self.rows.labels)
        else:
            plan = self._by_shapes()
        left = unexplained(self.source, list(plan.tensors.values()), self.seen)
        if left and not (d.rows or d.boxes):
            raise self.nothing_fits(
                f"it explains {', '.join(plan.tensors.values())}, but not {', '.join(left)}"
            )
        self._check_labels(plan, left)
        if self.rows is not None:
            plan = dataclasses.replace(plan, is_padded=True)
            if not any(s.any() for s in self.score_values(plan)):
                raise GraphError(
                    f"{self.source.path}: it finds nothing at all on four photographs, so nothing can be measured; export a trained model"
                )
        else:
            self._check_count(plan)
        plan = self._scores(self._selected(self._boxes(plan)))
        return self._classes(self._objectness(plan))

    def _check_labels(self, plan: Plan, left: Sequence[str]) -> None:
        """Refuse boxes of one score each beside an output that has their labels."""
        if plan.num_scores != 1 or plan.labels or plan.label_column is not None:
            return
        for name in left:
            values = [np.asarray(v, np.float64) for v in self.seen[name]]
            whole = all(v.size == plan.count and (v == np.rint(v)).all() for v in values)
            if whole and max((v.max() for v in values if v.size), default=0) > 0:
                raise GraphError(
                    f"{self.source.path}: output '{name}' has a whole number for each box, as labels are: add --labels_output {name}"
                )

    def _check_count(self, plan: Plan) -> None:
        """Refuse rows whose number follows the picture, as an NMS inside that does not fill up
        leaves them: seen on the photographs and on a black picture.
        """
        tensors = list(plan.tensors.values())
        if not self.nodes.ops(tensors) & {"NonMaxSuppression", "NonZero"}:
            return
        for name, black in zip(tensors, self._sizes(tensors), strict=True):
            shapes = dict.fromkeys([*(v.shape for v in self.seen[name]), black])
            if len(shapes) > 1:
                found = " and ".join(str(list(s)) for s in shapes)
                raise self.nothing_fits(
                    f"the number of rows of '{name}' differs from picture to picture, {found}, and nothing says what they are"
                )

    # ---- what they are

    def rows_of(self, plan: Plan) -> list[NDArray[np.float64]]:
        return [
            np.asarray(v[0].T if plan.transposed else v[0], np.float64)
            for v in self.seen[plan.rows]
        ]

    def _boxes(self, plan: Plan) -> Plan:
        if plan.rows:
            boxes = [r[:, plan.first_box : plan.first_box + 4] for r in self.rows_of(plan)]
        else:
            boxes = [np.asarray(v, np.float64).reshape(-1, 4) for v in self.seen[plan.boxes]]
        live = self._live_rows(plan)
        d = self.declared
        units = (
            measure_units([b[m] for b, m in zip(boxes, live, strict=True)])
            if any(m.any() for m in live)
            else None
        )
        if d.box_units and units and units != d.box_units:
            raise GraphError(
                f"{self.source.path}: --box_units {d.box_units}: the boxes are in {units}, up to {max(np.abs(b).max() for b in boxes):.4g}"
            )
        axes = [measure_units([b[m][:, axis::2] for b, m in zip(boxes, live, strict=True)]) for axis in (0, 1)] if units else []  # fmt: skip
        if {*axes} == {"unit", "pixels"}:
            raise GraphError(
                f"{self.source.path}: expected boxes in pixels or in 0 to 1, found the first and third number in {axes[0]}, the second and fourth in {axes[1]}"
            )
        how_units = self._origin("box_units", f"{ev.MEASURED}the largest coordinates")
        if not (d.box_units or units):
            self.evidence.ask(ev.BOXES, "--box_units pixels|unit", "pixels")
        units = d.box_units or units or "pixels"
        is_unit = units == "unit"
        seen = boxes
        if not all(m.all() for m in live):
            seen = [b[m] for b, m in zip(boxes, live, strict=True) if m.any()]
        measured, how = (
            measure_format(seen, self.size_hw, is_unit=is_unit)
            if seen
            else (None, "no detections on the photographs")
        )
        if measured is None and (where := self._cells_before_selection(plan)):
            measured, how = measure_format(self._all_boxes(where), self.size_hw, is_unit=is_unit)
        if d.box_format and measured and measured != d.box_format:
            raise GraphError(
                f"{self.source.path}: {self._said('box_format')}: the boxes are {measured}: {how}; "
                + (
                    "leave it out, or declare the other"
                    if self._option("box_format")
                    else f"give --box_format {measured} where that is right"
                )
            )
        if d.box_format and not measured and seen:
            self._warn_of_far(seen, d.box_format, is_unit=is_unit)
        fitting = formats_that_fit(seen, self.size_hw, is_unit=is_unit) if seen else []
        if d.box_format and fitting and not measured and d.box_format not in fitting:
            raise GraphError(
                f"{self.source.path}: {self._said('box_format')}: such boxes do not lie within the pictures, those of {' and '.join(fitting)} do; "
                "declare --box_format as one of these"
            )
        if not d.box_format and measured is None:
            self.evidence.ask(ev.BOXES, "--box_format xyxy|yxyx|xywh|cxcywh", "xyxy")
        found: BoxFormat = d.box_format or measured or "xyxy"
        self.evidence.add(
            ev.BOXES,
            f"{found}, {'pixels' if units == 'pixels' else '0 to 1'}",
            self._origin("box_format", ev.MEASURED + how)
            if d.box_format or measured
            else how_units,
        )
        return dataclasses.replace(plan, box_format=found, is_unit=is_unit)

    def _warn_of_far(
        self, boxes: Sequence[NDArray[np.float64]], declared: BoxFormat, *, is_unit: bool
    ) -> None:
        """Say where boxes of a grid lie far from their cells, whatever their format is."""
        far = distance_from_cells(boxes, self.size_hw, declared, is_unit=is_unit)
        if far is not None and far > FAR:
            logger.warning(
                "%s: its boxes, read as %s, lie %.1f strides from the cells of the grid, as no trained network's do: does the export convert boxes twice, or "
                "the wrong way? Compare with what the framework itself finds",
                self.source.path, declared, far,
            )  # fmt: skip

    def _cells_before_selection(self, plan: Plan) -> str:
        """The boxes [N, A, 4] of every cell, of which the boxes are some; "": there are none."""
        for name in selected_from(self.source.model, [plan.rows or plan.boxes]):
            shape = self.seen[name][0].shape if name in self.seen else ()
            if len(shape) == 3 and shape[2] == 4 and maybe_levels(shape[1], self.size_hw):
                return name
        return ""

    def _all_boxes(self, name: str) -> list[NDArray[np.float64]]:
        return [np.asarray(v[0], np.float64) for v in self.seen[name]]

    def _live_rows(self, plan: Plan) -> list[NDArray[np.bool_]]:
        """Rows that are no padding behind the detections: of exports that fill up with zeros or
        -1.
        """
        rows = plan.count
        if plan.rows and plan.num_scores == 1:
            return [
                r[:, plan.first_score] > 0
                if (r[:, plan.first_score] > 0).any()
                else np.ones(rows, bool)
                for r in self.rows_of(plan)
            ]
        if plan.labels:
            return [
                v.reshape(-1) > 0 if (v > 0).any() else np.ones(rows, bool)
                for v in self.seen[plan.scores]
            ]
        return [np.ones(rows, bool) for _ in self.seen[plan.boxes]]

    def _option(self, attribute_name: str) -> str:
        """The option that says it; "": none does."""
        d = self.hints.declared
        if d and getattr(d, attribute_name) is not None:
            return f"--{OPTIONS.get(attribute_name, attribute_name)}"
        return "--columns" if d and d.columns and attribute_name == "box_format" else ""

    def _origin(self, attribute_name: str, measured: str) -> str:
        if option := self._option(attribute_name):
            return ev.GIVEN + option
        if getattr(self.declared, attribute_name) is not None:
            return self.known.origin
        return measured

    def _said(self, attribute_name: str) -> str:
        value, option = getattr(self.declared, attribute_name), self._option(attribute_name)
        if option:
            return f"{option}{' says' if option == '--columns' else ''} {value}"
        return f"{self.known.name} has {value}"

    def score_values(self, plan: Plan) -> list[NDArray[np.float64]]:
        """(a, c) for each photograph, as they are."""
        if plan.rows:
            return [
                r[:, plan.first_score : plan.first_score + plan.num_scores]
                for r in self.rows_of(plan)
            ]
        values = [np.asarray(v, np.float64) for v in self.seen[plan.scores]]
        if plan.nca:
            return [v[0].T for v in values]
        return [v.reshape(plan.count, -1) for v in values]

    def _selected(self, plan: Plan) -> Plan:
        d, best = self.declared, [s.max(axis=1) for s in self.score_values(plan)]
        if d.selected is not None:
            selected, origin = d.selected, self._origin("selected", "")
        elif self.rows is not None and self.rows.is_selected:
            selected, origin = True, f"{ev.READ}its NonMaxSuppression"
        elif maybe_levels(plan.count, self.size_hw):
            selected, origin = (
                False,
                f"{ev.MEASURED}a row for each of {plan.count} cells of a grid, nothing selected",
            )
        elif self.rows is None and is_sorted(best):
            selected, origin = (
                True,
                f"{ev.MEASURED}the rows are sorted by score, so the model selects them",
            )
        else:
            self.evidence.ask(
                ev.SELECTION, "--selected (detections that need no NMS), or --selected no", "NMS"
            )
            return plan
        nms = "NMS " + ("over all classes" if self.known.agnostic else "per class")
        nms += ", boxes clipped to the picture" if self.known.clipped else ""
        placed = (self.known.resize, self.known.rounding)
        if self.known.clipped and self.known.cut_off and placed == ("letterbox", "floor64"):
            nms += ", to half a pixel of the input"
        self.evidence.add(ev.SELECTION, "the model's own" if selected else nms, origin)
        return dataclasses.replace(plan, selected=selected)

    def _scores(self, plan: Plan) -> Plan:
        d, values = self.declared, self.score_values(plan)
        low, high = min(v.min() for v in values), max(v.max() for v in values)
        probabilities = low >= -1e-6 and high <= 1 + 1e-6
        padded = plan.selected and self.rows is None and low >= -1 and high <= 1 + 1e-6
        sums = np.concatenate([v.sum(axis=1) for v in values])
        is_softmax = probabilities and plan.num_scores > 1 and bool(np.abs(sums - 1).max() < 1e-3)
        if d.activation == "clip" and not (low >= -1 and high <= 2):
            raise GraphError(
                f"{self.source.path}: {self._said('activation')}: the scores in '{plan.scores}' are {low:.3g} to {high:.3g}, no probabilities that "
                "go a little beyond 0..1"
            )
        if d.activation == "none" and not (probabilities or padded or self.known.linear):
            raise GraphError(
                f"{self.source.path}: {self._said('activation')}: the scores in '{plan.scores}' are {low:.3g} to {high:.3g}, no probabilities; "
                "clip cuts them to 0..1"
            )
        if (
            d.activation in ("sigmoid", "softmax")
            and probabilities
            and self._makes_scores(plan.scores)
        ):
            raise GraphError(
                f"{self.source.path}: {self._said('activation')}: the scores in '{plan.scores}' have their activation already; leave it out"
            )
        if d.activation:
            activation, origin = d.activation, self._origin("activation", "")
        elif probabilities or padded:
            activation, origin = "none", f"{ev.MEASURED}probabilities, {low:.3g} to {high:.3g}"
        else:
            self.evidence.ask(ev.SCORES, "--score_activation sigmoid|softmax|clip", "sigmoid")
            activation, origin = "sigmoid", ""
        every = np.concatenate([v.ravel() for v in values])
        positive = every[every > 0] if self.rows is not None else every  # without our padding
        alone = plan.objectness is None
        if alone and probabilities and len(positive) > FEW and float(np.ptp(positive)) == 0:
            raise GraphError(
                f"{self.source.path}: all scores in '{plan.scores}' are {positive[0]:.3g} on four photographs; export a trained model"
            )
        if self.rows is not None and activation not in ("none", "clip"):
            raise GraphError(
                f"{self.source.path}: expected probabilities in '{plan.scores}', as an NMS inside selects by them, found {low:.3g} to {high:.3g}; "
                "export the model with its activation, or --score_activation clip where they go a little beyond 0..1"
            )
        if origin:
            former = next((f.value + ": " for f in self.evidence.facts if f.name == ev.SCORES), "")
            self.evidence.add(
                ev.SCORES,
                former + ACTIVATIONS[activation],
                origin,
            )
        if d.background:
            background, origin = d.background, self._origin("background", "")
        elif is_softmax or activation == "softmax":
            self.evidence.ask(ev.BACKGROUND, "--background first|last|none", "last")
            return dataclasses.replace(plan, activation=activation)
        else:
            background, origin = (
                "none",
                f"{ev.MEASURED}scores of a box do not add up to 1"
                if plan.num_scores > 1
                else "read: one score a box",
            )
        self.evidence.add(ev.BACKGROUND, background, origin)
        return dataclasses.replace(plan, activation=activation, background=background)

    def _objectness(self, plan: Plan) -> Plan:
        """Whether the objectness is a logit, beside scores that are logits too."""
        if plan.objectness is None or plan.activation == "clip" or self.known.linear:
            return plan
        values = np.concatenate([r[:, plan.objectness] for r in self.rows_of(plan)])
        low, high = values.min(), values.max()
        if low >= -1e-6 and high <= 1 + 1e-6:
            return plan
        if plan.activation == "none":
            raise GraphError(
                f"{self.source.path}: expected an objectness of 0 to 1 beside probabilities in '{plan.rows}', found {low:.3g} to {high:.3g}; export "
                "the model with its sigmoid"
            )
        return dataclasses.replace(plan, objectness_is_logit=True)

    def _classes(self, plan: Plan) -> Plan:
        if plan.labels or plan.label_column is not None:
            return self._of_labels(plan)
        count = plan.num_scores - (plan.background != "none")
        names = self.known.labels or fit_labels(self.hints.labels, count)
        if names and len(names) != count and not self.evidence.missing:
            raise GraphError(
                f"{self.source.path}: expected a score for each of the {len(names)} class names, '{plan.scores}' has {count}; does it have "
                "a background class? --background says it, --columns what its columns are"
            )
        self.evidence.add(
            ev.CLASSES,
            count,
            "read: the number of scores" + (" and the class names" if names else ""),
        )
        return dataclasses.replace(plan, num_classes=count)

    def _of_labels(self, plan: Plan) -> Plan:
        """The number of classes of a model that gives class ids: its class names, or what its
        ArgMax chooses from.
        """
        if plan.labels:
            found = [v.reshape(-1) for v in self.seen[plan.labels]]
            tensor = plan.labels
        else:
            found = [r[:, plan.label_column or 0] for r in self.rows_of(plan)]
            tensor = plan.rows
        live = [v[m] for v, m in zip(found, self._live_rows(plan), strict=True)]
        largest = int(max((v.max() for v in found if v.size), default=0))
        smallest = int(min((v.min() for v in live if v.size), default=0))
        base = self.declared.label_base
        chosen = self._argmax_width(tensor)
        coco = len(COCO_80_LABELS)  # with or without a class for the background
        given = fit_labels(self.hints.labels, coco if chosen in (coco, coco + 1) else 0)
        names = len(self.known.labels) or len(given) or self.hints.num_classes or 0
        if base is None and self.rows is not None and chosen and names == chosen - 1:
            base = 1  # the model counts its background as class 0
        if names:
            count, origin = (
                names,
                "read: the class names"
                if self.known.labels
                else f"{ev.GIVEN}{'--labels' if self.hints.labels else '--num_classes'}",
            )
        elif chosen:
            count, origin = chosen, f"read: its labels are chosen from {chosen} classes"
        else:
            self.evidence.ask(ev.CLASSES, "--labels FILE or --num_classes N", largest + 1)
            count, origin = largest + 1, ""
        if chosen and names > chosen and not self.known.labels:
            origin += f"; its labels seem to be chosen from {chosen}"
        if base is None and largest >= count and names:
            raise GraphError(
                f"{self.source.path}: expected labels of 0 to {count - 1}, found {largest} in '{tensor}'; --label_base 1 where the first class is 1"
            )
        if largest - (base or 0) >= count:
            raise GraphError(
                f"{self.source.path}: expected labels of {base or 0} to {count + (base or 0) - 1}, found {largest} in '{tensor}'; --label_base says "
                "the first, --num_classes or --labels how many"
            )
        if self.declared.label_base and smallest < self.declared.label_base:
            raise GraphError(
                f"{self.source.path}: --label_base {base}: there is a detection of class {smallest} in '{tensor}'; leave it out where the first class is 0"
            )
        if base is None and not chosen and not names:
            base = 0
        if origin:
            self.evidence.add(ev.CLASSES, count, origin + (f", labels from {base}" if base else ""))
        return dataclasses.replace(plan, num_classes=count, label_base=base or 0)

    def _argmax_width(self, tensor: str) -> int | None:
        """How many classes the labels are chosen from: the width of the ArgMax or of the NMS, the
        divisor of the TopK over all pairs, and in torchvision's detectors that of the softmax.
        """
        for node in self.nodes.above([tensor]):
            is_torchvision = self.rows is not None and self.rows.is_torchvision
            if is_torchvision and node.op_type == "Softmax":
                shape = self._sizes([node.input[0]])[0]
                return int(shape[attribute(node, "axis", -1)])
            if node.op_type == "NonMaxSuppression" and not is_torchvision:
                width = int(self._sizes([node.input[1]])[0][1])
                if width > 1:
                    return width
            if node.op_type == "ArgMax":
                shape = self._sizes([node.input[0]])[0]
                return int(shape[attribute(node, "axis", 0)])
            if node.op_type == "Mod":
                divisor = self.nodes.value(node.input[1])
                if divisor is None and self.rows is not None:  # follows from a shape
                    divisor = self._value(node.input[1])
                if divisor is not None and divisor.size == 1:
                    return int(divisor.reshape(-1)[0])
        return None
