# SPDX-License-Identifier: Apache-2.0
"""Where a SavedModel lies, found without TensorFlow: what people name is often a folder above
it, or a file in it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from trtdet import files
from trtdet.errors import GraphError

logger = logging.getLogger(__name__)

#: The file that makes a folder a SavedModel.
GRAPH_FILE = "saved_model.pb"
#: Folders below the one that is named are searched so deep.
DEPTH = 3

#: Files in place of a SavedModel -> what to do with them.
OTHERS = {
    ".tflite": "a TensorFlow Lite model; convert the SavedModel that it was made of",
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "a Keras model; export it: keras.saving.load_model(FILE).export(DIR)"),
    **dict.fromkeys((".pt", ".pth"), "a PyTorch model; export it to ONNX, then --source_onnx FILE"),
    ".pb": "a TensorFlow graph; export the model as a SavedModel, a folder with saved_model.pb in it",
    ".index": "a part of a checkpoint; export the model as a SavedModel",
    ".engine": "an engine, which is built of an ONNX file; convert the model that was trained",
}  # fmt: skip


def find_saved_model(path: Path, option: str = "--saved_model") -> Path:
    """The folder of a SavedModel: `path` itself, the one that its `saved_model.pb` is in, or the
    only one below.

    Raises:
        FileNotFoundError, GraphError: there is none, several, or something else; says what to do.
    """
    if path.is_file() and path.name == GRAPH_FILE:
        return path.parent
    if (path / GRAPH_FILE).is_file():
        return path
    expected = f"{option}: expected a SavedModel folder (with {GRAPH_FILE}) or an .onnx file"
    if not path.is_dir():
        if path.is_file() and (what := OTHERS.get(path.suffix.lower())):
            raise GraphError(f"{expected}, {path} is {what}")
        raise FileNotFoundError(f"{expected}, found {files.found_at(path)} at {path}")
    found = _below(path)
    if len(found) == 1:
        logger.info("%s: taking the SavedModel in it, %s", path, found[0])
        return found[0]
    if found:
        names = ", ".join(map(str, found[:4]))
        raise GraphError(f"{expected}, found {len(found)} in {path}; name one: {names}")
    raise FileNotFoundError(f"{expected}, found a folder without one at {path}{_advice(path)}")


def _below(folder: Path) -> list[Path]:
    """Folders of SavedModels in a folder, the nearest alone."""
    found = []
    for inner, folders, names in os.walk(folder):
        here = Path(inner)
        if GRAPH_FILE in names:
            found.append(here)
        if GRAPH_FILE in names or len(here.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        folders.sort()
    return sorted(found)


def _advice(folder: Path) -> str:
    """What a folder without a SavedModel has that looks like a model."""
    if models := sorted(folder.glob("*.onnx")):
        return f"; there is an ONNX file in it: --source_onnx {models[0]}"
    if (folder / "saved_model.pbtxt").is_file():
        return (
            f"; it has saved_model.pbtxt, text in place of {GRAPH_FILE}: export it again as binary"
        )
    if any(folder.glob("*.index")) or (folder / "checkpoint").is_file():
        return "; it has a checkpoint: export the model as a SavedModel first"
    for suffix, what in OTHERS.items():
        if others := sorted(folder.glob(f"*{suffix}")):
            return f"; {others[0].name} in it is {what}"
    return ""


def missing_variables(folder: Path) -> str:
    """What is wrong with the files of the weights, as far as their names tell; "" where nothing
    is.
    """
    variables = folder / "variables"
    index = variables / "variables.index"
    if not variables.is_dir() or not index.is_file():
        return (
            f"expected its weights in {index}, found {files.found_at(index)}; copy the whole folder"
        )
    shards = sorted(variables.glob("variables.data-*-of-*"))
    count = int(shards[0].name.rpartition("-of-")[2]) if shards and shards[0].name[-5:].isdecimal() else 1  # fmt: skip
    if len(shards) < count:
        return f"expected {count} files variables.data-... in {variables}, found {len(shards)}; copy the whole folder"
    return ""
