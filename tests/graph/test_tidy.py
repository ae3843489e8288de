# SPDX-License-Identifier: Apache-2.0
"""Every rewrite: which operators remain, and that the numbers stay."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from trtdet.errors import GraphError
from trtdet.graph import dynamic_batch, tidy
from trtdet.sources.base import run_onnx
from trtdet.sources.subgraphs import reads
from trtdet.spec import Preprocessing

RNG = np.random.default_rng(7)


def parse(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """An ONNX model from text; `constants` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def rewritten(model: onnx.ModelProto, *rewrites: Callable[[gs.Graph], object]) -> onnx.ModelProto:
    """The model after some rewrites; checks that the outputs on a random input stay within 1e-5."""
    original = onnx.ModelProto()
    original.CopyFrom(model)  # graphsurgeon renames initializers in the proto it came from
    surgeon = gs.import_onnx(model)
    for rewrite in rewrites:
        rewrite(surgeon)
    result = gs.export_onnx(surgeon)
    onnx.checker.check_model(result)
    info = model.graph.input[0]
    shape = [d.dim_value or 2 for d in info.type.tensor_type.shape.dim]
    feed = {info.name: RNG.normal(size=shape).astype(np.float32)}
    outputs = [o.name for o in model.graph.output]
    for want, got in zip(
        run_onnx(original, outputs, feed), run_onnx(result, outputs, feed), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    return result


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_channels_first_moves_through_a_residual_block() -> None:
    """conv, swish, bias over channels, squeeze-and-excite mean, add: one transpose in, one out
    remain of six.
    """
    model = parse(
        """
        g (float[N,8,8,3] x) => (float[N,8,8,4] y) {
          x1 = Transpose<perm=[0,3,1,2]>(x)
          c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x1, w1)
          h1 = Transpose<perm=[0,2,3,1]>(c1)
          b1 = Add(h1, bias)
          s1 = Sigmoid(b1)
          m1 = Mul(b1, s1)
          mean = ReduceMean<axes=[1,2], keepdims=1>(m1)
          gated = Mul(m1, mean)
          x2 = Transpose<perm=[0,3,1,2]>(gated)
          c2 = Conv(x2, w2)
          h2 = Transpose<perm=[0,2,3,1]>(c2)
          y = Add(h2, m1)
        }""",
        w1=weights(4, 3, 3, 3), w2=weights(4, 4, 1, 1), bias=weights(4),
    )  # fmt: skip
    result = rewritten(model, tidy.to_channels_first, tidy.average_pool_from_mean)
    assert ops(result)["Transpose"] == 2
    assert ops(result)["GlobalAveragePool"] == 1
    assert ops(result)["ReduceMean"] == 0


def test_channels_first_keeps_a_transpose_for_a_consumer_that_cannot_move() -> None:
    """A Reshape reads memory order: it gets its transpose, the convolution beside it none."""
    model = parse(
        """
        g (float[N,3,4,4] x) => (float[N,32,2] y, float[N,2,4,4] z) {
          c = Conv(x, w)
          h = Transpose<perm=[0,2,3,1]>(c)
          r = Relu(h)
          y = Reshape(r, shape)
          back = Transpose<perm=[0,3,1,2]>(r)
          z = Conv(back, v)
        }""",
        w=weights(4, 3, 1, 1), v=weights(2, 4, 1, 1), shape=np.array([-1, 32, 2], np.int64),
    )  # fmt: skip
    result = rewritten(model, tidy.to_channels_first)
    assert ops(result)["Transpose"] == 1


def test_channels_first_concat_changes_axis() -> None:
    model = parse(
        """
        g (float[N,3,4,4] x) => (float[N,4,4,6] y) {
          h = Transpose<perm=[0,2,3,1]>(x)
          r = Relu(h)
          y = Concat<axis=3>(h, r)
        }"""
    )
    result = rewritten(model, tidy.to_channels_first)
    (concat,) = [n for n in result.graph.node if n.op_type == "Concat"]
    assert concat.attribute[0].i == 1


def test_constants_are_folded_once() -> None:
    model = parse(
        """
        g (float[N,3] x) => (float[N,3] y) {
          t = Transpose<perm=[1,0]>(w)
          s = Mul(t, two)
          y = MatMul(x, s)
        }""",
        w=weights(3, 3), two=np.array(2, np.float32),
    )  # fmt: skip
    assert ops(rewritten(model, tidy.fold_constants)) == {"MatMul": 1}


def test_batch_norm_goes_into_shared_weights_separately() -> None:
    """EfficientDet's heads: one weight, one normalisation per level."""
    bn = {
        f"{p}{i}": np.abs(weights(4)) + 0.1
        for p in ("gamma", "beta", "mean", "var")
        for i in (1, 2)
    }
    model = parse(
        """
        g (float[N,3,4,4] x) => (float[N,4,4,4] y, float[N,4,4,4] z) {
          a = Conv(x, w, b)
          y = BatchNormalization<epsilon=0.001>(a, gamma1, beta1, mean1, var1)
          r = Relu(x)
          c = Conv(r, w, b)
          z = BatchNormalization<epsilon=0.001>(c, gamma2, beta2, mean2, var2)
        }""",
        w=weights(4, 3, 1, 1), b=weights(4), **bn,
    )  # fmt: skip
    result = rewritten(model, tidy.fold_batch_norms)
    assert ops(result) == {"Conv": 2, "Relu": 1}
    assert len({n.input[1] for n in result.graph.node if n.op_type == "Conv"}) == 2


def test_batch_norm_of_a_convolution_over_a_sequence() -> None:
    model = parse(
        """
        g (float[N,3,9] x) => (float[N,4,7] y) {
          a = Conv(x, w)
          y = BatchNormalization(a, gamma, beta, mean, var)
        }""",
        w=weights(4, 3, 3), gamma=weights(4), beta=weights(4), mean=weights(4), var=np.abs(weights(4)),
    )  # fmt: skip
    assert ops(rewritten(model, tidy.fold_batch_norms)) == {"Conv": 1}


@pytest.mark.parametrize(
    ("image", "kernel", "pools"), [("3,8,8", (4, 3, 1, 1), 1), ("3,8,8,5", (4, 3, 1, 1, 1), 0)]
)
def test_a_mean_over_two_axes_is_a_pool_of_images_alone(
    image: str, kernel: tuple[int, ...], pools: int
) -> None:
    """Not of volumes, of which it leaves an axis."""
    model = parse(
        f"""
        g (float[N,{image}] x) => (float y) {{
          a = Conv(x, w)
          s = Sigmoid(a)
          m = Mul(s, a)
          y = ReduceMean<axes=[2,3], keepdims=1>(m)
        }}""",
        w=weights(*kernel),
    )
    result = rewritten(model, tidy.average_pool_from_mean)
    assert ops(result)["GlobalAveragePool"] == pools
    assert ops(result)["ReduceMean"] == 1 - pools


def test_batch_norm_stays_where_the_convolution_is_read_elsewhere() -> None:
    model = parse(
        """
        g (float[N,3,4,4] x) => (float[N,4,4,4] y, float[N,4,4,4] z) {
          a = Conv(x, w)
          y = BatchNormalization(a, gamma, beta, mean, var)
          z = Relu(a)
        }""",
        w=weights(4, 3, 1, 1), gamma=weights(4), beta=weights(4), mean=weights(4), var=np.abs(weights(4)),
    )  # fmt: skip
    assert ops(rewritten(model, tidy.fold_batch_norms))["BatchNormalization"] == 1


def test_neutral_and_constant_factors() -> None:
    """((x * 1) * a) * b + 0 is one product, also as an output of the graph."""
    model = parse(
        """
        g (float[N,3] x) => (float[N,3] y) {
          p = Mul(one, x)
          q = Mul(p, a)
          r = Mul(q, b)
          y = Add(r, zero)
        }""",
        one=np.array(1, np.float32), a=np.array(0.25, np.float32), b=np.array([3], np.float32), zero=np.array([0], np.float32),
    )  # fmt: skip
    result = rewritten(model, tidy.fold_neutral_elements, tidy.merge_constant_factors)
    assert ops(result) == {"Mul": 1}
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).item() == 0.75


def test_rename_drops_counters_and_keeps_outputs() -> None:
    model = parse(
        """
        g (float[N,3,4,4] x) => (float[N,4,4,4] y) {
          ["conv__12"] "StatefulPartitionedCall/net/stem/Conv2D__12:0" = Conv(x, w)
          "net/stem/Conv2D__13:0" = Relu("StatefulPartitionedCall/net/stem/Conv2D__12:0")
          y = Relu("net/stem/Conv2D__13:0")
        }""",
        w=weights(4, 3, 1, 1),
    )  # fmt: skip
    result = rewritten(model, tidy.rename)
    assert [n.name for n in result.graph.node] == ["net/stem/Conv2D", "net/stem/Conv2D_1", "y"]
    assert [i.name for i in result.graph.initializer] == ["net/stem/Conv2D/weight"]


def test_static_batch_becomes_free() -> None:
    """Reshapes exported for a batch of 4 run with 4 and with 3."""
    model = parse(
        """
        g (float[4,2,2,6] x) => (float[4,16,3] y) {
          a = Reshape(x, shape)
          r = Relu(x)
          b = Reshape(r, shape)
          y = Concat<axis=1>(a, b)
        }""",
        shape=np.array([4, -1, 3], np.int64),
    )  # fmt: skip
    surgeon = gs.import_onnx(model)
    dynamic_batch.make_static_batch_dynamic(surgeon.outputs[0], 3)
    surgeon.inputs[0].shape = surgeon.outputs[0].shape = None
    free = gs.export_onnx(surgeon)
    for batch in (4, 3):
        x = weights(batch, 2, 2, 6)
        (got,) = run_onnx(free, ["y"], {"x": x})
        np.testing.assert_array_equal(got[:, :8], x.reshape(batch, 8, 3))


def test_a_batch_baked_into_other_reshapes_is_freed() -> None:
    model = parse(
        """
        g (float[N,4,1,1] x) => (float[N,2,2,1] y) { y = Reshape(x, shape) }""",
        shape=np.array([1, 2, 2, 1], np.int64),
    )  # fmt: skip
    surgeon = gs.import_onnx(model)
    dynamic_batch.make_batch_dynamic(surgeon, 1)
    x = weights(3, 4, 1, 1)
    (got,) = run_onnx(gs.export_onnx(surgeon), ["y"], {"x": x})
    np.testing.assert_array_equal(got, x.reshape(3, 2, 2, 1))


def test_rows_without_a_batch_and_shapes_of_another_batch() -> None:
    """Rows [8, 3] of a batch of 1 stay [1, 8, 3]; inner shapes of the batch are left out."""
    model = parse(
        """
        g (float[1,8,3] x) => (float[1,8,3] y) {
          rows = Reshape(x, flat)
          back = Reshape(rows, shape)
          y = Relu(back)
        }""",
        flat=np.array([-1, 3], np.int64), shape=np.array([1, 8, 3], np.int64),
    )  # fmt: skip
    surgeon = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    dynamic_batch.make_batch_dynamic(surgeon, 1)
    tensors = surgeon.tensors()
    assert tensors["rows"].shape == [8, 3] and tensors["back"].shape is None
    assert surgeon.nodes[1].inputs[1].values.tolist() == [1, 8, 3]


def test_a_grid_has_no_batch() -> None:
    """Cells that follow from the size of the input: [4, 2] becomes [1, 4, 2] at every batch."""
    model = parse(
        """
        g (float[N,4,2] x) => (float[N,4,2] y) {
          size = Shape(x)
          tail = Slice(size, one, three)
          cells = Expand(half, tail)
          grid = Reshape(cells, shape)
          y = Add(x, grid)
        }""",
        one=np.array([1], np.int64), three=np.array([3], np.int64), half=np.float32(0.5), shape=np.array([1, 4, 2], np.int64),
    )  # fmt: skip
    surgeon = gs.import_onnx(model)
    dynamic_batch.make_batch_dynamic(surgeon, 1)
    x = weights(3, 4, 2)
    (got,) = run_onnx(gs.export_onnx(surgeon), ["y"], {"x": x})
    np.testing.assert_array_equal(got, x + np.float32(0.5))


def test_channels_first_stays_where_a_layout_is_unknown() -> None:
    """z may be anything: its sum with a channels-last tensor is not moved."""
    model = parse(
        """
        g (float[N,4,4,4] x) => (float[N,4,4,4] y) {
          c = Conv(x, w)
          h = Transpose<perm=[0,2,3,1]>(c)
          z = Reshape(x, shape)
          y = Add(h, z)
        }""",
        w=weights(4, 4, 1, 1), shape=np.array([0, 4, 4, 4], np.int64),
    )  # fmt: skip
    assert ops(rewritten(model, tidy.to_channels_first))["Transpose"] == 1


def test_static_batch_names_what_it_found() -> None:
    surgeon = gs.import_onnx(parse("g (float[4,2] x) => (float[4,2] y) { y = Relu(x) }"))
    with pytest.raises(
        GraphError, match="expected a Concat of one Reshape per pyramid level, found Relu"
    ):
        dynamic_batch.make_static_batch_dynamic(surgeon.outputs[0], 3)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_input_normalises(layout: str, dtype: str) -> None:
    """Whatever layout and dtype come in, the network sees (pixel - mean) / std, channels first."""
    model = parse("g (float[N,3,4,5] x) => (float[N,3,4,5] y) { y = Relu(x) }")
    surgeon = gs.import_onnx(model)
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)
    tidy.set_input(surgeon, Preprocessing((4, 5), layout, dtype, mean, std), "N")  # type: ignore[arg-type]
    pixels = RNG.integers(0, 256, (2, 4, 5, 3)).astype(dtype)
    fed = pixels if layout == "NHWC" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    (got,) = run_onnx(gs.export_onnx(surgeon), ["y"], {"input": fed})
    want = np.maximum((pixels.astype(np.float32) - mean) / std, 0).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_order_of_the_file_does_not_depend_on_that_of_the_source() -> None:
    """Two branches and one input: any topological order of the nodes gives the same model, byte
    for byte.
    """
    model = parse(
        """
        g (float[N,4,8,8] x, bool c) => (float[N,4,8,8] y, float[N,4,8,8] z) {
            s = Sigmoid(x)
            m = Mul(x, s)
            a1 = Conv <pads = [1, 1, 1, 1]> (m, w)
            b1 = Conv <pads = [1, 1, 1, 1]> (m, w)
            a2 = Relu(a1)
            b2 = Tanh(b1)
            t = Add(b2, m)
            y = If (c) <
                then_branch = yes () => (float[N,4,8,8] r) { r = Add(a2, t) },
                else_branch = no () => (float[N,4,8,8] r) { r = Identity(b2) }
            >
            z = Add(t, a2)
        }""",
        w=weights(4, 4, 3, 3),
    )
    random = np.random.default_rng(0)
    orders, written = set(), set()
    for _ in range(30):
        shuffled = onnx.ModelProto()
        shuffled.CopyFrom(model)
        del shuffled.graph.node[:]
        known = {"", "x", "c", "w"}
        waiting = list(model.graph.node)
        while waiting:
            node = waiting.pop(random.integers(len(waiting)))
            if reads(node) <= known:
                known.update(node.output)
                shuffled.graph.node.append(node)
            else:
                waiting.append(node)
        orders.add(tuple(node.output[0] for node in shuffled.graph.node))
        written.add(gs.export_onnx(tidy.tidy(gs.import_onnx(shuffled))).SerializeToString())
    assert len(orders) > 10
    assert len(written) == 1
