# SPDX-License-Identifier: Apache-2.0
"""The part of a detector from the input to the heads: also where If and Loop take tensors from
around them.
"""

import numpy as np
import onnx.parser
import onnxruntime
from onnx import numpy_helper

from trtdet.precision.body import Body, cut_to_body
from trtdet.spec import ModelSpec, Nms, Preprocessing

SPEC = ModelSpec("toy", Preprocessing((4, 4), layout="NCHW"), Nms(), (1,))


def branching_model() -> onnx.ModelProto:
    """`kept` is read by the body of an If alone, `offset` by the body of a Loop alone; a Loop
    behind the NMS reads a head.
    """
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "trt.plugins": 1]>
        g (float[1, 2, 4, 4] images) => (float[1, 4, 4] boxes, float[1, 2, 4, 4] after)
          <float[1] offset = {3}, int64[3] shape = {1, 4, -1}, int64 twice = {2}, bool yes = {1},
           float[1, 2, 4, 4] moved>
        {
          ["net/first"] x = Conv<kernel_shape = [1, 1]>(images, first_w)
          ["net/side"] kept = Conv<kernel_shape = [1, 1]>(images, side_w)
          largest = ReduceMax<keepdims = 0>(x)
          zero = Sub(largest, largest)
          high = Less(zero, offset)
          chosen = If(high) <
            then_branch = a () => (float[1, 2, 4, 4] t) { t = Add(x, kept) },
            else_branch = b () => (float[1, 2, 4, 4] e) { e = Identity(x) }
          >
          moved = Loop(twice, yes, chosen) <
            body = l (int64 i, bool go, float[1, 2, 4, 4] state) => (bool still, float[1, 2, 4, 4] next)
            { still = Identity(go) next = Add(state, offset) }
          >
          ["net/head"] head = Conv<kernel_shape = [1, 1]>(moved, head_w)
          ["net/tail"] tail = Conv<kernel_shape = [1, 1]>(moved, first_w)
          raw_boxes = Reshape(head, shape)
          boxes = trt.plugins.EfficientNMS_TRT(raw_boxes)
          after = If(yes) <
            then_branch = c () => (float[1, 2, 4, 4] tt) { most = ReduceMax<keepdims = 0>(boxes) tt = Mul(tail, most) },
            else_branch = d () => (float[1, 2, 4, 4] ee) { ee = Identity(tail) }
          >
        }
    """)
    rng = np.random.default_rng(0)
    shapes = {"first_w": (2, 2, 1, 1), "side_w": (2, 2, 1, 1), "head_w": (4, 2, 1, 1)}
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    return model


def test_the_cut_keeps_what_the_body_of_an_if_or_loop_captures() -> None:
    model = branching_model()
    network = cut_to_body(model)
    made = {output for node in network.graph.node for output in node.output}
    assert {"x", "kept", "chosen", "moved"} <= made
    assert made.isdisjoint({"boxes", "after"})
    # "tail" is read by the branches of an If behind the NMS alone: a head, as what the NMS reads
    # itself.
    assert [output.name for output in network.graph.output] == ["raw_boxes", "tail"]
    assert {weight.name for weight in network.graph.initializer} == {"first_w", "side_w", "head_w", "offset", "shape", "twice", "yes"}  # fmt: skip
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])  # fmt: skip
    x = np.random.default_rng(1).normal(size=(1, 2, 4, 4)).astype(np.float32)
    raw_boxes, tail = session.run(None, {"images": x})
    first, side, head = (numpy_helper.to_array(w)[:, :, 0, 0] for w in model.graph.initializer if w.name in ("first_w", "side_w", "head_w"))  # fmt: skip
    moved = np.einsum("oc,nchw->nohw", first + side, x) + 6
    np.testing.assert_allclose(raw_boxes, np.einsum("oc,nchw->nohw", head, moved).reshape(1, 4, 16), rtol=1e-5)  # fmt: skip
    np.testing.assert_allclose(tail, np.einsum("oc,nchw->nohw", first, moved), rtol=1e-5)


def test_layers_of_a_model_with_branches() -> None:
    layers = {layer.name: layer.macs for layer in Body(branching_model(), SPEC).layers}
    assert layers == {"net/first": 64, "net/side": 64, "net/head": 128, "net/tail": 64}
