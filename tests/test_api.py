# SPDX-License-Identifier: Apache-2.0
"""`trtdet.load`, `convert` and `build` give what the command lines give."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import toy_network
from conftest import EXAMPLES

import trtdet
from trtdet.commands import create_onnx, infer
from trtdet.images.files import find_images, load_image
from trtdet.precision.options import Int8Options
from trtdet.spec import ModelSpec, Nms, Preprocessing

PHOTOS = find_images(EXAMPLES / "images")


@pytest.fixture(scope="module")
def model(tiny_onnx: Path) -> Iterator[trtdet.Model]:
    with trtdet.load(tiny_onnx, provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def found(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What infer.py writes, one image at a time as a call with one image runs it."""
    output = tmp_path_factory.mktemp("found")
    arguments = ["--engine", tiny_onnx, "--input", EXAMPLES / "images", "--output", output, "--no_images", "--batch_size", 1, "--provider", "cpu", "--threads", 1]  # fmt: skip
    assert infer.main([str(a) for a in arguments]) == 0
    return output


def test_detections_are_those_of_infer(model: trtdet.Model, found: Path) -> None:
    total = 0
    for photo in PHOTOS:
        detections = model(photo)
        assert detections.to_tsv() == (found / f"{photo.stem}.tsv").read_text()
        total += len(detections)
    assert total > 100


def test_coco_results_are_those_of_infer(model: trtdet.Model, found: Path) -> None:
    expected = json.loads((found / "detections.json").read_text())
    results = [r for photo in PHOTOS for r in model(photo).to_coco(photo.name)]
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert {k: v for k, v in ours.items() if k != "image_id"} == {
            k: v for k, v in theirs.items() if k != "image_id"
        }


def test_a_list_is_its_images_one_by_one(model: trtdet.Model) -> None:
    """Files and arrays, in the order of the list, whatever the batches."""
    mixed: list[str | Path | np.ndarray] = [PHOTOS[0], str(PHOTOS[1]), load_image(PHOTOS[2]), PHOTOS[0]]  # fmt: skip
    together = model(mixed)
    assert len(together) == 4
    for image, detections in zip(mixed, together, strict=True):
        alone = model(image)
        np.testing.assert_allclose(detections.boxes_xyxy, alone.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(detections.scores, alone.scores, atol=1e-6)
        assert detections.labels == alone.labels
    stack = np.stack([load_image(PHOTOS[0])] * 2)
    assert [len(d) for d in model(stack)] == [len(together[0])] * 2
    assert model([]) == []


def test_labels_and_threshold(model: trtdet.Model) -> None:
    detections = model(PHOTOS[0], score_threshold=0.3)
    assert model.class_names == ("circle", "square", "triangle")
    assert 0 < len(detections) < len(model(PHOTOS[0]))
    assert float(detections.scores.min()) >= 0.3
    assert detections.labels == [model.class_names[i] for i in detections.class_ids]
    best = detections.above(float(detections.scores.max()))
    assert len(best) == 1 and best.labels == detections.labels[:1]
    header, first = detections.to_tsv(header=True).splitlines()[:2]
    assert header.split("\t") == ["xmin", "ymin", "xmax", "ymax", "score", "class", "label"]
    assert first.split("\t")[-1] == detections.labels[0]


def test_drawing_changes_a_copy(model: trtdet.Model) -> None:
    image = load_image(PHOTOS[0])
    before = image.copy()
    picture = model(image, score_threshold=0.3).draw(image)
    assert picture.shape == image.shape and (picture != before).any(axis=2).mean() > 0.01
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(model(image).draw(image, score_threshold=1.0), before)


def test_images_that_are_none_are_named(model: trtdet.Model, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xffbroken")
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be decoded"):
        model([PHOTOS[0], tmp_path / "broken.jpg"])
    with pytest.raises(ValueError, match=r"image 1: expected a file, or an array \(h, w, 3\) uint8 RGB, got \(4, 4\) float64"):  # fmt: skip
        model([PHOTOS[0], np.zeros((4, 4))])
    with pytest.raises(FileNotFoundError, match="nothing at"):
        trtdet.load(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"expected grpc://HOST:8001/MODEL or .*, got 'grpc://host:8001'"):  # fmt: skip
        trtdet.load("grpc://host:8001")


def test_threads_share_a_model(model: trtdet.Model) -> None:
    expected = [model(photo).to_tsv() for photo in PHOTOS[:4]]
    answers: dict[int, str] = {}

    def ask(index: int) -> None:
        answers[index] = model(PHOTOS[index % 4]).to_tsv()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: expected[index % 4] for index in range(8)}


def test_supervision_gets_the_same(model: trtdet.Model) -> None:
    pytest.importorskip("supervision", reason="needs supervision")
    detections = model(PHOTOS[0])
    other = detections.to_supervision()
    np.testing.assert_array_equal(other.xyxy, detections.boxes_xyxy)
    np.testing.assert_array_equal(other.confidence, detections.scores)
    assert list(other.data["class_name"]) == detections.labels


def test_rotated_boxes_keep_their_angles() -> None:
    spec = ModelSpec("toy", Preprocessing((8, 8)), Nms(), (5,))
    boxes = np.array([[10, 20, 30, 24]], np.float32)
    detections = trtdet.Detections(
        boxes, np.array([0.5], np.float32), np.array([0], np.int32), np.array([np.pi / 2], np.float32), spec, ("ship",)
    )  # fmt: skip
    (result,) = detections.to_coco(7)
    assert (result["image_id"], result["category_id"]) == (7, 5)
    assert result["bbox"] == [10.0, 20.0, 20.0, 4.0, 1.570796]
    # A quarter turn about (20, 22): 4 wide, 20 high.
    assert sorted(result["segmentation"][0][0::2]) == [18.0, 18.0, 22.0, 22.0]
    assert sorted(result["segmentation"][0][1::2]) == [12.0, 12.0, 32.0, 32.0]
    assert detections.to_tsv() == "10.000\t20.000\t30.000\t24.000\t0.500000\t0\t1.570796\n"


def test_convert_and_build_are_the_stages(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    done = trtdet.convert(EXAMPLES / "tiny_shapes", tmp_path / "api.onnx", score_threshold=0.2, labels=("a", "b", "c"))  # fmt: skip
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    arguments = ["--saved_model", EXAMPLES / "tiny_shapes", "--onnx", tmp_path / "cli.onnx", "--score_threshold", 0.2, "--labels", labels]  # fmt: skip
    assert create_onnx.main([str(a) for a in arguments]) == 0
    assert (tmp_path / "api.onnx").read_bytes() == (tmp_path / "cli.onnx").read_bytes()
    assert done.spec.nms.score_threshold == 0.2
    assert max(d.maximum for d in done.differences) < 1e-4

    built = trtdet.build(
        tmp_path / "api.onnx",
        tmp_path / "api.engine",
        precision="int8",
        calibration=Int8Options(images=EXAMPLES / "images", num_images=4),
        flavor="tensorrt_rtx",
        compute_capabilities=("8.9",),
    )
    assert built.info.precision == "int8" and built.info.int8["mac_share"] > 0.9
    assert json.loads((tmp_path / "api.engine.json").read_text())["engine_sha256"] == built.info.engine_sha256  # fmt: skip


def test_calls_use_the_same_memory(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pinned, or shared with a server, is made once, whatever the number of calls."""
    with trtdet.load(tiny_onnx, provider="cpu", threads=1, batch_size=2) as model:
        made: list[tuple[int, ...]] = []
        allocate = model._runtime.allocate

        def counted(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            made.append(shape)
            return allocate(shape, dtype)

        monkeypatch.setattr(model._buffers, "_allocate", counted)
        first = model(PHOTOS[:5])
        count = len(made)
        for _ in range(10):
            again = model(PHOTOS[:5])
        assert len(made) == count <= 5
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)


def test_images_of_a_dynamic_size_keep_their_own_scale(tmp_path: Path) -> None:
    """With resize each batch gets the input that holds its images, for files and arrays."""
    path = tmp_path / "any.onnx"
    onnx.save(toy_network.free_network(), path)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "a.png")
    with trtdet.load(path, provider="cpu", resize=32, max_size=64) as model:
        from_file, from_array = model([tmp_path / "a.png", image])
    assert from_file.to_tsv() == from_array.to_tsv()


def test_an_unknown_option_is_an_error(tiny_onnx: Path) -> None:
    with pytest.raises(TypeError, match="treshold"):
        trtdet.load(tiny_onnx, treshold=0.3)
    with pytest.raises(TypeError, match="treshold"):
        trtdet.convert(tiny_onnx, "x.onnx", treshold=0.3)
    with pytest.raises(TypeError, match="num_images"):
        trtdet.load(tiny_onnx, num_images=1)
    with pytest.raises(TypeError, match="hints"):
        trtdet.convert(tiny_onnx, "x.onnx", hints=None)
