# SPDX-License-Identifier: Apache-2.0
"""The Python models of an ensemble, as deployed: the same numbers as image_batcher.py and trtdet.detections.decode."""

import io
from pathlib import Path

import numpy as np
import pytest
from deploy_models import D0, DETR, YOLO, make_engine, with_input
from PIL import Image
from standin_triton_python_backend import StandInServer

from trtdet.commands import deploy
from trtdet.detections import decode
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess

pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")

SPECS = {
    "automl": D0,
    "automl_uint8": with_input(D0, dtype="uint8"),
    "automl_nchw": with_input(D0, layout="NCHW"),
    "yolo": YOLO,
    "yolo_uint8_nhwc": with_input(YOLO, dtype="uint8", layout="NHWC"),
    "detr": DETR,
    "inclusive": D0.replace(inclusive_corners=True),
    "turned": D0.replace(selection="rotated_nms", box_order="xyxy", inclusive_corners=True),
    "centred_floor": with_input(D0, placement="center"),
}


def deployed(folder: Path, spec, batch=(1, 8, 32)) -> Path:
    engine = make_engine(folder / "x.engine", spec, batch)
    arguments = ["--repository", str(folder / "models"), "--name", "x", "--ensemble"]
    assert deploy.main(["triton", "--engine", str(engine), *arguments]) == 0
    return folder / "models"


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    """Image files of many sizes and kinds."""
    rng = np.random.default_rng(0)
    files = {}
    sizes = [(640, 480), (333, 500), (512, 512), (31, 700), (3, 2), (1280, 720), (640, 384)]
    for width, height in sizes:
        small = rng.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        files[f"{width}x{height}.jpg"] = _file(image, "JPEG", quality=90)
    grey = rng.integers(0, 65536, (50, 70), np.uint16)
    files["grey16.png"] = _file(Image.fromarray(grey), "PNG")
    files["palette.png"] = _file(Image.fromarray(small).convert("P"), "PNG")
    files["cmyk.jpg"] = _file(Image.fromarray(small).convert("CMYK"), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    files["turned.jpg"] = _file(Image.fromarray(small), "JPEG", exif=exif)
    return files


def _file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", SPECS)
def test_preprocessing_equals_the_host_pipeline(tmp_path, encoded, name):
    spec = SPECS[name]
    server = StandInServer(deployed(tmp_path, spec) / "x_preprocess")
    batch = np.array(list(encoded.values()), object).reshape(-1, 1)
    (response,) = server.infer({"image": batch})
    for row, (file, data) in enumerate(encoded.items()):
        path = tmp_path / file
        path.write_bytes(data)
        expected, transform = preprocess(load_image(path), spec.preprocessing)
        np.testing.assert_allclose(response.outputs["input"][row], expected, atol=1e-4, rtol=0)
        numbers = (*transform.scale_xy, *transform.offset_xy, *transform.source_wh)
        np.testing.assert_array_equal(
            response.outputs["transform"][row], np.array(numbers, np.float32)
        )


@pytest.mark.parametrize("name", SPECS)
def test_postprocessing_equals_decode(tmp_path, encoded, name):
    spec = SPECS[name]
    models = deployed(tmp_path, spec)
    rng = np.random.default_rng(1)
    rows, slots = 6, spec.nms.max_output_boxes
    height, width = (1, 1) if spec.boxes_normalized else spec.preprocessing.size_hw
    boxes = rng.uniform(-0.1, 1.1, (rows, slots, 4)) * [height, width, height, width]
    if spec.selection == "rotated_nms":
        boxes = np.concatenate([boxes, rng.uniform(-1, 1, (rows, slots, 1))], axis=2)
    outputs = {
        "num_detections": np.array([[0], [1], [slots], [7], [5], [3]], np.int32),
        "detection_boxes": boxes.astype(np.float32),
        "detection_scores": rng.uniform(0.01, 1, (rows, slots)).astype(np.float32),
        "detection_classes": rng.integers(0, spec.num_classes, (rows, slots), np.int32),
    }
    outputs["detection_scores"][3, 4:6] = 0  # free slots that the plugin counts
    sources = [
        rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((480, 640), (9, 7), (700, 31))
    ]
    transforms = [preprocess(image, spec.preprocessing)[1] for image in (sources * 2)[:5]]
    numbers = np.zeros((rows, 6), np.float32)  # the last one: a place without an image
    for row, t in enumerate(transforms):
        numbers[row] = (*t.scale_xy, *t.offset_xy, *t.source_wh)

    server = StandInServer(models / "x_postprocess")
    (response,) = server.infer({**outputs, "transform": numbers})
    found = response.outputs
    for row, expected in enumerate(decode(outputs, spec, transforms)):
        n = len(expected)
        assert found["num_detections"][row, 0] == n
        np.testing.assert_array_equal(found["boxes_xyxy"][row, :n], expected.boxes_xyxy)
        np.testing.assert_array_equal(found["scores"][row, :n], expected.scores)
        np.testing.assert_array_equal(found["class_ids"][row, :n], expected.class_ids)
        if expected.angles is not None:
            np.testing.assert_array_equal(found["angles"][row, :n], expected.angles)
        categories = np.array(spec.category_ids)[expected.class_ids]
        np.testing.assert_array_equal(found["category_ids"][row, :n], categories)
        assert not found["scores"][row, n:].any()
    assert found["num_detections"].ravel().tolist() == [0, 1, slots, 5, 5, 0]


def test_a_fixed_batch_takes_empty_places(tmp_path, encoded):
    server = StandInServer(deployed(tmp_path, D0, (4, 4, 4)) / "x_preprocess")
    images = np.array([*list(encoded.values())[:2], b"", b""], object)
    (response,) = server.infer({"image": images})
    assert response.outputs["input"].shape == (4, 512, 512, 3)
    assert response.outputs["transform"][1].any() and not response.outputs["transform"][2:].any()


def test_a_damaged_image_fails_its_own_request_only(tmp_path, encoded):
    server = StandInServer(deployed(tmp_path, D0) / "x_preprocess")
    good = np.array([[encoded["3x2.jpg"]]], object)
    bad = np.array([[encoded["3x2.jpg"]], [b"no image"]], object)
    answers = server.infer({"image": good}, {"image": bad}, {"image": good})
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert answers[1].error.message.startswith("image 1 cannot be decoded: UnidentifiedImageError")
