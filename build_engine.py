#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT engine from an ONNX file that create_onnx.py wrote.

  build_engine.py --onnx d0.onnx --engine d0.engine --precision fp16 --batch_size 1,4,8

writes d0.engine, which trtexec, Triton and DeepStream load too, and d0.engine.json, which tells infer.py and eval_coco.py what it
is. TensorRT-RTX builds without a GPU. With --save_onnx, what TensorRT is given is written as an ONNX file, precision included:
it runs in ONNX Runtime (BF16 not on a CPU), and on a Jetson `trtexec --onnx=FILE --stronglyTyped --saveEngine=d0.engine` builds the same engine
without Python.

  build_engine.py --onnx d0.onnx --engine d0.engine --precision int8 --calib_input photos --calib_cache d0.cache

measures the activations once, in ONNX Runtime, and puts convolutions in INT8 (QuantizeLinear/DequantizeLinear pairs), the rest in
FP16. docs/int8.md says what it costs. --precision fp8 does the same in FP8, for GPUs from Ada (8.9) on.
"""

import argparse
import dataclasses
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import trtdet
from image_batcher import ImageBatcher, find_images, load_image, preprocess
from trtdet import (
    calibration,
    cli,
    deformable_attention,
    engine,
    files,
    nms,
    precision,
    quantization,
)
from trtdet.calibration import PROVIDERS, CalibrationCache, Provider
from trtdet.engine import PRECISIONS, BuildOptions, Built, Prepared, SizeRange
from trtdet.errors import EngineError, GraphError
from trtdet.histograms import METHODS, Method
from trtdet.map_op import custom_ops
from trtdet.precision_file import KeptType, read_precision_file
from trtdet.sidecar import BatchRange, EngineInfo, write_engine
from trtdet.spec import ModelSpec
from trtdet.tensorrt_flavor import FLAVORS, Flavor, find_flavor

logger = logging.getLogger("build_engine")

#: A public-domain photograph (NASA, Eileen Collins), to see how far activations reach.
CHECK_IMAGE = trtdet.PHOTOGRAPH
#: Images of --fp16_check_input that are run: on a CPU that is a minute for the largest models.
MAX_CHECK_IMAGES = 32
#: Images that calibration runs at a time, where the model's batch is dynamic. On a CPU 8 take five times
#: the memory (D0: 4.2 GiB) and twice the time per image.
CALIBRATION_BATCH = 1


#: FP8 has small numbers for small values: what reaches furthest need not be cut off to have them.
FP8_METHOD: Method = "minmax"
#: Precisions of 8 bits, which take scales.
QUANTIZED = {"int8": quantization.INT8, "fp8": quantization.FP8}


@dataclass(frozen=True)
class Int8Options:
    """Where the scales of INT8 and FP8 come from, and what stays out of them.

    Attributes:
        images: an image or a directory of them; None: the cache alone.
        cache: read where it exists, else written; None: the scales are not kept.
        num_images, fraction: at most so many images, and at most this share of all.
        batch_size: None: `CALIBRATION_BATCH`, or one by one where the model's batch is fixed.
        cache_version: of TensorRT, for whom the cache is written, and an existing one made over; None: the one that builds, or 8.6.1.
        method: None: whatever an existing cache was made with; for a new one the default of the precision.
        provider: what of ONNX Runtime calibrates.
        keep_fp16, keep_fp32: patterns of node names, beside the model's own `sensitive_nodes`, which stay in FP16.
        precision_file: more of them, from tune_precision.py.
    """

    images: Path | None = None
    cache: Path | None = None
    cache_version: tuple[int, ...] | None = None
    num_images: int = calibration.DEFAULT_NUM_IMAGES
    fraction: float = 1.0
    batch_size: int | None = None
    method: Method | None = None
    seed: int = calibration.DEFAULT_SEED
    provider: Provider = "auto"
    keep_fp16: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    precision_file: Path | None = None


def run(
    onnx_path: Path,
    options: BuildOptions,
    *,
    engine_path: Path | None,
    save_onnx: Path | None = None,
    flavor_name: str | None = None,
    check_input: Path | None = None,
    int8: Int8Options = Int8Options(),
) -> None:
    """Build `onnx_path` into `engine_path`, or only prepare it, and print what came out.

    Raises:
        OSError, GraphError: the ONNX file is missing or not what stage 1 writes.
        EngineError: no TensorRT, or it cannot do what is asked, or failed.
        ValueError: a calibration cache of something else, or images that cannot be read.
    """
    start = time.monotonic()
    sidecar = engine_path.with_name(engine_path.name + ".json") if engine_path else None
    files.check_outputs([engine_path, sidecar, save_onnx], [onnx_path])
    if options.timing_cache:
        files.check_writable(options.timing_cache)
    flavor = None
    if engine_path:
        flavor = find_flavor(flavor_name)
        engine.check_options(flavor, options)
        logger.info("%s", flavor)
    model, spec = load_model(onnx_path)
    if engine_path:
        size = engine.choose_size(spec.preprocessing, options.size)
        spec = spec.replace(preprocessing=size)
    if options.precision in QUANTIZED:
        prepared = prepare_quantized(model, spec, options, int8, flavor, check_input)
    else:
        prepared = prepare(model, spec, options.precision, check_input, int8)
    if save_onnx:
        files.write_bytes(save_onnx, prepared.typed.SerializeToString())
    if flavor and engine_path:
        built = engine.build(flavor, prepared, options, spec.preprocessing)
        info = engine.describe(
            flavor,
            built,
            options,
            spec=spec,
            onnx_path=onnx_path,
            quantization=prepared.quantization,
        )
        info = write_engine(engine_path, built.plan, info)
        print(summary(flavor, built, info, time.monotonic() - start))
        print(engine_path)
    else:
        print(save_onnx)


def load_model(path: Path) -> tuple[onnx.ModelProto, ModelSpec]:
    """The model with its weights, and what stage 1 says of it.

    Raises:
        FileNotFoundError, GraphError: nothing there, not an ONNX file, or one without a `ModelSpec`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--onnx: expected an ONNX file, found nothing at {path}")
    try:
        model = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError has no narrower base
        raise GraphError(
            f"{path}: expected an ONNX file, this is none ({error}); write it again with create_onnx.py"
        ) from error
    return model, ModelSpec.from_onnx(model, path)


def prepare(
    model: onnx.ModelProto,
    spec: ModelSpec,
    to: engine.Precision,
    check_input: Path | None = None,
    int8: Int8Options = Int8Options(),
) -> Prepared:
    """Put the precision into the model's tensor types; fp32 and tf32 leave it as it is.

    Args:
        int8: what of it stays in FP32.

    Raises:
        GraphError: the model is in another narrow precision already.
        ValueError: a pattern that fits no node, or a precision.json of another model.
    """
    found = precision.narrow_types(model)
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
    kept = kept_nodes(model, int8, to, [node.name for node in model.graph.node if node.name])
    wide = [pattern for pattern, kind in kept.items() if kind == "fp32"]
    if to == "bf16":
        typed, report = precision.to_bf16(model, keep_fp32=wide)
    else:
        ranges = measure_ranges(model, spec, check_input)
        typed, report = precision.to_fp16(model, keep_fp32=wide, ranges=ranges)
    _log_report(report)
    return Prepared(model, typed, report)


def _log_report(report: precision.PrecisionReport) -> None:
    for line in report.lines():
        logger.info(line)
    for line in report.warnings():
        logger.warning(line)


def prepare_quantized(
    model: onnx.ModelProto,
    spec: ModelSpec,
    options: BuildOptions,
    int8: Int8Options,
    flavor: Flavor | None = None,
    check_input: Path | None = None,
) -> Prepared:
    """Put convolutions in INT8 or FP8 with the scales of a cache or a new calibration, and the rest in FP16.

    A model with its own Q/DQ keeps it, whatever `int8` says.

    Args:
        flavor: for whose version the cache is written, and whether it takes Q/DQ; the scales do not depend on it.

    Raises:
        GraphError: the model is in a narrow precision already, or nothing of it can be quantized.
        ValueError: a pattern that fits no convolution, a cache or a precision.json of something else.
    """
    own = quantization.own_type(model)
    if own not in (None, QUANTIZED[options.precision]):
        raise GraphError(
            f"--precision {options.precision}: the ONNX file brings its own Q/DQ, in {own.name}; give --precision {own.name.lower()}, or the float32 "
            "file of create_onnx.py"
        )
    narrow = precision.narrow_types(model)
    if narrow and not (own and narrow == {options.rest}):
        raise GraphError(
            f"--precision {options.precision}: the ONNX file is in {' and '.join(sorted(narrow))} already; give the float32 file of create_onnx.py"
        )
    if own and int8 != Int8Options():
        logger.warning(
            "the ONNX file brings its own Q/DQ: --calib_..., --keep_... and --precision_json are not used"
        )
        int8 = Int8Options()
    convs = [node.name for node in model.graph.node if node.op_type == "Conv"]
    kept = kept_nodes(model, int8, options.precision, convs)
    weak = flavor is not None and engine.weakly_typed(flavor, options)
    settings = quantization.QuantizationOptions(
        keep=(*kept, *spec.sensitive_nodes),
        to=QUANTIZED[options.precision],
        fp16_scales=options.rest == "fp16" and not weak,  # 8.6 reads opset 17, which has none
    )
    default = FP8_METHOD if options.precision == "fp8" else calibration.DEFAULT_METHOD
    cache = CalibrationCache({}) if own else scales_of(model, spec, int8, flavor, default)
    scales = None
    if flavor is not None and engine.takes_calibrator(flavor, options):
        quantized, scales, report = quantization.prepare_implicit(model, cache, settings)
    else:
        quantized, report = quantization.insert_qdq(model, cache, settings)
    for line in report.lines():
        logger.info(line)
    if options.rest == "fp32" or narrow:
        return Prepared(quantized, quantized, None, report, scales)
    wide = [pattern for pattern, kind in kept.items() if kind == "fp32"]
    ranges = measure_ranges(quantized, spec, check_input)
    typed, rest = precision.to_fp16(quantized, keep_fp32=wide, ranges=ranges)
    _log_report(rest)
    return Prepared(quantized, typed, rest, report, scales)


def kept_nodes(
    model: onnx.ModelProto, options: Int8Options, to: engine.Precision, names: Sequence[str]
) -> dict[str, KeptType]:
    """Patterns of nodes that are to stay out of `to`, and what in; the command line goes before the file.

    Raises:
        OSError, ValueError: a pattern that fits none of `names`, or a precision.json of another model or precision.
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
        found = read_precision_file(
            options.precision_file, model_sha256=calibration.model_hash(model), precision=to
        )
        for pattern in found.keep:
            kept.setdefault(pattern, found.keep[pattern])
            sources.setdefault(pattern, f"--precision_json {options.precision_file}:")
    what = "convolution" if to in QUANTIZED else "node"
    for pattern, source in sources.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{source} {pattern!r}: no {what} has such a name; theirs are {', '.join(names[:3])}, ...")  # fmt: skip
    return kept


def scales_of(
    model: onnx.ModelProto,
    spec: ModelSpec,
    options: Int8Options,
    flavor: Flavor | None,
    default_method: Method = calibration.DEFAULT_METHOD,
) -> CalibrationCache:
    """The cache where there is one and it fits, else a new calibration, which is written there.

    Raises:
        ValueError: a cache of another model, preprocessing or other images, or of another method than is asked for; images that cannot be read.
        EngineError: ONNX Runtime is not installed.
    """
    paths = None
    if options.images:
        paths = calibration.choose_images(
            find_images(options.images, option="--calib_input"),
            options.num_images,
            fraction=options.fraction,
            seed=options.seed,
        )
    method = options.method or default_method
    origin = calibration.origin(model, spec.preprocessing, paths, method, options.seed)
    if options.cache and options.cache.is_file():
        cache = calibration.read_cache(options.cache, origin, any_method=options.method is None)
        if cache.origin is None:
            calibration.check_tensors(options.cache, cache, model)
        by = f", by {cache.origin.method}" if cache.origin else ""
        logger.info("scales of %d tensors from %s%s", len(cache.scales), options.cache, by)
        if options.cache_version and calibration.write_header(options.cache, options.cache_version):
            logger.info("%s is now one for %s", options.cache, calibration.header(options.cache_version))  # fmt: skip
        return cache
    if paths is None:
        raise ValueError(f"calibration: expected images or a cache, found no cache at {options.cache}; give --calib_input")  # fmt: skip
    if unknown := unknown_to_onnxruntime(model):
        raise EngineError(
            f"--calib_input: calibration runs the model in ONNX Runtime, which does not know {unknown}; give --calib_cache with scales made "
            "elsewhere, or build with --precision fp16"
        )
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise EngineError("--calib_input runs the model in ONNX Runtime: pip install onnxruntime") from None  # fmt: skip
    seen: list[Path] = []
    feeds = calibration_feeds(model, spec, paths, options.batch_size, seen)
    # The images that were chosen are the manifest; those that can be read are counted.
    providers = calibration.providers(options.provider)
    cache = calibration.calibrate(model, feeds, method, origin=origin, providers=providers)
    cache = dataclasses.replace(cache, origin=dataclasses.replace(origin, count=len(seen)))
    if options.cache:
        built = (
            flavor.version if flavor and not flavor.is_rtx else calibration.DEFAULT_CACHE_VERSION
        )
        cache.write(options.cache, options.cache_version or built)
        logger.info("wrote %s", options.cache)
    return cache


def calibration_feeds(
    model: onnx.ModelProto,
    spec: ModelSpec,
    paths: Sequence[Path],
    batch_size: int | None,
    seen: list[Path],
) -> Iterator[dict[str, NDArray[Any]]]:
    """The images, preprocessed as for inference; in a model of a fixed batch, one at a time fills every row.

    An image that cannot be read is logged by the batcher and left out, each time: the scales are the same again. `seen` gets the others.

    Raises:
        ValueError: a batch size that the model does not take, or no image can be read.
    """
    network_input = model.graph.input[0]
    fixed = network_input.type.tensor_type.shape.dim[0].dim_value
    if fixed and batch_size not in (None, fixed):
        raise ValueError(f"--calib_batch_size {batch_size}: the ONNX file has a fixed batch of {fixed}; leave it out")  # fmt: skip
    size, repeats = (1, fixed) if fixed else (batch_size or CALIBRATION_BATCH, 1)
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(paths), desc="calibrating", unit="image", disable=None) as bar,
        ImageBatcher(paths, spec.preprocessing, size) as batches,
    ):
        for batch in batches:
            yield {network_input.name: np.repeat(batch.images, repeats, axis=0)}
            seen.extend(batch.paths)
            bar.update(len(batch.images))
        skipped = len(batches.failures)
    if skipped == len(paths):
        raise ValueError(f"--calib_input: expected images that can be read, found {skipped} that cannot, the first of them {batches.failures[0][0]}")  # fmt: skip
    if skipped:
        logger.warning("calibrated on %d of %d images: the others cannot be read", len(paths) - skipped, len(paths))  # fmt: skip


def measure_ranges(
    model: onnx.ModelProto, spec: ModelSpec, check_input: Path | None
) -> dict[str, float] | None:
    """Largest magnitude of each activation over some images; None where ONNX Runtime is not installed.

    Args:
        check_input: an image or a directory of them; None: a photograph that comes with this project.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        if check_input:
            raise EngineError("--fp16_check_input runs the model in ONNX Runtime: pip install onnxruntime") from None  # fmt: skip
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
        spread = np.linspace(0, len(paths) - 1, MAX_CHECK_IMAGES).astype(int)
        logger.info("activation ranges: %d of %d images, evenly spread", len(spread), len(paths))
        paths = [paths[i] for i in spread]
    read: list[Path] = []
    ranges = precision.activation_ranges(model, _feeds(model, spec, paths, read))
    if not read:
        raise ValueError(f"--fp16_check_input: expected images that can be read, found none in {check_input}")  # fmt: skip
    tensor = max(ranges, key=ranges.__getitem__)
    logger.info("largest activation on %d image(s): %.4g in '%s'", len(read), ranges[tensor], tensor)  # fmt: skip
    return ranges


def unknown_to_onnxruntime(model: onnx.ModelProto) -> str:
    """The custom operators, plugins of TensorRT's own left out that are replaced for ONNX Runtime; "" if there are none."""
    replaced = {
        f"{nms.PLUGIN_DOMAIN}::{op}" for op in (nms.PLUGIN_OP, deformable_attention.PLUGIN_OP)
    }
    return ", ".join(op for op in custom_ops(model) if op not in replaced)


def _feeds(
    model: onnx.ModelProto, spec: ModelSpec, paths: Sequence[Path], read: list[Path]
) -> Iterator[dict[str, NDArray[Any]]]:
    """One image at a time; a model of a fixed batch gets it in every row. `read` gets those that can be read."""
    network_input = model.graph.input[0]
    batch = network_input.type.tensor_type.shape.dim[0].dim_value or 1
    for path in paths:
        try:
            image, _ = preprocess(load_image(path), spec.preprocessing)
        except (OSError, ValueError) as error:
            logger.warning("--fp16_check_input: %s is left out: %s", path, error)
            continue
        read.append(path)
        yield {network_input.name: np.repeat(image[None], batch, axis=0)}


def summary(flavor: Flavor, built: Built, info: EngineInfo, seconds: float) -> str:
    """A few lines for the reader: what was built and what it took."""
    target = ", ".join(info.compute_capabilities)
    sizes = ", input " + "x".join(map(str, info.spec.preprocessing.size_hw))
    if size_range := info.spec.preprocessing.size_range:
        sizes += " of {}x{} to {}x{}".format(*size_range[0], *size_range[1])
    if not target:
        target = "8.0 and later" if flavor.is_rtx else "this GPU"
    rows = {
        "engine": f"{flavor}, compute capability {target}, batch {info.batch}{sizes}",
        "precision": str(built.shares),
        "size": f"{len(built.plan) / 2**20:.1f} MiB",
        "time": f"{seconds:.1f} s, of which {built.seconds:.1f} s in the builder",
    }
    return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


def parse_batch(text: str) -> BatchRange:
    """argparse type: "8" or "1,4,8"."""
    try:
        sizes = [int(part) for part in text.split(",")]
        return BatchRange(*(sizes * 3 if len(sizes) == 1 else sizes))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected N or MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, got {text!r}"
        ) from error


def parse_batch_range(text: str) -> BatchRange:
    """argparse type: "1,4,8"."""
    if text.count(",") != 2:
        raise argparse.ArgumentTypeError(f"expected MIN,OPT,MAX, got {text!r}")
    return parse_batch(text)


def parse_sizes(text: str) -> SizeRange:
    """argparse type: "640", "480x640", "320,640,1280" or "320x416,640x640,1280x1280"; height before width."""
    try:
        sizes = [_size_hw(part) for part in text.split(",")]
        return SizeRange(*(sizes * 3 if len(sizes) == 1 else sizes))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected SIZE or MIN,OPT,MAX with MIN <= OPT <= MAX, each a number or HEIGHTxWIDTH, got {text!r}"
        ) from error


def _size_hw(text: str) -> tuple[int, int]:
    """ "640" -> (640, 640), "480x640" -> (480, 640)"""
    sides = [int(side) for side in text.split("x")]
    height, width = sides * 2 if len(sides) == 1 else sides
    return height, width


def parse_version(text: str) -> tuple[int, ...]:
    """argparse type: "10.13.3"."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected X.Y.Z, such as 8.6.1, got {text!r}")
    return tuple(map(int, text.split(".")))


def parse_gib(text: str) -> float:
    """argparse type: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1 << 20:  # TensorRT takes bytes in 64 bits
        raise argparse.ArgumentTypeError(f"expected a size in GiB above 0, got {text!r}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("-o", "--onnx", required=True, type=Path, metavar="FILE", help="the ONNX file of create_onnx.py")
    parser.add_argument("-e", "--engine", type=Path, metavar="FILE", help="write the engine here, and FILE.json beside it")
    parser.add_argument("-p", "--precision", default="fp16", choices=PRECISIONS, help="of the network; preprocessing, box decoding and NMS are always float32 (default: fp16)")
    parser.add_argument("--rest_precision", dest="rest", default="fp16", choices=engine.RESTS, help="with int8 and fp8, of what is not in 8 bits (default: %(default)s)")
    parser.add_argument("-b", "--batch_size", type=parse_batch, metavar="N|MIN,OPT,MAX", help="batch sizes the engine takes; OPT is the one it is tuned for (default: the ONNX file's, 1 where that is dynamic)")
    parser.add_argument("-d", "--dynamic_batch_size", dest="batch_size", type=parse_batch_range, metavar="MIN,OPT,MAX", help="the same as --batch_size MIN,OPT,MAX")
    parser.add_argument("--input_size", type=parse_sizes, metavar="SIZE|MIN,OPT,MAX", help="sizes of the input of a model that has no fixed one (create_onnx.py --input_shape N,-1,-1,3): a number or HEIGHTxWIDTH each, as in 320x416,640x640,1280x1280; OPT is the one it is tuned for (default: the ONNX file's, alone)")
    parser.add_argument("--save_onnx", type=Path, metavar="FILE", help="write the ONNX model with its precision applied; without --engine, that is all (needs no TensorRT)")
    parser.add_argument("--fp16_check_input", type=Path, metavar="PATH", help="images to check on whether FP16 holds the activations (default: a photograph that comes with this)")
    keep = parser.add_argument_group("what stays out of it", "PATTERN is of names of nodes in the ONNX file, for int8 and fp8 of convolutions, such as '*/stem/*'; each option may be given several times")
    keep.add_argument("--keep_fp16", nargs="+", action="extend", default=[], metavar="PATTERN", help="these stay in FP16 rather than int8 or fp8, beside those that the ONNX file names as sensitive")
    keep.add_argument("--keep_fp32", nargs="+", action="extend", default=[], metavar="PATTERN", help="these stay float32")
    keep.add_argument("--precision_json", type=Path, metavar="FILE", help="what tune_precision.py found for this model")
    int8 = parser.add_argument_group("INT8 and FP8")
    add_calibration_options(int8)
    int8.add_argument("--weak_typing", action="store_true", help="INT8 through TensorRT's calibrator, and FP16 by flag (TensorRT to 10; always with --dla_core)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--flavor", choices=list(FLAVORS), help="which TensorRT builds it (default: the first of these that is installed)")
    where.add_argument("--compute_capability", type=lambda text: tuple(text.split(",")), default=(), metavar="8.9[,12.0]", help="GPUs to build for, which need not be here (TensorRT-RTX; default: all from 8.0 on)")
    where.add_argument("--dla_core", type=int, metavar="N", help="build for this DLA core of a Jetson; the GPU does what it cannot")
    where.add_argument("--version_compatible", action="store_true", help="the engine runs on later releases of TensorRT too")
    where.add_argument("--hardware_compatible", action="store_true", help="the engine runs on every GPU from Ampere on")
    where.add_argument("--strip", action="store_true", help="leave the weights out; refitting them from the ONNX file is the application's, infer.py does not")
    how = parser.add_argument_group("how it is built")
    how.add_argument("-w", "--workspace", type=parse_gib, metavar="GIB", help="scratch memory that a layer may use (default: the GPU's memory)")
    how.add_argument("--timing_cache", type=Path, metavar="FILE", help="reuse the timings in this file, and keep new ones there: later builds are faster")
    how.add_argument("--optimization_level", type=int, choices=range(6), metavar="0..5", help="from a fast build to a fast engine (default: TensorRT's, 3)")
    how.add_argument("--plugins", type=Path, nargs="+", action="extend", default=[], metavar="LIB.so", help="libraries of plugins that the model uses; may be given several times")
    parser.add_argument("-v", "--verbose", action="store_true", help="show TensorRT's own messages too")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.engine and not args.save_onnx:
        parser.error("nothing to write: give --engine, --save_onnx or both")
    if not args.engine and (
        args.flavor or options_from(args) != BuildOptions(args.precision, rest=args.rest)
    ):
        parser.error(
            "without --engine nothing is built: leave out all but --onnx, --precision, --rest_precision, --save_onnx, --fp16_check_input, "
            "--calib_..., --keep_... and --precision_json"
        )
    if args.fp16_check_input and "fp16" not in (args.precision, args.rest if args.precision in QUANTIZED else ""):  # fmt: skip
        parser.error(
            "--fp16_check_input goes with --precision fp16, or int8 and fp8 with the rest in fp16"
        )
    check_kept_usage(parser, args)
    check_int8_usage(parser, args)
    written = [path for path in (args.engine, args.save_onnx, args.calib_cache) if path]
    if args.engine and args.engine.suffix.lower() == ".onnx":
        parser.error(f"--engine: an engine, not ONNX; did you mean --save_onnx {args.engine}?")
    if args.onnx in written or len(set(written)) < len(written):
        parser.error("--onnx, --engine, --save_onnx and --calib_cache: expected different files")
    return args


def add_calibration_options(group: argparse._ArgumentGroup) -> None:
    """Where the scales come from; see `calibration_from`."""
    # fmt: off
    group.add_argument("--calib_input", type=Path, metavar="DIR", help="images to calibrate on, as the detector will see them; no annotations")
    group.add_argument("--calib_cache", type=Path, metavar="FILE", help="TensorRT's calibration cache: used where it exists and belongs to this model and these images, else written")
    group.add_argument("--calib_cache_version", type=parse_version, metavar="X.Y.Z", help="the TensorRT that is to read the cache (trtexec --calib, DeepStream, a DLA) and takes no other's: its first line is written for it, in an existing cache too (default: the TensorRT that builds, else 8.6.1)")
    number = group.add_mutually_exclusive_group()
    number.add_argument("--calib_num_images", type=cli.positive_int, metavar="N", help=f"at most so many, chosen at random from all (default: {calibration.DEFAULT_NUM_IMAGES})")
    number.add_argument("--calib_batches", type=cli.positive_int, metavar="N", help="at most so many batches of --calib_batch_size images")
    group.add_argument("--calib_fraction", type=cli.positive_unit_interval, default=1.0, metavar="F", help="at most this share of all images (default: 1)")
    group.add_argument("--calib_batch_size", type=cli.positive_int, metavar="N", help=f"images at a time; the scales do not depend on it (default: {CALIBRATION_BATCH}, or the ONNX file's)")
    group.add_argument("--calib_method", choices=METHODS, help=f"how the range of an activation is chosen (default: as in an existing cache, else {calibration.DEFAULT_METHOD}; for fp8, which needs no clipping, {FP8_METHOD})")
    group.add_argument("--calib_seed", type=int, default=calibration.DEFAULT_SEED, metavar="N", help="of the choice of images (default: %(default)s)")
    group.add_argument("--calib_provider", default="auto", choices=PROVIDERS, help="what of ONNX Runtime calibrates: a GPU is faster, and its scales differ in the last digits (default: auto, the GPU where onnxruntime-gpu is installed)")
    # fmt: on


def check_calibration_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of calibration that need another."""
    if args.calib_cache_version and not args.calib_cache:
        parser.error("--calib_cache_version goes with --calib_cache FILE")


def check_kept_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What stays out of a precision, with a precision that it can stay out of."""
    if args.keep_fp16 and (args.precision not in QUANTIZED or args.rest != "fp16"):
        parser.error("--keep_fp16 goes with --precision int8 and fp8, with the rest in fp16")
    if (args.keep_fp32 or args.precision_json) and args.precision in ("fp32", "tf32"):
        parser.error(f"--keep_fp32 and --precision_json do not go with --precision {args.precision}: all of it is float32")  # fmt: skip
    if args.rest != "fp16" and args.precision not in QUANTIZED:
        parser.error("--rest_precision goes with --precision int8 and fp8")


def check_int8_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of calibration with INT8 and FP8 alone, and these with something to get scales from."""
    if args.precision not in QUANTIZED:
        if calibration_from(args) != Int8Options() or args.calib_batches:
            parser.error("--calib_... goes with --precision int8 and fp8")
        return
    check_calibration_usage(parser, args)
    if args.calib_input or (args.calib_cache and args.calib_cache.is_file()):
        return
    if args.onnx.is_file() and _brings_qdq(args.onnx):
        return
    found = f" (nothing at {args.calib_cache})" if args.calib_cache else ""
    parser.error(
        f"--precision {args.precision} takes images to calibrate on, --calib_input DIR, or an existing --calib_cache FILE{found}"
    )


def _brings_qdq(path: Path) -> bool:
    try:
        return quantization.own_type(load_model(path)[0]) is not None
    except (OSError, GraphError):
        return False


def calibration_from(args: argparse.Namespace) -> Int8Options:
    """The options of `add_calibration_options` of a parsed command line."""
    num_images = args.calib_num_images or calibration.DEFAULT_NUM_IMAGES
    if args.calib_batches:
        num_images = args.calib_batches * (args.calib_batch_size or CALIBRATION_BATCH)
    return Int8Options(
        images=args.calib_input,
        cache=args.calib_cache,
        cache_version=args.calib_cache_version,
        num_images=num_images,
        fraction=args.calib_fraction,
        batch_size=args.calib_batch_size,
        method=args.calib_method,
        seed=args.calib_seed,
        provider=args.calib_provider,
    )


def int8_from(args: argparse.Namespace) -> Int8Options:
    """The options of calibration, and of what is kept, of a parsed command line."""
    return dataclasses.replace(
        calibration_from(args),
        keep_fp16=tuple(args.keep_fp16),
        keep_fp32=tuple(args.keep_fp32),
        precision_file=args.precision_json,
    )


def options_from(args: argparse.Namespace) -> BuildOptions:
    """The build options of a parsed command line."""
    return BuildOptions(
        precision=args.precision,
        rest=args.rest,
        weak_typing=args.weak_typing,
        batch=args.batch_size,
        size=args.input_size,
        workspace_gib=args.workspace,
        timing_cache=args.timing_cache,
        compute_capabilities=args.compute_capability,
        dla_core=args.dla_core,
        plugins=tuple(args.plugins),
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        strip=args.strip,
        optimization_level=args.optimization_level,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cli.setup_logging(args.verbose)
    return cli.run_main(
        lambda: run(
            args.onnx,
            options_from(args),
            engine_path=args.engine,
            save_onnx=args.save_onnx,
            flavor_name=args.flavor,
            check_input=args.fp16_check_input,
            int8=int8_from(args),
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
