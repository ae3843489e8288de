# SPDX-License-Identifier: Apache-2.0
"""How images enter an ONNX export: its image input, and the normalisation that it has inside,
measured with flat images.

Flat images of one channel at a time tell scale, offset and order of the channels at the first
convolution.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families.base import Hints
from trtdet.geometry import in_layout
from trtdet.graph.map_op import unknown_ops
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Layout, Preprocessing

Triple = tuple[float, float, float]

#: Standard deviations (0-255) of a normalisation that anybody would train with; and 1, of pixels as
#: they are.
PLAUSIBLE_STD = (30.0, 300.0)
#: Operators before the first convolution that belong to it, not to the preprocessing.
OF_CONVOLUTION = ("Pad", "QuantizeLinear")


@dataclass(frozen=True)
class Normal:
    """(x - mean) / std of RGB 0-255, then reversed channels where `bgr`."""

    mean: Triple
    std: Triple
    bgr: bool = False

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "Normal":
        """That of a spec."""
        return cls(preprocessing.mean, preprocessing.std, preprocessing.bgr)

    def __str__(self) -> str:
        order = "BGR" if self.bgr else "RGB"
        if not any(self.mean) and len(set(self.std)) == 1:
            return f"{order} 0-255" if self.std[0] == 1 else f"{order} / {self.std[0]:g}"
        mean, std = (",".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"({order} - {mean}) / {std}"


@dataclass(frozen=True)
class Pixels:
    """How images enter an export.

    Attributes:
        image: input tensor, [N,3,H,W] or [N,H,W,3] as `image_layout` says.
        tensor: what is to be fed in its place: itself, or the normalised pixels behind it, in
            `layout`.
        size_hw: of the input, None where it is dynamic.
        batch: None where it is dynamic.
        inside: the normalisation between the two; None: there is none.
        kept: the normalisation cannot be cut off and stays; `unit` is what a value of 1 of the
            input means in 0-255.
        others: further inputs.
    """

    image: str
    tensor: str
    image_layout: Layout
    layout: Layout
    size_hw: tuple[int, int] | None
    batch: int | None
    inside: Normal | None = None
    kept: bool = False
    unit: float = 1.0
    others: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of `tensor`, of a fixed size; the batch is open."""
        height, width = self.size_hw or (None, None)
        return (None, 3, height, width) if self.layout == "NCHW" else (None, height, width, 3)


def declared_shapes(source: OnnxSource) -> dict[str, tuple[int | None, ...]]:
    """Input -> its shape; None where it is dynamic, which some exporters write as -1."""
    shapes = {}
    for info in source.model.graph.input:
        if info.name in source.graph.inputs:
            dims = info.type.tensor_type.shape.dim
            shapes[info.name] = tuple(d.dim_value if d.dim_value > 0 else None for d in dims)
    return shapes


def maybe_image(source: OnnxSource) -> tuple[str, Layout] | None:
    """The only input of images of three channels, and its layout.

    None where there is not exactly one.
    """
    found: list[tuple[str, Layout]] = []
    for name, shape in declared_shapes(source).items():
        if len(shape) != 4:
            continue
        if shape[1] == 3:
            found.append((name, "NCHW"))
        elif shape[3] == 3:
            found.append((name, "NHWC"))
        elif shape[1] is None and shape[3] is None:
            found.append((name, "NCHW"))
    return found[0] if len(found) == 1 else None


def is_paddle(source: Source) -> bool:
    """Whether paddle2onnx wrote the file: it names the graph "PaddlePaddle Graph in PIR mode", or
    "Model from PaddlePaddle".
    """
    return isinstance(source, OnnxSource) and "PaddlePaddle" in source.model.graph.name


def find_pixels(
    source: OnnxSource,
    hints: Hints,
    *,
    usual_size: tuple[int, int] | None = None,
    feeds: Mapping[str, NDArray[Any]] | None = None,
    pads: bool = False,
) -> Pixels:
    """The image input and what is done with it before the first convolution.

    Args:
        usual_size: of an input of any size, where the file says it elsewhere.
        feeds: of further inputs, for a batch of one.
        pads: a network that resizes by itself may pad its pictures too.

    Raises:
        GraphError: there is no image input, or what is inside is no normalisation.
    """
    image = maybe_image(source)
    shapes = declared_shapes(source)
    if image is None:
        found = ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
        raise GraphError(
            f"{source.path}: expected one image input, [N, 3, H, W] or [N, H, W, 3], found {found}; export the model with one"
        )
    name, layout = image
    batch, *dims = shapes[name]
    height, width = dims[1:] if layout == "NCHW" else dims[:2]
    size_hw = (height, width) if height and width else hints.size_hw or usual_size
    others = tuple(other for other in shapes if other != name)
    plain = Pixels(name, name, layout, layout, size_hw, batch, others=others)
    conv = first_convolution(source, name)
    if size_hw is None:
        raise GraphError(
            f"{source.path}: its input takes any size; name the one that it shall have: --size H,W"
        )
    if conv is None or conv == name or unknown_ops(source, [conv]):
        return plain
    response = _respond(source, plain, conv, size_hw, feeds or {}, pads=pads)
    return _measured(source, plain, conv, response)


def first_convolution(source: OnnxSource, image: str) -> str | None:
    """The tensor that enters the first convolution downstream of the image; of one whose padding is
    an operator of its own (TensorFlow's "same"), or whose input is quantized, what enters that.

    None where there is none (a patch embedding by MatMul).
    """
    reached = {image}
    padded: dict[str, str] = {}
    quantized: set[str] = set()
    for node in source.model.graph.node:  # in topological order
        if node.op_type == "Conv" and node.input[0] in reached:
            return padded.get(node.input[0], node.input[0])
        # Without a QuantizeLinear before it, DequantizeLinear is preprocessing, of whole numbers.
        in_pair = bool(node.input) and node.input[0] in quantized
        belongs = node.op_type in OF_CONVOLUTION or (node.op_type == "DequantizeLinear" and in_pair)
        if belongs and node.input[0] in reached:
            padded[node.output[0]] = padded.get(node.input[0], node.input[0])
            if in_pair or node.op_type == "QuantizeLinear":
                quantized.add(node.output[0])
        if node.op_type not in ("Shape", "Size") and reached.intersection(node.input):
            reached.update(node.output)
    return None


def resizes(source: OnnxSource, tensor: str) -> bool:
    """Whether a Resize leads to a tensor."""
    producer = {name: node for node in source.model.graph.node for name in node.output}
    pending, seen = [tensor], set[str]()
    while pending:
        name = pending.pop()
        node = producer.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type == "Resize":
            return True
        pending.extend(node.input)
    return False


@dataclass(frozen=True)
class _Response:
    """How a tensor follows images whose pixels are all equal.

    Attributes:
        whole: it is the image itself, in `layout`; else its channels are rearranged.
        offset, scale, source_of: channel k of it is offset[k] + scale[k] x channel source_of[k] of
            the image.
        level: of a white pixel.
    """

    layout: Layout
    whole: bool
    offset: NDArray[np.float64]
    scale: NDArray[np.float64]
    source_of: NDArray[np.int64]
    level: float


def _measured(source: OnnxSource, plain: Pixels, tensor: str, response: _Response) -> Pixels:
    """What lies between the image and a tensor, by its response."""
    level, layout, offset, scale = response.level, response.layout, response.offset, response.scale
    is_reversed = list(response.source_of[:3]) == [2, 1, 0]
    in_order = is_reversed or list(response.source_of) == [0, 1, 2]
    if not response.whole or not in_order:
        # Focus and the like: channels are rearranged; what is inside stays inside.
        return _kept(source, plain, response)
    order = [2, 1, 0] if is_reversed else [0, 1, 2]
    scale, offset = scale[order], offset[order]
    if (np.abs(scale - 1) < 1e-6).all() and not offset.any() and level == 1.0 and not is_reversed:
        if layout == plain.layout or _read_elsewhere(source.model, plain.image, tensor):
            return plain
        return dataclasses.replace(plain, tensor=tensor, layout=layout)  # a transpose alone
    unit = _unit(scale, level)
    inside = _normal(source, offset, scale, unit, bgr=is_reversed)
    if _read_elsewhere(source.model, plain.image, tensor):
        if level != 1.0:
            raise GraphError(
                f"{source.path}: expected '{plain.image}' to be read by the network's first operators alone; export the model with a float32 "
                "input"
            )
        return dataclasses.replace(plain, inside=inside, kept=True, unit=unit)
    return dataclasses.replace(plain, tensor=tensor, layout=layout, inside=inside, unit=unit)


def _respond(
    source: OnnxSource,
    plain: Pixels,
    tensor: str,
    size_hw: tuple[int, int],
    feeds: Mapping[str, NDArray[Any]],
    *,
    pads: bool,
) -> _Response:
    """Run the network as far as `tensor` with a black image, one of each color, and a gray one.

    Raises:
        GraphError: the tensor is no image, or does not follow the image linearly, pixel by pixel.
    """
    # 254: whole numbers have a half of it.
    level = 254.0 if _is_integer(source.model, plain.image) else 1.0
    see = partial(_first_image, source, plain, tensor, size_hw, feeds)
    black = see((0, 0, 0))
    shape = black.shape
    if len(shape) != 3:
        raise GraphError(
            f"{source.path}: expected images to enter the first convolution, found {shape}"
        )
    layout: Layout = "NCHW" if shape == (3, *size_hw) else "NHWC"
    whole = shape in ((3, *size_hw), (*size_hw, 3)) and not resizes(source, tensor)
    axis = 0 if layout == "NCHW" or not whole else 2

    def channels(value: NDArray[np.float64]) -> NDArray[np.float64]:
        maps = np.moveaxis(value, axis, 0)
        if pads and not whole:  # at a border
            inner = (slice(n // 4, max(n // 2, n // 4 + 1)) for n in maps.shape[1:])
            index = (slice(None), *inner)
            maps = maps[index]
        flat = maps.reshape(len(maps), -1)
        # A convolution with padding of its own, or a Pad before it: the border is left aside.
        if np.ptp(flat, axis=1).max() > 1e-3 * max(1.0, float(np.abs(flat).max())):
            raise _not_affine(source, plain.image)
        return np.asarray(flat.mean(axis=1), np.float64)

    offset = channels(black)
    eye = [(level, 0.0, 0.0), (0.0, level, 0.0), (0.0, 0.0, level)]
    slopes = np.stack([(channels(see(rgb)) - offset) / level for rgb in eye], axis=1)
    source_of, scale = slopes.argmax(axis=1), slopes.max(axis=1)
    rest = slopes.copy()
    rest[np.arange(len(rest)), source_of] = 0
    half = channels(see((level / 2, level / 2, level / 2)))
    bent = np.abs(half - (offset + scale * level / 2)).max()
    is_mixed = (scale <= 0).any() or np.abs(rest).max() > 1e-6 * scale.max()
    if is_mixed or bent > 1e-3 * max(1.0, float(np.abs(half).max())):
        raise _not_affine(source, plain.image)
    return _Response(layout, whole, offset, scale, source_of, level)


def _first_image(
    source: OnnxSource,
    plain: Pixels,
    tensor: str,
    size_hw: tuple[int, int],
    feeds: Mapping[str, NDArray[Any]],
    rgb: Triple,
) -> NDArray[np.float64]:
    """What a tensor is of the first of a batch of images of one color."""
    n = plain.batch or 1
    images = np.empty((n, *size_hw, 3), np.float32)
    images[:] = rgb
    others = {key: np.repeat(value, n, axis=0) for key, value in feeds.items()}
    try:
        (value,) = source.run(
            [tensor], {plain.image: in_layout(images, plain.image_layout), **others}
        )
    except GraphError:
        if not others and plain.others:  # they do not reach the convolution, or should not
            raise GraphError(
                f"{source.path}: expected images alone to reach the first convolution, {list(plain.others)} do too"
            ) from None
        raise
    return value[0].astype(np.float64)


def _kept(source: OnnxSource, plain: Pixels, response: _Response) -> Pixels:
    """Normalisation that stays in the network, since the image cannot be followed through it."""
    level, offset, scale = response.level, response.offset, response.scale
    if level == 1.0 and (np.abs(scale - 1) < 1e-6).all() and not offset.any():
        return plain
    if level != 1.0:
        raise _not_affine(source, plain.image)
    unit = _unit(scale, level)
    first = [
        int(np.flatnonzero(response.source_of == channel)[0])
        for channel in range(3)
        if (response.source_of == channel).any()
    ]
    if len(first) != 3:
        raise _not_affine(source, plain.image)
    inside = _normal(source, offset[first], scale[first], unit, bgr=False)
    return dataclasses.replace(plain, inside=inside, kept=True, unit=unit)


def _unit(scale: NDArray[np.float64], level: float) -> float:
    """What a value of 1 of the input means in 0-255: 255 where the export takes images of 0 to
    1.
    """
    return 255.0 if level == 1.0 and (1 / scale <= 1 + 1e-6).all() else 1.0


def _normal(
    source: OnnxSource,
    offset: NDArray[np.float64],
    scale: NDArray[np.float64],
    unit: float,
    *,
    bgr: bool,
) -> Normal:
    std, mean = unit / scale, -offset / scale * unit
    low, high = PLAUSIBLE_STD
    normal = Normal(_triple(mean), _triple(std), bgr)
    sound = (np.abs(std - 1) < 1e-3).all() or ((low <= std) & (std <= high)).all()
    if not sound or (mean < -1).any() or (mean > 256).any():
        raise GraphError(
            f"{source.path}: expected one normalisation of images of 0-255 or 0-1 before the first convolution, measured {normal}, which "
            "no network is trained with: is it applied twice? Export the network without its preprocessing, or say the whole of it "
            "with --preprocessor"
        )
    return normal


def _triple(values: NDArray[np.float64]) -> Triple:
    """Float32 arithmetic carries six digits; 123.675 comes back as it was written."""
    r, g, b = (float(f"{value:.6g}") + 0.0 for value in values)
    return r, g, b


def _is_integer(model: onnx.ModelProto, name: str) -> bool:
    kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name == name)
    return kind in (
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
    )


def _read_elsewhere(model: onnx.ModelProto, image: str, tensor: str) -> bool:
    """Whether nodes that do not lead to `tensor` read the image."""
    upstream, pending = set(), [tensor]
    producer = {name: node for node in model.graph.node for name in node.output}
    while pending:
        node = producer.get(pending.pop())
        if node is not None and id(node) not in upstream:
            upstream.add(id(node))
            pending.extend(node.input)
    return any(image in node.input and id(node) not in upstream for node in model.graph.node)


def _not_affine(source: OnnxSource, image: str) -> GraphError:
    return GraphError(
        f"{source.path}: expected at most (x - mean) / std and a change of layout between '{image}' and the first convolution, found something "
        "else (a resize, a padding, another colour space); export the network without its preprocessing"
    )


def _text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"
