# SPDX-License-Identifier: Apache-2.0
"""Cutting SavedModels: loops stay out, constants are folded, Resize reaches TensorFlow's exact
size.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES

from trtdet.conversion import verification
from trtdet.errors import GraphError
from trtdet.families import automl
from trtdet.nms.reference import decode_boxes
from trtdet.sources import saved_model
from trtdet.sources.base import run_onnx
from trtdet.sources.saved_model import SavedModelSource

tf = pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")

RNG = np.random.default_rng(11)


def save_v1(path: Path, build: Any) -> None:
    """A TensorFlow 1 SavedModel of what `build(placeholder)` returns, input [None,3,3,2]."""
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 3, 3, 2], "x")
        y = build(x)
        session.run(tf1.global_variables_initializer())
        tf1.saved_model.simple_save(session, str(path), {"x": x}, {"y": y})


def test_importing_tensorflow_hides_no_gpu_from_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine may run in it next. TensorFlow itself takes none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    loaded = saved_model._import_tensorflow()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert loaded.config.get_visible_devices("GPU") == []


def test_fractional_resize_becomes_sizes_and_equals_tensorflow(tmp_path: Path) -> None:
    """3 -> 5, as between P7 and P6 of Lite0: a scale of 5/3 is floored to 4 by one runtime and
    to 5 by another.
    """
    save_v1(
        tmp_path / "m", lambda x: tf.compat.v1.image.resize_nearest_neighbor(x, [5, 7], name="up")
    )
    with SavedModelSource(tmp_path / "m") as source:
        model = source.extract({"x:0": (None, 3, 3, 2)}, ["up:0"], opset=17)
        x = RNG.normal(size=(2, 3, 3, 2)).astype(np.float32)
        (want,) = source.run(["up:0"], {"x:0": x})
    (resize,) = [n for n in model.graph.node if n.op_type == "Resize"]
    assert len(resize.input) == 4  # sizes
    (got,) = run_onnx(model, ["up:0"], {"x:0": x})
    assert want.shape == (2, 5, 7, 2)
    np.testing.assert_array_equal(got, want)


def test_whole_resize_keeps_exact_scales(tmp_path: Path) -> None:
    save_v1(
        tmp_path / "m", lambda x: tf.compat.v1.image.resize_nearest_neighbor(x, [6, 9], name="up")
    )
    with SavedModelSource(tmp_path / "m") as source:
        model = source.extract({"x:0": (None, 3, 3, 2)}, ["up:0"], opset=17)
    scales = next(
        onnx.numpy_helper.to_array(i)
        for i in model.graph.initializer
        if i.name.startswith("scales")
    )
    np.testing.assert_array_equal(scales, [1, 1, 2, 3])


def test_divisions_by_what_is_constant_become_products(tmp_path: Path) -> None:
    """BiFPN's w_i / (sum(w) + 0.0001), from variables: frozen, folded, multiplied."""

    def build(x: Any) -> Any:
        w = tf.compat.v1.get_variable("w", initializer=tf.constant([1.0, 3.0]))
        return tf.math.divide(x * w[0], tf.reduce_sum(tf.nn.relu(w)) + 0.0001, name="y")

    save_v1(tmp_path / "m", build)
    with SavedModelSource(tmp_path / "m") as source:
        model = source.extract({"x:0": (None, 3, 3, 2)}, ["y:0"], opset=17)
    assert {n.op_type for n in model.graph.node} <= {"Mul", "Identity"}
    x = RNG.normal(size=(1, 3, 3, 2)).astype(np.float32)
    (got,) = run_onnx(model, ["y:0"], {"x:0": x})
    np.testing.assert_allclose(got, x / 4.0001, rtol=1e-6)


def test_loop_bodies_are_read_and_their_arguments_matched(shared: Path) -> None:
    """batch_size=0: the NMS is in the body of a while loop."""
    with SavedModelSource(shared / "models" / "tiny_batch0") as source:
        nodes = [n for n in source.graph.all_nodes() if n.op == "NonMaxSuppression"]
        assert len(nodes) == 1 and nodes[0].function
        values = [source.graph.maybe_constant(t, nodes[0].function) for t in nodes[0].inputs[2:6]]
    np.testing.assert_allclose([float(v) for v in values if v is not None], [100, 0.5, 0.001, 0.25])


def test_network_alone_reaches_the_converter() -> None:
    with SavedModelSource(EXAMPLES / "tiny_shapes") as source:
        model = source.extract(
            {"stack:0": (None, 128, 128, 3)}, ["concat:0", "concat_1:0"], opset=17
        )
    ops = {n.op_type for n in model.graph.node}
    assert not ops & {"NonMaxSuppression", "Loop", "If", "TopK", "NonZero", "Shape"}


def test_box_decoding_agrees_with_tensorflow() -> None:
    """The anchors read from the model, decoded as the plugin does, against the tensor that
    enters TensorFlow's NMS.
    """
    with SavedModelSource(EXAMPLES / "tiny_shapes") as source:
        reading = automl.read(source)
        image = verification.verification_image(reading.spec.preprocessing)
        fetches = [reading.heads["raw_boxes"], "stack_2:0"]
        raw, decoded = source.run(fetches, {reading.image_input: image[None]})
    assert reading.anchors is not None
    got = decode_boxes(raw, 1, reading.anchors[None])
    assert np.abs(got - decoded).max() < 1e-3  # pixels; 0.05 is asked for


def test_signature_is_named_when_missing(tmp_path: Path) -> None:
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    with pytest.raises(GraphError, match="expected the signature 'serving_default', found"):
        SavedModelSource(tmp_path / "empty")
