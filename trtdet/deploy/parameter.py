# SPDX-License-Identifier: Apache-2.0
"""The JSON that the Python models of an ensemble read from their configuration.

It is read on the server too, which has no msgspec: there the schema number is checked here and the
values by the dataclasses. `trtdet.deploy.triton_check` reads it by `trtdet.reading` as everything
else.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

from trtdet.spec import ModelSpec, Nms, Preprocessing

T = TypeVar("T")

#: Its key among the parameters of a configuration.
PARAMETER = "trtdet"
SCHEMA = 1
REMEDY = "write the repository again with deploy.py triton"


@dataclass(frozen=True)
class PreprocessParameter:
    """What the model before the detector is told."""

    SCHEMA: ClassVar[int] = SCHEMA

    preprocessing: Preprocessing


@dataclass(frozen=True)
class PostprocessParameter:
    """What the model behind the detector is told: fields of `ModelSpec`, and the size of the
    network input.
    """

    SCHEMA: ClassVar[int] = SCHEMA

    size_hw: tuple[int, int]
    box_order: Literal["yxyx", "xyxy"]
    boxes_normalized: bool
    inclusive_corners: bool
    category_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.size_hw) != 2:
            raise ValueError(f"size_hw: expected height and width, found {self.size_hw}")
        self.spec()  # holds the values against their ranges

    def spec(self) -> ModelSpec:
        """What `trtdet.detections.decode` asks of a spec; the rest is for stages before it."""
        return ModelSpec(
            "",
            Preprocessing(self.size_hw),
            Nms(),
            category_ids=self.category_ids,
            box_order=self.box_order,
            boxes_normalized=self.boxes_normalized,
            inclusive_corners=self.inclusive_corners,
        )


def dumps(parameter: PreprocessParameter | PostprocessParameter) -> str:
    """The parameter as text."""
    return json.dumps({"schema": SCHEMA, **asdict(parameter)}, separators=(",", ":"))


def preprocess_parameter(config: dict[str, Any]) -> PreprocessParameter:
    """The parameter in a model's configuration, as Triton hands it to a Python model.

    Raises:
        ValueError: none there, or of another schema, or values that cannot be.
    """
    return _read(config, lambda f: PreprocessParameter(Preprocessing(**f["preprocessing"])))


def postprocess_parameter(config: dict[str, Any]) -> PostprocessParameter:
    """The same of the model behind the detector."""
    return _read(config, lambda fields: PostprocessParameter(**fields))


def _read(config: dict[str, Any], make: Callable[[dict[str, Any]], T]) -> T:
    try:
        fields = json.loads(config["parameters"][PARAMETER]["string_value"])
        if (found := fields.pop("schema", None)) != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, found {found}")
        return make({name: _tuples(value) for name, value in fields.items()})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.pbtxt: parameter '{PARAMETER}': {type(error).__name__}: {error}; {REMEDY}"
        ) from error


def _tuples(value: Any) -> Any:
    """JSON has no tuples: every list is one."""
    if isinstance(value, dict):
        return {name: _tuples(inside) for name, inside in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
