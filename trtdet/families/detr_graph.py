# SPDX-License-Identifier: Apache-2.0
"""The network of a set prediction, rewritten: its mask input computed or left out, shape
arithmetic, deformable attention.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.families.detr_export import Export, ones_mask
from trtdet.graph.builder import Builder
from trtdet.graph.deformable_attention import Mode, lower, name_positions, rewrite
from trtdet.graph.static_shapes import fix_shapes
from trtdet.sources.base import run_onnx
from trtdet.spec import Preprocessing

#: Levels of 0-255 by which padding may differ from the mean: uint8 rounds it.
PADDING_TOLERANCE = 0.501


def rewrite_network(
    graph: gs.Graph, *, export: Export, preprocessing: Preprocessing, deformable_attention: Mode
) -> None:
    """The cut network in place: without its mask input and shape arithmetic, boxes relative to the
    network input.

    Raises:
        GraphError: the network does not run.
    """
    for tensor in graph.outputs:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    model = gs.export_onnx(graph)
    if export.mask and preprocessing.resize == "letterbox":
        _insert_share(model, _insert_mask(model, export, preprocessing.std), export.boxes)
    elif export.mask:
        _insert_ones(model, export)
    model = fix_shapes(model, {export.pixels: [None, 3, *export.size_hw]}, batch=export.batch)
    model = rewrite(model, deformable_attention)
    if export.batch and export.mask and preprocessing.resize == "letterbox":
        _check_masks(lower(model), export)
    if deformable_attention != "keep":
        name_positions(model, [export.boxes])
    rewritten = gs.import_onnx(model)
    graph.nodes, graph.inputs, graph.outputs = rewritten.nodes, rewritten.inputs, rewritten.outputs
    for tensor in graph.outputs:
        channels = 4 if tensor.name == export.boxes else export.num_logits
        tensor.shape = ["N", export.num_queries, channels]
    graph.opset, graph.import_domains = rewritten.opset, rewritten.import_domains


def _check_masks(model: onnx.ModelProto, export: Export) -> None:
    """Whether images of a batch keep their own mask, where the export knew one image only.

    Raises:
        GraphError: they do not.
    """
    height, width = export.size_hw
    pixels = np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32)
    pixels[0, :, height // 2 :] = 0
    pixels[1, :, :, width // 2 :] = 0
    outputs = [info.name for info in model.graph.output]
    together = run_onnx(model, outputs, {export.pixels: pixels})
    for row in range(2):
        alone = run_onnx(model, outputs, {export.pixels: pixels[row : row + 1]})
        for name, batched, single in zip(outputs, together, alone, strict=True):
            gap = float(np.abs(batched[row] - single[0]).max())
            if not gap <= 1e-3 * max(1.0, float(np.abs(single).max())):
                raise GraphError(
                    f"'{name}': expected an image to give the same alone and in a batch, found {gap:.3g} between them: the masks of the "
                    f"export are fixed to a batch of {export.batch}; export it with a dynamic batch, or leave masks out with --resize_mode stretch"
                )


def _insert_ones(model: onnx.ModelProto, export: Export) -> None:
    """A mask of ones in place of the mask input; it follows from shapes alone, so all that
    follows from it becomes constants.
    """
    build = Builder(model, "mask/")
    image_shape = build.node("Shape", "image_shape", export.pixels)
    batch = build.node("Gather", "batch", image_shape, np.array([0], np.int64), axis=0)
    shape = build.node("Concat", "shape", batch, np.array(export.mask_hw, np.int64), axis=0)
    ones = build.node("Expand", "ones", ones_mask(export, 1), shape)
    build.output(ones, export.mask)
    _prepend(model, build, without=export.mask)


def _insert_mask(model: onnx.ModelProto, export: Export, std: tuple[float, float, float]) -> str:
    """Compute the mask from the padding, which becomes exact zeros; both in place of inputs.

    Returns:
        Name of the picture's share of the network input, [N, 1, 4] float32: width, height, width,
        height.
    """
    build = Builder(model, "mask/")
    tolerance = (PADDING_TOLERANCE / np.array(std, np.float32)).reshape(1, 3, 1, 1)
    distance = build.node("Abs", "distance", export.pixels)
    differs = build.cast(
        "differs", build.node("Greater", "is_no_padding", distance, tolerance), TensorProto.FLOAT
    )
    differs = build.reduce("ReduceMax", "of_channels", differs, 1, keepdims=False)
    inside: list[str] = []  # rows and columns of the picture, [N, H, 1] and [N, 1, W]
    inside_mask: list[str] = []  # the same at the size of the mask
    shares: list[str] = []
    for name, axis, size, wanted in zip(
        ("rows", "columns"), (2, 1), export.size_hw, export.mask_hw, strict=True
    ):
        line = build.reduce("ReduceMax", f"{name}/differ", differs, axis, keepdims=False)
        number = np.arange(1, size + 1, dtype=np.float32)[None]
        used = build.node("Mul", f"{name}/numbers", line, number)
        extent = build.reduce("ReduceMax", f"{name}/last", used, 1, keepdims=True)
        extent = build.node("Max", f"{name}/extent", extent, np.float32(1))  # of an empty picture
        shares.append(build.node("Mul", f"{name}/share", extent, np.float32(1 / size)))
        # A smaller mask has the nearest of its rows, as the network would take them.
        for result, positions in (
            (inside, np.arange(size)),
            (inside_mask, np.arange(wanted) * size // wanted),
        ):
            shape = [0, -1, 1] if name == "rows" else [0, 1, -1]
            is_inside = build.node("Greater", f"{name}/inside", extent, np.float32(positions)[None])
            result.append(build.reshape(f"{name}/inside_axis", is_inside, shape))
    mask = build.cast("mask", build.node("And", "is_inside", *inside_mask), export.mask_type)
    build.output(mask, export.mask)
    inside_float = build.cast(
        "inside_picture", build.node("And", "is_picture", *inside), TensorProto.FLOAT
    )
    picture_mask = build.reshape("picture_mask", inside_float, [0, 1, *export.size_hw])
    picture = build.node("Mul", "picture", export.pixels, picture_mask)
    share_hw = build.node("Concat", "share", *shares[::-1], *shares[::-1], axis=1)
    share = build.reshape("share_of_boxes", share_hw, [0, 1, 4])
    for node in model.graph.node:
        node.input[:] = [picture if name == export.pixels else name for name in node.input]
    _prepend(model, build, without=export.mask)
    return share


def _insert_share(model: onnx.ModelProto, share: str, boxes: str) -> None:
    """Boxes relative to the network input in place of those relative to the picture, under the
    same name.
    """
    build = Builder(model, "")
    of_picture = f"{boxes}/of_picture"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [of_picture if name == boxes else name for name in names]
    build.output(build.node("Mul", f"{boxes}/of_input", of_picture, share), boxes)
    build.append_to(model)


def _prepend(model: onnx.ModelProto, build: Builder, *, without: str) -> None:
    """Put the nodes before those of the model, in place of the input `without`."""
    nodes = [*build.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(build.constants)
    kept = [info for info in model.graph.input if info.name != without]
    del model.graph.input[:]
    model.graph.input.extend(kept)
