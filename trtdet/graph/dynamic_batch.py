# SPDX-License-Identifier: Apache-2.0
"""Reshapes that hold the batch a network was exported with, made to hold any."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trtdet.errors import GraphError


def make_static_batch_dynamic(tensor: gs.Variable, last: int) -> None:
    """Make the reshapes that feed a head's Concat independent of the batch they were exported with,
    however they compute it.

    Reshape(x, [batch, -1, last])  ->  Reshape(x, [0, -1, last])

    ONNX's 0 copies the first dimension of x.

    Raises:
        GraphError: the head is not a Concat of Reshapes.
    """
    concat = tensor.inputs[0] if tensor.inputs else None
    reshapes = [t.inputs[0] for t in concat.inputs if t.inputs] if concat is not None else []
    if concat is None or concat.op != "Concat" or any(node.op != "Reshape" for node in reshapes):
        raise GraphError(
            f"'{tensor.name}': expected a Concat of one Reshape per pyramid level, found "
            f"{concat.op if concat is not None else 'no node'} of {[node.op for node in reshapes]}"
        )
    for node in reshapes:
        node.attrs.pop("allowzero", None)
        node.inputs[1] = gs.Constant(
            f"{node.outputs[0].name}/shape", np.array([0, -1, last], np.int64)
        )


def make_batch_dynamic(graph: gs.Graph, batch: int | None) -> None:
    """Make all other reshapes independent of it: Reshape(x, [batch, ...])  ->  Reshape(x, [0,
    ...]), for constant shapes.

    A plain tf2onnx conversion bakes the batch into its squeeze-and-excite blocks. What follows from
    the size of the input alone, such as a grid of cells [1, A, 2], has no batch and stays.
    """
    images = _following_from(graph.inputs)
    if batch is not None:
        _forget_shapes(graph, images, batch)
    for node in graph.nodes:
        if node.op != "Reshape" or not isinstance(node.inputs[1], gs.Constant):
            continue
        if id(node.inputs[0]) not in images or _is_without_batch(node.inputs[0], batch):
            continue
        shape = node.inputs[1].values
        if (
            shape.size > 1
            and shape[0] == batch
            and 0 not in shape
            and not node.attrs.get("allowzero")
        ):
            of_any_batch = np.array([0, *shape[1:]], np.int64)
            node.inputs[1] = gs.Constant(f"{node.outputs[0].name}/shape", of_any_batch)


def _forget_shapes(graph: gs.Graph, images: set[int], batch: int) -> None:
    """Leave out the shapes of inner tensors that start with the batch that was: ONNX Runtime's
    optimiser puts them into reshapes of its own.
    """
    public = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in graph.tensors().values():
        if id(tensor) in images - public and tensor.shape and tensor.shape[0] == batch:
            tensor.shape = None


def _is_without_batch(tensor: gs.Tensor, batch: int | None) -> bool:
    """Whether a tensor is known to start with something else than the batch, as rows that were
    gathered from the flat boxes of all images do.
    """
    first = tensor.shape[0] if tensor.shape else batch
    return isinstance(first, int) and first != batch


def _following_from(tensors: Sequence[gs.Tensor]) -> set[int]:
    """`id` of the tensors whose values follow from those of others, not from their shapes alone."""
    found, pending = {id(t) for t in tensors}, list(tensors)
    while pending:
        for node in pending.pop().outputs:
            if node.op in ("Shape", "Size"):
                continue
            new = [t for t in node.outputs if id(t) not in found]
            found.update(map(id, new))
            pending.extend(new)
    return found
