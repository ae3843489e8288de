# SPDX-License-Identifier: Apache-2.0
"""A trained model in an ONNX file."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.errors import GraphError
from trtdet.onnx_files import EXPORT_AGAIN, read_onnx
from trtdet.sessions import Session
from trtdet.sources.base import (
    CANONICAL_OPS,
    Shape,
    SourceGraph,
    SourceNode,
    constants_of,
    cut_onnx,
    open_part,
    run_onnx,
    run_part,
)
from trtdet.sources.batch_axis import add_batch_axis
from trtdet.sources.half import widen
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)

#: INT8 weights with a scale per channel take opset 13. TensorRT 8.6 reads up to 17.
OLDEST_OPSET, NEWEST_OPSET = 13, 17
#: What ONNX Runtime says where a declared shape of an inner tensor is not what it gets.
WRONG_SHAPES = "Shape mismatch attempting to re-use buffer"


class OnnxSource(Closing):
    """A model in an ONNX file, run with ONNX Runtime on the CPU, graph optimisations off."""

    def __init__(
        self,
        path: Path,
        edit: Callable[[onnx.ModelProto], object] | None = None,
        lower: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
        model: onnx.ModelProto | None = None,
    ) -> None:
        """Load.

        Args:
            edit: changes the model before it is looked at.
            lower: replaces plugins by what ONNX Runtime knows; what it returns is run.
            model: what `path` holds, with its weights, of who has read it.
        """
        self.path = path
        if model is None:
            model = read_onnx(path, option="--source_onnx", remedy=EXPORT_AGAIN)
        self.model = inline_functions(model, path)
        drop_idle_nodes(self.model)
        self.spec = ModelSpec.maybe_from_onnx(self.model)
        if self.spec is None and widen(self.model):
            logger.info("%s is in half precision: stage 1 computes it in float32", path)
        if edit:
            edit(self.model)
        if self.spec is None and add_batch_axis(self.model):
            logger.info("%s takes one picture without a batch axis: it gets one", path)
        self._lower = lower
        self.read_again()

    def read_again(self) -> None:
        """Look at `model` anew, after an edit."""
        self._opened: tuple[object, Session] | None = None
        self.graph = _read_onnx_graph(self.model)
        self._dtypes = {
            info.name: onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            for info in self.model.graph.input
        }

    def run(self, fetches: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        cast = {name: x.astype(self._dtypes.get(name, x.dtype)) for name, x in feeds.items()}
        try:
            return self._run(fetches, cast)
        except GraphError as error:
            if WRONG_SHAPES not in str(error) or not self.model.graph.value_info:
                raise
        logger.info(
            "%s declares shapes of inner tensors that they do not have; they are measured",
            self.path,
        )
        del self.model.graph.value_info[:]
        self._opened = None
        return self._run(fetches, cast)

    def _run(self, fetches: Sequence[str], cast: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        # A family asks for the same tensors picture by picture.
        wanted = (*fetches,), tuple((name, x.dtype, x.ndim) for name, x in cast.items())
        if self._opened is None or self._opened[0] != wanted:
            self._opened = None
            model = self._lower(self.model) if self._lower else self.model
            self._opened = wanted, open_part(model, fetches, cast)
        return run_part(self._opened[1], fetches, cast)

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

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """The type of an input."""
        return self._dtypes[name]

    def close(self) -> None:
        self._opened = None


def inline_functions(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with the nodes of its own functions in place of the calls of them.

    Raises:
        GraphError: a function is of an opset that cannot be converted to the model's.
    """
    if not model.functions:
        return model
    inlined = onnx.inliner.inline_local_functions(model, convert_version=True)
    if inlined.functions:
        names = ", ".join(function.name for function in inlined.functions)
        raise GraphError(
            f"{path}: expected functions of the model's own opset, found others that cannot be inlined: {names}; export the model without functions"
        )
    return inlined


def drop_idle_nodes(model: onnx.ModelProto) -> None:
    """Leave out nodes without any output, as graph editors leave some behind: they do nothing, and
    onnx's shape inference fails at them.
    """
    kept = [node for node in model.graph.node if any(node.output)]
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)


def _frees_size(info: onnx.ValueInfoProto, shape: Shape) -> bool:
    """Whether a size beside the batch is fixed in the model and free in `shape`."""
    declared = info.type.tensor_type.shape.dim[1:]
    return any(dim.dim_value and n is None for dim, n in zip(declared, shape[1:], strict=False))


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
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in declared)  # some write -1
    outputs = {output.name: output.name for output in model.graph.output}
    return SourceGraph(nodes, inputs, batch if batch > 0 else None, shape, outputs)


def _resize_to_sizes(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> None:
    """Give every Resize with fractional scales the size that it has when the model runs, in place
    of the scales.

    5/3 is floored differently by every runtime, and by shape inference.
    """
    constants = constants_of(model)
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
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    zeros = {
        name: np.zeros(
            [1 if size is None else size for size in shape],
            onnx.helper.tensor_dtype_to_np_dtype(types[name]),
        )
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
