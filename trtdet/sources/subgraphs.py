# SPDX-License-Identifier: Apache-2.0
"""What a node reads: its inputs, and the tensors that the bodies of If, Loop and Scan take from
around them.
"""

from collections.abc import Iterator

import onnx


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of all tensors that a node needs, those that its subgraphs capture among them."""
    return ({*node.input} | captured(node)) - {""}


def captured(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that the subgraphs of a node, and those within them, take from
    outside the node.
    """
    names: set[str] = set()
    for graph in subgraphs(node):
        inner = {name for child in graph.node for name in child.output}
        inner |= {t.name for t in (*graph.input, *graph.initializer)}
        wanted = {output.name for output in graph.output}
        for child in graph.node:
            wanted |= reads(child)
        names |= wanted - inner
    return names - {""}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among the attributes of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
