"""Foreign exports of ../shared/cases/readings: right with no option, or with the options that
the refusal names; never silently wrong.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from trtdet.commands import create_onnx
from trtdet.geometry import box_iou
from trtdet.run.detect import detect, open_batcher, open_model
from trtdet.run.options import RunOptions
from trtdet.sources.base import run_onnx
from trtdet.spec import ModelSpec

#: Options that say how images come into a small network whose contract says nothing of them.
IMAGES = ["--preprocessor", "unit", "--resize_mode", "stretch"]


@pytest.fixture(scope="module")
def readings() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "cases" / "readings"
    if not path.is_dir():
        pytest.skip("needs ../shared/cases/readings, which is not here")
    return path


def convert(source: Path, out: Path, *options: str) -> int:
    return create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options])


def found_in(model: Path, paths: list[Path]) -> dict[str, list[tuple[float, int, np.ndarray]]]:
    """Detections of pictures: (score, class, box), best first."""
    found = {}
    with (
        open_model(model, RunOptions()) as runtime,
        open_batcher(runtime, paths, RunOptions()) as batcher,
    ):
        for image in detect(runtime, batcher, score_threshold=0.0):
            d = image.detections
            rows = zip(d.scores, d.class_ids, d.boxes_xyxy, strict=True)
            found[image.path.name] = [(float(s), int(c), b) for s, c, b in rows]
    return found


def matched(reference: dict, found: dict[str, list[tuple[float, int, np.ndarray]]]) -> float:
    """The share of reference detections that are found: class, score to .02, box to 1 pixel;
    each of ours counts once.
    """
    hits = total = 0
    for image in reference["images"]:
        limit = np.array([image["width"], image["height"]] * 2)
        free = list(found[image["file"]])
        for score, class_id, box in zip(
            image["scores"], image["classes"], image["boxes"], strict=True
        ):
            total += 1
            near = [
                one for one in free
                if one[1] == class_id and abs(one[0] - score) <= 0.02 and np.abs(one[2] - np.clip(box, 0, limit)).max() <= 1
            ]  # fmt: skip
            if near:
                hits += 1
                free = [one for one in free if one is not near[0]]
    return hits / total


@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("rtdetr", "rtdetr"),
        ("dfine", "rtdetr"),
        ("rfdetr", "rfdetr"),
        ("rfdetr_dets_labels", "rfdetr"),
        ("conditional_detr", "deformable_detr"),
        ("yolos_batch1", "detr"),
    ],
)
def test_the_frameworks_own_detections(
    readings: Path, tmp_path: Path, case: str, family: str
) -> None:
    reference = json.loads((readings / case / "reference.json").read_text())
    source = readings / case / "model.onnx"
    if case == "rfdetr_dets_labels":
        model = onnx.load(readings / "rfdetr" / "model.onnx")
        names = {"pred_boxes": "dets", "logits": "labels"}
        for node in model.graph.node:
            for tensors in (node.input, node.output):
                tensors[:] = [names.get(name, name) for name in tensors]
        for info in model.graph.output:
            info.name = names[info.name]
        source = tmp_path / "source.onnx"
        onnx.save(model, source)
    out = tmp_path / "out.onnx"
    assert convert(source, out) == 0
    assert ModelSpec.from_onnx(onnx.load(out)).family == family
    folder = readings.parents[1] / "images" / "person_val100"
    found = found_in(out, [folder / image["file"] for image in reference["images"]])
    assert matched(reference, found) >= 0.98


def picture(side: int) -> np.ndarray:
    """Noise of several scales, [1, 3, side, side], whole numbers of 0 to 255."""
    rng = np.random.default_rng(5)
    small = rng.integers(0, 256, (3, side // 16, side // 16))
    image = np.kron(small, np.ones((16, 16))) * 0.7 + rng.integers(0, 77, (3, side, side))
    return np.round(image)[None].astype(np.float32)


def selected(
    boxes: np.ndarray, scores: np.ndarray, *, iou: float, least: float
) -> list[tuple[float, int, np.ndarray]]:
    """(score, class, box) left by greedy NMS per class, best first."""
    kept: list[tuple[float, int, np.ndarray]] = []
    for c in range(scores.shape[1]):
        rows = np.flatnonzero(scores[:, c] >= least)
        rows = rows[np.argsort(-scores[rows, c], kind="stable")]
        mine: list[int] = []
        for i in rows:
            if all(box_iou(boxes[j : j + 1], boxes[i : i + 1])[0, 0] < iou for j in mine):
                mine.append(int(i))
        kept += [(float(scores[i, c]), c, boxes[i]) for i in mine]
    return sorted(kept, key=lambda one: -one[0])


def by_contract(
    case: str, model: onnx.ModelProto, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes x1 y1 x2 y2 and scores [A, C] as the name of the case says."""
    names = [info.name for info in model.graph.output]
    values = [v[0] for v in run_onnx(model, names, {model.graph.input[0].name: image / 255})]
    if case == "yolonas_boxes_scores":
        return values[0], values[1]
    if case == "paddle_scores_NCA":
        return values[0], values[1].T
    rows = values[0]
    scores = np.zeros((len(rows), 1 if case.endswith("one_class") else 20), np.float32)
    scores[np.arange(len(rows)), rows[:, 5].astype(int)] = rows[:, 4]
    return rows[:, :4], scores


@pytest.mark.parametrize(
    "case",
    ["yolonas_boxes_scores", "paddle_scores_NCA", "x1y1x2y2_score_label", "x1y1x2y2_score_label_one_class"],
)  # fmt: skip
def test_small_networks_of_their_contract(
    readings: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = readings / case / "model.onnx", tmp_path / "out.onnx"
    assert convert(source, out) == 1
    message = capsys.readouterr().err
    assert "nothing in the file says normalisation and resize" in message
    assert "--preprocessor" in message and "--resize_mode" in message
    assert not out.exists()
    assert convert(source, out, *IMAGES, "--input_format", "NCHW", "--score_threshold", "0.2") == 0
    model = onnx.load(out)
    spec = ModelSpec.from_onnx(model)
    image = picture(256)
    boxes, scores = by_contract(case, onnx.load(source), image)
    expected = selected(boxes, scores, iou=spec.nms.iou_threshold, least=0.2)[:300]
    from trtdet.nms import lowering
    from trtdet.spec import OUTPUT_NAMES

    fed = image.astype(spec.preprocessing.dtype)
    count, got_boxes, got_scores, got_classes = run_onnx(
        lowering.lower(model, "onnx"), OUTPUT_NAMES, {"input": fed}
    )
    n = int(count[0, 0])
    assert len(expected) >= 10
    assert n == len(expected)
    np.testing.assert_allclose(got_scores[0, :n], [one[0] for one in expected], atol=1e-4)
    free = list(zip(got_scores[0, :n], got_classes[0, :n], got_boxes[0, :n], strict=True))
    for score, class_id, box in expected:
        assert any(
            c == class_id and abs(s - score) < 1e-4 and np.abs(b - box).max() < 0.05
            for s, c, b in free
        )


def test_selected_detections(readings: Path, tmp_path: Path) -> None:
    """dets [N, 100, 5] and labels [N, 100]: the model's own rows come out, in its order."""
    source, out = readings / "mmdet_dets_labels" / "model.onnx", tmp_path / "out.onnx"
    assert convert(source, out, *IMAGES, "--input_format", "NCHW") == 0
    model, image = onnx.load(out), picture(256)
    spec = ModelSpec.from_onnx(model)
    assert (spec.selection, spec.num_classes, spec.nms.max_output_boxes) == ("topk", 20, 100)
    dets, labels = run_onnx(onnx.load(source), ["dets", "labels"], {"input": image / 255})
    fed = image.astype(spec.preprocessing.dtype)
    names = ["detection_boxes", "detection_scores", "detection_classes"]
    boxes, scores, classes = run_onnx(model, names, {"input": fed})
    np.testing.assert_allclose(scores[0], dets[0, :, 4], atol=1e-5)
    np.testing.assert_allclose(boxes[0], dets[0, :, :4], atol=0.05)
    assert classes[0].tolist() == labels[0].tolist()


def test_post_processing_in_the_export(
    readings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert convert(readings / "rtdetr_postprocessed" / "model.onnx", out) == 0
    assert "236 of 236 compared come out of our heads" in capsys.readouterr().out
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert (spec.family, spec.num_classes, spec.nms.max_output_boxes) == ("rtdetr", 20, 60)
    assert spec.preprocessing.std == (255.0,) * 3 and spec.nms.score_activation


def test_the_healthy_twin(
    readings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A uint8 input with /255 inside and dimensions of -1 give the detections of the same
    weights without; NaN is the source's.
    """
    folder = readings.parents[1] / "images" / "person_val100"
    paths = sorted(folder.glob("*.jpg"))[:3]
    found = {}
    for case in ("yolo_plain", "yolo_uint8_input", "yolo_minus_one_dims"):
        assert convert(readings / case / "model.onnx", tmp_path / f"{case}.onnx") == 0
        found[case] = found_in(tmp_path / f"{case}.onnx", paths)
    wanted = found.pop("yolo_plain")
    assert sum(map(len, wanted.values())) >= 100
    for other in found.values():
        for name, rows in wanted.items():
            assert len(rows) == len(other[name])
            np.testing.assert_allclose([r[0] for r in rows], [r[0] for r in other[name]], atol=1e-4)
    assert convert(readings / "yolo_nan_weight" / "model.onnx", tmp_path / "nan.onnx") == 1
    assert "the source itself yields NaN in 'output0'" in capsys.readouterr().err
    assert not (tmp_path / "nan.onnx").exists()


def test_raw_heads_are_refused_with_what_they_are(
    readings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(readings / "effdet_raw_heads" / "model.onnx", tmp_path / "out.onnx") == 1
    message = capsys.readouterr().err
    assert "c3, c4, c5" in message and "--family FILE.py" in message


def test_weights_are_named(tmp_path: Path, readings: Path) -> None:
    from trtdet.families.outputs import maybe_broken_weight

    model = onnx.load(readings / "yolo_nan_weight" / "model.onnx")
    name = maybe_broken_weight(model)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert name is not None and np.isnan(values[name]).any()
    assert maybe_broken_weight(onnx.load(readings / "yolo_plain" / "model.onnx")) is None
