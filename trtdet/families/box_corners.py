# SPDX-License-Identifier: Apache-2.0
"""Whether the boxes of a set prediction, 0 to 1, are centre and size, or corners made of these.

Every set prediction is trained on centre and size; some exports end in corners, under the same
name. Then the tensor that the corners were made of is used in their place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.families.box_formats import to_xyxy
from trtdet.families.outputs import Nodes, attribute
from trtdet.sources.onnx_file import OnnxSource

#: The share of boxes whose second two numbers are not below the first two, from which on they may
#: be corners.
LEAST_ORDERED = 0.98
#: Operators that pass boxes on.
PASSED_ON = ("Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Gather", "Transpose")
#: Operators whose results are centres and sizes.
CODED = ("Sigmoid", "Clip")


def maybe_coded(
    source: OnnxSource,
    boxes: str,
    value: NDArray[Any],
    near: Callable[[], Mapping[str, NDArray[Any]]],
) -> str | None:
    """The tensor of centres and sizes: `boxes` itself, or what its corners were made of; None
    where they may be corners and nothing tells.

    Args:
        value: of `boxes` for a photograph.
        near: tensors above it -> their values for the same photograph.
    """
    first, second = np.split(value.reshape(-1, 4), 2, axis=1)
    if (second >= first).all(axis=1).mean() < LEAST_ORDERED:
        return boxes
    for name, other in near().items():
        if other.shape == value.shape and np.allclose(to_xyxy(other, "cxcywh"), value, atol=1e-5):
            return name
    nodes = Nodes(source.model)
    node = nodes.producer.get(boxes)
    while node is not None and (node.op_type in PASSED_ON or _is_stack(node)):
        node = nodes.producer.get(node.input[-1 if node.op_type == "Concat" else 0])
    return boxes if node is not None and node.op_type in CODED else None


def _is_stack(node: Any) -> bool:
    """Boxes of all decoder layers put together; along the last axis boxes are made of columns."""
    return node.op_type == "Concat" and attribute(node, "axis", -1) in (0, 1)
