# SPDX-License-Identifier: Apache-2.0
"""TensorFlow SavedModels as a `Source`.

The only module that imports tensorflow and tf2onnx, and only once it is used.

The variables are frozen into constants and functions are inlined, so that one flat graph remains;
loops stay functional, and their bodies can be read. `extract` cuts the GraphDef first and hands
tf2onnx nothing but the part asked for: preprocessing, NMS and loops never reach it.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.errors import GraphError
from trtdet.sources.base import CANONICAL_OPS, Shape, SourceGraph, SourceNode
from trtdet.sources.onnx_file import NEWEST_OPSET
from trtdet.sources.saved_model_folder import GRAPH_FILE, find_saved_model, missing_variables
from trtdet.spec import ModelSpec
from trtdet.terminal import native_stderr_held

logger = logging.getLogger(__name__)

#: What exports call the function that serves.
DEFAULT_SIGNATURE = "serving_default"
#: Characters of TensorFlow's message that are shown.
LONGEST_REASON = 400


class SavedModelSource(Closing):
    """A SavedModel folder. Use as a context manager."""

    def __init__(self, path: Path, *, signature: str | None = None) -> None:
        """Load and freeze.

        Args:
            signature: which of the model's functions; None: `serving_default`, or the only one
                there is.

        Raises:
            FileNotFoundError: no `saved_model.pb` there.
            GraphError: TensorFlow is not installed, or cannot load the SavedModel, or it has no
                such signature.
        """
        path = find_saved_model(path)
        self.path = path
        self.spec: ModelSpec | None = None
        with native_stderr_held():
            self._tf = _import_tensorflow()
            try:
                frozen = _load_frozen(self._tf, path, signature)
            except GraphError:
                raise
            except Exception as error:  # TensorFlow's own, protobuf's, KeyError of a function that is not there, ...
                raise _load_error(path, error) from error
            self._graph_def, inputs, outputs, batch = frozen
        self.graph = _read_graph_def(self._graph_def, inputs, outputs, batch)
        graph = self._tf.Graph()
        with graph.as_default():
            self._tf.import_graph_def(self._graph_def, name="")
        self._session = self._tf.compat.v1.Session(graph=graph)

    def run(self, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            return self._session.run(list(fetches), dict(feeds))
        except self._tf.errors.OpError as error:
            raise GraphError(
                f"TensorFlow cannot run the graph up to {list(fetches)}: {reason_of(error.message)}"
            ) from error

    def extract(
        self, inputs: Mapping[str, Shape], outputs: Sequence[str], *, opset: int | None
    ) -> onnx.ModelProto:
        graph_def = self._cut(inputs, outputs)
        return _tf_to_onnx(self._tf, graph_def, inputs, outputs, opset or NEWEST_OPSET)

    def close(self) -> None:
        self._session.close()

    def _cut(self, inputs: Mapping[str, Shape], outputs: Sequence[str]) -> Any:
        """The GraphDef between tensors, its constants folded; each of `inputs` becomes a
        placeholder.
        """
        tf1 = self._tf.compat.v1
        cut = tf1.GraphDef(versions=self._graph_def.versions)
        by_name = {node.name: node for node in self._graph_def.node}
        targets = [_node_name(tensor) for tensor in outputs]
        cone = _cone(by_name, targets, {_node_name(tensor) for tensor in inputs})
        constant: set[str] = set()
        for name in cone:
            parents = _parents(by_name[name])
            if by_name[name].op == "Const" or (parents and constant.issuperset(parents)):
                constant.add(name)
        # A node is kept for its own sake or read by a kept node that is not constant; of constants
        # the value will do.
        read = {
            parent for name in cone if name not in constant for parent in _parents(by_name[name])
        }
        kept = {name for name in cone if name not in constant} | (constant & (read | set(targets)))
        folded = sorted(name for name in kept & constant if by_name[name].op != "Const")
        values = (
            dict(zip(folded, self._session.run([f"{n}:0" for n in folded]), strict=True))
            if folded
            else {}
        )
        for tensor, shape in inputs.items():
            placeholder = cut.node.add(name=_node_name(tensor), op="Placeholder")
            placeholder.attr["dtype"].CopyFrom(_attr(self._tf, dtype=self._tf.float32))
            placeholder.attr["shape"].CopyFrom(_attr(self._tf, shape=shape))
        for node in self._graph_def.node:
            if node.name in values:
                cut.node.append(_const_node(self._tf, node.name, values[node.name]))
            elif node.name in kept:
                copy = cut.node.add()
                copy.CopyFrom(node)
                data = [tensor for tensor in node.input if not tensor.startswith("^")]
                del copy.input[:]
                copy.input.extend(data)
                copy.attr.pop("_output_shapes", None)
        _multiply_instead_of_dividing(self._tf, cut)
        return cut


def _import_tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, at import
    # oneDNN reorders sums; the reference that the ONNX is verified against is the plain arithmetic.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tf2onnx  # noqa: F401  # fail now rather than after loading
    except ImportError as error:
        raise GraphError(
            f"reading a SavedModel needs TensorFlow and tf2onnx ({error}): pip install -r requirements-tensorflow.txt, "
            "or take the ONNX file of the model: create_onnx.py --source_onnx"
        ) from error
    tf.get_logger().setLevel(logging.ERROR)
    try:  # conversion is host work; the GPU is left to others, and to what this process runs next
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # this process has used TensorFlow before
        logger.debug("TensorFlow keeps the GPUs that it has taken")
    return tf


def reason_of(message: str) -> str:
    """TensorFlow's message without the places in its graph, on one line that is not long."""
    lines = [line.strip() for line in str(message).splitlines()]
    noise = re.compile(
        r"Graph execution error:|Detected at node|Node: '|\[\[|Original stack trace|\(\d+\) |  File "
    )
    said = [line for line in lines if line and not noise.match(line)] or lines
    return " ".join(" ".join(said).split())[:LONGEST_REASON]


def _load_error(path: Path, error: Exception) -> GraphError:
    """What to do with a SavedModel that TensorFlow cannot load."""
    if fault := missing_variables(path):
        return GraphError(f"{path}: {fault}")
    reason = reason_of(getattr(error, "message", "") or str(error)) or type(error).__name__
    where = "variables" if re.search("variables|checkpoint|less bytes|TensorBundle|tensor_slice|Restore|snappy|checksum|table", reason, re.I) else GRAPH_FILE  # fmt: skip
    return GraphError(
        f"{path}: expected a SavedModel tagged 'serve', TensorFlow cannot load it ({where}: {reason}); copy or export the whole folder again"
    )


def _pick_signature(path: Path, there: Collection[str], wanted: str | None) -> str:
    """The name of the function to convert.

    Raises:
        GraphError: it is not there, or the choice is not clear; lists all.
    """
    names = sorted(name for name in there if not name.startswith("__saved_model"))
    if wanted is None and DEFAULT_SIGNATURE not in names and len(names) == 1:
        logger.info("%s: taking its only signature, %s", path, names[0])
        return names[0]
    signature = wanted or DEFAULT_SIGNATURE
    if signature in names:
        return signature
    advice = "name one of them, create_onnx.py --signature NAME" if names else "export the model with one, as tf.saved_model.save(model, DIR, signatures=...) does"  # fmt: skip
    raise GraphError(f"{path}: expected the signature '{signature}', found {', '.join(names) or 'none'}; {advice}")  # fmt: skip


def _load_frozen(
    tf: Any, path: Path, wanted: str | None = None
) -> tuple[Any, tuple[str, ...], dict[str, str], int | None]:
    """The frozen GraphDef, its input tensors, its outputs by name, and the batch size of its
    first output, None where free.
    """
    tf1 = tf.compat.v1
    graph = tf.Graph()
    with tf1.Session(graph=graph) as session:
        meta = tf1.saved_model.load(session, [tf.saved_model.SERVING], str(path))
        name = _pick_signature(path, meta.signature_def.keys(), wanted)
        signature = meta.signature_def[name]
        if not signature.outputs or not signature.inputs:
            raise GraphError(f"{path}: expected inputs and outputs of the signature '{name}', found none; name another, create_onnx.py --signature NAME")  # fmt: skip
        outputs = {name: info.name for name, info in signature.outputs.items()}
        kept = [_node_name(tensor) for tensor in outputs.values()]
        sizes = [dim.size for dim in next(iter(signature.outputs.values())).tensor_shape.dim]
        batch = sizes[0] if sizes and sizes[0] > 0 else None
        inputs = tuple(info.name for info in signature.inputs.values())
        graph_def = tf1.graph_util.extract_sub_graph(graph.as_graph_def(), kept)
        if not any(node.op.endswith("PartitionedCall") for node in graph_def.node):
            frozen = tf1.graph_util.convert_variables_to_constants(session, graph_def, kept)
            return frozen, inputs, outputs, batch
    # A Keras export: the network is inside functions, which TensorFlow 2's own freezing inlines.
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    loaded = tf.saved_model.load(str(path))
    serving = loaded.signatures[name]
    frozen = convert_variables_to_constants_v2(serving, lower_control_flow=False)
    # Inlining leaves traces behind that no output needs, NMS operations among them.
    graph_def = tf1.graph_util.extract_sub_graph(
        frozen.graph.as_graph_def(), [_node_name(tensor.name) for tensor in frozen.outputs]
    )
    names = sorted(serving.structured_outputs)  # the order in which TensorFlow flattens a dict
    outputs = {name: tensor.name for name, tensor in zip(names, frozen.outputs, strict=True)}
    return graph_def, tuple(tensor.name for tensor in frozen.inputs), outputs, batch


def _read_graph_def(
    graph_def: Any, inputs: tuple[str, ...], outputs: Mapping[str, str], batch: int | None
) -> SourceGraph:
    """A GraphDef as a `SourceGraph`; inputs of loops are matched with the arguments of their
    bodies.
    """
    main = {node.name: _read_node(node, "") for node in graph_def.node}
    library = {function.signature.name: function for function in graph_def.library.function}
    functions: dict[str, dict[str, SourceNode]] = {}
    calls: dict[tuple[str, str], list[tuple[str, str]]] = {}
    pending = [("", graph_def.node)]
    while pending:  # from the main graph down; the library holds functions that nothing calls
        caller, nodes = pending.pop()
        for node in nodes:
            data = [tensor for tensor in node.input if not tensor.startswith("^")]
            for attr in node.attr.values():
                if (name := attr.func.name) not in library:
                    continue
                arguments = [argument.name for argument in library[name].signature.input_arg]
                for argument, tensor in zip(arguments, data, strict=False):
                    calls.setdefault((name, argument), []).append((caller, tensor))
                if name not in functions:
                    body = library[name].node_def
                    functions[name] = {child.name: _read_node(child, name) for child in body}
                    pending.append((name, body))
    return SourceGraph(main, inputs, batch, outputs=outputs, functions=functions, calls=calls)


def _read_node(node: Any, function: str) -> SourceNode:
    value = None
    if node.op == "Const":
        from tensorflow.python.framework.tensor_util import MakeNdarray

        value = MakeNdarray(node.attr["value"].tensor)
    data = tuple(_tensor_name(tensor) for tensor in node.input if not tensor.startswith("^"))
    outputs = (f"{node.name}:0",) if _has_output(node.op) else ()
    return SourceNode(
        node.name, CANONICAL_OPS.get(node.op, node.op), data, outputs, value, function
    )


def _has_output(op: str) -> bool:
    """Whether an operator makes a tensor; NoOp and Assert, which Keras leaves in its exports, do
    not.
    """
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(op)
    return known is None or bool(known.output_arg)


def _cone(by_name: Mapping[str, Any], outputs: Iterable[str], stop: set[str]) -> list[str]:
    """Names of the nodes upstream of `outputs`, down to but without those in `stop`, every node
    after what it reads.

    The cone of a network is free of cycles; only loops of TensorFlow 1's control flow have any, and
    they are behind the cut.
    """
    order: list[str] = []
    entered: set[str] = set()
    stack = [(name, False) for name in outputs]
    while stack:
        name, done = stack.pop()
        if done:
            order.append(name)
        elif name not in entered and name not in stop:
            entered.add(name)
            stack.append((name, True))
            stack.extend((parent, False) for parent in _parents(by_name[name]))
    return order


def _parents(node: Any) -> list[str]:
    """Names of the nodes whose results a NodeDef reads, control dependencies left out."""
    return [_node_name(tensor) for tensor in node.input if not tensor.startswith("^")]


def _multiply_instead_of_dividing(tf: Any, graph_def: Any) -> None:
    """x / c -> x * (1 / c) for constant c. tf2onnx moves transposes past a product, not past a
    quotient.
    """
    by_name = {node.name: node for node in graph_def.node}
    reciprocals = []
    for node in graph_def.node:
        divisor = by_name.get(_node_name(node.input[1])) if node.op == "RealDiv" else None
        if divisor is not None and divisor.op == "Const":
            value = tf.make_ndarray(divisor.attr["value"].tensor)
            reciprocals.append(
                _const_node(tf, f"{node.name}/reciprocal", (1 / value).astype(value.dtype))
            )
            node.op = "Mul"
            node.input[1] = reciprocals[-1].name
    graph_def.node.extend(reciprocals)


def _tf_to_onnx(
    tf: Any, graph_def: Any, inputs: Iterable[str], outputs: Iterable[str], opset: int
) -> onnx.ModelProto:
    """Convert with tf2onnx, none of whose optimisers run: `trtdet.graph.tidy` does their work.

    On D0 they take four times as long as the conversion itself, and leave 92 transposes where 11
    are needed.
    """
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    input_names = [_tensor_name(t) for t in inputs]
    output_names = [_tensor_name(t) for t in outputs]
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph):
        tf.import_graph_def(graph_def, name="")
        converted = tf2onnx.tfonnx.process_tf_graph(
            graph, opset=opset, input_names=input_names, output_names=output_names
        )
        _resize_to_sizes(converted)
        return converted.make_model("trtdet")


def _resize_to_sizes(graph: Any) -> None:
    """Make every Resize reach the size TensorFlow gave its result, exactly.

    tf2onnx writes `scales`; a fractional one (5/3) is floored differently by every runtime. Whole
    factors stay as they are, being exact everywhere; others become sizes = [batch and channels of
    the input, height, width].
    """
    for node in [node for node in graph.get_nodes() if node.type == "Resize"]:
        # The transpose back to TensorFlow's NHWC.
        (consumer,) = graph.find_output_consumers(node.output[0])
        name = consumer.name  # tf2onnx gives it the name of TensorFlow's node
        _, height, width, _ = graph.get_shape(consumer.output[0])
        _, source_height, source_width, _ = graph.get_shape(node.inputs[0].input[0])
        if height % source_height == 0 and width % source_width == 0:
            continue
        shape = graph.make_node("Shape", [node.input[0]], name=f"{name}/shape")
        start = graph.make_const(f"{name}/start", np.array([0], np.int64))
        end = graph.make_const(f"{name}/end", np.array([2], np.int64))
        kept = graph.make_node(
            "Slice", [shape.output[0], start.output[0], end.output[0]], name=f"{name}/kept"
        )
        target = graph.make_const(f"{name}/size_hw", np.array([height, width], np.int64))
        sizes = graph.make_node(
            "Concat", [kept.output[0], target.output[0]], attr={"axis": 0}, name=f"{name}/sizes"
        )
        empty = graph.make_const(f"{name}/no_scales", np.array([], np.float32))
        graph.replace_inputs(node, [*node.input[:2], empty.output[0], sizes.output[0]])


def _node_name(tensor: str) -> str:
    return tensor.lstrip("^").split(":")[0]


def _tensor_name(tensor: str) -> str:
    return tensor if ":" in tensor else f"{tensor}:0"


def _attr(
    tf: Any, *, dtype: Any = None, shape: Sequence[int | None] | None = None, value: Any = None
) -> Any:
    attr = tf.compat.v1.AttrValue()
    if dtype is not None:
        attr.type = dtype.as_datatype_enum
    if shape is not None:
        attr.shape.CopyFrom(tf.TensorShape(shape).as_proto())
    if value is not None:
        attr.tensor.CopyFrom(tf.make_tensor_proto(value))
    return attr


def _const_node(tf: Any, name: str, value: NDArray[Any]) -> Any:
    node = tf.compat.v1.NodeDef(name=name, op="Const")
    node.attr["dtype"].CopyFrom(_attr(tf, dtype=tf.as_dtype(value.dtype)))
    node.attr["value"].CopyFrom(_attr(tf, value=value))
    return node
