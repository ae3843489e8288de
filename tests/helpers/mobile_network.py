# SPDX-License-Identifier: Apache-2.0
"""A small MBConv network for INT8: one channel far larger than the rest, as trained
EfficientNets have them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from trtdet.precision.body import Body
from trtdet.spec import ModelSpec, Nms, Preprocessing

CHANNELS = 8
SPEC = ModelSpec("toy", Preprocessing((16, 16), layout="NCHW"), Nms(), (1,))
OUTLIER = 300.0  # the range of one channel over that of the others


def mobile_block(*, seed: int = 0, outlier: float = OUTLIER) -> onnx.ModelProto:
    """An MBConv block and a separable head, with one channel far larger than the rest, as
    trained EfficientNets have them.
    """
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4, 16, 16] images) => (float[N, 4, 16, 16] raw_boxes)
          <float[4] none = {{0, 0, 0, 0}}>
        {{
          ["net/stem/conv"] x0 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(images, stem_w, none)
          ["net/blocks_0/expand"] e = Conv<kernel_shape = [1, 1]>(x0, expand_w)
          e_gate = Sigmoid(e)
          e_swish = Mul(e, e_gate)
          ["net/blocks_0/depthwise"] d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = {CHANNELS}>(e_swish, depthwise_w)
          d_gate = Sigmoid(d)
          d_swish = Mul(d, d_gate)
          mean = GlobalAveragePool(d_swish)
          ["net/blocks_0/se/conv"] squeezed = Conv<kernel_shape = [1, 1]>(mean, se_w)
          se_gate = Sigmoid(squeezed)
          excited = Mul(se_gate, d_swish)
          ["net/blocks_0/project"] p = Conv<kernel_shape = [1, 1]>(excited, project_w)
          x1 = Add(p, x0)
          ["box_net/depthwise"] h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 4>(x1, head_depthwise_w)
          ["box_net/pointwise"] raw_boxes = Conv<kernel_shape = [1, 1]>(h, head_w)
        }}
    """)
    shapes = {
        "stem_w": (4, 4, 3, 3),
        "expand_w": (CHANNELS, 4, 1, 1),
        "depthwise_w": (CHANNELS, 1, 3, 3),
        "se_w": (CHANNELS, CHANNELS, 1, 1),
        "project_w": (4, CHANNELS, 1, 1),
        "head_depthwise_w": (4, 1, 3, 3),
        "head_w": (4, 4, 1, 1),
    }
    weights = {name: rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}  # fmt: skip
    weights["expand_w"][0] *= outlier  # channel 0 is large, and what reads it makes up for that
    weights["depthwise_w"][0] /= outlier
    weights["head_depthwise_w"][0] *= outlier
    weights["head_w"][:, 0] /= outlier
    model.graph.initializer.extend(
        numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()
    )
    return model


def body(model: onnx.ModelProto | None = None) -> Body:
    return Body(model or mobile_block(), SPEC)


def images(count: int, seed: int = 1) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    return [{"images": rng.normal(size=(1, 4, 16, 16)).astype(np.float32)} for _ in range(count)]


def run(model: onnx.ModelProto, feeds: Sequence[dict[str, Any]], *outputs: str) -> list[NDArray[np.float32]]:  # fmt: skip
    options = onnxruntime.SessionOptions()
    # As written: every pair computes what it says.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])  # fmt: skip
    names = list(outputs) or [session.get_outputs()[0].name]
    found = [session.run(names, feed) for feed in feeds]
    return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]
