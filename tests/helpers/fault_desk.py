# SPDX-License-Identifier: Apache-2.0
"""A folder with one sound file of every kind that is read, and a command line for each: what the
tests of faults damage.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
import toy_detector
import toy_network
import yolo_networks

from trtdet.commands import deploy, infer
from trtdet.detections import Detections, write_tsv
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, write_engine
from trtdet.precision.body import Body
from trtdet.precision.calibration_cache import CalibrationCache, Origin, origin
from trtdet.precision.file import PrecisionFile
from trtdet.precision.histograms import ChannelMoments
from trtdet.spec import ModelSpec

#: No case takes longer; a run of the whole of ONNX Runtime's start is within it on a busy machine.
BOUND_S = 60
#: Longest line of an error that a reader still reads.
LONGEST_LINE = 1000

IMAGES = [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in (1, 2)]
OBJECT = {"id": 1, "image_id": 1, "category_id": 10, "bbox": [1.0, 2.0, 30.0, 20.0], "area": 600.0, "iscrowd": 0}  # fmt: skip
ANNOTATIONS = {
    "images": IMAGES,
    "annotations": [OBJECT],
    "categories": [{"id": i, "name": n} for i, n in zip((10, 20, 30), toy_detector.LABELS, strict=True)],
}  # fmt: skip
#: The same for the network with convolutions, whose categories are 1 to 3.
OBJECTS = ANNOTATIONS | {
    "annotations": [OBJECT | {"category_id": 1}],
    "categories": [{"id": i, "name": n} for i, n in enumerate(toy_detector.LABELS, 1)],
}
RESULTS = [{"image_id": 1, "category_id": 10, "bbox": [1.0, 2.0, 30.0, 20.0], "score": 0.5}]
RECORD = {"startEnqMs": 0.0, "endEnqMs": 0.1, "startH2dMs": 0.0, "endD2hMs": 1.0, "h2dMs": 0.1, "computeMs": 0.7, "d2hMs": 0.1}  # fmt: skip
LOG = """&&&& RUNNING TensorRT.trtexec [TensorRT v101303] # trtexec --loadEngine=d0.engine --shapes=input:2x512x512x3
[I] Throughput: 100.5 qps
[I] Latency: min = 1 ms, max = 2 ms, mean = 1.5 ms, median = 1.5 ms, percentile(90%) = 1.9 ms
[I] Total Host Walltime: 3.01 s
"""
LABEL_MAP = "".join(f"item {{\n  id: {i}\n  name: '{n}'\n}}\n" for i, n in enumerate(toy_detector.LABELS, 1))  # fmt: skip
FAMILY = '''"""Ours: that of YOLO under another name."""
from trtdet.families.yolo import NAME, matches, read  # noqa: F401
'''
#: Of the calibration cache.
METHOD = "minmax"


class TookTooLongError(BaseException):
    """Not an error that a command catches."""


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        status: exit status.
        errors: lines on stderr that say an error.
        left: files that were not there before, relative to the desk.
    """

    status: int
    out: str
    err: str
    errors: tuple[str, ...]
    left: tuple[str, ...]


def make(folder: Path) -> Path:
    """Write all the sound files."""
    for name, (red, green, blue) in {"1.png": (200, 2, 0), "2.png": (100, 3, 1)}.items():
        toy_detector.image(folder / "photos" / name, red=red, green=green, blue=blue)
    toy_detector.save(folder / "model.onnx")
    yolo_networks.save(folder / "yolo.onnx", yolo_networks.v8())
    make_engine(folder / "d0.engine")
    write_json(folder / "annotations.json", ANNOTATIONS)
    write_json(folder / "objects.json", OBJECTS)
    write_json(folder / "detections.json", RESULTS)
    write_json(folder / "times.json", [RECORD, RECORD | {"endD2hMs": 2.0}])
    (folder / "trtexec.log").write_text(LOG)
    (folder / "labels.txt").write_text("\n".join(toy_detector.LABELS) + "\n")
    (folder / "map.pbtxt").write_text(LABEL_MAP)
    (folder / "family.py").write_text(FAMILY)
    found = Detections(np.array([[1, 2, 30, 20]], "f4"), np.array([0.9], "f4"), np.array([0], "i4"))
    for name in ("1.tsv", "2.tsv"):
        write_tsv(folder / "tsvs" / name, found)
    (folder / "tsvs" / "labels.txt").write_text("\n".join(toy_detector.LABELS) + "\n")
    make_int8(folder)
    make_served(folder)
    make_broken_off(folder)
    return folder


def make_engine(path: Path) -> None:
    """A stand-in for an engine, bytes of no other kind of file, and its real sidecar."""
    fields = {"compute_capabilities": ("8.9",)}
    spec = ModelSpec.from_onnx(toy_detector.model())
    info = EngineInfo(spec, "tensorrt", "10.13.3.9", "fp16", BatchRange(1, 8, 32), **fields)
    write_engine(path, b"ftrt" + bytes(range(256)), info)


def make_served(folder: Path) -> None:
    """What deploy.py writes of the engine, for its `check`."""
    engine = ["--model", str(folder / "d0.engine")]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for words in (
            ["triton", *engine, "--output", str(folder / "served"), "--name", "d0", "--ensemble"],
            ["deepstream", *engine, "--output", str(folder / "stream")],
        ):
            assert deploy.main(words) == 0


def make_broken_off(folder: Path) -> None:
    """What a run of infer.py leaves that was ended after the first image."""
    with inside(folder), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        line = "--model model.onnx --input photos --output found"
        assert infer.main(line.split()) == 0
    found = json.loads((folder / "found" / "detections.json").read_text())
    text = ",\n".join(json.dumps(entry) for entry in found if entry["image_id"] == 1)
    line = json.dumps({"name": "1", "id": 1, "image": "0" * 16, "text": text})
    (folder / "found" / "detections.partial.jsonl").write_text(line + "\n")
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    write_json(folder / "found" / "manifest.json", manifest | {"complete": False})
    (folder / "found" / "detections.json").unlink()


def make_int8(folder: Path) -> None:
    """A network with convolutions, its calibration cache, and a precision.json for it."""
    model = toy_network.network()
    onnx.save(model, folder / "net.onnx")
    body = Body(model, toy_network.SPEC)
    moments = ChannelMoments()
    moments.add(np.ones((1, 2, 3), "f4"))
    names = sorted({layer.input for layer in body.layers})
    measured = origin(body.sha256, body.spec.preprocessing, None, METHOD)
    measured = Origin(**{**measured.__dict__, "images": "i" * 64, "count": 2})
    CalibrationCache(dict.fromkeys(names, 0.5), {"x": moments.statistics(0.1)}, measured).write(folder / "net.cache")  # fmt: skip
    keep: dict[str, Any] = {body.layers[0].name: "fp16"}
    PrecisionFile(body.sha256, "int8", keep).write(folder / "precision.json")


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def copy(sound: Path, folder: Path, *, served: bool = False) -> Path:
    """A desk of its own.

    Args:
        served: with what `deploy.py check` reads.
    """
    left_out = None if served else shutil.ignore_patterns("served", "stream")
    shutil.copytree(sound, folder, symlinks=True, ignore=left_out)
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With this as the current folder."""
    there = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(there)


@contextmanager
def bounded(seconds: float = BOUND_S) -> Iterator[None]:
    """Raise `TookTooLongError` where a block takes longer; in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(folder: Path, line: str | Sequence[str], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run a command line, `infer --model model.onnx ...`, in `folder`, in this process."""
    words = line.split() if isinstance(line, str) else list(line)
    command = importlib.import_module(f"trtdet.commands.{words[0]}")
    before = everything(folder)
    capsys.readouterr()
    try:
        with inside(folder), bounded():
            status = command.main(words[1:])
    except SystemExit as end:
        status = int(end.code or 0) if not isinstance(end.code, str) else 1
    said = capsys.readouterr()
    errors = tuple(text for text in said.err.splitlines() if re.search(r"(^|: )error: ", text))
    left = tuple(sorted(everything(folder) - before))
    return Outcome(status, said.out, said.err, errors, left)


def everything(folder: Path) -> set[str]:
    """All that is in a folder, hidden files too; links are not followed."""
    found = set()
    for inner, folders, names in os.walk(os.fsencode(folder)):
        found |= {os.path.join(inner, name) for name in [*folders, *names]}
    root = os.fsencode(folder) + b"/"
    return {os.fsdecode(name.removeprefix(root)) for name in found}


def check_one_line(outcome: Outcome, status: int, *texts: str) -> str:
    """The one line of an error: of this status, readable, and with these texts in it (regular
    expressions).
    """
    assert outcome.status == status, (outcome.status, outcome.err)
    assert "Traceback" not in outcome.err, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    (line,) = outcome.errors
    assert 20 < len(line) < LONGEST_LINE, line
    assert line.isprintable(), line
    for text in texts:
        assert re.search(text, line, re.I), (text, line)
    return line


def deep(levels: int = 10**5) -> bytes:
    """JSON that no reader can follow."""
    return b"[" * levels + b"]" * levels


def replaced(document: Any, place: str, value: Any) -> Any:
    """A copy of a document with the value at "a.b.0.c" replaced, or left out for `Ellipsis`."""
    data = json.loads(json.dumps(document))
    node = data
    *steps, last = [int(s) if s.isdecimal() else s for s in place.split(".")]
    for step in steps:
        node = node[step]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data
