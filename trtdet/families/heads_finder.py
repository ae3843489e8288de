# SPDX-License-Identifier: Apache-2.0
"""Which outputs of a foreign export hold boxes and scores, and in which columns."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.any_number import Rows
from trtdet.families.base import Declaration, Hints
from trtdet.families.box_formats import maybe_levels
from trtdet.families.evidence import Evidence
from trtdet.families.heads_plan import (
    Framework,
    Plan,
    describe_outputs,
    is_boxes,
    paddle_feeds,
    rows_in,
    zeros,
)
from trtdet.families.outputs import Nodes, column_pieces, is_whole
from trtdet.families.pixels import maybe_image
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import (
    COLUMN_NAMES,
)


class Finder:
    """Finds which outputs hold boxes and scores, and in which columns: declared, else by their
    shapes, values and nodes.
    """

    def __init__(
        self,
        source: OnnxSource,
        seen: Mapping[str, list[NDArray[Any]]],
        size_hw: tuple[int, int],
        declared: Declaration,
        evidence: Evidence,
        hints: Hints,
        known: Framework,
        rows: Rows | None = None,
    ) -> None:
        self.source, self.seen, self.size_hw = source, seen, size_hw
        self.declared, self.evidence, self.hints, self.known = declared, evidence, hints, known
        self.rows = rows
        self.nodes = Nodes(source.model)
        self.outputs = [info.name for info in source.model.graph.output]
        self._shapes: dict[str, tuple[int, ...]] = {}

    # ---- which outputs

    def _by_shapes(self) -> Plan:
        shapes = {name: self.seen[name][0].shape for name in self.outputs}
        boxes = [n for n, s in shapes.items() if is_boxes(s)]
        dets = [n for n, s in shapes.items() if len(s) == 3 and s[2] == 5]
        flat = [n for n, s in shapes.items() if len(s) == 2 and s[1] > 1]
        if len(boxes) == 1:
            count = rows_in(shapes[boxes[0]])
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
        levels = self._undecoded_levels(shapes)
        if levels:
            raise GraphError(
                f"{self.source.path}: expected boxes and scores, found the maps of {len(levels)} levels apart ({', '.join(map(str, levels))} cells), whose "
                "boxes are not decoded; export the model with its decoding (PaddleDetection: -o export.post_process=True, with export.nms=False without its NMS)"
            )
        raise self.nothing_fits("none of the forms of boxes and scores fits")

    def _undecoded_levels(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Numbers of cells of the levels that have two or more outputs each; none where the outputs
        are something else.
        """
        height, width = self.size_hw
        grids = {-(-height // s) * -(-width // s) for s in (4, 8, 16, 32, 64, 128)}
        counts = [s[1] for s in shapes.values() if len(s) == 3 and s[1] in grids]
        levels = sorted({*counts}, reverse=True)
        whole = len(counts) == len(shapes) and len({counts.count(n) for n in levels}) == 1
        return levels if whole and len(levels) > 1 and counts.count(levels[0]) > 1 else []

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
        if not is_boxes(shape):
            of_one = "; where they are of one picture, export the model with their number, and no other axis, dynamic"
            raise GraphError(
                f"{self.source.path}: expected boxes [N, A, 4] in '{boxes}', found {list(shape)}{of_one if len(shape) == 2 else ''}"
            )
        count = rows_in(shape)
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
        num_columns = len(columns) if "scores" not in columns else None
        transposed = self._is_transposed(shape, num_columns)
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
        # An angle, or coefficients of a mask, for example.
        more = starts is not None and bool(starts & {*range(6, width)})
        if rest == 1 or (starts and 5 not in starts and not more):
            self.evidence.add(
                ev.SCORES, f"columns 4..{width - 1}", how or "read: one column behind the box"
            )
            return dataclasses.replace(plan, num_scores=rest)
        if starts and 5 in starts and not more and rest > 2:
            self.evidence.add(ev.SCORES, f"column 4 objectness, 5..{width - 1} classes", how)
            return dataclasses.replace(plan, objectness=4, first_score=5, num_scores=rest - 1)
        known = len(self.known.labels) or len(self.hints.labels) or (self.hints.num_classes or 0)
        ends = starts if starts and more else {width}
        is_plain, is_joint = 4 + known in ends, 5 + known in ends and (not more or 5 in ends)
        if known and is_plain != is_joint:
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
        return self._ask_columns(plan, name, width, _behind_box(pieces) if pieces and more else "")

    def _ask_columns(self, plan: Plan, name: str, width: int, behind: str = "") -> Plan:
        """Ask what the columns behind the box are.

        Args:
            behind: what they may be, by how they were put together.
        """
        choices = "x1,y1,x2,y2,scores|cx,cy,w,h,scores|cx,cy,w,h,objectness,scores"
        if behind:
            choices = f"x1,y1,x2,y2,{behind}|cx,cy,w,h,{behind}"
        if width == 6:
            choices += "|x1,y1,x2,y2,score,label"
        self.evidence.ask(
            ev.SCORES, f"--rows_output {name} --columns {choices}", "scores behind the box"
        )
        return dataclasses.replace(plan, num_scores=width - 4)

    def _is_transposed(self, shape: tuple[int, ...], columns: int | None) -> bool:
        """Whether the columns come first; a row for every cell of a grid, or else more rows than
        columns.
        """
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
        fours = [columns[i : i + 4] for i in range(len(columns) - 3)]
        box = next((f for f, names in COLUMN_NAMES.items() if names in fours), None)
        if box is None:
            forms = " or ".join(",".join(names) for names in COLUMN_NAMES.values())
            raise GraphError(
                f"--columns: expected the four columns of a box side by side, {forms}, found {','.join(columns)}"
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
                ", ".join(c for c in columns if c not in COLUMN_NAMES[box]),
                f"{ev.GIVEN}--columns"
                if self.hints.declared and self.hints.declared.columns
                else self.known.origin,
            )
        return Plan(
            name, name, rows=name, first_box=at[COLUMN_NAMES[box][0]], objectness=at.get("objectness"), first_score=score,
            num_scores=open_width if "scores" in at else 1, label_column=at.get("label"), transposed=transposed, count=count,
        )  # fmt: skip

    def _sizes(self, tensors: list[str]) -> list[tuple[int, ...]]:
        """Shapes of inner tensors, measured once each."""
        missing = [t for t in tensors if t not in self._shapes]
        if missing:
            for t, value in zip(missing, self._on_black(missing), strict=True):
                self._shapes[t] = value.shape
        return [self._shapes[t] for t in tensors]

    def _value(self, tensor: str) -> NDArray[Any]:
        """An inner tensor, of a black picture."""
        return self._on_black([tensor])[0]

    def _on_black(self, tensors: list[str]) -> list[NDArray[Any]]:
        found = maybe_image(self.source)
        image = found[0] if found else self.source.graph.inputs[0]
        fed = {image: zeros(self.source, image, self.size_hw)}
        fed |= paddle_feeds(self.source, self.size_hw)
        return self.source.run(tensors, fed)


def _behind_box(pieces: Sequence[int]) -> str:
    """Columns behind a box, put together from pieces: scores, and what is behind them, such as an
    angle or the coefficients of a mask; an objectness before them, where a piece is one column.
    """
    ends = list(itertools.accumulate(pieces))
    widths = [width for width, end in zip(pieces, ends, strict=True) if end > 4]
    names = ["scores"]
    if widths[0] == 1 and len(widths) > 2:
        names, widths = ["objectness", "scores"], widths[1:]
    return ",".join([*names, *["unused"] * sum(widths[1:])])
