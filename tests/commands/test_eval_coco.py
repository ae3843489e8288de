# SPDX-License-Identifier: Apache-2.0


import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import toy_detector
from toy_detector import image

from trtdet.commands import eval_coco
from trtdet.results import coco
from trtdet.run import evaluate

pytest.importorskip("pycocotools")

BOX = [4.0, 2.0, 16.0, 8.0]  # the toy detector's first box in a 48 x 32 image, x y w h


def write_annotations(
    path: Path,
    images: dict[int, str],
    objects: list[tuple[int, int, list[float]]],
    categories: tuple[int, ...] = toy_detector.CATEGORY_IDS,
) -> Path:
    """COCO annotations as small tools write them: no area, no iscrowd, ids from 0.

    Args:
        objects: (image id, category id, box x y w h).
    """
    data = {
        "images": [{"id": id_, "file_name": name} for id_, name in images.items()],
        "annotations": [
            {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box}
            for number, (image_id, category_id, box) in enumerate(objects)
        ],
        "categories": [{"id": id_, "name": f"name {id_}"} for id_ in categories],
    }
    path.write_text(json.dumps(data))
    return path


def result(
    image_id: int, box: list[float], score: float = 0.9, category_id: int = 10
) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


# ---- the metric


def test_all_found_is_1(tmp_path: Path) -> None:
    path = write_annotations(
        tmp_path / "a.json", {1: "1.png", 2: "2.png"}, [(1, 10, BOX), (2, 20, BOX)]
    )
    found = [result(1, BOX), result(2, BOX, category_id=20)]
    metrics = coco.evaluate(coco.read_annotations(path), found, [1, 2]).metrics
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["APs"] == pytest.approx(1)
    assert metrics["AR1"] == pytest.approx(1)
    assert metrics["APl"] == -1  # there is no large object
    assert list(metrics) == [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR100",
        "ARs",
        "ARm",
        "ARl",
    ]


def test_images_without_detections_count(tmp_path: Path) -> None:
    # One of four objects found: precision 1 up to recall 0.25, the points 0, 0.01, ..., 0.25 of
    # 101. AutoML's metric says 1.0.
    path = write_annotations(
        tmp_path / "a.json", {n: f"{n}.png" for n in range(4)}, [(n, 10, BOX) for n in range(4)]
    )
    evaluation = coco.evaluate(coco.read_annotations(path), [result(2, BOX)], range(4))
    assert evaluation.metrics["AP"] == pytest.approx(26 / 101)
    assert evaluation.metrics["AR100"] == pytest.approx(0.25)
    assert evaluation.precision.shape == (10, 101)
    np.testing.assert_allclose(evaluation.precision[0], [1.0] * 26 + [0.0] * 75)


def test_no_detections_are_zeros(tmp_path: Path) -> None:
    path = write_annotations(tmp_path / "a.json", {1: "1.png"}, [(1, 10, BOX)])
    metrics = coco.evaluate(coco.read_annotations(path), [], [1]).metrics
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0


def test_no_objects_are_no_figure(tmp_path: Path) -> None:
    path = write_annotations(tmp_path / "a.json", {1: "1.png"}, [])
    evaluation = coco.evaluate(coco.read_annotations(path), [result(1, BOX)], [1])
    assert set(evaluation.metrics.values()) == {-1.0}
    assert evaluation.precision.max() == 0
    assert coco.metrics_table(evaluation.metrics).splitlines()[0].split()[:2] == ["AP", "none"]


def test_only_the_images_looked_at_count(tmp_path: Path) -> None:
    path = write_annotations(
        tmp_path / "a.json", {1: "1.png", 2: "2.png"}, [(1, 10, BOX), (2, 10, BOX)]
    )
    found = [result(1, BOX), result(2, [0, 0, 1, 1], score=1.0)]
    metrics = coco.evaluate(coco.read_annotations(path), found, [1]).metrics
    assert metrics["AP"] == pytest.approx(1)


def test_iou_decides(tmp_path: Path) -> None:
    # 16 x 8 against 16 x 6 inside it: IoU 0.75, so right at 0.50 to 0.75, 6 of 10 thresholds.
    path = write_annotations(tmp_path / "a.json", {1: "1.png"}, [(1, 10, BOX)])
    evaluation = coco.evaluate(coco.read_annotations(path), [result(1, [4, 2, 16, 6])], [1])
    assert evaluation.metrics["AP"] == pytest.approx(0.6)
    assert evaluation.metrics["AP75"] == pytest.approx(1)
    assert evaluation.precision.mean(axis=1).tolist() == pytest.approx([1] * 6 + [0] * 4)


@pytest.mark.parametrize(
    ("name", "ap", "ap50"),
    [("person_val100", 0.32187, 0.61858), ("shapes_val", 0.77852, 0.94235)],
)
def test_figures_are_those_of_pycocotools(shared: Path, name: str, ap: float, ap50: float) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth_path = shared / "images" / f"{name}.json"
    found_path = shared / "reference" / f"tf_{name}.json"
    annotations = coco.read_annotations(truth_path)
    found = coco.read_results(found_path, annotations)
    metrics = coco.evaluate(annotations, found, annotations.image_ids.values()).metrics
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_path))
        plain = COCOeval(truth, truth.loadRes(str(found_path)), "bbox")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    np.testing.assert_allclose(list(metrics.values()), plain.stats, rtol=0, atol=1e-12)
    assert metrics["AP"] == pytest.approx(ap, abs=5e-6)
    assert metrics["AP50"] == pytest.approx(ap50, abs=5e-6)


# ---- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object, found a list of 0; give COCO annotations"),
        ('{"images": [], "annotations": []}', "expected 'categories'"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\]: expected 'file_name'",
        ),
        (
            '{"images": [], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}], "categories": []}',
            r"annotations\[0\]: bbox: expected four numbers, or five with an angle, found 3",
        ),
        (
            '{"images": [], "annotations": [{"image_id": [1], "category_id": 1, "bbox": [1, 2, 3, 4]}], "categories": []}',
            r"annotations\[0\].image_id: expected a number or text, found a list of 1",
        ),
        (
            '{"images": [{"id": 1, "file_name": 7}], "annotations": [], "categories": []}',
            r"images\[0\].file_name: expected text, found 7",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "annotations": [], "categories": []}',
            "every one once, found 2 with the file_name 'a'",
        ),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        coco.read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "give COCO results, a JSON list of detections"),
        ('[{"image_id": 1, "category_id": 1, "score": 1}]', r"\[0\]: expected 'bbox'"),
        (
            '[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [1, 2]}]',
            r"\[0\]: bbox: expected four numbers.*found 2",
        ),
        (
            '[{"image_id": [1], "category_id": 1, "score": 1, "bbox": [1, 2, 3, 4]}]',
            r"\[0\].image_id: expected",
        ),
        (
            '[{"image_id": 1, "category_id": 1, "score": NaN, "bbox": [1, 2, 3, 4]}]',
            r"\[0\]: score: .*found nan",
        ),
    ],
)
def test_results_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    annotations = coco.read_annotations(write_annotations(tmp_path / "a.json", {}, []))
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.json: .*{message}"):
        coco.read_results(tmp_path / "r.json", annotations)


@pytest.mark.parametrize(
    ("file_name", "paths", "expected"),
    [
        ("1.png", ["1.png"], {"1.png": 7}),
        ("val/1.png", ["1.png"], {"1.png": 7}),  # the annotation file knows a folder above
        ("1.png", ["val/1.png"], {"val/1.png": 7}),  # --recursive found it below
        ("b/1.png", ["a/1.png", "b/1.png"], {"b/1.png": 7}),
        ("1.png", ["a/1.png", "b/1.png"], {}),  # which of the two?
        ("1.png", ["1.jpg"], {}),
    ],
)
def test_match_images(
    tmp_path: Path, file_name: str, paths: list[str], expected: dict[str, int]
) -> None:
    annotations = coco.read_annotations(write_annotations(tmp_path / "a.json", {7: file_name}, []))
    found = coco.match_images(annotations, [tmp_path / path for path in paths], tmp_path)
    assert found == {tmp_path / path: id_ for path, id_ in expected.items()}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["000000000139.jpg", "285.jpg"], [139, 285]),
        (["1.jpg", "b.jpg"], ["1.jpg", "b.jpg"]),
        (["1.jpg", "01.jpg"], ["1.jpg", "01.jpg"]),  # the same number twice
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["\u00b2.jpg"], ["\u00b2.jpg"]),  # a digit to Python, not a number
    ],
)
def test_name_images(paths: list[str], expected: list[int | str]) -> None:
    root = Path("photos")
    assert list(coco.name_images([root / path for path in paths], root).values()) == expected


# ---- the script


@pytest.fixture
def case(tmp_path: Path) -> list[str]:
    """Three images of which the detector finds the first two objects; options of the script."""
    source = tmp_path / "in"
    image(source / "x.png", red=204, green=1, blue=0)
    image(source / "y.png", red=102, green=1, blue=1)
    image(source / "z.png", red=0, green=0, blue=0)
    annotations = write_annotations(
        tmp_path / "a.json",
        {1: "x.png", 2: "y.png", 3: "z.png"},
        [(1, 10, BOX), (2, 20, BOX), (3, 10, BOX)],
    )
    engine = toy_detector.save(tmp_path / "toy.onnx")
    return ["--engine", str(engine), "--input", str(source), "--annotations", str(annotations)]


def metrics_of(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_metrics_file_and_table(case: list[str], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "metrics.json"
    assert eval_coco.main([*case, "--json", str(output)]) == 0
    metrics = metrics_of(output)
    assert metrics["schema"] == 1
    # Category 10: one of two found, 51 of 101 points; 20: found; 30: no object, not counted.
    assert metrics["AP"] == pytest.approx((51 / 101 + 1) / 2)
    assert metrics["AP50"] == metrics["AP75"] == metrics["AP"]
    assert metrics["APl"] == -1
    assert metrics["images"] == 3
    assert metrics["seconds"] > 0
    assert metrics["engine"] == "toy.onnx"
    assert metrics["runtime"].startswith("ONNX Runtime")
    assert metrics["score_threshold"] == 0.001
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 images, 2 detections"
    assert lines[1].split()[:2] == ["AP", "0.7525"]
    assert [line.split()[0] for line in lines[1:]] == list(coco.METRICS)


def test_detections_can_be_kept_and_evaluated_again(case: list[str], tmp_path: Path) -> None:
    first, second, kept = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "found.json"
    assert eval_coco.main([*case, "--detections", str(kept), "--json", str(first)]) == 0
    assert json.loads(kept.read_text()) == [result(1, BOX, 0.8), result(2, BOX, 0.4, 20)]
    argv = ["--annotations", str(tmp_path / "a.json"), "--detections", str(kept)]
    assert eval_coco.main([*argv, "--json", str(second)]) == 0
    for name in coco.METRICS:
        assert metrics_of(second)[name] == metrics_of(first)[name]
    assert metrics_of(second)["detections"] == "found.json"


def test_detections_by_file_name_are_understood(case: list[str], tmp_path: Path) -> None:
    # What infer.py writes without --annotations.
    kept = tmp_path / "found.json"
    kept.write_text(json.dumps([{**result(0, BOX), "image_id": "x.png"}]))
    argv = ["--annotations", str(tmp_path / "a.json"), "--detections", str(kept)]
    assert eval_coco.main([*argv, "--json", str(tmp_path / "m.json")]) == 0
    assert metrics_of(tmp_path / "m.json")["AP"] == pytest.approx((51 / 101 + 0) / 2)


def test_detections_of_a_part_or_of_high_scores_are_warned_of(
    case: list[str], tmp_path: Path, capsys: Any
) -> None:
    kept, annotations = tmp_path / "d.json", case[case.index("--annotations") + 1]
    assert eval_coco.main([*case, "--detections", str(kept)]) == 0
    found = json.loads(kept.read_text())
    capsys.readouterr()
    best = max(found, key=lambda row: row["score"])
    kept.write_text(json.dumps([{**best, "score": 0.9}]))
    assert eval_coco.main(["--detections", str(kept), "--annotations", annotations]) == 0
    log = capsys.readouterr().err
    images = len(json.loads(Path(annotations).read_text())["images"])
    assert "has no detection below a score of 0.9, so AP comes out too low" in log
    assert f"has no detections for {images - 1} of {images} images" in log
    # As many as count: that there is none below says nothing of a threshold.
    for number, warned in ((99, True), (100, False)):
        kept.write_text(json.dumps([{**best, "score": 0.9}] * number))
        assert eval_coco.main(["--detections", str(kept), "--annotations", annotations]) == 0
        assert ("no detection below a score" in capsys.readouterr().err) == warned


def test_detections_of_strange_images_are_left_out(
    case: list[str], tmp_path: Path, capsys: Any
) -> None:
    kept = tmp_path / "found.json"
    kept.write_text(json.dumps([result(1, BOX), result(99, BOX)]))
    argv = ["--annotations", str(tmp_path / "a.json"), "--detections", str(kept)]
    assert eval_coco.main(argv) == 0
    assert "left out 1 images that are not evaluated (99)" in capsys.readouterr().err


def test_detections_of_strange_images_alone_are_an_error(tmp_path: Path, capsys: Any) -> None:
    """AP 0 would be the wrong answer."""
    annotations = write_annotations(tmp_path / "a.json", {1: "x.png"}, [(1, 10, BOX)])
    kept = tmp_path / "found.json"
    kept.write_text(json.dumps([{**result(1, BOX), "image_id": "2"}]))
    argv = ["--annotations", str(annotations), "--detections", str(kept)]
    assert eval_coco.main(argv) == 1
    assert "none of the image ids" in capsys.readouterr().err


@pytest.mark.parametrize("image_id", ["1", 1.0, "x.png"])
def test_an_image_id_may_be_text_or_a_float_or_the_name(tmp_path: Path, image_id: Any) -> None:
    path = write_annotations(tmp_path / "a.json", {1: "x.png"}, [(1, 10, BOX)])
    (tmp_path / "r.json").write_text(json.dumps([{**result(1, BOX), "image_id": image_id}]))
    annotations = coco.read_annotations(path)
    (found,) = coco.read_results(tmp_path / "r.json", annotations)
    assert found["image_id"] == 1 and isinstance(found["image_id"], int)
    assert coco.evaluate(annotations, [found], [1]).metrics["AP"] == pytest.approx(1.0)


def test_numbers_as_names_that_are_not_the_ids_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    annotations = write_annotations(
        tmp_path / "a.json", {1: "000.png", 2: "001.png"}, [(1, 10, BOX)]
    )
    kept = tmp_path / "found.json"
    kept.write_text(json.dumps([result(1, BOX)]))
    assert eval_coco.main(["--annotations", str(annotations), "--detections", str(kept)]) == 0
    assert "run it again with --annotations" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--detections"])
def test_inputs_are_not_overwritten(
    case: list[str], tmp_path: Path, option: str, capsys: Any
) -> None:
    before = (tmp_path / "a.json").read_text()
    assert eval_coco.main([*case, option, str(tmp_path / "in" / ".." / "a.json")]) == 1
    assert "is an input" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == before


def test_nothing_found_is_zero(case: list[str], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "metrics.json"
    assert eval_coco.main([*case, "--score_threshold", "0.99", "--json", str(output)]) == 0
    assert metrics_of(output)["AP"] == 0
    log = capsys.readouterr().err
    assert "no detections at all" in log
    assert "AP comes out too low" in log


def test_missing_and_strange_images_are_counted(
    case: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "in" / "z.png").unlink()
    image(tmp_path / "in" / "stranger.png", red=255, green=4, blue=0)
    output = tmp_path / "metrics.json"
    assert eval_coco.main([*case, "--json", str(output)]) == 0
    assert metrics_of(output)["images"] == 2
    assert metrics_of(output)["AP"] == pytest.approx(1)
    log = capsys.readouterr().err
    assert "1 annotated images are not in" in log
    assert "1 images have no annotations: not run" in log


def test_an_unreadable_image_counts_as_missed(case: list[str], tmp_path: Path) -> None:
    (tmp_path / "in" / "y.png").write_bytes(b"broken")
    output = tmp_path / "metrics.json"
    assert eval_coco.main([*case, "--json", str(output)]) == 3
    assert metrics_of(output)["images"] == 3
    assert metrics_of(output)["AP"] == pytest.approx((51 / 101 + 0) / 2)


def test_unknown_categories_are_named(case: list[str], tmp_path: Path, capsys: Any) -> None:
    images = {1: "x.png"}
    write_annotations(tmp_path / "a.json", images, [(1, 10, BOX)], categories=(10, 77))
    assert eval_coco.main(case) == 0
    assert (
        "categories that the model does not know, all objects missed: 77 (name 77)"
        in capsys.readouterr().err
    )
    write_annotations(tmp_path / "a.json", images, [(1, 1, BOX)], categories=(1, 2))
    assert eval_coco.main(case) == 1
    err = capsys.readouterr().err
    assert "expected categories of the model (10, 20, 30)" in err
    assert "has 1, 2" in err


def test_annotations_of_other_images_are_an_error(
    case: list[str], tmp_path: Path, capsys: Any
) -> None:
    write_annotations(tmp_path / "a.json", {1: "other.png"}, [(1, 10, BOX)])
    assert eval_coco.main(case) == 1
    assert "names none of the 3 images" in capsys.readouterr().err


def test_a_high_threshold_is_warned_of(case: list[str], tmp_path: Path, capsys: Any) -> None:
    assert eval_coco.main(case) == 0
    assert "too low" not in capsys.readouterr().err
    toy_detector.save(tmp_path / "toy.onnx", score_threshold=0.4)
    assert eval_coco.main(case) == 0
    assert (
        "detections below a score of 0.4 are missing, so AP comes out too low"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--annotations", "a.json"], "--model is required"),
        (["--annotations", "a.json", "--engine", "m"], "--model needs --input"),
        (["--engine", "m", "--input", "i"], "--annotations"),
    ],
)
def test_usage(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        eval_coco.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_plot(case: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "deep" / "pr.png"
    assert eval_coco.main([*case, "--plot", str(plot)]) == 0
    picture = cv2.imread(str(plot))
    assert picture.shape[0] > 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # ten curves in their colours


# ---- AutoML's metric

STANDIN_COCO_METRIC = '''
import numpy as np

class EvaluationMetric:
    """A stand-in for google/automl's: the same interface; its "figures" are what it was given."""

    def __init__(self, filename):
        self.rows = []

    def update_state(self, groundtruth, detections):
        assert groundtruth is None and detections.ndim == 3
        self.rows.extend(detections[0])

    def result(self, log_level):
        print("chatter")
        return np.concatenate([self.rows[1], [len(self.rows)], np.zeros(4)])
'''


def test_automl_metric_gets_every_detection(
    case: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "automl"
    (checkout / "efficientdet").mkdir(parents=True)
    (checkout / "efficientdet" / "coco_metric.py").write_text(STANDIN_COCO_METRIC)
    monkeypatch.delitem(sys.modules, "coco_metric", raising=False)
    output, before = tmp_path / "m.json", list(sys.path)
    assert eval_coco.main([*case, "--automl_path", str(checkout), "--json", str(output)]) == 0
    assert sys.path == before
    given = list(metrics_of(output)["automl"].values())
    # image_id, x, y, w, h, score, category_id of the second detection, then how many there were
    assert given[:8] == pytest.approx([2, *BOX, 0.4, 20, 2])
    out = capsys.readouterr().out
    assert "looks only at images that have detections" in out
    assert "chatter" not in out


def test_automl_metric_that_is_not_there(case: list[str], tmp_path: Path, capsys: Any) -> None:
    sys.modules.pop("coco_metric", None)
    assert eval_coco.main([*case, "--automl_path", str(tmp_path)]) == 1
    assert "clone https://github.com/google/automl" in capsys.readouterr().err
    (tmp_path / "efficientdet").mkdir()
    (tmp_path / "efficientdet" / "coco_metric.py").write_text("import no_such_tensorflow\n")
    output, plot = tmp_path / "m.json", tmp_path / "pr.png"
    written = ["--json", str(output), "--plot", str(plot)]
    assert eval_coco.main([*case, "--automl_path", str(tmp_path), *written]) == 1
    assert "does not import (No module named 'no_such_tensorflow')" in capsys.readouterr().err
    # What was measured is kept.
    assert metrics_of(output)["AP"] > 0 and "automl" not in metrics_of(output)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_automl_metric_of_rotated_boxes_is_refused_before_the_model_runs(
    case: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "efficientdet").mkdir()
    (tmp_path / "efficientdet" / "coco_metric.py").write_text(STANDIN_COCO_METRIC)
    data = json.loads(Path(case[case.index("--annotations") + 1]).read_text())
    for entry in data["annotations"]:
        entry["bbox"] = [*entry["bbox"], 0.3]
    data["images"] = [entry | {"width": 48, "height": 32} for entry in data["images"]]
    Path(case[case.index("--annotations") + 1]).write_text(json.dumps(data))
    opened: list[Any] = []
    monkeypatch.setattr(evaluate, "open_model", lambda *model: opened.append(model))
    assert eval_coco.main([*case, "--automl_path", str(tmp_path)]) == 1
    assert "--automl_path: AutoML's metric knows no rotated boxes; leave it out" in capsys.readouterr().err  # fmt: skip
    assert opened == []


def test_images_are_looked_at_once_for_a_report(
    case: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their headers are read once, and what there is to say of them is said once."""
    source = Path(case[case.index("--input") + 1])
    image(source / "unknown.png", red=10, green=1, blue=0)
    read: list[str] = []
    size_of = evaluate.image_size
    monkeypatch.setattr(evaluate, "image_size", lambda path: read.append(path.name) or size_of(path))  # fmt: skip
    assert eval_coco.main([*case, "--report", str(tmp_path / "r.html")]) == 0
    assert len(read) == len(set(read)) > 1
    assert capsys.readouterr().err.count("1 images have no annotations: not run") == 1
    page = (tmp_path / "r.html").read_text()
    assert all(name in page for name in read) and "unknown.png" not in page
