# SPDX-License-Identifier: Apache-2.0
"""What the TensorFlow families share: heads found by structure, preprocessing measured with flat
images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.evidence import Evidence
from trtdet.families.pixels import Normal
from trtdet.geometry import in_layout
from trtdet.sources.base import Source, SourceGraph, SourceNode
from trtdet.spec import Layout, Preprocessing, Rounding, Sampling

#: In place of a flat value: columns of 255 and 0 in turn.
STRIPES = -255


def find_head(graph: SourceGraph, scope: str, family: str) -> SourceNode:
    """The Concat over pyramid levels of a head's reshaped predictions, as many levels as there are.

    Raises:
        GraphError: not exactly one.
    """
    found = []
    for node in unique(graph):
        levels = [p for p in graph.parents(node) if p.value is None]
        if (
            node.op == "Concat"
            and len(levels) > 1
            and all(_is_level(graph, level, scope) for level in levels)
        ):
            found.append(node)
    if len(found) != 1:
        near = [
            n.name
            for n in unique(graph)
            if n.op == "Concat" and any(scope in p.name for p in graph.parents(n))
        ]
        raise GraphError(
            f"{family}: expected one Concat of reshaped predictions below '{scope}', found {len(found)}; nearest: {near[:3]}"
        )
    return found[0]


def _is_level(graph: SourceGraph, reshape: SourceNode, scope: str) -> bool:
    """Whether a node is a Reshape of a prediction in `scope`, a transpose allowed between."""
    if reshape.op != "Reshape":
        return False
    (before,) = [p for p in graph.parents(reshape)][:1] or [reshape]
    steps = [reshape, before, *graph.parents(before)]
    return any(scope in step.name for step in steps)


def find_stem(graph: SourceGraph, head: SourceNode, family: str) -> SourceNode:
    """The first convolution: upstream of the head, with no convolution upstream of itself.

    Raises:
        GraphError: no convolution upstream.
    """
    stem: SourceNode | None = None
    above = graph.ancestors(head)
    while convolutions := [n for n in above.values() if n.op == "Conv" and n is not stem]:
        stem = convolutions[-1]
        above = graph.ancestors(stem)
    if stem is None:
        raise GraphError(f"{family}: expected a convolution upstream of '{head.name}', found none")
    return stem


def measure_preprocessing(
    source: Source, image_input: str, network_input: str, family: str
) -> tuple[Preprocessing, Layout]:
    """Send flat test images through the model's own preprocessing and read off what it does.

    A black and a white image give the affine normalisation; white on half of the width and on half
    of the height give placement and padding; one whose size comes out fractional, the rounding; one
    of stripes, where pixels are sampled. A model whose input has a fixed size does no placing, and
    AutoML's is taken.

    Returns:
        The preprocessing, float32 NHWC; the layout of `network_input`.

    Raises:
        GraphError: it is not an affine normalisation of an image at the top left, or of one
            stretched.
    """
    graph = source.graph
    image_layout = declared_layout(graph)

    def entering(height: int, width: int, value: int) -> NDArray[Any]:
        """What reaches the first convolution of a flat image, in the layout it has there."""
        images = np.full((graph.batch or 1, height, width, 3), abs(value), np.uint8)
        if value == STRIPES:
            images[:, :, 1::2] = 0
        (result,) = source.run([network_input], {image_input: in_layout(images, image_layout)})
        if result.ndim != 4 or 3 not in (result.shape[1], result.shape[-1]):
            raise GraphError(
                f"{family}: expected images of 3 channels to enter the first convolution, found {result.shape}"
            )
        return result[0]

    fixed = declared_size(graph)
    first = entering(*(fixed or (16, 16)), 0)
    layout: Layout = "NHWC" if first.shape[-1] == 3 else "NCHW"

    def see(height: int, width: int, value: int) -> NDArray[Any]:
        pixels = entering(height, width, value)
        return pixels if layout == "NHWC" else pixels.transpose(1, 2, 0)

    height, width = first.shape[:2] if layout == "NHWC" else first.shape[1:]
    black, white = see(height, width, 0), see(height, width, 255)
    flat = all(np.ptp(x, axis=(0, 1)).max() < 1e-4 for x in (black, white))
    low, high = (x[0, 0].astype(np.float64) for x in (black, white))
    if not flat or (high <= low).any():
        raise GraphError(
            f"{family}: expected (pixel - mean) / std before the first convolution; flat images of 0 and 255 became "
            f"{black.min():.4g}..{black.max():.4g} and {white.min():.4g}..{white.max():.4g}"
        )
    std = 255 / (high - low)
    mean = -low * std
    preprocessing = Preprocessing((height, width), mean=_rounded(mean), std=_rounded(std))
    if not fixed:
        # Halved: only the even columns, or the mean of both.
        stripes = see(2 * height, 2 * width, STRIPES)
        sampling: Sampling = "corner" if np.abs(stripes - high).max() < 1e-4 else "half_pixel"
        preprocessing = dataclasses.replace(preprocessing, sampling=sampling)
    if fixed:  # the host does the placing: as the family's own code does
        return dataclasses.replace(preprocessing, pad_rgb=_rounded(mean)), layout
    narrow = see(height, width // 2, 255)
    low_image = see(height // 2, width, 255).transpose(1, 0, 2)
    if all(np.abs(seen - high).max() < 1e-4 for seen in (narrow, low_image)):
        return dataclasses.replace(preprocessing, resize="stretch"), layout
    padding = _padding(narrow, high, family)
    _padding(low_image, high, family)
    # Becomes a column less than a half and a quarter wide.
    quarter = see(4 * height, 2 * width + 3, 255)
    columns = int((np.abs(quarter[0] - high).max(axis=-1) < 1e-4).sum())
    rounding: Rounding = "floor" if columns == (2 * width + 3) // 4 else "round"
    pad_rgb = _rounded(padding * std + mean)
    return dataclasses.replace(preprocessing, pad_rgb=pad_rgb, rounding=rounding), layout


def _padding(seen: NDArray[Any], image: NDArray[Any], family: str) -> NDArray[Any]:
    """The colour right of a flat image that was half as wide as the network input [h,w,3].

    Raises:
        GraphError: the left half is not the image, or the right half is not flat, or is the image
            too.
    """
    half = seen.shape[1] // 2
    inside, outside = seen[:, : half - 1], seen[:, half + 1 :]
    if (
        np.abs(inside - image).max() > 1e-4
        or np.ptp(outside, axis=(0, 1)).max() > 1e-4
        or np.abs(outside[0, 0] - image).max() < 1e-4
    ):
        raise GraphError(
            f"{family}: expected the image at the top left, its aspect kept, and flat padding beside it, or the image stretched to the "
            "whole input; found another placement"
        )
    return outside[0, 0]


def declared_layout(graph: SourceGraph) -> Layout:
    """Layout of the model's input: NCHW where its second dimension is declared as 3, else NHWC."""
    return "NCHW" if graph.image_shape[1:2] == (3,) else "NHWC"


def measured_facts(
    family: str, exporter: str, graph: SourceGraph, preprocessing: Preprocessing, image_input: str
) -> Evidence:
    """The evidence of an export with its preprocessing inside: input, normalisation, resize and
    batch.

    Args:
        exporter: whose convention the resize is, where a fixed size leaves none to measure.
    """
    evidence = Evidence(family)
    height, width = preprocessing.size_hw
    evidence.add(
        ev.INPUT,
        f"'{image_input}' {declared_layout(graph)} {height}x{width}",
        f"{ev.MEASURED}what reaches the first convolution",
    )
    normal = Normal(preprocessing.mean, preprocessing.std)
    evidence.add(
        ev.NORMALISATION,
        f"{normal}, in the network",
        f"{ev.MEASURED}flat images at the first convolution",
    )
    pad = ",".join(f"{x:g}" for x in preprocessing.pad_rgb)
    resize = "stretch" if preprocessing.resize == "stretch" else f"letterbox, top left on {pad}"
    how = (
        f"{ev.CONVENTION}{exporter}; the input has a fixed size"
        if declared_size(graph)
        else f"{ev.MEASURED}half-filled images"
    )
    evidence.add(ev.RESIZE, resize, how)
    evidence.add(ev.BATCH, graph.batch or "dynamic", "read: the shape of its output")
    return evidence


def declared_size(graph: SourceGraph) -> tuple[int, int] | None:
    """Height and width that the model's input is declared with, None where they are free."""
    shape = graph.image_shape
    height, width = (shape[2:4] if declared_layout(graph) == "NCHW" else shape[1:3]) or (None, None)
    return (height, width) if height and width else None


def _rounded(values: NDArray[Any]) -> tuple[float, float, float]:
    """To 4 decimals: float32 normalisation of 0-255 carries no more, and 123.675 comes back as
    it was written.
    """
    r, g, b = (round(float(value), 4) + 0.0 for value in values)
    return r, g, b


def centre_size(corners: NDArray[np.float32]) -> NDArray[np.float32]:
    """Corners (n, 4) y1 x1 y2 x2 to centre and size y x h w, in the order of float32 operations
    of AutoML's decoding.
    """
    centre = (corners[:, :2] + corners[:, 2:]) / np.float32(2)
    return np.concatenate([centre, corners[:, 2:] - corners[:, :2]], axis=1)


def tensor(node: SourceNode) -> str:
    """The name of a node's (only) result."""
    return node.outputs[0]


def scalar(value: NDArray[Any] | None) -> float | None:
    return None if value is None else float(np.asarray(value).reshape(-1)[0])


def unique(graph: SourceGraph) -> Sequence[SourceNode]:
    """Nodes of the main graph, each once though ONNX lists one under each of its results."""
    return list({id(node): node for node in graph.nodes.values()}.values())
