# SPDX-License-Identifier: Apache-2.0
"""precision.json: which convolutions of a model stay out of its 8-bit type. tune_precision.py writes it, build_engine.py reads it.

    {"schema": 1, "model_sha256": "<as in a calibration cache's sidecar>", "precision": "int8",
     "keep": {"*/blocks_0/*": "fp16", "box_net/box-predict*": "fp32"}, "note": "..."}

`keep` is of node names or patterns (`*`, `?`), in the order in which they are tried.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from trtdet import files
from trtdet.precision.options import KeptType

SCHEMA = 1


@dataclass(frozen=True)
class PrecisionFile:
    """The contents of a precision.json.

    Attributes:
        model_sha256: `trtdet.precision.body.Body.sha256` of the model it was made for.
        precision: "int8", of what is not kept.
        keep: name or pattern -> the type it stays in.
        note: for the reader.
    """

    model_sha256: str
    precision: str
    keep: dict[str, KeptType] = field(default_factory=dict)
    note: str = ""

    def write(self, path: Path) -> None:
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        files.write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PrecisionFile":
        """
        Raises:
            ValueError: fields missing or of the wrong kind.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"expected schema {SCHEMA}, found {found}")
        model, precision = data.get("model_sha256"), data.get("precision")
        keep, note = data.get("keep"), data.get("note", "")
        if not (isinstance(model, str) and isinstance(precision, str) and isinstance(note, str)):
            raise ValueError("expected model_sha256, precision and note as text")
        if not isinstance(keep, Mapping):
            raise ValueError(f"expected keep as an object, found {type(keep).__name__}")
        kinds = get_args(KeptType)
        wrong = {name: kind for name, kind in keep.items() if kind not in kinds}
        if wrong:
            name, kind = next(iter(wrong.items()))
            raise ValueError(f"keep '{name}': expected {' or '.join(kinds)}, found {kind!r}")
        return cls(model, precision, dict(keep), note)


def read_precision_file(path: Path, *, model_sha256: str, precision: str) -> PrecisionFile:
    """Read what was written for this model and this precision.

    Raises:
        OSError, ValueError: nothing there, not a precision.json, or made for something else; says what to run.
    """
    files.check_input(path, "--precision_json", "a precision.json of tune_precision.py")
    try:
        found = PrecisionFile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSON's and Unicode's among them
        raise ValueError(
            f"--precision_json {path}: not a precision.json: {error}; write it with tune_precision.py"
        ) from error
    if found.model_sha256 != model_sha256:
        raise ValueError(
            f"--precision_json {path} was made for another model: model_sha256 is {found.model_sha256[:12]}, of another graph or other "
            f"weights than {model_sha256[:12]}; tune this model with tune_precision.py, or leave it out"
        )
    if found.precision != precision:
        raise ValueError(
            f"--precision_json {path} was made for --precision {found.precision}, not {precision}; tune again with tune_precision.py, "
            f"or use --precision {found.precision}"
        )
    return found
