# SPDX-License-Identifier: Apache-2.0
"""Any detector in an ONNX file, by its outputs alone: declared on the command line, or told by
shapes, values and the graph.

| outputs | as exported by |
|---|---|
| boxes [N, A, 4], scores [N, A, C] or [N, C, A] | YOLO-NAS, PP-YOLOE, PicoDet, DAMO-YOLO, RTMDet |
| boxes [N, K, 4], scores [N, K], labels [N, K] | exports that select by themselves |
| dets [N, K, 5], labels [N, K] | MMDeploy |
| the same of one picture, K of which follows the picture | `trtdet.families.any_number` |
| one of rows: x1 y1 x2 y2 score label; box and scores; box, objectness and scores | DeepStream's users, PicoDet, RTMDet, YOLO without metadata |

What a box is, whether scores are probabilities, whether rows are selected already, is measured on
photographs; what was declared is checked against it. How images come in is not in such a file: it
is asked for, unless a recognised framework's convention is handed in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.families import any_number, nms_inside, nms_plugin, one_picture
from trtdet.families import evidence as ev
from trtdet.families.base import (
    IMAGE_HINTS,
    NO_HINTS,
    Declaration,
    Final,
    Hints,
    Reading,
)
from trtdet.families.box_formats import maybe_levels
from trtdet.families.evidence import Evidence
from trtdet.families.heads_assembly import assemble
from trtdet.families.heads_declared import check_names, refuse_unused
from trtdet.families.heads_images import (
    as_said,
    as_they_are,
    has_size,
    note_input,
    note_shorter_side,
    preprocessing_of,
)
from trtdet.families.heads_plan import (
    LABELS,
    PADDLE_INPUTS,
    Framework,
    Plan,
    describe_outputs,
    paddle_feeds,
    starting_line,
)
from trtdet.families.heads_reader import Reader
from trtdet.families.normalisation import Convention, decide_normalisation
from trtdet.families.outputs import batch_of, look, selected_from
from trtdet.families.pixels import find_pixels, is_paddle, maybe_image
from trtdet.graph.static_shapes import fix_shapes, knows_sizes
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS, fit_labels, may_be_coco_80
from trtdet.sources.base import Shape, Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import (
    ModelSpec,
    Nms,
    Preprocessing,
)

__all__ = ["NAME", "Framework", "matches", "read", "starting_line", "why_not"]

NAME = "heads"
#: Tried only where no family that knows its network matches.
IS_GENERAL = True

IOU_THRESHOLD = 0.6


def matches(source: Source) -> bool:
    """Whether some outputs have the shapes of one of the forms; unknown dimensions may be
    anything.
    """
    if not isinstance(source, OnnxSource) or source.spec or maybe_image(source) is None:
        return False
    if not _explained(source):
        return False
    shapes = [s for s in _declared_shapes(source).values()]
    if any(len(s) == 3 or not s for s in shapes) or any_number.is_open(source):
        return True
    return nms_plugin.has_plugin(source) or nms_inside.maybe_inside(source) is not None


def why_not(source: Source) -> str:
    """What the outputs are, and the options to declare them with."""
    if not isinstance(source, OnnxSource) or source.spec:
        return ""
    if maybe_image(source) is None or not _explained(source):
        described = describe_outputs(source, declare=False)
        return f"it takes one image input alone, [N, 3, H, W] or [N, H, W, 3]; {described}; export the model with one image input"
    return "it takes boxes and scores [N, A, ...]; " + describe_outputs(source)


def _explained(source: OnnxSource) -> bool:
    """Whether all inputs beside the images are known."""
    image = maybe_image(source)
    others = {*source.graph.inputs} - ({image[0]} if image else set())
    return others <= PADDLE_INPUTS


def read(source: Source, hints: Hints = NO_HINTS, framework: Framework | None = None) -> Reading:
    """See `trtdet.families.base.Family.read`.

    Args:
        framework: whose export this is, where the file says it.
    """
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected an ONNX file, found a SavedModel; export it to ONNX"
        )
    check_names(source, hints.declared)
    evidence = Evidence(str(source.path), hints.assume)
    found = _find_outputs(source, hints, framework, evidence)
    known, outputs, inside, rows = found.known, found.outputs, found.inside, found.rows
    feeds = paddle_feeds(source, hints.size_hw or known.size_hw)
    resizes = rows is not None and rows.resizes
    pixels = find_pixels(source, hints, usual_size=known.size_hw, feeds=feeds, pads=resizes)
    if not {*pixels.others} <= feeds.keys():
        raise GraphError(
            f"{source.path}: expected images as the only input, found {', '.join(pixels.others)} too; export the model without"
        )
    size_hw = pixels.size_hw or (0, 0)
    shorter_side = None if has_size(source) or hints.size_hw else known.shorter_side
    own_size = known.own_size and not has_size(source) and not hints.size_hw
    note_input(evidence, pixels, size_hw if not own_size else None)
    convention = Convention(known.name, known.normal) if known.normal else None
    normal = decide_normalisation(evidence, pixels, hints, convention)
    if own_size:
        preprocessing = as_they_are(source, evidence, hints, normal, size_hw)
        one_picture.mend(source, pixels, normal)
    else:
        preprocessing = preprocessing_of(evidence, hints, known, normal, size_hw, clips=True)
    if shorter_side:
        note_shorter_side(evidence, known, shorter_side)
    declared = _merged(hints.declared, known.declaration(outputs))
    named = [*outputs, *_named(declared, outputs)]
    wanted = list(dict.fromkeys([*named, *selected_from(source.model, named)]))
    seen = look(source, pixels, normal, wanted, feeds, size_hw)
    plan = Reader(source, seen, size_hw, declared, evidence, hints, known, rows).plan()
    if not evidence.missing:
        refuse_unused(plan, hints, str(source.path))
    if resizes:
        one_picture.check_scale(source, pixels, normal, plan, known, declared, evidence)
    spec = _spec(plan, preprocessing, hints, known, evidence)
    batch, said = batch_of(source, pixels, list(plan.tensors.values()), size_hw, feeds)
    if rows is not None:
        batch, said = 1, f"{ev.READ}the number of detections follows the picture"
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    multiple = None if has_size(source) else _multiple(known, plan, size_hw)
    if clips := known.clipped and not plan.selected:
        spec = spec.replace(nms=dataclasses.replace(spec.nms, box_coding=0))
    return Reading(
        spec=spec,
        image_input=pixels.tensor,
        network_input=pixels.tensor,
        network_layout=pixels.layout,
        image_layout=pixels.layout,
        heads=plan.tensors,
        assemble=partial(assemble, plan=plan, known=known, clips=clips),
        batch=batch,
        rewrite=partial(
            _declare,
            shapes={k: seen[v][0].shape for k, v in plan.tensors.items()},
            count=plan.count,
            feeds=feeds,
            batch=batch,
            images=pixels.shape if has_size(source) and rows is None else None,
            padded=rows is not None,
        ),
        feeds=feeds,
        facts=evidence.settle(),
        final=_final(source, plan, inside, size_hw),
        notes=() if own_size or shorter_side else known.notes,
        takes=IMAGE_HINTS | {"declared", "num_classes", "clipped"},
        size_multiple=multiple,
        shorter_side=shorter_side,
        own_size=own_size,
        one_by_one=rows is not None,
    )


@dataclass(frozen=True)
class _Outputs:
    """Where boxes and scores are to be looked for.

    Attributes:
        known: of the framework, and of an NMS in the graph.
        outputs: of the file, empty where an NMS names its inputs.
        inside: ONNX's NMS, whose inputs are taken.
        rows: detections of one picture, as many as it has.
    """

    known: Framework
    outputs: list[str]
    inside: nms_inside.Inside | None
    rows: any_number.Rows | None


def _find_outputs(
    source: OnnxSource, hints: Hints, framework: Framework | None, evidence: Evidence
) -> _Outputs:
    """Whose export it is, as far as that can be told, and which of its tensors count."""
    by_paddle = framework is None and is_paddle(source)
    usual = Framework("PaddleDetection", asks_sampling=True) if by_paddle else Framework("")
    known = as_said(framework or usual, hints)
    plugin = nms_plugin.maybe_plugin(source)
    inside = nms_inside.maybe_inside(source, hints.declared) if plugin is None else None
    origin = f"{ev.MEASURED}the shapes of its outputs"
    if framework:
        origin = f"{ev.READ}metadata of {known.name}"
    elif by_paddle:
        origin = f"{ev.READ}the name of its graph"
    elif plugin is not None:
        origin = f"{ev.READ}its {plugin.op_type} node"
    elif inside is not None:
        origin = f"{ev.READ}{nms_inside.NAME}"
    evidence.add(ev.FAMILY, known.name or NAME, origin)
    if plugin is not None:
        return _Outputs(nms_plugin.framework_of(plugin, known), [], None, None)
    if inside is not None:
        return _Outputs(nms_inside.framework_of(inside, known), [], inside, None)
    outputs = [info.name for info in source.model.graph.output]
    rows = any_number.find_rows(source, _merged(hints.declared, known.declaration(outputs)))
    if rows is not None:
        known = one_picture.pad(source, rows, known, hints, evidence)
        outputs = [info.name for info in source.model.graph.output]
    return _Outputs(known, outputs, None, rows)


def _final(
    source: OnnxSource, plan: Plan, inside: nms_inside.Inside | None, size_hw: tuple[int, int]
) -> Final | None:
    """The detections that the source selects itself, where it does."""
    if inside is not None:
        return nms_inside.final(inside, plan, size_hw, str(source.path))
    return one_picture.final(plan, size_hw) if one_picture.has_final(plan) else None


def _multiple(known: Framework, plan: Plan, size_hw: tuple[int, int]) -> int | None:
    """What the sides of an input of any size must be a multiple of."""
    levels = maybe_levels(plan.count, size_hw)
    return known.size_multiple or (levels.strides[-1] if levels else None)


def _declared_shapes(source: OnnxSource) -> dict[str, tuple[int, ...]]:
    return {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in source.model.graph.output
    }


def _merged(given: Declaration | None, known: Declaration) -> Declaration:
    """What was declared, and what a framework says where nothing was."""
    if given is None:
        return known
    said = {k: v for k, v in vars(given).items() if v not in (None, "", ())}
    merged: Declaration = dataclasses.replace(known, **said)
    return merged


def _named(declared: Declaration, outputs: Sequence[str]) -> list[str]:
    """Declared tensors that are no outputs."""
    names = (declared.boxes, declared.scores, declared.labels, declared.rows)
    return [name for name in dict.fromkeys(names) if name and name not in outputs]


def _spec(
    plan: Plan, preprocessing: Preprocessing, hints: Hints, known: Framework, evidence: Evidence
) -> ModelSpec:
    labels = known.labels if len(known.labels) == plan.num_classes else ()
    given = fit_labels(hints.labels, plan.num_classes)
    labels = labels or (given if len(given) == plan.num_classes else ())
    coco = may_be_coco_80(labels, plan.num_classes)
    if coco:
        ids, origin = COCO_80_IDS, "convention: COCO's ids of its 80 classes"
    else:
        first = known.first_id + (plan.label_base if known.first_id == 0 else 0)
        ids = tuple(range(first, first + plan.num_classes))
        origin = (
            f"{ev.CONVENTION}class index + 1" if known.first_id else f"{ev.CONVENTION}its labels"
        )
    evidence.add(ev.CATEGORY_IDS, ev.ids_text(ids), origin)
    one_class_each = plan.labels != "" or plan.label_column is not None
    kept = known.kept or (plan.count if plan.selected else one_picture.MAX_DETECTIONS)
    if plan.selected:
        pairs = plan.count * (1 if one_class_each else max(plan.num_classes, 1))
        kept = min(kept, pairs)
    if former := next((fact for fact in evidence.facts if fact.name == ev.KEPT), None):
        how, kept = former.origin, int(former.value)
    else:
        how = ""
    how = how or (
        known.origin
        if known.kept
        else "read: all of its rows"
        if plan.selected and kept == plan.count
        else "default: --max_detections"
    )
    evidence.add(ev.KEPT, kept, how)
    return ModelSpec(
        family=NAME,
        preprocessing=preprocessing,
        nms=Nms(
            score_threshold=known.score_threshold if not plan.selected else 0.0,
            iou_threshold=1.0 if plan.selected else known.iou_threshold or IOU_THRESHOLD,
            max_output_boxes=kept,
            score_activation=plan.activation == "sigmoid" and plan.objectness is None,
            class_agnostic=known.agnostic or (plan.selected and one_class_each),
            box_coding=1 if plan.box_format == "cxcywh" else 0,
        ),
        category_ids=ids,
        labels=labels or (COCO_80_LABELS if coco and known.name else ()),
        box_order="yxyx" if plan.box_format == "yxyx" else "xyxy",
        boxes_normalized=plan.is_unit,
        selection="topk" if plan.selected else "nms",
        anchored=False,
    )


def _declare(
    graph: gs.Graph,
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    feeds: Mapping[str, NDArray[np.float32]],
    batch: int | None,
    images: Shape | None,
    padded: bool,
) -> None:
    """Give the heads the shapes that they were seen to have; how many rows there are follows the
    size where that is dynamic. Inputs beside the images become constants. Sizes that the network
    computes become constants where they hide the size of a feature map, as INT8 wants to know it.

    Args:
        images: the shape of its input; None: of any size.
        padded: to a fixed number of rows, of one picture.
    """
    for tensor in [t for t in graph.inputs if t.name in feeds]:
        graph.inputs.remove(tensor)
        tensor.to_constant(feeds[tensor.name])
    fix_sizes(graph, images, batch)
    free = None in (graph.inputs[0].shape or ())[1:] and not padded
    for position, (name, shape) in enumerate(shapes.items()):
        tensor = graph.outputs[position]
        if name == LABELS:  # whole numbers: exact in float32
            tensor.name, former = f"{tensor.name}/labels", tensor
            tensor = gs.Variable(former.name.removesuffix("/labels"))
            graph.nodes.append(
                gs.Node("Cast", "labels_float", {"to": TensorProto.FLOAT}, [former], [tensor])
            )
            graph.outputs[position] = tensor
        tensor.shape = [
            1 if padded else "N",
            *(None if free and n == count else n for n in shape[1:]),
        ]
        tensor.dtype = np.dtype(np.float32)


def fix_sizes(graph: gs.Graph, images: Shape | None, batch: int | None) -> None:
    """Sizes that the network computes become constants where they hide that of a feature map.

    Args:
        images: the shape of its input; None: of any size, nothing is done.
    """
    if images is None:
        return
    for tensor in graph.outputs:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    model = gs.export_onnx(graph)
    if knows_sizes(model):
        return
    fixed = gs.import_onnx(fix_shapes(model, {graph.inputs[0].name: images}, batch=batch))
    graph.nodes, graph.inputs, graph.outputs = fixed.nodes, fixed.inputs, fixed.outputs
    graph.opset, graph.import_domains = fixed.opset, fixed.import_domains
