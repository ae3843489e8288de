# SPDX-License-Identifier: Apache-2.0
"""Put a precision into a model, in memory: what stage 2 gives to TensorRT.

FP16 and BF16 by types, INT8 and FP8 by Q/DQ pairs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import onnx

from trtdet import about, files, sessions
from trtdet.errors import EngineError, GraphError
from trtdet.graph import builder, deformable_attention
from trtdet.graph.map_op import custom_ops
from trtdet.images.files import find_images, spread
from trtdet.nms import lowering
from trtdet.onnx_files import read_onnx
from trtdet.precision import automatic, calibration, calibration_cache, floats
from trtdet.precision.body import Body
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.feeds import calibration_feeds, image_feeds
from trtdet.precision.file import read_precision_file
from trtdet.precision.float_report import PrecisionReport
from trtdet.precision.graph_types import narrow_types
from trtdet.precision.large_biases import add_large_biases
from trtdet.precision.options import (
    DEFAULT_METHOD,
    FP8_METHOD,
    Int8Options,
    KeptType,
    Method,
    Precision,
    Rest,
)
from trtdet.precision.quantization import (
    QuantizationOptions,
    QuantizationReport,
    insert_qdq,
    own_type,
    plan_quantization,
    prepare_implicit,
)
from trtdet.precision.scales import FP8, INT8
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


# --- build ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model ready to be built.

    Attributes:
        float32: all its tensors float32, for weak typing: as it stands in the file, with Q/DQ, or
            with its channels rescaled.
        typed: with the precision as tensor types or Q/DQ, the NMS plugin still in it; `float32`
            itself for fp32 and tf32.
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
class Target:
    """What the TensorRT that is to build a model asks of its preparation.

    Attributes:
        weak: precision is asked for by builder flags, not by the types of tensors.
        calibrator: it takes the scales of INT8 through a calibrator, not as Q/DQ.
        cache_version: of TensorRT, whose calibration cache is written where nobody asks for
            another.
    """

    weak: bool = False
    calibrator: bool = False
    cache_version: tuple[int, ...] = calibration_cache.DEFAULT_CACHE_VERSION


#: Q/DQ in the graph, as every strongly typed TensorRT takes it.
STRONGLY_TYPED = Target()

#: A public-domain photograph (NASA, Eileen Collins), to see how far activations reach.
CHECK_IMAGE = about.PHOTOGRAPH
#: Images of --fp16_check_input that are run: on a CPU that is a minute for the largest models.
MAX_CHECK_IMAGES = 32
#: `QUANTIZED_PRECISIONS` -> what their Q/DQ is.
QUANTIZED = {"int8": INT8, "fp8": FP8}


def load_model(path: Path) -> tuple[onnx.ModelProto, ModelSpec]:
    """The model with its weights, and what stage 1 says of it.

    Raises:
        FileNotFoundError, GraphError: nothing there, not an ONNX file, or one without a
            `ModelSpec`.
    """
    model = read_onnx(path, option="--onnx")
    return model, ModelSpec.from_onnx(model, path)


def prepare(
    model: onnx.ModelProto,
    spec: ModelSpec,
    to: Precision,
    int8: Int8Options = Int8Options(),
    *,
    rest: Rest = "fp16",
    target: Target = STRONGLY_TYPED,
    check_input: Path | None = None,
) -> Prepared:
    """Put a precision into a model.

    Args:
        spec: with the size to build for, where the model takes several.
        int8: where the scales of 8 bits come from, and what stays out of the precision.
        rest: of what is not in 8 bits.
        target: what is to build it; scales do not depend on it.
        check_input: images to see whether FP16 holds the activations.

    Raises:
        GraphError: the model is in another narrow precision already, or nothing of it can be
            quantized.
        ValueError: a pattern that fits no node, a cache or a precision.json of something else.
    """
    body = Body(model, spec)
    if to in QUANTIZED:
        return _prepare_quantized(body, to, int8, rest, target, check_input)
    return _prepare_float(body, to, int8, check_input)


def _prepare_float(
    body: Body, to: Precision, int8: Int8Options, check_input: Path | None
) -> Prepared:
    """The precision as the tensors' type; fp32 and tf32 leave the model as it is."""
    model = body.model
    found = narrow_types(model)
    if found == {to}:
        logger.info("the model is in %s already", to.upper())
        return Prepared(model, model)
    if found:
        raise GraphError(
            f"--precision {to}: the ONNX file is in {' and '.join(sorted(found))} already; give the float32 file of create_onnx.py, "
            f"or --precision {min(found)}"
        )
    if to in ("fp32", "tf32"):
        return Prepared(model, model)
    kept = kept_nodes(body, int8, to, [node.name for node in model.graph.node if node.name])
    wide = [pattern for pattern, kind in kept.items() if kind == "fp32"]
    if to == "bf16":
        typed, report = floats.to_bf16(model, keep_fp32=wide)
    else:
        ranges = measure_ranges(model, body.spec, check_input)
        typed, report = floats.to_fp16(model, keep_fp32=wide, ranges=ranges)
    _log_report(report)
    return Prepared(model, typed, report)


def _log_report(report: PrecisionReport) -> None:
    for line in report.lines():
        logger.info(line)
    for line in report.warnings():
        logger.warning(line)


def _prepare_quantized(
    body: Body,
    to: Precision,
    int8: Int8Options,
    rest: Rest,
    target: Target,
    check_input: Path | None,
) -> Prepared:
    """Convolutions in INT8 or FP8 with the scales of a cache or a new calibration, and the rest in
    FP16.

    A model with its own Q/DQ keeps it, whatever `int8` says.
    """
    model = body.model
    own = own_type(model)
    if own not in (None, QUANTIZED[to]):
        raise GraphError(
            f"--precision {to}: the ONNX file brings its own Q/DQ, in {own.name}; give --precision {own.name.lower()}, or the float32 "
            "file of create_onnx.py"
        )
    narrow = narrow_types(model)
    if narrow and not (own and narrow == {rest}):
        raise GraphError(
            f"--precision {to}: the ONNX file is in {' and '.join(sorted(narrow))} already; give the float32 file of create_onnx.py"
        )
    if own and int8 != Int8Options():
        logger.warning(
            "the ONNX file brings its own Q/DQ: --calib_..., --keep_..., --int8_share and --precision_json are not used"
        )
        int8 = Int8Options()
    convs = [node.name for node in model.graph.node if node.op_type == "Conv"]
    kept = kept_nodes(body, int8, to, convs)
    settings = QuantizationOptions(
        keep=tuple(kept),
        to=QUANTIZED[to],
        together=not target.calibrator,  # such a TensorRT rounds weights by itself
        fp16_scales=rest == "fp16" and not target.weak,  # 8.6 reads opset 17, which has none
    )
    default = FP8_METHOD if to == "fp8" else DEFAULT_METHOD
    cache = CalibrationCache({}) if own else scales_of(body, int8, target.cache_version, default)
    but = () if own else _settle(body, cache, settings, int8)
    scales = None
    if target.calibrator:
        quantized, scales, report = prepare_implicit(body, cache, settings, but)
    else:
        quantized, report = insert_qdq(body, cache, settings, but)
    for line in report.lines():
        logger.info(line)
    if rest == "fp32" or narrow:
        return Prepared(quantized, add_large_biases(quantized), None, report, scales)
    wide = [pattern for pattern, kind in kept.items() if kind == "fp32"]
    ranges = measure_ranges(quantized, body.spec, check_input)
    typed, narrowed = floats.to_fp16(quantized, keep_fp32=wide, ranges=ranges)
    _log_report(narrowed)
    return Prepared(quantized, add_large_biases(typed), narrowed, report, scales)


def _settle(
    body: Body, cache: CalibrationCache, settings: QuantizationOptions, int8: Int8Options
) -> tuple[str, ...]:
    """How weights are rounded goes into the cache. Returns names of the convolutions that hurt
    detections most in 8 bits, as many as `int8.share` allows.
    """
    plan = plan_quantization(body, cache, settings)
    runs = not unknown_to_onnxruntime(body.model)
    automatic.choose_rounding(plan, int8, runs=runs)
    choice = automatic.choose(plan, int8, runs=runs)
    return choice.kept if choice else ()


def kept_nodes(
    body: Body,
    options: Int8Options,
    to: Precision,
    names: Sequence[str],
) -> dict[str, KeptType]:
    """Patterns of nodes that are to stay out of `to`, and what in; the command line goes before the
    file.

    Raises:
        OSError, ValueError: a pattern that fits none of `names`, or a precision.json of another
            model or precision.
    """
    kept: dict[str, KeptType] = {}
    sources: dict[str, str] = {}
    asked: list[tuple[str, KeptType, Sequence[str]]] = [
        ("--keep_fp32", "fp32", options.keep_fp32),
        ("--keep_fp16", "fp16", options.keep_fp16),
    ]
    for option, kind, patterns in asked:
        for pattern in patterns:
            kept.setdefault(pattern, kind)
            sources.setdefault(pattern, option)
    if options.precision_file:
        found = read_precision_file(options.precision_file, model_sha256=body.sha256, precision=to)
        for pattern in found.keep:
            kept.setdefault(pattern, found.keep[pattern])
            sources.setdefault(pattern, f"--precision_json {options.precision_file}:")
    what = "convolution" if to in QUANTIZED else "node"
    for pattern, source in sources.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{source} {pattern!r}: no {what} has such a name; theirs are {', '.join(names[:3])}, ...")  # fmt: skip
    return kept


def scales_of(
    body: Body,
    options: Int8Options,
    built_version: tuple[int, ...] = calibration_cache.DEFAULT_CACHE_VERSION,
    default_method: Method = DEFAULT_METHOD,
) -> CalibrationCache:
    """The cache where there is one and it fits, else a new calibration, which is written there.

    Args:
        built_version: of the TensorRT for which a new cache is written, unless the options name
            another.

    Raises:
        ValueError: neither images nor a cache; a cache of another model, preprocessing or other
            images, or of another method than is asked for; images that cannot be read.
        EngineError: ONNX Runtime is not installed.
    """
    cached = options.cache is not None and files.is_beside(options.cache)
    if not options.images and not cached:
        found = f"no cache at {options.cache}" if options.cache else "neither"
        raise ValueError(
            f"calibration: expected images or an existing cache, found {found}; give --calib_input DIR, or --calib_cache FILE"
        )
    if options.cache is not None and not cached:
        files.check_writable(options.cache)
        files.check_writable(calibration_cache.sidecar_path(options.cache))
    paths = None
    if options.images:
        paths = calibration.choose_images(
            find_images(options.images, option="--calib_input"),
            options.num_images,
            fraction=options.fraction,
            seed=options.seed,
        )
    method = options.method or default_method
    origin = calibration_cache.origin(
        body.sha256, body.spec.preprocessing, paths, method, options.seed
    )
    if options.cache and cached:
        cache = calibration_cache.read_cache(
            options.cache, origin, any_method=options.method is None
        )
        if cache.origin is None:
            calibration_cache.check_tensors(options.cache, cache, body.quantizable_inputs)
        by = f", by {cache.origin.method}" if cache.origin else ""
        logger.info("scales of %d tensors from %s%s", len(cache.scales), options.cache, by)
        if options.cache_version and calibration_cache.write_header(
            options.cache, options.cache_version
        ):
            logger.info("%s is now one for %s", options.cache, calibration_cache.header(options.cache_version))  # fmt: skip
        return cache
    check_calibration(body, options)
    seen: list[Path] = []
    feeds = calibration_feeds(body, paths or (), options.batch_size, seen)
    # The images that were chosen are the manifest; those that can be read are counted.
    cache = calibration.calibrate(body, feeds, method, origin=origin, provider=options.provider)
    cache = dataclasses.replace(cache, origin=dataclasses.replace(origin, count=len(seen)))
    if options.cache:
        cache.write(options.cache, options.cache_version or built_version)
        logger.info("wrote %s", options.cache)
    return cache


def check_calibration(body: Body, options: Int8Options) -> None:
    """Find out before any image is read whether ONNX Runtime can calibrate the model.

    Raises:
        EngineError: it is not installed, lacks the provider, or does not know an operator.
    """
    if unknown := unknown_to_onnxruntime(body.model):
        raise EngineError(
            f"--calib_input: calibration runs the model in ONNX Runtime, which does not know {unknown}; give --calib_cache with scales made "
            "elsewhere, or build with --precision fp16"
        )
    if not sessions.is_installed():
        raise EngineError(f"--calib_input runs the model in ONNX Runtime: {sessions.INSTALL}")
    calibration.wanted_providers(options.provider)


def measure_ranges(
    model: onnx.ModelProto, spec: ModelSpec, check_input: Path | None
) -> dict[str, float] | None:
    """Largest magnitude of each activation over some images.

    None where ONNX Runtime is not installed.

    Args:
        check_input: an image or a folder of them; None: a photograph that comes with this project.
    """
    if not sessions.is_installed():
        if check_input:
            raise EngineError(f"--fp16_check_input runs the model in ONNX Runtime: {sessions.INSTALL}")  # fmt: skip
        logger.warning(
            "ONNX Runtime is not installed: not checked whether FP16 holds the activations; weights are checked"
        )
        return None
    if unknown := unknown_to_onnxruntime(model):
        logger.warning(
            "ONNX Runtime does not know %s: not checked whether FP16 holds the activations", unknown
        )
        return None
    paths = find_images(check_input, option="--fp16_check_input") if check_input else [CHECK_IMAGE]
    if len(paths) > MAX_CHECK_IMAGES:
        logger.info("activation ranges: %d of %d images, evenly spread", MAX_CHECK_IMAGES, len(paths))  # fmt: skip
        paths = spread(paths, MAX_CHECK_IMAGES)
    read: list[Path] = []
    ranges = floats.activation_ranges(
        model, image_feeds(model, spec, paths, option="--fp16_check_input", read=read)
    )
    if not read:
        raise ValueError(f"--fp16_check_input: expected images that can be read, found none in {check_input}")  # fmt: skip
    tensor = max(ranges, key=ranges.__getitem__)
    logger.info("largest activation on %d image(s): %.4g in '%s'", len(read), ranges[tensor], tensor)  # fmt: skip
    return ranges


def unknown_to_onnxruntime(model: onnx.ModelProto) -> str:
    """The custom operators, plugins of TensorRT's own left out that are replaced for ONNX
    Runtime; "" if there are none.
    """
    replaced = {
        f"{builder.PLUGIN_DOMAIN}::{op}"
        for op in (lowering.PLUGIN_OP, deformable_attention.PLUGIN_OP)
    }
    return ", ".join(op for op in custom_ops(model) if op not in replaced)
