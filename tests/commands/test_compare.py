# SPDX-License-Identifier: Apache-2.0
"""compare.py: every planted fault is caught, with the figure that shows it, and an honest
candidate passes.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import toy_network
from conftest import EXAMPLES
from detr_data import load
from odtk_network import odtk_model
from onnx import TensorProto, helper, numpy_helper
from trt_rig import Rig, write_engine

from trtdet.commands import build_engine, compare, create_onnx
from trtdet.detections import Detections, decode
from trtdet.errors import GraphError
from trtdet.images import preprocess
from trtdet.onnx_files import read_onnx
from trtdet.parity import compare as parity_compare
from trtdet.parity.base import GraphPart, by_category
from trtdet.parity.converted import ConvertedSide, tensors_before
from trtdet.parity.detections import ImageComparison, match
from trtdet.parity.options import Limits
from trtdet.parity.summary import Check, Comparison, SideInfo
from trtdet.parity.tensors import BLOCK, TensorDifference, TensorStatistics, worst_first
from trtdet.parity.trained import cut_mask, picture_share
from trtdet.precision import floats
from trtdet.precision.emulation import emulate
from trtdet.run import detect as run_detect
from trtdet.run.options import RunOptions
from trtdet.spec import ModelSpec, Nms, Preprocessing

IMAGES = EXAMPLES / "images"
ANNOTATIONS = EXAMPLES / "annotations.json"

Summary = dict[str, Any]


def run(reference: Path, candidate: Path, folder: Path, *options: object) -> tuple[int, Summary]:
    """The exit status and the summary."""
    output = folder / "summary.json"
    arguments = ["--reference", reference, "--candidate", candidate]
    arguments += [] if "--input" in options else ["--input", IMAGES]  # several add up
    arguments += ["--annotations", ANNOTATIONS, "--json", output, "--tensor_images", 1, *options]
    status = compare.main([str(a) for a in arguments])
    return status, json.loads(output.read_text()) if output.is_file() else {}


def broken(summary: Summary) -> dict[str, float | None]:
    """metric -> value of the limits that are broken."""
    return {c["metric"]: c["value"] for c in summary["limits"] if not c["passed"]}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_each_onnx_file_is_read_once(kind: str, external: bool, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Also where its weights are in a file of their own."""
    source, candidate = tmp_path / "prepared.onnx", tmp_path / "candidate.onnx"
    options = ["--model", tiny_onnx, "--precision", kind, "--save_onnx", source]
    assert build_engine.main([str(a) for a in options]) == 0
    onnx.save(onnx.load(source), candidate, save_as_external_data=external)
    read: list[Path] = []
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda path, **more: read.append(Path(path)) or load(path, **more))  # fmt: skip
    status, summary = run(tiny_onnx, candidate, tmp_path)
    assert (status, summary["passed"]) == (0, True)
    assert [path.name for path in read[:2]] == [tiny_onnx.name, "candidate.onnx"]
    # A model that is computed as a GPU does goes through a temporary file.
    assert [p == candidate for p in read[2:]] == ([] if kind == "fp32" else [False])


def test_a_model_of_any_size_is_decoded_at_the_size_it_is_fed(tmp_path: Path) -> None:
    """As infer.py decodes it: boxes that are parts of the network input, here 32 x 24 and not
    the 16 x 16 of the spec.
    """
    model = toy_network.free_network()
    spec = ModelSpec.from_onnx(model)
    spec.replace(boxes_normalized=True).attach(model)
    onnx.save(model, tmp_path / "free.onnx")
    options = RunOptions(size=(32, 24), provider="cpu", threads=1)
    photos = sorted(IMAGES.iterdir())[:2]
    read = read_onnx(tmp_path / "free.onnx")
    with ConvertedSide(tmp_path / "free.onnx", options, read) as side:
        found = {path: one for path, (one, _) in side.detect(photos)}
    with (
        run_detect.open_model(tmp_path / "free.onnx", options) as runtime,
        run_detect.open_batcher(runtime, photos, options) as batcher,
    ):
        expected = list(run_detect.detect(runtime, batcher))
    with (
        run_detect.open_model(tmp_path / "free.onnx", options) as runtime,
        run_detect.open_batcher(runtime, photos, options) as batcher,
    ):
        (batch, outputs), *_ = runtime.map(batcher)
        wrong = decode(outputs, runtime.spec, batch.transforms)[0]
    assert [result.path for result in expected] == list(found) == photos
    for result in expected:
        np.testing.assert_array_equal(found[result.path].boxes_xyxy, result.detections.boxes_xyxy)
    assert np.abs(wrong.boxes_xyxy - found[photos[0]].boxes_xyxy).max() > 1


def test_tensors_before_the_heads_include_what_subgraphs_capture() -> None:
    """`kept` is read by the body of an If alone, `unused` by nobody."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 4] images) => (float[1, 4] raw_boxes) {
          kept = Relu(images)
          unused = Neg(images)
          largest = ReduceMax<keepdims = 0>(images)
          high = Less(largest, largest)
          raw_boxes = If(high) <
            then_branch = a () => (float[1, 4] t) { t = Neg(kept) },
            else_branch = b () => (float[1, 4] e) { e = Abs(kept) }
          >
        }
    """)
    tensors = tensors_before(model, frozenset({"raw_boxes"}))
    assert tensors == ("kept", "largest", "high", "raw_boxes")


# ---- honest candidates


def test_converted_model_equals_its_saved_model(tiny_onnx: Path, tmp_path: Path) -> None:
    """TensorFlow's own preprocessing and network against the ONNX file: both heads, every
    detection, the AP.
    """
    status, summary = run(EXAMPLES / "tiny_shapes", tiny_onnx, tmp_path)
    assert (status, summary["passed"]) == (0, True)
    assert [t["name"] for t in summary["tensors"]] == ["raw_boxes", "class_logits"]
    assert all(t["head"] and t["max"] < 1e-4 and t["sqnr_db"] > 100 for t in summary["tensors"])
    found = summary["detections"]
    assert (found["reference"], found["matched"]) == (50, 50)  # measured 2026-11-21
    assert found["score"]["maximum"] < 1e-5 and found["box"]["maximum"] < 1e-3
    assert summary["ap"]["reference"]["AP"] == pytest.approx(0.7987, abs=5e-4)  # as eval_coco.py
    assert abs(summary["ap"]["difference"]["AP"]) < 1e-4
    assert summary["ap"]["images"] == 12
    assert summary["spec_differences"] == []


def test_own_nms_of_the_saved_model_is_soft(tiny_onnx: Path, tmp_path: Path) -> None:
    """Its own gaussian NMS keeps boxes that hard NMS suppresses: that, and nothing of the
    network, is what differs.
    """
    status, summary = run(EXAMPLES / "tiny_shapes", tiny_onnx, tmp_path, "--own_nms")
    assert status == 1
    assert broken(summary)["missing"] == pytest.approx(10 / 72)
    assert summary["detections"]["extra"] == 0
    assert summary["tensors"][0]["cosine"] > 0.999999


CHOICES = {
    "letterbox, a mask": ("detr", []),
    "stretch, another mean": ("detr", ["--resize_mode", "stretch", "--preprocessor", "scale_range"]),
    "ODTK's overlap": ("odtk", ["--rotated_nms", "odtk"]),
    "exact overlap": ("odtk", ["--rotated_nms", "exact"]),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_model_as_trained_follows_the_choices_of_its_conversion(choice: str, tmp_path: Path) -> None:  # fmt: skip
    """The pictures are square, the inputs 64x96 and 128x256 (height x width): a letterbox leaves
    a third or half to padding.
    """
    kind, options = CHOICES[choice]
    source, converted = tmp_path / "source.onnx", tmp_path / "converted.onnx"
    onnx.save(load("detr_tiny")[0] if kind == "detr" else odtk_model(rotated=True), source)
    arguments = ["--source_onnx", str(source), "--onnx", str(converted), *options]
    assert create_onnx.main(arguments) == 0
    output = tmp_path / "out.json"
    arguments = ["--reference", str(source), "--candidate", str(converted), "--input", str(IMAGES), "--num_images", "2", "--min_score", "0.05"]  # fmt: skip
    assert compare.main([*arguments, "--json", str(output)]) == 0
    summary = json.loads(output.read_text())
    found = summary["detections"]
    assert found["reference"] == found["candidate"] == found["matched"] > 10
    assert found["box"]["maximum"] < 0.02 and found["score"]["maximum"] < 1e-4
    assert (found["angle"] is None) == (kind == "detr")
    assert summary["spec_differences"] == []


def test_masks_cover_the_picture() -> None:
    """A picture of 128x128 in 64x96 takes 64 of 96 columns, and three of four of a mask of 2x4:
    the third begins at 48.
    """
    _, transform = preprocess.preprocess(
        np.zeros((128, 128, 3), np.uint8), spec := Preprocessing((64, 96), rounding="round")
    )
    share = picture_share(transform, spec)
    assert share.tolist() == pytest.approx([2 / 3, 1, 2 / 3, 1])
    assert cut_mask(np.ones((1, 64, 96), np.int64), share).sum(axis=2).tolist() == [[64] * 64]  # fmt: skip
    assert cut_mask(np.ones((1, 2, 4), np.int64), share).tolist() == [[[1, 1, 1, 0]] * 2]
    with pytest.raises(GraphError, match="expected a mask"):
        cut_mask(np.ones((1, 2), np.int64), share)


def test_fp16_passes(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half.onnx"
    assert build_engine.main(["--onnx", str(tiny_onnx), "--save_onnx", str(half), "--precision", "fp16"]) == 0  # fmt: skip
    capsys.readouterr()
    status, summary = run(tiny_onnx, half, tmp_path)
    captured = capsys.readouterr()
    assert status == 0 and captured.out.splitlines()[-2:] == ["within all limits", str(tmp_path / "summary.json")]  # fmt: skip
    assert len(summary["tensors"]) == 388
    worst = min(t["sqnr_db"] for t in summary["tensors"] if not t["equal"])
    print(f"worst SQNR {worst:.1f} dB, score {summary['detections']['score']}")
    assert 43 < worst < 55  # measured 48.9: eleven bits, less what adds up
    assert 0 < summary["detections"]["score"]["percentile"] < 0.003
    assert summary["candidate"]["kind"].endswith("rounding as a GPU does")


# ---- planted faults


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def edit_anchors(model: onnx.ModelProto, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = initializer(model, "nms/anchors")
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), tensor.name))  # fmt: skip


def larger_anchors(model: onnx.ModelProto) -> onnx.ModelProto:
    """Anchors of scale 5 instead of 4, about the same centres."""
    edit_anchors(model, lambda a: np.concatenate([a[..., :2], a[..., 2:] * np.float32(1.25)], -1))
    return model


def swapped_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Boxes are y x y x, and said to be x y x y."""
    ModelSpec.from_onnx(model).replace(box_order="xyxy").attach(model)
    return model


def swapped_anchor_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Centres x y instead of y x."""
    edit_anchors(model, lambda a: np.ascontiguousarray(a[..., [1, 0, 3, 2]]))
    return model


def classes_from_zero(model: onnx.ModelProto) -> onnx.ModelProto:
    """Category ids 0, 1, 2 instead of 1, 2, 3.

    The names are right, so the AP, matched by name, stays.
    """
    spec = ModelSpec.from_onnx(model)
    spec.replace(category_ids=tuple(i - 1 for i in spec.category_ids)).attach(model)
    return model


def names_of_the_next_class(model: onnx.ModelProto) -> onnx.ModelProto:
    """Names that begin one class late, with the right ids."""
    spec = ModelSpec.from_onnx(model)
    spec.replace(labels=(*spec.labels[1:], spec.labels[0])).attach(model)
    return model


def per_class_nms(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model suppresses across classes."""
    node = next(n for n in model.graph.node if n.op_type == "EfficientNMS_TRT")
    next(a for a in node.attribute if a.name == "class_agnostic").i = 0
    return model


def other_mean(model: onnx.ModelProto) -> onnx.ModelProto:
    """ImageNet's mean in 0-1 instead of 0-255."""
    tensor = initializer(model, "preprocess/mean")
    mean = numpy_helper.to_array(tensor) / np.float32(255)
    tensor.CopyFrom(numpy_helper.from_array(mean, tensor.name))
    return model


def overflowing_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """x -> (x * 2^14) / 2^14, the same in float32; then everything in FP16, which ends at 65504.

    That tensor reaches 28.
    """
    name = "efficientnet-b0/blocks_1/tpu_batch_normalization_1/FusedBatchNormV3"
    node = next(n for n in model.graph.node if name in n.output)
    node.output[0] = "before"
    factors = {"up": 2.0**14, "down": 2.0**-14}
    for key, value in factors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32([value]), key))
    position = list(model.graph.node).index(node) + 1
    model.graph.node.insert(position, helper.make_node("Mul", ["before", "up"], ["large"], name="up"))  # fmt: skip
    model.graph.node.insert(position + 1, helper.make_node("Mul", ["large", "down"], [name], name="down"))  # fmt: skip
    typed, report = floats.to_fp16(model)  # no ranges: not checked
    assert "up" not in {node.name for node in report.kept}
    return typed


#: What it is -> (what plants it, the metrics that show it).
FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], set[str]]] = {
    "wrong mean": (
        other_mean,
        {"cosine:raw_boxes", "cosine:class_logits", "score_diff", "ap_drop"},
    ),
    "swapped x and y of boxes": (swapped_axes, {"missing", "extra", "ap_drop"}),
    "swapped x and y of anchors": (swapped_anchor_axes, {"missing", "ap_drop"}),
    "anchors of another size": (larger_anchors, {"box_diff", "ap_drop"}),
    "ids one off": (classes_from_zero, {"class_flips"}),
    "names one off": (names_of_the_next_class, {"ap_drop"}),
    "FP16 overflow": (overflowing_fp16, {"non_finite", "missing", "ap_drop"}),
    "NMS in the wrong mode": (per_class_nms, {"extra"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    fault: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, metrics = FAULTS[fault]
    candidate = tmp_path / "faulty.onnx"
    onnx.save(plant(onnx.load(tiny_onnx)), candidate)
    status, summary = run(tiny_onnx, candidate, tmp_path)
    found = broken(summary)
    print(fault, {name: found[name] for name in metrics & found.keys()})
    assert status == 1 and summary["passed"] is False
    assert metrics <= found.keys()
    if fault in ("swapped x and y of boxes", "anchors of another size", "NMS in the wrong mode"):
        assert all(
            t["equal"] for t in summary["tensors"]
        )  # the network is right, what follows is not
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("E ")]
    assert len(errors) == len(found)  # one line each


def test_wrong_normalisation_shows_against_the_saved_model(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What create_onnx.py --preprocessor scale_range would write: the SavedModel, with its own
    preprocessing, does not agree.
    """
    model = onnx.load(tiny_onnx)
    for name, value in (("preprocess/mean", 127.5), ("preprocess/scale", 1 / 127.5)):
        tensor = initializer(model, name)
        values = np.full_like(numpy_helper.to_array(tensor), value)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    spec = ModelSpec.from_onnx(model)
    grey = (127.5, 127.5, 127.5)
    preprocessing = dataclasses.replace(spec.preprocessing, mean=grey, std=grey, pad_rgb=grey)
    spec.replace(preprocessing=preprocessing).attach(model)
    onnx.save(model, tmp_path / "lite.onnx")
    status, summary = run(EXAMPLES / "tiny_shapes", tmp_path / "lite.onnx", tmp_path)
    assert status == 1
    assert {"cosine:raw_boxes", "cosine:class_logits", "score_diff", "ap_drop"} <= broken(summary).keys()  # fmt: skip
    assert {row[0] for row in summary["spec_differences"]} == {
        "preprocessing.mean", "preprocessing.std", "preprocessing.pad_rgb"
    }  # fmt: skip
    assert "preprocessing.mean: (123.675, 116.28, 103.53) in the reference, (127.5, " in capsys.readouterr().out  # fmt: skip


def test_stale_cache_is_caught(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """INT8 with the scales of another model: one behind another normalisation.

    Its own scales stay within INT8's limits.
    """

    def quantize(model: Path, cache: Path, name: str, *options: object) -> Path:
        path = tmp_path / name
        arguments = ["--onnx", model, "--save_onnx", path, "--precision", "int8", "--calib_cache", cache, *options]  # fmt: skip
        assert build_engine.main([str(a) for a in arguments]) == 0
        return path

    other = onnx.load(tiny_onnx)
    scale = initializer(other, "preprocess/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(8), scale.name))  # fmt: skip
    onnx.save(other, tmp_path / "other.onnx")
    calibrate = ["--calib_input", IMAGES, "--calib_num_images", 2]
    own = quantize(tiny_onnx, tmp_path / "own.cache", "own_int8.onnx", *calibrate)
    quantize(tmp_path / "other.onnx", tmp_path / "other.cache", "other_int8.onnx", *calibrate)
    shutil.copy(
        tmp_path / "other.cache", tmp_path / "stale.cache"
    )  # without its .json, which would have it refused
    stale = quantize(tiny_onnx, tmp_path / "stale.cache", "stale_int8.onnx")
    capsys.readouterr()
    # The limits of INT8 are chosen without an option, but for AP: two images are few to calibrate
    # on.
    status, honest = run(tiny_onnx, own, tmp_path, "--max_ap_drop", 0.02)
    assert (status, broken(honest)) == (0, {})
    limits = {c["metric"]: c["limit"] for c in honest["limits"]}
    assert (limits["missing"], limits["box_diff"], limits["cosine:class_logits"]) == (0.05, 8, 0.99)
    assert (honest["reference"]["precision"], honest["candidate"]["precision"]) == ("fp32", "int8")
    # Channels are rescaled in both graphs below, and scaled back: no tensor is far from the
    # reference's.
    rescaled = json.loads(next(p.value for p in onnx.load(own).metadata_props if p.key == "trtdet.rescaled"))  # fmt: skip
    assert len(rescaled) > 5
    tensors = {t["name"]: t for t in honest["tensors"]}
    assert all(tensors[name]["cosine"] > 0.95 for name in rescaled)
    status, summary = run(tiny_onnx, stale, tmp_path, "--max_ap_drop", 0.02)
    print(broken(summary))
    assert status == 1
    assert {"cosine:class_logits", "missing", "ap_drop"} <= broken(summary).keys()


# ---- usage


def test_errors_name_the_next_step(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(reference: Path, candidate: Path, *options: object) -> str:
        status, _ = run(reference, candidate, tmp_path, *options)
        assert status == 1
        return capsys.readouterr().err.splitlines()[-1]

    missing = tmp_path / "none.onnx"
    assert error_of(tiny_onnx, missing) == f"error: --candidate: expected a SavedModel, an ONNX file or an engine, found nothing at {missing}"  # fmt: skip
    assert "the reference finds nothing of this score in 12 images" in error_of(tiny_onnx, tiny_onnx, "--min_score", 1)  # fmt: skip
    (tmp_path / "text.onnx").write_text("no model")
    assert "expected an ONNX file" in error_of(tiny_onnx, tmp_path / "text.onnx")
    with pytest.raises(SystemExit) as usage:
        compare.main(
            ["--reference", "a", "--candidate", "b", "--input", "c", "--report", "page.pdf"]
        )
    assert usage.value.code == 2
    assert (
        "--report: expected a name that ends in .html or .htm, got page.pdf"
        in capsys.readouterr().err
    )


def write_annotations(path: Path, **changes: Any) -> Path:
    """The example's, with other contents."""
    path.write_text(json.dumps(json.loads(ANNOTATIONS.read_text()) | changes))
    return path


def test_annotations_that_do_not_fit_are_refused_before_anything_is_run(
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_detection(*_: object) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(ConvertedSide, "detect", no_detection)
    data = json.loads(ANNOTATIONS.read_text())
    others = [{**image, "file_name": f"x{image['file_name']}"} for image in data["images"]]
    far = [{**entry, "category_id": 90} for entry in data["annotations"]]
    for changes, message in (
        ({"images": others}, "names none of the 12 images"),
        ({"annotations": []}, "has none in the 12 images that are looked at, so there is no AP"),
        ({"annotations": [{**entry, "iscrowd": 1} for entry in data["annotations"]]}, "has none in the 12 images"),
        ({"annotations": far, "categories": [{"id": 90}]}, "expected categories of the model (1, 2, 3)"),
    ):  # fmt: skip
        path = write_annotations(tmp_path / "a.json", **changes)
        assert run(tiny_onnx, tiny_onnx, tmp_path, "--annotations", path) == (1, {})
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_partial_annotations_are_told_everywhere(tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Of five images one cannot be read and one is not annotated; and one category is beyond the
    model.
    """
    data = json.loads(ANNOTATIONS.read_text())
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in data["images"][:4]:
        shutil.copy(IMAGES / image["file_name"], folder)
    (folder / data["images"][4]["file_name"]).write_bytes(b"no picture")
    path = write_annotations(tmp_path / "a.json", images=data["images"][1:], categories=[*data["categories"], {"id": 77, "name": "x"}])  # fmt: skip
    page = tmp_path / "page.html"
    options = ["--annotations", path, "--input", folder, "--tensor_images", 0, "--report", page]
    status, summary = run(tiny_onnx, tiny_onnx, tmp_path, *options)
    captured = capsys.readouterr()
    assert (status, summary["ap"]["images"], summary["images"]) == (3, 3, 4)
    assert "AP on 3 of 4 images: AP 0." in captured.out
    assert "AP on 3 of 4 images." in page.read_text()
    assert "W 1 of 5 images have no annotations: AP is of the other 4 alone" in captured.err
    assert captured.err.count("W categories that the model does not know, all objects missed: 77 (x)") == 1  # fmt: skip


def test_categories_of_models_of_one_name_are_kept_apart(tiny_onnx: Path, tmp_path: Path) -> None:
    """Both files are called tiny.onnx; the candidate has other ids and no names, none of which
    is annotated: its AP is 0.
    """
    model = onnx.load(tiny_onnx)
    spec = ModelSpec.from_onnx(model)
    spec.replace(category_ids=(701, 705, 709), labels=()).attach(model)
    candidate = tmp_path / "other" / tiny_onnx.name
    candidate.parent.mkdir()
    onnx.save(model, candidate)
    status, summary = run(tiny_onnx, candidate, tmp_path, "--tensor_images", 0)
    assert status == 1 and {"class_flips", "ap_drop"} <= broken(summary).keys()
    ap = summary["ap"]
    assert ap["reference"]["AP"] == pytest.approx(0.7987, abs=5e-4)
    assert ap["candidate"]["AP"] == 0


def test_last_pixels_of_rotated_models_belong_to_their_boxes(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """COCO results of a model of inclusive corners are a pixel larger, as eval_coco.py writes
    them.
    """
    asked: list[bool] = []
    convert = parity_compare.to_coco_results

    def watched(*arguments: Any, inclusive_corners: bool) -> Any:
        asked.append(inclusive_corners)
        return convert(*arguments, inclusive_corners=inclusive_corners)

    monkeypatch.setattr(parity_compare, "to_coco_results", watched)
    model = onnx.load(tiny_onnx)
    ModelSpec.from_onnx(model).replace(inclusive_corners=True).attach(model)
    onnx.save(model, tmp_path / "inclusive.onnx")
    run(tiny_onnx, tmp_path / "inclusive.onnx", tmp_path, "--tensor_images", 0, "--num_images", 2)
    assert asked == [False, True] * 2


@pytest.mark.parametrize(
    ("name", "start", "what"),
    [
        ("photo.png", b"\x89PNG\r\n\x1a\n\x00", "a PNG image"),
        ("labels.txt", b"person\ncar\n", "a text file"),
        ("weights.pt", b"PK\x03\x04\x00\x00", "a ZIP archive, as PyTorch's .pt"),
        ("x.engine", b"", "an empty file"),
    ],
)
def test_other_files_are_told_from_engines(name: str, start: bytes, what: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / name
    path.write_bytes(start)
    assert run(tiny_onnx, path, tmp_path) == (1, {})
    assert f"error: --candidate: expected a SavedModel, an ONNX file or an engine, {path} is {what}" in capsys.readouterr().err  # fmt: skip


def test_images_that_cannot_be_read_are_named(tiny_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(IMAGES / "shapes_val_000.png", folder)
    (folder / "bad.png").write_bytes(b"no picture")
    output = tmp_path / "out.json"
    arguments = [
        "--reference",
        tiny_onnx,
        "--candidate",
        tiny_onnx,
        "--input",
        folder,
        "--json",
        output,
        "--tensor_images",
        0,
    ]
    assert compare.main([str(a) for a in arguments]) == 3
    summary = json.loads(output.read_text())
    assert (summary["images"], summary["skipped"], summary["tensors"]) == (1, ["bad.png"], [])
    assert summary["ap"] is None


def test_engines_are_compared_by_their_detections(
    rig: Callable[..., Rig], engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in engine against a copy of it: everything matches, and there are no tensors to
    see.
    """
    rig()
    twin = write_engine(tmp_path / "twin.engine")
    output = tmp_path / "out.json"
    arguments = [
        "--reference",
        engine,
        "--candidate",
        twin,
        "--input",
        IMAGES,
        "--min_score",
        0.001,
        "--json",
        output,
    ]
    assert compare.main([str(a) for a in arguments]) == 0
    summary = json.loads(output.read_text())
    found = summary["detections"]
    assert found["reference"] == found["candidate"] == found["matched"] > 0
    assert summary["tensors"] == [] and [c["metric"] for c in summary["limits"]] == [
        "missing", "extra", "class_flips", "score_diff", "box_diff"
    ]  # fmt: skip
    assert "no tensors to compare" in capsys.readouterr().err


# ---- FP16 and BF16 on a CPU


@pytest.mark.parametrize(("kind", "one", "large"), [("float16", 0x3C00, 0x7400), ("bfloat16", 0x3F80, 0x4680)])  # fmt: skip
def test_emulated_types_round_and_overflow_between_operators(kind: str, one: int, large: int) -> None:  # fmt: skip
    """By itself ONNX Runtime computes 1 + 2^-12 - 1 = 2^-12 and 30 * 2^14 / 2^14 = 30 for FP16 on a
    CPU.

    Args:
        one, large: 1 and 2^14 as bits, which ONNX's text form takes for these types.
    """
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        narrow (float[N] x) => (float[N] y, {kind}[N] scaled)
          <{kind} one = {{{one}}}, {kind} large = {{{large}}}>
        {{
          low = Cast<to = {TensorProto.DataType.Value(kind.upper())}>(x)
          sum = Add(low, one)
          less = Sub(sum, one)
          scaled = Mul(less, large)
          back = Div(scaled, large)
          y = Cast<to = 1>(back)
        }}
    """)
    emulated = emulate(model)
    part = GraphPart(emulated, {"x": TensorProto.FLOAT}, ["y", "scaled"])
    x = np.float32([0.25, 2**-12, 30, 0])
    y, scaled = part.run(["y", "scaled"], {"x": x})
    if kind == "float16":
        assert y.tolist() == [0.25, 0, np.inf, 0] and scaled.tolist() == [4096, 0, np.inf, 0]
    else:  # 8 bits, the range of float32
        assert y.tolist() == [0.25, 0, 30, 0] and scaled.tolist() == [4096, 0, 491520, 0]
    assert {t.data_type for t in emulated.graph.initializer} == {TensorProto.FLOAT}
    assert {i.type.tensor_type.elem_type for i in emulated.graph.output} == {TensorProto.FLOAT}


# ---- the arithmetic


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """x1, y1, x2, y2, score, category."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int32))


A, B = (0, 0, 10, 10), (20, 0, 30, 10)
FLAT = (0, 0, 0, 10)  # a box beyond the left edge, after clipping

MATCHES = [
    # what it is, reference, candidate, (pairs, flips, missing, extra)
    ("the same in another order", [(*A, 0.9, 1), (*B, 0.8, 1)], [(*B, 0.8, 1), (*A, 0.9, 1)], ([[0, 1], [1, 0]], [], [], [])),
    ("other class", [(*A, 0.9, 1)], [(*A, 0.9, 2)], ([], [[0, 0]], [], [])),
    ("missing and extra", [(*A, 0.9, 1)], [(*B, 0.9, 1)], ([], [], [0], [0])),
    ("sank below the threshold", [(*A, 0.31, 1)], [(*A, 0.29, 1)], ([[0, 0]], [], [], [])),
    ("rose above it", [(*A, 0.29, 1)], [(*A, 0.31, 1)], ([[0, 0]], [], [], [])),
    ("both below count for nothing", [(*A, 0.29, 1)], [(*B, 0.2, 1)], ([], [], [], [])),
    ("a faint one of another class is no flip", [(*A, 0.9, 1)], [(*A, 0.1, 2)], ([], [], [0], [])),
    ("the right class first", [(*A, 0.9, 1)], [(*A, 0.9, 2), (*A, 0.5, 1)], ([[0, 1]], [], [], [0])),
    ("score decides between equal boxes", [(*A, 0.9, 1)], [(*A, 0.4, 1), (*A, 0.8, 1)], ([[0, 1]], [], [], [0])),
    ("no area, the same place", [(*FLAT, 0.9, 1)], [(0, 0, 0.4, 10.3, 0.9, 1)], ([[0, 0]], [], [], [])),
    ("no area, another place", [(*FLAT, 0.9, 1)], [(0, 0, 0, 11.5, 0.9, 1)], ([], [], [0], [0])),
    ("nothing at all", [], [], ([], [], [], [])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "candidate", "want"), [row[1:] for row in MATCHES], ids=[row[0] for row in MATCHES]
)  # fmt: skip
def test_matching(reference: list[Any], candidate: list[Any], want: tuple[Any, ...]) -> None:
    found = match(detections(*reference), detections(*candidate), min_iou=0.5, score_threshold=0.3)
    pairs, flips, missing, extra = want
    assert sorted(found.pairs.tolist()) == pairs
    assert found.flips.tolist() == flips
    assert (found.missing.tolist(), found.extra.tolist()) == (missing, extra)


def rotated(box: tuple[float, ...], angle: float) -> Detections:
    return dataclasses.replace(detections((*box, 0.9, 1)), angles=np.float32([angle]))  # type: ignore[arg-type]


LONG = (0, 40, 100, 60)
TURNS = [
    # what it is, box, the reference's angle, the candidate's, the difference; None: no pair
    ("a little", LONG, 0.3, 0.35, 0.05),
    ("across half a turn", LONG, 1.55, -1.56, math.pi - 3.11),
    ("a quarter is another box", LONG, 0.0, math.pi / 2, None),
    ("a quarter of a square", (0, 0, 50, 50), 0.1, 0.1 + math.pi / 2, 0.0),
    ("no area", (0, 0, 0, 50), 0.1, 0.2, 0.1),
]


@pytest.mark.parametrize(("box", "left", "right", "want"), [row[1:] for row in TURNS], ids=[row[0] for row in TURNS])  # fmt: skip
def test_rotated_boxes(box: tuple[float, ...], left: float, right: float, want: float | None) -> None:  # fmt: skip
    reference, candidate = rotated(box, left), rotated(box, right)
    matching = match(reference, candidate, min_iou=0.5, score_threshold=0.1)
    image = ImageComparison(Path("a.png"), reference, candidate, matching, (1.0, 1.0))
    assert image.angle_differences.tolist() == ([] if want is None else pytest.approx([want], abs=1e-6))  # fmt: skip
    limits = Limits(max_angle_diff=0.04)
    spec = ModelSpec("toy", Preprocessing((8, 8)), Nms(), (1,))
    side = SideInfo("m", "toy", spec)
    broken_options = [c.option for c in Comparison(side, side, (image,), limits, 0.1, 0.5).broken]
    beyond = ["--max_missing", "--max_extra"] if want is None else ["--max_angle_diff"]
    assert broken_options == (beyond if want is None or want > 0.04 else [])


def test_tensor_statistics_over_images_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(3, 4, BLOCK)).astype(np.float32)
    right = left + rng.normal(scale=0.01, size=left.shape).astype(np.float32)
    statistics = TensorStatistics("x", head=True)
    for a, b in zip(left, right, strict=True):
        statistics.add(a, b)
    got = statistics.result()
    a, b = left.ravel().astype(np.float64), right.ravel().astype(np.float64)
    assert got.maximum == pytest.approx(np.abs(a - b).max())
    assert got.mean == pytest.approx(np.abs(a - b).mean())
    assert got.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert got.sqnr_db == pytest.approx(20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b)))
    assert got.head and not got.equal


def test_tensor_statistics_at_their_edges() -> None:
    def of(reference: list[float], candidate: list[float]) -> TensorDifference:
        statistics = TensorStatistics("x")
        statistics.add(np.array(reference, np.float32), np.array(candidate, np.float32))
        return statistics.result()

    equal = of([0, 0], [0, 0])
    assert equal.equal and equal.cosine == 1 and equal.sqnr_db == math.inf
    assert equal.to_dict()["sqnr_db"] is None  # JSON has no infinity
    lost = of([1, 2], [0, 0])
    assert math.isnan(lost.cosine) and lost.sqnr_db == pytest.approx(0)
    overflow = of([1, 2, np.inf, 4], [1, np.nan, np.inf, np.inf])
    assert (overflow.non_finite, overflow.maximum, overflow.equal) == (2, 0, False)
    late = of([0] * BLOCK + [1, 2], [0] * BLOCK + [np.nan, 3])
    assert (late.non_finite, late.maximum) == (1, 1)
    assert late.mean == pytest.approx(1 / (BLOCK + 1))
    other = of([1, 2], [1, 2, 3])
    assert other.shapes == ((2,), (3,)) and math.isnan(other.cosine)
    ranked = worst_first([equal, lost, overflow, other])
    assert ranked == [other, overflow, lost, equal]


def test_groups_of_tensors_fill_the_memory_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_compare, "GROUP_BYTES", 100)
    monkeypatch.setattr(parity_compare, "FIRST_GROUP", 4)
    names = list("abcdefgh")
    sizes: dict[str, int] = {}
    assert parity_compare.next_group(names, sizes) == list("abcd")
    sizes = dict.fromkeys("abcd", 20)
    assert parity_compare.next_group(list("efgh"), sizes) == list("efgh")
    sizes |= {"e": 90, "f": 10, "g": 101, "h": 0}
    groups, rest = [], names
    while rest:
        groups.append(parity_compare.next_group(rest, sizes))
        rest = rest[len(groups[-1]) :]
    assert groups == [list("abcd"), list("ef"), ["g"], ["h"]]


def test_nan_breaks_a_limit_and_bounds_count_as_within() -> None:
    assert not Check("x", "x", "--x", math.nan, 0.5, at_least=True).passed
    assert not Check("x", "x", "--x", math.nan, 0.5).passed
    assert Check("x", "x", "--x", 0.5, 0.5).passed
    line = Check("missing detections", "missing", "--max_missing", 0.125, 0.01, unit="%").line()
    assert line == "missing detections: 12.5 %, expected at most 1 % (--max_missing)"


def test_heads_of_other_shapes_break_the_cosine() -> None:
    spec = ModelSpec("toy", Preprocessing((8, 8)), Nms(), (1,))
    side = SideInfo("m", "toy", spec)
    tensor = TensorDifference("class_logits", head=True, shapes=((4, 3), (4, 90)))
    comparison = Comparison(side, side, (), Limits(), 0.1, 0.5, tensors=(tensor,))
    (check,) = comparison.broken
    assert check.line() == "cosine of class_logits (shapes (4, 3) and (4, 90)): undefined, expected at least 0.999000 (--min_cosine)"  # fmt: skip


def test_differences_of_boxes_are_in_pixels_of_the_network() -> None:
    left, right = detections((0, 0, 100, 100, 0.9, 1)), detections((4, 0, 100, 98, 0.8, 1))
    matching = match(left, right, min_iou=0.5, score_threshold=0.1)
    image = ImageComparison(Path("a.png"), left, right, matching, scale_xy=(0.5, 2.0))
    assert image.box_differences.tolist() == [
        4.0
    ]  # 2 px of height twice as large, not 4 px of width half as large
    assert image.score_differences.tolist() == pytest.approx([-0.1])


def test_categories_beyond_the_model_are_none() -> None:
    spec = ModelSpec("toy", Preprocessing((8, 8)), Nms(), (10, 20))
    found = by_category(detections((*A, 0.9, 0), (*A, 0.8, 1), (*A, 0.7, 2)), spec)
    assert found.class_ids.tolist() == [10, 20, -1]
