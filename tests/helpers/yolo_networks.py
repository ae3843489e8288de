# SPDX-License-Identifier: Apache-2.0
"""YOLO exports small enough to read, with the node names of the real ones: three levels, a
convolution each, on 32x64 pixels.

What stands behind the convolutions is as Ultralytics 8.4, YOLOv5 and YOLOX export it with torch:
batch 1 written out in every Reshape, constants as Constant nodes.
"""

from pathlib import Path

import numpy as np
import onnx.parser
from onnx import helper, numpy_helper

HEIGHT, WIDTH = 32, 64
STRIDES = (8, 16, 32)
CELLS = tuple((HEIGHT // s) * (WIDTH // s) for s in STRIDES)
BOXES = sum(CELLS)
BINS = 4
CLASSES = 3
NAMES = "{0: 'circle', 1: 'square', 2: 'triangle'}"
K = 12
ANCHORS_WH = ((10, 13), (16, 30), (33, 23))  # v5's, for every level


def save(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def v8(*, task: str = "detect", end: str = "", seed: int = 0) -> onnx.ModelProto:
    """output0 [1, 4+C(+1), A]; with `end` "topk" (v10, 26) or "nms" the [1, K, 6] that is selected
    from it.

    The boxes before a selection are corners, as in these exports; those of "obb" are centre and
    size all the same.
    """
    angle = task == "obb"
    corners = bool(end) and not angle
    channels = 4 + CLASSES + angle
    width = 6 + angle
    name = "output0" if not end else "dense"
    box = (
        "boxes = Concat<axis = 1>(first, second)"
        if corners
        else """
          sum = Add(first, second)
          two = Constant<value = float {2}>()
          centre = Div(sum, two)
          size = Sub(second, first)
          boxes = Concat<axis = 1>(centre, size)"""
    )
    parts = "pixels, scores" + (", rotated" if angle else "")
    body = f"""
      <ir_version: 8, opset_import: ["": 17]>
      main_graph (float[1, 3, {HEIGHT}, {WIDTH}] images)
        => (float[1, {K if end else channels}, {width if end else BOXES}] output0)
      {{
        {_levels("22", {"cv2": 4 * BINS, "cv3": CLASSES, **({"cv4": 1} if angle else {})})}
        bins_shape = Constant<value = int64[4] {{1, 4, {BINS}, {BOXES}}}>()
        ["/model.22/dfl/Reshape"] binned = Reshape(cv2, bins_shape)
        ["/model.22/dfl/Transpose"] by_bin = Transpose<perm = [0, 2, 1, 3]>(binned)
        ["/model.22/dfl/Softmax"] shares = Softmax<axis = 1>(by_bin)
        ["/model.22/dfl/conv/Conv"] mean = Conv(shares, dfl_weight)
        sides_shape = Constant<value = int64[3] {{1, 4, {BOXES}}}>()
        ["/model.22/dfl/Reshape_1"] sides = Reshape(mean, sides_shape)
        halves = Constant<value = int64[2] {{2, 2}}>()
        ["/model.22/Split"] low, high = Split<axis = 1>(sides, halves)
        ["/model.22/Sub"] first = Sub(cells, low)
        ["/model.22/Add"] second = Add(cells, high)
        {box}
        ["/model.22/Mul"] pixels = Mul(boxes, strides)
        ["/model.22/Sigmoid"] scores = Sigmoid(cv3)
        {"rotated = Identity(cv4)" if angle else ""}
        ["/model.22/Concat_5"] {name} = Concat<axis = 1>({parts})
        {_selection(angle) if end else ""}
      }}
    """
    model = onnx.parser.parse_model(body)
    rng = np.random.default_rng(seed)
    _add_convolutions(model, rng, {"cv2": (4 * BINS, 0.0), "cv3": (CLASSES, -1.0), "cv4": (1, 0.0)})
    _add(model, "dfl_weight", np.arange(BINS).reshape(1, BINS, 1, 1))
    x, y, stride = _grid().T
    _add(model, "cells", np.stack([x + 0.5, y + 0.5])[None])
    _add(model, "strides", stride[None, None])
    arguments = {"nms": True if end == "nms" else None, "half": False}
    return _with_metadata(
        model, names=NAMES, stride="32", task=task, imgsz=f"[{HEIGHT}, {WIDTH}]", args=str(arguments),
        **({"end2end": "True"} if end == "topk" else {}),
    )  # fmt: skip


def v5(*, decoded: bool = True, seed: int = 0) -> onnx.ModelProto:
    """output0 [1, 3 A, 5+C], objectness and three boxes per cell; not `decoded`: YOLOv7 without
    --grid, one output per level.
    """
    lines, outputs = [], []
    for level, stride in enumerate(STRIDES):
        height, width = HEIGHT // stride, WIDTH // stride
        lines.append(f"""
          ["/model.24/m.{level}/Conv"] m{level} = Conv<strides = [{stride}, {stride}]>(images, m{level}_weight, m{level}_bias)
          shape{level} = Constant<value = int64[5] {{1, 3, {5 + CLASSES}, {height}, {width}}}>()
          ["/model.24/Reshape_{level}"] by_anchor{level} = Reshape(m{level}, shape{level})
          ["/model.24/Transpose_{level}"] level{level} = Transpose<perm = [0, 1, 3, 4, 2]>(by_anchor{level})""")
        outputs.append(f"float[1, 3, {height}, {width}, {5 + CLASSES}] level{level}")
        if decoded:
            lines.append(f"""
          ["/model.24/Sigmoid_{level}"] s{level} = Sigmoid(level{level})
          parts{level} = Constant<value = int64[3] {{2, 2, {1 + CLASSES}}}>()
          ["/model.24/Split_{level}"] xy{level}, wh{level}, conf{level} = Split<axis = 4>(s{level}, parts{level})
          two{level} = Constant<value = float {{2}}>()
          xy2{level} = Mul(xy{level}, two{level})
          xyg{level} = Add(xy2{level}, grid{level})
          xyp{level} = Mul(xyg{level}, stride{level})
          wh2{level} = Mul(wh{level}, two{level})
          wh4{level} = Mul(wh2{level}, wh2{level})
          whp{level} = Mul(wh4{level}, anchor{level})
          ["/model.24/Concat_{level}"] row{level} = Concat<axis = 4>(xyp{level}, whp{level}, conf{level})
          flat{level} = Constant<value = int64[3] {{1, -1, {5 + CLASSES}}}>()
          ["/model.24/Reshape_{level}_1"] rows{level} = Reshape(row{level}, flat{level})""")
    if decoded:
        lines.append('["/model.24/Concat_3"] output0 = Concat<axis = 1>(rows0, rows1, rows2)')
        outputs = [f"float[1, {3 * BOXES}, {5 + CLASSES}] output0", *outputs]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> torch_jit (float[1, 3, {HEIGHT}, {WIDTH}] images) => ({", ".join(outputs)}) '
        f"{{ {''.join(lines)} }}"
    )
    rng = np.random.default_rng(seed)
    for level, stride in enumerate(STRIDES):
        _add_convolution(model, rng, f"m{level}", 3 * (5 + CLASSES), stride, 0.0)
        y, x = np.mgrid[: HEIGHT // stride, : WIDTH // stride]
        _add(model, f"grid{level}", np.stack([x, y], -1)[None, None] - 0.5)
        _add(model, f"stride{level}", np.array(stride))
        _add(model, f"anchor{level}", np.array(ANCHORS_WH).reshape(1, 3, 1, 1, 2))
    return _with_metadata(model, names=NAMES, stride="32")


def yolox(*, seed: int = 0) -> onnx.ModelProto:
    """output [1, A, 5+C], boxes as offsets to the grid; no metadata."""
    lines = []
    for level, stride in enumerate(STRIDES):
        cells = CELLS[level]
        for head in ("reg", "obj", "cls"):
            lines.append(
                f'["/head/{head}_preds.{level}/Conv"] {head}{level} = '
                f"Conv<strides = [{stride}, {stride}]>(images, {head}{level}_weight, {head}{level}_bias)"
            )
        lines.append(f"""
          ["/head/Sigmoid_{level}"] objs{level} = Sigmoid(obj{level})
          ["/head/Sigmoid_{level}_1"] clss{level} = Sigmoid(cls{level})
          ["/head/Concat_{level}"] both{level} = Concat<axis = 1>(reg{level}, objs{level}, clss{level})
          shape{level} = Constant<value = int64[3] {{1, {5 + CLASSES}, {cells}}}>()
          ["/head/Reshape_{level}"] flat{level} = Reshape(both{level}, shape{level})""")
    text = "\n".join(lines)
    model = onnx.parser.parse_model(f"""
      <ir_version: 6, opset_import: ["": 11]>
      torch_jit (float[1, 3, {HEIGHT}, {WIDTH}] images) => (float[1, {BOXES}, {5 + CLASSES}] output)
      {{
        {text}
        ["/head/Concat_3"] all = Concat<axis = 2>(flat0, flat1, flat2)
        ["/head/Transpose"] output = Transpose<perm = [0, 2, 1]>(all)
      }}
    """)
    rng = np.random.default_rng(seed)
    _add_convolutions(
        model, rng, {"reg": (4, 0.3), "obj": (1, 1.0), "cls": (CLASSES, 0.0)}, scale=1 / 255
    )
    return model


def _levels(block: str, heads: dict[str, int]) -> str:
    """For each head a convolution per level, reshaped to [1, channels, cells] and put side by
    side, under the head's name.
    """
    lines = []
    for head, channels in heads.items():
        for level, stride in enumerate(STRIDES):
            name = f"{head}_{level}"
            lines.append(f"""
              ["/model.{block}/{head}.{level}/{head}.{level}.2/Conv"] {name} = Conv<strides = [{stride}, {stride}]>(images, {head}{level}_weight, {head}{level}_bias)
              {name}_shape = Constant<value = int64[3] {{1, {channels}, -1}}>()
              ["/model.{block}/Reshape_{head}_{level}"] {name}_flat = Reshape({name}, {name}_shape)""")
        flats = ", ".join(f"{head}_{level}_flat" for level in range(len(STRIDES)))
        lines.append(f'["/model.{block}/Concat_{head}"] {head} = Concat<axis = 2>({flats})')
    return "\n".join(lines)


def _selection(angle: bool) -> str:
    """dense -> output0: of the K rows with the best classes, the K best pairs of a row and a
    class.
    """
    columns, names = f"4, {CLASSES}", "box, score"
    if angle:
        columns, names = f"{columns}, 1", f"{names}, angle"
    pick_angle = """
      angles = GatherElements<axis = 1>(angle, row_column)
      picked_angle = GatherElements<axis = 1>(angles, pair_column)"""
    return f"""
      ["/model.22/Transpose"] rows = Transpose<perm = [0, 2, 1]>(dense)
      columns = Constant<value = int64[{3 if angle else 2}] {{{columns}}}>()
      {names} = Split<axis = 2>(rows, columns)
      last_axis = Constant<value = int64[1] {{2}}>()
      k = Constant<value = int64[1] {{{K}}}>()
      classes = Constant<value = int64 {{{CLASSES}}}>()
      as_boxes = Constant<value = int64[3] {{1, 1, 4}}>()
      as_scores = Constant<value = int64[3] {{1, 1, {CLASSES}}}>()
      flat = Constant<value = int64[2] {{1, -1}}>()
      best = ReduceMax<axes = [2], keepdims = 0>(score)
      ["/model.22/TopK"] best_rows, row = TopK<axis = 1>(best, k)
      row_column = Unsqueeze(row, last_axis)
      row_boxes = Expand(row_column, as_boxes)
      row_scores = Expand(row_column, as_scores)
      boxes_kept = GatherElements<axis = 1>(box, row_boxes)
      scores_kept = GatherElements<axis = 1>(score, row_scores)
      pairs = Reshape(scores_kept, flat)
      ["/model.22/TopK_1"] top, pair = TopK<axis = 1>(pairs, k)
      pair_row = Div(pair, classes)
      pair_class = Mod(pair, classes)
      pair_column = Unsqueeze(pair_row, last_axis)
      pair_boxes = Expand(pair_column, as_boxes)
      picked = GatherElements<axis = 1>(boxes_kept, pair_boxes)
      score_column = Unsqueeze(top, last_axis)
      class_float = Cast<to = 1>(pair_class)
      class_column = Unsqueeze(class_float, last_axis)
      {pick_angle if angle else ""}
      ["/model.22/Concat_8"] output0 = Concat<axis = 2>(picked, score_column, class_column{", picked_angle" if angle else ""})
    """


def _grid() -> np.ndarray:
    """(A, 3) x y stride: cells in units of their stride, levels one after the other."""
    rows = []
    for stride in STRIDES:
        y, x = np.mgrid[: HEIGHT // stride, : WIDTH // stride].reshape(2, -1)
        rows.append(np.stack([x, y, np.full(x.size, stride)], 1))
    return np.concatenate(rows)


def _add_convolutions(
    model: onnx.ModelProto,
    rng: np.random.Generator,
    heads: dict[str, tuple[int, float]],
    scale: float = 1.0,
) -> None:
    used = {name for node in model.graph.node for name in node.input}
    for head, (channels, bias) in heads.items():
        for level, stride in enumerate(STRIDES):
            if f"{head}{level}_weight" in used:
                _add_convolution(model, rng, f"{head}{level}", channels, stride, bias, scale)


def _add_convolution(
    model: onnx.ModelProto,
    rng: np.random.Generator,
    name: str,
    channels: int,
    stride: int,
    bias: float,
    scale: float = 1.0,
) -> None:
    """Answers of about one for noise, and none of them for a flat image: the weights of every
    filter add up to zero.
    """
    weight = rng.normal(size=(channels, 3, stride, stride))
    weight -= weight.mean(axis=(1, 2, 3), keepdims=True)
    _add(model, f"{name}_weight", weight * 6 / np.sqrt(3 * stride**2) * scale)
    _add(model, f"{name}_bias", np.full(channels, bias) + rng.normal(size=channels) * 0.3)


def _add(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))


def _with_metadata(model: onnx.ModelProto, **entries: str) -> onnx.ModelProto:
    helper.set_model_props(model, entries)
    return model
