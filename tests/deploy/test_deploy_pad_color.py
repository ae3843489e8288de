# SPDX-License-Identifier: Apache-2.0
"""deploy.py pad_color: a model fed frames padded in black answers as one fed the padding of its
training.
"""

import dataclasses

import numpy as np
import onnx.parser
import onnxruntime
import pytest
from deploy_models import D0, YOLO, with_input

from trtdet.commands import deploy
from trtdet.deploy.pad_color import insert_pad_color
from trtdet.errors import GraphError
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.spec import ModelSpec

BLACK = (0.0, 0.0, 0.0)


def passing_through(spec: ModelSpec, opset: int = 17) -> onnx.ModelProto:
    """input -> (Cast) -> Identity -> seen: what the network behind it would see."""
    preprocessing = spec.preprocessing
    dims = ",".join(map(str, preprocessing.image_shape))
    cast = "floats = Cast <to: int = 1> (input)" if preprocessing.dtype == "uint8" else ""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({"uint8" if cast else "float"}[N,{dims}] input) => (float[N,{dims}] seen) {{
            {cast}
            seen = Identity({"floats" if cast else "input"})
        }}"""
    )
    spec.attach(model)
    return model


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": images})[0]


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("base", [D0, YOLO], ids=["top_left", "center"])
def test_black_padding_becomes_the_padding_of_training(base, layout, dtype, opset):
    spec = with_input(base, size_hw=(48, 64), layout=layout, dtype=dtype)
    black = dataclasses.replace(spec.preprocessing, pad_rgb=BLACK)
    rng = np.random.default_rng(0)
    sources = [
        rng.integers(1, 256, shape, np.uint8)
        for shape in ((20, 50, 3), (50, 20, 3), (48, 64, 3), (30, 41, 3))
    ]
    sources[2][10:20] = 0  # black inside the picture stays
    sources[2][:, 30:40] = 0
    model = passing_through(spec, opset)
    insert_pad_color(model)
    padded = np.stack([preprocess(source, black)[0] for source in sources])
    wanted = np.stack([preprocess(source, spec.preprocessing)[0] for source in sources])
    assert (padded != wanted).any()
    np.testing.assert_array_equal(run(model, padded), wanted.astype(np.float32))


def test_a_black_frame_becomes_all_padding():
    spec = with_input(D0, size_hw=(8, 8))
    model = passing_through(spec)
    insert_pad_color(model)
    seen = run(model, np.zeros((1, 8, 8, 3), np.float32))
    np.testing.assert_array_equal(
        seen, np.broadcast_to(np.float32(D0.preprocessing.pad_rgb), seen.shape)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "stretch"}, "images are stretched"),
        ({"size_range": ((8, 8), (16, 16))}, "input size is dynamic"),
    ],
)
def test_refused(changes, message):
    model = passing_through(with_input(D0, size_hw=(8, 8)))
    with_input(D0, size_hw=(8, 8), **changes).attach(model)
    with pytest.raises(GraphError, match=message):
        insert_pad_color(model)


def test_a_painted_model_is_not_painted_again():
    model = passing_through(with_input(D0, size_hw=(8, 8)))
    insert_pad_color(model)
    assert ModelSpec.from_onnx(model).source["pad_color"] == "black"
    with pytest.raises(GraphError, match="has it already"):
        insert_pad_color(model)


def test_a_model_with_black_padding_is_left_as_it_is():
    model = passing_through(with_input(D0, size_hw=(8, 8), pad_rgb=BLACK))
    before = model.SerializeToString()
    insert_pad_color(model)
    assert model.SerializeToString() == before


def test_the_file_is_read_once(tmp_path, tiny_onnx, monkeypatch):
    read = []
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda path, **more: read.append(path) or load(path, **more))
    target = tmp_path / "black.onnx"
    assert deploy.main(["pad_color", "--model", str(tiny_onnx), "--output", str(target)]) == 0
    assert read == [tiny_onnx]


def test_detections_of_the_whole_chain(tmp_path, tiny_onnx):
    """The converted file keeps its spec, and what is detected on black padding is what was
    detected on the padding of training.
    """
    from conftest import EXAMPLES

    from trtdet.runtimes.ort import OnnxRuntime

    target = tmp_path / "black.onnx"
    assert deploy.main(["pad_color", "--onnx", str(tiny_onnx), "--output", str(target)]) == 0
    image = load_image(EXAMPLES / "images/shapes_val_000.png")[:80]  # wide, so that it is padded
    with OnnxRuntime(tiny_onnx, threads=1) as trained, OnnxRuntime(target, threads=1) as fixed:
        source = {**trained.spec.source, "pad_color": "black"}
        assert fixed.spec == trained.spec.replace(source=source)
        black = dataclasses.replace(fixed.spec.preprocessing, pad_rgb=BLACK)
        wanted = trained.infer(preprocess(image, trained.spec.preprocessing)[0][None])
        found = fixed.infer(preprocess(image, black)[0][None])
        wrong = trained.infer(preprocess(image, black)[0][None])
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)
    assert np.abs(wrong["detection_scores"] - wanted["detection_scores"]).max() > 1e-2
