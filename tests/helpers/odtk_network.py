# SPDX-License-Identifier: Apache-2.0
"""A small network with the real names of ODTK's exports."""

import numpy as np
import onnx.parser
from onnx import numpy_helper

from trtdet.families import retinanet

SIZE_HW = (128, 256)
CLASSES = 3
#: How torch names nodes when it exports ODTK's network: since 2022, and in ODTK's days.
GENERATIONS = {
    "scoped": ("/backbones.ResNet18FPN/features/conv1/Conv", "/{head}_head/{head}_head.8/Conv_{i}", "/Sigmoid_{i}"),
    "numbered": ("Conv_0", "Conv_{n}", "Sigmoid_{n}"),
}  # fmt: skip


def odtk_model(
    *, rotated=False, size_hw=SIZE_HW, generation="scoped", classes=CLASSES, box_channels=None, bias=-4.5
) -> onnx.ModelProto:  # fmt: skip
    """What `odtk export` writes, with one convolution per level and head in place of its ResNet.

    `bias` of the class head.
    """
    anchors = 27 if rotated else 9
    channels = {"score": anchors * classes, "box": box_channels or (162 if rotated else 36)}
    first, head, sigmoid = GENERATIONS[generation]
    lines = [f'["{first}"] p3 = Conv<kernel_shape = [8, 8], strides = [8, 8]>(input_1, w3)']
    for level in range(4, 8):
        lines.append(f'["Conv_{level}"] p{level} = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(p{level - 1}, w{level})')  # fmt: skip
    number = 10
    for i in range(1, 6):
        for name, key in (("cls", "score"), ("box", "box")):
            number += 1
            output = f"box_{i}" if key == "box" else f"logit_{i}"
            title = head.format(head=name, i=i, n=number)
            lines.append(
                f'["{title}"] {output} = Conv<kernel_shape = [1, 1]>(p{i + 2}, {key}_w, {key}_b)'
            )
    for i in range(1, 6):
        lines.append(f'["{sigmoid.format(i=i, n=number + i)}"] score_{i} = Sigmoid(logit_{i})')
    height, width = size_hw
    outputs = ", ".join(
        f"float[batch, {channels[key]}, {-(-height // s)}, {-(-width // s)}] {key}_{i}"
        for key in ("score", "box")
        for i, s in enumerate(retinanet.STRIDES, 1)
    )
    model = onnx.parser.parse_model(f"""
        <ir_version: 7, opset_import: ["": 12], producer_name: "pytorch">
        main_graph (float[batch, 3, {height}, {width}] input_1) => ({outputs})
        {{ {" ".join(lines)} }}
    """)
    rng = np.random.default_rng(4)
    weights = {"w3": rng.normal(0, 0.08, (16, 3, 8, 8))}
    weights |= {f"w{level}": rng.normal(0, 0.09, (16, 16, 3, 3)) for level in range(4, 8)}
    for key, spread in (("score", 0.35), ("box", 0.12)):
        weights[f"{key}_w"] = rng.normal(0, spread, (channels[key], 16, 1, 1))
        weights[f"{key}_b"] = np.full(channels[key], bias if key == "score" else 0.0)
    if rotated:
        turns = rng.uniform(-np.pi, np.pi, anchors)
        weights["box_b"].reshape(anchors, 6)[:, 4:] = np.stack([np.sin(turns), np.cos(turns)], 1)
    model.graph.initializer.extend(
        numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return model
