# SPDX-License-Identifier: Apache-2.0
"""What can be measured on the outputs of an ONNX export: what they are for photographs, which
columns they were put together from, what a box is.

Nothing here knows a family.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import about
from trtdet.errors import GraphError
from trtdet.families.pixels import Normal, Pixels
from trtdet.geometry import in_layout
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Layout

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


def selected_from(model: onnx.ModelProto, tensors: Iterable[str]) -> list[str]:
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
