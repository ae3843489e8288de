# SPDX-License-Identifier: Apache-2.0
"""ONNX in memory to a TensorRT engine and its sidecar: all that this project knows about building,
for every TensorRT.

model (precision as tensor types) -> network -> profile, flags -> plan -> read back
    -> <engine>, <engine>.json

The plan is written as it is, so that trtexec, Triton and DeepStream load it; what it does not say
goes into `trtdet.engine.sidecar`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import onnx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import files, onnx_files
from trtdet.engine import layers
from trtdet.engine.config import (
    load_timing_cache,
    set_calibrator,
    set_compatibility,
    set_limits,
    set_precision,
    set_profile,
)
from trtdet.engine.flavor import Flavor, engine_error
from trtdet.engine.layers import LayerShares
from trtdet.engine.options import BatchRange, BuildOptions, SizeRange
from trtdet.engine.sidecar import EngineInfo
from trtdet.engine.support import check_options, local_compute_capability, weakly_typed
from trtdet.errors import EngineError, GraphError
from trtdet.graph.builder import fix_size
from trtdet.nms import lowering, static_rows
from trtdet.precision.options import Precision
from trtdet.precision.prepare import Prepared
from trtdet.precision.quantization import QuantizationReport
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Preprocessing
from trtdet.terminal import no_bar

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

#: Warnings that ask for nothing: one per scale of a convolution, which ONNX (to opset 22) wants in
#: the type of the tensor, FP16.
EXPECTED_WARNINGS = re.compile(r"Converting conv (weight|activation) scales to fp32")

#: Parser errors shown in one message: the first is the cause more often than not.
MAX_PARSER_ERRORS = 5


def check_batch(model: onnx.ModelProto, options: BuildOptions) -> None:
    """Find out before calibration whether the engine can take the batch sizes that are asked for.

    Raises:
        GraphError: the ONNX file has a fixed batch, and another one is asked for.
    """
    fixed = next((v.type.tensor_type.shape.dim[0].dim_value for v in model.graph.input if v.type.tensor_type.shape.dim), 0)  # fmt: skip
    if fixed and options.batch not in (None, BatchRange(fixed, fixed, fixed)):
        raise GraphError(
            f"--batch_size {options.batch}: the ONNX file has a fixed batch of {fixed}; "
            f"use --batch_size {fixed}, or convert it with a dynamic batch (create_onnx.py without --input_shape)"
        )


def check_shapes(model: onnx.ModelProto) -> None:
    """Refuse a model inside which shapes follow the picture: an engine would have to find out how
    many boxes there are before it goes on, and TensorRT-RTX builds none of these operators.

    Raises:
        GraphError: names one of them, and what to do.
    """
    node = static_rows.maybe_data_sized(model)
    if node is not None:
        dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        remedy = (
            "create_onnx.py warned of an operator without a form of fixed shapes: export the model without its own NMS"
            if all(dims[1:])
            else "convert the model for one size, create_onnx.py --size H,W, which gives it fixed shapes"
        )
        raise GraphError(
            f"{node.op_type} '{node.name}' in the ONNX file makes as many rows as a picture has boxes, and no engine is built of that; {remedy}, "
            "or run the ONNX file itself"
        )


def choose_size(preprocessing: Preprocessing, size: SizeRange | None) -> Preprocessing:
    """The input of an engine, of all that the model takes: the sizes asked for, or the one that the
    model names.

    Raises:
        ValueError: the model does not take them.
    """
    if size is None:
        if preprocessing.shorter_side:
            return dataclasses.replace(preprocessing, size_range=_own_sizes(preprocessing))
        if preprocessing.size_range:
            logger.info(
                "the engine takes input of %dx%d (height x width), the ONNX file other sizes too: --size MIN:OPT:MAX",
                *preprocessing.size_hw,
            )
        return preprocessing.at(preprocessing.size_hw)
    try:
        fixed = [preprocessing.at(size_hw) for size_hw in (size.min, size.opt, size.max)]
    except ValueError as error:
        hint = (
            ""
            if preprocessing.size_range
            else "; convert it with a dynamic size, create_onnx.py --input_shape N,-1,-1,3"
        )
        raise ValueError(f"--size: {error}{hint}") from error
    if size.min == size.max:
        return fixed[1]
    return dataclasses.replace(preprocessing, size_hw=size.opt, size_range=(size.min, size.max))


def _own_sizes(preprocessing: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest and the largest input, where each picture has a size of its own."""
    assert preprocessing.size_range and preprocessing.shorter_side
    multiple = preprocessing.size_multiple
    longest = -(-preprocessing.shorter_side[1] // multiple) * multiple
    return preprocessing.size_range[0], (longest, longest)


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


def choose_model(flavor: Flavor, prepared: Prepared, options: BuildOptions) -> onnx.ModelProto:
    """Of a prepared model, what this TensorRT is given: with the precision in the types of its
    tensors, or in float32, where the precision is asked for with flags.
    """
    return prepared.float32 if weakly_typed(flavor, options) else prepared.typed


def build(
    flavor: Flavor,
    prepared: Prepared,
    options: BuildOptions,
    preprocessing: Preprocessing | None = None,
) -> Built:
    """Build the plan and read back what it is.

    Args:
        preprocessing: of `choose_size`, which the engine's input follows; None: the model's input
            has one size.

    Raises:
        EngineError: TensorRT's parser or builder failed, or built something else than asked; its
            messages are inside.
        GraphError: the model does not end in the four outputs.
        KeyboardInterrupt: Ctrl-C; the builder was stopped.
    """
    check_options(flavor, options)
    weak = weakly_typed(flavor, options)
    model = choose_model(flavor, prepared, options)
    if preprocessing is not None and preprocessing.size_range is None:
        model = fix_size(model, preprocessing.image_shape)
    if not flavor.has_efficient_nms and lowering.has_plugin(model):
        model = lowering.lower(model, "graph")
        logger.info("%s has no EfficientNMS plugin: it is built from ordinary operators", flavor)

    flavor.load_plugins(options.plugins)
    builder = _create_builder(flavor)
    network: tensorrt.INetworkDefinition = builder.create_network(
        _creation_flags(flavor, weak=weak)
    )
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    parser = _parse(flavor, network, model, options)
    _check_outputs(network)
    batch = set_profile(flavor, builder, config, network, options, preprocessing)
    set_limits(flavor, builder, config, options)
    set_precision(flavor, builder, config, network, options, prepared, weak=weak)
    calibrator = set_calibrator(flavor, config, prepared.scales)  # must outlive the build
    set_compatibility(flavor, config, parser, options)
    cache = load_timing_cache(flavor, config, options)

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
            raise engine_error(
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
        raise engine_error(f"{flavor}: the ONNX parser refused the model", [*shown[:-1], *(s + more for s in shown[-1:])])  # fmt: skip
    return parser


#: Where a node comes from, by what its name begins with.
MADE_BY = {
    "preprocess/": "the input and its normalisation, trtdet/graph/tidy.py",
    "decode/": "the boxes and scores of the model's family, trtdet/families/",
    "nms/": "the selection of detections, trtdet/nms/lowering.py; another form: create_onnx.py --nms",
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
    steps = [text for prefix, text in MADE_BY.items() if name.startswith(prefix)]
    made_by = (steps or ["the network of the source"])[0]
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
            disable=no_bar(),
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
        raise engine_error(f"{flavor}: the builder failed{hint}", errors)
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
    """Turn Ctrl-C into an event: an exception in one of TensorRT's callbacks would end the process
    without a word.

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
    """TensorRT's nested phases as one bar, and the way to stop it.

    None of its methods may raise.
    """

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


# --- read back ------------------------------------------------------------------------------------


def _read_back(
    flavor: Flavor,
    plan: bytes,
    network: tensorrt.INetworkDefinition,
    options: BuildOptions,
    *,
    weak: bool,
) -> LayerShares:
    """What was built: from the engine itself; for an RTX engine whose GPU is not here, from its
    plan, or the network's types.
    """
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
        raise engine_error(f"{flavor}: the engine it has just built does not load", errors)
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
        capabilities = local_compute_capability()
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
        onnx_sha256=onnx_files.sha256(onnx_path),
    )


def _int8_summary(report: QuantizationReport) -> dict[str, Any]:
    return {
        "mac_share": round(report.mac_share, 6),
        "blocks": {block.name: [block.int8_convs, block.convs] for block in report.blocks},
    }
