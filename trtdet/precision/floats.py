# SPDX-License-Identifier: Apache-2.0
"""Precision as tensor types: an FP32 model in, the same model with an FP16 or BF16 body out.

No TensorRT in here.

input -> preprocessing -> Cast -> body, first to last convolution -> Cast -> box decoding, NMS
         float32                  float16                                   float32

Preprocessing stays float32 because 0-255 minus a mean does not fit float16: at 255 its step is 1/8,
as wide as a whole level of a dark image after normalisation. Box decoding stays because coordinates
of 512 pixels have a step of 1/2 there. Both are element-wise and cost nothing beside the
convolutions. Nothing is clamped: a weight or activation that the type cannot hold leaves its nodes
in float32, and the report says so.

Q/DQ pairs (`trtdet.precision.quantization`, or the model's own) need no Cast, because they end and
begin types by themselves: a QuantizeLinear is of the type of what it reads, a DequantizeLinear of
the type of the node that reads it, and what goes between is INT8 or FP8. That takes opset 19, the
first with float16 scales.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.graph.builder import COMPUTE_OPS, POSITIONS_PREFIX
from trtdet.precision.float_report import KeptNode, PrecisionReport
from trtdet.precision.float_types import (
    BF16,
    FP16,
    FloatType,
    activation_problem,
    narrow_tensor,
    round_to,
    weight_problem,
)
from trtdet.precision.graph_types import (
    PAIR_OPS,
    constants_to_initializers,
    element_types,
    raise_opset,
    replace_nodes,
)
from trtdet.precision.normalisation import statistics
from trtdet.sessions import open_session
from trtdet.sources.subgraphs import captured, reads

#: Nodes that only move values: behind the last convolution they stay narrow, so that one Cast per
#: head suffices.
MOVE_OPS = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
#: Where NMS begins: these operators, and every node with this prefix.
NMS_OPS = frozenset(
    ["BatchedNMSDynamic_TRT", "BatchedNMS_TRT", "EfficientNMS_TRT", "NonMaxSuppression"]
)
NMS_PREFIX = "nms/"
#: Nodes that are left as they are: their float inputs have a type of their own.
FIXED_OPS = frozenset(["If", "Loop", "Range", "Scan"])
#: Inputs that ONNX defines as float32 whatever the data is: regions of interest and scales.
FLOAT32_INPUTS: Mapping[str, frozenset[int]] = {
    "Resize": frozenset([1, 2]),
    "Upsample": frozenset([1]),
}


def to_fp16(
    model: onnx.ModelProto,
    *,
    keep_fp32: Sequence[str] = (),
    ranges: Mapping[str, float] | None = None,
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """A copy of the model with its body in float16; inputs and outputs keep their types.

    Args:
        model: float32; not touched.
        keep_fp32: patterns (`*`, `?`) of node names that stay float32.
        ranges: tensor -> largest magnitude, from `activation_ranges`; None: activations are taken
            to fit.

    Raises:
        GraphError: nothing to convert, or a model that is not float32.
    """
    return _Conversion(model, FP16, keep_fp32, ranges or {}).run()


def to_bf16(
    model: onnx.ModelProto, *, keep_fp32: Sequence[str] = ()
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """As `to_fp16`, with a bfloat16 body: float32's range, so nothing can overflow, and 8 bits of
    precision.

    TensorRT takes the result at any opset; by the letter of ONNX a bfloat16 Conv begins at opset
    22, and ONNX Runtime's CPU provider has none.
    """
    return _Conversion(model, BF16, keep_fp32, {}).run()


def activation_ranges(
    model: onnx.ModelProto, feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """Largest magnitude of every tensor of the body, over some inputs, by ONNX Runtime on the CPU.

    Streaming: the session returns the minimum and maximum of each tensor, so memory does not grow
    with inputs or tensors.

    Args:
        model: float32, with or without plugins behind the body.
        feeds: input name -> array.

    Returns:
        Tensor -> max |x|; infinity where anything was not finite.

    Raises:
        GraphError: nothing in the model can be converted.
    """
    from trtdet.graph import deformable_attention

    conversion = _Conversion(model, FP16, (), {})
    if not conversion.kept:  # weights beyond FP16 are no reason to measure nothing
        conversion.check()
    tensors = sorted(
        name
        for index in conversion.low | conversion.kept.keys()
        if conversion.nodes[index].op_type not in PAIR_OPS
        for name in conversion.nodes[index].output
        if conversion.is_float(name)
    )
    measured = _range_model(deformable_attention.lower(model), tensors)
    # As written: fusions would be broken up by the outputs, and cost more than the run.
    session = open_session(measured, "the model", optimize=False)
    ranges = dict.fromkeys(tensors, 0.0)
    for feed in feeds:
        extremes = np.abs(np.array(session.run(None, dict(feed)), np.float64)).reshape(-1, 2)
        extremes = np.nan_to_num(extremes, nan=np.inf, posinf=np.inf)
        for name, amax in zip(tensors, extremes.max(axis=1), strict=True):
            ranges[name] = max(ranges[name], float(amax))
    return ranges


def _range_model(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Only what makes `tensors`, with their minimum and maximum as the outputs, in pairs."""
    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    graph = measured.graph
    needed = set(tensors)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(reads(node))
    nodes.reverse()
    outputs = []
    for name in tensors:
        for op in ("ReduceMin", "ReduceMax"):
            nodes.append(helper.make_node(op, [name], [f"{name}/{op}"], keepdims=0))
            outputs.append(helper.make_tensor_value_info(f"{name}/{op}", TensorProto.FLOAT, []))
    replace_nodes(graph, nodes)
    del graph.output[:]
    graph.output.extend(outputs)
    return measured


class _Conversion:
    """One conversion: finds the body, leaves out what does not fit, rewrites the graph."""

    def __init__(
        self,
        model: onnx.ModelProto,
        target: FloatType,
        keep_fp32: Sequence[str],
        ranges: Mapping[str, float],
    ) -> None:
        self.target = target
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        if any(node.op_type in PAIR_OPS for node in self.graph.node):
            raise_opset(self.model)
        self.types = element_types(self.model)
        self.weights = constants_to_initializers(self.graph)
        self.nodes = list(self.graph.node)
        self.taken = self.types.keys() | {name for n in self.nodes for name in n.output}
        self.by_design: dict[int, str] = {}
        self.kept: dict[int, str] = {}
        self.asked: set[int] = set()
        self.low = self._body()
        self._leave_out(keep_fp32, ranges)
        self._settle_pairs()

    def is_float(self, tensor: str) -> bool:
        return self.types.get(tensor) == TensorProto.FLOAT

    def check(self) -> None:
        """Whether there is anything to convert.

        Raises:
            GraphError: there is not.
        """
        if not self.low:
            found = sorted({node.op_type for node in self.nodes if node.op_type in FIXED_OPS})
            raise GraphError(
                f"{self.target.name}: expected a float32 model with convolutions to convert, found nothing that can be converted"
                + (f" (it has {', '.join(found)})" if found else "")
                + "; give the FP32 file that create_onnx.py wrote"
            )

    def run(self) -> tuple[onnx.ModelProto, PrecisionReport]:
        self.check()
        flushed = self._convert_weights()
        casts = self._convert_tensors()
        report = PrecisionReport(
            self.target.name,
            len(self.low),
            self._report(self.by_design),
            self._report(self.kept),
            flushed,
            casts,
        )
        return self.model, report

    def _report(self, reasons: Mapping[int, str]) -> tuple[KeptNode, ...]:
        return tuple(
            KeptNode(self.nodes[i].name, self.nodes[i].op_type, reason, i in self.asked)
            for i, reason in sorted(reasons.items())
        )

    # --- which nodes ------------------------------------------------------------------------------

    def _body(self) -> set[int]:
        """Indices of the nodes to convert; `by_design` gets those that stay float32 because of
        where they stand.
        """
        in_nms = self._downstream({i for i, n in enumerate(self.nodes) if begins_nms(n)})
        compute = {
            i
            for i, node in enumerate(self.nodes)
            if node.op_type in COMPUTE_OPS and i not in in_nms and self._convertible(node)
        }
        leads_to_compute, follows_compute = self._upstream(compute), self._downstream(compute)
        in_statistics = statistics(self.nodes)
        low: set[int] = set()
        narrow: set[str] = set()  # tensors that nodes in `low` make
        for i, node in enumerate(self.nodes):
            if i in in_nms:
                reason = "box decoding and NMS"
            elif node.name.startswith(POSITIONS_PREFIX):
                reason = "positions"
            elif i in in_statistics and i in leads_to_compute:
                reason = "statistics of normalisation"
            elif node.op_type in PAIR_OPS and i in leads_to_compute and self._convertible(node):
                reason = ""  # for now: see `_settle_pairs`
            elif i not in follows_compute:
                reason = "preprocessing"
            elif i in leads_to_compute or self._only_moves(node, narrow):
                reason = "" if self._convertible(node) else "no narrow form"
            else:
                reason = "behind the last convolution"
            if not reason:
                low.add(i)
                narrow.update(node.output)
            elif any(self.is_float(name) for name in (*node.input, *node.output)):
                self.by_design[i] = reason
        return low

    def _convertible(self, node: onnx.NodeProto) -> bool:
        """Whether all its float tensors may become narrow together."""
        if node.domain not in ("", "ai.onnx") or node.op_type in FIXED_OPS:
            return False
        tensors = [*self._data_inputs(node), *node.output]
        known = all(name in self.types for name in tensors)
        return known and any(self.is_float(name) for name in self._data_inputs(node))

    def _only_moves(self, node: onnx.NodeProto, narrow: set[str]) -> bool:
        data = [name for name in self._data_inputs(node) if self.is_float(name)]
        return node.op_type in MOVE_OPS and bool(data) and narrow.issuperset(data)

    def _leave_out(self, keep_fp32: Sequence[str], ranges: Mapping[str, float]) -> None:
        """Move nodes from `low` to `kept`: asked for by name, weights or activations out of
        range.
        """
        bad_weights = {
            name: reason
            for name, weight in self.weights.items()
            if self.is_float(name)
            and (reason := weight_problem(numpy_helper.to_array(weight), self.target))
        }
        for i in sorted(self.low):
            node = self.nodes[i]
            pair = node.op_type in PAIR_OPS
            patterns = [] if pair else [p for p in keep_fp32 if fnmatchcase(node.name, p)]
            if patterns:
                self.asked.add(i)
            reasons = [f"asked for ('{p}')" for p in patterns]
            for name in (*self._data_inputs(node), *node.output):
                if name in bad_weights:
                    reasons.append(f"weights '{name}': {bad_weights[name]}")
                if pair:
                    continue
                if problem := activation_problem(ranges.get(name, 0.0), self.target):
                    reasons.append(f"activation '{name}': {problem}")
            if reasons:
                self.kept[i] = reasons[0]
        self.low.difference_update(self.kept)

    def _settle_pairs(self) -> None:
        """Q and DQ that have float32 neighbours become float32 themselves, rather than have a
        Cast put beside them.
        """
        readers: dict[str, set[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in reads(node):
                readers.setdefault(name, set()).add(i)
        wide: set[int] = set()
        for i in sorted(self.low, reverse=True):
            node = self.nodes[i]
            if node.op_type == "DequantizeLinear" and not readers.get(node.output[0], set()) & self.low - wide:  # fmt: skip
                wide.add(i)
        self.low -= wide
        narrow: set[str] = {name for i in self.low for name in self.nodes[i].output}
        wide |= {i for i in self.low if self.nodes[i].op_type == "QuantizeLinear" and self.nodes[i].input[0] not in narrow}  # fmt: skip
        self.low -= wide
        self.by_design |= dict.fromkeys(wide, "Q/DQ beside float32")

    def _data_inputs(self, node: onnx.NodeProto) -> list[str]:
        """Its inputs, less the absent ones and those that are float32 by definition."""
        fixed = FLOAT32_INPUTS.get(node.op_type, frozenset())
        return [name for k, name in enumerate(node.input) if name and k not in fixed]

    def _downstream(self, start: set[int]) -> set[int]:
        """`start` and all nodes that anything of it reaches."""
        reached: set[str] = set()
        found = set()
        for i, node in enumerate(self.nodes):
            if i in start or reached.intersection(reads(node)):
                found.add(i)
                reached.update(node.output)
        return found

    def _upstream(self, start: set[int]) -> set[int]:
        """`start` and all nodes that reach anything of it."""
        wanted: set[str] = set()
        found = set()
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            if i in start or wanted.intersection(node.output):
                found.add(i)
                wanted.update(reads(node))
        return found

    # --- rewriting --------------------------------------------------------------------------------

    def _narrow_name(self, tensor: str) -> str:
        name = f"{tensor}/{self.target.name.lower()}"
        while name in self.taken:
            name += "_"
        return name

    def _convert_weights(self) -> int:
        """Give nodes of the body narrow weights; one that float32 nodes use too is kept in both
        types. Returns the flushed.
        """
        users: dict[str, list[tuple[int, int]]] = {}  # weight -> (node, input) in the body
        others = {output.name for output in self.graph.output}  # used as float32
        for i, node in enumerate(self.nodes):
            data = self._data_inputs(node) if i in self.low else []
            for k, name in enumerate(node.input):
                if name in data and name in self.weights and self.is_float(name):
                    users.setdefault(name, []).append((i, k))
                else:
                    others.add(name)
            others.update(captured(node))
        flushed = 0
        for name, places in users.items():
            wide = numpy_helper.to_array(self.weights[name])
            narrow_name = self._narrow_name(name) if name in others else name
            narrow = narrow_tensor(wide, self.target, narrow_name)
            flushed += int(np.count_nonzero((round_to(wide, self.target) == 0) & (wide != 0)))
            if name in others:
                self.graph.initializer.append(narrow)
                for i, k in places:
                    self.nodes[i].input[k] = narrow_name
            else:
                self.weights[name].CopyFrom(narrow)
            self.types[name if name not in others else narrow_name] = self.target.onnx_type
        return flushed

    def _convert_tensors(self) -> int:
        """Retype the body's tensors and put a Cast where a tensor crosses its border.

        Returns the number of casts.

        The float32 form of a tensor keeps its name, so outputs and float32 nodes find it unchanged.
        """
        reads_narrow: set[str] = set()
        reads_wide = {output.name for output in self.graph.output}
        for i, node in enumerate(self.nodes):
            data = self._data_inputs(node) if i in self.low else []
            reads_narrow.update(name for name in data if self.is_float(name))
            reads_wide.update(n for n in reads(node) if n not in data)
        made_narrow = {
            name for i in self.low for name in self.nodes[i].output if name and self.is_float(name)
        }
        to_wide = made_narrow & reads_wide
        to_narrow = reads_narrow - made_narrow
        rename = {name: self._narrow_name(name) for name in to_wide | to_narrow}

        rewritten = [
            self._cast(info.name, rename[info.name], self.target.onnx_type)
            for info in self.graph.input
            if info.name in to_narrow
        ]
        for i, node in enumerate(self.nodes):
            outputs = list(node.output)
            if i in self.low:
                data = self._data_inputs(node)
                node.input[:] = [rename.get(n, n) if n in data else n for n in node.input]
                node.output[:] = [rename.get(n, n) for n in outputs]
                _retype_attributes(node, self.target)
            rewritten.append(node)
            for name in outputs:
                if name in to_wide:
                    rewritten.append(self._cast(rename[name], name, TensorProto.FLOAT))
                elif name in to_narrow:
                    rewritten.append(self._cast(name, rename[name], self.target.onnx_type))
        for info in self.graph.value_info:
            if info.name in made_narrow - to_wide:
                info.type.tensor_type.elem_type = self.target.onnx_type
        casts = len(rewritten) - len(self.nodes)
        replace_nodes(self.graph, rewritten)
        return casts

    def _cast(self, source: str, result: str, to: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=to)


def begins_nms(node: onnx.NodeProto) -> bool:
    """Whether a node is, or is the first of, box decoding and suppression."""
    return node.op_type in NMS_OPS or node.name.startswith(NMS_PREFIX)


def _retype_attributes(node: onnx.NodeProto, target: FloatType) -> None:
    """A Cast to float32 within the body is a cast to the body's type."""
    if node.op_type == "Cast":
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = target.onnx_type
