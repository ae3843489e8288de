# SPDX-License-Identifier: Apache-2.0
"""Rounded weights, and quantized convolutions put into a graph."""

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from trtdet.precision.body import Body
from trtdet.precision.equalization import Equalization, Weights
from trtdet.precision.pairs import NewConv, round_weights, write_convs
from trtdet.precision.scales import FP8, INT8
from trtdet.spec import ModelSpec, Nms, Preprocessing


def small() -> onnx.ModelProto:
    """Two convolutions of one weight read one tensor, a branch takes the weight, and a tensor
    has a name that a pair would have.
    """
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 2, 4, 4] x, bool c) => (float[1, 2, 4, 4] y, float[1, 2, 4, 4] z, float[2, 2, 1, 1] t)
          <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] b = {5, 6}>
        {
          "x/quantized" = Relu(x)
          ["first"] first = Conv(x, w, b)
          ["second"] y = Conv(x, w)
          z = Add(first, "x/quantized")
          t = If(c) <
            then_branch = p () => (float[2, 2, 1, 1] "x/scaled") { "x/scaled" = Identity(w) },
            else_branch = q () => (float[2, 2, 1, 1] v) { v = Neg(w) }
          >
        }
    """)


def layers(model: onnx.ModelProto) -> dict[str, NewConv]:
    """Both convolutions as they are, the second with a bias of zeros."""
    spec = ModelSpec("toy", Preprocessing((4, 4), layout="NCHW"), Nms(), (1,))
    values = np.array([1.0, 2, 3, 4]).reshape(2, 2, 1, 1)
    biases = {"first": np.array([5.0, 6]), "second": np.zeros(2)}
    return {layer.name: NewConv(layer, Weights(values, biases[layer.name])) for layer in Body(model, spec).layers}  # fmt: skip


def quantized(conv: NewConv, *, amax: float, equalization: Equalization | None = None) -> NewConv:
    return NewConv(conv.layer, conv.weights, round_weights(conv.weights.values, INT8), amax, equalization)  # fmt: skip


def constants(model: onnx.ModelProto) -> dict[str, list[float]]:
    return {w.name: numpy_helper.to_array(w).ravel().tolist() for w in model.graph.initializer}


def test_rounded_weights() -> None:
    values = np.array([[1.0, -0.5], [0.3, 0.1]]).reshape(2, 2, 1, 1)
    found = round_weights(values, INT8)
    assert found.rounded[:, :, 0, 0].tolist() == [[127, -64], [127, 42]]  # 63.5 to even
    assert found.scales.tolist() == [np.float32(1 / 127), np.float32(np.float32(0.3) / 127)]
    np.testing.assert_allclose(found.values[:, :, 0, 0], [[1, -64 / 127], [0.3, 0.3 * 42 / 127]], rtol=1e-6)  # fmt: skip
    fp8 = round_weights(values, FP8)
    assert fp8.rounded[:, :, 0, 0].tolist() == [[448, -224], [448, 144]]  # 149.3: steps of 16
    narrow = round_weights(values, INT8, fp16=True).scales
    assert (narrow == narrow.astype(np.float16)).all()


def test_float_convolutions_keep_their_form() -> None:
    model = small()
    found, amax = write_convs(model, layers(model), INT8, pairs=True, fp16_scales=False)
    assert amax == {}
    assert [list(n.input) for n in found.graph.node if n.op_type == "Conv"] == [["x", "first/weight", "first/bias"], ["x", "second/weight"]]  # fmt: skip
    # What the branches read stays; what nothing reads any more goes.
    assert constants(found) == {"w": [1, 2, 3, 4], "first/weight": [1, 2, 3, 4], "first/bias": [5, 6], "second/weight": [1, 2, 3, 4]}  # fmt: skip
    assert model == small()


def test_one_pair_per_tensor_with_names_of_its_own() -> None:
    convs = {name: quantized(conv, amax=12.7) for name, conv in layers(small()).items()}
    found, amax = write_convs(small(), convs, INT8, pairs=True, fp16_scales=False)
    onnx.checker.check_model(found, full_check=True)
    assert amax == {"x": 12.7}
    ops = [(n.op_type, *n.output) for n in found.graph.node if n.op_type.endswith("Linear")]
    assert ops == [
        ("QuantizeLinear", "x/quantized_"),
        ("DequantizeLinear", "x/dequantized"),
        ("DequantizeLinear", "first/weight/dequantized"),
        ("DequantizeLinear", "second/weight/dequantized"),
    ]
    values = constants(found)
    assert values["x/scale"] == pytest.approx([0.1]) and values["x/zero_point"] == [0]
    assert values["first/weight/int8"] == [64, 127, 95, 127]  # 63.5 and 95.25
    assert values["first/weight/scale"] == pytest.approx([2 / 127, 4 / 127])
    assert found.opset_import[0].version == 17
    raised, _ = write_convs(small(), convs, INT8, pairs=True, fp16_scales=True)
    assert raised.opset_import[0].version == 19
    assert constants(raised)["x/scale"] == [float(np.nextafter(np.float16(0.1), np.float16(1)))]


@pytest.mark.parametrize("pairs", [True, False])
def test_nodes_of_an_equalization(pairs: bool) -> None:
    change = Equalization(np.array([2.0, 4.0]), np.array([0.0, 0.5]))
    convs = {name: quantized(conv, amax=1.0, equalization=change) for name, conv in layers(small()).items()}  # fmt: skip
    found, amax = write_convs(small(), convs, INT8, pairs=pairs, fp16_scales=False)
    onnx.checker.check_model(found, full_check=True)
    # "x/scaled" is taken within a branch.
    steps = [(n.op_type, n.input[0], n.output[0]) for n in found.graph.node if n.op_type in ("Mul", "Sub")]  # fmt: skip
    assert steps == [("Mul", "x", "x/scaled_"), ("Sub", "x/scaled_", "x/shifted")]
    assert constants(found)["x/scaled_/constant"] == [2, 4]
    assert constants(found)["x/shifted/constant"] == [0, 2]
    assert amax == {"x/shifted": 1.0}
    reads = {n.input[0] for n in found.graph.node if n.op_type == "Conv"}
    assert reads == {"x/shifted/dequantized" if pairs else "x/shifted"}
    assert ("first/weight/int8" in constants(found)) == pairs
