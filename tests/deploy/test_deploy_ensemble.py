# SPDX-License-Identifier: Apache-2.0
"""The Python models of an ensemble, as deployed: the same numbers as image_batcher.py and
trtdet.detections.decode.
"""

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import ROOT
from deploy_models import D0, DETR, YOLO, make_engine, with_input
from PIL import Image
from standin_triton_python_backend import StandInServer
from test_imports import imports_of

from trtdet.commands import deploy
from trtdet.deploy import parameter, triton_check
from trtdet.deploy.parameter import PreprocessParameter
from trtdet.deploy.triton_config import parse_config
from trtdet.detections import decode
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.spec import InputDtype, Layout, Placement, Preprocessing, ResizeMode, Rounding, Sampling

pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")

SPECS = {
    "automl": D0,
    "automl_uint8": with_input(D0, dtype="uint8"),
    "automl_nchw": with_input(D0, layout="NCHW"),
    "yolo": YOLO,
    "yolo_uint8_nhwc": with_input(YOLO, dtype="uint8", layout="NHWC"),
    "detr": DETR,
    "inclusive": D0.replace(inclusive_corners=True),
    "rotated": D0.replace(selection="rotated_nms", box_order="xyxy", inclusive_corners=True),
    "centred_floor": with_input(D0, placement="center"),
    "odtk": with_input(D0, rounding="floor64", layout="NCHW"),
    "tfod_1": with_input(D0, resize="stretch", sampling="corner"),
}


def deployed(folder: Path, spec, batch=(1, 8, 32)) -> Path:
    engine = make_engine(folder / "x.engine", spec, batch)
    arguments = ["--output", str(folder / "models"), "--name", "x", "--ensemble"]
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
    exif[0x0112] = 6  # to be rotated by 90 degrees
    files["rotated.jpg"] = _file(Image.fromarray(small), "JPEG", exif=exif)
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
        np.testing.assert_array_equal(response.outputs["input"][row], expected)
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
    assert answers[1].error.message.startswith("image 1: cannot be decoded: not an image")


# ---- every preprocessing

#: Width and height of 52 pictures: powers of two and their neighbours, common formats small,
#: extremes.
SIZES = [
    *((w, h) for w in (1, 2, 47, 63, 64, 65, 97, 128) for h in (1, 3, 48, 49, 96, 131)),
    (300, 2), (2, 300), (320, 240), (213, 160),
]  # fmt: skip

#: Every value that a family, or an option of create_onnx.py, can give a field; a dynamic size
#: changes nothing for one picture.
CHOICES: dict[str, tuple[Any, ...]] = {
    "layout": get_args(Layout),
    "dtype": get_args(InputDtype),
    "resize": get_args(ResizeMode),
    "placement": get_args(Placement),
    "rounding": get_args(Rounding),
    "sampling": get_args(Sampling),
    "antialias": (False, True),
    "longest": (None, 40),  # of the letterbox alone; larger than the input is never specified
    "pad_rgb": ((0.0, 0.0, 0.0), (123.675, 116.28, 103.53)),
}


def combinations() -> Iterator[Preprocessing]:
    """All of them but a warp with antialiasing, and cubic interpolation with either."""
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        is_warped = (chosen["resize"], chosen["rounding"]) == ("letterbox", "none")
        others = is_warped + chosen["antialias"] + (chosen["sampling"] == "cubic")
        if others < 2:
            yield Preprocessing((48, 64), **chosen)


def test_every_field_is_varied() -> None:
    """A new field of `Preprocessing` has to be put into CHOICES, or here, with the reason."""
    in_the_graph = {"mean", "std", "bgr"}
    of_the_size = {"size_hw", "size_range", "size_multiple", "shorter_side", "own_size"}
    assert {f.name for f in dataclasses.fields(Preprocessing)} == CHOICES.keys() | in_the_graph | of_the_size  # fmt: skip
    assert len(set(SIZES)) == 52


def test_every_preprocessing_equals_the_host_pipeline(tmp_path: Path) -> None:
    server = StandInServer(deployed(tmp_path, with_input(D0, size_hw=(48, 64))) / "x_preprocess")
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIZES]
    encoded = np.array([_file(Image.fromarray(picture), "BMP") for picture in pictures], object)
    compared = 0
    for preprocessing in combinations():
        text = parameter.dumps(PreprocessParameter(preprocessing))
        server.initialize({**server.config, "parameters": {"trtdet": {"string_value": text}}})
        response = server.infer_unchecked({"image": encoded[:, None]})
        assert response.error is None
        for row, picture in enumerate(pictures):
            expected, transform = preprocess(picture, preprocessing)
            numbers = (*transform.scale_xy, *transform.offset_xy, *transform.source_wh)
            assert np.array_equal(response.outputs["input"][row], expected), (preprocessing, SIZES[row])  # fmt: skip
            assert response.outputs["input"].dtype == expected.dtype
            assert response.outputs["transform"][row].tolist() == np.float32(numbers).tolist()
            compared += 1
    assert compared == 1504 * 52


@pytest.mark.parametrize(
    ("change", "on_the_server", "in_the_check"),
    [
        ({"schema": 2}, "expected schema 1, found 2", "expected schema 1, found 2"),
        ({"schema": None}, "expected schema 1, found None", "expected schema 1, found null"),
        (
            {"category_ids": []},
            "category_ids: expected a whole number from 1 to 1000000, found 0",
            "category_ids: expected a whole number from 1 to 1000000, found 0",
        ),
        (
            {"size_hw": [8]},
            "size_hw: expected height and width, found",
            "size_hw: expected a list of length 2, found a list of 1",
        ),
        ({"more": 1}, "unexpected keyword argument 'more'", ""),
    ],
)
def test_a_parameter_of_another_form_is_refused(tmp_path, change, on_the_server, in_the_check):
    """By the model on the server, and before that by `deploy.py check`, which passes over fields
    that it does not know.
    """
    folder = deployed(tmp_path, D0) / "x_postprocess"
    server = StandInServer(folder)
    fields = json.loads(server.config["parameters"]["trtdet"]["string_value"])
    assert fields["schema"] == 1
    text = json.dumps(fields | change)
    with pytest.raises(ValueError, match=rf"^config\.pbtxt: parameter 'trtdet': .*{on_the_server}.*; write the repository again with deploy\.py triton$"):  # fmt: skip
        server.initialize({**server.config, "parameters": {"trtdet": {"string_value": text}}})
    config = parse_config((folder / "config.pbtxt").read_text())
    assert list(triton_check._own_faults(config, folder)) == []
    config.parameters["trtdet"].string_value = text
    faults = list(triton_check._own_faults(config, folder))
    expected = [
        f"parameter 'trtdet': {in_the_check}; write the repository again with deploy.py triton"
    ]
    assert faults == (expected if in_the_check else [])


# ---- the code in the repository


def test_the_repository_holds_the_same_code(tmp_path: Path) -> None:
    models = deployed(tmp_path, D0)
    for name, needed in (("preprocess", "images/preprocess.py"), ("postprocess", "detections.py")):
        version = models / f"x_{name}" / "1"
        copies = [path for path in version.glob("trtdet/**/*.py") if path.name != "__init__.py"]
        assert version / "trtdet" / needed in copies
        for path in copies:
            assert path.read_bytes() == (ROOT / path.relative_to(version)).read_bytes(), path
        server = StandInServer(models / f"x_{name}")
        files = {Path(str(module.__file__)) for module in server.loaded.values()}
        assert files == set(version.glob("trtdet/**/*.py"))


def test_a_server_needs_numpy_opencv_and_pillow_alone(tmp_path: Path) -> None:
    models = deployed(tmp_path, D0)
    outside: dict[str, set[str]] = {}
    for name in ("preprocess", "postprocess"):
        files = list((models / f"x_{name}" / "1").rglob("*.py"))
        at_once = {
            imported.split(".")[0]
            for path in files
            for imported, early in imports_of(path.read_text(encoding="utf-8"))
            if early
        }
        outside[name] = at_once - sys.stdlib_module_names - {"trtdet", "triton_python_backend_utils"}  # fmt: skip
        assert len(files) < 15
    assert outside == {"preprocess": {"numpy", "cv2", "PIL"}, "postprocess": {"numpy"}}
