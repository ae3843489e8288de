# SPDX-License-Identifier: Apache-2.0
"""TensorRT's calibration cache, and the JSON beside it that says which model, preprocessing and
images it belongs to.
"""

import dataclasses
import hashlib
import json
import logging
import re
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trtdet import about, checks, files, reading
from trtdet.precision.histograms import ChannelRow, ChannelStatistics
from trtdet.precision.objective import Damage
from trtdet.precision.options import DEFAULT_SEED, Method
from trtdet.precision.rounding import Rounding
from trtdet.precision.scales import INT8
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)


#: TensorRT checks the algorithm in the first line against the calibrator that reads the cache;
#: trtexec, DeepStream and the DLA read it with this one, however the scales came about.
CACHE_ALGORITHM = "EntropyCalibration2"
DEFAULT_CACHE_VERSION = (8, 6, 1)


# ---- the cache


@dataclass(frozen=True)
class Origin:
    """What a cache was measured on: the contents of `<cache>.json` but for the statistics.

    Attributes:
        model: `trtdet.precision.body.Body.sha256`; neither NMS nor the batch size is in it.
        preprocessing: how images become the input; its hash is compared, its fields explain a
            difference.
        images: SHA-256 over the contents of the images, whatever their names and order; empty: not
            known.
        count: images seen.
    """

    model: str
    preprocessing: dict[str, Any]
    images: str
    count: int
    method: Method
    seed: int = DEFAULT_SEED

    @property
    def preprocessing_hash(self) -> str:
        """Of what differs from the defaults: a field that a later version adds does not make
        older caches useless.
        """
        defaults = _preprocessing_defaults()
        return _hash_json({k: v for k, v in self.preprocessing.items() if defaults.get(k) != v})

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_sha256": self.model,
            "preprocessing_sha256": self.preprocessing_hash,
            "images_sha256": self.images,
            "num_images": self.count,
            "method": self.method,
            "seed": self.seed,
            "preprocessing": self.preprocessing,
        }

    def differences(self, wanted: "Origin", *, any_method: bool = False) -> list[str]:
        """What keeps a cache of this origin from serving `wanted`, a sentence each.

        Empty `images` in `wanted` fit all.
        """
        found = []
        if self.model != wanted.model:
            found.append(
                f"model_sha256 is {self.model[:12]}, of another graph or other weights than {wanted.model[:12]}"
            )
        if self.preprocessing_hash != wanted.preprocessing_hash:
            known = _preprocessing_defaults() | self.preprocessing
            fields = [
                f"{key} {known.get(key)} instead of {value}"
                for key, value in wanted.preprocessing.items()
                if known.get(key) != value
            ]
            found.append(
                f"preprocessing_sha256 is {self.preprocessing_hash[:12]}, not {wanted.preprocessing_hash[:12]} "
                f"({', '.join(fields)})"
            )
        if self.method != wanted.method and not any_method:
            found.append(f"method is {self.method}, not {wanted.method}")
        if wanted.images and self.images != wanted.images:
            found.append(
                f"images_sha256 is {self.images[:12] or 'unknown'}, of {self.count} other images than {wanted.images[:12]}"
            )
        return found


# ---- what a cache belongs to


def origin(
    model_sha256: str,
    preprocessing: Preprocessing,
    images: Sequence[Path] | None,
    method: Method,
    seed: int = DEFAULT_SEED,
) -> Origin:
    """What a calibration with these arguments will say of itself.

    `images` None: whatever there are.
    """
    fixed = preprocessing.at(preprocessing.size_hw)  # whatever else the model or the engine takes
    fields = json.loads(json.dumps(fixed.__dict__))  # tuples to lists, as read back
    paths = images or ()
    return Origin(
        model_sha256, fields, image_hash(paths) if paths else "", len(paths), method, seed
    )


@dataclass(frozen=True)
class CalibrationCache:
    """Scales of activations, and what is known beyond them.

    Attributes:
        scales: tensor -> largest magnitude / 127, exactly as float32.
        channels: tensor -> statistics per channel, of the inputs of convolutions; empty for caches
            of other programs.
        origin: None for caches of other programs.
        costs: name of a type of 8 bits -> convolution -> what it does alone in that type; as far as
            it was measured.
        rounding: convolution -> how its weights are rounded to INT8, where that is not to the
            nearest.
    """

    scales: dict[str, float]
    channels: dict[str, ChannelStatistics] = field(default_factory=dict, repr=False)
    origin: Origin | None = None
    costs: dict[str, dict[str, Damage]] = field(default_factory=dict, repr=False)
    rounding: dict[str, Rounding] = field(default_factory=dict, repr=False)

    def amax(self, tensor: str) -> float:
        """The largest magnitude of a tensor that its scale represents; 0 where there is none."""
        return INT8.amax(self.scales.get(tensor, 0.0))

    @classmethod
    def from_text(cls, text: str) -> "CalibrationCache":
        """Parse TensorRT's format; a tensor's name may itself hold colons and spaces.

        Raises:
            ValueError: not a calibration cache; names the line.
        """
        header, *lines = text.splitlines() or [""]
        if not re.fullmatch(r"TRT-\w+-\w+", header.strip()):
            raise ValueError(
                f"expected a first line like TRT-8601-{CACHE_ALGORITHM}, found {header[:60]!r}"
            )
        scales: dict[str, float] = {}
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            name, colon, digits = line.rpartition(":")
            if not colon or not re.fullmatch(r"[0-9a-fA-F]{8}", digits.strip()):
                raise ValueError(
                    f"line {number}: expected 'tensor: 8 hex digits', found {line[:60]!r}"
                )
            (scale,) = struct.unpack("!f", bytes.fromhex(digits.strip()))
            if not np.isfinite(scale) or scale < 0:
                raise ValueError(f"line {number}: expected a scale of at least 0, found {scale}")
            scales[name.strip()] = scale
        if not scales:
            raise ValueError("expected one line per tensor, found none")
        return cls(scales)

    def to_text(self, version: Sequence[int] = DEFAULT_CACHE_VERSION) -> str:
        """TensorRT's format for one of its versions, which it checks: 8.6.1 is TRT-8601, 10.13.3
        is TRT-101303.
        """
        lines = [header(version)]
        lines += [f"{name}: {struct.pack('!f', s).hex()}" for name, s in self.scales.items()]
        return "\n".join(lines) + "\n"

    def write(self, path: Path, version: Sequence[int] = DEFAULT_CACHE_VERSION) -> None:
        """Write the cache and, where the origin is known, `<cache>.json`, each whole or not at all.

        The sidecar goes first: without it the cache would be taken for one of another program,
        unchecked. Where the work ends between the two, the sidecar's hash does not fit the cache
        beside it, or there is none.
        """
        if self.origin is None:
            sidecar_path(path).unlink(missing_ok=True)
        else:
            self.write_sidecar(path)
        files.write_text(path, self.to_text(version))

    def write_sidecar(self, path: Path) -> None:
        """`<cache>.json` of the cache at `path`, alone: what is known beyond its scales has grown.

        Nothing for a cache of another program.
        """
        if self.origin is None:
            return
        data = {
            "schema": _Sidecar.SCHEMA,
            "tool": f"trtdet {about.__version__}",
            "scales_sha256": _hash_text(_scale_lines(self.to_text())),
            **self.origin.to_dict(),
            "costs": {
                kind: {name: dataclasses.asdict(damage) for name, damage in costs.items()}
                for kind, costs in self.costs.items()
            },
            "rounding": {name: dataclasses.asdict(row) for name, row in self.rounding.items()},
            "channels": {name: c.to_dict() for name, c in self.channels.items()},
        }
        files.write_text(sidecar_path(path), json.dumps(data, indent=1) + "\n")


def version_number(version: Sequence[int]) -> int:
    """NV_TENSORRT_VERSION: 8.6.1 -> 8601; from 10 on two more digits, 10.13.3 -> 101303."""
    major, minor, patch = (*version, 0, 0, 0)[:3]
    return major * (1000 if major < 10 else 10000) + minor * 100 + patch


def header(version: Sequence[int]) -> str:
    """The first line of a cache for a version of TensorRT, which takes no other."""
    return f"TRT-{version_number(version)}-{CACHE_ALGORITHM}"


def needs_header(path: Path, version: Sequence[int]) -> bool:
    """Whether a cache is one for another version of TensorRT.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(1000).strip() != header(version)


def write_header(path: Path, version: Sequence[int]) -> bool:
    """Make a cache one for another version of TensorRT: the scales, and the sidecar, stay.

    Returns whether it was one for another.
    """
    if not needs_header(path, version):
        return False
    _, newline, rest = path.read_text(encoding="utf-8").partition("\n")
    files.write_text(path, header(version) + newline + rest)
    return True


def sidecar_path(path: Path) -> Path:
    """`d0.cache` -> `d0.cache.json`"""
    return path.with_name(path.name + ".json")


def read_cache(
    path: Path, wanted: Origin | None = None, *, any_method: bool = False
) -> CalibrationCache:
    """Read a cache, and refuse one that was measured on something else.

    Args:
        wanted: what it is to be used for; None: taken as it is.
        any_method: its method need not be that of `wanted`.

    Raises:
        OSError, ValueError: not readable, or measured on something else; says what differs and what
            to run.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        cache = CalibrationCache.from_text(text)
    except ValueError as error:
        raise ValueError(
            f"--calib_cache {path}: not a TensorRT calibration cache: {error}; delete it, or name another"
        ) from error
    sidecar = sidecar_path(path)
    if not files.is_beside(sidecar):
        logger.warning(
            "%s has no %s beside it (NVIDIA's tools write none): not checked whether it belongs to this model and images, "
            "and scales are per tensor only, which costs accuracy",
            path,
            sidecar.name,
        )
        return cache
    cache = _with_sidecar(cache, text, sidecar)
    if wanted is not None and cache.origin is not None:
        differences = cache.origin.differences(wanted, any_method=any_method)
        if differences:
            raise ValueError(
                f"--calib_cache {path} does not fit: {'; '.join(differences)}; "
                "calibrate again with --calib_input and another --calib_cache, or delete this one"
            )
    return cache


def check_tensors(path: Path, cache: CalibrationCache, inputs: Collection[str]) -> None:
    """Tell a cache without a sidecar of this model from one of another: by its tensors.

    Args:
        inputs: of the convolutions that can be quantized.

    Raises:
        ValueError: it lacks inputs of convolutions.
    """
    missing = sorted({*inputs} - cache.scales.keys())
    if missing:
        raise ValueError(
            f"--calib_cache {path}: {len(missing)} of {len(inputs)} inputs of convolutions are not in it ({', '.join(missing[:2])}); it belongs to "
            "another model, or another export of this one: calibrate again with --calib_input and another --calib_cache"
        )


@dataclass(frozen=True)
class _Sidecar:
    """`<cache>.json`."""

    SCHEMA: ClassVar[int] = 1

    scales_sha256: str
    model_sha256: str
    images_sha256: str
    num_images: int
    method: Method
    seed: int
    preprocessing: dict[str, Any]
    channels: dict[str, ChannelRow]
    costs: dict[str, dict[str, Damage]] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.whole("num_images", self.num_images, 0, 2**31)
        checks.whole("seed", self.seed, 0, 2**63)
        for kind, costs in self.costs.items():
            for name, damage in costs.items():
                for value in dataclasses.astuple(damage):
                    checks.finite(f"costs, {kind}, {name}", value, 0, 1e300)

    @property
    def origin(self) -> Origin:
        return Origin(
            self.model_sha256,
            self.preprocessing,
            self.images_sha256,
            self.num_images,
            self.method,
            self.seed,
        )


def _with_sidecar(cache: CalibrationCache, text: str, path: Path) -> CalibrationCache:
    remedy = "calibrate again, or delete the .json to use the scales unchecked"
    found: _Sidecar = reading.read(path, _Sidecar, remedy=remedy)
    place = f"{path}: preprocessing"
    reading.convert(_preprocessing_defaults() | found.preprocessing, Preprocessing, name=place, remedy=remedy)  # fmt: skip
    if found.scales_sha256 != _hash_text(_scale_lines(text)):
        raise ValueError(
            f"{path}: does not belong to the cache beside it: scales_sha256 is that of other scales than stand in the cache; {remedy}"
        )
    channels = {name: row.statistics for name, row in found.channels.items()}
    return CalibrationCache(cache.scales, channels, found.origin, found.costs, found.rounding)


def _scale_lines(text: str) -> str:
    """The cache less its first line: other versions of TensorRT get another header, not other
    scales.
    """
    return "\n".join(line.strip() for line in text.splitlines()[1:] if line.strip())


def _preprocessing_defaults() -> dict[str, Any]:
    """As JSON has them; of a cache that does not mention a field, its value."""
    defaults = {f.name: f.default for f in dataclasses.fields(Preprocessing)}
    return json.loads(
        json.dumps({k: v for k, v in defaults.items() if v is not dataclasses.MISSING})
    )


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _hash_json(data: Any) -> str:
    return _hash_text(json.dumps(data, sort_keys=True, separators=(",", ":")))


def image_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of some images, in whatever order and under whatever names."""
    return _hash_text("\n".join(sorted(files.sha256(path) for path in paths)))
