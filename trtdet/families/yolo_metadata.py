# SPDX-License-Identifier: Apache-2.0
"""What Ultralytics and YOLOv5 write into the metadata of an export."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from trtdet.errors import GraphError

#: Values of a row beside boxes and scores that are left out, by the task in the metadata.
LEFT_OUT = {"segment": "masks", "pose": "keypoints"}


@dataclass(frozen=True)
class Metadata:
    """What an exporter wrote into `metadata_props`; empty where it wrote nothing."""

    names: tuple[str, ...] = ()
    stride: int = 0
    task: str = "detect"
    size_hw: tuple[int, int] | None = None
    end_to_end: bool = False
    nms_inside: bool = False

    @property
    def is_rotated(self) -> bool:
        return self.task == "obb"


def read_metadata(model: onnx.ModelProto) -> Metadata:
    """The metadata of an export.

    Raises:
        GraphError: names that are neither a list nor a dictionary of all class ids.
    """
    found = {prop.key: prop.value for prop in model.metadata_props}
    names = _literal(found, "names") or ()
    if isinstance(names, Mapping):
        names = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in names.items()}
        if sorted(names) != list(range(len(names))):
            raise GraphError(
                f"metadata 'names': expected one name for each class id from 0, found the ids {sorted(names)[:5]}"
            )
        names = [names[i] for i in range(len(names))]
    size = _literal(found, "imgsz")
    arguments = _literal(found, "args")
    stride = _literal(found, "stride")
    return Metadata(
        names=tuple(str(name) for name in names),
        stride=int(max(np.ravel(stride))) if stride else 0,
        task=found.get("task", "detect"),
        size_hw=(int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else None,
        end_to_end=_literal(found, "end2end") is True,
        nms_inside=isinstance(arguments, dict) and arguments.get("nms") is True,
    )


def _literal(found: Mapping[str, str], key: str) -> Any:
    """A value that was written as Python's `repr`; None where there is none.

    Raises:
        GraphError: it is not a literal.
    """
    if key not in found:
        return None
    try:
        return ast.literal_eval(found[key])
    except (ValueError, SyntaxError) as error:
        raise GraphError(
            f"metadata '{key}': expected a number, list or dictionary, found {found[key][:60]!r}; export the model again"
        ) from error
