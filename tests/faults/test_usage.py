# SPDX-License-Identifier: Apache-2.0
"""Every number on a command line times every value that it cannot have: wrong usage, status 2,
one line, before anything is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fault_desk
import pytest

HUGE = ("2147483648", "18446744073709551616", "9" * 20, "9" * 5000)
NO_NUMBER = ("", " ", "x", "1.5", "nan", "inf", "1e9", "0x10", "1_000", "\u0663", "1,", "--", "1\n")
#: Type -> values that it does not take.
WRONG = {
    "count": ("0", "-1", *HUGE, *NO_NUMBER),
    "threads": ("0", "-1", "1025", "100000", "200000", *HUGE, *NO_NUMBER),
    "batch": ("0", "-1", "65537", *HUGE, *NO_NUMBER),
    "side": ("0", "-1", "32769", *HUGE, *NO_NUMBER),
    "share": ("-0.1", "1.1", "1e400", "", "x", "nan", "inf", "-inf", "9" * 5000),
    "core": ("-1", "16", *HUGE, *NO_NUMBER),
    "level": ("-1", "6", *HUGE, *NO_NUMBER),
    "number": ("-0.1", "nan", "inf", "1e400", "x", ""),
    "sizes": ("0", "0,8", "-8,8", "8,8,8,8", "40000", "8,40000", "x", "nan", "9" * 5000, "8,inf"),
    "batches": ("0", "-1", "8:4:1", "1:2", "1:2:3:4", "1:2:70000", "x", "9" * 20, "9" * 5000, "1.5"),
    "devices": ("-1", "x", "0,0", "1.5", "", "9" * 5000),
    "time": ("-1", "nan", "inf", "1e400", "1e308", "x", ""),
    "seconds": ("0", "-1", "nan", "inf", "1e400", "1e308", "x"),
    "version": ("x", "10", "10.13", "1.2.3.4.5", f"{'9' * 5000}.1.1", "-1.2.3", "99999.1.1"),
}  # fmt: skip

INFER = "infer --model model.onnx --input photos --output out"
ENGINE = "infer --model d0.engine --input photos --output out"
SERVED = "infer --model grpc://h:1/m --input photos --output out"
VIDEO = "infer --model model.onnx --input clip.mp4 --output out"
BUILD = "build_engine --model net.onnx --save_onnx out.onnx --engine out.engine"
INT8 = f"{BUILD} --precision int8"
CREATE = "create_onnx --source_onnx yolo.onnx --onnx out.onnx"
COMPARE = "compare --reference model.onnx --candidate model.onnx --input photos"
TUNE = "tune_precision --model net.onnx --calib_input photos --input photos --annotations objects.json --output out.json"
TRITON = "deploy triton --model model.onnx --output out --name d0"
DEEPSTREAM = "deploy deepstream --model d0.engine --output out"
TRTEXEC = "deploy trtexec --model model.onnx --tensorrt_version 10.13"

# fmt: off
#: Line, option -> type.
OPTIONS = {
    (INFER, "--threads"): "threads", (INFER, "--workers"): "threads", (INFER, "--batch_size"): "batch", (INFER, "--num_images"): "count",
    (INFER, "--score_threshold"): "share", (INFER, "--draw_threshold"): "share", (INFER, "--size"): "sizes", (INFER, "--resize"): "side",
    ("infer --model model.onnx", "--benchmark"): "count", (ENGINE, "--contexts"): "threads", (ENGINE, "--devices"): "devices",
    (VIDEO, "--every"): "count", (VIDEO, "--start"): "time", (VIDEO, "--duration"): "seconds", (SERVED, "--requests"): "threads", (SERVED, "--timeout"): "seconds", (f"{INFER} --ray local", "--ray_workers"): "threads",
    (BUILD, "--batch_size"): "batches", (BUILD, "--dynamic_batch_size"): "batches", (BUILD, "--dla_core"): "core",
    (BUILD, "--workspace"): "seconds", (BUILD, "--optimization_level"): "level", (INT8, "--calib_num_images"): "count",
    (INT8, "--calib_batches"): "count", (INT8, "--calib_batch_size"): "batch", (INT8, "--calib_fraction"): "share", (INT8, "--int8_share"): "share",
    (f"{INT8} --calib_cache c", "--calib_cache_version"): "version", (CREATE, "--max_detections"): "count", (CREATE, "--iou_threshold"): "share",
    (CREATE, "--score_threshold"): "share", (CREATE, "--size"): "sizes", (CREATE, "--num_classes"): "count", (CREATE, "--opset"): "count",
    (COMPARE, "--worst"): "count", (COMPARE, "--min_score"): "share", (COMPARE, "--max_box_diff"): "number", (COMPARE, "--max_extra"): "number",
    (COMPARE, "--workers"): "threads", (COMPARE, "--threads"): "threads", (TUNE, "--views"): "count", (TUNE, "--noise_images"): "count",
    (TUNE, "--threads"): "threads", (TUNE, "--max_ap_drop"): "share", (TRITON, "--batch_size"): "batch", (TRITON, "--instances"): "threads",
    (DEEPSTREAM, "--stream_width"): "side", (DEEPSTREAM, "--stream_height"): "side", (TRTEXEC, "--iterations"): "count",
    (TRTEXEC, "--batch_size"): "batch", ("image_batcher --model model.onnx --input photos --output out", "--workers"): "threads",
    ("visualize --input photos --detections tsvs --output out", "--num_images"): "count",
}
# fmt: on

CASES = [(line, option, value) for (line, option), kind in OPTIONS.items() for value in WRONG[kind]]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: nothing is written."""
    return fault_desk.make(tmp_path_factory.mktemp("desk"))


@pytest.mark.parametrize(
    ("line", "option", "value"), CASES, ids=[f"{o}-{i}-{v[:22]!a}" for i, (_, o, v) in enumerate(CASES)]
)  # fmt: skip
def test_a_wrong_number_is_wrong_usage(
    line: str, option: str, value: str, desk: Path, capsys: Any
) -> None:
    outcome = fault_desk.run(desk, [*line.split(), f"{option}={value}"], capsys)
    text = fault_desk.check_one_line(
        outcome, 2, re.escape(option), "expected|invalid choice|more than any"
    )
    assert len(text) < 600, text
    assert outcome.left == ()


@pytest.mark.parametrize(
    ("option", "largest", "reason"),
    [("--threads", 1024, "each is a thread"), ("--workers", 1024, "each is a thread"), ("--batch_size", 65536, r"less than 2\^31 elements")],
)  # fmt: skip
def test_a_bound_says_its_reason(option: str, largest: int, reason: str, desk: Path, capsys: Any) -> None:  # fmt: skip
    outcome = fault_desk.run(desk, f"{INFER} {option} {largest + 1}", capsys)
    fault_desk.check_one_line(outcome, 2, f"from 1 to {largest}", reason)


PATHS = {
    "infer": (INFER, ("--output model.onnx", "--input nowhere", "--input photos/*.gif", "--input model.onnx", "--annotations nowhere", "--labels nowhere")),
    "eval_coco": ("eval_coco --detections detections.json --annotations annotations.json", ("--json annotations.json", "--json detections.json", "--json photos", "--plot detections.json/x.png", "--input tsvs", "--input nowhere", "--json /proc/x.json", "--json /dev/null/x.json")),
    "create_onnx": (CREATE, ("--onnx yolo.onnx", "--onnx photos", "--onnx yolo.onnx/x.onnx", "--tf2onnx yolo.onnx", "--labels photos", "--family nowhere.py")),
    "build_engine": ("build_engine --model net.onnx --save_onnx out.onnx", ("--save_onnx photos", "--fp16_check_input nowhere", "--precision int8 --calib_input nowhere", "--precision int8 --calib_cache photos", "--precision int8 --calib_input tsvs", "--precision int8 --calib_cache net.cache --precision_json nowhere")),
    "compare": (COMPARE, ("--report model.html/x.html --json photos", "--json model.onnx", "--annotations nowhere", "--annotations photos", "--reference nowhere", "--candidate photos", "--input nowhere")),
    "visualize": ("visualize --input photos --detections tsvs --output out", ("--output photos", "--detections nowhere", "--detections model.onnx", "--font nowhere", "--font labels.txt", "--font photos", "--labels nowhere", "--annotations nowhere", "--input tsvs", "--output model.onnx")),
    "image_batcher": ("image_batcher --model model.onnx --input photos --output out", ("--output photos", "--model nowhere", "--model photos", "--model annotations.json", "--output model.onnx")),
    "triton": (TRITON, ("--output model.onnx", "--labels nowhere", "--model nowhere.engine", "--model photos")),
    "deepstream": (DEEPSTREAM, ("--output d0.engine", "--model photos", "--model nowhere", "--labels photos")),
    "trtexec": (TRTEXEC, ("--model nowhere", "--model photos")),
    "times": ("deploy trtexec --batch_size 1 --parse_times times.json", ("--parse_times nowhere", "--parse_times photos", "--parse_times labels.txt")),
    "log": ("deploy trtexec --parse_log trtexec.log", ("--parse_log nowhere", "--parse_log photos", "--parse_log labels.txt")),
    "check": ("deploy check --output tsvs", ("--output nowhere", "--output labels.txt", "--output tsvs")),
    "pad_color": ("deploy pad_color --model model.onnx --output out.onnx", ("--output model.onnx", "--model nowhere", "--output photos")),
    "tune_precision": ("tune_precision --model net.onnx --calib_cache net.cache --input photos --annotations objects.json --output out.json", ("--output net.onnx", "--output objects.json", "--output photos", "--input nowhere", "--annotations nowhere", "--table net.onnx", "--model nowhere")),
}  # fmt: skip
PATH_CASES = [(name, line, extra) for name, (line, extras) in PATHS.items() for extra in extras]


@pytest.mark.parametrize(
    ("line", "extra"), [case[1:] for case in PATH_CASES], ids=[f"{n} {e}" for n, _, e in PATH_CASES]
)
def test_a_wrong_path_is_one_line(
    line: str, extra: str, tmp_path_factory: pytest.TempPathFactory, desk: Path, capsys: Any
) -> None:
    """The last option of a name counts: each case replaces a sound path."""
    own = fault_desk.copy(desk, tmp_path_factory.mktemp("path") / "desk")
    before = {name: (own / name).stat().st_mtime_ns for name in fault_desk.everything(own)}
    option, path = extra.split()[-2:]
    words = line.split()
    if option in words:
        at = words.index(option)
        del words[at : at + 2]
    outcome = fault_desk.run(own, [*words, *extra.split()], capsys)
    named = f"{re.escape(option)}|{re.escape(Path(path).name)}|{re.escape(path.split('/')[0])}"
    fault_desk.check_one_line(outcome, 1, named)
    assert outcome.left == (), outcome.left
    files = {name: (own / name).stat().st_mtime_ns for name in before if (own / name).is_file()}
    assert files == {name: before[name] for name in files}
