# SPDX-License-Identifier: Apache-2.0
"""Layer and RMS normalisation in FP16: the statistics stay float32, spelled out or not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, parser

from trtdet.precision.emulation import emulate
from trtdet.precision.floats import to_fp16
from trtdet.precision.graph_types import element_types
from trtdet.precision.normalisation import statistics
from trtdet.sources.base import run_onnx

LAYER_NORM = """
  ["mean"] mean = ReduceMean <axes = [-1], keepdims = 1> (x)
  ["centre"] centred = Sub (x, mean)
  ["square"] square = Pow (centred, two)
  ["variance"] variance = ReduceMean <axes = [-1], keepdims = 1> (square)
  ["eps"] safe = Add (variance, eps)
  ["root"] root = Sqrt (safe)
  ["divide"] normal = Div (centred, root)
"""
RMS_NORM = """
  ["square"] square = Mul (x, x)
  ["variance"] variance = ReduceMean <axes = [-1], keepdims = 1> (square)
  ["eps"] safe = Add (variance, eps)
  ["root"] root = Sqrt (safe)
  ["divide"] one_over = Reciprocal (root)
  ["scale"] normal = Mul (x, one_over)
"""


def network(middle: str) -> onnx.ModelProto:
    """MatMul, a normalisation with values of some hundreds, MatMul."""
    model = parser.parse_model(
        f"""
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 8, 64] input) => (float[N, 8, 4] output)
<float two = {{2.0}}, float eps = {{0.00001}}, float[64, 64] first = {{{_numbers(64 * 64, 0, 60)}}}, float[64, 4] last = {{{_numbers(256, 1, 0.1)}}},
 float[64] ones = {{{", ".join(["1.0"] * 64)}}}>
{{
  ["first_layer"] x = MatMul (input, first)
  {middle}
  ["last_layer"] output = MatMul (normal, last)
}}"""
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _numbers(count: int, seed: int, spread: float) -> str:
    values = np.random.default_rng(seed).normal(0, spread, count)
    return ", ".join(f"{value:.4f}" for value in values)


@pytest.mark.parametrize(
    ("middle", "kept", "narrow"),
    [
        (LAYER_NORM, {"mean", "centre", "square", "variance", "eps", "root", "divide"}, set()),
        (RMS_NORM, {"square", "variance", "eps", "root", "divide"}, {"scale"}),
    ],
)
def test_statistics_stay_float32(middle: str, kept: set[str], narrow: set[str]) -> None:
    """Squares of some hundreds do not fit FP16: without this the result is 0 or not a number."""
    model = network(middle)
    converted, report = to_fp16(model)
    by_design = {k.name: k.reason for k in report.by_design}
    assert kept == {n for n, r in by_design.items() if r == "statistics of normalisation"}
    kinds = element_types(converted)
    made = {node.name: kinds.get(node.output[0]) for node in converted.graph.node}
    assert all(made[name] == TensorProto.FLOAT16 for name in narrow | {"first_layer"})
    fed = {"input": np.random.default_rng(2).normal(0, 1, (2, 8, 64)).astype(np.float32)}
    (x,) = run_onnx(model, ["x"], fed)
    assert np.square(x).max() > 65504
    (expected,), (found,) = (run_onnx(m, ["output"], fed) for m in (model, emulate(converted)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=4e-3)


def test_layer_normalization_itself_is_narrow() -> None:
    """ONNX computes its statistics in float32 whatever its data is: `stash_type` is 1 where it
    is not said.
    """
    middle = '["norm"] normal = LayerNormalization <axis = -1> (x, ones)'
    model = network(middle)
    converted, report = to_fp16(model)
    assert not [k for k in report.by_design if k.reason == "statistics of normalisation"]
    (norm,) = [node for node in converted.graph.node if node.op_type == "LayerNormalization"]
    assert element_types(converted)[norm.output[0]] == TensorProto.FLOAT16
    assert all(a.i == 1 for a in norm.attribute if a.name == "stash_type")


def test_what_is_no_normalisation_is_left_alone() -> None:
    """The mean of products of two tensors, and of squares that no root follows."""
    model = parser.parse_model(
        """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 8] x, float[N, 8] y) => (float[N, 1] a, float[N, 1] b)
{
  product = Mul (x, y)
  a = ReduceMean <axes = [-1]> (product)
  square = Mul (x, x)
  b = ReduceMean <axes = [-1]> (square)
}"""
    )
    assert statistics(list(model.graph.node)) == set()
