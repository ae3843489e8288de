# SPDX-License-Identifier: Apache-2.0
"""ONNX in memory to a TensorRT engine and its sidecar: all that this project knows about building, for every TensorRT.

model (precision as tensor types)  ->  network  ->  profile, flags  ->  plan  ->  read back  ->  <engine>, <engine>.json

The plan is written as it is, so that trtexec, Triton and DeepStream load it; what it does not say goes into `trtdet.sidecar`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, get_args

import onnx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import device, files, layers, nms
from trtdet.calibration import CalibrationCache
from trtdet.errors import EngineError, GraphError
from trtdet.layers import LayerShares
from trtdet.onnx_builder import fix_size
from trtdet.precision import PrecisionReport
from trtdet.quantization import QuantizationReport
from trtdet.sidecar import BatchRange, EngineInfo
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing
from trtdet.tensorrt_flavor import Flavor

if TYPE_CHECKING:  # the annotations below are checked against the stubs of TensorRT 10
    import tensorrt

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Rest = Literal["fp16", "fp32"]
RESTS: tuple[Rest, ...] = get_args(Rest)

#: The first compute capability with arithmetic in FP8: Ada.
FP8_CAPABILITY = (8, 9)
#: Warnings that ask for nothing: one per scale of a convolution, which ONNX (to opset 22) wants in the type of the tensor, FP16.
EXPECTED_WARNINGS = re.compile(r"Converting conv (weight|activation) scales to fp32")

#: Parser errors shown in one message: the first is the cause more often than not.
MAX_PARSER_ERRORS = 5


# --- options ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeRange:
    """Sizes of an engine's input, (height, width) each: smallest, the one it is tuned for, largest."""

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    def __post_init__(self) -> None:
        for low, best, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= best <= high:
                raise ValueError(f"input sizes: expected 1 <= MIN <= OPT <= MAX, got {self}")


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of a build. None leaves the choice to the model or to TensorRT.

    Attributes:
        batch: None: the ONNX file's own batch size, 1 where it is dynamic.
        workspace_gib: scratch memory a layer may use.
        timing_cache: file to read and update.
        compute_capabilities: GPUs to build for, "8.9"; empty: the one that is here, or, for TensorRT-RTX, every one from 8.0 on.
        dla_core: run on this DLA core, with the GPU for what it cannot do.
        plugins: libraries with plugins that the model uses.
        version_compatible: runs on later TensorRT releases too.
        hardware_compatible: runs on every GPU from Ampere on.
        strip: without weights, to be refitted from the ONNX file.
        optimization_level: 0 (fast build) to 5 (fast engine).
        rest: with int8 and fp8, the precision of what is not in 8 bits.
        weak_typing: ask for precision by builder flags and, for int8, through a calibrator, where TensorRT still can.
        size: of the input, for a model that has no fixed one; None: the size that the ONNX file names.
    """

    precision: Precision = "fp16"
    batch: BatchRange | None = None
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    dla_core: int | None = None
    plugins: tuple[Path, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip: bool = False
    optimization_level: int | None = None
    rest: Rest = "fp16"
    weak_typing: bool = False
    size: SizeRange | None = None


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
    old = [name for name in named or _local_compute_capability() if _numbers(name) < FP8_CAPABILITY]
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
    """Whether precision is asked of TensorRT with builder flags: before strong typing came, and for DLA until flags went."""
    return flavor.has_precision_flags and (
        not flavor.strongly_typed or options.dla_core is not None or options.weak_typing
    )


def takes_calibrator(flavor: Flavor, options: BuildOptions) -> bool:
    """Whether INT8 is implicit: a DLA reads no Q/DQ. TensorRT 8.6 on a GPU does, with its flags, and is asked to unless told otherwise."""
    implicit = options.dla_core is not None or options.weak_typing
    return options.precision == "int8" and implicit and weakly_typed(flavor, options)


def choose_size(preprocessing: Preprocessing, size: SizeRange | None) -> Preprocessing:
    """The input of an engine, of all that the model takes: the sizes asked for, or the one that the model names.

    Raises:
        ValueError: the model does not take them.
    """
    if size is None:
        if preprocessing.size_range:
            logger.info(
                "the engine takes input of %dx%d (height x width), the ONNX file other sizes too: --input_size MIN,OPT,MAX",
                *preprocessing.size_hw,
            )
        return preprocessing.at(preprocessing.size_hw)
    try:
        fixed = [preprocessing.at(size_hw) for size_hw in (size.min, size.opt, size.max)]
    except ValueError as error:
        hint = (
            ""
            if preprocessing.size_range
            else "; convert it with a free size, create_onnx.py --input_shape N,-1,-1,3"
        )
        raise ValueError(f"--input_size: {error}{hint}") from error
    if size.min == size.max:
        return fixed[1]
    return dataclasses.replace(preprocessing, size_hw=size.opt, size_range=(size.min, size.max))


# --- build ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model ready to be built.

    Attributes:
        float32: all its tensors float32, for weak typing: as it stands in the file, with Q/DQ, or with its channels rescaled.
        typed: with the precision as tensor types or Q/DQ, the NMS plugin still in it; `float32` itself for fp32 and tf32.
        report: what the conversion to a narrow floating-point type did.
        quantization: what is in 8 bits.
        scales: for a TensorRT that takes them through a calibrator.
    """

    float32: onnx.ModelProto
    typed: onnx.ModelProto
    report: PrecisionReport | None = None
    quantization: QuantizationReport | None = None
    scales: CalibrationCache | None = None


@dataclass(frozen=True)
class Built:
    """A finished plan.

    Attributes:
        shares: layers per precision, read back.
        seconds: of TensorRT's builder alone.
    """

    plan: bytes
    batch: BatchRange
    shares: LayerShares
    seconds: float


def build(
    flavor: Flavor,
    prepared: Prepared,
    options: BuildOptions,
    preprocessing: Preprocessing | None = None,
) -> Built:
    """Build the plan and read back what it is.

    Args:
        preprocessing: of `choose_size`, which the engine's input follows; None: the model's input has one size.

    Raises:
        EngineError: TensorRT's parser or builder failed, or built something else than asked; its messages are inside.
        GraphError: the model does not end in the four outputs.
        KeyboardInterrupt: Ctrl-C; the builder was stopped.
    """
    check_options(flavor, options)
    weak = weakly_typed(flavor, options)
    model = prepared.float32 if weak else prepared.typed
    if preprocessing is not None and preprocessing.size_range is None:
        model = fix_size(model, preprocessing.image_shape)
    if not flavor.has_efficient_nms and nms.has_plugin(model):
        model = nms.lower(model, "graph")
        logger.info("%s has no EfficientNMS plugin: it is built from ordinary operators", flavor)

    flavor.load_plugins(options.plugins)
    builder = _create_builder(flavor)
    network: tensorrt.INetworkDefinition = builder.create_network(
        _creation_flags(flavor, weak=weak)
    )
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    parser = _parse(flavor, network, model, options)
    _check_outputs(network)
    batch = _set_profile(flavor, builder, config, network, options, preprocessing)
    _set_limits(flavor, builder, config, options)
    _set_precision(flavor, builder, config, network, options, prepared, weak=weak)
    calibrator = _set_calibrator(flavor, config, prepared.scales)  # must outlive the build
    _set_compatibility(flavor, config, parser, options)
    cache = _load_timing_cache(flavor, config, options)

    start = time.monotonic()
    plan = _run_builder(flavor, builder, network, config, options)
    del calibrator
    seconds = time.monotonic() - start
    if cache is not None and options.timing_cache:
        files.write_bytes(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    shares = _read_back(flavor, plan, network, options, weak=weak)
    _check_built(shares, options.precision)
    return Built(plan, batch, shares, seconds)


def _create_builder(flavor: Flavor) -> tensorrt.Builder:
    with flavor.collected_errors() as errors:
        try:
            builder: tensorrt.Builder = flavor.module.Builder(flavor.logger)
        except TypeError as error:  # the bindings' word for a null pointer
            raise _error(
                f"{flavor}: the builder does not start; it needs an NVIDIA GPU and its driver (without them: --flavor tensorrt_rtx)",
                errors or [str(error)],
            ) from error
    return builder


def _creation_flags(flavor: Flavor, *, weak: bool) -> int:
    flag: type[tensorrt.NetworkDefinitionCreationFlag]
    flag = flavor.module.NetworkDefinitionCreationFlag
    if flavor.needs_explicit_batch:
        return 1 << int(flag.EXPLICIT_BATCH)
    # TensorRT 11 types strongly without being asked, and ignores the flag.
    return 0 if weak else 1 << int(flag.STRONGLY_TYPED)


def _parse(
    flavor: Flavor,
    network: tensorrt.INetworkDefinition,
    model: onnx.ModelProto,
    options: BuildOptions,
) -> tensorrt.OnnxParser:
    """Fill the network. The parser is returned because it owns the weights."""
    trt: Any = flavor.module
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, flavor.logger)
    if options.dla_core is not None and hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    with flavor.collected_errors() as logged:
        parsed = parser.parse(model.SerializeToString())
    if not parsed or parser.num_errors:
        found = [_parser_error(parser.get_error(i), model) for i in range(parser.num_errors)]
        shown = found[:MAX_PARSER_ERRORS] or logged
        more = f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        raise _error(f"{flavor}: the ONNX parser refused the model", [*shown[:-1], *(s + more for s in shown[-1:])])  # fmt: skip
    return parser


#: Where a node comes from, by what its name begins with.
MADE_BY = {
    "preprocess/": "the input and its normalisation, trtdet/graph.py",
    "decode/": "the boxes and scores of trtdet/families/{family}.py",
    "nms/": "the selection of detections, trtdet/nms_lowering.py; another form: create_onnx.py --nms",
}


def _parser_error(error: tensorrt.ParserError, model: onnx.ModelProto) -> str:
    """One error with its node's name and operator, which 8.6 gives only by index."""
    index = error.node()
    name, operator = "", ""
    if hasattr(error, "node_name"):
        name, operator = error.node_name(), error.node_operator()
    elif 0 <= index < len(model.graph.node):
        name, operator = model.graph.node[index].name, model.graph.node[index].op_type
    if not name and not operator:
        return error.desc()
    node = next((n for n in model.graph.node if n.name == name), onnx.NodeProto())
    family = getattr(ModelSpec.maybe_from_onnx(model), "family", "the model")
    steps = [text for prefix, text in MADE_BY.items() if name.startswith(prefix)]
    made_by = (steps or ["the network of the source"])[0].format(family=family)
    advice = ""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(operator):
        advice = (
            "; TensorRT knows no such operator: load its plugin with --plugins, or give it the name of a plugin with "
            "create_onnx.py --map_op"
        )
    inputs = ", ".join(node.input) or "none"
    return f"{operator} '{name}' (inputs {inputs}; from {made_by}): {error.desc()}{advice}"


def _check_outputs(network: tensorrt.INetworkDefinition) -> None:
    found = [network.get_output(i).name for i in range(network.num_outputs)]
    if sorted(found) != sorted(OUTPUT_NAMES):
        raise GraphError(
            f"model: expected the outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(found) or 'none'}; "
            "convert the model with create_onnx.py, with any --nms but none"
        )


def _set_profile(
    flavor: Flavor,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    preprocessing: Preprocessing | None,
) -> BatchRange:
    """Add one optimization profile where the batch or the size is dynamic. Returns the batch sizes of the engine."""
    trt: Any = flavor.module
    if network.num_inputs != 1:
        names = ", ".join(network.get_input(i).name for i in range(network.num_inputs))
        raise GraphError(f"model: expected one input, images, found {network.num_inputs}: {names}")
    image = network.get_input(0)
    size, *rest = (image.shape[axis] for axis in range(len(image.shape)))
    free = any(dim < 1 for dim in rest)
    if free and (preprocessing is None or preprocessing.size_range is None):
        raise GraphError(
            f"input '{image.name}': expected only the batch to be dynamic, found {(size, *rest)}; "
            "convert the model with a fixed size, create_onnx.py --input_shape"
        )
    batch = options.batch or BatchRange(1, 1, 1)
    if size > 0:
        batch = BatchRange(size, size, size)
        if options.batch not in (None, batch):
            raise GraphError(
                f"--batch_size {options.batch}: the ONNX file has a fixed batch of {size}; "
                f"use --batch_size {size}, or convert it with a dynamic batch (create_onnx.py without --input_shape)"
            )
        if not free:
            return batch
    images = preprocessing.image_shapes if preprocessing and free else (rest, rest, rest)
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    counts = (batch.min, batch.opt, batch.max)
    shapes = [trt.Dims([n, *dims]) for n, dims in zip(counts, images, strict=True)]
    profile.set_shape(image.name, *shapes)
    config.add_optimization_profile(profile)
    if takes_calibrator(flavor, options):
        config.set_calibration_profile(profile)
    return batch


def _set_limits(
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


def _set_precision(
    flavor: Flavor,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    prepared: Prepared,
    *,
    weak: bool,
) -> None:
    """TF32 as asked; with weak typing, FP16 and INT8 by flags, and what must stay wider pinned layer by layer."""
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
    if prepared.report is not None:
        pinned |= dict.fromkeys(prepared.report.float32_names, dtype.FLOAT)
    _pin(flavor, network, pinned)


def _pin(
    flavor: Flavor,
    network: tensorrt.INetworkDefinition,
    types: Mapping[str, tensorrt.DataType],
) -> None:
    """Make the layers of some ONNX nodes compute in a type, those in float32 with float32 outputs."""
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


def _set_calibrator(
    flavor: Flavor, config: tensorrt.IBuilderConfig, scales: CalibrationCache | None
) -> Any:
    """Give TensorRT the scales of an implicitly quantized network. Returns the calibrator, which the config does not keep alive."""
    if scales is None:
        return None
    calibrator = _cache_calibrator(flavor.module, scales.to_text(flavor.version).encode())
    config.int8_calibrator = calibrator
    return calibrator


def _cache_calibrator(trt: Any, text: bytes) -> Any:
    """A calibrator that never calibrates: it has the cache and no images.

    The class is made here because its base is there only once TensorRT is, and not at all from 11.0 on.
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


def _set_compatibility(
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


def _load_timing_cache(
    flavor: Flavor, config: tensorrt.IBuilderConfig, options: BuildOptions
) -> tensorrt.ITimingCache | None:
    """Give the builder the file's timings; those of another version or GPU are dropped with a warning."""
    path = options.timing_cache
    if path is None:
        return None
    stored = path.read_bytes() if path.is_file() else b""
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


def _run_builder(
    flavor: Flavor,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    options: BuildOptions,
) -> bytes:
    with (
        _interrupt_as_event() as cancelled,
        tqdm(
            total=100,
            desc="building",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}",
            leave=False,
            disable=None,
        ) as bar,
        logging_redirect_tqdm(),
        flavor.collected_errors() as errors,
        _without_expected_warnings(flavor),
    ):
        if hasattr(flavor.module, "IProgressMonitor"):
            monitor = _progress_monitor(flavor.module, bar, cancelled)
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if cancelled.is_set():
        raise KeyboardInterrupt
    if plan is None:
        hint = " (--strip takes a GPU with it)" if options.strip and flavor.is_rtx else ""
        raise _error(f"{flavor}: the builder failed{hint}", errors)
    for message in errors:  # it coped with them
        logger.warning("%s", message)
    return bytes(plan)


@contextmanager
def _without_expected_warnings(flavor: Flavor) -> Iterator[None]:
    """Keep from the log what TensorRT says of every convolution and nobody needs to act on."""
    log = logging.getLogger(flavor.module.__name__)

    def wanted(record: logging.LogRecord) -> bool:
        return not EXPECTED_WARNINGS.search(record.getMessage())

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


@contextmanager
def _interrupt_as_event() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event: an exception in one of TensorRT's callbacks would end the process without a word.

    A second Ctrl-C ends it all the same.
    """
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        cancelled.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, previous)


def _progress_monitor(trt: Any, bar: tqdm[Any], cancelled: threading.Event) -> Any:
    """TensorRT's nested phases as one bar, and the way to stop it. None of its methods may raise."""

    @dataclass
    class Phase:
        parent: str | None
        steps: int
        done: int = 0

    class ProgressMonitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, Phase] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = Phase(parent_phase, max(num_steps, 1))

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phase = self.phases.get(phase_name)
            if phase is not None:
                phase.done = step + 1
            roots = [name for name, p in self.phases.items() if p.parent not in self.phases]
            percent = int(100 * max(map(self.fraction, roots), default=0))
            bar.update(max(percent - int(bar.n), 0))  # later phases may turn out longer: never back
            return not cancelled.is_set()

        def fraction(self, name: str) -> float:
            """Of a phase, with its running sub-phases: 0 to 1."""
            phase = self.phases[name]
            inner = [self.fraction(n) for n, p in self.phases.items() if p.parent == name]
            return min((phase.done + max(inner, default=0.0)) / phase.steps, 1.0)

    return ProgressMonitor()


# --- read back --------------------------------------------------------------------------------------------------------------


def _read_back(
    flavor: Flavor,
    plan: bytes,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    *,
    weak: bool,
) -> LayerShares:
    """What was built: from the engine itself; for an RTX engine whose GPU is not here, from its plan, or the network's types."""
    trt: Any = flavor.module
    runtime: tensorrt.Runtime = trt.Runtime(flavor.logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # it was built a moment ago, by us
    if options.dla_core is not None:
        runtime.DLA_core = options.dla_core
    with flavor.collected_errors() as errors:
        engine = runtime.deserialize_cuda_engine(plan)
    shares = None
    if engine is not None:
        inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
        shares = layers.from_inspector(
            inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        )
    elif not flavor.is_rtx:
        raise _error(f"{flavor}: the engine it has just built does not load", errors)
    else:
        shares = layers.from_plan(plan)
    if shares is None and weak:
        raise EngineError(f"{flavor}: the engine does not say what its layers compute in")
    return shares or layers.from_network(_network_layers(network))


def _network_layers(network: tensorrt.INetworkDefinition) -> Iterator[tuple[str, list[str]]]:
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        tensors = [layer.get_output(k) for k in range(layer.num_outputs)]
        yield layer.type.name, [tensor.dtype.name for tensor in tensors]


def _check_built(shares: LayerShares, precision: Precision) -> None:
    wanted = precision.upper()
    if precision in ("int8", "fp8") and shares.source == "network":
        # There, Q/DQ stand apart from what they make INT8.
        logger.warning(
            "the engine does not say what its layers compute in: %s not confirmed", wanted
        )
        return
    if precision in ("fp32", "tf32") and (
        others := shares.counts.keys() & {"FP16", "BF16", "INT8", "FP8"}
    ):
        raise EngineError(
            f"--precision {precision}: layers of the engine compute in {' and '.join(sorted(others))} ({shares}); give the float32 "
            "file of create_onnx.py"
        )
    if precision in ("fp16", "bf16", "int8", "fp8") and not shares.counts.get(wanted):
        raise EngineError(
            f"--precision {precision}: no layer of the engine computes in {wanted} ({shares}); "
            "use --precision fp32, or a GPU that is faster with it"
        )


def _error(what: str, messages: Sequence[str]) -> EngineError:
    """An error with TensorRT's own messages in it."""
    return EngineError(f"{what}: {'; '.join(messages) or 'it gave no reason'}")


def describe(
    flavor: Flavor,
    built: Built,
    options: BuildOptions,
    *,
    spec: ModelSpec,
    onnx_path: Path,
    quantization: QuantizationReport | None = None,
) -> EngineInfo:
    """The sidecar's contents for an engine built here and now."""
    capabilities = options.compute_capabilities
    if not capabilities and not flavor.is_rtx:
        capabilities = _local_compute_capability()
    return EngineInfo(
        spec=spec,
        flavor=flavor.name,
        version=flavor.version_text,
        precision=options.precision,
        batch=built.batch,
        compute_capabilities=capabilities,
        dla_core=options.dla_core,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        stripped=options.strip,
        plugins=tuple(path.name for path in options.plugins),
        layers=built.shares.counts,
        layers_source=built.shares.source,
        int8=_int8_summary(quantization) if quantization else {},
        onnx_file=onnx_path.name,
        onnx_sha256=files.sha256(onnx_path),
    )


def _int8_summary(report: QuantizationReport) -> dict[str, Any]:
    return {
        "mac_share": round(report.mac_share, 6),
        "blocks": {block.name: [block.int8_convs, block.convs] for block in report.blocks},
    }


def _local_compute_capability() -> tuple[str, ...]:
    try:
        major, minor = device.device_info(0).compute_capability
    except EngineError as error:  # cuda-python is needed to run engines, not to build them
        logger.debug("compute capability unknown: %s", error)
        return ()
    return (f"{major}.{minor}",)
