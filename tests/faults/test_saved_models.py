# SPDX-License-Identifier: Apache-2.0
"""SavedModels that are not whole, lie elsewhere, or are of another kind: one line each, which
says what to do.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_desk
import pytest
from conftest import EXAMPLES
from PIL import Image

from trtdet.sources.saved_model_folder import find_saved_model

SOUND = EXAMPLES / "tiny_shapes"
LINE = "create_onnx --saved_model model --onnx out.onnx --no_verify"

Prepare = Callable[[Path], None]


def sound(folder: Path) -> Path:
    shutil.copytree(SOUND, folder / "model")
    return folder / "model"


def data_file(model: Path) -> Path:
    (path,) = model.glob("variables/variables.data-*")
    return path


def rewrite(change: Callable[[bytes], bytes], *names: str) -> Prepare:
    """A sound model with some of its files changed."""

    def prepare(folder: Path) -> None:
        model = sound(folder)
        for name in names:
            path = data_file(model) if name == "data" else model / name
            path.write_bytes(change(path.read_bytes()))

    return prepare


def remove(*names: str) -> Prepare:
    def prepare(folder: Path) -> None:
        model = sound(folder)
        for name in names:
            path = data_file(model) if name == "data" else model / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def files(*names: str) -> Prepare:
    """A folder with files of these names, and no SavedModel."""

    def prepare(folder: Path) -> None:
        for name in names:
            (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "model" / name).write_bytes(b"x")

    return prepare


def one_file(name: str) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).write_bytes(b"\x89HDF")

    return prepare


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """Every 97th byte changed."""
    return bytes(b ^ 0x55 if i % 97 == 50 else b for i, b in enumerate(data))


# fmt: off
#: What is not there, found before TensorFlow is started -> line, what it says.
PLACES: dict[str, tuple[Prepare, str, str]] = {
    "nothing": (lambda folder: None, LINE, "found nothing at model"),
    "empty folder": (lambda folder: (folder / "model").mkdir(), LINE, "found a folder without one at model"),
    "folder with ONNX": (files("a.onnx"), LINE, r"--source_onnx model/a\.onnx"),
    "folder with Keras": (files("a.keras"), LINE, r"a\.keras in it is a Keras model; export it"),
    "folder with TFLite": (files("a.tflite"), LINE, r"a\.tflite in it is a TensorFlow Lite model; convert the SavedModel"),
    "folder with H5": (files("a.h5"), LINE, r"a\.h5 in it is a Keras model"),
    "folder with PyTorch": (files("a.pt"), LINE, r"a\.pt in it is a PyTorch model; export it to ONNX"),
    "checkpoint": (files("checkpoint", "model.index", "model.data-00000-of-00001"), LINE, "it has a checkpoint: export the model"),
    "text form": (files("saved_model.pbtxt"), LINE, "saved_model.pbtxt, text in place of saved_model.pb"),
    "variables alone": (files("variables/variables.index"), LINE, "found a folder without one at model"),
    "two below": (files("a/saved_model.pb", "b/saved_model.pb"), LINE, "found 2 in model; name one: model/a, model/b"),
    "TFLite": (one_file("model.tflite"), LINE.replace(" model ", " model.tflite "), "is a TensorFlow Lite model; convert the SavedModel"),
    "Keras": (one_file("model.keras"), LINE.replace(" model ", " model.keras "), r"is a Keras model; export it: .*export\(DIR\)"),
    "H5": (one_file("model.h5"), LINE.replace(" model ", " model.h5 "), "is a Keras model"),
    "frozen graph": (one_file("frozen.pb"), LINE.replace(" model ", " frozen.pb "), "is a TensorFlow graph; export the model as a SavedModel"),
    "PyTorch": (one_file("model.pt"), LINE.replace(" model ", " model.pt "), "is a PyTorch model; export it to ONNX, then --source_onnx"),
    "engine": (one_file("model.engine"), LINE.replace(" model ", " model.engine "), "is an engine"),
    "text": (one_file("model.txt"), LINE.replace(" model ", " model.txt "), "found a file at model.txt"),
}
#: What TensorFlow, or a look at the files after it has failed, finds.
DAMAGED: dict[str, tuple[Prepare, str]] = {
    "pb empty": (rewrite(lambda data: b"", "saved_model.pb"), "saved_model.pb|serve"),
    "pb truncated": (rewrite(half, "saved_model.pb"), "saved_model.pb"),
    "pb noise": (rewrite(lambda data: bytes(range(256)) * 9, "saved_model.pb"), "saved_model.pb"),
    "pb text": (rewrite(lambda data: b"the quick brown fox\n", "saved_model.pb"), "saved_model.pb"),
    "variables missing": (remove("variables"), r"expected its weights in model/variables/variables\.index, found nothing; copy the whole folder"),
    "index missing": (remove("variables/variables.index"), r"expected its weights in model/variables/variables\.index, found nothing"),
    "data missing": (remove("data"), "expected 1 files variables.data-... in model/variables, found 0; copy the whole folder"),
    "data empty": (rewrite(lambda data: b"", "data"), r"cannot load it \(variables: .*copy or export the whole folder again"),
    "data truncated": (rewrite(half, "data"), r"cannot load it \(variables: .*copy or export the whole folder again"),
    "data changed": (rewrite(flipped, "data"), r"cannot load it \(variables: .*copy or export the whole folder again"),
    "index empty": (rewrite(lambda data: b"", "variables/variables.index"), r"cannot load it \(variables: "),
    "index truncated": (rewrite(half, "variables/variables.index"), r"cannot load it \(variables: "),
}
# fmt: on


@pytest.mark.parametrize("name", PLACES)
def test_what_is_named_in_place_of_a_saved_model(name: str, tmp_path: Path, capsys: Any) -> None:
    prepare, line, text = PLACES[name]
    prepare(tmp_path)
    outcome = fault_desk.run(tmp_path, line, capsys)
    fault_desk.check_one_line(outcome, 1, "--saved_model: expected a SavedModel folder", text)
    assert outcome.left == ()


def test_a_saved_model_is_found_below_and_by_its_file(tmp_path: Path) -> None:
    files("export/saved_model/saved_model.pb", "other/notes.txt")(tmp_path)
    found = tmp_path / "model" / "export" / "saved_model"
    assert find_saved_model(tmp_path / "model") == found
    assert find_saved_model(found / "saved_model.pb") == found
    files("a/b/c/d/saved_model.pb")(tmp_path / "deep")
    with pytest.raises(FileNotFoundError, match="found a folder without one at"):
        find_saved_model(tmp_path / "deep" / "model")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_saved_model_is_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    prepare, text = DAMAGED[name]
    prepare(tmp_path)
    outcome = fault_desk.run(tmp_path, LINE, capsys)
    fault_desk.check_one_line(outcome, 1, "model: expected", text)
    assert outcome.left == ()


# ---- signatures


def save(path: Path, names: dict[str, str]) -> None:
    """A model of one convolution whose functions have these names -> what they return."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = tf.Variable(tf.ones([3, 3, 3, 4]))

    def function(kind: str) -> Any:
        @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32, "images")])
        def serve(images: Any) -> dict[str, Any]:
            tf.debugging.assert_non_negative(images)  # leaves NoOp and Assert in the graph
            found = tf.nn.conv2d(images, module.weights, 1, "SAME")
            if kind == "heads":
                return {"head": found}
            return {"output_0": tf.reshape(tf.reduce_mean(found, [1, 2]), [-1, 4, 1]) * tf.ones([1, 1, 7])}  # fmt: skip

        return serve

    functions = {name: function(kind) for name, kind in names.items()}
    tf.saved_model.save(module, str(path), signatures=functions)


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        ({"detect": "heads", "embed": "heads"}, "", r"expected the signature 'serving_default', found detect, embed; name one of them, create_onnx\.py --signature NAME"),
        ({"serving_default": "heads"}, "--signature detect", "expected the signature 'detect', found serving_default; name one of them"),
        ({}, "", "expected the signature 'serving_default', found none; export the model with one"),
    ],
)  # fmt: skip
def test_signatures(
    names: dict[str, str], options: str, text: str, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    save(tmp_path / "model", names)
    outcome = fault_desk.run(tmp_path, f"{LINE} {options}", capsys)
    fault_desk.check_one_line(outcome, 1, "model: ", text)
    assert outcome.left == ()


@pytest.mark.parametrize(
    ("names", "options"),
    [({"detect": "heads"}, ""), ({"serving_default": "heads", "detect": "heads"}, "--signature detect")],
)  # fmt: skip
def test_another_signature_is_taken_and_a_network_alone_is_no_detector(
    names: dict[str, str], options: str, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    save(tmp_path / "model", names)
    outcome = fault_desk.run(tmp_path, f"{LINE} {options}", capsys)
    line = fault_desk.check_one_line(outcome, 1, "model")
    assert not re.search("signature", line), line
    assert outcome.left == ()


def test_nodes_without_a_result_are_none_of_the_ends(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    import numpy as np

    from trtdet.parity.trained import find_detections
    from trtdet.sources.saved_model import SavedModelSource

    save(tmp_path / "model", {"serving_default": "rows"})
    with SavedModelSource(tmp_path / "model") as source:
        without = [node for node in source.graph.nodes.values() if not node.outputs]
        assert all(node.op in ("NoOp", "Assert") for node in without)
        (name,) = source.graph.inputs
        tensor = find_detections(source, {name: np.ones((1, 32, 32, 3), np.float32)})
        assert source.run([tensor], {name: np.ones((1, 32, 32, 3), np.float32)})[0].shape == (1, 4, 7)  # fmt: skip


# ---- pictures that a model cannot take


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--own_nms"])
@pytest.mark.parametrize("size", [(20000, 50), (500, 1)])
def test_compare_goes_on_after_a_picture_that_the_model_cannot_take(
    size: tuple[int, int], options: str, tiny_onnx: Path, tmp_path: Path, capsys: Any
) -> None:
    """AutoML's own preprocessing scales the shorter side to nothing."""
    shutil.copytree(EXAMPLES / "images", tmp_path / "in")
    Image.new("RGB", size).save(tmp_path / "in" / "zz.png")
    limits = "--max_missing 1 --max_extra 100 --max_score_diff 1 --max_box_diff 1000 --max_flips 1"
    line = f"compare --reference {SOUND} --candidate {tiny_onnx} --input in --json out.json {limits} {options}"
    outcome = fault_desk.run(tmp_path, line, capsys)
    assert outcome.status == 3, outcome.err
    (skipped,) = [text for text in outcome.err.splitlines() if "skipped" in text]
    assert re.match(r"W skipped: in/zz\.png: .*must be positive", skipped), skipped
    assert len(skipped) < 300
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["images"] == len(list((EXAMPLES / "images").iterdir()))
