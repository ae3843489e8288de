# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as torch exports it, recognised:
`trtdet.graph.deformable_attention` has what it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from trtdet.graph.builder import Dims, known_types
from trtdet.sources.base import constants_of

#: Operators that only rearrange: what stands between a tensor of the attention and the GridSamples
#: made of it.
_REARRANGING = frozenset(
    ["Cast", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)


@dataclass(frozen=True)
class Attention:
    """One deformable attention as torch wrote it.

    Attributes:
        samples: GridSamples, one for each level in the order of the levels.
        sizes_hw: of the levels. points_of: P_l of each.
        heads: M. channels: D. queries: Q.
        weights: tensor [N*M, 1, Q, L*P].
        output: tensor [N*M, D, Q], the sum.
    """

    samples: tuple[onnx.NodeProto, ...]
    sizes_hw: tuple[tuple[int, int], ...]
    points_of: tuple[int, ...]
    heads: int
    channels: int
    queries: int
    weights: str
    output: str

    @property
    def points(self) -> int:
        """P, of every part: the greatest number that divides the points of every level."""
        return math.gcd(*self.points_of)

    @property
    def parts(self) -> tuple[int, ...]:
        """The level of each part: a level with k * P points has k."""
        counts = enumerate(n // self.points for n in self.points_of)
        return tuple(level for level, count in counts for _ in range(count))


class Graph:
    """A model's nodes by what they make and read, its constants, and the shapes that can be
    inferred.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = constants_of(model)
        self.learned: dict[
            str, Dims
        ] = {}  # what inference may not see: shapes of the plugin's inputs
        stripped = onnx.ModelProto()  # what the exporter said of inner shapes may be vaguer
        stripped.CopyFrom(model)
        del stripped.graph.value_info[:]
        self.types = known_types(stripped, [*self.producer])

    def dims(self, name: str) -> Dims:
        return self.types[name][1] if name in self.types else []

    def ends_with(self, name: str, dims: Sequence[int]) -> bool:
        """Whether the tensor has these dimensions behind its first."""
        found = self.dims(name)
        return len(found) == len(dims) + 1 and found[1:] == list(dims)

    def maybe_only_reader(self, name: str, op: str) -> onnx.NodeProto | None:
        readers = [node for node in self.readers.get(name, []) if node.op_type != "Shape"]
        return readers[0] if len(readers) == 1 and readers[0].op_type == op else None

    def maybe_origin(self, name: str, dims: Sequence[int]) -> str | None:
        """The nearest tensor [?, *dims] above `name` with nothing but rearrangements between;
        `name` itself counts.
        """
        while not self.ends_with(name, dims):
            node = self.producer.get(name)
            if node is None or node.op_type not in _REARRANGING:
                return None
            name = node.input[0]
        return name


def maybe_attention(graph: Graph, first: onnx.NodeProto) -> Attention | str:
    """The attention that a GridSample belongs to, or what is missing of it, as a sentence."""
    join = _maybe_join(graph, first)
    if join is None:
        return "expected a Concat of all levels behind it"
    samples = []
    for name in join.input:
        sample = graph.producer.get(name)
        if sample is not None and sample.op_type == "Unsqueeze":
            sample = graph.producer.get(sample.input[0])
        if sample is None or sample.op_type != "GridSample":
            return f"expected a GridSample for every level before Concat '{join.name}'"
        if reason := _other_sampling(sample):
            return reason
        samples.append(sample)
    joined = _follow(graph, join.output[0], "Reshape")
    product = graph.maybe_only_reader(joined, "Mul")
    total = graph.maybe_only_reader(product.output[0], "ReduceSum") if product is not None else None
    if product is None or total is None:
        return f"expected Reshape, Mul and ReduceSum behind Concat '{join.name}'"
    (weights,) = [name for name in product.input if name != joined] or [""]
    sizes = [graph.dims(sample.input[0])[2:] for sample in samples]
    channels = graph.dims(first.input[0])[1:2]
    queries_of, points_of = ([graph.dims(s.input[1])[i : i + 1] for s in samples] for i in (1, 2))
    known = [*channels, *(x for dims in (*sizes, *queries_of, *points_of) for x in dims)]
    if len(known) != 1 + 4 * len(samples) or not all(isinstance(x, int) for x in known):
        return "its shapes are not constant"
    d, queries = int(channels[0] or 0), int(queries_of[0][0] or 0)
    heads = _maybe_heads(graph, total.output[0], d, queries)
    if heads is None:
        return f"expected a Reshape to [N, heads * {d}, {queries}] behind ReduceSum '{total.name}'"
    return Attention(
        tuple(samples),
        tuple((int(h or 0), int(w or 0)) for h, w in sizes),
        tuple(int(n or 0) for (n,) in points_of),
        heads, d, queries, weights, total.output[0],
    )  # fmt: skip


def _maybe_join(graph: Graph, sample: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Concat of the levels: of a new axis between queries and points (torch's stack), or
    along the points.
    """
    unsqueeze = graph.maybe_only_reader(sample.output[0], "Unsqueeze")
    return graph.maybe_only_reader((unsqueeze or sample).output[0], "Concat")


def _follow(graph: Graph, name: str, op: str) -> str:
    """The result of the reader of that type, or the tensor itself."""
    reader = graph.maybe_only_reader(name, op)
    return reader.output[0] if reader is not None else name


def _other_sampling(sample: onnx.NodeProto) -> str:
    """Why a GridSample is not the one of deformable attention; empty where it is."""
    attributes = {a.name: helper.get_attribute_value(a) for a in sample.attribute}
    mode = attributes.get("mode", b"bilinear")
    if mode not in (b"bilinear", b"linear") or attributes.get("padding_mode", b"zeros") != b"zeros":
        return "expected bilinear sampling with zeros outside"
    return "expected align_corners=0" if attributes.get("align_corners", 0) else ""


def _maybe_heads(graph: Graph, total: str, channels: int, queries: int) -> int | None:
    """M of [N*M, D, Q] -> [N, M*D, Q]."""
    reader = graph.maybe_only_reader(total, "Reshape")
    dims = graph.dims(reader.output[0]) if reader is not None else []
    if (
        len(dims) == 3
        and dims[2] == queries
        and isinstance(dims[1], int)
        and not dims[1] % channels
    ):
        return dims[1] // channels
    return None
