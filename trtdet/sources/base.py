# SPDX-License-Identifier: Apache-2.0
"""The model as trained: its graph, and how a part of it is cut out and run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import onnx.version_converter
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.sessions import FATAL_ERRORS, Session, SessionError, open_session
from trtdet.sources.subgraphs import reads
from trtdet.spec import ModelSpec

#: A tensor's shape; None where it is dynamic.
Shape = Sequence[int | None]

#: One vocabulary for both kinds of graph: ONNX's names, where TensorFlow's differ only in name.
CANONICAL_OPS = {
    "Conv2D": "Conv",
    "DepthwiseConv2dNative": "Conv",
    "ConcatV2": "Concat",
    "RealDiv": "Div",
    "AddV2": "Add",
    "NonMaxSuppressionV3": "NonMaxSuppression",
    "NonMaxSuppressionV4": "NonMaxSuppression",
    "NonMaxSuppressionV5": "NonMaxSuppression",
}


@dataclass(frozen=True)
class SourceNode:
    """One operation. Tensors are named `name:k` in TensorFlow graphs, freely in ONNX ones."""

    name: str
    op: str  # canonical, see CANONICAL_OPS
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: NDArray[Any] | None = None  # of a constant
    function: str = ""  # the function it is in; "" is the main graph


@dataclass
class SourceGraph:
    """Nodes by the name of what they produce, with the bodies of loops beside them.

    Attributes:
        nodes: of the main graph, by the tensor they produce, without TensorFlow's `:k`.
        inputs: the model's input tensors.
        outputs: what the model calls its outputs -> their tensors.
        batch: the batch size it was exported with, None where it is dynamic.
        image_shape: of the first input, as far as it is declared: [None, None, None, 3].
        functions: name -> nodes of a loop body, in the same form.
        calls: (function, argument name) -> the tensors of the main graph (or of the calling
            function) it is called with.
    """

    nodes: dict[str, SourceNode]
    inputs: tuple[str, ...]
    batch: int | None = None
    image_shape: tuple[int | None, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    functions: dict[str, dict[str, SourceNode]] = field(default_factory=dict)
    calls: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def maybe_producer(self, tensor: str, function: str = "") -> SourceNode | None:
        """The node that makes `tensor`, or None for an input of the graph or an argument of the
        function.
        """
        nodes = self.functions[function] if function else self.nodes
        return nodes.get(tensor) or nodes.get(tensor.split(":")[0])

    def parents(self, node: SourceNode) -> Iterator[SourceNode]:
        """The nodes that make the inputs of `node`, in the same function."""
        for tensor in node.inputs:
            if producer := self.maybe_producer(tensor, node.function):
                yield producer

    def ancestors(self, node: SourceNode) -> dict[str, SourceNode]:
        """`node` and every node of the same function upstream of it, by name."""
        seen = {node.name: node}
        pending = [node]
        while pending:
            for parent in self.parents(pending.pop()):
                if parent.name not in seen:
                    seen[parent.name] = parent
                    pending.append(parent)
        return seen

    def all_nodes(self) -> Iterator[SourceNode]:
        """Every node, those of functions too."""
        yield from self.nodes.values()
        for body in self.functions.values():
            yield from body.values()

    def maybe_constant(self, tensor: str, function: str = "") -> NDArray[Any] | None:
        """The value of a tensor that is constant, also through identities and as the argument of
        a loop body.
        """
        node = self.maybe_producer(tensor, function)
        if node is None:
            for caller, argument in self.calls.get((function, tensor.split(":")[0]), []):
                if (value := self.maybe_constant(argument, caller)) is not None:
                    return value
            return None
        if node.value is not None:
            return node.value
        if node.op in ("Identity", "Enter", "StopGradient"):
            return self.maybe_constant(node.inputs[0], function)
        return None


class Source(Protocol):
    """A trained model, whatever file it came in."""

    path: Path
    graph: SourceGraph
    #: What stage 1 knew, where it wrote the file; None for a model as it was trained.
    spec: ModelSpec | None

    def run(self, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The values of the tensors `fetches`, given those of `feeds` (inputs or inner tensors).

        What is fed to an input is cast to the input's type.
        """
        ...

    def extract(
        self, inputs: Mapping[str, Shape], outputs: Sequence[str], *, opset: int | None
    ) -> onnx.ModelProto:
        """The part between two sets of tensors as an ONNX model with the same tensor names.

        Args:
            inputs: tensors with the shapes they shall have; inputs of the model keep their type,
                others are float32.
            opset: None: that of an ONNX source, raised where it is too old for INT8; the default
                for others.
        """
        ...

    def __enter__(self) -> "Source": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def cut_onnx(
    model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]
) -> onnx.ModelProto:
    """The nodes between `inputs` and `outputs`, with the initializers they use; types of cut
    tensors stay open.

    Unlike `onnx.utils.extract_model` it needs no inferred shapes, so custom operators elsewhere in
    the graph do no harm.

    Raises:
        GraphError: an output is not in the graph, or depends on a graph input that is not among
            `inputs`.
    """
    inputs, outputs = list(inputs), list(outputs)
    producer = {tensor: node for node in model.graph.node for tensor in node.output}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    known = {
        info.name: info
        for info in [*model.graph.input, *model.graph.output, *model.graph.value_info]
    }
    needed: set[int] = set()
    used: set[str] = set()
    pending = list(outputs)
    while pending:
        tensor = pending.pop()
        if not tensor or tensor in used:
            continue
        used.add(tensor)
        if tensor in inputs or tensor in initializers:
            continue
        node = producer.get(tensor)
        if node is None:
            raise GraphError(
                f"cutting the graph: expected '{tensor}' to follow from {inputs}, nothing produces it"
            )
        if id(node) not in needed:
            needed.add(id(node))
            pending.extend(sorted(reads(node)))
    graph = onnx.helper.make_graph(
        [node for node in model.graph.node if id(node) in needed],
        model.graph.name or "trtdet",
        [
            known.get(name)
            or onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in inputs
        ],
        [known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs],
        [initializers[name] for name in sorted(used & initializers.keys())],
        value_info=[info for info in model.graph.value_info if info.name in used],
    )
    cut = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    cut.metadata_props.extend(model.metadata_props)
    return cut


def nodes_between(
    model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]
) -> list[onnx.NodeProto]:
    """The nodes that `outputs` follow from, those above `inputs` left out; no weight is copied."""
    producer = {tensor: node for node in model.graph.node for tensor in node.output}
    reached, pending = set(inputs), list(outputs)
    needed: set[int] = set()
    while pending:
        tensor = pending.pop()
        node = None if tensor in reached else producer.get(tensor)
        reached.add(tensor)
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            pending.extend(sorted(reads(node)))
    return [node for node in model.graph.node if id(node) in needed]


def constants_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initializers, and what Constant nodes make."""
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    values[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)
    return values


def run_onnx(
    model: onnx.ModelProto, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run part of a model with ONNX Runtime: CPU, graph optimisations off, so that every operator
    is computed as written.

    Args:
        fetches: tensors to return, outputs or inner ones.
        feeds: tensor -> value, inputs or inner ones.
    """
    return run_part(open_part(model, fetches, feeds), fetches, feeds)


def open_part(
    model: onnx.ModelProto, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> Session:
    """The part of a model that `run_onnx` runs, opened; for values of other sizes too."""
    cut = cut_onnx(model, feeds, fetches)
    # A newer onnx may stamp what this ONNX Runtime does not read.
    cut.ir_version = min(cut.ir_version, 10)
    for info in cut.graph.input:  # inner tensors carry no type; the fed value does
        value = feeds[info.name]
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, elem_type, [None] * value.ndim))
    part = f"the graph up to {list(fetches)}"
    try:  # what ONNX Runtime has to say is in the exception
        return open_session(cut, part, optimize=False, log_level=FATAL_ERRORS)
    except SessionError as error:
        raise GraphError(str(error)) from error


def run_part(
    session: Session, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """What ONNX Runtime computes.

    Raises:
        GraphError: what it says.
    """
    try:
        return session.run(fetches, feeds)
    except SessionError as error:
        raise GraphError(str(error)) from error
