# SPDX-License-Identifier: Apache-2.0
"""Full disks, limits, closed streams, interrupts, and inputs that would take all memory or all
time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fault_desk
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from trtdet import files, start
from trtdet.checks import LABEL
from trtdet.detections import Detections
from trtdet.results.draw import draw

INFER = "infer --model model.onnx --input photos --output out"
EVAL = "eval_coco --detections detections.json --annotations annotations.json"
VISUALIZE = "visualize --input photos --detections tsvs --output out"

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_desk.make(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def desk(sound: Path, tmp_path: Path) -> Path:
    return fault_desk.copy(sound, tmp_path / "desk")


# ---- full disks


@full
@pytest.mark.parametrize(
    "line",
    [
        f"{EVAL} --json /dev/full",
        "compare --reference model.onnx --candidate model.onnx --input photos --json /dev/full",
        "compare --reference model.onnx --candidate model.onnx --input photos --report full.html",
        "create_onnx --source_onnx yolo.onnx --onnx full.onnx",
        "build_engine --model net.onnx --save_onnx full.onnx",
        "deploy pad_color --model net.onnx --output full.onnx",
        f"{EVAL} --plot full.png",
        "infer --model model.onnx --benchmark 1 --json full.json",
    ],
)
def test_a_full_disk_is_named_with_the_file(line: str, desk: Path, capsys: Any) -> None:
    for suffix in ("html", "onnx", "png", "json"):
        (desk / f"full.{suffix}").symlink_to("/dev/full")
    outcome = fault_desk.run(desk, line, capsys)
    named = line.split()[-1].removeprefix("/dev/")
    fault_desk.check_one_line(outcome, 1, named, "no space left on device; make room, or choose")
    assert outcome.left == ()
    assert Path("/dev/full").is_char_device()


LIMITED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_{limit}, ({value}, {value}))
from trtdet.start import run_stage
sys.argv = ["x", *{words!r}]
sys.exit(run_stage("{stage}"))
"""


def limited(desk: Path, limit: str, value: int, line: str) -> subprocess.CompletedProcess[str]:
    stage, *words = line.split()
    code = LIMITED.format(limit=limit, value=value, words=words, stage=stage)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=desk, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@posix
@pytest.mark.parametrize(
    ("line", "left"),
    [
        (f"{EVAL} --json out.json", set()),
        ("create_onnx --source_onnx yolo.onnx --onnx out.onnx", set()),
        (INFER, {"out", "out/labels.txt"}),
        (VISUALIZE, {"out"}),
    ],
)
def test_a_file_that_gets_too_large_is_named_and_not_left(
    line: str, left: set[str], desk: Path
) -> None:
    """As a quota ends it: nothing of what could not be finished stays."""
    for name in ("1.png", "2.png"):  # larger than the limit as they are drawn
        noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
        noise[:8, :8] = (200, 2, 0)  # what the detector reads
        Image.fromarray(noise).save(desk / "photos" / name)
    before = fault_desk.everything(desk)
    result = limited(desk, "FSIZE", 100, line)
    assert result.returncode == 1, result.stderr
    (error,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert "out" in error and "file too large" in error.lower(), error
    assert "Traceback" not in result.stderr
    found = fault_desk.everything(desk) - before
    assert found <= left, found


# ---- streams and signals


@posix
@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "<&-", "1>&- 2>&-", "<&- 1>&- 2>&-"])
def test_closed_streams(closed: str, desk: Path) -> None:
    line = f'"{sys.executable}" "{ROOT / "infer.py"}" {INFER.partition(" ")[2]} {closed}'
    result = subprocess.run(["bash", "-c", line], cwd=desk, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (desk / "out" / "detections.json").is_file()
    assert "Traceback" not in result.stderr


@posix
@pytest.mark.parametrize("script", ["infer", "create_onnx", "deploy", "visualize"])
def test_an_interrupt_during_imports_is_one_line(script: str, tmp_path: Path) -> None:
    """A module of the standard library that every stage imports stands for the moment of Ctrl-C."""
    (tmp_path / "difflib.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_before_the_stage_runs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(name: str) -> Any:
        assert name == "trtdet.commands.infer"
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "import_module", interrupted)
    assert start.run_stage("infer") == 130
    assert capsys.readouterr().err == "interrupted\n"


@posix
@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])  # fmt: skip
def test_a_signal_while_images_are_read(number: int, status: int, word: str, desk: Path) -> None:
    for index in range(400):
        (desk / "photos" / f"c{index}.png").write_bytes((desk / "photos" / "1.png").read_bytes())
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "infer.py"), *INFER.split()[1:]], cwd=desk, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (desk / "out" / "c0.tsv").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "done before it was interrupted"
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Traceback" not in said and said.rstrip().endswith(word), said
    assert "I out keeps what is done; --resume goes on with it" in said
    assert not [name for name in fault_desk.everything(desk) if Path(name).name.startswith(".")]
    assert not (desk / "out" / "detections.json").exists()


# ---- inputs that would take all memory or all time


def test_a_label_of_100_000_letters_takes_no_quadratic_time() -> None:
    found = Detections(np.array([[1, 2, 30, 20]], "f4"), np.array([0.9], "f4"), np.array([0], "i4"))
    image = np.zeros((400, 600, 3), "u1")
    seconds = []
    for letters in (10_000, 100_000):
        start_s = time.perf_counter()
        draw(image, found, ["a" * letters])
        seconds.append(time.perf_counter() - start_s)
    assert seconds[1] < 2, seconds


@pytest.mark.parametrize("name", ["labels.txt", "map.pbtxt"])
def test_a_label_file_of_such_a_name_is_refused(name: str, desk: Path, capsys: Any) -> None:
    label = "x" * 100_000
    text = f"{label}\n" * 3 if name == "labels.txt" else f'item {{ id: 1 name: "{label}" }}'
    (desk / name).write_text(text)
    outcome = fault_desk.run(desk, f"{INFER} --labels {name}", capsys)
    fault_desk.check_one_line(outcome, 1, f"at most {LABEL} characters, found 100000")
    assert outcome.left == ()


@pytest.mark.parametrize(
    "text",
    [
        "item {\n  id: 1000000000000\n  name: 'a'\n}\n",  # a list up to that id would take 8 TB
        "item {\n  id: " + "9" * 5000 + "\n  name: 'a'\n}\n",
        "item { " * 50_000,
        "item {" + " " * 200_000,
        "# " * 100_000,
    ],
    ids=["id 1e12", "id of 5000 digits", "never closed", "spaces", "comments"],
)
def test_hostile_label_maps(text: str, desk: Path, capsys: Any) -> None:
    (desk / "map.pbtxt").write_text(text)
    start_s = time.perf_counter()
    outcome = fault_desk.run(desk, f"{INFER} --labels map.pbtxt", capsys)
    assert time.perf_counter() - start_s < 10
    fault_desk.check_one_line(outcome, 1, r"map\.pbtxt")
    assert outcome.left == ()


ROWS = {
    "inf": "1\t2\tinf\t20\t0.9\t0", "-inf": "-inf\t2\t3\t20\t0.9\t0", "nan": "1\t2\tnan\t20\t0.9\t0", "1e308": "1\t2\t1e308\t20\t0.9\t0",
    "1e999": "1\t2\t1e999\t20\t0.9\t0", "score nan": "1\t2\t3\t20\tnan\t0", "class 1e12": "1\t2\t3\t20\t0.9\t1000000000000",
    "class -1": "1\t2\t3\t20\t0.9\t-1", "class 1.5": "1\t2\t3\t20\t0.9\t1.5", "class of 5000 digits": "1\t2\t3\t20\t0.9\t" + "9" * 5000,
    "five": "1\t2\t3\t20\t0.9", "spaces": "1 2 3 20 0.9 0", "hex": "0x1\t2\t3\t20\t0.9\t0", "text": "a\tb\tc\td\te\tf", "NUL": "1\0\t2\t3\t20\t0.9\t0",
    "angle inf": "1\t2\t3\t20\t0.9\t0\tinf", "half a line": "1\t2\t3",
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_tsv_that_cannot_be_drawn_is_skipped(name: str, desk: Path, capsys: Any) -> None:
    (desk / "tsvs" / "1.tsv").write_text(ROWS[name] + "\n")
    outcome = fault_desk.run(desk, VISUALIZE, capsys)
    assert outcome.status == 3, outcome.err
    (line,) = [text for text in outcome.err.splitlines() if text.startswith("W skipped: ")]
    assert "tsvs/1.tsv:1: expected xmin ymin xmax ymax score class" in line and len(line) < 400
    assert outcome.left == ("out", "out/2.png")


@pytest.mark.parametrize("size", [(20000, 50), (50, 20000), (500, 1), (1, 500), (1, 1)])
@pytest.mark.parametrize(
    "line",
    [INFER, VISUALIZE, "image_batcher --model model.onnx --input photos --output out",
     "compare --reference model.onnx --candidate model.onnx --input photos --report out.html"],
)  # fmt: skip
def test_pictures_of_any_shape(line: str, size: tuple[int, int], desk: Path, capsys: Any) -> None:
    Image.new("RGB", size, (200, 2, 0)).save(desk / "photos" / "1.png")
    outcome = fault_desk.run(desk, line, capsys)
    assert outcome.status in (0, 1) and "Traceback" not in outcome.err, outcome.err
    assert not outcome.errors, outcome.err
    assert outcome.status == 0 or "limits broken" in outcome.out


def test_category_ids_of_any_size_take_no_memory(desk: Path, capsys: Any) -> None:
    largest = 2**31 - 1
    data = fault_desk.replaced(fault_desk.ANNOTATIONS, "categories.0.id", largest)
    fault_desk.write_json(desk / "annotations.json", fault_desk.replaced(data, "annotations.0.category_id", largest))  # fmt: skip
    with fault_desk.bounded(20):
        outcome = fault_desk.run(desk, f"{VISUALIZE} --annotations annotations.json", capsys)
    assert outcome.status == 0, outcome.err


@posix
def test_no_memory_is_one_line(desk: Path) -> None:
    line = "image_batcher --size 20000 --input photos --output out"
    result = limited(desk, "AS", 3 << 30, line)
    assert result.returncode == 1, result.stderr
    (error,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert error.startswith("error: not enough memory (") and "a smaller --batch_size" in error
    assert "Traceback" not in result.stderr


def test_a_shell_line_is_exact_and_printable(tmp_path: Path) -> None:
    names = ["plain", "with space", "tab\there", "new\nline", "\x1b[31m", "quote'd", '"', "back\\slash\t", os.fsdecode(b"caf\xe9"), "$(touch x)", "\u2028"]  # fmt: skip
    line = files.shell_line(["printf", "%s\\0", *names])
    assert line.isprintable()
    result = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path)
    assert result.stdout.split(b"\0")[:-1] == [os.fsencode(name) for name in names]
    assert list(tmp_path.iterdir()) == []
