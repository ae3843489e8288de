# SPDX-License-Identifier: Apache-2.0
"""The model as it was trained: a graph to read, to run piecewise, and to cut a part out of.

`Source` hides whether the model came as a TensorFlow SavedModel (`trtdet.saved_model`) or as an ONNX file (`OnnxSource`). A
family looks for its landmarks in `Source.graph`, measures what it cannot read with `Source.run`, and names the tensors between
which `Source.extract` cuts the network out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.errors import GraphError
from trtdet.spec import ModelSpec

#: INT8 weights with a scale per channel take opset 13. TensorRT 8.6 reads up to 17.
OLDEST_OPSET, NEWEST_OPSET = 13, 17
#: A tensor's shape; None where it is free.
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
        batch: the batch size it was exported with, None where it is free.
        image_shape: of the first input, as far as it is declared: [None, None, None, 3].
        functions: name -> nodes of a loop body, in the same form.
        calls: (function, argument name) -> the tensors of the main graph (or of the calling function) it is called with.
    """

    nodes: dict[str, SourceNode]
    inputs: tuple[str, ...]
    batch: int | None = None
    image_shape: tuple[int | None, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    functions: dict[str, dict[str, SourceNode]] = field(default_factory=dict)
    calls: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def maybe_producer(self, tensor: str, function: str = "") -> SourceNode | None:
        """The node that makes `tensor`, or None for an input of the graph or an argument of the function."""
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
        """The value of a tensor that is constant, also through identities and as the argument of a loop body."""
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
            inputs: tensors with the shapes they shall have; inputs of the model keep their type, others are float32.
            opset: None: that of an ONNX source, raised where it is too old for INT8; the default for others.
        """
        ...

    def __enter__(self) -> "Source": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class OnnxSource(Closing):
    """A model in an ONNX file, run with ONNX Runtime on the CPU, graph optimisations off."""

    def __init__(self, path: Path, edit: Callable[[onnx.ModelProto], object] | None = None) -> None:
        """Load.

        Args:
            edit: changes the model before it is looked at.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"--source_onnx: expected an ONNX file, found nothing at {path}"
            )
        self.path = path
        self.model = load_onnx(path)
        if edit:
            edit(self.model)
        self.graph = _read_onnx_graph(self.model)
        self.spec = ModelSpec.maybe_from_onnx(self.model)
        self._dtypes = {
            info.name: onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            for info in self.model.graph.input
        }

    def run(self, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        from trtdet import deformable_attention  # which needs this module

        cast = {name: x.astype(self._dtypes.get(name, x.dtype)) for name, x in feeds.items()}
        return run_onnx(deformable_attention.lower(self.model), fetches, cast)

    def extract(
        self, inputs: Mapping[str, Shape], outputs: Sequence[str], *, opset: int | None
    ) -> onnx.ModelProto:
        found = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        model = cut_onnx(self.model, inputs, outputs)
        if any(_frees_size(info, inputs[info.name]) for info in model.graph.input):
            del model.graph.value_info[:]  # what it says of shapes is of the size that was
            for output in model.graph.output:
                output.type.tensor_type.ClearField("shape")
        for info in model.graph.input:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(
                self._dtypes.get(info.name, np.dtype(np.float32))
            )
            info.CopyFrom(
                onnx.helper.make_tensor_value_info(info.name, dtype, list(inputs[info.name]))
            )
        _resize_to_sizes(model, inputs)
        if opset is None:
            opset = found if found >= OLDEST_OPSET else NEWEST_OPSET
        if opset == found:
            return model
        if opset < found:
            raise GraphError(
                f"--opset {opset}: {self.path} has opset {found}, which cannot be lowered; convert from the SavedModel"
            )
        try:
            return onnx.version_converter.convert_version(model, opset)
        except (RuntimeError, onnx.version_converter.ConvertError) as error:
            raise GraphError(
                f"--opset {opset}: {self.path} cannot be raised from {found}: {error}"
            ) from error

    def close(self) -> None:
        """Nothing is held."""


def _frees_size(info: onnx.ValueInfoProto, shape: Shape) -> bool:
    """Whether a size beside the batch is fixed in the model and free in `shape`."""
    declared = info.type.tensor_type.shape.dim[1:]
    return any(dim.dim_value and n is None for dim, n in zip(declared, shape[1:], strict=False))


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        GraphError: the file is not ONNX.
    """
    try:
        model = onnx.load(path)
    except (
        Exception
    ) as error:  # protobuf raises its own DecodeError, external data OSError or ValueError
        raise GraphError(f"{path}: expected an ONNX file, could not read it ({error})") from error
    if not model.graph.output or not model.opset_import:
        raise GraphError(f"{path}: expected an ONNX model, found a file without outputs")
    return model


def cut_onnx(
    model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]
) -> onnx.ModelProto:
    """The nodes between `inputs` and `outputs`, with the initializers they use; types of cut tensors stay open.

    Unlike `onnx.utils.extract_model` it needs no inferred shapes, so custom operators elsewhere in the graph do no harm.

    Raises:
        GraphError: an output is not in the graph, or depends on a graph input that is not among `inputs`.
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
            pending.extend([*node.input, *_captured(node)])
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


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that the sub-graphs of If, Loop and Scan take from outside."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = {t for n in attribute.g.node for t in n.output}
            inner |= {t.name for t in [*attribute.g.input, *attribute.g.initializer]}
            for child in attribute.g.node:
                yield from (t for t in [*child.input, *_captured(child)] if t not in inner)
            yield from (t.name for t in attribute.g.output if t.name not in inner)


def run_onnx(
    model: onnx.ModelProto, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run part of a model with ONNX Runtime: CPU, graph optimisations off, so that every operator is computed as written.

    Args:
        fetches: tensors to return, outputs or inner ones.
        feeds: tensor -> value, inputs or inner ones.
    """
    import onnxruntime as ort

    cut = cut_onnx(model, feeds, fetches)
    cut.ir_version = min(
        cut.ir_version, 10
    )  # a newer onnx may stamp what this ONNX Runtime does not read
    for info in cut.graph.input:  # inner tensors carry no type; the fed value does
        value = feeds[info.name]
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, elem_type, [None] * value.ndim))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what it has to say is in the exception
    try:
        session = ort.InferenceSession(
            cut.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(list(fetches), dict(feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise GraphError(
            f"ONNX Runtime cannot run the graph up to {list(fetches)}: {error}"
        ) from error


def _read_onnx_graph(model: onnx.ModelProto) -> SourceGraph:
    nodes = {
        tensor.name: SourceNode(
            tensor.name, "Const", (), (tensor.name,), onnx.numpy_helper.to_array(tensor)
        )
        for tensor in model.graph.initializer
    }
    for number, proto in enumerate(model.graph.node):
        value = None
        if proto.op_type == "Constant":
            value = next(
                (onnx.numpy_helper.to_array(a.t) for a in proto.attribute if a.name == "value"),
                None,
            )
        node = SourceNode(
            proto.name or f"{proto.op_type}_{number}",
            CANONICAL_OPS.get(proto.op_type, proto.op_type),
            tuple(tensor for tensor in proto.input if tensor),
            tuple(proto.output),
            value,
        )
        nodes.update(dict.fromkeys(proto.output, node))
    inputs = tuple(i.name for i in model.graph.input if i.name not in nodes)
    dimensions = model.graph.output[0].type.tensor_type.shape.dim
    batch = dimensions[0].dim_value if dimensions else 0
    declared = next(
        (i.type.tensor_type.shape.dim for i in model.graph.input if i.name in inputs), ()
    )
    shape = tuple(d.dim_value or None for d in declared)
    outputs = {output.name: output.name for output in model.graph.output}
    return SourceGraph(nodes, inputs, batch or None, shape, outputs)


def _resize_to_sizes(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> None:
    """Give every Resize with fractional scales the size that it has when the model runs, in place of the scales.

    5/3 is floored differently by every runtime, and by shape inference.
    """
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    constants |= {
        n.output[0]: onnx.numpy_helper.to_array(a.t)
        for n in model.graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    }
    resizes = []
    for node in model.graph.node:
        scales = (
            constants.get(node.input[2])
            if node.op_type == "Resize" and len(node.input) == 3
            else None
        )
        if scales is not None and scales.size == 4 and (scales != scales.round()).any():
            resizes.append(node)
    if not resizes:
        return
    zeros = {
        name: np.zeros([1 if size is None else size for size in shape], np.float32)
        for name, shape in inputs.items()
    }
    values = run_onnx(model, [node.output[0] for node in resizes], zeros)
    for node, value in zip(resizes, values, strict=True):
        name = node.output[0]
        constant = {f"{name}/start": [0], f"{name}/end": [2], f"{name}/size_hw": value.shape[2:]}
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array(x, np.int64), key) for key, x in constant.items()
        )
        make = onnx.helper.make_node
        arithmetic = [
            make("Shape", [node.input[0]], [f"{name}/shape"]),
            make("Slice", [f"{name}/shape", f"{name}/start", f"{name}/end"], [f"{name}/kept"]),
            make("Concat", [f"{name}/kept", f"{name}/size_hw"], [f"{name}/sizes"], axis=0),
        ]
        position = next(
            i for i, n in enumerate(model.graph.node) if n is node or n.output[0] == name
        )
        for offset, extra in enumerate(arithmetic):
            model.graph.node.insert(position + offset, extra)
        target = model.graph.node[position + len(arithmetic)]
        target.input[2] = ""
        target.input.append(f"{name}/sizes")
