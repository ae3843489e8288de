# SPDX-License-Identifier: Apache-2.0
"""Rewrites of an onnx-graphsurgeon graph that serve every family.

Plain functions, edit in place, small enough to read alone.

`tidy` takes what a converter wrote to what TensorRT, INT8 calibration and a reader want: channels
first throughout, constants folded, batch normalisation inside its convolution, names that say where
a tensor comes from.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtdet.sources.base import run_onnx
from trtdet.spec import Preprocessing

#: Names in every model of stage 1: its input, and the normalised pixels behind it (missing where
#: nothing is to be done).
INPUT, NETWORK_INPUT = "input", "network_input"

#: And those of what `set_input` puts between them.
PREPROCESSING = tuple(
    f"preprocess/{name}"
    for name in ("cast", "transpose", "mean", "subtract_mean", "scale", "multiply_scale", "bgr", "to_bgr")
)  # fmt: skip

TO_NCHW = [0, 3, 1, 2]
TO_NHWC = [0, 2, 3, 1]

#: Operators that treat every element alike: the layout of their result is that of their inputs.
ELEMENTWISE = frozenset(
    (
        *("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"),
        *("Abs", "Cast", "Clip", "Exp", "Identity", "Neg", "Sqrt"),
        *("Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"),
    )
)


#: Operators whose result has as many axes as their first computed input.
KEEPS_RANK = ELEMENTWISE.union(
    ("AveragePool", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "DequantizeLinear", "Dropout", "Gelu",
     "InstanceNormalization", "MaxPool", "Mish", "PRelu", "Pad", "QuantizeLinear", "Resize", "Slice", "Softmax",
     "Softplus", "Split", "Transpose")
)  # fmt: skip


def tidy(graph: gs.Graph, reserved: Iterable[str] = ()) -> gs.Graph:
    """Run every clean-up below, in the order in which each makes room for the next.

    Args:
        reserved: names that inner tensors do not keep, as others get them later.
    """
    sort_nodes(graph.cleanup())
    fold_constants(graph)
    to_channels_first(graph)
    fold_neutral_elements(graph)
    merge_constant_factors(graph)
    fold_batch_norms(graph)
    average_pool_from_mean(graph)
    leave_out_empty_inputs(graph)
    sort_nodes(graph.cleanup())
    rename(graph, reserved)
    return graph


def sort_nodes(graph: gs.Graph) -> None:
    """Topological order that the wiring alone decides, from the outputs back, input by input.

    Converters' order of independent branches is not the same in every run; this one is, and so are
    the names and the order of everything that is written after it.
    """
    there = {id(node) for node in graph.nodes}
    ordered: list[gs.Node] = []
    seen: set[int] = set()
    stack = [
        (node, False) for tensor in reversed(graph.outputs) for node in reversed(tensor.inputs)
    ]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            ordered.append(node)
        elif id(node) in there and id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [
                (maker, False) for tensor in reversed(_read_by(node)) for maker in tensor.inputs
            ]
    graph.nodes[:] = ordered


def _read_by(node: gs.Node) -> list[gs.Tensor]:
    """Tensors that a node reads, and its subgraphs."""
    tensors = list(node.inputs)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            tensors += [
                tensor for child in value.nodes for tensor in _read_by(child)
            ] + value.outputs
    return tensors


def set_input(graph: gs.Graph, preprocessing: Preprocessing, batch: int | str) -> None:
    """Give the graph its public input and put the normalisation behind it.

    input of normalised pixels, [N,3,H,W] or [N,H,W,3] and a transpose
        ->  "input" in `preprocessing`'s layout and dtype, RGB 0-255
        -> Cast (uint8) -> Transpose (NHWC) -> (x - mean) / std -> channels reversed (BGR)

    The normalised tensor is called `NETWORK_INPUT`. TensorRT takes uint8 only at a network input
    that goes straight into a Cast, so the cast comes first.
    """
    (old,) = graph.inputs
    dims = preprocessing.image_dims
    new = gs.Variable(INPUT, np.dtype(preprocessing.dtype), [batch, *dims])
    current = new
    if preprocessing.dtype != "float32":
        current = _append(
            graph, "Cast", "preprocess/cast", [current], {"to": onnx.TensorProto.FLOAT}
        )
    if preprocessing.layout == "NHWC":
        current = _append(graph, "Transpose", "preprocess/transpose", [current], {"perm": TO_NCHW})
    if any(preprocessing.mean):
        mean = gs.Constant("preprocess/mean", _per_channel(preprocessing.mean))
        current = _append(graph, "Sub", "preprocess/subtract_mean", [current, mean])
    if any(value != 1 for value in preprocessing.std):
        scale = gs.Constant("preprocess/scale", 1 / _per_channel(preprocessing.std))
        current = _append(graph, "Mul", "preprocess/multiply_scale", [current, scale])
    if preprocessing.bgr:
        order = gs.Constant("preprocess/bgr", np.array([2, 1, 0], np.int64))
        current = _append(graph, "Gather", "preprocess/to_bgr", [current, order], {"axis": 1})
    if current is not new:
        current.name = NETWORK_INPUT
    current.shape = [batch, 3, *(d for d in dims if d != 3)]
    for node in list(old.outputs):
        if node.op == "Transpose" and list(node.attrs["perm"]) == TO_NCHW:
            for consumer in list(node.outputs[0].outputs):
                _replace_input(consumer, node.outputs[0], current)
        else:
            _replace_input(node, old, current)
    graph.inputs = [new]
    graph.cleanup()
    graph.toposort()


def network_input(preprocessing: Preprocessing) -> str:
    """The tensor of normalised pixels [N, 3, H, W] that `set_input` makes: the input itself where
    nothing has to be done to it.
    """
    as_it_is = preprocessing.dtype == "float32" and preprocessing.layout == "NCHW"
    normal = not any(preprocessing.mean) and all(value == 1 for value in preprocessing.std)
    return INPUT if as_it_is and normal and not preprocessing.bgr else NETWORK_INPUT


def fold_constants(graph: gs.Graph) -> None:
    """Replace what follows from constants alone by its value, computed with ONNX Runtime in one
    call.
    """
    frontier: dict[str, gs.Variable] = {}
    foldable: set[int] = set()
    # Without activations in 8 bits, weights in 8 bits save memory alone.
    has_activations = any(
        node.op == "QuantizeLinear" and isinstance(node.inputs[0], gs.Variable)
        for node in graph.nodes
    )
    for node in graph.nodes:
        inputs_known = all(
            isinstance(t, gs.Constant) or t.is_empty() or id(t) in foldable for t in node.inputs
        )
        known = node.inputs or node.op == "Constant"  # as torch writes constants
        if (
            inputs_known
            and known
            and not _has_subgraph(node)
            and not (has_activations and _quantizes(node))
        ):
            foldable.update(id(t) for t in node.outputs)
        else:
            frontier.update({t.name: t for t in node.inputs if id(t) in foldable})
    frontier.update({t.name: t for t in graph.outputs if id(t) in foldable})
    if not frontier:
        return
    model = gs.export_onnx(graph)
    values = run_onnx(model, list(frontier), {})
    for tensor, value in zip(frontier.values(), values, strict=True):
        tensor.inputs.clear()
        tensor.to_constant(value)
    graph.cleanup()


def _quantizes(node: gs.Node) -> bool:
    """Whether a node is part of a Q/DQ pair, which says what TensorRT computes in 8 bits; a bias
    in INT32 is not.
    """
    if node.op == "DequantizeLinear":
        stored = node.inputs[0]
        return not (isinstance(stored, gs.Constant) and stored.values.dtype == np.int32)
    return bool(node.op == "QuantizeLinear")


def to_channels_first(graph: gs.Graph) -> None:
    """Remove the transposes that a channels-last framework leaves around every convolution.

    Transpose(NHWC->NCHW)(x), x = Transpose(NCHW->NHWC)(y)  ->  y, through any number of
    element-wise operators, reductions and concatenations between. Other consumers of a
    channels-last tensor get one transpose of their own.
    """
    twins: dict[
        int, gs.Variable
    ] = {}  # id of a channels-last tensor -> the same values channels first
    keep_alive: list[gs.Tensor] = []  # ids are only unique among the living
    for node in list(graph.nodes):
        keep_alive.extend([*node.inputs, *node.outputs])
        if node.op == "Transpose" and list(node.attrs.get("perm", [])) == TO_NHWC:
            source = node.inputs[0]
            twins[id(node.outputs[0])] = source
            if _generated(source.name):
                source.name = node.outputs[0].name + "/nchw"
        elif node.op == "Transpose" and list(node.attrs.get("perm", [])) == TO_NCHW:
            if twin := twins.get(id(node.inputs[0])):
                for consumer in list(node.outputs[0].outputs):
                    _replace_input(consumer, node.outputs[0], twin)
                _replace_output(graph, node.outputs[0], twin)
        elif _can_move(node, twins) and (change := _channels_first_form(node)):
            change(node)
            node.inputs = [twins.get(id(t)) or _constant_channels_first(t) for t in node.inputs]
            (old,) = node.outputs
            new = gs.Variable(old.name + "/nchw", old.dtype)
            node.outputs = [new]
            twins[id(old)] = new
    for tensor in keep_alive:
        twin = twins.get(id(tensor))
        if twin is not None and not tensor.inputs and (tensor.outputs or _is_output(graph, tensor)):
            graph.nodes.append(
                gs.Node("Transpose", tensor.name, {"perm": TO_NHWC}, [twin], [tensor])
            )
    graph.cleanup().toposort()


def fold_neutral_elements(graph: gs.Graph) -> None:
    """x * 1, x / 1, x + 0, x - 0, Identity(x)  ->  x, where the constant does not broadcast x to
    another shape.
    """
    for node in list(graph.nodes):
        kept = _neutral_operand(node)
        if kept is None:
            continue
        (output,) = node.outputs
        for consumer in list(output.outputs):
            _replace_input(consumer, output, kept)
        if not _is_output(graph, output):
            node.outputs = []
        elif not _is_output(graph, kept) and kept.inputs and not isinstance(kept, gs.Constant):
            _replace_output(graph, output, kept)
            kept.name, output.name = output.name, kept.name
            kept.dtype, kept.shape = output.dtype, output.shape
            node.outputs = []
    graph.cleanup()


def merge_constant_factors(graph: gs.Graph) -> None:
    """(x * a) * b  ->  x * (a * b) for scalar constants a and b; BiFPN's weighted sums are full
    of it.
    """
    for node in list(graph.nodes):
        outer = _scalar_factor(node)
        if outer is None:
            continue
        x, b = outer
        inner = (
            x.inputs[0] if x.inputs and len(x.outputs) == 1 and not _is_output(graph, x) else None
        )
        if inner is not None and (found := _scalar_factor(inner)):
            product = np.asarray(found[1].values * b.values)
            node.inputs = [found[0], gs.Constant(b.name + "/merged", product)]
            inner.outputs = []
    graph.cleanup()


def fold_batch_norms(graph: gs.Graph) -> None:
    """BatchNormalization(Conv(x, w, b))  ->  Conv(x, w * s, (b - mean) * s + beta), s = gamma /
    sqrt(var + epsilon).

    Weights shared by several convolutions (EfficientDet's heads share theirs over the levels, each
    with its own batch normalisation) are copied: INT8 needs one scale per convolution.
    """
    for node in graph.nodes:
        if node.op != "BatchNormalization":
            continue
        conv = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        parameters = node.inputs[1:5]
        if (
            conv is None
            or conv.op != "Conv"
            or len(node.inputs[0].outputs) != 1
            or _is_output(graph, node.inputs[0])
            or not all(isinstance(t, gs.Constant) for t in [*conv.inputs[1:], *parameters])
        ):
            continue
        gamma, beta, mean, variance = (t.values.astype(np.float64) for t in parameters)
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        weight = conv.inputs[1].values.astype(np.float64)
        weight *= scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = conv.inputs[2].values.astype(np.float64) if len(conv.inputs) > 2 else 0.0
        name = node.outputs[0].name
        conv.inputs = [
            conv.inputs[0],
            gs.Constant(f"{name}/weight", weight.astype(np.float32)),
            gs.Constant(f"{name}/bias", ((bias - mean) * scale + beta).astype(np.float32)),
        ]
        (output,) = node.outputs
        node.outputs = []
        conv.outputs = [output]
    graph.cleanup()


def average_pool_from_mean(graph: gs.Graph) -> None:
    """ReduceMean over height and width of [N, C, H, W], axes kept  ->  GlobalAveragePool, which
    every INT8 recipe knows.
    """
    for node in graph.nodes:
        if (
            node.op == "ReduceMean"
            and _axes(node) == [2, 3]
            and node.attrs.get("keepdims", 1) == 1
            and _maybe_rank(node.inputs[0]) == 4
        ):
            node.op, node.attrs, node.inputs = "GlobalAveragePool", {}, node.inputs[:1]


def _maybe_rank(tensor: gs.Tensor) -> int | None:
    """Number of axes, as the file says, or as a convolution before it does; None where neither
    does.
    """
    while tensor.shape is None:
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not node.inputs:
            return None
        if node.op in ("Conv", "ConvTranspose") and isinstance(node.inputs[1], gs.Constant):
            return int(node.inputs[1].values.ndim)
        if node.op not in KEEPS_RANK:
            return None
        computed = [t for t in node.inputs if isinstance(t, gs.Variable)]
        tensor = (computed or node.inputs)[0]
    return len(tensor.shape)


def leave_out_empty_inputs(graph: gs.Graph) -> None:
    """Resize(x, [], scales)  ->  Resize(x, , scales): TensorRT warns of every initializer without
    data.

    Before opset 13 the region of interest may not be left out.
    """
    if graph.opset < 13:
        return
    for node in graph.nodes:
        if node.op == "Resize":
            node.inputs = [
                gs.Variable.empty() if isinstance(t, gs.Constant) and not t.values.size else t
                for t in node.inputs
            ]


def rename(graph: gs.Graph, reserved: Iterable[str] = ()) -> None:
    """Name nodes and tensors after the framework's operations, without converters' counters; the
    same input gives the same names.

    A node is called what its first result is called; constants are called `<node>/weight`, `/bias`
    or `/constant`.
    """
    public = {id(t) for t in [*graph.inputs, *graph.outputs]}
    taken = {t.name for t in [*graph.inputs, *graph.outputs]}
    taken.update(reserved, (INPUT, NETWORK_INPUT), PREPROCESSING)

    def unique(name: str) -> str:
        candidate, number = name, 1
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate)
        return candidate

    named_constants: set[int] = set()
    for node in graph.nodes:
        stem = _clean_name(node.outputs[0].name) or node.op
        for tensor in node.outputs:
            if id(tensor) not in public:
                tensor.name = unique(stem)
        node.name = node.outputs[0].name
        for position, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and id(tensor) not in named_constants:
                named_constants.add(id(tensor))
                role = (
                    {1: "weight", 2: "bias"}.get(position, "constant")
                    if node.op == "Conv"
                    else "constant"
                )
                tensor.name = unique(f"{node.name}/{role}")


def _can_move(node: gs.Node, twins: dict[int, gs.Variable]) -> bool:
    """Whether some input is known channels first, and no other is a variable in an unknown
    layout.
    """
    others = [t for t in node.inputs if id(t) not in twins]
    return len(others) < len(node.inputs) and all(
        isinstance(t, gs.Constant) or t.is_empty() for t in others
    )


def _channels_first_form(node: gs.Node) -> Callable[[gs.Node], None] | None:
    """How a node's attributes change when its channels-last inputs become channels first.

    None if it cannot be moved.
    """
    if node.op in ELEMENTWISE:
        return lambda _: None
    if node.op == "Concat" and node.attrs["axis"] % 4 == 3:
        return lambda n: n.attrs.update(axis=1)
    if node.op == "ReduceMean" and node.attrs.get("keepdims", 1) == 1 and _axes(node):
        return _reduce_channels_first
    return None


def _reduce_channels_first(node: gs.Node) -> None:
    axes = sorted(TO_NCHW.index(axis % 4) for axis in _axes(node) or [])
    if "axes" in node.attrs:
        node.attrs["axes"] = axes
    else:
        node.inputs[1] = gs.Constant(f"{node.name}/axes", np.array(axes, np.int64))


def _axes(node: gs.Node) -> list[int] | None:
    """The constant axes of a reduction: an attribute before opset 18, an input since."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        return [int(axis) for axis in node.inputs[1].values]
    return None


def _constant_channels_first(tensor: gs.Tensor) -> gs.Tensor:
    """A constant that broadcasts against NHWC, reshaped to broadcast against NCHW."""
    if (
        not isinstance(tensor, gs.Constant)
        or tensor.values.size == 1
        or tensor.values.dtype == np.int64
    ):
        return tensor
    values: NDArray[np.float32] = tensor.values
    values = values.reshape((1,) * (4 - values.ndim) + values.shape).transpose(TO_NCHW)
    return gs.Constant(tensor.name + "/nchw", np.ascontiguousarray(values))


def _neutral_operand(node: gs.Node) -> gs.Tensor | None:
    if node.op == "Identity":
        return node.inputs[0]
    neutral = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}.get(node.op)
    if neutral is None:
        return None
    for position in (1, 0) if node.op in ("Mul", "Add") else (1,):
        constant, other = node.inputs[position], node.inputs[1 - position]
        if (
            isinstance(constant, gs.Constant)
            and constant.values.size == 1
            and constant.values.ndim <= 1  # [1,1,1,1] would raise the rank of a smaller x
            and constant.values.item() == neutral
            and not isinstance(other, gs.Constant)
        ):
            return other
    return None


def _scalar_factor(node: gs.Node) -> tuple[gs.Variable, gs.Constant] | None:
    """(x, c) of a product x * c with a scalar constant c."""
    if node.op != "Mul":
        return None
    for x, c in (node.inputs, node.inputs[::-1]):
        if isinstance(c, gs.Constant) and c.values.size == 1 and isinstance(x, gs.Variable):
            return x, c
    return None


def _append(
    graph: gs.Graph,
    op: str,
    name: str,
    inputs: list[gs.Tensor],
    attrs: dict[str, object] | None = None,
) -> gs.Variable:
    output = gs.Variable(name, np.float32)
    graph.nodes.append(gs.Node(op, name, attrs or {}, inputs, [output]))
    return output


def _per_channel(values: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(values), np.float32).reshape(1, 3, 1, 1)


def _replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    node.inputs = [new if t is old else t for t in node.inputs]


def _replace_output(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    graph.outputs = [new if t is old else t for t in graph.outputs]


def _is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(t is tensor for t in graph.outputs)


def _has_subgraph(node: gs.Node) -> bool:
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _generated(name: str) -> bool:
    """Whether a converter made the name up: `Resize__612:0`."""
    return re.match(r"^[A-Z]\w*?__\d+(:\d+)?$", name) is not None


def _clean_name(name: str) -> str:
    """`a/b__12:0/nchw` -> `a/b`; `StatefulPartitionedCall/` says nothing."""
    name = name.removesuffix("/nchw")
    name = re.sub(r":\d+$", "", name)
    name = re.sub(r"(__\d+)+$", "", name)
    return re.sub(r"^(StatefulPartitionedCall|PartitionedCall)/", "", name)
