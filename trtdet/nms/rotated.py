# SPDX-License-Identifier: Apache-2.0
"""NMS of rotated boxes in ordinary ONNX operators: the end of a detector whose boxes have an angle.

    boxes, scores  ->  the best candidates  ->  overlap of every pair  ->  suppression rounds
        ->  the four outputs

There is no TensorRT plugin for it, so this is what stands in the file, and it runs everywhere.
Candidates, rounds and their limits are those of the form "graph" in `trtdet.nms.lowering.lower`;
only the overlap differs. It computes `trtdet.nms.rotated_reference.reference`.

The shared area of two rectangles A and B, with no polygon of varying length. Take B's frame, in
which B is |x| <= a, |y| <= b, and let clamp(x) be x limited to -a..a. Its derivative is 1 inside
and 0 outside, so by Green's theorem

    area(A and B)  =  integral over the boundary of A of clamp(x) dy, where |y| <= b

A straight edge from (x0, y0) to (x1, y1) contributes (clamp(y1) - clamp(y0)) times the mean of
clamp(x) over its part within |y| <= b, and that mean is that of a line with its ends bent flat.
Everything is continuous in the coordinates: parallel, touching and equal boxes are no special
cases, and the error is that of float32, about 1e-6 of the larger box.
"""

import numpy as np
import onnx
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.graph.builder import (
    Builder,
    dims_text,
    known_types,
    tensor_types,
    value_info,
)
from trtdet.nms.candidates import TENSORRT_TOPK, best_candidates
from trtdet.nms.lowering import GRAPH_ROUNDS
from trtdet.nms.outputs import declare_outputs
from trtdet.nms.rotated_reference import GAUSSIAN_EPSILON, ROTATED_CANDIDATES
from trtdet.nms.suppression import emit, iou_of_areas, pairwise, suppress_by_rounds
from trtdet.spec import OUTPUT_NAMES, Nms, RotatedMode


def insert_rotated_nms(
    model: onnx.ModelProto,
    *,
    boxes: str,
    scores: str,
    nms: Nms,
    batch: int | str = "N",
    mode: RotatedMode = "exact",
    candidates: int = ROTATED_CANDIDATES,
    rounds: int = GRAPH_ROUNDS,
) -> None:
    """Put the NMS behind the heads and make its four results the model's only outputs;
    `detection_boxes` is [N, K, 5].

    Args:
        boxes: [N, A, 5] float32, x1 y1 x2 y2 of the box before rotation, and its angle in radians,
            positive clockwise on the screen. "odtk" takes [N, A, 6], the last the length of the raw
            (sin, cos); the others take it too and ignore it.
        scores: [N, A, C] float32, logits if `nms.score_activation`.
        mode: overlap of the true rectangles, that of ODTK's kernel, or that of Ultralytics:
            `trtdet.nms.rotated_reference`.
        candidates: (anchor, class) pairs of an image that are looked at.
        rounds: of suppression, see `trtdet.nms.lowering.lower`; "probiou" has one.

    Raises:
        GraphError: heads that are missing, of another type or shape.
        ValueError: candidates or rounds out of range.
    """
    if not 1 <= candidates <= TENSORRT_TOPK or rounds < 1:
        raise ValueError(
            f"expected candidates of 1 to {TENSORRT_TOPK}, where TensorRT's TopK ends, and at least 1 round, "
            f"got {candidates} and {rounds}"
        )
    num_anchors, num_classes, box_size = _check_heads(model, boxes, scores, mode)
    build = Builder(model, "nms/")
    found = best_candidates(build, scores, num_anchors, num_classes, nms, candidates)
    rows = build.take_rows("candidate_boxes", boxes, found.anchor, box_size)
    box = _Box(build, rows, mode)
    if mode == "probiou":
        iou = _iou_gaussian(build, box)
        rounds = 1  # its rule: what one round takes, nothing brings back
    else:
        shared = (
            _shared_area(build, box) if mode == "exact" else _shared_area_odtk(build, box, rows)
        )
        iou = iou_of_areas(build, shared, build.node("Mul", "area", box.width, box.height))
    survives = suppress_by_rounds(build, iou, found, nms, rounds)
    if box_size > 5:
        rows = build.slice_last("candidate_boxes_with_angle", rows, 0, 5)
    emit(build, OUTPUT_NAMES, {}, rows, survives, found, nms, box_size=5)
    build.append_to(model)
    declare_outputs(model, batch, nms.max_output_boxes, box_size=5)


class _Box:
    """Columns [N, count, 1] of the candidates: names of tensors."""

    def __init__(self, build: Builder, rows: str, mode: RotatedMode) -> None:
        x1, y1, x2, y2, self.angle = (
            build.slice_last(name, rows, i, i + 1)
            for i, name in enumerate(("x1", "y1", "x2", "y2", "angle"))
        )
        half = np.float32(0.5)
        self.centre_x = build.node("Mul", "centre_x", build.node("Add", "x_sum", x1, x2), half)
        self.centre_y = build.node("Mul", "centre_y", build.node("Add", "y_sum", y1, y2), half)
        # ODTK takes the sides of a box that is inside out for what they are.
        positive = "Abs" if mode == "odtk" else "Relu"
        self.signed = tuple(
            build.node("Sub", f"{name}_signed", high, low)
            for name, low, high in (("width", x1, x2), ("height", y1, y2))
        )
        self.width, self.height = (
            build.node(positive, name, side)
            for name, side in zip(("width", "height"), self.signed, strict=True)
        )
        self.half_width = build.node("Mul", "half_width", self.width, half)
        self.half_height = build.node("Mul", "half_height", self.height, half)


def _row(build: Builder, name: str, column: str) -> str:
    """[N, count, 1]  ->  [N, 1, count]"""
    return build.reshape(name, column, [0, 1, -1])


def _centres_apart(build: Builder, name: str, box: _Box, angle: str) -> tuple[str, str]:
    """Centre of the better box (axis 1) of each pair less that of the other (axis 2), x and y,
    [N, count, count], in the frame of `angle`.
    """
    node = build.node
    x = pairwise(build, "Sub", f"{name}/between_x", box.centre_x)
    y = pairwise(build, "Sub", f"{name}/between_y", box.centre_y)
    cos, sin = node("Cos", f"{name}/cos", angle), node("Sin", f"{name}/sin", angle)
    x_cos, y_sin = node("Mul", f"{name}/x_cos", x, cos), node("Mul", f"{name}/y_sin", y, sin)
    y_cos, x_sin = node("Mul", f"{name}/y_cos", y, cos), node("Mul", f"{name}/x_sin", x, sin)
    return node("Add", f"{name}/x", x_cos, y_sin), node("Sub", f"{name}/y", y_cos, x_sin)


def _centre_in_frame(build: Builder, box: _Box) -> tuple[str, str]:
    """Centre of the better box (axis 1) of each pair, in the frame of the other (axis 2): x and
    y, [N, count, count].
    """
    return _centres_apart(build, "frame", box, _row(build, "frame/angle", box.angle))


def _shared_area(build: Builder, box: _Box) -> str:
    """[N, count, count]: what two rotated boxes share, as the module says.

    A is the box of axis 1, B that of axis 2.
    """
    xs, ys = _corners_in_frame(build, box)
    width = _row(build, "half_width_row", box.half_width)
    height = _row(build, "half_height_row", box.half_height)
    left, top = build.node("Neg", "left_row", width), build.node("Neg", "top_row", height)
    ys_within = [_clamp(build, f"corner_{i}_y_within", y, top, height) for i, y in enumerate(ys)]
    area = ""
    for i in range(4):
        j = (i + 1) % 4
        step = f"edge_{i}"
        start, end = _part_within(
            build, step, xs[i], xs[j], (ys[i], ys[j]), (ys_within[i], ys_within[j])
        )
        clamped_start = _clamp(build, f"{step}/start_clamped", start, left, width)
        clamped_end = _clamp(build, f"{step}/end_clamped", end, left, width)
        mean = _mean_clamped(build, step, (start, end), (clamped_start, clamped_end))
        rise = build.node("Sub", f"{step}/rise", ys_within[j], ys_within[i])
        share = build.node("Mul", f"{step}/area", rise, mean)
        area = build.node("Add", f"{step}/area_so_far", area, share) if area else share
    return area


def _clamp(build: Builder, name: str, value: str, low: str, high: str) -> str:
    return build.node("Min", name, build.node("Max", f"{name}/low", value, low), high)


def _corners_in_frame(build: Builder, box: _Box) -> tuple[list[str], list[str]]:
    """x and y, [N, count, count], of the four corners of A in B's frame, from x to y around it."""
    node = build.node
    turn = pairwise(build, "Sub", "turn", box.angle)
    cos, sin = node("Cos", "turn_cos", turn), node("Sin", "turn_sin", turn)
    x, y = _centre_in_frame(build, box)
    width_x = node("Mul", "width_x", box.half_width, cos)
    width_y = node("Mul", "width_y", box.half_width, sin)
    height_x = node("Mul", "minus_height_x", box.half_height, sin)
    height_y = node("Mul", "height_y", box.half_height, cos)
    left_x, right_x = node("Sub", "left_x", x, width_x), node("Add", "right_x", x, width_x)
    left_y, right_y = node("Sub", "left_y", y, width_y), node("Add", "right_y", y, width_y)
    xs = [
        node("Add", "corner_0_x", left_x, height_x),
        node("Add", "corner_1_x", right_x, height_x),
        node("Sub", "corner_2_x", right_x, height_x),
        node("Sub", "corner_3_x", left_x, height_x),
    ]
    ys = [
        node("Sub", "corner_0_y", left_y, height_y),
        node("Sub", "corner_1_y", right_y, height_y),
        node("Add", "corner_2_y", right_y, height_y),
        node("Add", "corner_3_y", left_y, height_y),
    ]
    return xs, ys


def _part_within(
    build: Builder, step: str, x0: str, x1: str, y: tuple[str, str], y_within: tuple[str, str]
) -> tuple[str, str]:
    """x at the ends of the part of an edge that lies between the limits in y.

    The position along the edge is limited to 0..1: a part of no length, or an edge that does not
    rise, has no weight, and must be finite.
    """
    node = build.node
    rise = node("Sub", f"{step}/full_rise", y[1], y[0])
    flat = node("Equal", f"{step}/flat", rise, np.float32(0))
    rise = node("Where", f"{step}/rise_not_0", flat, np.float32(1), rise)
    run = node("Sub", f"{step}/run", x1, x0)
    ends = []
    for end, x, low, high in ((0, x0, 0, 1), (1, x1, -1, 0)):
        name = f"{step}/{('start', 'end')[end]}"
        cut = node("Sub", f"{name}_cut", y_within[end], y[end])
        share = node("Div", f"{name}_share", cut, rise)
        share = node("Clip", f"{name}_share_limited", share, np.float32(low), np.float32(high))
        ends.append(node("Add", f"{name}_x", x, node("Mul", f"{name}_moved", share, run)))
    return ends[0], ends[1]


def _mean_clamped(build: Builder, step: str, x: tuple[str, str], clamped: tuple[str, str]) -> str:
    """Mean of clamp(x) where x goes evenly from x[0] to x[1].

    (c0 + c1) / 2 + (c0 - c1) / 2 * (share of the way clamped at c0 - share clamped at c1); where
    both ends are clamped to the same side, c0 - c1 is 0 and the shares do not matter.
    """
    node = build.node
    over = [
        node("Abs", f"{step}/over_{i}", node("Sub", f"{step}/over_{i}_signed", c, v))
        for i, (c, v) in enumerate(zip(clamped, x, strict=True))
    ]
    way = node("Abs", f"{step}/way", node("Sub", f"{step}/way_signed", x[1], x[0]))
    way = node("Max", f"{step}/way_not_0", way, np.float32(1e-12))
    surplus = node(
        "Div", f"{step}/clamped_surplus", node("Sub", f"{step}/over_surplus", *over), way
    )
    bend = node("Mul", f"{step}/bend", node("Sub", f"{step}/fall", *clamped), surplus)
    total = node("Add", f"{step}/twice_mean", node("Add", f"{step}/ends", *clamped), bend)
    return node("Mul", f"{step}/mean", total, np.float32(0.5))


def _shared_area_odtk(build: Builder, box: _Box, rows: str) -> str:
    """[N, count, count]: what ODTK takes two boxes to share, over the square of its scale, which
    is the same for the areas.
    """
    node = build.node
    scale = node("Max", "scale", build.slice_last("scale_raw", rows, 5, 6), np.float32(1e-6))
    scale = _row(build, "scale_row", scale)
    sides = []
    centres, halves = _centre_in_frame(build, box), (box.half_width, box.half_height)
    for axis, centre, half in zip("xy", centres, halves, strict=True):
        centre = node("Div", f"frame_{axis}_scaled", centre, scale)
        limit = _row(build, f"half_row_{axis}", half)
        start, end = node("Sub", f"start_{axis}", centre, half), node("Add", f"end_{axis}", centre, half)  # fmt: skip
        low = node("Max", f"low_{axis}", start, node("Neg", f"minus_limit_{axis}", limit))
        high = node("Min", f"high_{axis}", end, limit)
        sides.append(
            node("Relu", f"shared_{axis}", node("Sub", f"shared_{axis}_signed", high, low))
        )
    # A better box with one side inside out shares nothing.
    mirrored = node("Less", "mirrored", node("Mul", "area_signed", *box.signed), np.float32(0))
    sides[0] = node("Where", "shared_x_unless_mirrored", mirrored, np.float32(0), sides[0])
    return node("Mul", "shared_area", *sides)


def _iou_gaussian(build: Builder, box: _Box) -> str:
    """[N, count, count]: `trtdet.nms.rotated_reference.iou_gaussian` of every pair.

    With variances a and c of a box along its width and height, the angle t between two boxes, and
    their centres apart by (u, v) in the frame of either, the determinant of the sum of the
    covariances S is

        a1 c1 + a2 c2 + (a1 c2 + c1 a2) cos(t)**2 + (a1 a2 + c1 c2) sin(t)**2

    and d' adj(S) d = c1 u1**2 + a1 v1**2 + c2 u2**2 + a2 v2**2. Nothing is subtracted: float32
    suffices for the narrowest box.
    """
    node = build.node
    epsilon = np.float32(GAUSSIAN_EPSILON)

    def square(name: str, value: str) -> str:
        return node("Mul", f"{name}_squared", value, value)

    a = node("Div", "variance_a", square("width", box.width), np.float32(12))
    c = node("Div", "variance_c", square("height", box.height), np.float32(12))
    a_row, c_row = _row(build, "variance_a_row", a), _row(build, "variance_c_row", c)
    product = node("Mul", "a_c", a, c)
    turn = pairwise(build, "Sub", "turn", box.angle)
    level = node("Add", "level", node("Mul", "a_c_row", a, c_row), node("Mul", "c_a_row", c, a_row))
    cross = node("Add", "cross", node("Mul", "a_a_row", a, a_row), node("Mul", "c_c_row", c, c_row))
    level = node("Mul", "level_cos", level, square("turn_cos", node("Cos", "turn_cos", turn)))
    cross = node("Mul", "cross_sin", cross, square("turn_sin", node("Sin", "turn_sin", turn)))
    determinant = node("Add", "determinant_turned", level, cross)
    determinant = node(
        "Add", "determinant", determinant, pairwise(build, "Add", "a_c_sum", product)
    )

    terms = []
    for name, angle, a_, c_ in (
        ("better", box.angle, a, c),
        ("other", _row(build, "angle_row", box.angle), a_row, c_row),
    ):
        u, v = _centres_apart(build, name, box, angle)
        terms.append(node("Mul", f"{name}_c_u", c_, square(f"{name}_u", u)))
        terms.append(node("Mul", f"{name}_a_v", a_, square(f"{name}_v", v)))
    apart = terms[0]
    for i, term in enumerate(terms[1:]):
        apart = node("Add", f"apart_{i}", apart, term)
    apart = node("Div", "apart", apart, node("Add", "determinant_not_0", determinant, epsilon))

    deviation = node("Sqrt", "deviation", product)
    spread = node("Mul", "four_deviations", pairwise(build, "Mul", "deviations", deviation), np.float32(4))  # fmt: skip
    ratio = node("Div", "ratio", determinant, node("Add", "spread_not_0", spread, epsilon))
    ratio = node("Log", "log_ratio", node("Max", "ratio_at_least_1", ratio, np.float32(1)))
    quarter = node("Mul", "apart_quarter", apart, np.float32(0.25))
    distance = node(
        "Add", "bhattacharyya", quarter, node("Mul", "log_half", ratio, np.float32(0.5))
    )
    shared = node("Exp", "shared", node("Neg", "minus_distance", distance))
    rest = node("Relu", "not_shared", node("Sub", "not_shared_signed", np.float32(1), shared))
    return node("Sub", "iou", np.float32(1), node("Sqrt", "hellinger", rest))


def _check_heads(
    model: onnx.ModelProto, boxes: str, scores: str, mode: RotatedMode
) -> tuple[int, int, int]:
    """Numbers of anchors and classes, and columns of the boxes; what was inferred of the heads
    is kept in `value_info`.
    """
    said = tensor_types(model)
    types = known_types(model, (boxes, scores))
    box_dims, score_dims = (types[name][1] if name in types else [] for name in (boxes, scores))
    columns = (6,) if mode == "odtk" else (5, 6)
    num_anchors, num_classes = score_dims[1:3] if len(score_dims) == 3 else (None, None)
    if (
        len(box_dims) != 3
        or box_dims[1] != num_anchors
        or box_dims[2] not in columns
        or not isinstance(num_anchors, int)
        or not isinstance(num_classes, int)
    ):
        hint = "; --rotated_nms odtk needs an export of ODTK itself" if mode == "odtk" else ""
        raise GraphError(
            f"rotated NMS: expected boxes '{boxes}' [N, anchors, {' or '.join(map(str, columns))}] and scores '{scores}' "
            f"[N, anchors, classes] with known sizes, found {dims_text(box_dims)} and {dims_text(score_dims)}{hint}"
        )
    for name in (boxes, scores):
        if types[name][0] != TensorProto.FLOAT:
            raise GraphError(
                f"rotated NMS: expected float32 heads, found '{name}' of "
                f"{TensorProto.DataType.Name(types[name][0]).lower()}; convert the model in FP32, build_engine.py chooses the precision"
            )
        if name not in said:
            model.graph.value_info.append(value_info(name, *types[name]))
    return num_anchors, num_classes, columns[-1] if box_dims[2] == columns[-1] else 5
