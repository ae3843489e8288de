# SPDX-License-Identifier: Apache-2.0
"""ONNX in memory to a TensorRT engine and its sidecar: all that this project knows about building, for every TensorRT.

model (precision as tensor types)  ->  network  ->  profile, flags  ->  plan  ->  read back  ->  <engine>, <engine>.json

The plan is written as it is, so that trtexec, Triton and DeepStream load it; what it does not say goes into `trtdet.sidecar`.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, get_args

import onnx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import device, files, layers, nms
from trtdet.errors import EngineError, GraphError
from trtdet.layers import LayerShares
from trtdet.precision import PrecisionReport
from trtdet.quantization import QuantizationReport
from trtdet.sidecar import BatchRange, EngineInfo
from trtdet.spec import OUTPUT_NAMES, ModelSpec
from trtdet.tensorrt_flavor import Flavor

if TYPE_CHECKING:  # the annotations below are checked against the stubs of TensorRT 10
    import tensorrt

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Parser errors shown in one message: the first is the cause more often than not.
MAX_PARSER_ERRORS = 5


# --- options ----------------------------------------------------------------------------------------------------------------


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
    if options.precision == "int8" and options.dla_core is not None:
        raise EngineError(
            f"--precision int8: not implemented yet for a DLA ({flavor}); use --precision fp16, "
            "or leave out --dla_core to build for the GPU"
        )
    if options.precision == "int8" and not flavor.strongly_typed:
        raise EngineError(
            f"--precision int8: not implemented yet for {flavor}, whose networks are weakly typed; "
            "use --precision fp16, or TensorRT 10 or later"
        )
    if options.dla_core is not None and options.precision != "fp16":
        raise EngineError(
            f"--precision {options.precision}: a DLA computes in FP16 or INT8 only ({flavor}); use --precision fp16"
        )


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
        not flavor.strongly_typed or options.dla_core is not None
    )


# --- build ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model ready to be built.

    Attributes:
        float32: as it stands in the file.
        typed: with the precision as tensor types or Q/DQ, the NMS plugin still in it; `float32` itself for fp32 and tf32.
        report: what the conversion to a narrow floating-point type did.
        quantization: what is in INT8.
    """

    float32: onnx.ModelProto
    typed: onnx.ModelProto
    report: PrecisionReport | None = None
    quantization: QuantizationReport | None = None


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


def build(flavor: Flavor, prepared: Prepared, options: BuildOptions) -> Built:
    """Build the plan and read back what it is.

    Raises:
        EngineError: TensorRT's parser or builder failed, or built something else than asked; its messages are inside.
        GraphError: the model does not end in the four outputs.
        KeyboardInterrupt: Ctrl-C; the builder was stopped.
    """
    check_options(flavor, options)
    trt: Any = flavor.module
    weak = weakly_typed(flavor, options)
    model = prepared.float32 if weak else prepared.typed
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
    batch = _set_profile(trt, builder, config, network, options)
    _set_limits(flavor, builder, config, options)
    _set_precision(flavor, builder, config, network, options, prepared.report, weak=weak)
    _set_compatibility(flavor, config, parser, options)
    cache = _load_timing_cache(flavor, config, options)

    start = time.monotonic()
    plan = _run_builder(flavor, builder, network, config, options)
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


def _parser_error(error: tensorrt.ParserError, model: onnx.ModelProto) -> str:
    """One error with its node's name and operator, which 8.6 gives only by index."""
    index = error.node()
    name, operator = "", ""
    if hasattr(error, "node_name"):
        name, operator = error.node_name(), error.node_operator()
    elif 0 <= index < len(model.graph.node):
        name, operator = model.graph.node[index].name, model.graph.node[index].op_type
    where = f"{operator} '{name}': " if name or operator else ""
    return f"{where}{error.desc()}"


def _check_outputs(network: tensorrt.INetworkDefinition) -> None:
    found = [network.get_output(i).name for i in range(network.num_outputs)]
    if sorted(found) != sorted(OUTPUT_NAMES):
        raise GraphError(
            f"model: expected the outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(found) or 'none'}; "
            "convert the model with create_onnx.py, with any --nms but none"
        )


def _set_profile(
    trt: Any,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
) -> BatchRange:
    """Add one optimization profile where the batch is dynamic. Returns the batch sizes of the engine."""
    if network.num_inputs != 1:
        names = ", ".join(network.get_input(i).name for i in range(network.num_inputs))
        raise GraphError(f"model: expected one input, images, found {network.num_inputs}: {names}")
    image = network.get_input(0)
    size, *rest = (image.shape[axis] for axis in range(len(image.shape)))
    if any(dim < 1 for dim in rest):
        raise GraphError(
            f"input '{image.name}': expected only the batch to be dynamic, found {(size, *rest)}; "
            "convert the model with a fixed size, create_onnx.py --input_shape"
        )
    if size > 0:
        own = BatchRange(size, size, size)
        if options.batch not in (None, own):
            raise GraphError(
                f"--batch_size {options.batch}: the ONNX file has a fixed batch of {size}; "
                f"use --batch_size {size}, or convert it with a dynamic batch (create_onnx.py without --input_shape)"
            )
        return own
    batch = options.batch or BatchRange(1, 1, 1)
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    shapes = [trt.Dims([n, *rest]) for n in (batch.min, batch.opt, batch.max)]
    profile.set_shape(image.name, *shapes)
    config.add_optimization_profile(profile)
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
    report: PrecisionReport | None,
    *,
    weak: bool,
) -> None:
    """TF32 as asked; with weak typing, FP16 by flags and what must stay float32 pinned layer by layer."""
    flag: type[tensorrt.BuilderFlag] = flavor.module.BuilderFlag
    if options.precision == "tf32":
        if not getattr(builder, "platform_has_tf32", True):
            raise EngineError(
                f"--precision tf32: this GPU has no TF32 ({flavor}); it takes Ampere or later, use fp32"
            )
        config.set_flag(flag.TF32)
    else:
        config.clear_flag(flag.TF32)  # TensorRT sets it by default: fp32 is to mean fp32
    if not weak or options.precision != "fp16":
        return
    if not builder.platform_has_fast_fp16:
        raise EngineError(f"--precision fp16: this GPU has no fast FP16 ({flavor}); use fp32")
    config.set_flag(flag.FP16)
    config.set_flag(flag.OBEY_PRECISION_CONSTRAINTS)
    if report is not None:
        _pin_float32(flavor, network, report.float32_names)


def _pin_float32(
    flavor: Flavor, network: tensorrt.INetworkDefinition, node_names: frozenset[str]
) -> None:
    """Make the layers of some ONNX nodes compute in float32."""
    dtype: type[tensorrt.DataType] = flavor.module.DataType
    kind: type[tensorrt.LayerType] = flavor.module.LayerType
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        # "[ONNX Layer: name | properties]"; the layer's own name may be numbered.
        node = re.search(r"\[ONNX Layer: ([^|\]]+)", layer.metadata or "")
        name = node[1].strip() if node else layer.name
        if name not in node_names or layer.type in (kind.CONSTANT, kind.SHAPE):
            continue
        outputs = [k for k in range(layer.num_outputs) if layer.get_output(k).dtype == dtype.FLOAT]
        if outputs:
            layer.precision = dtype.FLOAT
        for k in outputs:
            layer.set_output_type(k, dtype.FLOAT)


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
    if (
        precision == "int8" and shares.source == "network"
    ):  # there, Q/DQ stand apart from what they make INT8
        logger.warning("the engine does not say what its layers compute in: INT8 not confirmed")
        return
    if precision in ("fp32", "tf32") and (
        others := shares.counts.keys() & {"FP16", "BF16", "INT8"}
    ):
        raise EngineError(
            f"--precision {precision}: layers of the engine compute in {' and '.join(sorted(others))} ({shares}); give the float32 "
            "file of create_onnx.py"
        )
    if precision in ("fp16", "bf16", "int8") and not shares.counts.get(wanted):
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
