# SPDX-License-Identifier: Apache-2.0
"""docs/adding_a_family.md as a reader would follow it: the module that it prints converts the
model that it describes.
"""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from trtdet import families
from trtdet.commands import create_onnx
from trtdet.conversion import convert as conversion
from trtdet.geometry import box_iou
from trtdet.nms import lowering
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import OUTPUT_NAMES, ModelSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_family.md"
HEIGHT, WIDTH, STRIDE, CLASSES = 32, 64, 8, 3
CELLS = HEIGHT * WIDTH // STRIDE**2
SCORE_THRESHOLD = 0.4


@pytest.fixture
def mydet(tmp_path: Path) -> ModuleType:
    """The module that the page prints."""
    (text,) = [x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "SPDX" in x]
    (tmp_path / "mydet.py").write_text(text)
    found = importlib.util.spec_from_file_location("mydet", tmp_path / "mydet.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def model_of_the_page() -> onnx.ModelProto:
    """`boxes` and `confidences` of one convolution, a box of up to 32 pixels around the centre
    of every cell.
    """
    values = 5 + CLASSES
    model = parser.parse_model(f"""
      <ir_version: 8, opset_import: ["": 17]>
      mydet (float[N, 3, {HEIGHT}, {WIDTH}] images)
        => (float[N, {CELLS}, 4] boxes, float[N, {CELLS}, {1 + CLASSES}] confidences)
      {{
        maps = Conv<strides = [{STRIDE}, {STRIDE}]>(images, weight)
        shape = Constant<value = int64[3] {{0, {values}, {CELLS}}}>()
        columns = Reshape(maps, shape)
        rows = Transpose<perm = [0, 2, 1]>(columns)
        parts = Constant<value = int64[2] {{4, {1 + CLASSES}}}>()
        deltas, logits = Split<axis = 2>(rows, parts)
        share = Sigmoid(deltas)
        offset = Mul(share, sides)
        boxes = Add(offset, centres)
        confidences = Softmax<axis = 2>(logits)
      }}
    """)
    y, x = np.mgrid[: HEIGHT // STRIDE, : WIDTH // STRIDE].reshape(2, -1) * STRIDE + STRIDE / 2
    weight = np.random.default_rng(0).normal(size=(values, 3, STRIDE, STRIDE))
    weight -= weight.mean((1, 2, 3), keepdims=True)  # grey gives 0
    for name, value in (
        ("weight", weight * 0.4),
        ("sides", np.array([-16, -16, 16, 16])),
        ("centres", np.stack([x, y, x, y], 1)[None]),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model


def selected(boxes: np.ndarray, confidences: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
    """(score, class, box) left by greedy NMS per class, best first."""
    scores = confidences[:, 1:]
    pairs = [
        (float(scores[a, c]), int(c), boxes[a]) for a, c in np.argwhere(scores >= SCORE_THRESHOLD)
    ]
    kept: list[tuple[float, int, np.ndarray]] = []
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        rivals = [other[2] for other in kept if other[1] == pair[1]]
        if all(box_iou(rival[None], pair[2][None])[0, 0] <= 0.5 for rival in rivals):
            kept.append(pair)
    return kept


def test_the_printed_family_converts_its_model(
    mydet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "mydet.onnx", tmp_path / "out.onnx"
    onnx.save(model_of_the_page(), source)
    matching = [f.NAME for f in families.load_families() if f.matches(OnnxSource(source))]
    assert matching == ["heads"]  # which gives way to a family that knows its network
    monkeypatch.setattr(conversion, "load_families", lambda: [*families.load_families(), mydet])
    options = ["--input_format", "NCHW", "--score_threshold", str(SCORE_THRESHOLD)]
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options]) == 0

    model = onnx.load(out)
    spec = ModelSpec.from_onnx(model)
    assert (spec.family, spec.category_ids) == ("mydet", (1, 2, 3))
    images = np.random.default_rng(1).integers(0, 256, (2, 3, HEIGHT, WIDTH)).astype(np.float32)
    wanted = run_onnx(onnx.load(source), ["boxes", "confidences"], {"images": images / 255})
    found = run_onnx(lowering.lower(model, "onnx"), OUTPUT_NAMES, {"input": images})
    for boxes, confidences, count, *rest in zip(*wanted, *found, strict=True):
        expected = selected(boxes, confidences)
        assert len(expected) >= 10
        assert count[0] == len(expected)
        got_boxes, got_scores, got_classes = (values[: count[0]] for values in rest)
        np.testing.assert_allclose(got_scores, [e[0] for e in expected], atol=1e-5)
        assert got_classes.tolist() == [e[1] for e in expected]
        np.testing.assert_allclose(got_boxes, [e[2] for e in expected], atol=1e-3)


def test_the_line_for_the_list_names_every_family() -> None:
    """The page shows FAMILIES as it is, and its own at the end."""
    (text,) = re.findall(r"FAMILIES = \((.*?)\)\n```", PAGE.read_text())
    assert ast.literal_eval(f"[{text}]") == [*families.FAMILIES, "mydet"]
