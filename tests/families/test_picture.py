# SPDX-License-Identifier: Apache-2.0
"""Boxes clipped to the picture within a letterbox: measured in the graph."""

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trtdet.families import picture
from trtdet.graph.builder import Builder
from trtdet.graph.tidy import network_input
from trtdet.sources.base import run_onnx
from trtdet.spec import Placement, Preprocessing

HEIGHT, WIDTH = 8, 12
LETTERBOX = Preprocessing(
    (HEIGHT, WIDTH), dtype="uint8", mean=(10.0, 20.0, 30.0), std=(58.0, 57.0, 56.0), bgr=True,
    resize="letterbox", rounding="floor64", pad_rgb=(124.0, 116.0, 104.0),
)  # fmt: skip


def image(top: int, left: int, bottom: int, right: int, spec: Preprocessing) -> NDArray[np.float32]:
    """A letterboxed picture of noise, as it enters the network."""
    pixels = np.empty((HEIGHT, WIDTH, 3))
    pixels[:] = np.rint(spec.pad_rgb)
    noise = np.random.default_rng(1).integers(0, 256, (bottom - top, right - left, 3))
    pixels[top:bottom, left:right] = noise
    normal = (pixels - np.array(spec.mean)) / np.array(spec.std)
    return normal[..., :: -1 if spec.bgr else 1].transpose(2, 0, 1)[None].astype(np.float32)


def clipped(
    spec: Preprocessing, fed: NDArray[np.float32], boxes: Any, **options: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (a, 4) with scores of 1, clipped: (a, 4), (a,)."""
    name = network_input(spec)
    values = {"boxes": np.array(boxes, np.float32)[None]}
    values["scores"] = np.ones((1, len(boxes), 1), np.float32)
    if spec.resize == "letterbox":
        values[name] = fed
    inputs = [
        helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in values.items()
    ]
    model = helper.make_model(
        helper.make_graph([], "clip", inputs, []), opset_imports=[helper.make_opsetid("", 17)]
    )
    build = Builder(model, "decode/")
    limits = picture.limits(
        build, spec, options.get("backwards", False), is_unit=options.get("is_unit", False),
        cut_off=options.get("cut_off", True),
    )  # fmt: skip
    centred = options.get("centred", False)
    outputs = picture.clip(build, limits, "boxes", "scores", centred=centred)
    build.append_to(model)
    for output in outputs:
        model.graph.output.append(onnx.ValueInfoProto(name=output))
    found, scores = run_onnx(model, list(outputs), values)
    return found[0], scores[0, :, 0]


def test_top_left_picture() -> None:
    """Sizes are cut off, so a box may end half a pixel behind the last row of the picture."""
    fed = image(0, 0, 5, WIDTH, LETTERBOX)
    found, scores = clipped(LETTERBOX, fed, [[-1, 2, 13, 8], [1, 6.5, 3, 8], [0, 1, 2, 3]])
    np.testing.assert_allclose(found[0], [0, 2, 12, 5.5])
    np.testing.assert_allclose(found[2], [0, 1, 2, 3])
    assert scores.tolist() == [1, 0, 1]
    found, scores = clipped(LETTERBOX, fed, [[-1, 2, 13, 8], [1, 5, 3, 8]], cut_off=False)
    np.testing.assert_allclose(found[0], [0, 2, 12, 5])
    assert scores.tolist() == [1, 0]


@pytest.mark.parametrize("placement", ["top_left", "center"])
@pytest.mark.parametrize("backwards", [False, True])
def test_input_of_dynamic_size(placement: Placement, backwards: bool) -> None:
    spec = dataclasses.replace(
        LETTERBOX, size_hw=(4, 4), size_range=((4, 4), (64, 64)), size_multiple=4, placement=placement,
    )  # fmt: skip
    left = 4 if placement == "center" else 0
    fed = image(0, left, 5, left + 4, spec)
    flip = [1, 0, 3, 2] if backwards else [0, 1, 2, 3]
    options = {"backwards": backwards, "cut_off": False}
    found, _ = clipped(spec, fed, [np.array([0, 2, 12, 8])[flip]], **options)
    np.testing.assert_allclose(found[0], np.array([left, 2, left + 4, 5])[flip])
    found, _ = clipped(spec, fed, [[0, 0, 1, 1]], is_unit=True, **options)
    part = np.array([left / WIDTH, 0, (left + 4) / WIDTH, 5 / HEIGHT])
    np.testing.assert_allclose(found[0], part[flip], rtol=1e-6)


def test_centred_picture() -> None:
    spec = dataclasses.replace(LETTERBOX, placement="center", rounding="round", bgr=False)
    fed = image(0, 3, HEIGHT, 9, spec)
    found, scores = clipped(spec, fed, [[0, 0, 12, 12], [0, 0, 3, 3]])
    np.testing.assert_allclose(found[0], [3, 0, 9, 8])
    assert scores.tolist() == [1, 0]


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_of_the_input_and_order_of_axes(backwards: bool) -> None:
    spec = dataclasses.replace(LETTERBOX, rounding="round")
    fed = image(0, 0, HEIGHT, 9, spec)
    found, _ = clipped(spec, fed, [[0, 0, 1, 1]], backwards=backwards, is_unit=True)
    np.testing.assert_allclose(found[0], [0, 0, 1, 0.75] if backwards else [0, 0, 0.75, 1])


def test_stretched_picture_fills_the_input() -> None:
    spec = dataclasses.replace(LETTERBOX, resize="stretch")
    found, _ = clipped(spec, np.zeros(0, np.float32), [[6, 4, 20, 4]], centred=True)
    np.testing.assert_allclose(found[0], [0, 2, 12, 6])


def test_the_colour_of_padding_inside_the_picture_is_the_picture() -> None:
    spec = dataclasses.replace(LETTERBOX, rounding="round")
    fed = image(0, 0, 6, WIDTH, spec)
    fed[:, :, 2:4] = fed[:, :, 7:8]  # a band of the padding's colour across the picture
    found, _ = clipped(spec, fed, [[0, 0, 12, 8]])
    np.testing.assert_allclose(found[0], [0, 0, 12, 6])
