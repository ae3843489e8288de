# SPDX-License-Identifier: Apache-2.0
"""precision.json: which convolutions of a model stay out of its 8-bit type. tune_precision.py
writes it, build_engine.py reads it.

    {"schema": 1, "model_sha256": "<as in a calibration cache's sidecar>", "precision": "int8",
     "keep": {"*/blocks_0/*": "fp16", "box_net/box-predict*": "fp32"}, "note": "..."}

`keep` is of node names or patterns (`*`, `?`), in the order in which they are tried.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trtdet import checks, files, reading
from trtdet.checks import shown
from trtdet.precision.options import KeptType


@dataclass(frozen=True)
class PrecisionFile:
    """The contents of a precision.json.

    Attributes:
        model_sha256: `trtdet.precision.body.Body.sha256` of the model it was made for.
        precision: "int8", of what is not kept.
        keep: name or pattern -> the type it stays in.
        note: for the reader.
    """

    SCHEMA: ClassVar[int] = 1

    model_sha256: str
    precision: str
    keep: dict[str, KeptType]
    note: str = ""

    def __post_init__(self) -> None:
        checks.text("precision", self.precision)
        for pattern in self.keep:
            checks.text("keep", pattern, checks.LONG_TEXT)

    def write(self, path: Path) -> None:
        data = {"schema": self.SCHEMA, **dataclasses.asdict(self)}
        files.write_text(path, json.dumps(data, indent=1) + "\n")


def read_precision_file(path: Path, *, model_sha256: str, precision: str) -> PrecisionFile:
    """Read what was written for this model and this precision.

    Raises:
        OSError, ValueError: nothing there, not a precision.json, or made for something else; says
            what to run.
    """
    files.check_input(path, "--precision_json", "a precision.json of tune_precision.py")
    remedy = "write it with tune_precision.py"
    found: PrecisionFile = reading.parse(
        path.read_bytes(), PrecisionFile, name=f"--precision_json {path}", remedy=remedy
    )
    if found.model_sha256 != model_sha256:
        raise ValueError(
            f"--precision_json {path} was made for another model: model_sha256 is {shown(found.model_sha256[:12])}, of another graph or other "
            f"weights than {model_sha256[:12]}; tune this model with tune_precision.py, or leave it out"
        )
    if found.precision != precision:
        raise ValueError(
            f"--precision_json {path} was made for --precision {shown(found.precision)}, not {precision}; tune again with tune_precision.py, "
            f"or use --precision {shown(found.precision)}"
        )
    return found
