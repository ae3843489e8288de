# SPDX-License-Identifier: Apache-2.0
"""Exports that end in TensorRT's NMS plugin, EfficientNMS_TRT or BatchedNMS_TRT: num_dets,
det_boxes, det_scores and det_classes, as YOLO's tools for TensorRT and DAMO-YOLO write them.

ONNX Runtime cannot run the plugin, but its inputs are the boxes and scores that are looked for, and
its attributes say what they are and how they are suppressed.
"""

from collections.abc import Iterable
from typing import Any

import onnx

from trtdet.errors import GraphError
from trtdet.families.base import Declaration
from trtdet.families.heads_plan import Framework
from trtdet.families.outputs import Nodes, attribute
from trtdet.sources.onnx_file import OnnxSource

#: What puts detections together to rows, and leaves out those behind their number.
REARRANGING = frozenset(
    ("Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherND", "Greater", "Identity", "Less", "NonZero", "Range",
     "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)  # fmt: skip
PLUGINS = ("EfficientNMS_TRT", "BatchedNMS_TRT", "BatchedNMSDynamic_TRT")


def has_plugin(source: OnnxSource) -> bool:
    return any(node.op_type in PLUGINS for node in source.model.graph.node)


def maybe_plugin(source: OnnxSource) -> onnx.NodeProto | None:
    """The NMS plugin that the export ends in.

    Raises:
        GraphError: there are others, other outputs, or boxes relative to anchors.
    """
    found = [node for node in source.model.graph.node if node.op_type in PLUGINS]
    if not found:
        return None
    outputs = {info.name for info in source.model.graph.output}
    if len(found) > 1 or len(found[0].input) != 2 or not _follow(source, outputs, found[0]):
        raise GraphError(
            f"{source.path}: expected one {found[0].op_type} of boxes and scores whose results are the outputs, found {len(found)} with inputs "
            f"{', '.join(found[0].input)} and the outputs {', '.join(sorted(outputs))}; export the model without it"
        )
    return found[0]


def _follow(source: OnnxSource, outputs: Iterable[str], plugin: onnx.NodeProto) -> bool:
    """Whether outputs are what the plugin yields, at most put together to rows: nothing else
    reaches them, and no arithmetic changes them.
    """
    nodes, pending, seen = Nodes(source.model), list(outputs), set[str]()
    while pending:
        name = pending.pop()
        if name in seen or name in plugin.output or nodes.is_constant(name):
            continue
        seen.add(name)
        node = nodes.producer.get(name)
        if node is None or node.op_type not in REARRANGING:
            return False
        pending.extend(n for n in node.input if n)
    return bool(seen) or {*outputs} <= {*plugin.output}


def framework_of(plugin: onnx.NodeProto, known: Framework) -> Framework:
    """What the plugin says of its inputs and of the NMS, where the framework does not."""
    name = known.name or f"its {plugin.op_type}"
    is_efficient = plugin.op_type == "EfficientNMS_TRT"
    changes = _of_efficient(plugin) if is_efficient else _of_batched(plugin)
    declared = Declaration(
        boxes=plugin.input[0], scores=plugin.input[1], scores_layout="NAC", selected=False, **changes.pop("declared"),
    )  # fmt: skip
    return known.with_changes(
        name=name, declared=declared, columns=(), rows="", selected=False, is_read=not known.name, **changes,
    )  # fmt: skip


def _of_efficient(plugin: onnx.NodeProto) -> dict[str, Any]:
    centred = _number(plugin, "box_coding", 0) == 1
    return {
        "iou_threshold": _number(plugin, "iou_threshold", 0.5),
        "score_threshold": _number(plugin, "score_threshold", 0.25),
        "kept": _number(plugin, "max_output_boxes", 100),
        "agnostic": bool(_number(plugin, "class_agnostic", 0)),
        "declared": {
            "box_format": "cxcywh" if centred else None,
            "activation": "sigmoid" if _number(plugin, "score_activation", 0) else "none",
            "background": "none" if _number(plugin, "background_class", -1) < 0 else None,
        },
    }


def _of_batched(plugin: onnx.NodeProto) -> dict[str, Any]:
    return {
        "iou_threshold": _number(plugin, "iouThreshold", 0.5),
        "score_threshold": _number(plugin, "scoreThreshold", 0.25),
        "kept": _number(plugin, "keepTopK", 100),
        "declared": {
            "activation": "none",
            "background": "none" if _number(plugin, "backgroundLabelId", -1) < 0 else None,
        },
    }


def _number(plugin: onnx.NodeProto, name: str, default: float) -> Any:
    """An attribute; some exporters write a number as a list of one."""
    value = attribute(plugin, name, default)
    return value[0] if isinstance(value, list) and len(value) == 1 else value
