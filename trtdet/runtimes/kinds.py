# SPDX-License-Identifier: Apache-2.0
"""What a file is that is named as a model, before anything is loaded."""

import re
from pathlib import Path

from trtdet import files
from trtdet.engine.sidecar import read_info, sidecar_path
from trtdet.errors import GraphError

#: Suffixes of models as they are trained -> how they get here.
AS_TRAINED = {
    ".pb": "a TensorFlow graph; convert the SavedModel folder that it is of: create_onnx.py --saved_model DIR",
    **dict.fromkeys((".pt", ".pth"), "a PyTorch model; export it to ONNX, then convert that: create_onnx.py --source_onnx FILE"),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "a Keras model; export it as SavedModel, then convert that: create_onnx.py --saved_model DIR"),
    ".tflite": "a TensorFlow Lite model; convert the SavedModel that it was made of: create_onnx.py --saved_model DIR",
    ".json": "a JSON file; name the engine that it stands beside",
}  # fmt: skip


#: What a stage takes, in words.
ONNX = "an ONNX file"
RUNNABLE = "an engine or an ONNX file"
#: How an ONNX file begins: protobuf's field 1, the version of its format, and a field of text or
#: messages.
LIKE_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a2:B]")


def check_model(path: Path, option: str = "--model", what: str = RUNNABLE) -> None:
    """Tell an engine or an ONNX file from what is given in its place.

    Args:
        what: the stage takes, in words.

    Raises:
        FileNotFoundError: nothing there.
        GraphError: a SavedModel, another kind of model, or no model at all; says what to do with
            it.
    """
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            raise GraphError(
                f"{option}: expected {what}, {path} is a SavedModel; convert it: "
                f"create_onnx.py --saved_model {path} --onnx {path.name}.onnx"
            )
        raise GraphError(f"{option}: expected {what}, found a folder at {path}")
    files.check_input(path, option, what)
    suffix = path.suffix.lower()
    if suffix in AS_TRAINED:
        raise GraphError(f"{option}: expected {what}, {path} is {AS_TRAINED[suffix]}")
    if suffix != ".onnx":
        check_engine(path, option, what)


def check_engine(path: Path, option: str, what: str) -> None:
    """Tell an engine from other files by how they begin, before a GPU is looked for; one with its
    .json is taken for what that says.

    Args:
        what: the stage takes, in words.

    Raises:
        EngineError, ValueError: its .json cannot be read.
        GraphError: it is a picture, text, an archive, an ONNX file, or empty.
    """
    if files.is_beside(sidecar := sidecar_path(path)):
        read_info(sidecar)
        return
    with open(path, "rb") as file:
        start = file.read(512)
    found = "an ONNX file (name it .onnx)" if LIKE_ONNX.match(start) else files.kind_of(start)
    if found:
        raise GraphError(f"{option}: expected {what}, {path} is {found}")
