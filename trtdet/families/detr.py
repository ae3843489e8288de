# SPDX-License-Identifier: Apache-2.0
"""DETR (arXiv:2005.12872) as transformers and facebookresearch/detr export it to ONNX, with torch's old or new exporter.

logits [N, Q, C+1], the last class for no object; pred_boxes [N, Q, 4], cx cy w h, 0 to 1. Its own post-processing is softmax, the best
class of each query and a score threshold; nothing is suppressed. So is ours: `trtdet.nms.topk`.

Images come in one of two ways, `--resize_mode`:

* stretch to the network's size: what an export without a mask input can take. A mask input is fed with ones, and disappears.
* letterbox, as the model was trained: aspect kept, picture in the top left corner, zeros (after normalisation) beside it, and a mask
  that says which is which. The mask is computed in the graph from the padding colour, the ImageNet mean, so the host knows nothing of it.
  Boxes of the source are relative to the picture without padding; those of the result are relative to the network input, like
  any other model's.

A row or column counts as padding if it and all behind it are within half a level of the mean everywhere. In an image file no
pixel has that colour, which is no whole number; only after resizing, or as uint8, can a picture end in a row that has.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from trtdet.errors import GraphError
from trtdet.families.base import NO_HINTS, Heads, Hints, Note, Reading
from trtdet.graph.builder import Builder
from trtdet.graph.deformable_attention import PLUGIN_OP, Mode, lower, name_positions, rewrite
from trtdet.graph.map_op import check_runs
from trtdet.graph.static_shapes import fix_shapes
from trtdet.sources.base import Source, run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import PREPROCESSORS, ModelSpec, Nms, Preprocessing, ResizeMode

NAME = "detr"

#: Names of the outputs: of transformers and Optimum, of facebookresearch/detr.
LOGITS, BOXES = ("logits", "pred_logits"), "pred_boxes"
#: Operators by which Deformable DETR and what followed it are told apart.
DEFORMABLE_OPS = frozenset(["GridSample", PLUGIN_OP])

IMAGENET_MEAN, IMAGENET_STD = PREPROCESSORS["imagenet"]
#: Levels of 0-255 by which padding may differ from the mean: uint8 rounds it.
PADDING_TOLERANCE = 0.501
#: facebookresearch/detr and transformers give every query a box; Deformable DETR's evaluation takes the best 100.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Export:
    """What an ONNX file of a DETR says of itself.

    Attributes:
        image: input tensor [N,3,H,W].
        mask: input tensor [N,h,w], 1 where the picture is; empty: none. mask_hw: its size. mask_type: its `TensorProto.DataType`.
        pixels: the tensor that enters the first convolution.
        logits: output tensor.
        size_hw: of the image. batch: None where it is free.
        num_queries: Q. num_logits: of each.
    """

    image: str
    mask: str
    mask_hw: tuple[int, int]
    mask_type: int
    pixels: str
    logits: str
    size_hw: tuple[int, int]
    batch: int | None
    num_queries: int = 0
    num_logits: int = 0


def matches(source: Source) -> bool:
    """Whether the outputs are called as DETR's are, and no operator is Deformable DETR's."""
    return has_outputs(source) and not is_deformable(source)


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    export = read_export(source, hints)
    reading = describe(source, export, hints, family=NAME, num_classes=export.num_logits - 1)
    spec = reading.spec.replace(
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=min(MAX_DETECTIONS, export.num_queries),
            score_activation=False,
            class_agnostic=True,
            box_coding=1,
        )
    )
    heads = {"logits": export.logits, "pred_boxes": BOXES}
    return dataclasses.replace(reading, spec=spec, heads=heads, assemble=assemble)


def assemble(build: Builder, spec: ModelSpec) -> Heads:
    """softmax(logits), the last class left out; the boxes as they are."""
    probabilities = build.node("Softmax", "probabilities", "logits", axis=-1)
    scores = build.slice_last("object_probabilities", probabilities, 0, spec.num_classes)
    return Heads("pred_boxes", scores)


# ---- what both families share ----------------------------------------------------------------------------------------------


def has_outputs(source: Source) -> bool:
    names = (
        {info.name for info in source.model.graph.output}
        if isinstance(source, OnnxSource)
        else set()
    )
    return source.spec is None and BOXES in names and not names.isdisjoint(LOGITS)


def is_deformable(source: Source) -> bool:
    return any(node.op in DEFORMABLE_OPS for node in source.graph.nodes.values())


def read_export(source: Source, hints: Hints) -> Export:
    """Inputs and outputs, by name and shape.

    Raises:
        GraphError: they are not those of a DETR, or the size is dynamic and not given.
    """
    if not isinstance(source, OnnxSource) or not has_outputs(source):
        raise GraphError(
            f"{source.path}: expected an ONNX file with the outputs {' or '.join(LOGITS)} and {BOXES}; export the model with "
            "output_names=['logits', 'pred_boxes']"
        )
    graph = source.model.graph
    inputs = {i.name: i for i in graph.input if i.name in source.graph.inputs}
    shapes = {
        name: tuple(d.dim_value or None for d in info.type.tensor_type.shape.dim)
        for name, info in inputs.items()
    }
    images = [name for name, shape in shapes.items() if len(shape) == 4 and shape[1] in (3, None)]
    masks = [name for name, shape in shapes.items() if len(shape) == 3 and "mask" in name.lower()]
    if len(images) != 1 or len(images) + len(masks) != len(shapes) or len(masks) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise GraphError(
            f"{source.path}: expected an image [N, 3, H, W] and at most a mask [N, H, W] called so, found {found}; export the model "
            "with these inputs"
        )
    batch, _, height, width = shapes[images[0]]
    if height is None or width is None:
        if hints.size_hw is None:
            raise GraphError(
                f"{source.path}: its input takes any size; name the one that it shall have: --size H,W"
            )
        height, width = hints.size_hw
    mask = masks[0] if masks else ""
    sides = shapes[mask][1:] if mask else (height, width)
    conv = next((n for n in source.graph.nodes.values() if n.op == "Conv"), None)
    if conv is None:
        raise GraphError(f"{source.path}: expected a convolution behind '{images[0]}', found none")
    export = Export(
        image=images[0],
        mask=mask,
        mask_hw=(sides[0] or height, sides[1] or width),
        mask_type=inputs[mask].type.tensor_type.elem_type if mask else TensorProto.INT64,
        pixels=conv.inputs[0],
        logits=next(info.name for info in graph.output if info.name in LOGITS),
        size_hw=(height, width),
        batch=batch,
    )
    num_queries, num_logits = _head_sizes(source, export)
    return dataclasses.replace(export, num_queries=num_queries, num_logits=num_logits)


def _head_sizes(source: Source, export: Export) -> tuple[int, int]:
    """Numbers of queries and of logits each, measured on a grey image.

    Raises:
        GraphError: the model does not run, or its outputs do not fit each other.
    """
    n = export.batch or 1
    feeds = {export.image: np.zeros((n, 3, *export.size_hw), np.float32)}
    check_runs(source, NAME, [export.logits, BOXES])
    if export.mask:
        feeds[export.mask] = _ones_mask(export, n)
    try:
        logits, boxes = source.run([export.logits, BOXES], feeds)
    except GraphError as error:
        if "GridSample" not in str(error):
            raise
        raise GraphError(
            f"{source.path}: ONNX Runtime cannot run its GridSample: torch's older exporter computes positions in float64 where the "
            f"batch is fixed; export it with a dynamic batch (dynamic_axes) or with dynamo=True ({error})"
        ) from error
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise GraphError(
            f"{source.path}: expected {export.logits} [N, queries, classes] and {BOXES} [N, queries, 4], found {list(logits.shape)} and "
            f"{list(boxes.shape)}"
        )
    return logits.shape[1], logits.shape[2]


def describe(
    source: Source,
    export: Export,
    hints: Hints,
    *,
    family: str,
    num_classes: int,
    deformable_attention: Mode = "keep",
) -> Reading:
    """Everything but what is selected from the heads."""
    resize: ResizeMode = hints.resize or ("letterbox" if export.mask else "stretch")
    mean, std, notes = normalisation(source, export, hints)
    if export.mask and hints.resize is None:
        notes.append(
            Note(
                "images keep their aspect, and the mask input is computed in the graph, as the model was trained; --resize_mode stretch "
                "takes whole images and a mask of ones",
                "resize_mode",
            )
        )
    preprocessing = Preprocessing(
        export.size_hw,
        mean=mean,
        std=std,
        pad_rgb=mean,
        resize=resize,
        rounding="round",
        antialias=True,
    )
    spec = ModelSpec(
        family=family,
        preprocessing=preprocessing,
        nms=Nms(),
        category_ids=tuple(range(num_classes)),
        labels=hints.labels if len(hints.labels) == num_classes else (),
        box_order="xyxy",
        boxes_normalized=True,
        selection="topk",
        anchored=False,
    )
    return Reading(
        spec=spec,
        image_input=export.pixels,
        network_input=export.pixels,
        network_layout="NCHW",
        heads={},
        batch=export.batch,
        notes=tuple(notes),
        image_layout="NCHW",
        rewrite=partial(
            rewrite_network,
            export=export,
            preprocessing=preprocessing,
            deformable_attention=deformable_attention,
        ),
        feeds={export.mask: _ones_mask(export, 1)} if export.mask else {},
    )


def normalisation(
    source: Source, export: Export, hints: Hints
) -> tuple[tuple[float, float, float], tuple[float, float, float], list[Note]]:
    """Mean and standard deviation of RGB 0-255: as asked for, as measured before the first convolution, or ImageNet's."""
    if hints.preprocessor:
        mean, std = PREPROCESSORS[hints.preprocessor]
        if export.mask and not any(mean) and hints.resize != "stretch":
            text = "padding is black with this normalisation: black rows and columns at the end of a picture count as padding"
            return mean, std, [Note(text, "resize_mode")]
        return mean, std, []
    if export.pixels != export.image:
        shape = (export.batch or 1, 3, *export.size_hw)
        black, white = (
            source.run([export.pixels], {export.image: np.full(shape, level, np.float32)})[0]
            for level in (0.0, 1.0)
        )
        fits = black.shape == shape
        slope, offset = (x.reshape(shape[0], 3, -1)[0].mean(1) for x in (white - black, black))
        spread = max(
            np.ptp(x.reshape(shape[0], 3, -1)[0], axis=1).max() for x in (white - black, black)
        )
        if not fits or spread > 1e-3 or (slope <= 0).any():
            raise GraphError(
                f"{source.path}: expected at most (x - mean) / std between '{export.image}' and the first convolution, found something "
                "else; export the network without its preprocessing"
            )
        std, mean = 1 / slope, -offset / slope
        unit = 255.0 if (std <= 1).all() else 1.0  # the export takes images of 0 to 1
        if slope.max() != 1 or offset.any():
            return _triple(mean * unit), _triple(std * unit), []
    note = Note(
        f"nothing in the file says how images are normalised; ImageNet's mean {IMAGENET_MEAN} and standard deviation are assumed, as "
        "DETR was trained; --preprocessor names another",
        "preprocessor",
    )
    return IMAGENET_MEAN, IMAGENET_STD, [note]


def rewrite_network(
    graph: gs.Graph, *, export: Export, preprocessing: Preprocessing, deformable_attention: Mode
) -> None:
    """The cut network in place: without its mask input and shape arithmetic, boxes relative to the network input.

    Raises:
        GraphError: the network does not run.
    """
    model = gs.export_onnx(graph)
    if export.mask and preprocessing.resize == "letterbox":
        _insert_share(model, _insert_mask(model, export, preprocessing.std))
    elif export.mask:
        _insert_ones(model, export)
    model = fix_shapes(model, {export.pixels: [None, 3, *export.size_hw]}, batch=export.batch)
    model = rewrite(model, deformable_attention)
    if export.batch and export.mask and preprocessing.resize == "letterbox":
        _check_masks(lower(model), export)
    if deformable_attention != "keep":
        name_positions(model, [BOXES])
    rewritten = gs.import_onnx(model)
    graph.nodes, graph.inputs, graph.outputs = rewritten.nodes, rewritten.inputs, rewritten.outputs
    for tensor in graph.outputs:
        channels = 4 if tensor.name == BOXES else export.num_logits
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
    """A mask of ones in place of the mask input; it follows from shapes alone, so all that follows from it becomes constants."""
    build = Builder(model, "mask/")
    image_shape = build.node("Shape", "image_shape", export.pixels)
    batch = build.node("Gather", "batch", image_shape, np.array([0], np.int64), axis=0)
    shape = build.node("Concat", "shape", batch, np.array(export.mask_hw, np.int64), axis=0)
    ones = build.node("Expand", "ones", _ones_mask(export, 1), shape)
    build.output(ones, export.mask)
    _prepend(model, build, without=export.mask)


def _insert_mask(model: onnx.ModelProto, export: Export, std: tuple[float, float, float]) -> str:
    """Compute the mask from the padding, which becomes exact zeros; both in place of inputs.

    Returns:
        Name of the picture's share of the network input, [N, 1, 4] float32: width, height, width, height.
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


def _insert_share(model: onnx.ModelProto, share: str) -> None:
    """Boxes relative to the network input in place of those relative to the picture, under the same name."""
    build = Builder(model, "")
    of_picture = f"{BOXES}/of_picture"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [of_picture if name == BOXES else name for name in names]
    build.output(build.node("Mul", f"{BOXES}/of_input", of_picture, share), BOXES)
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


def _ones_mask(export: Export, batch: int) -> np.ndarray:
    return np.ones((batch, *export.mask_hw), helper.tensor_dtype_to_np_dtype(export.mask_type))


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
