# SPDX-License-Identifier: Apache-2.0
"""The two models of a comparison, opened: each is an original, a converted file or an engine."""

from contextlib import ExitStack
from pathlib import Path

import onnx

from trtdet import files
from trtdet.onnx_files import EXPORT_AGAIN, naming, read_onnx
from trtdet.parity.base import Side
from trtdet.parity.converted import open_converted
from trtdet.parity.trained import TrainedSide
from trtdet.run.options import RunOptions
from trtdet.runtimes.kinds import check_engine
from trtdet.sources.saved_model_folder import find_saved_model
from trtdet.spec import ModelSpec

#: The options that name the two models.
SIDES = ("--reference", "--candidate")

#: What compare.py takes.
COMPARABLE = "a SavedModel, an ONNX file or an engine"


def open_sides(
    paths: tuple[Path, Path], options: RunOptions, stack: ExitStack, *, own_nms: bool = False
) -> tuple[Side, Side]:
    """Reference and candidate, entered into `stack`.

    One that was converted is opened first: the other follows its choices.

    Raises:
        FileNotFoundError, GraphError, EngineError: one is no model, or cannot be run here.
    """
    sides: dict[int, Side] = {}
    like = None
    models = [read_graph(*named) for named in zip(paths, SIDES, strict=True)]
    trained = [is_as_trained(*pair) for pair in zip(paths, models, strict=True)]
    for i in sorted(range(len(paths)), key=trained.__getitem__):
        model, models[i] = models[i], None  # not kept longer than its side needs it
        with naming(paths[i]):
            if trained[i]:
                sides[i] = TrainedSide(paths[i], own_nms=own_nms, like=like, model=model)
            else:
                sides[i] = open_converted(paths[i], options, model)
                like = sides[i].info.spec
        stack.enter_context(sides[i])
    return sides[0], sides[1]


def read_graph(path: Path, option: str) -> onnx.ModelProto | None:
    """What stands in an ONNX file, external data left in its files.

    None for a SavedModel and an engine.

    Raises:
        FileNotFoundError, GraphError: it is none of these.
    """
    if path.is_dir():
        find_saved_model(path, option)
        return None
    files.check_input(path, option, COMPARABLE)
    if path.suffix.lower() == ".onnx":
        return read_onnx(path, remedy=EXPORT_AGAIN, weights=False)
    check_engine(path, option, COMPARABLE)
    return None


def is_as_trained(path: Path, model: onnx.ModelProto | None) -> bool:
    """Whether this is a SavedModel or an ONNX file that create_onnx.py has not made."""
    if model is None:
        return path.is_dir()
    return ModelSpec.maybe_from_onnx(model) is None
