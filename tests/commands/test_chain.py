# SPDX-License-Identifier: Apache-2.0
"""The scripts one after the other, as a user runs them, and the accuracy that comes out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES
from PIL import Image

from trtdet.commands import build_engine, create_onnx, eval_coco, infer
from trtdet.detections import read_tsv
from trtdet.engine.sidecar import read_sidecar
from trtdet.images.files import find_images, load_image
from trtdet.images.preprocess import preprocess
from trtdet.nms import lowering, reference
from trtdet.sources.base import run_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec

#: TensorFlow running the same weights with hard NMS, score threshold 0.001, pycocotools
#: (../shared/models/README.md).
TENSORFLOW = {
    "tiny_shapes": {"AP": 0.78165, "AP50": 0.96022},
    "d0_person": {"AP": 0.3205, "AP50": 0.6359},
}


def evaluate(model: Path, images: Path, annotations: Path, output: Path) -> dict[str, float]:
    arguments = [
        "--engine",
        model,
        "--input",
        images,
        "--annotations",
        annotations,
        "--json",
        output,
    ]
    assert eval_coco.main([str(a) for a in arguments]) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def d0_onnx(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    path = tmp_path_factory.mktemp("d0") / "d0.onnx"
    assert (
        create_onnx.main(
            ["--saved_model", str(shared / "models" / "d0_person"), "--onnx", str(path)]
        )
        == 0
    )
    return path


def test_example_from_onnx_to_map(tiny_onnx: Path, tmp_path: Path) -> None:
    """Stages 3 and 4 on the example: as many pictures and TSVs as images, detections.json of the
    same boxes, mAP of its own.
    """
    found = tmp_path / "found"
    images = sorted((EXAMPLES / "images").iterdir())
    arguments = [
        "--engine",
        tiny_onnx,
        "--input",
        EXAMPLES / "images",
        "--output",
        found,
        "--score_threshold",
        "0.4",
    ]
    assert infer.main([str(a) for a in arguments]) == 0
    assert {p.name for p in found.iterdir()} == {
        "detections.json", "labels.txt", "manifest.json", *(f"{p.stem}.png" for p in images), *(f"{p.stem}.tsv" for p in images)
    }  # fmt: skip
    per_image = [read_tsv(found / f"{p.stem}.tsv") for p in images]
    results = json.loads((found / "detections.json").read_text())
    assert len(results) == sum(len(d) for d in per_image) > len(images)
    assert all(d.scores.min(initial=1) >= 0.4 for d in per_image)
    for path, detections in zip(images, per_image, strict=True):
        with Image.open(path) as image:
            limit = np.array([*image.size, *image.size])
        assert (detections.boxes_xyxy >= 0).all() and (detections.boxes_xyxy <= limit + 1e-3).all()
    metrics = evaluate(
        tiny_onnx, EXAMPLES / "images", EXAMPLES / "annotations.json", tmp_path / "metrics.json"
    )
    assert metrics["images"] == len(images)
    assert metrics["AP"] == pytest.approx(
        0.7987, abs=5e-4
    )  # measured 2026-11-21, ONNX Runtime 1.31


def test_tiny_model_scores_what_tensorflow_does(
    tiny_onnx: Path, shared: Path, tmp_path: Path
) -> None:
    images = shared / "images"
    metrics = evaluate(
        tiny_onnx, images / "shapes_val", images / "shapes_val.json", tmp_path / "m.json"
    )
    for name, value in TENSORFLOW["tiny_shapes"].items():
        assert metrics[name] == pytest.approx(value, abs=0.004)


@pytest.mark.slow
def test_d0_scores_what_tensorflow_does_and_fp16_what_fp32_does(
    d0_onnx: Path, shared: Path, tmp_path: Path
) -> None:
    half = tmp_path / "d0_fp16.onnx"
    assert (
        build_engine.main(["--onnx", str(d0_onnx), "--save_onnx", str(half), "--precision", "fp16"])
        == 0
    )
    images, annotations = (
        shared / "images" / "person_val100",
        shared / "images" / "person_val100.json",
    )
    fp32 = evaluate(d0_onnx, images, annotations, tmp_path / "fp32.json")
    fp16 = evaluate(half, images, annotations, tmp_path / "fp16.json")
    for name, value in TENSORFLOW["d0_person"].items():
        assert fp32[name] == pytest.approx(value, abs=0.003)
    assert fp16["AP"] == pytest.approx(fp32["AP"], abs=0.002)
    assert half.stat().st_size < 0.75 * d0_onnx.stat().st_size


@pytest.mark.slow
def test_forms_of_nms_equal_the_reference_on_d0(d0_onnx: Path, shared: Path) -> None:
    """Heads of six photographs, class agnostic as exported and per class: the same boxes, scores
    and classes in every slot.
    """
    model = onnx.load(d0_onnx)
    spec = ModelSpec.from_onnx(model)
    anchors = next(
        onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "nms/anchors"
    )
    node = next(n for n in model.graph.node if n.op_type == "EfficientNMS_TRT")
    paths = find_images(shared / "images" / "person_val100")[:6]
    images = np.stack([preprocess(load_image(p), spec.preprocessing)[0] for p in paths])
    boxes, logits = run_onnx(model, ["raw_boxes", "class_logits"], {"input": images})
    for class_agnostic in (True, False):
        settings = dataclasses.replace(spec.nms, class_agnostic=class_agnostic)
        next(a for a in node.attribute if a.name == "class_agnostic").i = int(class_agnostic)
        want = reference.reference(boxes, logits, settings, anchors)
        for form in ("onnx", "graph"):
            got = run_onnx(
                lowering.lower(model, form),
                OUTPUT_NAMES,
                {"raw_boxes": boxes, "class_logits": logits},
            )
            for name, value in zip(OUTPUT_NAMES, got, strict=True):
                np.testing.assert_allclose(
                    value, want[name], rtol=0, atol=1e-3, err_msg=f"{form} {name}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "d0"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", ["1", "1,2,4"])
def test_rtx_builds_the_real_models(
    model: str, precision: str, batch: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A real builder, for a card that is not here. What it made is read back from the plan."""
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    path = request.getfixturevalue(f"{model}_onnx")
    engine = tmp_path / "m.engine"
    arguments = [
        "--onnx",
        path,
        "--engine",
        engine,
        "--precision",
        precision,
        "--batch_size",
        batch,
    ]
    arguments += ["--flavor", "tensorrt_rtx", "--compute_capability", "8.9"]
    assert build_engine.main([str(a) for a in arguments]) == 0
    info = read_sidecar(engine)
    assert info is not None
    shares = info.layers
    assert (
        shares.get("FP16", 0) == 0
        if precision == "fp32"
        else shares["FP16"] > 0.7 * sum(shares.values())
    )
    assert engine.stat().st_size > 0.5 * onnx_weights_bytes(path) * (
        1 if precision == "fp32" else 0.5
    )


def onnx_weights_bytes(path: Path) -> int:
    return sum(onnx.numpy_helper.to_array(i).nbytes for i in onnx.load(path).graph.initializer)
