# SPDX-License-Identifier: Apache-2.0
"""Names that a file system takes and people do not expect: the work is done, and nothing of them
reaches the terminal raw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fault_damage
import fault_desk
import pytest

STEMS = {
    "252 bytes": fault_damage.EMOJI, "not UTF-8": fault_damage.NO_UTF8, "tab": "a\tb", "newline": "a\nb", "escape": "a\x1b[31mred\x07",
    "space": " a b ", "leading dash": "-rf", "quotes": "a'b\"c", "glob": "a[1]*?", "markup": "<script>alert(1)</script>".replace("/", "|"),
    "shell": "$(touch pwned);`touch pwned`", "right to left": "\u202eabc", "line separator": "a\u2028b", "percent": "%s%d{0}",
}  # fmt: skip

#: Command -> its line, the file that gets the name, its status, and what it writes.
IMAGES = {
    "infer": ("infer --model model.onnx --input photos --output out", 0),
    "image_batcher": ("image_batcher --model model.onnx --input photos --output out", 0),
    "compare": ("compare --reference model.onnx --candidate model.onnx --input photos --json out.json --report out.html", 0),
    "eval_coco": ("eval_coco --model model.onnx --input photos --annotations annotations.json --json out.json", 0),
    "visualize": ("visualize --input photos --detections tsvs --output out", 3),
}  # fmt: skip
MODELS = {
    "infer": "infer --input photos --output out --model",
    "triton": "deploy triton --output out --name d0 --model",
    "trtexec": "deploy trtexec --tensorrt_version 10.13 --model",
    "compare": "compare --reference model.onnx --input photos --report out.html --candidate",
    "build_engine": "build_engine --save_onnx out.onnx --precision fp32 --model",
}


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_desk.make(tmp_path_factory.mktemp("sound"))


def check_terminal(outcome: fault_desk.Outcome) -> None:
    assert "Traceback" not in outcome.err, outcome.err
    for line in (outcome.err + outcome.out).split("\n"):
        assert line.isprintable(), ascii(line)


@pytest.mark.parametrize("command", IMAGES)
@pytest.mark.parametrize("stem", STEMS)
def test_images_of_odd_names(
    stem: str, command: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    line, status = IMAGES[command]
    desk = fault_desk.copy(sound, tmp_path / "desk")
    image = fault_damage.renamed(desk / "photos" / "1.png", STEMS[stem])
    outcome = fault_desk.run(desk, line, capsys)
    assert outcome.status == status, outcome.err
    check_terminal(outcome)
    assert not (desk / "pwned").exists()
    if command in ("infer", "image_batcher"):
        assert len([name for name in outcome.left if name.endswith(".png")]) == 2
    if command == "infer":
        ids = {entry["image_id"] for entry in json.loads((desk / "out/detections.json").read_text())}  # fmt: skip
        assert len(ids) == 2, ids
    if command == "compare":
        page = (desk / "out.html").read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert json.loads((desk / "out.json").read_text())["images"] == 2
    assert image.is_file()


@pytest.mark.parametrize("command", MODELS)
@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "leading dash"])
def test_models_of_odd_names(
    stem: str, command: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    source = "net.onnx" if command == "build_engine" else "model.onnx"
    name = (STEMS[stem][:60] if stem == "252 bytes" else STEMS[stem]) + ".onnx"
    fault_damage.copy_of(desk / source, desk / name)
    outcome = fault_desk.run(desk, [*MODELS[command].split(), name], capsys)
    assert outcome.status == 0, outcome.err
    check_terminal(outcome)
    if command == "triton":
        config = (desk / "out/d0/config.pbtxt").read_text(encoding="utf-8")
        assert config.count("\nbackend:") + config.count("\nplatform:") <= 1
    if command == "compare":
        assert "<script>alert" not in (desk / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", MODELS)
@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "leading dash"])
def test_models_of_odd_names_that_are_damaged(
    stem: str, command: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    name = (STEMS[stem][:60] if stem == "252 bytes" else STEMS[stem]) + ".onnx"
    (desk / name).write_bytes(bytes(range(256)))
    outcome = fault_desk.run(desk, [*MODELS[command].split(), name], capsys)
    fault_desk.check_one_line(outcome, 1, "expected an ONNX file")
    check_terminal(outcome)
    assert outcome.left == ()


@pytest.mark.parametrize("stem", ["tab", "newline", "quotes", "shell", "markup", "not UTF-8"])
def test_engines_of_odd_names_are_deployed(
    stem: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    engine = fault_damage.renamed(desk / "d0.engine", STEMS[stem])
    line = ["deploy", "deepstream", "--model", engine.name, "--output", "out"]
    outcome = fault_desk.run(desk, line, capsys)
    assert outcome.status == 0, outcome.err
    check_terminal(outcome)
    outcome = fault_desk.run(desk, ["deploy", "check", "--output", "out"], capsys)
    assert outcome.status == 0, outcome.err
