# SPDX-License-Identifier: Apache-2.0
"""What is measured from the outputs of an export, whatever its family."""

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from trtdet.families import set_outputs
from trtdet.families.base import NO_HINTS, Hints
from trtdet.families.box_formats import formats_that_fit, measure_format, measure_units, to_xyxy
from trtdet.sources.onnx_file import OnnxSource


@pytest.mark.parametrize(("scale", "units"), [(1, "unit"), (100, "pixels"), (2, None)])
def test_units_of_photographs_with_different_numbers_of_boxes(scale: int, units: str) -> None:
    assert measure_units([np.full((n, 4), scale) for n in (3, 5)]) == units


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("kind", "fits"), [("xyxy", ["xyxy"]), ("yxyx", ["yxyx"]), ("cxcywh", ["cxcywh"]), ("xywh", ["xywh"])])  # fmt: skip
def test_formats_that_fit_an_input_that_is_no_square(kind: str, fits: list[str], unit: bool) -> None:  # fmt: skip
    """Boxes all over 60 x 240 pixels: from 0 to 1, nothing tells x from y."""
    rng = np.random.default_rng(0)
    photographs = []
    for count in (40, 1, 57):  # of each photograph another number
        size = rng.uniform(0.2, 0.5, (count, 2)) * (240, 60)
        first = rng.uniform(0, 1, (count, 2)) * ((240, 60) - size)
        first[: count // 4] = (240, 60) - size[: count // 4]  # some end with the picture
        parts = {"xyxy": (first, first + size), "cxcywh": (first + size / 2, size), "xywh": (first, size)}  # fmt: skip
        boxes = np.concatenate(parts["xyxy" if kind == "yxyx" else kind], axis=1)
        boxes = boxes / ((240, 60, 240, 60) if unit else 1)
        photographs.append(boxes[:, [1, 0, 3, 2]] if kind == "yxyx" else boxes)
    either = ["xyxy", "yxyx"] if unit and kind in ("xyxy", "yxyx") else fits
    found = formats_that_fit(photographs, (60, 240), is_unit=unit)
    assert [f for f in found if f in either] == either
    assert not {"xyxy", "yxyx"} & {*found} or kind in ("xyxy", "yxyx")
    measured, _ = measure_format(photographs, (60, 240), is_unit=unit)
    assert measured == (None if len(found) > 1 else kind)
    corners = to_xyxy(photographs[0], kind)  # type: ignore[arg-type]
    assert corners.max() <= (1 if unit else 240) + 1e-9


def source_of(text: str, folder: Path) -> OnnxSource:
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return OnnxSource(folder / "model.onnx")


def test_a_model_of_any_size_is_measured_once_a_size_is_known(tmp_path: Path) -> None:
    """Recognising the family, without the size, must not settle what is measured with it."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[1, 3, H, W] image) => (float[1, 3, H, W] out) { out = Neg(image) }
    """
    source = source_of(text, tmp_path)
    assert set_outputs.probe(source, NO_HINTS) == {}
    for size_hw in ((8, 16), (24, 8)):
        (value,) = set_outputs.probe(source, Hints(size_hw=size_hw)).values()
        assert value.shape == (1, 3, *size_hw)


def test_a_resize_behind_an_input_that_is_not_float_gets_its_size(tmp_path: Path) -> None:
    """5/3 of 5 is 8, floored; the mask is bool."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[1, 3, 8, 8] image, bool[1, 1, 5, 5] mask) => (float[1, 3, 8, 8] out)
        <float[4] scales = {1, 1, 1.6666666, 1.6666666}>
        {
          none = Constant<value = float[0] {}>()
          kept = Not(mask)
          numbers = Cast<to = 1>(kept)
          larger = Resize<mode = "nearest">(numbers, none, scales)
          out = Mul(image, larger)
        }
    """
    source = source_of(text, tmp_path)
    model = source.extract({"image": (1, 3, 8, 8), "mask": (1, 1, 5, 5)}, ["out"], opset=None)
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    assert len(resize.input) == 4  # a size in place of scales
