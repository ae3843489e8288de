# SPDX-License-Identifier: Apache-2.0
"""From build options to TensorRT's builder configuration."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trtdet import files
from trtdet.engine.flavor import Flavor
from trtdet.engine.options import BatchRange, BuildOptions
from trtdet.engine.support import takes_calibrator
from trtdet.errors import EngineError, GraphError
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.prepare import Prepared
from trtdet.spec import Preprocessing

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


def set_profile(
    flavor: Flavor,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    preprocessing: Preprocessing | None,
) -> BatchRange:
    """Add one optimization profile where the batch or the size is dynamic.

    Returns the batch sizes of the engine.
    """
    trt: Any = flavor.module
    if network.num_inputs != 1:
        names = ", ".join(network.get_input(i).name for i in range(network.num_inputs))
        raise GraphError(f"model: expected one input, images, found {network.num_inputs}: {names}")
    image = network.get_input(0)
    size, *rest = (image.shape[axis] for axis in range(len(image.shape)))
    dynamic = any(dim < 1 for dim in rest)
    if dynamic and (preprocessing is None or preprocessing.size_range is None):
        raise GraphError(
            f"input '{image.name}': expected only the batch to be dynamic, found {(size, *rest)}; "
            "convert the model with a fixed size, create_onnx.py --input_shape"
        )
    batch = options.batch or BatchRange(1, 1, 1)
    if size > 0:
        batch = BatchRange(size, size, size)
        if not dynamic:
            return batch
    images = preprocessing.image_shapes if preprocessing and dynamic else (rest, rest, rest)
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    counts = (batch.min, batch.opt, batch.max)
    shapes = [trt.Dims([n, *dims]) for n, dims in zip(counts, images, strict=True)]
    profile.set_shape(image.name, *shapes)
    config.add_optimization_profile(profile)
    if takes_calibrator(flavor, options):
        config.set_calibration_profile(profile)
    return batch


def set_limits(
    flavor: Flavor,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    options: BuildOptions,
) -> None:
    """Where it is to run and what the build may take."""
    trt: Any = flavor.module
    if options.workspace_gib is not None:
        pool: type[tensorrt.MemoryPoolType] = trt.MemoryPoolType
        config.set_memory_pool_limit(pool.WORKSPACE, int(options.workspace_gib * 2**30))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.compute_capabilities:
        known = flavor.compute_capabilities()
        target: Any = config  # TensorRT-RTX only
        target.num_compute_capabilities = len(options.compute_capabilities)
        for i, name in enumerate(options.compute_capabilities):
            target.set_compute_capability(known[name], i)
    if options.dla_core is not None:
        if not 0 <= options.dla_core < builder.num_DLA_cores:
            raise EngineError(
                f"--dla_core {options.dla_core}: {flavor} finds {builder.num_DLA_cores} DLA cores here; "
                "leave it out to build for the GPU"
            )
        kind: type[tensorrt.DeviceType] = trt.DeviceType
        flag: type[tensorrt.BuilderFlag] = trt.BuilderFlag
        config.default_device_type = kind.DLA
        config.DLA_core = options.dla_core
        config.set_flag(flag.GPU_FALLBACK)  # a DLA has no NMS


def set_precision(
    flavor: Flavor,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    prepared: Prepared,
    *,
    weak: bool,
) -> None:
    """TF32 as asked; with weak typing, FP16 and INT8 by flags, and what must stay wider pinned
    layer by layer.
    """
    flag: type[tensorrt.BuilderFlag] = flavor.module.BuilderFlag
    dtype: type[tensorrt.DataType] = flavor.module.DataType
    if options.precision == "tf32":
        if not getattr(builder, "platform_has_tf32", True):
            raise EngineError(
                f"--precision tf32: this GPU has no TF32 ({flavor}); it takes Ampere or later, use fp32"
            )
        config.set_flag(flag.TF32)
    else:
        config.clear_flag(flag.TF32)  # TensorRT sets it by default: fp32 is to mean fp32
    if not weak or options.precision not in ("fp16", "int8"):
        return
    if options.precision == "int8":
        if not builder.platform_has_fast_int8:
            raise EngineError(f"--precision int8: this GPU has no fast INT8 ({flavor}); use fp16")
        config.set_flag(flag.INT8)
    fp16 = "fp16" in (options.precision, options.rest)
    if fp16:
        if not builder.platform_has_fast_fp16:
            raise EngineError(f"--precision fp16: this GPU has no fast FP16 ({flavor}); use fp32")
        config.set_flag(flag.FP16)
    config.set_flag(flag.OBEY_PRECISION_CONSTRAINTS)
    pinned: dict[str, tensorrt.DataType] = {}
    if prepared.scales is not None and prepared.quantization is not None:
        kept = prepared.quantization.kept
        pinned |= dict.fromkeys(kept, dtype.HALF if fp16 else dtype.FLOAT)
    pinned |= dict.fromkeys(pinned_to_float32(prepared), dtype.FLOAT)
    _pin(flavor, network, pinned)


def pinned_to_float32(prepared: Prepared) -> tuple[str, ...]:
    """Nodes that a weakly typed TensorRT is told to compute in float32."""
    return () if prepared.report is None else tuple(prepared.report.float32_names)


def trtexec_flags(options: BuildOptions, prepared: Prepared) -> list[str]:
    """What trtexec needs beside the ONNX file where a TensorRT is weakly typed and has no
    calibrator: what `set_precision` and `set_limits` set.
    """
    flags = []
    if options.precision == "int8":
        flags.append("--int8")
    if options.precision in ("fp16", "int8") and "fp16" in (options.precision, options.rest):
        flags.append("--fp16")
    if names := pinned_to_float32(prepared):
        layers = ",".join(f"{name}:fp32" for name in names)
        flags.append("--precisionConstraints=obey")
        flags += [f"--layerPrecisions={layers}", f"--layerOutputTypes={layers}"]
    if options.dla_core is not None:
        flags += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
    return flags


def _pin(
    flavor: Flavor,
    network: tensorrt.INetworkDefinition,
    types: Mapping[str, tensorrt.DataType],
) -> None:
    """Make the layers of some ONNX nodes compute in a type, those in float32 with float32
    outputs.
    """
    dtype: type[tensorrt.DataType] = flavor.module.DataType
    kind: type[tensorrt.LayerType] = flavor.module.LayerType
    typeless = (kind.CONSTANT, kind.SHAPE, kind.QUANTIZE, kind.DEQUANTIZE)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        # "[ONNX Layer: name | properties]"; the layer's own name may be numbered.
        node = re.search(r"\[ONNX Layer: ([^|\]]+)", layer.metadata or "")
        name = node[1].strip() if node else layer.name
        if name not in types or layer.type in typeless:
            continue
        outputs = [k for k in range(layer.num_outputs) if layer.get_output(k).dtype == dtype.FLOAT]
        if outputs:
            layer.precision = types[name]
        for k in outputs if types[name] == dtype.FLOAT else ():
            layer.set_output_type(k, dtype.FLOAT)


def set_calibrator(
    flavor: Flavor, config: tensorrt.IBuilderConfig, scales: CalibrationCache | None
) -> Any:
    """Give TensorRT the scales of an implicitly quantized network.

    Returns the calibrator, which the config does not keep alive.
    """
    if scales is None:
        return None
    calibrator = _cache_calibrator(flavor.module, scales.to_text(flavor.version).encode())
    config.int8_calibrator = calibrator
    return calibrator


def _cache_calibrator(trt: Any, text: bytes) -> Any:
    """A calibrator that never calibrates: it has the cache and no images.

    The class is made here because its base is there only once TensorRT is, and not at all from 11.0
    on.
    """

    class CacheCalibrator(trt.IInt8EntropyCalibrator2):
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Sequence[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return text

        def write_calibration_cache(self, cache: bytes) -> None:
            pass

    return CacheCalibrator()


def set_compatibility(
    flavor: Flavor,
    config: tensorrt.IBuilderConfig,
    parser: tensorrt.OnnxParser,
    options: BuildOptions,
) -> None:
    trt: Any = flavor.module
    flag: type[tensorrt.BuilderFlag] = trt.BuilderFlag
    verbosity: type[tensorrt.ProfilingVerbosity] = trt.ProfilingVerbosity
    config.profiling_verbosity = verbosity.DETAILED  # or the inspector knows layers by name only
    if options.version_compatible:
        config.set_flag(flag.VERSION_COMPATIBLE)
        carried = [*parser.get_used_vc_plugin_libraries(), *map(str, options.plugins)]
        if carried:
            config.plugins_to_serialize = carried
    if options.hardware_compatible:
        level: type[tensorrt.HardwareCompatibilityLevel] = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = level.AMPERE_PLUS
    if options.strip:
        config.set_flag(flag.STRIP_PLAN)


def load_timing_cache(
    flavor: Flavor, config: tensorrt.IBuilderConfig, options: BuildOptions
) -> tensorrt.ITimingCache | None:
    """Give the builder the file's timings; those of another version or GPU are dropped with a
    warning.
    """
    path = options.timing_cache
    if path is None:
        return None
    stored = path.read_bytes() if files.is_beside(path) else b""
    with flavor.collected_errors() as errors:
        cache = config.create_timing_cache(stored)
        accepted = bool(cache) and config.set_timing_cache(cache, ignore_mismatch=False)
    if stored and (errors or not accepted):
        logger.warning(
            "%s was not made by %s on this GPU (%s); it is begun anew",
            path,
            flavor,
            "; ".join(errors) or "refused",
        )
    if not accepted or errors:
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache
