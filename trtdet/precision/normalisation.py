# SPDX-License-Identifier: Apache-2.0
"""Layer and RMS normalisation that an exporter wrote in single operators: which of them compute its
statistics.

LayerNormalization itself computes them in float32 whatever its data is (`stash_type`), in ONNX
Runtime and in TensorRT. Spelled out, `x - mean`, its square, the mean of these, `sqrt(variance +
eps)` and the division, nothing says so: in FP16 the square overflows from 256 on, and a mean of 768
squares has 3 digits.
"""

from collections.abc import Sequence

import onnx

#: Between the mean of squares and what divides by it.
_ROOTS = ("Sqrt", "Pow", "Reciprocal")


def statistics(nodes: Sequence[onnx.NodeProto]) -> set[int]:
    """Positions of the nodes that compute a mean and a variance, the division by it included."""
    producer = {name: i for i, node in enumerate(nodes) for name in node.output}
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in set(node.input):
            readers.setdefault(name, []).append(i)
    found: set[int] = set()
    for i, node in enumerate(nodes):
        square = producer.get(node.input[0]) if node.op_type == "ReduceMean" else None
        if square is None or not _is_square(nodes[square]):
            continue
        behind = _behind(nodes, readers, node.output[0])
        if not any(nodes[j].op_type in _ROOTS for j in behind):
            continue
        found |= {square, i, *behind, *_centring(nodes, producer, nodes[square].input[0])}
    return found


def _is_square(node: onnx.NodeProto) -> bool:
    return node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])


def _behind(
    nodes: Sequence[onnx.NodeProto], readers: dict[str, list[int]], tensor: str
) -> list[int]:
    """The epsilon, the root, and the divisions by it; empty where something else follows."""
    chain: list[int] = []
    for ops in (("Add", "Max", "Clip"), _ROOTS):
        following = readers.get(tensor, [])
        step = next((j for j in following if nodes[j].op_type in ops), None)
        if step is None and ops is _ROOTS:
            return []
        if step is not None:
            chain.append(step)
            tensor = nodes[step].output[0]
    divisions = [j for j in readers.get(tensor, []) if nodes[j].op_type in ("Div", "Reciprocal")]
    return chain + divisions


def _centring(nodes: Sequence[onnx.NodeProto], producer: dict[str, int], squared: str) -> list[int]:
    """`x - mean(x)`, where that is what is squared."""
    difference = producer.get(squared)
    if difference is None or nodes[difference].op_type != "Sub":
        return []
    whole, mean = nodes[difference].input
    at = producer.get(mean)
    if at is None or nodes[at].op_type != "ReduceMean" or nodes[at].input[0] != whole:
        return []
    return [difference, at]
