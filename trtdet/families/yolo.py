# SPDX-License-Identifier: Apache-2.0
"""YOLO: what Ultralytics (v8, v11, v10, 26, their OBB, segment and pose models), YOLOv5, YOLOv7,
YOLOv6 and YOLOX export.

| head | from | one row | what follows |
|---|---|---|---|
| raw [N, 4+C, A] | v8, v11 | cx cy w h in input pixels, class scores | NMS |
| raw [N, 4+C+1, A] | OBB | the same and an angle | NMS of rotated boxes |
| objectness [N, A, 5+C] | v5, v6, v7 | cx cy w h in input pixels, objectness, class scores | NMS |
| grid [N, A, 5+C] | YOLOX | offsets to a grid, objectness, class scores | NMS |
| end to end [N, K, 6], OBB [N, K, 7] | v10, 26, exports with NMS inside | x1 y1 x2 y2 (OBB: cx cy w h), score, class (, angle) | the best K |

All scores are behind their sigmoid. Ultralytics and YOLOv5 write names, stride and task into the
file's metadata. The others write nothing: three boxes in each cell are those of v5 and v7, an
objectness of exactly 1 is v6's, offsets to a grid are YOLOX's. Any other head without metadata is
for `trtdet.families.heads`, which asks how images come in.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import (
    IMAGE_HINTS,
    NO_HINTS,
    Final,
    Found,
    Hints,
    Reading,
)
from trtdet.families.evidence import Evidence
from trtdet.families.normalisation import Convention, decide_normalisation
from trtdet.families.outputs import batch_of, check_finite, is_whole, unexplained
from trtdet.families.pixels import find_pixels, maybe_image
from trtdet.families.yolo_assembly import HEAD, assembler, declare_head
from trtdet.families.yolo_conventions import (
    YOLOX_NORMAL,
    category_ids_of,
    is_yolox,
    nms_of,
    note_facts,
    notes_of,
    preprocessing_of,
    selection_of,
)
from trtdet.families.yolo_heads import (
    Head,
    before_selection,
    check_scores,
    declared_outputs,
    find_dfl,
    find_head,
    grid_of,
    is_decoded,
    is_seen,
    levels_of,
    look,
    no_head_before_nms,
    unseen,
)
from trtdet.families.yolo_metadata import LEFT_OUT, Metadata, read_metadata
from trtdet.graph.map_op import unknown_ops
from trtdet.labels import COCO_80_LABELS, fit_labels
from trtdet.sources.base import Source, SourceGraph
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec

NAME = "yolo"
#: A detection is x1 y1 x2 y2, a score and a class id.
DETECTION_WIDTH = 6


def matches(source: Source) -> bool:
    """Whether the metadata is that of a YOLO export, or without any, the outputs are what only
    v5, v6, v7 or YOLOX export.
    """
    if not isinstance(source, OnnxSource) or source.spec:
        return False
    keys = {prop.key for prop in source.model.metadata_props}
    if "libreyolo_version" in keys:
        return False
    if {"names", "stride"} <= keys:
        return not is_set_prediction(source)
    return "names" not in keys and maybe_without_metadata(source) is not None


def is_set_prediction(source: Source) -> bool:
    """Whether the rows are those of Ultralytics' RT-DETR: no grid has so many cells, and they are
    wider than detections; with two classes, they hold what no detection does.
    """
    if not isinstance(source, OnnxSource) or source.spec:
        return False
    keys = {prop.key for prop in source.model.metadata_props}
    if not {"names", "stride"} <= keys or "libreyolo_version" in keys:
        return False
    shapes = declared_outputs(source.model)
    size_hw = _declared_size(source.graph)
    metadata = read_metadata(source.model)
    names = metadata.names
    if metadata.is_rotated or len(shapes) != 1:
        return False
    ((name, shape),) = shapes.items()
    if len(shape) != 3 or shape[2] != 4 + len(names) or (size_hw and levels_of(shape, size_hw)):
        return False
    return shape[2] != DETECTION_WIDTH or _has_two_scores(source, name, size_hw or metadata.size_hw)


def _has_two_scores(source: OnnxSource, rows: str, size_hw: tuple[int, int] | None) -> bool:
    """Whether rows of six values are a box of 0 to 1 and a probability for each of two classes,
    rather than a box in pixels, a score and a class id; False where ONNX Runtime cannot tell.
    """
    if unknown_ops(source, [rows]):
        return False
    try:
        pixels = find_pixels(source, NO_HINTS, usual_size=size_hw)
        seen = look(source, pixels, pixels.size_hw or (0, 0), [rows])[rows]
    except GraphError:
        return False
    return bool(np.abs(seen[..., :4]).max() <= 1) and not is_whole([seen[..., 5]])


def maybe_without_metadata(source: OnnxSource) -> str | None:
    """Which YOLO a file without metadata is by its outputs; None: none of them, or not surely."""
    size_hw = _declared_size(source.graph)
    if size_hw is None or maybe_image(source) is None or len(source.graph.inputs) != 1:
        return None
    outputs = list(declared_outputs(source.model))
    try:
        if unknown_ops(source, outputs):
            return kind_of(source, unseen(source.model, outputs), size_hw)
        pixels = find_pixels(source, NO_HINTS, usual_size=size_hw)
        return kind_of(source, look(source, pixels, size_hw, outputs), size_hw)
    except GraphError:
        return None


def kind_of(
    source: OnnxSource, values: Mapping[str, NDArray[Any]], size_hw: tuple[int, int]
) -> str | None:
    """Which YOLO has such outputs: "YOLOv5 and v7", "YOLOv6", "YOLOX"; None: none of them, or not
    surely.

    Args:
        values: the outputs for some image.
    """
    shapes = declared_outputs(source.model)
    heads = [
        (name, value, levels)
        for name, value in values.items()
        if value.ndim == 3 and (levels := levels_of(value.shape, size_hw)) is not None
        and value.shape[1] == levels.count
        and all(n in (0, m) for n, m in zip(shapes[name][1:], value.shape[1:], strict=False))
    ]  # fmt: skip
    if len(heads) != 1:
        return None
    name, value, levels = heads[0]
    if any(len(v.shape) == 3 and n != name for n, v in values.items()):
        return None  # boxes beside it
    if levels.boxes_per_cell == 3:
        return "YOLOv5 and v7"
    if not is_seen(value):
        return "YOLOX"
    if (value[..., 4] == 1).all() and value.shape[2] > 5 and is_decoded(value, levels):
        return "YOLOv6"
    offsets = not is_decoded(value, levels) and not is_decoded(value[..., 2:], levels)
    scores = value[..., 4:]
    if offsets and scores.min() >= 0 and scores.max() <= 1 and np.abs(value[..., :2]).max() < 64:
        return "YOLOX"
    return None


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected a YOLO model in an ONNX file, found a SavedModel; export it to ONNX"
        )
    metadata = read_metadata(source.model)
    _check_source(source, metadata)
    size_hw = _size(source.graph, metadata, hints)
    evidence = Evidence(str(source.path), hints.assume)
    pixels = find_pixels(source, hints, usual_size=size_hw)
    see = partial(look, source, pixels, size_hw)
    outputs = list(declared_outputs(source.model))
    unknown = unknown_ops(source, outputs)
    values = unseen(source.model, outputs) if unknown else see(outputs)
    for name, value in values.items():
        if not unknown:
            check_finite(source, name, value)
    head = find_head(values, size_hw, metadata, hints)
    final = head
    if head.kind == "end_to_end" and not unknown:
        head = before_selection(source, head, see, size_hw, metadata)
    elif metadata.nms_inside:
        raise no_head_before_nms(source)
    if head.is_seen:
        check_scores(head)
    _check_explained(source, head, final, values)
    yolox = is_yolox(head, metadata)
    kind = "Ultralytics and YOLOv5" if metadata.names else kind_of(source, values, size_hw)
    evidence.add(
        ev.FAMILY,
        f"{NAME} ({head.kind})",
        family_origin(metadata, kind),
    )
    convention = None
    if kind:
        convention = Convention(kind, YOLOX_NORMAL if yolox else Convention("").normal)
    normal = decide_normalisation(evidence, pixels, hints, convention)
    preprocessing = preprocessing_of(evidence, hints, normal, size_hw, kind, is_yolox=yolox)
    given = fit_labels(hints.labels, head.num_classes)
    known = given if len(given) == head.num_classes else COCO_80_LABELS
    labels = metadata.names or (known if head.num_classes == len(known) else ())
    batch, said = pixels.batch, "read: the shape of the input"
    if not unknown:
        batch, said = batch_of(source, pixels, [head.tensor], size_hw)
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    declared = _declared_size(source.graph) is not None
    note_facts(
        evidence, pixels, head, metadata, kind or "YOLO", labels, size_hw, declares_size=declared
    )
    return Reading(
        spec=ModelSpec(
            family=NAME,
            preprocessing=preprocessing,
            nms=nms_of(head, metadata),
            category_ids=category_ids_of(labels, head.num_classes),
            labels=labels,
            box_order="xyxy",
            selection=selection_of(head, metadata),
            rotated_mode="exact" if head.keeps else "probiou",
            anchored=head.kind == "grid",
            sensitive_nodes=find_dfl(source.graph, head.tensor),
        ),
        image_input=pixels.tensor,
        network_input=pixels.tensor,
        network_layout=pixels.layout,
        image_layout=pixels.layout,
        heads={HEAD: head.tensor},
        rewrite=partial(declare_head, head=head),
        assemble=assembler(head, metadata, is_yolox=yolox),
        anchors=grid_of(head.levels) if head.kind == "grid" and head.levels else None,
        batch=batch,
        notes=notes_of(metadata, head, unknown),
        size_multiple=_size_multiple(source.graph, head),
        facts=evidence.settle(),
        final=_final(final, metadata) if not unknown else None,
        takes=IMAGE_HINTS | ({"rotated_nms"} if metadata.is_rotated else set()),
    )


def family_origin(metadata: Metadata, kind: str | None) -> str:
    """Where it is known from that this is a YOLO of some kind."""
    if metadata.names:
        return "read: metadata"
    return f"{ev.MEASURED}only {kind} exports such rows" if kind else f"{ev.GIVEN}--family"


def _check_explained(
    source: OnnxSource, head: Head, final: Head, values: Mapping[str, NDArray[Any]]
) -> None:
    """Refuse outputs beside the head that may hold boxes or scores; masks, and levels before
    they are put together, do not.
    """
    seen = {name: [value] for name, value in values.items()}
    used = [name for name in (final.tensor, head.tensor) if name in seen]
    left = (
        [n for n in unexplained(source, used, seen) if n in values and values[n].ndim == 3]
        if head.is_seen
        else []
    )
    if left:
        raise GraphError(
            f"yolo: '{head.tensor}' is read, but nothing explains the outputs {', '.join(left)} beside it; declare the outputs with --boxes_output "
            "and --scores_output"
        )


def _final(final: Head, metadata: Metadata) -> Final | None:
    """The rows of an end-to-end export, for the end-to-end comparison; None for others."""
    if final.kind != "end_to_end" or metadata.is_rotated or metadata.nms_inside:
        return None

    def rows(values: Sequence[NDArray[Any]]) -> Found:
        found = values[0][0].astype(np.float32)
        return Found(found[:, :4], found[:, 4], np.round(found[:, 5]).astype(np.int64))

    return Final((final.tensor,), rows)


def _check_source(source: OnnxSource, metadata: Metadata) -> None:
    """Refuse what is not a detector of images, channels first."""
    if metadata.task not in ("detect", "obb", *LEFT_OUT):
        raise GraphError(
            f"{source.path}: expected a detector, found a model for the task '{metadata.task}'"
        )
    if len(source.graph.inputs) != 1 or maybe_image(source) is None:
        raise GraphError(
            f"yolo: expected one input [N, 3, H, W], the images, found {list(source.graph.inputs)}, the first of shape "
            f"{list(source.graph.image_shape)}"
        )


def _declared_size(graph: SourceGraph) -> tuple[int, int] | None:
    """Height and width of the input, None where they are dynamic."""
    shape = graph.image_shape
    if len(shape) != 4:
        return None
    height, width = shape[1:3] if shape[3] == 3 and shape[1] != 3 else shape[2:]
    return (height, width) if height and width else None


def _size(graph: SourceGraph, metadata: Metadata, hints: Hints) -> tuple[int, int]:
    """The input size: that of the file; where it is dynamic, the one asked for, or the one it was
    exported with.

    Raises:
        GraphError: nothing says it.
    """
    size_hw = _declared_size(graph) or hints.size_hw or metadata.size_hw
    if size_hw is None:
        raise GraphError(
            "yolo: expected an input of fixed size, or 'imgsz' in the metadata, found neither; give --size H,W"
        )
    return size_hw


def _size_multiple(graph: SourceGraph, head: Head) -> int | None:
    """The largest stride where the export left the size dynamic; not for a grid, whose cells become
    constants.
    """
    if _declared_size(graph) or head.kind == "grid" or head.levels is None:
        return None
    return head.levels.strides[-1]
