# SPDX-License-Identifier: Apache-2.0
"""What can be measured on the outputs of an ONNX export: what they are for photographs, which
columns they were put together from, what a box is.

Nothing here knows a family.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import about
from trtdet.errors import GraphError
from trtdet.families.pixels import Normal, Pixels
from trtdet.geometry import in_layout
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import BoxFormat, Layout

#: Strides of a model's levels, and boxes of each cell.
LEVELS = ((8, 16, 32), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32), (8, 16, 32, 64, 128), (4, 8, 16, 32, 64))  # fmt: skip
#: Strides from its cell within which a box belongs to it.
NEAR = 2.0
#: How many times nearer the boxes of the right format lie, where that alone tells it.
CLEARLY = 3.0
BOXES_PER_CELL = (1, 3, 5, 9)
FORMATS: tuple[BoxFormat, ...] = ("xyxy", "yxyx", "cxcywh", "xywh")
#: Words in the names of outputs that no detection is read from.
OF_NO_USE = ("mask", "proto", "keypoint", "kpt", "pose", "aux", "hidden", "embed", "feature", "feat", "enc_", "encoder", "attention", "memory")  # fmt: skip


def photographs(size_hw: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """The photographs that come with the package, stretched to the network input: uint8 [h,w,3]
    RGB.
    """
    from PIL import Image

    images = []
    for path in about.PHOTOGRAPHS:
        with Image.open(path) as picture:
            resized = picture.convert("RGB").resize(size_hw[::-1], Image.Resampling.BILINEAR)
            images.append(np.asarray(resized))
    return images


def prepared(
    image: NDArray[np.uint8], layout: Layout, normal: Normal, batch: int
) -> NDArray[np.float32]:
    """What is fed behind the normalisation for a picture that fills the network input: a batch
    of it.
    """
    mean, std = (np.array(x, np.float32) for x in (normal.mean, normal.std))
    values = (np.repeat(image[None], batch, axis=0).astype(np.float32) - mean) / std
    return in_layout(values[..., ::-1] if normal.bgr else values, layout)


def look(
    source: OnnxSource,
    pixels: Pixels,
    normal: Normal,
    tensors: Sequence[str],
    feeds: Mapping[str, NDArray[Any]],
    size_hw: tuple[int, int],
) -> dict[str, list[NDArray[Any]]]:
    """Outputs or inner tensors for each photograph, of the first image of the batch, with a first
    dimension of 1.

    Raises:
        GraphError: the source does not run, or yields NaN or infinity.
    """
    seen: dict[str, list[NDArray[Any]]] = {name: [] for name in tensors}
    batch = pixels.batch or 1
    others = {name: np.repeat(value, batch, axis=0) for name, value in feeds.items()}
    for image in photographs(size_hw):
        fed = {pixels.tensor: prepared(image, pixels.layout, normal, batch), **others}
        for name, value in zip(tensors, source.run(list(tensors), fed), strict=True):
            check_finite(source, name, value)
            whole = value.ndim > 1 and value.shape[0] == batch and batch > 1
            seen[name].append(value[:1] if whole else value)
    return seen


def batch_of(
    source: OnnxSource,
    pixels: Pixels,
    tensors: Sequence[str],
    size_hw: tuple[int, int],
    feeds: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[int | None, str]:
    """The batch size that an export holds, None where it is dynamic; and where that comes from.

    An axis may be called dynamic where operators of the network hold one image only.

    Args:
        feeds: of further inputs, for one image.
    """
    if pixels.batch is not None:
        return pixels.batch, "read: the shape of the input"
    shape = (2, 3, *size_hw) if pixels.layout == "NCHW" else (2, *size_hw, 3)
    others = {name: np.repeat(value, 2, axis=0) for name, value in (feeds or {}).items()}
    try:
        fed = {pixels.tensor: np.zeros(shape, np.float32), **others}
        values = source.run(list(tensors), fed)
    except GraphError:
        values = []
    if values and all(v.ndim and len(v) == 2 for v in values):
        return None, "read: the shape of the input"
    return 1, "measured: its shape is dynamic, but the export itself fails with 2 images"


def check_finite(source: OnnxSource, name: str, value: NDArray[Any]) -> None:
    """Refuse NaN and infinity that the source itself yields, naming a weight that holds one.

    Raises:
        GraphError: there are some.
    """
    if not np.issubdtype(value.dtype, np.floating) or np.isfinite(value).all():
        return
    kind = "NaN" if np.isnan(value).any() else "infinity"
    where = maybe_broken_weight(source.model)
    because = (
        f"its weight '{where}' holds some"
        if where
        else "its weights are finite, so its arithmetic overflows"
    )
    raise GraphError(
        f"{source.path}: the source itself yields {kind} in '{name}' for a photograph; {because}. Export it from a sound checkpoint"
    )


def maybe_broken_weight(model: onnx.ModelProto) -> str | None:
    """The first initializer with NaN, or with infinity in a tensor of more than one value."""
    for tensor in model.graph.initializer:
        if tensor.data_type in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.DOUBLE,
        ):
            value = onnx.numpy_helper.to_array(tensor)
            if np.isnan(value).any() or (value.size > 1 and np.isinf(value).any()):
                return tensor.name
    return None


class Nodes:
    """The nodes of a model, by what they make and what they read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.producer = {name: node for node in model.graph.node for name in node.output if name}
        self.constants = {t.name: t for t in model.graph.initializer}

    def above(self, tensors: Iterable[str]) -> Iterator[onnx.NodeProto]:
        """The nodes upstream of some tensors, nearest first."""
        pending, seen = list(tensors), set[int]()
        while pending:
            node = self.producer.get(pending.pop(0))
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            pending.extend(name for name in node.input if name)

    def tensors_above(self, tensors: Iterable[str]) -> set[str]:
        return {name for node in self.above(tensors) for name in (*node.input, *node.output)}

    def is_constant(self, name: str) -> bool:
        node = self.producer.get(name)
        return name in self.constants or (node is not None and node.op_type == "Constant")

    def value(self, name: str) -> NDArray[Any] | None:
        if name in self.constants:
            return onnx.numpy_helper.to_array(self.constants[name])
        node = self.producer.get(name)
        if node is not None and node.op_type == "Constant":
            return next(
                (onnx.numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), None
            )
        if node is not None and node.op_type == "Identity":
            return self.value(node.input[0])
        return None

    def ops(self, tensors: Iterable[str]) -> set[str]:
        return {node.op_type for node in self.above(tensors)}


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default


#: What takes some rows of a tensor, or calls its axes otherwise.
SELECTING = ("Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Unsqueeze")  # fmt: skip


def before_selection(model: onnx.ModelProto, tensors: Iterable[str]) -> list[str]:
    """Tensors whose rows others are, as they are: what is selected by a Gather, from where."""
    nodes, found = Nodes(model), list[str]()
    for name in tensors:
        node = nodes.producer.get(name)
        while node is not None and node.op_type in SELECTING and node.input[0] not in found:
            if not nodes.is_constant(node.input[0]):
                found.append(node.input[0])
            node = nodes.producer.get(node.input[0])
    return [name for name in found if name in nodes.producer]


# ---- columns


#: Operators that leave every number where it is.
ELEMENTWISE = (
    "Identity",
    "Cast",
    "Sigmoid",
    "Exp",
    "Clip",
    "Relu",
    "Softplus",
    "Tanh",
    "HardSigmoid",
)


def column_pieces(nodes: Nodes, tensor: str, axis: int, sizes: Any) -> tuple[int, ...] | None:
    """Widths of what an output was put together from along one axis, also where that was cut apart
    and put together again on the way, as YOLOX's boxes are.

    None where that cannot be followed.

    Args:
        sizes: names of tensors -> their shapes, measured.
    """
    cuts = _cuts(nodes, tensor, axis, sizes, depth=64)
    if not cuts:
        return None
    edges = [0, *sorted(cuts), sizes([tensor])[0][axis]]
    return tuple(stop - start for start, stop in itertools.pairwise(edges))


def _cuts(nodes: Nodes, tensor: str, axis: int, sizes: Any, depth: int) -> set[int]:
    """Columns of a tensor at which another piece begins; none: one piece, or not to be followed."""
    node = nodes.producer.get(tensor)
    if node is None or depth == 0:
        return set()
    op, shape, depth = node.op_type, sizes([tensor])[0], depth - 1
    if op in ELEMENTWISE:
        return _cuts(nodes, node.input[0], axis, sizes, depth)
    if op == "Transpose":
        perm = list(attribute(node, "perm", range(len(shape))[::-1]))
        return _cuts(nodes, node.input[0], perm[axis], sizes, depth)
    if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        before = sizes([node.input[0]])[0]
        kept = [
            i
            for i, n in enumerate(before)
            if n == shape[axis] and _product(before[:i]) == _product(shape[:axis])
        ]
        return _cuts(nodes, node.input[0], kept[-1], sizes, depth) if kept else set()
    if op == "Concat":
        if attribute(node, "axis") % len(shape) != axis:
            return _cuts(nodes, node.input[0], axis, sizes, depth)
        cuts, start = set[int](), 0
        for name, part in zip(node.input, sizes(list(node.input)), strict=True):
            inner = _cuts(nodes, name, axis, sizes, depth)
            cuts |= {start, *(start + cut for cut in inner)}
            start += part[axis]
        return cuts - {0}
    if op == "Slice":
        return _cuts_of_slice(nodes, node, shape, axis, sizes, depth)
    return set()


def _cuts_of_slice(
    nodes: Nodes, node: onnx.NodeProto, shape: tuple[int, ...], axis: int, sizes: Any, depth: int
) -> set[int]:
    """`_cuts` of a part of a tensor, along one axis and in steps of 1."""
    given = [nodes.value(name) for name in node.input[1:] if name]
    values = [None if v is None else v.reshape(-1).tolist() for v in given]
    if len(values) < 3 or any(v is None or len(v) != 1 for v in values):
        return set()
    start, _, along, *step = (v[0] for v in values if v)
    inner = _cuts(nodes, node.input[0], axis, sizes, depth)
    if along % len(shape) != axis:
        return inner
    whole = sizes([node.input[0]])[0][axis]
    start = min(max(start + whole if start < 0 else start, 0), whole)
    if step and step[0] != 1:
        return set()
    return {cut - start for cut in inner if start < cut < start + shape[axis]}


def _product(values: Sequence[int]) -> int:
    return int(np.prod(values, dtype=np.int64))


def is_whole(values: Sequence[NDArray[Any]]) -> bool:
    """Whether all values are whole numbers from 0 (or -1, of padding)."""
    return all(bool((v == np.round(v)).all() and (v >= -1).all()) for v in values)


def is_sorted(scores: Sequence[NDArray[Any]]) -> bool:
    """Whether rows are sorted, best first, in every photograph, and not all alike."""
    falls = all(bool((np.diff(s) <= 1e-6).all()) for s in scores)
    return falls and any(float(np.ptp(s)) > 0 for s in scores)


# ---- boxes


@dataclass(frozen=True)
class Levels:
    """The pyramid levels that give a head its number of boxes."""

    size_hw: tuple[int, int]
    strides: tuple[int, ...]
    boxes_per_cell: int = 1

    @property
    def count(self) -> int:
        height, width = self.size_hw
        return self.boxes_per_cell * sum(-(-height // s) * -(-width // s) for s in self.strides)

    def centres(self, *, anchors_first: bool = False) -> NDArray[np.float64]:
        """(A, 3): x y of a cell's centre in input pixels, and its stride, in the order of the rows.

        Args:
            anchors_first: a level lists all its cells once for each anchor, rather than all anchors
                of each cell.
        """
        rows = []
        for stride in self.strides:
            height, width = (-(-side // stride) for side in self.size_hw)
            y, x = (np.mgrid[:height, :width].reshape(2, -1) + 0.5) * stride
            cells = np.stack([x, y, np.full(x.size, stride)], axis=1)
            n = self.boxes_per_cell
            rows.append(np.tile(cells, (n, 1)) if anchors_first else np.repeat(cells, n, axis=0))
        return np.concatenate(rows)


def maybe_levels(count: int, size_hw: tuple[int, int]) -> Levels | None:
    """The levels whose cells add up to a number of boxes."""
    for per_cell in BOXES_PER_CELL:
        for strides in LEVELS:
            levels = Levels(size_hw, strides, per_cell)
            if levels.count == count and (len(strides) > 1 or per_cell == 1):
                return levels
    return None


def to_xyxy(boxes: NDArray[Any], box_format: BoxFormat) -> NDArray[np.float64]:
    """Boxes (..., 4) of any format as x1 y1 x2 y2."""
    a, b, c, d = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)
    if box_format == "yxyx":
        a, b, c, d = b, a, d, c
    elif box_format == "xywh":
        c, d = a + c, b + d
    elif box_format == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return np.stack([a, b, c, d], axis=-1)


def measure_units(boxes: Sequence[NDArray[Any]]) -> str | None:
    """ "unit" or "pixels" of boxes [k, 4] for several photographs, k of each.

    None where it cannot be told.
    """
    largest = float(np.percentile(np.abs(np.concatenate(list(boxes))), 99))
    return "unit" if largest <= 1.5 else "pixels" if largest > 4 else None


def measure_format(
    boxes: Sequence[NDArray[Any]], size_hw: tuple[int, int], *, is_unit: bool = False
) -> tuple[BoxFormat | None, str]:
    """What four numbers are, from boxes (a, 4) for several photographs; and how that was seen.

    On a grid a box lies about its cell: of the formats that put boxes there, the nearest.
    Elsewhere, the only format whose boxes have positive sides and lie within the picture.

    Args:
        is_unit: boxes are 0 to 1; else in pixels.
    """
    counts = {len(b) for b in boxes}
    levels = maybe_levels(len(boxes[0]), size_hw) if len(counts) == 1 else None
    if levels is not None and all(_third_follows_first(b) for b in boxes):
        sided = [f for f in ("xyxy", "yxyx") if _have_sides(boxes, f)]
        if not sided:  # corners in another order, or of boxes turned inside out
            return None, "the third number follows the first, and boxes have no positive sides"
    if levels is not None:
        distances = {f: _distance(_in_pixels(boxes, f, size_hw, is_unit), f, levels) for f in FORMATS}  # fmt: skip
        if (between := _centre_or_corner(boxes, size_hw, distances, is_unit=is_unit)) is not None:
            return between
        best, second = sorted(FORMATS, key=lambda f: distances[f])[:2]
        if distances[best] < NEAR and distances[second] > max(
            1.5 * distances[best], distances[best] + 0.2
        ):
            return (
                best,
                f"boxes lie {distances[best]:.2f} strides from their cells, as {second} {distances[second]:.2f}",
            )
    valid = formats_that_fit(boxes, size_hw, is_unit=is_unit)
    if len(valid) == 1:
        return valid[0], "no other format has boxes with positive sides within the pictures"
    return None, f"{len(valid)} formats fit"


def _third_follows_first(boxes: NDArray[Any]) -> bool:
    """Whether the third and fourth number go with the first and second, as those of two corners
    do: the size of a box has nothing to do with where it is.
    """
    values = np.asarray(boxes, np.float64).T
    if np.ptp(values, axis=1).min() == 0:
        return False
    return bool(all(np.corrcoef(values[i], values[i + 2])[0, 1] > 0.9 for i in (0, 1)))


def _have_sides(boxes: Sequence[NDArray[Any]], box_format: BoxFormat) -> bool:
    corners = to_xyxy(np.concatenate(list(boxes)), box_format)
    return bool((corners[:, 2:] > corners[:, :2]).all(axis=1).mean() > 0.5)


def formats_that_fit(
    boxes: Sequence[NDArray[Any]], size_hw: tuple[int, int], *, is_unit: bool = False
) -> list[BoxFormat]:
    """The formats whose boxes have positive sides and lie within the picture; see
    `measure_format`.
    """
    return [f for f in FORMATS if _lies_within(_in_pixels(boxes, f, size_hw, is_unit), f, size_hw)]


def distance_from_cells(
    boxes: Sequence[NDArray[Any]],
    size_hw: tuple[int, int],
    box_format: BoxFormat,
    *,
    is_unit: bool,
) -> float | None:
    """Median distance of boxes from their cells, in strides; None: there is none for each."""
    counts = {len(b) for b in boxes}
    levels = maybe_levels(len(boxes[0]), size_hw) if len(counts) == 1 else None
    if levels is None:
        return None
    return _distance(_in_pixels(boxes, box_format, size_hw, is_unit), box_format, levels)


def _centre_or_corner(
    boxes: Sequence[NDArray[Any]],
    size_hw: tuple[int, int],
    distances: Mapping[BoxFormat, float],
    *,
    is_unit: bool,
) -> tuple[BoxFormat | None, str] | None:
    """Whether the first two numbers are a centre or a corner, where both lie about the cells, as
    with boxes that are all small: a corner is half a size from the centre, so it follows the size.

    None where there is no such question.
    """
    centre, corner = distances["cxcywh"], distances["xywh"]
    nearer, farther = sorted((centre, corner))
    if farther >= min(NEAR, CLEARLY * nearer) or nearer > min(distances.values()):
        return None
    levels = maybe_levels(len(boxes[0]), size_hw)
    if levels is None:
        return None
    slopes = []
    values = np.concatenate([_in_pixels([b], "xywh", size_hw, is_unit)[0] for b in boxes])
    for strides in (levels.strides, levels.strides[::-1]):
        cells = dataclasses.replace(levels, strides=strides).centres()
        cells = np.tile(cells, (len(boxes), 1))
        offset, size = ((values[:, i : i + 2] - j) / cells[:, 2:3] for i, j in ((0, cells[:, :2]), (2, 0)))  # fmt: skip
        near = (np.abs(offset) < 2 * NEAR).all(axis=1) & (size < 4 * NEAR).all(axis=1)
        moved, spread = (x[near] - x[near].mean(axis=0) for x in (offset, size))
        if near.mean() > 0.5 and (spread**2).sum() > 1e-3 * near.sum():
            slopes.append((float((moved * spread).sum() / (spread**2).sum()), float(near.mean())))
    if not slopes:
        return None, "a centre and a corner both fit"
    slope, _ = max(slopes, key=lambda found: found[1])
    said = f"{slope:.2f} of their size"
    if slope > -0.2:
        return (
            "cxcywh",
            f"the first two numbers move from their cells by {said}; those of a corner by -0.5",
        )
    if slope < -0.3:
        return "xywh", f"the first two numbers move from their cells by {said}"
    return None, "a centre and a corner both fit"


def _in_pixels(
    boxes: Sequence[NDArray[Any]], box_format: BoxFormat, size_hw: tuple[int, int], is_unit: bool
) -> Sequence[NDArray[Any]]:
    """Boxes of 0 to 1 times the side that each number belongs to."""
    if not is_unit:
        return boxes
    sides = size_hw if box_format == "yxyx" else size_hw[::-1]
    return [b * np.array([*sides] * 2) for b in boxes]


def _distance(boxes: Sequence[NDArray[Any]], box_format: BoxFormat, levels: Levels) -> float:
    """Median distance of boxes from the centres of their cells, in strides; boxes without a
    positive size count as far.
    """
    nearest = []
    orders = (False, True) if levels.boxes_per_cell > 1 else (False,)
    for strides in (levels.strides, levels.strides[::-1]):
        for anchors_first in orders:
            cells = dataclasses.replace(levels, strides=strides).centres(
                anchors_first=anchors_first
            )
            gaps = []
            for value in boxes:
                corners = to_xyxy(value, box_format)
                centre = (corners[:, :2] + corners[:, 2:]) / 2
                gap = np.abs(centre - cells[:, :2]).max(axis=1) / cells[:, 2]
                gap[(corners[:, 2:] <= corners[:, :2]).any(axis=1)] = np.inf
                gaps.append(gap)
            nearest.append(float(np.median(np.concatenate(gaps))))
    return min(nearest)


def _lies_within(
    boxes: Sequence[NDArray[Any]], box_format: BoxFormat, size_hw: tuple[int, int]
) -> bool:
    corners = to_xyxy(np.concatenate(list(boxes)), box_format)
    limit = np.array([*size_hw[::-1]] * 2)
    ordered = (corners[:, 2:] >= corners[:, :2]).all(axis=1)
    inside = ((corners >= -0.1 * limit) & (corners <= 1.1 * limit)).all(axis=1)
    return bool(ordered.mean() > 0.98 and inside.mean() > 0.9)


# ---- which outputs are left


def unexplained(
    source: OnnxSource, used: Sequence[str], seen: Mapping[str, Sequence[NDArray[Any]]]
) -> list[str]:
    """Declared outputs that the reading does not explain, and that are not known to be of no use.

    Of no use are maps and masks (four dimensions or more), counts, inner tensors of the network
    that the heads follow from, copies of what is read, what shares no dimension with it, and what
    its name says to be something else.
    """
    nodes = Nodes(source.model)
    inner = nodes.tensors_above(used)
    rows = {n for u in used if u in seen for n in seen[u][0].shape[1:]} - {1}
    left = []
    for info in source.model.graph.output:
        name = info.name
        if name in used or name in inner or any(word in name.lower() for word in OF_NO_USE):
            continue
        values, made = seen.get(name), nodes.producer.get(name)
        if values is None:
            left.append(name)
            continue
        if made is not None and made.op_type == "Identity" and made.input[0] in inner:
            continue
        is_count = values[0].size == 1 or values[0].ndim <= 1
        is_map = values[0].ndim >= 4 and values[0].shape[2] > 1
        copies = (u for u in used if u in seen and seen[u][0].shape == values[0].shape)
        is_other = not ({*values[0].shape[1:]} - {1}) & (rows | {4})
        if not (
            is_count
            or is_map
            or is_other
            or any(np.array_equal(seen[u][0], values[0]) for u in copies)
        ):
            left.append(name)
    return left
