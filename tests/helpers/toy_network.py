# SPDX-License-Identifier: Apache-2.0
"""A convolutional detector of two levels that is small enough to read: for the tests of stage 2.

Its weights are random.
"""

import dataclasses
from pathlib import Path

import numpy as np
import onnx.parser
from onnx import numpy_helper

from trtdet.nms import plugin
from trtdet.spec import ModelSpec, Nms, Preprocessing

SIZE = 16
CLASSES = 3
ANCHORS = (SIZE // 2) ** 2 + (SIZE // 4) ** 2
SPEC = ModelSpec(
    family="toy",
    preprocessing=Preprocessing((SIZE, SIZE), mean=(120.0, 110.0, 100.0), std=(60.0, 50.0, 40.0)),
    nms=Nms(max_output_boxes=10),
    category_ids=(1, 2, 3),
)

#: Names of the nodes by what becomes of them.
PREPROCESSING = ("to_nchw", "subtract_mean", "multiply_scale")
BODY = (
    "stem", "stem_bn", "stem_sigmoid", "stem_swish", "down", "upsample", "merge", "class_0", "box_0", "class_1", "box_1",
    *(f"{head}_{level}_{step}" for level in (0, 1) for head in ("class", "box") for step in ("nhwc", "flat")), "classes", "boxes",
)  # fmt: skip


def network(
    *, batch: int | str = "N", seed: int = 0, with_nms: bool = True, scales: str = "{1, 1, 2, 2}"
) -> onnx.ModelProto:
    """The detector with its `ModelSpec`: EfficientNMS_TRT at its end, or two float outputs."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        toy_network (float[{batch}, {SIZE}, {SIZE}, 3] input)
          => (float[{batch}, {ANCHORS}, 4] raw_boxes, float[{batch}, {ANCHORS}, {CLASSES}] class_logits)
          <float[3, 1, 1] mean = {{120, 110, 100}}, float[3, 1, 1] scale = {{0.0166667, 0.02, 0.025}},
           float[4] twice = {scales}, int64[3] box_shape = {{0, -1, 4}}, int64[3] class_shape = {{0, -1, {CLASSES}}}>
        {{
          [to_nchw] nchw = Transpose<perm = [0, 3, 1, 2]>(input)
          [subtract_mean] centred = Sub(nchw, mean)
          [multiply_scale] normal = Mul(centred, scale)
          [stem] stem = Conv<strides = [2, 2], pads = [0, 0, 1, 1]>(normal, stem_w)
          [stem_bn] stem_n = BatchNormalization(stem, bn_scale, bn_bias, bn_mean, bn_var)
          [stem_sigmoid] gate = Sigmoid(stem_n)
          [stem_swish] fine = Mul(stem_n, gate)
          [down] coarse = Conv<strides = [2, 2], pads = [0, 0, 1, 1]>(fine, down_w)
          [upsample] raised = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(coarse, , twice)
          [merge] merged = Add(fine, raised)
          [class_0] c0 = Conv(merged, class_w, class_b)
          [box_0] b0 = Conv(merged, box_w)
          [class_1] c1 = Conv(coarse, class_w, class_b)
          [box_1] b1 = Conv(coarse, box_w)
          [class_0_nhwc] c0t = Transpose<perm = [0, 2, 3, 1]>(c0)
          [class_0_flat] c0f = Reshape(c0t, class_shape)
          [class_1_nhwc] c1t = Transpose<perm = [0, 2, 3, 1]>(c1)
          [class_1_flat] c1f = Reshape(c1t, class_shape)
          [box_0_nhwc] b0t = Transpose<perm = [0, 2, 3, 1]>(b0)
          [box_0_flat] b0f = Reshape(b0t, box_shape)
          [box_1_nhwc] b1t = Transpose<perm = [0, 2, 3, 1]>(b1)
          [box_1_flat] b1f = Reshape(b1t, box_shape)
          [classes] class_logits = Concat<axis = 1>(c0f, c1f)
          [boxes] raw_boxes = Concat<axis = 1>(b0f, b1f)
        }}
    """)
    rng = np.random.default_rng(seed)
    shapes = {"stem_w": (8, 3, 3, 3), "down_w": (8, 8, 3, 3), "class_w": (CLASSES, 8, 1, 1), "class_b": (CLASSES,), "box_w": (4, 8, 1, 1)}  # fmt: skip
    weights = {name: rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
    weights |= {f"bn_{name}": rng.uniform(0.5, 1.5, 8) for name in ("scale", "bias", "mean", "var")}
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    SPEC.attach(model)
    if with_nms:
        anchors = rng.uniform(2, SIZE - 2, (ANCHORS, 4)).astype(np.float32)
        plugin.insert_plugin(
            model,
            boxes="raw_boxes",
            scores="class_logits",
            anchors=anchors,
            nms=SPEC.nms,
            batch=batch,
        )
    return model


def free_network(*, batch: int | str = "N") -> onnx.ModelProto:
    """The same for images of any multiple of 4, 8 to 64 pixels; boxes without anchors."""
    model = network(batch=batch, with_nms=False)
    shapes = [*model.graph.input[0].type.tensor_type.shape.dim[1:3]]
    shapes += [output.type.tensor_type.shape.dim[1] for output in model.graph.output]
    for dim, name in zip(shapes, "HWAA", strict=True):
        dim.dim_param = name
    preprocessing = dataclasses.replace(
        SPEC.preprocessing, size_range=((8, 8), (64, 64)), size_multiple=4
    )
    SPEC.replace(preprocessing=preprocessing).attach(model)
    plugin.insert_plugin(
        model,
        boxes="raw_boxes",
        scores="class_logits",
        anchors=None,
        nms=SPEC.nms,
        batch=batch,
    )
    return model


def save(path: Path, **options: int | str | bool) -> Path:
    """Write `network(**options)` to `path`."""
    onnx.save(network(**options), path)
    return path


def images(count: int = 2, seed: int = 0) -> np.ndarray:
    """Noise of 0 to 255: (count, SIZE, SIZE, 3) float32."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.float32)


def set_weight(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Replace an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
