# SPDX-License-Identifier: Apache-2.0
"""Every reader times every kind of damage to a whole file: one line that names the file, a
status, and nothing half written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import fault_damage
import fault_desk
import pytest

#: What a command leaves where one of two images could not be used.
REST = ("out", "out/2.png")


@dataclass(frozen=True)
class Reader:
    """A file that a command line reads.

    Attributes:
        line: of the command, which does its work with sound files.
        file: the one that is damaged.
        takes: kinds of damage after which it is still a file of its kind, with what follows from
            them: all of status 0.
        skips: it is one of several: it is skipped with a warning, the status is 3.
        named: what an error may name in place of the file, a regular expression: the option that
            named it.
    """

    line: str
    file: str
    takes: tuple[str, ...] = ()
    skips: bool = False
    named: str = ""


INT8 = "build_engine --model net.onnx --save_onnx out.onnx --precision int8 --calib_cache net.cache --calib_method minmax"  # fmt: skip
EVAL = "eval_coco --detections detections.json --annotations annotations.json --json out.json"
INFER = "infer --model model.onnx --input photos --output out"
VISUALIZE = "visualize --input photos --detections tsvs --output out"

# fmt: off
READERS = {
    "infer model": Reader(INFER, "model.onnx"),
    "eval_coco model": Reader("eval_coco --model model.onnx --input photos --annotations annotations.json --json out.json", "model.onnx"),
    "image_batcher model": Reader("image_batcher --model model.onnx --input photos --output out", "model.onnx"),
    "build_engine model": Reader("build_engine --model net.onnx --save_onnx out.onnx", "net.onnx"),
    "create_onnx source": Reader("create_onnx --source_onnx yolo.onnx --onnx out.onnx", "yolo.onnx"),
    "triton model": Reader("deploy triton --model model.onnx --output out --name d0", "model.onnx"),
    "trtexec model": Reader("deploy trtexec --model model.onnx --tensorrt_version 10.13", "model.onnx"),
    "pad_color model": Reader("deploy pad_color --model model.onnx --output out.onnx", "model.onnx"),
    "compare model": Reader("compare --reference yolo.onnx --candidate model.onnx --input photos --json out.json", "model.onnx"),
    "tune_precision model": Reader("tune_precision --model net.onnx --calib_cache net.cache --input photos --annotations objects.json --output out.json --views 1 --noise_images 1 --threads 1", "net.onnx"),
    "triton sidecar": Reader("deploy triton --model d0.engine --output out --name d0", "d0.engine.json"),
    "deepstream sidecar": Reader("deploy deepstream --model d0.engine --output out", "d0.engine.json"),
    "trtexec sidecar": Reader("deploy trtexec --model d0.engine --tensorrt_version 10.13", "d0.engine.json"),
    "image_batcher sidecar": Reader("image_batcher --model d0.engine --input photos --output out", "d0.engine.json"),
    "infer sidecar": Reader("infer --model d0.engine --input photos --output out", "d0.engine.json"),
    "engine": Reader("deploy trtexec --model d0.engine --tensorrt_version 10.13", "d0.engine"),
    "cache": Reader(f"{INT8} --int8_share 1", "net.cache"),
    "cache sidecar": Reader(f"{INT8} --int8_share 1", "net.cache.json", takes=("missing",)),
    "precision": Reader(f"{INT8} --precision_json precision.json", "precision.json"),
    "eval_coco annotations": Reader(EVAL, "annotations.json"),
    "infer annotations": Reader(f"{INFER} --annotations annotations.json", "annotations.json"),
    "visualize annotations": Reader(f"{VISUALIZE} --annotations annotations.json", "annotations.json"),
    "compare annotations": Reader("compare --reference model.onnx --candidate model.onnx --input photos --annotations annotations.json --json out.json", "annotations.json"),
    "results": Reader(EVAL, "detections.json"),
    "infer labels": Reader(f"{INFER} --labels labels.txt", "labels.txt", named="--labels"),
    "create_onnx labels": Reader("create_onnx --source_onnx yolo.onnx --onnx out.onnx --labels labels.txt", "labels.txt", named="--labels"),
    "triton labels": Reader("deploy triton --model d0.engine --output out --name d0 --labels labels.txt", "labels.txt"),
    "label map": Reader(f"{INFER} --labels map.pbtxt", "map.pbtxt"),
    "visualize labels": Reader(VISUALIZE, "tsvs/labels.txt", takes=("missing", "truncated", "text", "page")),
    "manifest": Reader("infer --model model.onnx --input photos --output found --resume", "found/manifest.json", takes=("missing",)),
    "partial results": Reader("infer --model model.onnx --input photos --output found --resume", "found/detections.partial.jsonl", takes=("missing", "empty", "truncated", "zeros", "archive")),
    "manifest of --clean": Reader("infer --model model.onnx --input photos --output found --clean", "found/manifest.json", takes=("missing",)),
    "family": Reader("create_onnx --source_onnx yolo.onnx --onnx out.onnx --family family.py", "family.py"),
    "check config": Reader("deploy check --output served", "served/d0/config.pbtxt"),
    "check ensemble": Reader("deploy check --output served", "served/d0_ensemble/config.pbtxt", takes=("missing",)),
    "check labels": Reader("deploy check --output served", "served/d0/labels.txt", takes=("pointer",)),
    "check inference": Reader("deploy check --output stream", "stream/config_infer.txt"),
    "check application": Reader("deploy check --output stream", "stream/deepstream_app.txt", takes=("missing",)),
    "check server": Reader("deploy check --output stream", "stream/config_inferserver.txt", takes=("missing",)),
    "times": Reader("deploy trtexec --parse_times times.json --batch_size 2", "times.json"),
    "log": Reader("deploy trtexec --parse_log trtexec.log", "trtexec.log"),
    "tsv": Reader(VISUALIZE, "tsvs/1.tsv", takes=("empty",), skips=True),
    "infer image": Reader(INFER, "photos/1.png", takes=("picture",), skips=True),
    "visualize image": Reader(VISUALIZE, "photos/1.png", takes=("picture",), skips=True),
    "image_batcher image": Reader("image_batcher --model model.onnx --input photos --output out", "photos/1.png", takes=("picture",), skips=True),
    "compare image": Reader("compare --reference model.onnx --candidate model.onnx --input photos --json out.json", "photos/1.png", takes=("picture",), skips=True),
}
# fmt: on

#: Damage -> what the line says of it: that which is there, or what was expected in its place.
SAID = {
    "missing": "found|no such file", "folder": "a folder|is a directory", "fifo": "a FIFO", "loop": "a link that leads to itself|symbolic",
    "dangling": "a link to nothing|no such file", "endless": "a device", "nothing": "a device", "forbidden": "permission denied",
}  # fmt: skip

#: Without its .json an engine may still be run, where there is a GPU.
UNNAMED = ("infer sidecar", "missing")
CASES = [(r, d) for r in READERS for d in fault_damage.WHOLE if (r, d) != UNNAMED]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_desk.make(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def desk(name: str, sound: Path, tmp_path: Path) -> Path:
    served = READERS[name].line.startswith("deploy check")
    return fault_desk.copy(sound, tmp_path / "desk", served=served)


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_is_read(name: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = READERS[name]
    outcome = fault_desk.run(desk, reader.line, capsys)
    if name == "infer sidecar":  # there is no GPU, or the stand-in is no engine
        fault_desk.check_one_line(outcome, 1, "cuda|TensorRT")
    elif name == "compare model":
        assert outcome.status == 1
    else:
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(("name", "damage"), CASES, ids=[f"{a}-{b}" for a, b in CASES])
def test_a_damaged_file_is_one_line(
    name: str, damage: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "forbidden" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    reader = READERS[name]
    fault_damage.WHOLE[damage](desk / reader.file)
    outcome = fault_desk.run(desk, reader.line, capsys)
    file = Path(reader.file).name
    assert not [left for left in outcome.left if Path(left).name.startswith(".")], outcome.left
    if damage in reader.takes:
        assert outcome.status == 0, outcome.err
    elif damage in ("missing", "folder") and file.endswith(".png"):
        assert outcome.status == 0, outcome.err  # nobody named it
    elif reader.skips:
        assert outcome.status == 3, outcome.err
        lines = re.findall(r"^W .*skipped.*$", outcome.err, re.MULTILINE)
        (line,) = set(lines)  # compare.py: one of each model
        assert file in line and "Traceback" not in outcome.err
        assert re.search(SAID.get(damage, "expected|cannot be decoded"), line), line
    elif reader.line.startswith("deploy check"):
        fault_desk.check_one_line(outcome, 1, "faults found: [0-9]+, listed above|expected")
        listed = [text for text in outcome.err.splitlines() if text]
        assert any(file in text for text in listed), listed
        assert damage not in SAID or any(re.search(SAID[damage], t, re.I) for t in listed), listed
        assert all(text.isprintable() and len(text) < 1000 for text in listed)
    else:
        said = SAID.get(damage, "expected|not a|another engine|SyntaxError")
        named = re.escape(file) + (f"|{reader.named}" if reader.named else "")
        fault_desk.check_one_line(outcome, 1, named, said)
        assert outcome.left == (), outcome.left
