# SPDX-License-Identifier: Apache-2.0
"""Any detector in an ONNX file, by its outputs alone: declared on the command line, or told by shapes, values and the graph.

| outputs | as exported by |
|---|---|
| boxes [N, A, 4], scores [N, A, C] or [N, C, A] | YOLO-NAS, PP-YOLOE, PicoDet, DAMO-YOLO, RTMDet |
| boxes [N, K, 4], scores [N, K], labels [N, K] | exports that select by themselves |
| dets [N, K, 5], labels [N, K] | MMDeploy |
| one of rows: x1 y1 x2 y2 score label; box and scores; box, objectness and scores | DeepStream's users, PicoDet, RTMDet, YOLO without metadata |

What a box is, whether scores are probabilities, whether rows are selected already, is measured on photographs; what was declared is
checked against it. How images come in is not in such a file: it is asked for, unless a recognised framework's convention is handed in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import NO_HINTS, Declaration, Heads, Hints, Reading, best_class_only
from trtdet.families.evidence import Evidence
from trtdet.families.outputs import (
    Nodes,
    attribute,
    batch_of,
    column_pieces,
    is_sorted,
    is_whole,
    look,
    maybe_levels,
    measure_format,
    measure_units,
    unexplained,
)
from trtdet.families.pixels import (
    Convention,
    Normal,
    Pixels,
    decide_normalisation,
    find_pixels,
    maybe_image,
)
from trtdet.graph.builder import Builder
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS, fit_labels
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import (
    COLUMN_NAMES,
    BoxFormat,
    ModelSpec,
    Nms,
    Placement,
    Preprocessing,
    ResizeMode,
)

NAME = "heads"
#: Tried only where no family that knows its network matches.
IS_GENERAL = True

SCORE_THRESHOLD, IOU_THRESHOLD, MAX_DETECTIONS = 0.001, 0.6, 300
RESIZE_OPTION = (
    "--resize_mode stretch, or letterbox with --placement top_left|center and --pad_color R,G,B"
)
BOXES, SCORES, LABELS, ROWS = "foreign_boxes", "foreign_scores", "foreign_labels", "foreign_rows"


@dataclass(frozen=True)
class Framework:
    """What is known of a recognised framework's exports beside the file: the origin of a fact is its name.

    Attributes:
        normal, resize, placement, pad_rgb, rounding, antialias: how it prepares images.
        declared: what it says of its outputs.
        labels: class names. kept: how many detections it keeps. iou_threshold: of its NMS.
        size_hw: of an input of any size.
        longest: where the longer side of a picture ends, in an input that is larger; None: at the input's.
        columns: of the only output. selected: it needs no NMS. best_class: a box counts for its best class alone.
    """

    name: str
    normal: Normal | None = None
    resize: ResizeMode | None = None
    placement: Placement = "top_left"
    pad_rgb: tuple[float, float, float] = (114.0, 114.0, 114.0)
    rounding: Any = "round"
    antialias: bool = False
    declared: Declaration = field(default_factory=Declaration)
    labels: tuple[str, ...] = ()
    kept: int | None = None
    iou_threshold: float | None = None
    size_hw: tuple[int, int] | None = None
    longest: int | None = None
    columns: tuple[str, ...] = ()
    selected: bool | None = None
    best_class: bool = False

    def with_changes(self, **changes: Any) -> "Framework":
        return dataclasses.replace(self, **changes)

    def declaration(self, outputs: Sequence[str]) -> Declaration:
        """What it says of the outputs of one file."""
        rows = outputs[0] if self.columns and len(outputs) == 1 else ""
        return dataclasses.replace(
            self.declared, rows=rows, columns=self.columns if rows else (), selected=self.selected
        )


@dataclass(frozen=True)
class Plan:
    """The outputs of one file, none of it open.

    Attributes:
        boxes, scores, labels: tensors; the first two may be one, of rows, with `box_columns` and so on.
        box_columns: the columns of four numbers in `boxes`; objectness, score_columns, label_column: in `rows`.
        transposed: rows [N, M, A].
    """

    boxes: str
    scores: str
    labels: str = ""
    rows: str = ""
    first_box: int = 0
    objectness: int | None = None
    first_score: int = 0
    num_scores: int = 0
    label_column: int | None = None
    transposed: bool = False
    nca: bool = False
    box_format: BoxFormat = "xyxy"
    is_unit: bool = False
    activation: str = "none"
    background: str = "none"
    label_base: int = 0
    selected: bool = False
    num_classes: int = 0
    count: int = 0

    @property
    def tensors(self) -> dict[str, str]:
        """Name in the converted file -> tensor of the source."""
        names = {ROWS: self.rows} if self.rows else {BOXES: self.boxes, SCORES: self.scores}
        return names | ({LABELS: self.labels} if self.labels else {})


def matches(source: Source) -> bool:
    """Whether some outputs have the shapes of one of the forms; unknown dimensions may be anything."""
    if not isinstance(source, OnnxSource) or source.spec or maybe_image(source) is None:
        return False
    if len(source.graph.inputs) != 1:
        return False
    shapes = [s for s in _declared_shapes(source).values()]
    return any(len(s) == 3 or not s for s in shapes)


def why_not(source: Source) -> str:
    """What the outputs are, and the options to declare them with."""
    if not isinstance(source, OnnxSource) or source.spec:
        return ""
    if maybe_image(source) is None or len(source.graph.inputs) != 1:
        return "it takes one image input alone, [N, 3, H, W] or [N, H, W, 3]; " + describe_outputs(
            source
        )
    return "it takes boxes and scores [N, A, ...]; " + describe_outputs(source)


def read(source: Source, hints: Hints = NO_HINTS, framework: Framework | None = None) -> Reading:
    """See `trtdet.families.base.Family.read`.

    Args:
        framework: whose export this is, where the file says it.
    """
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected an ONNX file, found a SavedModel; export it to ONNX"
        )
    known = framework or Framework("")
    evidence = Evidence(str(source.path), hints.assume)
    origin = f"read: metadata of {known.name}" if framework else "the shapes of its outputs"
    evidence.add(ev.FAMILY, known.name or NAME, origin if framework else ev.MEASURED + origin)
    pixels = find_pixels(source, hints, usual_size=known.size_hw)
    if pixels.others:
        raise GraphError(
            f"{source.path}: expected images as the only input, found {', '.join(pixels.others)} too; export the model without"
        )
    size_hw = pixels.size_hw or (0, 0)
    _note_input(evidence, pixels, size_hw)
    convention = Convention(known.name, known.normal) if known.normal else None
    normal = decide_normalisation(evidence, pixels, hints, convention)
    preprocessing = _preprocessing(evidence, hints, known, normal, size_hw)
    outputs = [info.name for info in source.model.graph.output]
    declared = _merged(hints.declared, known.declaration(outputs))
    wanted = [*outputs, *_named(declared, outputs)]
    seen = look(source, pixels, normal, wanted, {}, size_hw)
    plan = Reader(source, seen, size_hw, declared, evidence, hints, known).plan()
    spec = _spec(plan, preprocessing, hints, known, evidence)
    batch, said = batch_of(source, pixels, list(plan.tensors.values()), size_hw)
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    levels = maybe_levels(plan.count, size_hw)
    return Reading(
        spec=spec,
        image_input=pixels.tensor,
        network_input=pixels.tensor,
        network_layout=pixels.layout,
        image_layout=pixels.layout,
        heads=plan.tensors,
        assemble=partial(assemble, plan=plan, best_class=known.best_class),
        batch=batch,
        rewrite=partial(_declare, shapes={k: seen[v][0].shape for k, v in plan.tensors.items()}),
        facts=evidence.settle(),
        size_multiple=levels.strides[-1] if levels and not _has_size(source) else None,
    )


def _has_size(source: OnnxSource) -> bool:
    dims = [d for d in source.graph.image_shape[1:] if d != 3]
    return all(d and d > 0 for d in dims)


def _note_input(evidence: Evidence, pixels: Pixels, size_hw: tuple[int, int]) -> None:
    evidence.add(
        ev.INPUT,
        f"'{pixels.image}' {pixels.image_layout} {size_hw[0]}x{size_hw[1]}",
        "read: its shape",
    )


def _declared_shapes(source: OnnxSource) -> dict[str, tuple[int, ...]]:
    return {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in source.model.graph.output
    }


def _merged(given: Declaration | None, known: Declaration) -> Declaration:
    """What was declared, and what a framework says where nothing was."""
    if given is None:
        return known
    said = {k: v for k, v in vars(given).items() if v not in (None, "", ())}
    merged: Declaration = dataclasses.replace(known, **said)
    return merged


def _named(declared: Declaration, outputs: Sequence[str]) -> list[str]:
    """Declared tensors that are no outputs."""
    names = (declared.boxes, declared.scores, declared.labels, declared.rows)
    return [name for name in dict.fromkeys(names) if name and name not in outputs]


def _preprocessing(
    evidence: Evidence, hints: Hints, known: Framework, normal: Normal, size_hw: tuple[int, int]
) -> Preprocessing:
    resize, placement, pad = hints.resize, hints.placement, hints.pad_rgb
    if resize is None and (placement or pad):
        resize = "letterbox"
    origin = f"{ev.GIVEN}--resize_mode {resize}"
    if resize is None and known.resize:
        resize, origin = known.resize, ev.CONVENTION + known.name
    if resize is None:
        evidence.ask(ev.RESIZE, RESIZE_OPTION, "stretch")
        resize = "stretch"
    elif resize == "letterbox":
        placement = placement or (known.placement if known.resize else None)
        pad = pad or (known.pad_rgb if known.resize else None)
        if placement is None or pad is None:
            options = [
                o
                for o, v in (("--placement top_left|center", placement), ("--pad_color R,G,B", pad))
                if v is None
            ]
            evidence.ask(ev.RESIZE, " ".join(options), "letterbox, centred on 114")
        else:
            colour = ",".join(f"{x:g}" for x in pad)
            evidence.add(ev.RESIZE, f"letterbox, {placement.replace('_', ' ')} on {colour}", origin)
        placement, pad = placement or "center", pad or (114.0, 114.0, 114.0)
    if resize == "stretch" and not evidence.missing:
        evidence.add(ev.RESIZE, "stretch", origin) if ev.RESIZE not in {
            f.name for f in evidence.facts
        } else None
    return Preprocessing(
        size_hw,
        dtype="uint8",
        mean=normal.mean,
        std=normal.std,
        bgr=normal.bgr,
        resize=resize,
        placement=placement or "top_left",
        pad_rgb=pad or (0.0, 0.0, 0.0),
        rounding=known.rounding,
        antialias=known.antialias,
        longest=known.longest if known.longest and known.longest < min(size_hw) else None,
    )


def _spec(
    plan: Plan, preprocessing: Preprocessing, hints: Hints, known: Framework, evidence: Evidence
) -> ModelSpec:
    labels = known.labels if len(known.labels) == plan.num_classes else ()
    given = fit_labels(hints.labels, plan.num_classes)
    labels = labels or (given if len(given) == plan.num_classes else ())
    coco = labels == COCO_80_LABELS or (not labels and plan.num_classes == len(COCO_80_IDS))
    if coco:
        ids, origin = COCO_80_IDS, "convention: COCO's ids of its 80 classes"
    else:
        ids, origin = tuple(range(1, plan.num_classes + 1)), "convention: class index + 1"
    evidence.add(ev.CATEGORY_IDS, f"{ids[0]}..{ids[-1]}" if ids else "none", origin)
    one_class_each = plan.labels != "" or plan.label_column is not None
    kept = known.kept or (plan.count if plan.selected else MAX_DETECTIONS)
    kept = min(
        kept,
        plan.count
        if one_class_each or plan.num_classes == 1
        else plan.count * max(plan.num_classes, 1),
    )
    if not plan.selected:
        kept = known.kept or MAX_DETECTIONS
    how = (
        f"{ev.CONVENTION}{known.name}"
        if known.kept
        else "read: all of its rows"
        if plan.selected and kept == plan.count
        else "default: --max_detections"
    )
    evidence.add(ev.KEPT, kept, how)
    return ModelSpec(
        family=NAME,
        preprocessing=preprocessing,
        nms=Nms(
            score_threshold=SCORE_THRESHOLD if not plan.selected else 0.0,
            iou_threshold=1.0 if plan.selected else known.iou_threshold or IOU_THRESHOLD,
            max_output_boxes=kept,
            score_activation=plan.activation == "sigmoid",
            class_agnostic=plan.selected and one_class_each,
            box_coding=1 if plan.box_format == "cxcywh" else 0,
        ),
        category_ids=ids,
        labels=labels or (COCO_80_LABELS if coco and known.name else ()),
        box_order="yxyx" if plan.box_format == "yxyx" else "xyxy",
        boxes_normalized=plan.is_unit,
        selection="topk" if plan.selected else "nms",
        anchored=False,
    )


class Reader:
    """Finds a `Plan` for the outputs of one file: declared, else by their shapes, values and nodes."""

    def __init__(
        self,
        source: OnnxSource,
        seen: Mapping[str, list[NDArray[Any]]],
        size_hw: tuple[int, int],
        declared: Declaration,
        evidence: Evidence,
        hints: Hints,
        known: Framework,
    ) -> None:
        self.source, self.seen, self.size_hw = source, seen, size_hw
        self.declared, self.evidence, self.hints, self.known = declared, evidence, hints, known
        self.nodes = Nodes(source.model)
        self.outputs = [info.name for info in source.model.graph.output]
        self._shapes: dict[str, tuple[int, ...]] = {}

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
        else:
            plan = self._by_shapes()
        left = unexplained(self.source, list(plan.tensors.values()), self.seen)
        if left and not (d.rows or d.boxes):
            raise self.nothing_fits(
                f"it explains {', '.join(plan.tensors.values())}, but not {', '.join(left)}"
            )
        return self._classes(self._scores(self._selected(self._boxes(plan))))

    # ---- which outputs

    def _by_shapes(self) -> Plan:
        shapes = {name: self.seen[name][0].shape for name in self.outputs}
        boxes = [n for n, s in shapes.items() if _is_boxes(s)]
        dets = [n for n, s in shapes.items() if len(s) == 3 and s[2] == 5]
        flat = [n for n, s in shapes.items() if len(s) == 2 and s[1] > 1]
        if len(boxes) == 1:
            count = _rows_of(shapes[boxes[0]])
            partners = [
                n for n, s in shapes.items() if n != boxes[0] and len(s) == 3 and count in s[1:]
            ]
            beside = [n for n in flat if shapes[n][1] == count]
            if len(partners) == 1 and not beside:
                return self._of_pair(boxes[0], partners[0], "")
            labels = [n for n in beside if is_whole(self.seen[n])]
            scores = [n for n in beside if n not in labels]
            if not partners and len(labels) == len(scores) == 1:
                return self._of_pair(boxes[0], scores[0], labels[0])
        if len(boxes) == 2:  # scores of four classes
            plans = self._both_boxes(boxes, shapes)
            if plans:
                return plans
        if len(dets) == 1 and not boxes:
            labels = [
                n for n in flat if shapes[n][1] == shapes[dets[0]][1] and is_whole(self.seen[n])
            ]
            if len(labels) == 1:
                if (dets[0], labels[0]) == ("dets", "labels"):
                    self.known = dataclasses.replace(
                        self.known, name=self.known.name or "MMDeploy's dets and labels"
                    )
                    self.declared = dataclasses.replace(
                        self.declared, box_format=self.declared.box_format or "xyxy"
                    )
                return dataclasses.replace(
                    self._of_rows(dets[0], ("x1", "y1", "x2", "y2", "score")), labels=labels[0]
                )
        rows = [n for n, s in shapes.items() if len(s) == 3 and min(s[1:]) >= 5]
        if len(rows) == 1 and not boxes:
            return self._of_rows(rows[0])
        raise self.nothing_fits("none of the forms of boxes and scores fits")

    def _both_boxes(
        self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> Plan | None:
        scores = [
            n
            for n in names
            if all(v.min() >= 0 and v.max() <= 1 for v in self.seen[n]) and self._makes_scores(n)
        ]
        if len(scores) == 1 and shapes[names[0]][1] == shapes[names[1]][1]:
            (boxes,) = [n for n in names if n not in scores]
            return self._of_pair(boxes, scores[0], "")
        return None

    def _makes_scores(self, name: str) -> bool:
        node = self.nodes.producer.get(name)
        for _ in range(4):
            if node is None:
                return False
            if node.op_type in ("Sigmoid", "Softmax"):
                return True
            node = self.nodes.producer.get(node.input[0]) if node.input else None
        return False

    def nothing_fits(self, why: str) -> GraphError:
        return GraphError(f"{self.source.path}: {why}; {describe_outputs(self.source, self.seen)}")

    def _of_pair(self, boxes: str, scores: str, labels: str) -> Plan:
        for name in (boxes, scores, labels):
            if name and name not in self.seen:
                raise GraphError(
                    f"{self.source.path}: expected an output '{name}', found {', '.join(self.outputs)}"
                )
        if not scores:
            raise GraphError(
                f"{self.source.path}: --boxes_output goes with --scores_output; found {', '.join(self.outputs)}"
            )
        shape, other = self.seen[boxes][0].shape, self.seen[scores][0].shape
        if not _is_boxes(shape):
            raise GraphError(
                f"{self.source.path}: expected boxes [N, A, 4] in '{boxes}', found {list(shape)}"
            )
        count = _rows_of(shape)
        if labels:
            if other[1:] not in ((count,), (count, 1)) or self.seen[labels][0].shape[1:] not in (
                (count,),
                (count, 1),
            ):
                raise GraphError(
                    f"{self.source.path}: expected a score and a label for each of the {count} boxes, found '{scores}' {list(other)} and "
                    f"'{labels}' {list(self.seen[labels][0].shape)}"
                )
            return Plan(boxes, scores, labels, count=count, num_scores=1)
        if len(other) == 2 and other[1] == count:
            return Plan(boxes, scores, count=count, num_scores=1)
        if len(other) != 3 or count not in other[1:]:
            raise GraphError(
                f"{self.source.path}: expected scores [N, {count}, C] or [N, C, {count}] in '{scores}', found {list(other)}"
            )
        layout = self.declared.scores_layout
        if layout is None and other[1] == other[2]:
            self.evidence.ask(ev.SCORES, "--scores_layout NAC|NCA", "NAC")
        nca = layout == "NCA" if layout else other[1] != count
        if layout and other[2 if nca else 1] != count:
            raise GraphError(
                f"{self.source.path}: --scores_layout {layout}: '{scores}' is {list(other)} for {count} boxes"
            )
        return Plan(boxes, scores, count=count, nca=nca, num_scores=other[1] if nca else other[2])

    def _of_rows(self, name: str, columns: tuple[str, ...] = ()) -> Plan:
        if name not in self.seen or self.seen[name][0].ndim != 3:
            raise GraphError(
                f"{self.source.path}: expected rows [N, A, values] in '{name}', found {describe_outputs(self.source, self.seen)}"
            )
        values = self.seen[name]
        shape = values[0].shape
        columns = columns or self.declared.columns
        transposed = self._is_transposed(
            name, shape, len(columns) if "scores" not in columns else None
        )
        width, count = (shape[1], shape[2]) if transposed else (shape[2], shape[1])
        if columns:
            return self._columns(name, columns, width, count, transposed)
        axis = 1 if transposed else 2
        pieces = column_pieces(self.nodes, name, axis, self._sizes)
        rows = [v[0].T if transposed else v[0] for v in values]
        plan = Plan(name, name, rows=name, transposed=transposed, count=count, first_score=4)
        rest = width - 4
        starts = {sum(pieces[:i]) for i in range(len(pieces) + 1)} if pieces else None
        how = f"read: put together from columns of {', '.join(map(str, pieces))}" if pieces else ""
        if starts is not None and 4 not in starts:
            return self._ask_columns(plan, name, width)
        if rest == 2 and is_whole([r[:, 5] for r in rows]):
            self.evidence.add(
                ev.SCORES,
                "columns 4 score, 5 label",
                how or "measured: column 5 is of whole numbers",
            )
            return dataclasses.replace(plan, num_scores=1, label_column=5)
        if rest == 2 and is_whole([r[:, 4] for r in rows]):
            return self._ask_columns(plan, name, width)
        if rest == 1 or (starts and 5 not in starts):
            self.evidence.add(
                ev.SCORES, f"columns 4..{width - 1}", how or "read: one column behind the box"
            )
            return dataclasses.replace(plan, num_scores=rest)
        if starts and starts == {0, 4, 5, width} and rest > 2:
            self.evidence.add(ev.SCORES, f"column 4 objectness, 5..{width - 1} classes", how)
            return dataclasses.replace(plan, objectness=4, first_score=5, num_scores=rest - 1)
        known = len(self.known.labels) or len(self.hints.labels) or (self.hints.num_classes or 0)
        if known and known in (rest, rest - 1):
            is_plain = known == rest
            self.evidence.add(
                ev.SCORES,
                f"{known} columns" + ("" if is_plain else " behind an objectness"),
                "read: the number of class names",
            )
            return dataclasses.replace(
                plan,
                num_scores=known,
                first_score=4 if is_plain else 5,
                objectness=None if is_plain else 4,
            )
        return self._ask_columns(plan, name, width)

    def _ask_columns(self, plan: Plan, name: str, width: int) -> Plan:
        choices = "x1,y1,x2,y2,scores|cx,cy,w,h,scores|cx,cy,w,h,objectness,scores" + (
            "|x1,y1,x2,y2,score,label" if width == 6 else ""
        )
        self.evidence.ask(
            ev.SCORES, f"--rows_output {name} --columns {choices}", "scores behind the box"
        )
        return dataclasses.replace(plan, num_scores=width - 4)

    def _is_transposed(self, name: str, shape: tuple[int, ...], columns: int | None) -> bool:
        """Whether the columns come first; a row for every cell of a grid, or else more rows than columns."""
        if columns is not None and columns in shape[1:]:
            return shape[2] != columns
        on_grid = [maybe_levels(n, self.size_hw) is not None and n > 20 for n in shape[1:]]
        if on_grid[0] != on_grid[1]:
            return on_grid[1]
        return shape[1] < shape[2]

    def _columns(
        self, name: str, columns: tuple[str, ...], width: int, count: int, transposed: bool
    ) -> Plan:
        """Declared columns, by name; "scores" is as wide as what is left."""
        open_width = width - (len(columns) - 1) if "scores" in columns else 1
        if open_width < 1 or ("scores" not in columns and len(columns) != width):
            raise GraphError(
                f"{self.source.path}: --columns {','.join(columns)}: '{name}' has {width} columns"
            )
        at: dict[str, int] = {}
        position = 0
        for column in columns:
            at[column] = position
            position += open_width if column == "scores" else 1
        box = next((f for f in COLUMN_NAMES if all(c in at for c in COLUMN_NAMES[f])), None)
        if box is None or [at[c] for c in COLUMN_NAMES[box]] != list(
            range(at[COLUMN_NAMES[box][0]], at[COLUMN_NAMES[box][0]] + 4)
        ):
            raise GraphError(
                f"--columns: expected four columns of a box side by side, such as x1,y1,x2,y2 or cx,cy,w,h, found {','.join(columns)}"
            )
        score = at.get("scores", at.get("score"))
        if score is None:
            raise GraphError(
                f"--columns: expected a column score, or scores, found {','.join(columns)}"
            )
        if self.declared.columns:
            self.declared = dataclasses.replace(
                self.declared, box_format=self.declared.box_format or box
            )
            self.evidence.add(
                ev.SCORES,
                ", ".join(columns[4:]),
                f"{ev.GIVEN}--columns"
                if self.hints.declared and self.hints.declared.columns
                else ev.CONVENTION + self.known.name,
            )
        return Plan(
            name, name, rows=name, first_box=at[COLUMN_NAMES[box][0]], objectness=at.get("objectness"), first_score=score,
            num_scores=open_width if "scores" in at else 1, label_column=at.get("label"), transposed=transposed, count=count,
        )  # fmt: skip

    def _sizes(self, tensors: list[str]) -> list[tuple[int, ...]]:
        """Shapes of inner tensors, measured once each."""
        missing = [t for t in tensors if t not in self._shapes]
        if missing:
            image = self.source.graph.inputs[0]
            feed = _zeros(self.source, image, self.size_hw)
            for t, value in zip(missing, self.source.run(missing, {image: feed}), strict=True):
                self._shapes[t] = value.shape
        return [self._shapes[t] for t in tensors]

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
            boxes = [
                np.asarray(v, np.float64).reshape(-1, 4)
                if v.shape[-1] == 4
                else np.asarray(v[0].T, np.float64)
                for v in self.seen[plan.boxes]
            ]
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
        how_units = self._origin("box_units", f"{ev.MEASURED}the largest coordinates")
        if not (d.box_units or units):
            self.evidence.ask(ev.BOXES, "--box_units pixels|unit", "pixels")
        units = d.box_units or units or "pixels"
        scale = np.array([*self.size_hw[::-1]] * 2) if units == "unit" else 1.0
        pixels = [b * scale for b in boxes]
        all_live = all(m.all() for m in live)
        measured, how = (
            measure_format(
                pixels
                if all_live
                else [p[m] for p, m in zip(pixels, live, strict=True) if m.any()],
                self.size_hw,
            )
            if any(m.any() for m in live)
            else (None, "no detections on the photographs")
        )
        if d.box_format and measured and measured != d.box_format:
            raise GraphError(
                f"{self.source.path}: {self._said('box_format')}: the boxes are {measured}: {how}; leave it out, or declare the other"
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
        return dataclasses.replace(plan, box_format=found, is_unit=units == "unit")

    def _live_rows(self, plan: Plan) -> list[NDArray[np.bool_]]:
        """Rows that are no padding behind the detections: of exports that fill up with zeros or -1."""
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

    def _origin(self, attribute_name: str, measured: str) -> str:
        if self.hints.declared and getattr(self.hints.declared, attribute_name) is not None:
            return f"{ev.GIVEN}--{attribute_name}"
        if attribute_name == "box_format" and self.hints.declared and self.hints.declared.columns:
            return f"{ev.GIVEN}--columns"
        if getattr(self.declared, attribute_name) is not None:
            return ev.CONVENTION + self.known.name
        return measured

    def _said(self, attribute_name: str) -> str:
        value = getattr(self.declared, attribute_name)
        if self.hints.declared and getattr(self.hints.declared, attribute_name, None):
            return f"--{attribute_name} {value}"
        if self.hints.declared and self.hints.declared.columns:
            return f"--columns says {value}"
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
        elif maybe_levels(plan.count, self.size_hw):
            selected, origin = (
                False,
                f"{ev.MEASURED}a row for each of {plan.count} cells of a grid, nothing selected",
            )
        elif is_sorted(best):
            selected, origin = (
                True,
                f"{ev.MEASURED}the rows are sorted by score, so the model selects them",
            )
        else:
            self.evidence.ask(
                ev.SELECTION, "--selected (detections that need no NMS), or --selected no", "NMS"
            )
            return plan
        self.evidence.add(ev.SELECTION, "the model's own" if selected else "NMS per class", origin)
        return dataclasses.replace(plan, selected=selected)

    def _scores(self, plan: Plan) -> Plan:
        d, values = self.declared, self.score_values(plan)
        low, high = min(v.min() for v in values), max(v.max() for v in values)
        probabilities = low >= -1e-6 and high <= 1 + 1e-6
        padded = plan.selected and low >= -1 and high <= 1 + 1e-6
        sums = np.concatenate([v.sum(axis=1) for v in values])
        is_softmax = probabilities and plan.num_scores > 1 and bool(np.abs(sums - 1).max() < 1e-3)
        if d.activation == "none" and not (probabilities or padded):
            raise GraphError(
                f"{self.source.path}: {self._said('activation')}: the scores in '{plan.scores}' are {low:.3g} to {high:.3g}, no probabilities"
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
            self.evidence.ask(ev.SCORES, "--score_activation sigmoid|softmax", "sigmoid")
            activation, origin = "sigmoid", ""
        if probabilities and float(np.ptp(np.concatenate([v.ravel() for v in values]))) == 0:
            raise GraphError(
                f"{self.source.path}: all scores in '{plan.scores}' are {low:.3g} on four photographs; export a trained model"
            )
        if origin:
            former = next((f.value + ": " for f in self.evidence.facts if f.name == ev.SCORES), "")
            self.evidence.add(
                ev.SCORES,
                f"{former}{'probabilities' if activation == 'none' else activation + ' of logits'}",
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
        """The number of classes of a model that gives class ids: its class names, or what its ArgMax chooses from."""
        if plan.labels:
            found = [v.reshape(-1) for v in self.seen[plan.labels]]
            tensor = plan.labels
        else:
            found = [r[:, plan.label_column or 0] for r in self.rows_of(plan)]
            tensor = plan.rows
        largest = int(max(v.max() for v in found))
        base = self.declared.label_base
        chosen = self._argmax_width(tensor)
        names = len(self.known.labels) or len(self.hints.labels) or self.hints.num_classes or 0
        if names:
            count, origin = (
                names,
                "read: the class names"
                if self.known.labels
                else f"{ev.GIVEN}{'--labels' if self.hints.labels else '--num_classes'}",
            )
        elif chosen:
            count, origin = chosen, f"read: its ArgMax is over {chosen} classes"
        else:
            self.evidence.ask(ev.CLASSES, "--labels FILE or --num_classes N", largest + 1)
            count, origin = largest + 1, ""
        if base is None and largest >= count and names:
            raise GraphError(
                f"{self.source.path}: expected labels of 0 to {count - 1}, found {largest} in '{tensor}'; --label_base 1 where the first class is 1"
            )
        if largest - (base or 0) >= count:
            raise GraphError(
                f"{self.source.path}: expected labels below {count + (base or 0)}, found {largest} in '{tensor}'"
            )
        if base is None and not chosen and not names:
            base = 0
        if origin:
            self.evidence.add(ev.CLASSES, count, origin + (f", labels from {base}" if base else ""))
        return dataclasses.replace(plan, num_classes=count, label_base=base or 0)

    def _argmax_width(self, tensor: str) -> int | None:
        """How many classes the labels are chosen from: the width of the ArgMax, or the divisor of the TopK over all pairs."""
        for node in self.nodes.above([tensor]):
            if node.op_type == "ArgMax":
                shape = self._sizes([node.input[0]])[0]
                return int(shape[attribute(node, "axis", 0)])
            if (
                node.op_type == "Mod"
                and (divisor := self.nodes.value(node.input[1])) is not None
                and divisor.size == 1
            ):
                return int(divisor.reshape(-1)[0])
        return None


def _is_boxes(shape: tuple[int, ...]) -> bool:
    if len(shape) == 4:
        return shape[2] == 1 and shape[3] == 4
    return len(shape) == 3 and shape[2] == 4


def _rows_of(shape: tuple[int, ...]) -> int:
    return shape[1]


def _zeros(source: OnnxSource, image: str, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    channels_first = source.graph.image_shape[1:2] == (3,)
    n = max(source.graph.image_shape[0] or 1, 1)
    return np.zeros((n, 3, *size_hw) if channels_first else (n, *size_hw, 3), np.float32)


def describe_outputs(
    source: OnnxSource, seen: Mapping[str, Sequence[NDArray[Any]]] | None = None
) -> str:
    """Inputs and outputs with their shapes, and the command line to start from."""
    inputs = ", ".join(
        f"{i.name} {_dims(i)}" for i in source.model.graph.input if i.name in source.graph.inputs
    )
    shapes = {i.name: _dims(i) for i in source.model.graph.output}
    if seen:
        shapes = {name: str(list(seen[name][0].shape)) for name in shapes if name in seen}
    outputs = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:8])
    outputs += f" and {len(shapes) - 8} more" if len(shapes) > 8 else ""
    return (
        f"its inputs: {inputs}; its outputs: {outputs}. Declare them: {starting_line(source, seen)}"
    )


def starting_line(
    source: OnnxSource, seen: Mapping[str, Sequence[NDArray[Any]]] | None = None
) -> str:
    """Options to declare the outputs, with the names of the file."""
    names = [info.name for info in source.model.graph.output]
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in source.model.graph.output}
    boxes = [
        n
        for n in names
        if (seen and n in seen and _is_boxes(seen[n][0].shape)) or "box" in n.lower()
    ]
    if boxes and len(names) > 1:
        others = [n for n in names if n != boxes[0]]
        scores = next(
            (
                n
                for n in others
                if "score" in n.lower() or "logit" in n.lower() or "cls" in n.lower()
            ),
            others[0],
        )
        labels = [n for n in others if n != scores and "label" in n.lower()]
        line = f"--boxes_output {boxes[0]} --scores_output {scores}" + (
            f" --labels_output {labels[0]}" if labels else ""
        )
    else:
        rows = next((n for n in names if ranks[n] == 3), names[0])
        line = f"--rows_output {rows} --columns x1,y1,x2,y2,score,label"
    return line + " --box_format xyxy --preprocessor unit --resize_mode stretch"


def _dims(info: Any) -> str:
    dims = info.type.tensor_type.shape.dim
    return (
        "["
        + ", ".join(str(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in dims)
        + "]"
    )


def _declare(graph: gs.Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the heads the shapes that they were seen to have."""
    free = None in (graph.inputs[0].shape or ())[1:]
    for position, (name, shape) in enumerate(shapes.items()):
        tensor = graph.outputs[position]
        if name == LABELS:  # whole numbers: exact in float32
            tensor.name, former = f"{tensor.name}/labels", tensor
            tensor = gs.Variable(former.name.removesuffix("/labels"))
            graph.nodes.append(
                gs.Node("Cast", "labels_float", {"to": TensorProto.FLOAT}, [former], [tensor])
            )
            graph.outputs[position] = tensor
        tensor.shape = ["N", *shape[1:]] if not free else None
        tensor.dtype = np.dtype(np.float32)


# ---- from the outputs to boxes and scores


def assemble(build: Builder, spec: ModelSpec, *, plan: Plan, best_class: bool = False) -> Heads:
    """boxes [N, A, 4] and scores [N, A, C] of the outputs, as the plan says."""
    if plan.rows:
        rows = build.node("Transpose", "rows", ROWS, perm=[0, 2, 1]) if plan.transposed else ROWS
        boxes = build.slice_last("boxes", rows, plan.first_box, plan.first_box + 4)
        scores = build.slice_last(
            "row_scores", rows, plan.first_score, plan.first_score + plan.num_scores
        )
        if plan.objectness is not None:
            objectness = build.slice_last("objectness", rows, plan.objectness, plan.objectness + 1)
            scores = build.node("Mul", "joint_scores", objectness, scores)
    else:
        boxes = build.reshape("boxes", BOXES, [0, plan.count, 4])
        scores = (
            build.node("Transpose", "class_scores", SCORES, perm=[0, 2, 1]) if plan.nca else SCORES
        )
        if plan.labels or plan.num_scores == 1:
            scores = build.reshape("score", scores, [0, plan.count, 1])
    if plan.box_format == "xywh":
        corner = build.slice_last("corner", boxes, 0, 2)
        size = build.slice_last("size", boxes, 2, 4)
        boxes = build.node(
            "Concat", "corners", corner, build.node("Add", "far_corner", corner, size), axis=-1
        )
    if plan.activation == "softmax":
        scores = build.node("Softmax", "probabilities", scores, axis=-1)
    if plan.background != "none":
        first = int(plan.background == "first")
        scores = build.slice_last("foreground", scores, first, first + spec.num_classes)
    if plan.labels or plan.label_column is not None:
        scores = _one_hot(build, spec, plan, scores)
    if best_class:
        scores = best_class_only(build, scores)
    return Heads(boxes, scores)


def _one_hot(build: Builder, spec: ModelSpec, plan: Plan, score: str) -> str:
    """scores [N, A, C] of a score [N, A, 1] and a label: the score at its class, 0 elsewhere."""
    if plan.label_column is not None:
        rows = (
            build.node("Transpose", "label_rows", ROWS, perm=[0, 2, 1]) if plan.transposed else ROWS
        )
        label = build.slice_last("label", rows, plan.label_column, plan.label_column + 1)
    else:
        label = build.reshape("label", LABELS, [0, plan.count, 1])
    every = np.arange(plan.label_base, plan.label_base + spec.num_classes, dtype=np.float32)[
        None, None
    ]
    return build.node(
        "Where", "scores", build.node("Equal", "is_class", label, every), score, np.float32(0)
    )
