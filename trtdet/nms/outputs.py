# SPDX-License-Identifier: Apache-2.0
"""The four outputs that every form of selection ends in."""

import onnx
from onnx import TensorProto

from trtdet.graph.builder import set_outputs, value_info
from trtdet.spec import OUTPUT_NAMES


def declare_outputs(
    model: onnx.ModelProto, batch: int | str, most: int, *, box_size: int = 4
) -> None:
    """Make the tensors of `OUTPUT_NAMES` the only outputs: counts, boxes, scores and classes of
    the best `most`.
    """
    types = (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32)
    shapes = ([batch, 1], [batch, most, box_size], [batch, most], [batch, most])
    infos = [value_info(*output) for output in zip(OUTPUT_NAMES, types, shapes, strict=True)]
    set_outputs(model, infos)
