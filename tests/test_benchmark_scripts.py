# SPDX-License-Identifier: Apache-2.0
"""What the scripts in benchmarks/ say of the figures they measure; the figures themselves are
theirs to measure.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import against_tensorflow
import host_pipeline
import host_profile
import host_writing
import nms_time
import numpy as np
import plan_layers
import pytest
import trt_runtime
from trt_rig import Rig

from trtdet.nms import lowering
from trtdet.nms.reference import reference
from trtdet.run.options import RunOptions
from trtdet.sessions import open_session
from trtdet.spec import Nms, Preprocessing


@pytest.mark.parametrize(
    ("of_decode", "of_nvidia", "met"),
    [
        (0.75, None, [True]),
        (0.749, None, [False]),
        (0.9, 2.0, [True, True]),
        (0.9, 1.99, [True, False]),
    ],
)
def test_criteria_of_the_host_pipeline(
    of_decode: float, of_nvidia: float | None, met: list[bool]
) -> None:
    # The others are not what is asked for.
    report = {
        "of_decode": {"uint8 NHWC": of_decode, "float32 NHWC": 0.1},
        "of_nvidia": {} if of_nvidia is None else {"uint8 NHWC": of_nvidia, "float32 NHWC": 0.1},
    }
    checks = host_pipeline.criteria(report)
    assert list(checks.values()) == met
    assert [text for text in checks if "0.75 of decoding" in text]
    assert len([text for text in checks if "2.0 times NVIDIA" in text]) == (of_nvidia is not None)


@pytest.mark.parametrize(("rate", "status"), [(0.9, 0), (0.7, 1)])
def test_check_of_the_host_pipeline(
    rate: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def measure(folder: Path, args: Any, stack: Any) -> dict[str, Any]:
        rates = {"decode alone": 100.0, "uint8 NHWC": 100 * rate}
        return {"images_per_second": rates, "of_decode": {name: r / 100 for name, r in rates.items()}, "of_nvidia": {}}  # fmt: skip

    monkeypatch.setattr(host_pipeline, "measure", measure)
    assert host_pipeline.main(["--input", str(tmp_path), "--check"]) == status
    assert host_pipeline.main(["--input", str(tmp_path)]) == 0
    assert f"decoding alone: {'NO' if status else 'yes'}" in capsys.readouterr().out


def test_enqueue_times_come_with_their_ratio(rig: Callable[..., Rig], engine: Path) -> None:
    rig(schedule="early")
    found = trt_runtime.measure_enqueue(engine, 4, 20)
    assert found["graph_over_plain"] == found["graph_median_us"] / found["plain_median_us"] > 0


def test_rates_in_turn_are_compared_within_each_round() -> None:
    turns: list[str] = []
    # A machine that takes twice as long in the second round, and ten times in the first, which
    # warms up.
    slow = {0: 10, 1: 1, 2: 2}

    def candidate(name: str, ms: float) -> Callable[..., Any]:
        def run(images: Any) -> tuple[float, float]:
            turns.append(name)
            factor = slow[turns.count(name) - 1]
            return factor * ms * len(images) / 1000, ms * len(images) / 1000

        return run

    names = (against_tensorflow.TENSORFLOW, against_tensorflow.TRTDET, against_tensorflow.ALONE)
    candidates = {name: candidate(name, ms) for name, ms in zip(names, (90, 45, 40), strict=True)}
    found = against_tensorflow.in_turn(candidates, [Path("a.jpg")] * 5, rounds=2)
    assert turns == [*names[::-1], *names, *names[::-1]]
    assert {len(times) for times in found.values()} == {2}
    lines = against_tensorflow.report(found)
    assert lines[1].split()[1:3] == ["67.50", "ms"]  # the median of 45 and 90
    assert lines[-2:] == [
        "infer.py beside ONNX Runtime: 7.50 ms an image, 5.00 ms CPU",
        "rate of infer.py / TensorFlow: 2.00 (2.00 to 2.00 in 2 rounds)",
    ]


def photographs(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    host_pipeline.make_photographs(folder, count, (48, 64))
    return sorted(folder.iterdir())


def test_every_step_of_the_profile_is_there(tmp_path: Path) -> None:
    paths = photographs(tmp_path / "in", 6)
    before = [getattr(owner, name) for owner, name in host_profile.STEPS.values()]
    steps = host_profile.profile(paths, Preprocessing((32, 32), dtype="uint8"), 2, workers=2)
    assert [getattr(owner, name) for owner, name in host_profile.STEPS.values()] == before
    assert list(steps) == [*host_profile.STEPS, host_profile.REST]
    for name in host_profile.STEPS:
        assert steps[name].wall_us > 0 and steps[name].cpu_us > 0
    assert len(host_profile.lines(steps, steps, 2)) == 2 + len(steps)


def test_the_parts_around_a_stand_in_engine_write_what_they_should(tmp_path: Path) -> None:
    paths = photographs(tmp_path / "in", 3)
    (tmp_path / "links").mkdir()
    links = host_writing.unlike_names(paths, tmp_path / "links", 5)
    engine = host_writing.StandInEngine(Preprocessing((32, 32), dtype="uint8"), boxes=7)
    for name, image_format in host_writing.WRITTEN.items():
        out = tmp_path / name
        host_writing.detect_files(engine, links, out, image_format, RunOptions(batch_size=2))
        assert len(list(out.glob("*.tsv"))) == 5
        assert {path.suffix for path in out.iterdir()} - {".tsv", ".json"} == ({f".{image_format}"} if image_format else set())  # fmt: skip
        rows = (out / "00000.tsv").read_text().splitlines()
        assert len(rows) == 100
        assert sum(float(row.split("\t")[4]) >= 0.3 for row in rows) == 7


def test_plans_of_a_graph_and_of_the_same_graph(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    model = str(tiny_onnx)
    argv = ["--onnx", model, "--sample_onnx", model, "--json", str(tmp_path / "plans.json")]
    assert plan_layers.main([*argv, "--check"]) == 0
    plans = json.loads((tmp_path / "plans.json").read_text())["plans"]
    assert plans["fp32"]["ours"] == plans["fp32"]["sample"]
    assert plans["fp32"]["ours"]["casts"] == 0 < plans["fp16"]["ours"]["casts"]
    for precision in ("fp32", "fp16"):
        found = plans[precision]["ours"]
        assert found["layers"] > found["kernels"] > 50
    report = {"plans": {"fp16": {"ours": {"layers": 3, "casts": 2, "kernels": 1}, "sample": {"layers": 3, "casts": 1, "kernels": 1}}}}  # fmt: skip
    assert list(plan_layers.criteria(report).values()) == [True, False, True]


def test_both_forms_of_nms_find_the_same_in_made_up_scores(capsys: Any) -> None:
    boxes, logits = nms_time.made_up(2, 500, 9)
    model = nms_time.model_of(boxes, logits, 0.4)
    found = [
        open_session(lowering.lower(model, form), form).run(None, {"input": logits[..., None]})
        for form in nms_time.FORMS
    ]
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
    nms = Nms(score_threshold=0.4, score_activation=True, box_coding=0)
    wanted = reference(boxes, logits, nms)["num_detections"]
    assert np.array_equal(found[0][0], wanted) and wanted.min() > 30  # objects
    argv = ["--provider", "cpu", "--anchors", "500", "--classes", "9", "--rounds", "1", "--runs", "1"]  # fmt: skip
    assert nms_time.main(argv) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("threshold") and ":" not in line]  # fmt: skip
    assert len(rows) == 4
    for row in rows:  # the operator's time by that of the rounds
        operator, rounds, ratio = (float(word) for word in row.split()[-3:])
        assert ratio == pytest.approx(operator / rounds, rel=0.1, abs=0.051)
