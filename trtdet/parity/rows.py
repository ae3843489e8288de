# SPDX-License-Identifier: Apache-2.0
"""Heads whose rows have no order of their own: a network that chooses its queries or proposals by
score swaps rows whose scores are nearly equal, which changes no detection.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.sources.subgraphs import reads, subgraphs

#: Operators that put rows into the order of their scores.
SORTS = frozenset(("TopK", "NonMaxSuppression"))
#: Distances that are held at a time: 32 MiB.
DISTANCES = 2**22


def are_sorted_inside(model: onnx.ModelProto, heads: Collection[str]) -> bool:
    """Whether the model puts the rows of `heads` into an order that follows from their values.

    Heads are followed up to the convolutions: what comes out of one is a map, whose cells have
    their places whatever was sorted before it. Rows of a grid therefore have an order, and so have
    the learned queries of DETR; the queries that RT-DETR takes from a TopK, or the proposals of
    Faster R-CNN, have none. A TopK of which the values alone are read, as a threshold or of a
    distribution, moves no row.
    """
    needed = set(heads)
    for node in reversed(model.graph.node):  # sorted, as ONNX demands
        if needed.isdisjoint(node.output) or "Conv" in node.op_type:
            continue
        if _sorts(node) and (node.op_type != "TopK" or node.output[1] in needed):
            return True
        needed.update(reads(node))
    return False


def _sorts(node: onnx.NodeProto) -> bool:
    return node.op_type in SORTS or any(
        _sorts(child) for graph in subgraphs(node) for child in graph.node
    )


def in_order_of(
    references: Sequence[NDArray[Any]], candidates: Sequence[NDArray[Any]]
) -> list[NDArray[Any]]:
    """The candidates' rows [Q, ...], each the nearest to a row of the references in all tensors
    together.

    A row whose counterpart has its own number keeps it, unless another is nearer. Rows that are not
    finite are near to nothing: they take the places of those that are farthest off, so that they
    are counted. As they are where they do not have Q rows each.
    """
    shapes = [(left.shape, right.shape) for left, right in zip(references, candidates, strict=True)]
    counts = {left[:1] for left, _ in shapes}
    if len(counts) != 1 or counts & {(), (0,)} or any(left != right for left, right in shapes):
        return list(candidates)
    pairs = [_scaled(*pair) for pair in zip(references, candidates, strict=True)]
    left, right = (np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
    nearest = _nearest(left, right)
    own, distance = _distances(left, right), _distances(left, right[nearest])
    nearest = np.where(own <= distance, np.arange(len(left)), nearest)
    lost = np.flatnonzero(~_finite(right))
    nearest[np.argsort(-np.fmin(own, distance), kind="stable")[: len(lost)]] = lost
    return [candidate[nearest] for candidate in candidates]


def _scaled(
    reference: NDArray[Any], candidate: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[Q, values] of one tensor in both models, so that its squared distances are of the same size
    as those of any other: centred, relative to its range, and to its number of columns.
    """
    left, right = (x.reshape(len(x), -1).astype(np.float64) for x in (reference, candidate))
    usable = left[_finite(left)]
    if not usable.size:
        return left, right
    scale = max(float(np.ptp(usable)), 1e-12) * np.sqrt(left.shape[1])
    centre = usable.mean(axis=0)
    return (left - centre) / scale, (right - centre) / scale


def _nearest(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each row of `left` the number of the nearest finite row of `right`; 0 where none is."""
    fed, usable = (np.where(_finite(x)[:, None], x, 0) for x in (left, right))
    squares = np.where(_finite(right), np.einsum("ij,ij->i", usable, usable), np.inf)
    nearest = np.empty(len(left), np.intp)
    step = max(1, DISTANCES // len(right))
    for start in range(0, len(left), step):
        block = slice(start, start + step)
        # Less the squares of `left`, which are the same for a whole row.
        nearest[block] = (squares - 2 * fed[block] @ usable.T).argmin(axis=1)
    return nearest


def _distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared distance of each row from its counterpart, infinite where one is not finite."""
    finite = _finite(left) & _finite(right)
    gap = np.subtract(left, right, out=np.zeros_like(left), where=finite[:, None])
    return np.where(finite, np.einsum("ij,ij->i", gap, gap), np.inf)


def _finite(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are."""
    return np.asarray(np.isfinite(rows).all(axis=1))
