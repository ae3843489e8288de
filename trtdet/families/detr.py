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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import (
    CLASS_LOGITS,
    NO_HINTS,
    RAW_BOXES,
    Final,
    Heads,
    Hints,
    Note,
    Reading,
)
from trtdet.families.evidence import Evidence
from trtdet.families.pixels import (
    Convention,
    Normal,
    Pixels,
    decide_normalisation,
    declared_shapes,
    find_pixels,
    maybe_image,
)
from trtdet.families.set_outputs import (
    Kind,
    SetOutputs,
    is_deformable,
    kind_of,
    maybe_outputs,
    other_feeds,
    read_detections,
)
from trtdet.geometry import in_layout
from trtdet.graph.builder import Builder
from trtdet.graph.deformable_attention import Mode, lower, name_positions, rewrite
from trtdet.graph.map_op import check_runs, unknown_ops
from trtdet.graph.static_shapes import fix_shapes
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS
from trtdet.sources.base import Source, run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import PREPROCESSORS, Layout, ModelSpec, Nms, Preprocessing, ResizeMode

NAME = "detr"

IMAGENET_MEAN, IMAGENET_STD = PREPROCESSORS["imagenet"]
#: Levels of 0-255 by which padding may differ from the mean: uint8 rounds it.
PADDING_TOLERANCE = 0.501
#: facebookresearch/detr and transformers give every query a box; Deformable DETR's evaluation takes the best 100.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Export:
    """What an ONNX file of a DETR says of itself.

    Attributes:
        image: input tensor. pixels: how it enters the first convolution.
        mask: input tensor [N,h,w], 1 where the picture is; empty: none. mask_hw: its size. mask_type: its `TensorProto.DataType`.
        outputs: the heads.
        size_hw: of the image. batch: None where it is free.
        num_queries: Q. num_logits: of each.
    """

    outputs: SetOutputs
    entry: Pixels
    mask: str
    mask_hw: tuple[int, int]
    mask_type: int
    size_hw: tuple[int, int]
    batch: int | None
    num_queries: int = 0
    num_logits: int = 0

    @property
    def pixels(self) -> str:
        """The tensor that enters the first convolution."""
        return self.entry.tensor

    @property
    def logits(self) -> str:
        return self.outputs.logits

    @property
    def boxes(self) -> str:
        return self.outputs.boxes


def matches(source: Source) -> bool:
    """Whether the outputs are a set prediction whose boxes have no reference points."""
    return kind_is(source, "softmax")


def why_not(source: Source) -> str:
    """What is wrong with outputs that are called as DETR's are."""
    if not isinstance(source, OnnxSource) or source.spec:
        return ""
    names = [info.name for info in source.model.graph.output]
    if not _called_as_detr(names):
        return ""
    return f"expected logits [N, Q, C] and boxes [N, Q, 4] of 0 to 1 and nothing else, found {', '.join(names[:6])}"


def _called_as_detr(names: Sequence[str]) -> bool:
    return any("pred_boxes" in name or "logits" in name for name in names)


def kind_is(source: Source, kind: Kind) -> bool:
    """Whether the outputs are a set prediction of this kind, in a file that does not say its family itself.

    Raises:
        GraphError: outputs that are called as DETR's are, behind operators that ONNX Runtime does not know.
    """
    if not isinstance(source, OnnxSource):
        return False
    if any(prop.key == "libreyolo_version" for prop in source.model.metadata_props):
        return False
    names = [info.name for info in source.model.graph.output]
    if unknown_ops(source, names):  # nothing can be measured
        if _called_as_detr(names):
            check_runs(source, NAME, names)
        return False
    outputs = maybe_outputs(source, NO_HINTS)
    return outputs is not None and kind_of(source, outputs) == kind


def read(
    source: Source,
    hints: Hints = NO_HINTS,
    *,
    convention: Convention | None = None,
    how: str = "read: boxes are the sigmoid of a linear layer, without reference points",
    labels: tuple[str, ...] = (),
) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    known = convention or Convention("DETR", IMAGENET)
    evidence = Evidence(str(source.path), hints.assume)
    export = read_export(source, hints, evidence, trusted=how.startswith("read: metadata"))
    evidence.add(ev.FAMILY, NAME, how)
    evidence.add(ev.SCORES, "softmax", f"{ev.CONVENTION}{known.of}")
    evidence.add(ev.BACKGROUND, "last", f"{ev.CONVENTION}{known.of}")
    evidence.add(ev.SELECTION, "the best class of each query, no NMS", f"{ev.CONVENTION}{known.of}")
    reading = describe(
        source, export, hints, evidence, family=NAME, num_classes=export.num_logits - 1,
        convention=known, kept=min(MAX_DETECTIONS, export.num_queries), labels=labels,
    )  # fmt: skip
    spec = reading.spec.replace(
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=min(MAX_DETECTIONS, export.num_queries),
            score_activation=False,
            class_agnostic=True,
            box_coding=1,
        )
    )
    heads = {"logits": export.logits, "pred_boxes": export.boxes}
    made = partial(assemble, activated=export.outputs.activated)
    return dataclasses.replace(reading, spec=spec, heads=heads, assemble=made)


def assemble(build: Builder, spec: ModelSpec, *, activated: bool = False) -> Heads:
    """softmax(logits), the last class left out; the boxes as they are."""
    probabilities = "logits"
    if not activated:
        probabilities = build.node("Softmax", "probabilities", "logits", axis=-1)
    scores = build.slice_last("object_probabilities", probabilities, 0, spec.num_classes)
    return Heads("pred_boxes", scores)


def read_sigmoid(
    source: Source,
    hints: Hints,
    *,
    family: str,
    convention: Convention,
    kept: int,
    how: str,
    labels: tuple[str, ...] = (),
    antialias: bool = True,
    unused: Sequence[int] = (),
) -> Reading:
    """A set prediction with a sigmoid over every class: the best of all query and class pairs, no NMS.

    Args:
        unused: classes that no image was trained for, and that are never chosen; those beyond the last are left aside.
    """
    evidence = Evidence(str(source.path), hints.assume)
    export = read_export(source, hints, evidence, trusted=how.startswith("read: metadata"))
    evidence.add(ev.FAMILY, family, how)
    scores = "probabilities" if export.outputs.activated else "sigmoid"
    evidence.add(ev.SCORES, scores, f"{ev.CONVENTION}{convention.of}")
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}{convention.of}")
    evidence.add(
        ev.SELECTION,
        "the best of all query and class pairs, no NMS",
        f"{ev.CONVENTION}{convention.of}",
    )
    kept = min(kept, export.num_queries * export.num_logits)
    if export.outputs.kept:
        kept = export.outputs.kept
    attention: Mode = "keep"
    if is_deformable(source):
        attention = hints.deformable_attention or DEFAULT_ATTENTION
    reading = describe(
        source, export, hints, evidence, family=family, num_classes=export.num_logits,
        convention=convention, kept=kept, deformable_attention=attention, labels=labels, antialias=antialias,
    )  # fmt: skip
    spec = reading.spec.replace(
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=kept,
            score_activation=not export.outputs.activated,
            box_coding=1,
        )
    )
    if len(unused) and export.num_logits > max(unused) and not export.outputs.activated:
        heads = {"pred_boxes": export.boxes, "logits": export.logits}
        made = partial(assemble_used, unused=tuple(unused))
        return dataclasses.replace(reading, spec=spec, heads=heads, assemble=made)
    return dataclasses.replace(
        reading, spec=spec, heads={RAW_BOXES: export.boxes, CLASS_LOGITS: export.logits}
    )


def assemble_used(build: Builder, spec: ModelSpec, *, unused: tuple[int, ...]) -> Heads:
    """The logits, those of unused classes so low that they are never chosen; the boxes as they are."""
    is_unused = np.isin(np.arange(spec.num_classes), unused)[None, None]
    return Heads(
        "pred_boxes", build.node("Where", "used_logits", is_unused, np.float32(-100), "logits")
    )


# ---- what all families of set predictions share ----------------------------------------------------------------------------

IMAGENET = Normal(IMAGENET_MEAN, IMAGENET_STD)
DEFAULT_ATTENTION: Mode = "gather"


def read_export(
    source: Source, hints: Hints, evidence: Evidence, *, trusted: bool = False
) -> Export:
    """Inputs and outputs.

    Args:
        trusted: the file says that it is a set prediction, so boxes need not look like some.

    Raises:
        GraphError: they are not those of a set prediction, or the size is dynamic and not given.
    """
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected an ONNX file, found a SavedModel; export it to ONNX"
        )
    graph = source.model.graph
    inputs = {i.name: i for i in graph.input if i.name in source.graph.inputs}
    shapes = declared_shapes(source)
    image = maybe_image(source)
    masks = [name for name, shape in shapes.items() if len(shape) == 3 and "mask" in name.lower()]
    sizes = [name for name, shape in shapes.items() if len(shape) == 2]
    if (
        image is None
        or 1 + len(masks) + len(sizes) != len(shapes)
        or len(masks) > 1
        or len(sizes) > 1
    ):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise GraphError(
            f"{source.path}: expected an image [N, 3, H, W] and at most a mask [N, H, W] called so, found {found}; export the model "
            "with these inputs"
        )
    name, layout = image
    dims = shapes[name][2:] if layout == "NCHW" else shapes[name][1:3]
    size_hw = (dims[0], dims[1]) if dims[0] and dims[1] else hints.size_hw
    if size_hw is None:
        raise GraphError(
            f"{source.path}: its input takes any size; name the one that it shall have: --size H,W"
        )
    check_runs(source, NAME, [info.name for info in graph.output])
    outputs = maybe_outputs(source, hints, trusted=trusted)
    if outputs is None:
        _run_as_it_is(source, shapes[name][0] or 1, name, layout, size_hw)
        raise GraphError(
            f"{source.path}: expected logits [N, queries, classes] and boxes [N, queries, 4], centre and size from 0 to 1, and no other output, "
            f"found {', '.join(i.name for i in graph.output)}; export the model with these outputs, or declare them with --boxes_output and "
            "--scores_output"
        )
    mask = masks[0] if masks else ""
    sides = shapes[mask][1:] if mask else size_hw
    entry = find_pixels(source, hints, feeds=other_feeds(source, size_hw))
    if entry.layout != "NCHW":
        raise GraphError(
            f"{source.path}: expected channels before height and width at the first convolution; export the model from PyTorch"
        )
    export = Export(
        outputs=outputs,
        entry=entry,
        mask=mask,
        mask_hw=(sides[0] or size_hw[0], sides[1] or size_hw[1]),
        mask_type=inputs[mask].type.tensor_type.elem_type if mask else TensorProto.INT64,
        size_hw=size_hw,
        batch=shapes[name][0],
    )
    evidence.add(ev.INPUT, f"'{name}' {layout} {size_hw[0]}x{size_hw[1]}", "read: its shape")
    num_queries, num_logits = _head_sizes(source, export)
    export = dataclasses.replace(export, num_queries=num_queries, num_logits=num_logits)
    if export.batch is None and not _takes_two(source, export):
        export = dataclasses.replace(export, batch=1)
        evidence.add(
            ev.BATCH,
            "1",
            f"{ev.MEASURED}its shape is dynamic, but the export itself fails with 2 images",
        )
    else:
        batch = "dynamic" if export.batch is None else str(export.batch)
        evidence.add(ev.BATCH, batch, "read: the shape of the input")
    return export


def _run_as_it_is(
    source: OnnxSource, batch: int, image: str, layout: Layout, size_hw: tuple[int, int]
) -> None:
    """Let ONNX Runtime say why the model does not run, if that is so.

    Raises:
        GraphError: what it says.
    """
    feeds = {name: np.repeat(v, batch, axis=0) for name, v in other_feeds(source, size_hw).items()}
    if {image, *feeds} != set(source.graph.inputs):
        return
    fed = in_layout(np.zeros((batch, *size_hw, 3), np.float32), layout)
    try:
        source.run([info.name for info in source.model.graph.output], {image: fed, **feeds})
    except GraphError as error:
        raise _explained(source, error) from error


def _explained(source: Source, error: GraphError) -> GraphError:
    if "GridSample" not in str(error):
        return error
    return GraphError(
        f"{source.path}: ONNX Runtime cannot run its GridSample: torch's older exporter computes positions in float64 where the "
        f"batch is fixed; export it with a dynamic batch (dynamic_axes) or with dynamo=True ({error})"
    )


def _feeds(export: Export, batch: int) -> dict[str, np.ndarray]:
    n, (height, width) = batch, export.size_hw
    feeds: dict[str, np.ndarray] = {export.pixels: np.zeros((n, 3, height, width), np.float32)}
    if export.mask:
        feeds[export.mask] = _ones_mask(export, n)
    return feeds


def _takes_two(source: Source, export: Export) -> bool:
    """Whether two images go through, and give what one gives."""
    feeds = _feeds(export, 2)
    try:
        for value in source.run([export.logits, export.boxes], feeds):
            if len(value) != 2:
                return False
    except GraphError:
        return False
    return True


def _head_sizes(source: Source, export: Export) -> tuple[int, int]:
    """Numbers of queries and of logits each.

    Raises:
        GraphError: the model does not run, or its outputs do not fit each other.
    """
    feeds = _feeds(export, export.batch or 1)
    try:
        logits, boxes = source.run([export.logits, export.boxes], feeds)
    except GraphError as error:
        raise _explained(source, error) from error
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise GraphError(
            f"{source.path}: expected {export.logits} [N, queries, classes] and {export.boxes} [N, queries, 4], found {list(logits.shape)} and "
            f"{list(boxes.shape)}"
        )
    return logits.shape[1], logits.shape[2]


def describe(
    source: OnnxSource | Source,
    export: Export,
    hints: Hints,
    evidence: Evidence,
    *,
    family: str,
    num_classes: int,
    convention: Convention,
    kept: int,
    deformable_attention: Mode = "keep",
    labels: tuple[str, ...] = (),
    antialias: bool = True,
) -> Reading:
    """Everything but what is selected from the heads."""
    resize: ResizeMode = hints.resize or ("letterbox" if export.mask else "stretch")
    normal = decide_normalisation(evidence, export.entry, hints, convention)
    mean, std, notes = normal.mean, normal.std, list[Note]()
    note_facts(evidence, export, hints, resize, convention.of, kept)
    evidence.add(
        ev.CLASSES, num_classes,
        "read: the number of logits" + (", less the background class" if num_classes < export.num_logits else ""),
    )  # fmt: skip
    if hints.preprocessor and export.mask and not any(mean) and resize == "letterbox":
        text = "padding is black with this normalisation: black rows and columns at the end of a picture count as padding"
        notes.append(Note(text, "resize_mode"))
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
        bgr=normal.bgr,
        pad_rgb=mean,
        resize=resize,
        rounding="round",
        antialias=antialias,
    )
    spec = ModelSpec(
        family=family,
        preprocessing=preprocessing,
        nms=Nms(),
        category_ids=COCO_80_IDS
        if labels == COCO_80_LABELS and num_classes == 80
        else tuple(range(num_classes)),
        labels=next((x for x in (labels, hints.labels) if len(x) == num_classes), ()),
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
        facts=evidence.settle(),
        final=final_of(export),
        takes=frozenset(
            ["channel_order", *(["deformable_attention"] if is_deformable(source) else [])]
        ),
    )


def note_facts(
    evidence: Evidence, export: Export, hints: Hints, resize: ResizeMode, of: str, kept: int
) -> None:
    """The facts that all set predictions share."""
    if hints.resize:
        evidence.add(ev.RESIZE, resize, f"{ev.GIVEN}--resize_mode {resize}")
    elif export.mask:
        evidence.add(
            ev.RESIZE, "letterbox, top left on the mean, with a mask", "read: its mask input"
        )
    else:
        evidence.add(ev.RESIZE, resize, f"{ev.CONVENTION}{of}, without a mask input")
    evidence.add(ev.BOXES, "cxcywh, 0 to 1", f"{ev.MEASURED}their values; {ev.CONVENTION}{of}")
    evidence.add(ev.CATEGORY_IDS, "class index", f"{ev.CONVENTION}{of}")
    evidence.add(
        ev.KEPT,
        kept,
        "read: the rows of its outputs" if export.outputs.kept else f"{ev.CONVENTION}{of}",
    )


def final_of(export: Export) -> Final | None:
    """The source's own detections, where post-processing is in the export."""
    outputs = export.outputs
    if outputs.detections is None:
        return None
    height, width = export.size_hw
    order = (height, width) if outputs.sizes_hw else (width, height)
    feeds = {outputs.sizes: np.array([order], np.int64)} if outputs.sizes else {}
    return Final(outputs.detections, partial(read_detections, outputs), feeds=feeds)


def rewrite_network(
    graph: gs.Graph, *, export: Export, preprocessing: Preprocessing, deformable_attention: Mode
) -> None:
    """The cut network in place: without its mask input and shape arithmetic, boxes relative to the network input.

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


def _insert_share(model: onnx.ModelProto, share: str, boxes: str) -> None:
    """Boxes relative to the network input in place of those relative to the picture, under the same name."""
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


def _ones_mask(export: Export, batch: int) -> np.ndarray:
    return np.ones((batch, *export.mask_hw), helper.tensor_dtype_to_np_dtype(export.mask_type))
