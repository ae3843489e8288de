# SPDX-License-Identifier: Apache-2.0
"""DeepStream pads frames with black, training padded with another colour: the difference made
good inside the model.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.graph.builder import Builder
from trtdet.spec import ModelSpec

#: In `ModelSpec.source` of a model that was painted: the padding that it takes. An engine's sidecar
#: carries it on.
SOURCE_KEY = "pad_color"


def insert_pad_color(model: onnx.ModelProto) -> None:
    """Paint black bands along the edges in the padding colour of training, in place.

    input -> everything
    becomes
    input -> Where(row and column within the picture, input, pad_rgb) -> everything

    The picture is everything up to the last row and the last column that has a value above 0, and,
    for models that centre it, from the first ones. Nothing else is touched: black inside the
    picture stays. A picture whose own last rows are exactly (0, 0, 0) loses them to the padding
    colour, as those of a film with bars would.

    Args:
        model: of create_onnx.py, with its ModelSpec, whose `source` then says so; a model with
            padding in black is left as it is.

    Raises:
        GraphError: no ModelSpec, a model that is not fed by a letterbox, or one that was painted
            before.
    """
    spec = ModelSpec.from_onnx(model)
    preprocessing = spec.preprocessing
    if SOURCE_KEY in spec.source:
        raise GraphError("pad_color: this model has it already; take the file as it is")
    if preprocessing.resize != "letterbox":
        raise GraphError("pad_color: this model's images are stretched, there is no padding")
    if preprocessing.size_range is not None:
        raise GraphError("pad_color: this model's input size is dynamic; convert it for one size")
    if not any(preprocessing.pad_rgb):
        return
    weights = {weight.name for weight in model.graph.initializer}
    (pixels,) = (value.name for value in model.graph.input if value.name not in weights)
    first = [node for node in model.graph.node if pixels in node.input]
    start = 0
    if preprocessing.dtype != "float32":  # TensorRT wants the cast right behind a uint8 input
        if [node.op_type for node in first] != ["Cast"]:
            raise GraphError(f"pad_color: expected one Cast behind '{pixels}', found others")
        start = list(model.graph.node).index(first[0]) + 1
        pixels = first[0].output[0]
    build = Builder(model, "pad_color/")
    rows, columns, channels = (1, 2, 3) if preprocessing.layout == "NHWC" else (2, 3, 1)
    lit = build.reduce("ReduceMax", "lit", pixels, channels, keepdims=True)
    height, width = preprocessing.size_hw
    centered = preprocessing.placement == "center"
    conditions = [
        *_inside(build, "rows", lit, rows, columns, height, centered=centered),
        *_inside(build, "columns", lit, columns, rows, width, centered=centered),
    ]
    inside = conditions[0]
    for number, condition in enumerate(conditions[1:], 1):
        inside = build.node("And", f"inside_{number}", inside, condition)
    color = np.asarray(preprocessing.pad_rgb, np.float32)
    if preprocessing.dtype == "uint8":
        color = np.rint(color)  # as the host pads
    painted = build.node("Where", "painted", inside, pixels, _along(color, channels))
    nodes = list(model.graph.node)
    for node in nodes[start:]:
        for position, name in enumerate(node.input):
            if name == pixels:
                node.input[position] = painted
    nodes[start:start] = build.nodes
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(build.constants)
    spec.replace(source={**spec.source, SOURCE_KEY: "black"}).attach(model)


def _along(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """A vector as a tensor of four dimensions, of which it fills one."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(4)])


def _inside(
    build: Builder, name: str, lit: str, axis: int, across: int, size: int, *, centered: bool
) -> list[str]:
    """Conditions for a row, or a column, to lie within the picture: at or before the last lit one,
    and from the first one on.

    Counted from 1, the last lit row is the largest number of one that is lit; the first one is the
    last, counted from the other end.
    """
    brightest = build.reduce("ReduceMax", f"{name}/brightest", lit, across, keepdims=True)
    is_lit = build.node("Greater", f"{name}/is_lit", brightest, np.float32(0))
    upwards = _along(np.arange(1, size + 1, dtype=np.float32), axis)
    conditions = []
    ends = {"last": upwards}
    if centered:
        ends["first"] = np.flip(upwards, axis).copy()
    for end, numbers in ends.items():
        counted = build.node("Where", f"{name}/{end}/counted", is_lit, numbers, np.float32(0))
        limit = build.reduce("ReduceMax", f"{name}/{end}/limit", counted, axis, keepdims=True)
        beyond = build.node("Greater", f"{name}/{end}/beyond", numbers, limit)
        conditions.append(build.node("Not", f"{name}/{end}/inside", beyond))
    return conditions
