# SPDX-License-Identifier: Apache-2.0
"""What every convolution, alone in 8 bits, does to the detections: measured in ONNX Runtime on a
few of the calibration's images.

The network up to a block is run once, in float32, and what it leaves is kept in memory while the
convolutions of that block are tried one after another; what does not follow from the block, another
head, is not run at all. Memory grows with the images that are looked at (`COST_IMAGES`), not with
those of the calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet.graph import deformable_attention
from trtdet.precision import objective
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.floats import NMS_OPS
from trtdet.precision.graph_types import element_types
from trtdet.precision.objective import Coding, Damage, Reference
from trtdet.precision.pairs import write_convs
from trtdet.precision.quantization import QuantizationPlan
from trtdet.sessions import Session, open_session
from trtdet.sources.base import cut_onnx
from trtdet.sources.subgraphs import reads
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)

#: Images on which convolutions are tried: with half as many, what is chosen takes 2 % less of other
#: images' error out (docs/int8.md).
COST_IMAGES = 16

Values = Mapping[str, NDArray[Any]]


# ---- the judge


class Judge:
    """Compares heads with those of the float32 network, on a few images.

    Where the heads are boxes and scores, by the objective; where they are not recognised, by the
    power of the error of all they say over its variance.

    Args:
        feeds: one image each, in every row of a fixed batch; kept in memory.
        threads: of ONNX Runtime; None: its choice.

    Attributes:
        finds: float32 finds something in these images; else the anchors that it rates best are
            compared, which is better than nothing.
    """

    def __init__(self, body: Body, feeds: Sequence[Values], *, threads: int | None = None) -> None:
        self.feeds, self.threads = list(feeds), threads
        session = _open(body.network, threads)
        heads = [_run(session, body.heads, feed) for feed in self.feeds]
        self.coding = find_coding(body, heads[0]) if heads else None
        self._heads = [] if self.coding else heads
        self._references = self._rate(heads, objective.LEAST_SCORE)
        self.finds = any(len(reference.anchors) for reference in self._references)
        if not self.finds:  # the best of what is left
            self._references = self._rate(heads, 0.0)

    def damage(self, index: int, values: Values) -> Damage:
        """Of one image's heads; those that are not among `values` are as in float32."""
        if self.coding is None:
            return _relative_power(self._heads[index], values)
        boxes, scores = (values.get(name) for name in (self.coding.boxes, self.coding.scores))
        return objective.damage(
            self.coding,
            self._references[index],
            None if boxes is None else boxes[0].reshape(boxes.shape[1], -1),
            None if scores is None else scores[0],
        )

    def judge(self, network: onnx.ModelProto) -> Damage:
        """A whole network, up to the heads, over all images."""
        session = _open(network, self.threads)
        heads = [output.name for output in network.graph.output]
        parts = (self.damage(i, _run(session, heads, feed)) for i, feed in enumerate(self.feeds))
        return sum(parts, Damage())

    def _rate(self, heads: Sequence[Values], least_score: float) -> list[Reference]:
        if self.coding is None:
            return []
        found = []
        for values in heads:
            boxes, scores = values[self.coding.boxes][0], values[self.coding.scores][0]
            boxes = boxes.reshape(len(boxes), -1)
            found.append(objective.reference(self.coding, boxes, scores, least_score=least_score))
        return found


def find_coding(body: Body, heads: Values) -> Coding | None:
    """Which head is boxes and which scores, by the plugin's inputs or else by their shapes.

    None where that does not say it.

    Args:
        heads: what the network makes of an image.
    """
    anchors = None
    if body.spec.anchored:
        found = [w for w in body.model.graph.initializer if w.name == "nms/anchors"]
        if not found:
            return None
        anchors = numpy_helper.to_array(found[0]).astype(np.float32).reshape(-1, 4)
    names = next(
        (list(n.input[:2]) for n in body.model.graph.node if n.op_type in NMS_OPS and {*n.input[:2]} <= heads.keys()),
        None,
    )  # fmt: skip
    if names is None:
        rows = {name: v for name, v in heads.items() if v.ndim == 3}
        boxes = [name for name, v in rows.items() if v.shape[2] in (4, 5, 6)]
        if len(rows) != 2 or len(boxes) != 1:
            return None
        names = [boxes[0], next(name for name in rows if name != boxes[0])]
    boxes_shape, scores_shape = (heads[name].shape for name in names)
    if len(scores_shape) != 3 or boxes_shape[:2] != scores_shape[:2]:
        return None
    if anchors is not None and len(anchors) != boxes_shape[1]:
        return None
    return Coding(names[0], names[1], body.spec.nms, anchors)


def _relative_power(expected: Values, found: Values) -> Damage:
    """As if it were that of boxes: there is nothing to weigh it against."""
    power = 0.0
    for name, values in found.items():
        error = np.square(values - expected[name], dtype=np.float64).mean()
        power += float(error) / max(float(expected[name].var(dtype=np.float64)), 1e-30)
    return Damage(weight=1.0, box_power=power)


# ---- each convolution


def measure_costs(
    plan: QuantizationPlan,
    judge: Judge,
    *,
    known: Mapping[str, Damage] | None = None,
    keep: Callable[[Mapping[str, Damage]], None] = lambda costs: None,
) -> dict[str, Damage]:
    """Convolution -> its damage where it alone is in 8 bits, of all that may be.

    Args:
        known: measured before, under the same circumstances.
        keep: called with all that is known after each block, to go on from after an interruption.
    """
    costs = dict(known or {})
    missing = [layer for layer in plan.layers if layer.name not in costs]
    blocks: dict[str, list[ConvLayer]] = {}
    for layer in missing:
        blocks.setdefault(layer.block, []).append(layer)
    network = deformable_attention.lower(plan.body.network)
    types = element_types(network)
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(missing), desc="measuring", unit="convolution", disable=no_bar()) as bar,
    ):
        for layers in blocks.values():
            part = part_behind(network, {layer.name for layer in layers}, types)
            activations = _activations(network, part, judge)
            for layer in layers:
                costs[layer.name] = _alone(plan, layer, part, activations, judge)
                bar.update()
            keep(costs)
    return costs


@dataclass(frozen=True, eq=False)
class Part:
    """What follows from some convolutions, as a network of its own: it begins in front of them
    and ends at the heads that they reach.
    """

    network: onnx.ModelProto

    @property
    def inputs(self) -> list[str]:
        return [info.name for info in self.network.graph.input]

    @property
    def heads(self) -> list[str]:
        return [info.name for info in self.network.graph.output]


def part_behind(network: onnx.ModelProto, convs: Collection[str], types: Mapping[str, int]) -> Part:
    """
    Args:
        convs: names.
        types: of tensors, `element_types(network)`.
    """
    weights = {w.name: w for w in network.graph.initializer}
    made: set[str] = set()
    needed: dict[str, None] = {}
    nodes = []
    for node in network.graph.node:
        if node.name in convs or made & reads(node):
            nodes.append(node)
            made.update(node.output)
            needed.update(dict.fromkeys(sorted(reads(node))))
    inputs = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None)
        for name in needed
        if name not in made and name not in weights
    ]
    outputs = [output for output in network.graph.output if output.name in made]
    used = [weights[name] for name in needed if name in weights]
    graph = helper.make_graph(nodes, "part", inputs, outputs, used)
    part = helper.make_model(graph, opset_imports=network.opset_import)
    part.ir_version = network.ir_version
    return Part(part)


def _activations(network: onnx.ModelProto, part: Part, judge: Judge) -> list[Values]:
    """What the float32 network leaves in front of a part, for each image."""
    inputs = [info.name for info in network.graph.input]
    inner = [name for name in part.inputs if name not in inputs]
    if not inner:
        return list(judge.feeds)
    session = _open(cut_onnx(network, inputs, inner), judge.threads)
    return [{**feed, **_run(session, inner, feed)} for feed in judge.feeds]


def _alone(
    plan: QuantizationPlan,
    layer: ConvLayer,
    part: Part,
    activations: Sequence[Values],
    judge: Judge,
) -> Damage:
    options = plan.options
    model, _ = write_convs(
        part.network,
        {layer.name: plan.alone(layer)},
        options.to,
        pairs=True,
        fp16_scales=options.fp16_scales,
    )
    session = _open(model, judge.threads)
    total = Damage()
    for index, values in enumerate(activations):
        feed = {name: values[name] for name in part.inputs}
        total += judge.damage(index, _run(session, part.heads, feed))
    return total


def _open(network: onnx.ModelProto, threads: int | None) -> Session:
    """Every pair computed as written."""
    lowered = deformable_attention.lower(network)
    return open_session(lowered, "the model", threads=threads, integer_kernels=False)


def _run(session: Session, names: Iterable[str], feed: Values) -> dict[str, NDArray[Any]]:
    names = list(names)
    return dict(zip(names, session.run(names, feed), strict=True))
