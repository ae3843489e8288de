# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a precision. Standard library only: the command lines read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

# ---- the precision

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
#: Those of 8 bits, which take scales.
QUANTIZED_PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")

#: Of what is not in 8 bits.
Rest = Literal["fp16", "fp32"]
RESTS: tuple[Rest, ...] = get_args(Rest)

#: Of nodes that are named.
KeptType = Literal["fp16", "fp32"]

# ---- where scales come from

Method = Literal["entropy", "minmax", "percentile", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_METHOD: Method = "mse"
#: FP8 has small numbers for small values: what reaches furthest need not be cut off to have them.
FP8_METHOD: Method = "minmax"

Provider = Literal["auto", "cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

DEFAULT_NUM_IMAGES = 500
DEFAULT_SEED = 47  # of NVIDIA's sample
#: Images that calibration runs at a time, where the model's batch is dynamic. On a CPU 8 take five
#: times the memory (D0: 4.2 GiB) and twice the time per image.
CALIBRATION_BATCH = 1
#: What the rest of 20 % brings and costs: docs/int8.md.
DEFAULT_SHARE = 0.8


@dataclass(frozen=True)
class Int8Options:
    """Where the scales of INT8 and FP8 come from, and what stays out of them.

    Attributes:
        images: an image or a folder of them; None: the cache alone.
        cache: read where it exists, else written; None: the scales are not kept.
        num_images, fraction: at most so many images, and at most this share of all.
        batch_size: None: `CALIBRATION_BATCH`, or one by one where the model's batch is fixed.
        cache_version: of TensorRT, for whom the cache is written, and an existing one made over;
            None: the one that builds, or 8.6.1.
        method: None: whatever an existing cache was made with; for a new one the default of the
            precision.
        provider: what of ONNX Runtime calibrates.
        keep_fp16, keep_fp32: patterns of node names, beside the model's own `sensitive_nodes`,
            which stay in FP16.
        precision_file: more of them, from tune_precision.py.
        share: of all multiply-accumulates, how much stays in 8 bits at least; which convolutions
            leave it is measured. None: `DEFAULT_SHARE`, but 1 where `keep_...` or `precision_file`
            say what stays out, or where there are no images to measure on.
    """

    images: Path | None = None
    cache: Path | None = None
    cache_version: tuple[int, ...] | None = None
    num_images: int = DEFAULT_NUM_IMAGES
    fraction: float = 1.0
    batch_size: int | None = None
    method: Method | None = None
    seed: int = DEFAULT_SEED
    provider: Provider = "auto"
    keep_fp16: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    precision_file: Path | None = None
    share: float | None = None
