# SPDX-License-Identifier: Apache-2.0
"""Sound files in places, and under names, that do not go: outputs over inputs, links, folders in
place of files, full disks, folders without permission, packages that cannot be loaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fault_desk
import fault_inputs
import numpy as np
import onnx
import pytest
from conftest import ROOT
from PIL import Image

from trtdet.closing import without_interrupt

INFER = "infer --model model.onnx --input photos --output out"
#: Where an earlier run was broken off.
EARLIER = "infer --model model.onnx --input photos --output found"
EVAL = "eval_coco --detections detections.json --annotations annotations.json"
EVAL_MODEL = "eval_coco --model model.onnx --input photos --annotations annotations.json"
VISUALIZE = "visualize --input photos --detections tsvs --output out"
COMPARE = "compare --reference model.onnx --candidate model.onnx --input photos"
BATCHER = "image_batcher --model model.onnx --input photos --output out"
TRITON = "deploy triton --model d0.engine --output out --name d0"
STREAM = "deploy deepstream --model d0.engine --output out"
INT8 = "build_engine --model net.onnx --save_onnx out.onnx --precision int8 --calib_input photos --calib_cache new.cache"  # fmt: skip
VIDEO = "infer --model model.onnx --input clip.mkv --output"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nclip.mkv\n#EXT-X-ENDLIST\n"

Prepare = Callable[[Path], object]


def link(name: str, target: str) -> Prepare:
    def prepare(desk: Path) -> None:
        (desk / name).unlink(missing_ok=True)
        (desk / name).symlink_to(target)

    return prepare


def folder(name: str) -> Prepare:
    return lambda desk: (desk / name).mkdir(parents=True)


def file(name: str, content: bytes = b"x") -> Prepare:
    def prepare(desk: Path) -> None:
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_bytes(content)

    return prepare


def external(**entries: str) -> Prepare:
    """Other entries of the place of some weights."""

    def prepare(desk: Path) -> None:
        model = onnx.load(desk / "split.onnx", load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == "down_w")
        kept = [e for e in tensor.external_data if e.key not in entries]
        added = [onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items()]
        del tensor.external_data[:]
        tensor.external_data.extend([*kept, *added])
        (desk / "split.onnx").write_bytes(model.SerializeToString())

    return prepare


def both(*steps: Prepare) -> Prepare:
    return lambda desk: [step(desk) for step in steps]


def of_class(number: int) -> Prepare:
    """A picture in which the detector finds a class that it does not have."""
    return lambda desk: Image.new("RGB", (48, 32), (200, 2, number)).save(desk / "photos" / "1.png")


def nothing(desk: Path) -> None: ...


def split(line: str) -> str:
    return line.replace("model.onnx", "split.onnx").replace("d0.engine", "split.onnx")


CLASS = r"detection_classes: expected 0 to 2, found 200; convert"
LOOP = "a link that leads to itself"
AGAIN = "is an input, or written twice; give the output another name"
AN_IMAGE = "is one of the images; give the output another name"
BESIDE = r"split\.onnx: expected its weights in .*beside it"

# fmt: off
#: What is wrong -> how it is made, the line, and what the error says.
CASES: dict[str, tuple[Prepare, str, str]] = {
    # an output over an input
    "engine over its weights": (nothing, "build_engine --model split.onnx --save_onnx split.onnx.data", AGAIN),
    "pad_color over weights": (nothing, "deploy pad_color --model split.onnx --output split.onnx.data", AGAIN),
    "model over labels": (nothing, "create_onnx --source_onnx yolo.onnx --onnx labels.txt --labels labels.txt", AGAIN),
    "figures over the model": (nothing, "infer --model model.onnx --benchmark 1 --json model.onnx", AGAIN),
    "figures over an image": (nothing, "infer --model model.onnx --benchmark 1 --input photos --json photos/1.png", AN_IMAGE),
    "metrics over an image": (nothing, f"{EVAL_MODEL} --json photos/1.png", AN_IMAGE),
    "metrics over their page": (nothing, f"{EVAL_MODEL} --json p.html --report p.html", AGAIN),
    "comparison over its page": (nothing, f"{COMPARE} --json p.html --report p.html", AGAIN),
    "plot over an image": (nothing, f"{EVAL_MODEL} --plot photos/2.png", AN_IMAGE),
    "comparison over an image": (nothing, f"{COMPARE} --json photos/1.png", AN_IMAGE),
    "comparison over an image by a link": (link("link.png", "photos/1.png"), f"{COMPARE} --json link.png", AN_IMAGE),
    "precision over an image": (nothing, "tune_precision --model net.onnx --calib_cache net.cache --input photos --annotations objects.json --output photos/1.png", AN_IMAGE),
    "results of a video over labels": (lambda desk: shutil.copy(desk / "labels.txt", desk / "names.json"), f"{VIDEO} names.mp4 --labels names.json", AGAIN),
    # links
    "metrics into a loop": (link("l.json", "l.json"), f"{EVAL} --json l.json", LOOP),
    "model into a loop": (link("l.onnx", "l.onnx"), "build_engine --model net.onnx --save_onnx l.onnx", LOOP),
    **{f"loop as the folder of {line.split()[0]} {line.split()[1]}": (link("out", "out"), line, LOOP) for line in (INFER, VISUALIZE, BATCHER, TRITON, STREAM, f"{VIDEO} out")},
    "link to nothing as a folder": (link("out", "nowhere"), INFER, "expected a folder, out is a link to nothing"),
    "video that is a loop": (link("clip.mkv", "clip.mkv"), f"{VIDEO} out", LOOP),
    "video that is a device": (link("clip.mkv", "/dev/zero"), f"{VIDEO} out", "a device"),
    # another kind of file
    "FIFO as a video": (lambda desk: ((desk / "clip.mkv").unlink(), os.mkfifo(desk / "clip.mkv")), f"{VIDEO} out", "a FIFO"),
    "playlist as a video": (file("clip.m4v", PLAYLIST.encode()), f"{VIDEO.replace('clip.mkv', 'clip.m4v')} out", "cannot be opened as a video"),
    "list of files as a video": (file("list.ts", b"ffconcat version 1.0\nfile clip.mkv\n"), f"{VIDEO.replace('clip.mkv', 'list.ts')} out", "cannot be opened as a video"),
    "picture as a video": (lambda desk: shutil.copy(desk / "photos/1.png", desk / "clip.mkv"), f"{VIDEO} out", "cannot be opened as a video"),
    "folder in place of results": (folder("out/detections.json"), INFER, "detections.json: expected the name of a file"),
    "folder in place of labels": (folder("out/labels.txt"), INFER, "labels.txt: expected the name of a file"),
    "folder in place of the journal of a run": (folder("out/detections.partial.jsonl"), INFER, "partial.jsonl: expected the name of a file"),
    "folder in place of a calibration": (folder("new.cache.json"), INT8, r"new\.cache\.json: expected the name of a file"),
    "folder in place of a configuration": (folder("out/d0/config.pbtxt"), TRITON, "config.pbtxt: expected the name of a file"),
    "file in place of a model": (file("out/d0"), TRITON, "expected a folder, out/d0 is a file"),
    "file in place of the parser": (file("out/parser"), STREAM, "out/parser is not a folder"),
    "name of 500 letters": (nothing, f"deploy triton --model d0.engine --output out --name {'a' * 500}", "file name too long"),
    # what a model gives
    "class that is not there": (of_class(200), INFER, CLASS),
    "class that is not there, over a run": (of_class(200), EARLIER, CLASS),
    "class that is not there, with --clean": (of_class(200), f"{EARLIER} --clean", CLASS),
    "class that is not there, measured": (of_class(200), EVAL_MODEL, CLASS),
    "class that is not there, compared": (of_class(200), COMPARE, CLASS),
    # weights in a file of their own
    **{f"weights at {name} of {line.split()[0]} {line.split()[1]}": (change, split(line), text) for line in (INFER, TRITON, STREAM) for name, change, text in (
        ("another folder", external(location="../photos/1.png"), BESIDE), ("an absolute place", external(location="/etc/hostname"), BESIDE),
        ("no place", external(location=""), BESIDE), ("a place with NUL", external(location="a\0b"), BESIDE),
        ("a link out", both(link("l.bin", "/etc/hostname"), external(location="l.bin")), "a link that leads elsewhere"),
        ("a device", both(link("l.bin", "/dev/zero"), external(location="l.bin")), "found a device"),
        ("offset -5", external(offset="-5"), "found offset -5"), ("offset 10^30", external(offset="1" + "0" * 30), "found offset 1000"),
        ("length 10^14", external(length="1" + "0" * 14), "length 1000"), ("length of text", external(length="abc"), "length abc"),
    )},
    "weights cut off": (lambda desk: os.truncate(desk / "split.onnx.data", 100), split(INFER), "which has 100 bytes"),
}
# fmt: on
NEEDS_VIDEO = ("video", "FIFO", "playlist", "list of files", "picture as")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = fault_desk.make(tmp_path_factory.mktemp("sound"))
    fault_inputs.split_weights(made / "net.onnx", made / "split.onnx")
    if find_spec("av"):
        fault_inputs.make_video(made / "clip.mkv")
    return made


@pytest.fixture
def desk(sound: Path, tmp_path: Path) -> Path:
    return fault_desk.copy(sound, tmp_path / "desk")


def contents(desk: Path) -> dict[str, bytes]:
    return {
        name: (desk / name).read_bytes()
        for name in fault_desk.everything(desk)
        if os.path.isfile(desk / name)
    }


@pytest.mark.parametrize("name", CASES)
def test_a_place_that_does_not_go_is_one_line(name: str, desk: Path, capsys: Any) -> None:
    """And every file is what it was."""
    prepare, line, text = CASES[name]
    if any(word in name for word in NEEDS_VIDEO):
        pytest.importorskip("av", reason="needs requirements-video.txt")
    prepare(desk)
    before = contents(desk)
    outcome = fault_desk.run(desk, line, capsys)
    fault_desk.check_one_line(outcome, 1, text)
    assert outcome.left == ()
    assert contents(desk) == before


@pytest.mark.parametrize("words", [["--output", ""], ["--labels", ""], [""]])
def test_an_empty_word_is_wrong_usage(words: list[str], desk: Path, capsys: Any) -> None:
    outcome = fault_desk.run(desk, [*INFER.split(), *words], capsys)
    fault_desk.check_one_line(outcome, 2, "expected a value, found nothing between the quotes")
    assert outcome.left == ()


def test_pictures_alone_are_read_of_image_files(
    desk: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would run Ghostscript on what says that it is PostScript."""
    program = desk / "bin" / "gs"
    file("bin/gs", f"#!/bin/sh\ntouch {desk}/ran\n".encode())(desk)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    file("photos/1.png", header + b"(touch ran) system\n")(desk)
    outcome = fault_desk.run(desk, INFER, capsys)
    assert outcome.status == 3 and "skipped: photos/1.png: cannot be decoded: not an image" in outcome.err  # fmt: skip
    assert not (desk / "ran").exists()


@pytest.mark.parametrize("suffix", ["/../../empty", "x" * 5000, "\0", "/../1.tsv"])
def test_a_manifest_names_nothing_outside(suffix: str, desk: Path, capsys: Any) -> None:
    """Not by the suffixes of an image's files either."""
    (desk / "empty").mkdir()
    (desk / "found" / "1").mkdir()
    path = desk / "found" / "manifest.json"
    text = path.read_text().replace('".tsv"', f'"{suffix}"'.replace("\0", "\\u0000"))
    path.write_text(text)
    before = {name for name in fault_desk.everything(desk) if not name.startswith("found")}
    line = "infer --model model.onnx --input photos --output found --clean"
    outcome = fault_desk.run(desk, line, capsys)
    assert outcome.status == 0, outcome.err
    assert before <= fault_desk.everything(desk)


def test_weights_of_nan_in_a_file_of_their_own(desk: Path, capsys: Any) -> None:
    fault_inputs.split_weights(desk / "net.onnx", desk / "split.onnx", changes=[np.nan])
    outcome = fault_desk.run(desk, split(INFER), capsys)
    assert outcome.status == 0
    assert "W split.onnx: the weights 'stem_w' hold NaN" in outcome.err
    outcome = fault_desk.run(desk, split(EVAL_MODEL).replace("annotations.json", "objects.json"), capsys)  # fmt: skip
    fault_desk.check_one_line(outcome, 1, "hold NaN, so there is nothing to measure")


def test_a_link_may_have_another_suffix_than_its_file(desk: Path, capsys: Any) -> None:
    av = pytest.importorskip("av", reason="needs requirements-video.txt")
    link("marked.mp4", "marked.bin")(desk)
    outcome = fault_desk.run(desk, f"{VIDEO} marked.mp4", capsys)
    assert outcome.status == 0, outcome.err
    with av.open(str(desk / "marked.bin")) as container:
        assert "mp4" in container.format.name


def test_old_results_are_looked_for_where_new_ones_go(desk: Path, capsys: Any) -> None:
    """Not in all that lies below: --output . or / would search the whole disk."""
    for place in ("out/old.tsv", "out/deep/below/old.tsv"):
        file(place)(desk)
    outcome = fault_desk.run(desk, INFER, capsys)
    assert "W out has results of 1 other images" in outcome.err


# ---- as processes

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
#: Root may do everything, unless it gives that up.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def process(desk: Path, line: str, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:  # fmt: skip
    stage, *words = line.split()
    command = [*before, sys.executable, str(ROOT / f"{stage}.py"), *words]
    return subprocess.run(command, cwd=desk, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    return line


@posix
@pytest.mark.parametrize(
    ("place", "mode", "line", "text"),
    [
        ("photos", 0o000, INFER, "photos: permission denied"),
        ("photos", 0o000, f"{INFER} --recursive", "photos: permission denied"),
        ("out/d0", 0o555, TRITON, "--output: out/d0 takes no files from you"),
    ],
)
def test_a_folder_without_permission_is_said(place: str, mode: int, line: str, text: str, desk: Path) -> None:  # fmt: skip
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv")
    (desk / place).mkdir(parents=True, exist_ok=True)
    (desk / place).chmod(mode)
    try:
        result = process(desk, line, *(AS_OTHERS if os.geteuid() == 0 else []))
    finally:
        (desk / place).chmod(0o755)
    assert text in error_of(result)


@posix
@pytest.mark.parametrize(
    ("raised", "line", "text"),
    [
        ("raise ImportError('libGL.so.1: cannot open shared object file')", INFER, "the Python package cv2 cannot be loaded (libGL.so.1: cannot open shared object file); install"),
        ("x = 1", INFER, "the Python package cv2 is not the one that is needed"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_loaded_is_one_line(raised: str, line: str, text: str, desk: Path) -> None:  # fmt: skip
    """As OpenCV is without the libraries of a desktop, and any package beside a script of its
    name.
    """
    file("other/cv2.py", raised.encode())(desk)
    assert text in error_of(process(desk, line, PYTHONPATH=str(desk / "other")))


@posix
def test_warnings_of_packages_stay_away(desk: Path) -> None:
    """Pillow's for a tag that is longer than its file: the picture is read all the same."""
    image = Image.new("RGB", (48, 32), (200, 2, 0))
    image.save(desk / "photos" / "3.tif", description="of a photograph that is held upright")
    data = bytearray((desk / "photos" / "3.tif").read_bytes())
    place = data.index(struct.pack("<HH", 270, 2))  # the tag, and its type
    struct.pack_into("<I", data, place + 4, 10**6)
    (desk / "photos" / "3.tif").write_bytes(data)
    result = process(desk, f"{INFER} --quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert (desk / "out" / "3.png").is_file()
    result = process(desk, f"{INFER} --verbose")
    assert "Tag data larger than file" in result.stderr


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_nobody_reads_does_not_end_the_work(unbuffered: str, desk: Path) -> None:
    """`eval_coco.py ... | head -1`: the metrics are written all the same."""
    line = f'set -o pipefail; "{sys.executable}" "{ROOT}/eval_coco.py" {EVAL.partition(" ")[2]} --json out.json 2>&1 | true'  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(["bash", "-c", line], cwd=desk, env=environment, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert (desk / "out.json").is_file()


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["infer --version", "deploy trtexec --parse_log trtexec.log"])
def test_standard_output_that_is_full_is_said(line: str, desk: Path) -> None:
    stage, *words = line.split()
    command = [sys.executable, str(ROOT / f"{stage}.py"), *words]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        result = subprocess.run(command, cwd=desk, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)  # fmt: skip
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "error: standard output: no space left on device")  # fmt: skip


@posix
def test_names_in_a_locale_that_does_not_have_their_letters(desk: Path) -> None:
    (desk / "net.onnx").rename(desk / "né.onnx")
    line = "deploy pad_color --model né.onnx --output öut.onnx"
    result = process(desk, line, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 0, result.stderr
    assert (desk / "öut.onnx").is_file()


@posix
def test_an_interrupt_waits_for_the_end_of_an_import() -> None:
    """Native code that is being imported may crash of it, as ONNX Runtime's does."""
    steps = []
    with pytest.raises(KeyboardInterrupt), without_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("inside")
    assert steps == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with without_interrupt():
        steps.append("quiet")
    other = threading.Thread(target=lambda: without_interrupt().__enter__())
    other.start()
    other.join()
    assert steps == ["inside", "quiet"]
