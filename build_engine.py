#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT engine from an ONNX file that create_onnx.py wrote.

  build_engine.py --onnx d0.onnx --engine d0.engine --precision fp16 --batch_size 1,4,8

writes d0.engine, which trtexec, Triton and DeepStream load too, and d0.engine.json, which tells infer.py and eval_coco.py what it
is. TensorRT-RTX builds without a GPU. With --save_onnx, what TensorRT is given is written as an ONNX file, precision included:
it runs in ONNX Runtime (BF16 not on a CPU), and on a Jetson `trtexec --onnx=FILE --stronglyTyped --saveEngine=d0.engine` builds the same engine
without Python.

  build_engine.py --onnx d0.onnx --engine d0.engine --precision int8 --calib_input photos --calib_cache d0.cache

measures the activations on the CPU, once, and puts convolutions in INT8 (QuantizeLinear/DequantizeLinear pairs); the rest stays
float32. It takes TensorRT 10 or later, or TensorRT-RTX. docs/int8.md says what it costs.
"""

import argparse
import logging
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
from trtdet import calibration, cli, engine, files, precision, quantization
from trtdet.calibration import CalibrationCache
from trtdet.engine import PRECISIONS, BuildOptions, Built, Prepared
from trtdet.errors import EngineError, GraphError
from trtdet.histograms import METHODS, Method
from trtdet.sidecar import BatchRange, EngineInfo, write_engine
from trtdet.spec import ModelSpec
from trtdet.tensorrt_flavor import FLAVORS, Flavor, find_flavor

logger = logging.getLogger("build_engine")

#: A public-domain photograph (NASA, Eileen Collins), to see how far activations reach.
CHECK_IMAGE = trtdet.PHOTOGRAPH
#: Images of --fp16_check_input that are run: on a CPU that is a minute for the largest models.
MAX_CHECK_IMAGES = 32
#: Images that calibration runs at a time, where the model's batch is dynamic.
CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class Int8Options:
    """Where the scales come from, and what stays out of INT8.

    Attributes:
        images: an image or a directory of them; None: the cache alone.
        cache: read where it exists, else written; None: the scales are not kept.
        num_images, fraction: at most so many images, and at most this share of all.
        batch_size: None: `CALIBRATION_BATCH`, or one by one where the model's batch is fixed.
        keep_fp32: patterns of node names; empty: the model's own `sensitive_nodes`.
    """

    images: Path | None = None
    cache: Path | None = None
    num_images: int = calibration.DEFAULT_NUM_IMAGES
    fraction: float = 1.0
    batch_size: int | None = None
    method: Method = calibration.DEFAULT_METHOD
    seed: int = calibration.DEFAULT_SEED
    keep_fp32: tuple[str, ...] = ()


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
    if options.precision == "int8":
        prepared = prepare_int8(model, spec, int8, flavor)
    else:
        prepared = prepare(model, spec, options.precision, check_input)
    if save_onnx:
        files.write_bytes(save_onnx, prepared.typed.SerializeToString())
    if flavor and engine_path:
        built = engine.build(flavor, prepared, options)
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
) -> Prepared:
    """Put the precision into the model's tensor types; fp32 and tf32 leave it as it is.

    Raises:
        GraphError: the model is in another narrow precision already.
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
    if to == "bf16":
        typed, report = precision.to_bf16(model)
    else:
        ranges = measure_ranges(model, spec, check_input)
        typed, report = precision.to_fp16(model, ranges=ranges)
    summary_line, *kept = report.lines()
    logger.info(summary_line)
    for line in kept:
        logger.warning(line)
    return Prepared(model, typed, report)


def prepare_int8(
    model: onnx.ModelProto, spec: ModelSpec, options: Int8Options, flavor: Flavor | None = None
) -> Prepared:
    """Put convolutions in INT8 with the scales of a cache or a new calibration; a model with its own Q/DQ is left as it is.

    Args:
        flavor: for whose version the cache is written; the scales do not depend on it.
    """
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    for pattern in options.keep_fp32:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--keep_fp32 {pattern!r}: no convolution has such a name; theirs are {', '.join(names[:3])}, ...")  # fmt: skip
    own = has_qdq(model)
    if own and options != Int8Options():
        logger.warning(
            "the ONNX file brings its own Q/DQ: --calib_... and --keep_fp32 are not used"
        )
    cache = CalibrationCache({}) if own else scales_of(model, spec, options, flavor)
    typed, report = quantization.insert_qdq(
        model, cache, quantization.QuantizationOptions(keep=options.keep_fp32 or None)
    )
    for line in report.lines():
        logger.info(line)
    return Prepared(model, typed, quantization=report)


def has_qdq(model: onnx.ModelProto) -> bool:
    """Whether the model brings its own INT8, from training."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def scales_of(
    model: onnx.ModelProto, spec: ModelSpec, options: Int8Options, flavor: Flavor | None
) -> CalibrationCache:
    """The cache where there is one and it fits, else a new calibration, which is written there.

    Raises:
        ValueError: a cache of another model, preprocessing, method or other images; images that cannot be read.
        EngineError: ONNX Runtime is not installed.
    """
    paths = None
    if options.images:
        paths = calibration.choose_images(
            find_images(options.images),
            options.num_images,
            fraction=options.fraction,
            seed=options.seed,
        )
    origin = calibration.origin(model, spec.preprocessing, paths, options.method, options.seed)
    if options.cache and options.cache.is_file():
        cache = calibration.read_cache(options.cache, origin)
        logger.info("scales of %d tensors from %s", len(cache.scales), options.cache)
        return cache
    if paths is None:
        raise ValueError(f"--precision int8: nothing to calibrate on and no cache at {options.cache}; give --calib_input")  # fmt: skip
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise EngineError("--calib_input runs the model in ONNX Runtime: pip install onnxruntime") from None  # fmt: skip
    feeds = calibration_feeds(model, spec, paths, options.batch_size)
    cache = calibration.calibrate(model, feeds, options.method, origin=origin)
    if options.cache:
        version = flavor.version if flavor and not flavor.is_rtx else None
        cache.write(options.cache, version or calibration.DEFAULT_CACHE_VERSION)
        logger.info("wrote %s", options.cache)
    return cache


def calibration_feeds(
    model: onnx.ModelProto, spec: ModelSpec, paths: Sequence[Path], batch_size: int | None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The images, preprocessed as for inference; in a model of a fixed batch, one at a time fills every row."""
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
            if batches.failures:
                break  # other images than the cache would say
            yield {network_input.name: np.repeat(batch.images, repeats, axis=0)}
            bar.update(len(batch.images))
    if batches.failures:
        path, message = batches.failures[0]
        raise ValueError(f"--calib_input: expected images that can be read, found {path}: {message}; take it out")  # fmt: skip


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
    paths = find_images(check_input) if check_input else [CHECK_IMAGE]
    if len(paths) > MAX_CHECK_IMAGES:
        spread = np.linspace(0, len(paths) - 1, MAX_CHECK_IMAGES).astype(int)
        logger.info("activation ranges: %d of %d images, evenly spread", len(spread), len(paths))
        paths = [paths[i] for i in spread]
    ranges = precision.activation_ranges(model, _feeds(model, spec, paths))
    tensor = max(ranges, key=ranges.__getitem__)
    logger.info("largest activation on %d image(s): %.4g in '%s'", len(paths), ranges[tensor], tensor)  # fmt: skip
    return ranges


def _feeds(
    model: onnx.ModelProto, spec: ModelSpec, paths: Sequence[Path]
) -> Iterator[dict[str, NDArray[Any]]]:
    """One image at a time; a model of a fixed batch gets it in every row."""
    network_input = model.graph.input[0]
    batch = network_input.type.tensor_type.shape.dim[0].dim_value or 1
    for path in paths:
        image, _ = preprocess(load_image(path), spec.preprocessing)
        yield {network_input.name: np.repeat(image[None], batch, axis=0)}


def summary(flavor: Flavor, built: Built, info: EngineInfo, seconds: float) -> str:
    """A few lines for the reader: what was built and what it took."""
    target = ", ".join(info.compute_capabilities)
    if not target:
        target = "8.0 and later" if flavor.is_rtx else "this GPU"
    rows = {
        "engine": f"{flavor}, compute capability {target}, batch {info.batch}",
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
    parser.add_argument("-p", "--precision", default="fp16", choices=PRECISIONS, help="of the network; preprocessing, box decoding and NMS are always float32; with int8, all but convolutions (default: fp16)")
    parser.add_argument("-b", "--batch_size", type=parse_batch, metavar="N|MIN,OPT,MAX", help="batch sizes the engine takes; OPT is the one it is tuned for (default: the ONNX file's, 1 where that is dynamic)")
    parser.add_argument("-d", "--dynamic_batch_size", dest="batch_size", type=parse_batch_range, metavar="MIN,OPT,MAX", help="the same as --batch_size MIN,OPT,MAX")
    parser.add_argument("--save_onnx", type=Path, metavar="FILE", help="write the ONNX model with its precision applied; without --engine, that is all (needs no TensorRT)")
    parser.add_argument("--fp16_check_input", type=Path, metavar="PATH", help="images to check on whether FP16 holds the activations (default: a photograph that comes with this)")
    int8 = parser.add_argument_group("INT8")
    int8.add_argument("--calib_input", type=Path, metavar="DIR", help="images to calibrate on, as the detector will see them; no annotations")
    int8.add_argument("--calib_cache", type=Path, metavar="FILE", help="TensorRT's calibration cache: used where it exists and belongs to this model and these images, else written")
    int8.add_argument("--calib_num_images", type=cli.positive_int, default=calibration.DEFAULT_NUM_IMAGES, metavar="N", help="at most so many, chosen at random from all (default: %(default)s)")
    int8.add_argument("--calib_fraction", type=cli.positive_unit_interval, default=1.0, metavar="F", help="at most this share of all images (default: 1)")
    int8.add_argument("--calib_batch_size", type=cli.positive_int, metavar="N", help=f"images at a time; the scales do not depend on it (default: {CALIBRATION_BATCH}, or the ONNX file's)")
    int8.add_argument("--calib_method", default=calibration.DEFAULT_METHOD, choices=METHODS, help="how the range of an activation is chosen (default: %(default)s)")
    int8.add_argument("--calib_seed", type=int, default=calibration.DEFAULT_SEED, metavar="N", help="of the choice of images (default: %(default)s)")
    int8.add_argument("--keep_fp32", nargs="+", default=[], metavar="PATTERN", help="convolutions that stay float32, by node name, such as '*/stem/*' (default: those that the ONNX file names as sensitive)")
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
    how.add_argument("--plugins", type=Path, nargs="+", default=[], metavar="LIB.so", help="libraries of plugins that the model uses")
    parser.add_argument("-v", "--verbose", action="store_true", help="show TensorRT's own messages too")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.engine and not args.save_onnx:
        parser.error("nothing to write: give --engine, --save_onnx or both")
    if not args.engine and (
        args.flavor or options_from(args) != BuildOptions(precision=args.precision)
    ):
        parser.error(
            "without --engine nothing is built: leave out all but --onnx, --precision, --save_onnx, --fp16_check_input, --calib_... and --keep_fp32"
        )
    if args.fp16_check_input and args.precision != "fp16":
        parser.error("--fp16_check_input goes with --precision fp16")
    check_int8_usage(parser, args)
    written = [path for path in (args.engine, args.save_onnx, args.calib_cache) if path]
    if args.engine and args.engine.suffix.lower() == ".onnx":
        parser.error(f"--engine: an engine, not ONNX; did you mean --save_onnx {args.engine}?")
    if args.onnx in written or len(set(written)) < len(written):
        parser.error("--onnx, --engine, --save_onnx and --calib_cache: expected different files")
    return args


def check_int8_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options of INT8 with INT8 alone, and INT8 with something to get scales from."""
    if args.precision != "int8":
        if int8_from(args) != Int8Options():
            parser.error("--calib_... and --keep_fp32 go with --precision int8")
        return
    if args.calib_input or (args.calib_cache and args.calib_cache.is_file()):
        return
    if args.onnx.is_file() and _brings_qdq(args.onnx):
        return
    found = f" (nothing at {args.calib_cache})" if args.calib_cache else ""
    parser.error(
        f"--precision int8 takes images to calibrate on, --calib_input DIR, or an existing --calib_cache FILE{found}"
    )


def _brings_qdq(path: Path) -> bool:
    try:
        return has_qdq(load_model(path)[0])
    except (OSError, GraphError):
        return False


def int8_from(args: argparse.Namespace) -> Int8Options:
    """The INT8 options of a parsed command line."""
    return Int8Options(
        images=args.calib_input,
        cache=args.calib_cache,
        num_images=args.calib_num_images,
        fraction=args.calib_fraction,
        batch_size=args.calib_batch_size,
        method=args.calib_method,
        seed=args.calib_seed,
        keep_fp32=tuple(args.keep_fp32),
    )


def options_from(args: argparse.Namespace) -> BuildOptions:
    """The build options of a parsed command line."""
    return BuildOptions(
        precision=args.precision,
        batch=args.batch_size,
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
