# SPDX-License-Identifier: Apache-2.0
"""Heads are compared in place, and in any order where a model sorts their rows itself."""

import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from detr_data import load
from numpy.typing import NDArray
from yolo_networks import v8

from trtdet import about
from trtdet.commands import create_onnx
from trtdet.families.base import CLASS_LOGITS, RAW_BOXES
from trtdet.images.files import ImageArray
from trtdet.parity.base import Found, TensorReader
from trtdet.parity.compare import compare_tensors
from trtdet.parity.rows import are_sorted_inside, in_order_of
from trtdet.parity.summary import SideInfo
from trtdet.parity.tensors import TensorDifference, TensorStatistics
from trtdet.spec import ModelSpec, Nms, Preprocessing

DATA = Path(__file__).parents[1] / "data"
HEADS = (RAW_BOXES, CLASS_LOGITS)
#: Cells of an end-to-end YOLO at 640 x 640.
CELLS = 80 * 80 + 40 * 40 + 20 * 20


class StandInSide:
    """A model whose heads are known numbers."""

    def __init__(self, values: Mapping[str, NDArray[Any]], *, sorts_rows: bool) -> None:
        spec = ModelSpec("toy", Preprocessing((640, 640)), Nms(), (1,), selection="topk")
        self.info = SideInfo("stand-in", "numbers", spec)
        self.values, self.sorts_rows = values, sorts_rows
        self.tensors, self.heads = tuple(values), frozenset(values)

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        raise NotImplementedError

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        def read(some: Sequence[str], image: ImageArray) -> list[NDArray[Any]]:
            return [self.values[name] for name in some]

        return read

    def __enter__(self) -> "StandInSide":
        return self

    def __exit__(self, *_: object) -> None: ...


def differences(
    left: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]], *, sorts_rows: bool
) -> dict[str, TensorDifference]:
    sides = [StandInSide(values, sorts_rows=sorts_rows) for values in (left, right)]
    return {t.name: t for t in compare_tensors(*sides, [about.PHOTOGRAPH])}


def rows_of(count: int, classes: int = 80) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {RAW_BOXES: (count, 4), CLASS_LOGITS: (count, classes)}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def in_order(values: Mapping[str, NDArray[Any]], order: NDArray[np.intp]) -> dict[str, Any]:
    return {name: value[order] for name, value in values.items()}


def test_a_swapped_pair_of_rows_of_a_grid_is_a_difference() -> None:
    """8,400 rows, whose score is the number of the row."""
    left = rows_of(CELLS)
    assert all(t.equal for t in differences(left, left, sorts_rows=False).values())
    left[CLASS_LOGITS][:, 0] = np.arange(CELLS)
    swapped = np.arange(CELLS)
    swapped[[1000, 7000]] = 7000, 1000
    found = differences(left, in_order(left, swapped), sorts_rows=False)
    assert found[CLASS_LOGITS].maximum == 6000
    gap = np.abs(left[RAW_BOXES][1000] - left[RAW_BOXES][7000])
    assert found[RAW_BOXES].maximum == gap.max()
    assert found[RAW_BOXES].mean == pytest.approx(2 * gap.sum() / (4 * CELLS))


def test_rows_that_a_model_sorts_may_come_in_any_order() -> None:
    """As many, all of them elsewhere; one that changed is seen."""
    left = rows_of(CELLS)
    right = in_order(left, np.random.default_rng(1).permutation(CELLS))
    assert not any(t.equal for t in differences(left, right, sorts_rows=False).values())
    assert all(t.equal for t in differences(left, right, sorts_rows=True).values())
    changed = right[CLASS_LOGITS].copy()
    changed[17, 3] += 0.5
    found = differences(left, right | {CLASS_LOGITS: changed}, sorts_rows=True)
    assert found[RAW_BOXES].equal and found[CLASS_LOGITS].maximum == pytest.approx(0.5)


def test_rows_that_lost_their_values_are_counted() -> None:
    values = rows_of(50, classes=3)
    boxes, scores = values[RAW_BOXES], values[CLASS_LOGITS]
    order = np.random.default_rng(1).permutation(50)
    wrong = scores[order].copy()
    wrong[:20] = np.nan
    (_, right) = in_order_of([boxes, scores], [boxes[order], wrong])
    statistics = TensorStatistics("scores")
    statistics.add(scores, right)
    assert statistics.result().non_finite == 60
    # Where the reference has none either, there is nothing to count.
    both = scores.copy()
    both[7] = np.nan
    (_, right) = in_order_of([boxes, both], [boxes[order], both[order]])
    np.testing.assert_array_equal(right, both)


def test_rows_of_any_rank_are_paired() -> None:
    """Scores [Q], boxes [Q, 1, 4]; not heads that have other numbers of rows."""
    scores, boxes = np.arange(5.0), np.arange(20.0).reshape(5, 1, 4)
    found = in_order_of([scores, boxes], [scores[::-1], boxes[::-1]])
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], boxes)
    others = [scores[::-1], np.zeros((4, 5))]
    assert in_order_of([scores, np.zeros((4, 5))], others) == others
    assert in_order_of([], []) == []


def test_equal_rows_stay_where_they_are() -> None:
    """Rows that differ by less than the distances resolve, far from 0: the model itself."""
    rng = np.random.default_rng(0)
    rows = (1000 + 1e-9 * rng.random((300, 80))).astype(np.float64)
    rows[0] = 0
    (found,) = in_order_of([rows], [rows])
    np.testing.assert_array_equal(found, rows)


# ---- which models sort


def converted(model: onnx.ModelProto, folder: Path, *options: str) -> onnx.ModelProto:
    source, out = folder / "source.onnx", folder / "out.onnx"
    onnx.save(model, source)
    arguments = ["--source_onnx", str(source), "--onnx", str(out), "--no_verify", *options]
    assert create_onnx.main(arguments) == 0
    return onnx.load(out)


def exported(name: str) -> onnx.ModelProto:
    packed = (DATA / "libreyolo" / name / "model.onnx.xz").read_bytes()
    return onnx.load_from_string(lzma.decompress(packed))


@pytest.mark.parametrize(
    ("name", "selection", "is_sorted"),
    [
        ("detr_tiny", "topk", False),  # learned queries
        ("LibreDFINE_n", "topk", True),  # those of its encoder
        ("LibreDEIMv2_atto", "topk", True),
        ("LibreYOLOX_n", "nms", False),
        ("v26", "topk", False),  # a grid, whose TopK is left to the product
    ],
)
def test_only_queries_by_score_come_in_any_order(
    name: str, selection: str, is_sorted: bool, tmp_path: Path
) -> None:
    made = {"detr_tiny": lambda: load("detr_tiny")[0], "v26": lambda: v8(end="topk")}
    model = converted(made.get(name, lambda: exported(name))(), tmp_path)
    assert ModelSpec.from_onnx(model).selection == selection
    assert are_sorted_inside(model, HEADS) == is_sorted


def test_a_sort_before_a_convolution_leaves_the_rows_of_a_grid() -> None:
    """Attention that looks at the best tokens alone; and a TopK in the body of an If."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 3, 8, 8] images, float[4, 3, 1, 1] w, int64[1] k, bool high)
          => (float[1, 4, 8, 8] map, float[1, 3, 8, 2] rows, float[1, 3, 8, 2] chosen)
        {
          best, where = TopK(images, k)
          attended = Mul(images, images)
          weighed = GatherElements<axis = 3>(attended, where)
          mixed = MatMul(weighed, images)
          map = Conv(mixed, w)
          rows = Sigmoid(weighed)
          chosen = If(high) <
            then_branch = a () => (float[1, 3, 8, 2] t) { t, t_where = TopK(images, k) },
            else_branch = b () => (float[1, 3, 8, 2] e) { e = Abs(images) }
          >
        }
    """)
    assert [are_sorted_inside(model, [o.name]) for o in model.graph.output] == [False, True, True]


@pytest.mark.parametrize(("read", "sorted_inside"), [("best", False), ("order", True)])
def test_a_sort_whose_values_alone_are_read_moves_no_row(read: str, sorted_inside: bool) -> None:
    """Of a distribution, or for a threshold."""
    taken = "Add(scores, best)" if read == "best" else "GatherElements<axis = 1>(scores, order)"
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 9, 4] scores) => (float[1, 9, 4] {CLASS_LOGITS}) {{
          k = Constant<value = int64[1] {{9}}>()
          best, order = TopK<axis = 1>(scores, k)
          {CLASS_LOGITS} = {taken}
        }}"""
    )
    assert are_sorted_inside(model, {CLASS_LOGITS}) == sorted_inside
