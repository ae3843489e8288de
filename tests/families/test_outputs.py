# SPDX-License-Identifier: Apache-2.0
"""What is measured from the outputs of an export, whatever its family."""

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from trtdet.families import set_outputs
from trtdet.families.base import NO_HINTS, Hints
from trtdet.families.outputs import measure_units
from trtdet.sources.onnx_file import OnnxSource


@pytest.mark.parametrize(("scale", "units"), [(1, "unit"), (100, "pixels"), (2, None)])
def test_units_of_photographs_with_different_numbers_of_boxes(scale: int, units: str) -> None:
    assert measure_units([np.full((n, 4), scale) for n in (3, 5)]) == units


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
