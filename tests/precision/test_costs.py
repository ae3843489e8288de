# SPDX-License-Identifier: Apache-2.0
"""What each convolution alone does: that parts of a network give what the whole gives, and that
powers add up.
"""

from typing import Any

import numpy as np
import onnx.numpy_helper
import pytest
import toy_network
from numpy.typing import NDArray

from trtdet.precision.body import Body
from trtdet.precision.calibration import calibrate
from trtdet.precision.costs import Judge, find_coding, measure_costs, part_behind
from trtdet.precision.graph_types import element_types
from trtdet.precision.objective import Damage
from trtdet.precision.quantization import (
    QuantizationOptions,
    QuantizationPlan,
    plan_quantization,
)

Feed = dict[str, NDArray[np.float32]]


def images(count: int, seed: int = 1) -> list[Feed]:
    rng = np.random.default_rng(seed)
    shape = (1, toy_network.SIZE, toy_network.SIZE, 3)
    return [{"input": rng.uniform(0, 255, shape).astype(np.float32)} for _ in range(count)]


def network(**options: Any) -> onnx.ModelProto:
    """Random weights, small enough at the heads that boxes and scores are not at the ends of
    their ranges.
    """
    model = toy_network.network(**options)
    for weight in model.graph.initializer:
        if weight.name in ("class_w", "box_w"):
            values = onnx.numpy_helper.to_array(weight) * np.float32(0.1)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    return model


@pytest.fixture(scope="module")
def plan() -> QuantizationPlan:
    body = Body(network(), toy_network.SPEC)
    cache = calibrate(body, images(16), "mse")
    return plan_quantization(body, cache, QuantizationOptions(fp16_scales=True))


@pytest.fixture(scope="module")
def judge(plan: QuantizationPlan) -> Judge:
    return Judge(plan.body, images(6, seed=2))


@pytest.fixture(scope="module")
def costs(plan: QuantizationPlan, judge: Judge) -> dict[str, Damage]:
    return measure_costs(plan, judge)


def test_heads_are_those_of_the_nms(judge: Judge) -> None:
    assert judge.coding is not None and judge.finds
    assert (judge.coding.boxes, judge.coding.scores) == ("raw_boxes", "class_logits")


def test_heads_by_shape_where_no_plugin_names_them(plan: QuantizationPlan) -> None:
    heads = {"x": np.zeros((1, 9, 3), np.float32), "y": np.zeros((1, 9, 4), np.float32)}
    bare = Body(toy_network.network(with_nms=False), toy_network.SPEC.replace(anchored=False))
    found = find_coding(bare, heads)
    assert found is not None and (found.boxes, found.scores, found.anchors) == ("y", "x", None)
    assert find_coding(bare, {"x": heads["y"], "y": heads["y"]}) is None
    assert find_coding(bare, {"y": heads["y"]}) is None
    anchored = Body(bare.model, toy_network.SPEC)
    assert find_coding(anchored, heads) is None  # no anchors in the model


def test_every_convolution_is_measured(plan: QuantizationPlan, costs: dict[str, Damage]) -> None:
    assert costs.keys() == {layer.name for layer in plan.layers}
    assert {"stem", "down", "class_0", "box_0", "class_1", "box_1"} <= costs.keys()
    assert costs["stem"].box_power > 0 and costs["stem"].score_power > 0
    for name in ("class_0", "class_1"):
        assert costs[name].box_power == 0 and costs[name].score_power > 0
    for name in ("box_0", "box_1"):
        assert costs[name].box_power > 0 and costs[name].score_power == 0


def test_a_part_gives_what_the_whole_network_gives(plan: QuantizationPlan, judge: Judge, costs: dict[str, Damage]) -> None:  # fmt: skip
    names = {layer.name for layer in plan.layers}
    for name in names:
        whole = judge.judge(plan.quantize(names - {name}, network=True))
        assert costs[name].box_power == pytest.approx(whole.box_power, rel=0.02, abs=1e-9), name
        assert costs[name].score_power == pytest.approx(whole.score_power, rel=0.02, abs=1e-9), name  # fmt: skip


def test_powers_add_up(plan: QuantizationPlan, judge: Judge, costs: dict[str, Damage]) -> None:
    total, together = sum(costs.values(), Damage()), judge.judge(plan.quantize(network=True))
    print(total.mean(), together.mean())
    assert together.box_power == pytest.approx(total.box_power, rel=0.35)
    assert together.score_power == pytest.approx(total.score_power, rel=0.35)


def test_a_part_leaves_out_what_does_not_follow(plan: QuantizationPlan) -> None:
    network = plan.body.network
    part = part_behind(network, {"box_1"}, element_types(network))
    assert part.heads == ["raw_boxes"]
    assert {node.op_type for node in part.network.graph.node} == {"Conv", "Transpose", "Reshape", "Concat"}  # fmt: skip
    assert sum(node.op_type == "Conv" for node in part.network.graph.node) == 1
    assert "input" not in part.inputs


def test_goes_on_with_what_is_known(plan: QuantizationPlan, judge: Judge, costs: dict[str, Damage]) -> None:  # fmt: skip
    planted = Damage(weight=7.0)
    kept: list[set[str]] = []
    known = {name: planted for name in costs if name != "box_0"}
    found = measure_costs(plan, judge, known=known, keep=lambda costs: kept.append({*costs}))
    assert found["stem"] == planted and found["box_0"] == costs["box_0"]
    assert kept == [{*costs}]


def test_a_fixed_batch_changes_nothing(plan: QuantizationPlan, costs: dict[str, Damage]) -> None:
    body = Body(network(batch=2), toy_network.SPEC)
    fixed = plan_quantization(body, plan.cache, plan.options)
    feeds = [{"input": np.repeat(feed["input"], 2, axis=0)} for feed in images(6, seed=2)]
    found = measure_costs(fixed, Judge(body, feeds))
    for name, damage in costs.items():
        assert found[name].box_power == pytest.approx(damage.box_power, rel=0.02, abs=1e-9)


def test_unknown_heads_are_compared_as_a_whole(plan: QuantizationPlan) -> None:
    body = Body(network(with_nms=False), toy_network.SPEC)
    judge = Judge(body, images(2))
    assert judge.coding is None
    found = judge.judge(plan.quantize(network=True))
    assert found.weight == 2 and 0 < found.mean().box_power < 0.1 and found.box_loss == 0


def test_images_of_nothing_are_noticed(plan: QuantizationPlan) -> None:
    nms = plan.body.spec.nms
    model = toy_network.network()
    for weight in model.graph.initializer:
        if weight.name == "class_b":
            low = np.full(weight.dims, -20, np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(low, weight.name))
    judge = Judge(Body(model, plan.body.spec), images(2))
    assert not judge.finds and nms.score_activation
    assert judge.judge(Body(model, plan.body.spec).network).box_power == 0
