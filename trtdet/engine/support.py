# SPDX-License-Identifier: Apache-2.0
"""What the TensorRT at hand can do of what is asked."""

from __future__ import annotations

import logging

from trtdet import cuda
from trtdet.engine.flavor import Flavor
from trtdet.engine.options import BuildOptions
from trtdet.errors import EngineError
from trtdet.precision.calibration_cache import DEFAULT_CACHE_VERSION
from trtdet.precision.prepare import Target

logger = logging.getLogger(__name__)


#: The first compute capability with arithmetic in FP8: Ada.
FP8_CAPABILITY = (8, 9)


def check_options(flavor: Flavor, options: BuildOptions) -> None:
    """Refuse what this TensorRT cannot do, before anything is converted.

    Raises:
        EngineError: names the version and the alternative.
    """
    _check_precision(flavor, options)
    if options.compute_capabilities:
        _check_compute_capabilities(flavor, options)
    if options.timing_cache and not flavor.has_timing_cache:
        flavor.refuse("--timing_cache", "leave it out: it times nothing when it builds")
    if options.version_compatible and not flavor.version_compatible:
        flavor.refuse("--version_compatible", "rebuild for each release, or build with --flavor tensorrt")  # fmt: skip
    if options.hardware_compatible and not flavor.hardware_compatible:
        flavor.refuse(
            "--hardware_compatible",
            "leave it out: without --compute_capability its engines run on every RTX GPU from Ampere (8.0) on",
        )
    if "7.5" in options.compute_capabilities:
        flavor.refuse(
            "--compute_capability 7.5",
            "it has no float32 matrix product there, which the NMS without the plugin takes: build on that GPU with --flavor tensorrt",
        )
    if options.strip and not flavor.can_strip_weights:
        flavor.refuse("--strip", "build without it, or with TensorRT 10 or later")
    if options.dla_core is not None and not flavor.has_dla:
        flavor.refuse(
            "--dla_core",
            "leave it out to build for the GPU; DLA takes TensorRT 8.6 to 10.7, or 11.4.1 and later, on a Jetson",
        )


def _check_precision(flavor: Flavor, options: BuildOptions) -> None:
    if options.precision == "bf16" and not flavor.has_bf16:
        flavor.refuse("--precision bf16", "use fp16, or TensorRT 10 or later")
    if options.precision == "bf16" and "7.5" in options.compute_capabilities:
        raise EngineError(
            f"--precision bf16: compute capability 7.5 has no BF16 ({flavor}); use fp16, or 8.0 and later"
        )
    if options.precision == "fp8":
        _check_fp8(flavor, options)
    if options.weak_typing and not flavor.has_precision_flags:
        flavor.refuse("--weak_typing", "leave it out: it takes the precision from the graph")
    if weakly_typed(flavor, options) and options.precision in ("bf16", "fp8"):
        raise EngineError(
            f"--precision {options.precision}: takes strong typing ({flavor}); leave out --weak_typing"
        )
    if options.dla_core is not None and (
        options.precision not in ("fp16", "int8") or options.rest != "fp16"
    ):
        asked = options.precision + (" --rest_precision fp32" if options.rest != "fp16" else "")
        raise EngineError(
            f"--precision {asked}: a DLA computes in FP16 or INT8 only ({flavor}); use --precision fp16, or int8 with the rest in fp16"
        )


def _check_fp8(flavor: Flavor, options: BuildOptions) -> None:
    if not flavor.has_fp8:
        flavor.refuse("--precision fp8", "use int8, or TensorRT 10 or later")
    if options.dla_core is not None:
        raise EngineError(f"--precision fp8: a DLA has no FP8 ({flavor}); use --precision int8")
    if options.hardware_compatible:
        raise EngineError(
            f"--precision fp8: --hardware_compatible is for every GPU from Ampere (8.0) on, FP8 begins with Ada (8.9) ({flavor}); "
            "leave it out, or use int8"
        )
    named = options.compute_capabilities
    if not named and flavor.is_rtx:
        raise EngineError(
            f"--precision fp8: without --compute_capability {flavor} builds for every GPU from 8.0 on, FP8 begins with Ada (8.9); "
            "name them: --compute_capability 8.9,12.0"
        )
    old = [name for name in named or local_compute_capability() if _numbers(name) < FP8_CAPABILITY]
    if old:
        raise EngineError(
            f"--precision fp8: compute capability {', '.join(old)} has no FP8, which begins with Ada (8.9) ({flavor}); use int8"
        )


def _numbers(capability: str) -> tuple[int, ...]:
    """ "8.9" -> (8, 9). What is no number passes here: `_check_compute_capabilities` refuses it."""
    parts = capability.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else FP8_CAPABILITY


def _check_compute_capabilities(flavor: Flavor, options: BuildOptions) -> None:
    known = flavor.compute_capabilities()
    if not known:
        flavor.refuse(
            "--compute_capability",
            "it builds for the GPU that is here; use --hardware_compatible for every GPU from Ampere on, or --flavor tensorrt_rtx",
        )
    unknown = [name for name in options.compute_capabilities if name not in known]
    if unknown:
        raise EngineError(
            f"--compute_capability {','.join(unknown)}: {flavor} knows {', '.join(known)}; choose among them, "
            "or build on the GPU itself with --flavor tensorrt"
        )


def weakly_typed(flavor: Flavor, options: BuildOptions) -> bool:
    """Whether precision is asked of TensorRT with builder flags: before strong typing came, and
    for DLA until flags went.
    """
    return flavor.has_precision_flags and (
        not flavor.strongly_typed or options.dla_core is not None or options.weak_typing
    )


def takes_calibrator(flavor: Flavor, options: BuildOptions) -> bool:
    """Whether INT8 is implicit: a DLA reads no Q/DQ.

    TensorRT 8.6 on a GPU does, with its flags, and is asked to unless told otherwise.
    """
    implicit = options.dla_core is not None or options.weak_typing
    return options.precision == "int8" and implicit and weakly_typed(flavor, options)


def check_saved(flavor: Flavor, options: BuildOptions) -> None:
    """Refuse to save the ONNX file of a TensorRT that takes the scales of INT8 apart from it: such
    a file alone is in FP16 at most.

    Raises:
        EngineError: this one does.
    """
    if takes_calibrator(flavor, options):
        option = "--weak_typing" if options.dla_core is None else "--dla_core"
        raise EngineError(
            f"--save_onnx: with {option}, {flavor} takes the scales of INT8 through a calibrator, so no ONNX file makes this engine; leave out "
            "--save_onnx, or write the file without --engine: it then has QuantizeLinear and DequantizeLinear, for builds without that option"
        )


def local_compute_capability() -> tuple[str, ...]:
    try:
        major, minor = cuda.device_info(0).compute_capability
    except EngineError as error:  # cuda-python is needed to run engines, not to build them
        logger.debug("compute capability unknown: %s", error)
        return ()
    return (f"{major}.{minor}",)


def target_of(flavor: Flavor, options: BuildOptions) -> Target:
    """What the preparation of a model must know of this TensorRT."""
    return Target(
        weak=weakly_typed(flavor, options),
        calibrator=takes_calibrator(flavor, options),
        cache_version=DEFAULT_CACHE_VERSION if flavor.is_rtx else flavor.version,
    )
