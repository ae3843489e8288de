# SPDX-License-Identifier: Apache-2.0
"""Shape arithmetic becomes constants; the numbers stay, at every batch size."""

import numpy as np
import onnx
import pytest
from onnx import parser

from trtdet.errors import GraphError
from trtdet.graph.static_shapes import fix_shapes
from trtdet.sources.base import run_onnx

X = {"x": [None, 4, 6, 8]}

# What torch's exporters write -> the operators that remain.
CASES = {
    "view of heads": (
        """ shape = Shape (x)  n = Gather <axis = 0> (shape, zero)  heads = Mul (n, four)  sizes = Concat <axis = 0> (heads, one, rest)
            y = Reshape (x, sizes) """,
        "int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}, int64[2] rest = {6, 8}",
        ["Reshape"],
    ),
    "positions": (
        """ shape = Shape (x)  height = Gather <axis = 0> (shape, two)  rows = Range (zero, height, one)  values = Cast <to = 1> (rows)
            column = Reshape (values, sizes)  all = Expand (column, shape)  y = Add (x, all) """,
        "int64 two = {2}, int64 zero = {0}, int64 one = {1}, int64[4] sizes = {1, 1, 6, 1}",
        ["Add"],
    ),
    "queries, repeated": (
        """ shape = Shape (x)  n = Gather <axis = 0> (shape, zero)  sizes = Concat <axis = 0> (n, rest)  table = Expand (query, sizes)
            y = Concat <axis = 1> (x, table) """,
        "int64[1] zero = {0}, int64[3] rest = {2, 6, 8}, float[1, 1, 1, 8] query = {1, 2, 3, 4, 5, 6, 7, 8}",
        ["Shape", "Gather", "Concat", "Tile", "Reshape", "Concat"],
    ),
    "a size of the batch": (
        """ shape = Shape (x)  n = Gather <axis = 0> (shape, zero)  sizes = Concat <axis = 0> (n, rest)
            flat = ReduceMean <axes = [1], keepdims = 1> (x)  y = Expand (flat, sizes) """,
        "int64[1] zero = {0}, int64[3] rest = {3, 6, 8}",
        ["Shape", "Gather", "Mul", "Add", "ReduceMean", "Expand"],
    ),
    "first of the last axis overwritten": (
        """ shape = Shape (x)  n = Gather <axis = 0> (shape, zero)  images = Range (zero, n, one)
            i0 = Reshape (images, at_0)  c = Range (zero, four, one)  i1 = Reshape (c, at_1)  r = Range (zero, six, one)
            i2 = Reshape (r, at_2)  i3 = Reshape (first, at_3)
            n1 = Unsqueeze (n, axis)  grid = Concat <axis = 0> (n1, others)
            e0 = Expand (i0, grid)  e1 = Expand (i1, grid)  e2 = Expand (i2, grid)  e3 = Expand (i3, grid)
            index = Concat <axis = -1> (e0, e1, e2, e3)
            part = Slice (x, from_0, to_2, last)  twice = Add (part, part)  y = ScatterND (x, index, twice) """,
        """int64 zero = {0}, int64 one = {1}, int64 four = {4}, int64 six = {6}, int64[2] first = {0, 1}, int64[1] axis = {0},
           int64[5] at_0 = {-1, 1, 1, 1, 1}, int64[5] at_1 = {1, -1, 1, 1, 1}, int64[5] at_2 = {1, 1, -1, 1, 1},
           int64[5] at_3 = {1, 1, 1, -1, 1}, int64[4] others = {4, 6, 2, 1}, int64[1] from_0 = {0}, int64[1] to_2 = {2},
           int64[1] last = {3}""",
        ["Slice", "Add", "Slice", "Concat"],
    ),
    "sequence": (
        """ parts = SplitToSequence <axis = 1> (x, sizes)  a = SequenceAt (parts, one)  b = SequenceAt (parts, zero)
            y = Concat <axis = 1> (a, b) """,
        "int64[2] sizes = {1, 3}, int64 zero = {0}, int64 one = {1}",
        ["Split", "Identity", "Identity", "Concat"],
    ),
    "sequence of equal parts": (
        """ parts = SplitToSequence <axis = 1> (x, size)  y = SequenceAt (parts, one) """,
        "int64 size = {3}, int64 one = {1}",
        ["Split", "Identity"],
    ),
}  # fmt: skip


def model_of(body, constants, batch="N"):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    shapes (float[{batch}, 4, 6, 8] x) => (float[p, q, r, s] y) <{constants}> {{ {body} }}"""
    return parser.parse_model(text)


def images(n):
    return np.random.default_rng(n).normal(size=(n, 4, 6, 8)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay_and_arithmetic_goes(name):
    body, constants, ops = CASES[name]
    model = model_of(body, constants)
    fixed = fix_shapes(model, X, batch=None)
    assert [node.op_type for node in fixed.graph.node] == ops
    for n in (1, 2, 7):
        (expected,) = run_onnx(model, ["y"], {"x": images(n)})
        (found,) = run_onnx(fixed, ["y"], {"x": images(n)})
        np.testing.assert_array_equal(found, expected)


def test_masks_with_the_batch_in_the_place_of_channels():
    """Rows and columns floor(i * H / h), as torch takes the nearest."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    masks (int64[N, 6, 8] mask) => (float[a, b, c] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] wanted = {4, 3}> {
      number = Cast <to = 1> (mask)  images = Unsqueeze (number, zero)  shape = Shape (images)
      n = Slice (shape, one, two)  sizes = Concat <axis = 0> (one, n, wanted)
      small = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (images, "", "", sizes)
      y = Squeeze (small, zero)
    }"""
    model = parser.parse_model(text)
    fixed = fix_shapes(model, {"mask": [None, 6, 8]}, batch=None)
    assert [node.op_type for node in fixed.graph.node] == [
        "Cast",
        "Unsqueeze",
        "Gather",
        "Gather",
        "Squeeze",
    ]
    mask = np.random.default_rng(0).integers(0, 9, (3, 6, 8))
    (found,) = run_onnx(fixed, ["y"], {"mask": mask})
    np.testing.assert_array_equal(found, mask[:, [0, 1, 3, 4]][:, :, [0, 2, 5]])


def test_a_batch_of_1_is_freed():
    """View, and a mask looked up by image and position, with the one image of the export written
    out.
    """
    model = model_of(
        """ seen = ReduceMax <axes = [1, 2], keepdims = 0> (x)  looked_up = GatherND (seen, index)  view = Reshape (x, sizes)
            y = Mul (view, looked_up) """,
        f"int64[1, 8, 2] index = {{{', '.join(f'0, {i}' for i in range(8))}}}, int64[3] sizes = {{1, 24, 8}}",
        batch=1,
    )
    model.graph.output[0].type.tensor_type.shape.dim.pop()
    fixed = fix_shapes(model, X, batch=1)
    assert [node.op_type for node in fixed.graph.node] == ["ReduceMax", "Reshape", "Reshape", "Mul"]
    singles = [run_onnx(model, ["y"], {"x": images(3)[i : i + 1]})[0] for i in range(3)]
    # [N, 8] beside [N, 24, 8]: the mask needs its own axis, which Mul would not give it, so one
    # image at a time.
    for i, expected in enumerate(singles):
        np.testing.assert_array_equal(
            run_onnx(fixed, ["y"], {"x": images(3)[i : i + 1]})[0], expected
        )


def test_what_depends_on_data_stays():
    body = """ where = NonZero (x)  same = Identity (where)  found = Shape (same)  number = Cast <to = 1> (found)
               most = ReduceMax (number)  y = Mul (x, most) """
    model = model_of(body, "")
    x = np.ones((2, 4, 6, 8), np.float32)
    (expected,) = run_onnx(model, ["y"], {"x": x})
    (found,) = run_onnx(fix_shapes(model, X, batch=None), ["y"], {"x": x})
    np.testing.assert_array_equal(found, expected)


def test_a_sequence_at_a_place_that_data_names_is_refused():
    body = """ parts = SplitToSequence <axis = 1> (x, size)  mean = ReduceMean <keepdims = 0> (x)  place = Cast <to = 7> (mean)
               y = SequenceAt (parts, place) """
    with pytest.raises(GraphError, match="expected a constant position, found 'place'"):
        fix_shapes(model_of(body, "int64 size = {2}"), X, batch=None)


def test_the_model_is_not_touched():
    body, constants, _ = CASES["view of heads"]
    model = model_of(body, constants)
    before = model.SerializeToString()
    fix_shapes(model, X, batch=None)
    assert model.SerializeToString() == before
    onnx.checker.check_model(fix_shapes(model, X, batch=None), full_check=True)
