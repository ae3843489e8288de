# SPDX-License-Identifier: Apache-2.0
"""Stage 2 from file to file: prepare a model in its precision, build it, write engine and
sidecar.
"""

import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from trtdet import files
from trtdet.engine import build, support
from trtdet.engine.build import Built
from trtdet.engine.config import trtexec_flags
from trtdet.engine.flavor import Flavor, find_flavor
from trtdet.engine.options import BuildOptions
from trtdet.engine.sidecar import EngineInfo, sidecar_path, write_engine
from trtdet.onnx_files import check_apart
from trtdet.precision.calibration_cache import sidecar_path as cache_sidecar_path
from trtdet.precision.options import Int8Options
from trtdet.precision.prepare import Prepared, load_model, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineBuild:
    """What stage 2 wrote.

    Attributes:
        path: the engine.
        info: what stands in its sidecar.
        seconds: from the ONNX file to both.
    """

    path: Path
    flavor: Flavor
    built: Built
    info: EngineInfo
    seconds: float

    def __str__(self) -> str:
        """A few lines for the reader: what was built and what it took."""
        target = ", ".join(self.info.compute_capabilities)
        sizes = ", input " + "x".join(map(str, self.info.spec.preprocessing.size_hw))
        if size_range := self.info.spec.preprocessing.size_range:
            sizes += " of {}x{} to {}x{}".format(*size_range[0], *size_range[1])
        if not target:
            target = "8.0 and later" if self.flavor.is_rtx else "this GPU"
        rows = {
            "engine": f"{self.flavor}, compute capability {target}, batch {self.info.batch}{sizes}",
            "precision": str(self.built.shares),
            "size": f"{len(self.built.plan) / 2**20:.1f} MiB",
            "time": f"{self.seconds:.1f} s, of which {self.built.seconds:.1f} s in the builder",
        }
        return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


def check_outputs(
    onnx_path: Path,
    engine_path: Path | None,
    options: BuildOptions,
    int8: Int8Options,
    save_onnx: Path | None,
) -> list[Path]:
    """Find out before the work whether what `build_file` writes can be written, and that it
    replaces nothing that is read.

    Args:
        engine_path: None: `prepare_file` with these arguments.

    Returns:
        What is written whatever the model is like: all but the calibration cache.

    Raises:
        OSError, GraphError, ValueError: names the file.
    """
    paths = [save_onnx]
    if engine_path:
        paths = [engine_path, sidecar_path(engine_path), save_onnx, options.timing_cache]
    outputs = [path for path in paths if path is not None]
    caches = [] if int8.cache is None else [int8.cache, cache_sidecar_path(int8.cache)]
    files.check_outputs(outputs, [onnx_path, int8.precision_file, *caches])
    check_apart(outputs, onnx_path)
    return outputs


def prepare_file(
    onnx_path: Path,
    save_onnx: Path,
    options: BuildOptions,
    int8: Int8Options = Int8Options(),
    check_input: Path | None = None,
) -> None:
    """Write the model with its precision applied, as a strongly typed TensorRT takes it.

    Needs no TensorRT.

    Raises:
        OSError, GraphError: the ONNX file is missing or not what stage 1 writes.
        ValueError: a calibration cache of something else, or images that cannot be read.
    """
    check_outputs(onnx_path, None, BuildOptions(), int8, save_onnx)
    model, spec = load_model(onnx_path)
    prepared = prepare(
        model, spec, options.precision, int8, rest=options.rest, check_input=check_input
    )
    files.write_bytes(save_onnx, prepared.typed.SerializeToString())


def build_file(
    onnx_path: Path,
    engine_path: Path,
    options: BuildOptions,
    int8: Int8Options = Int8Options(),
    *,
    save_onnx: Path | None = None,
    flavor_name: str | None = None,
    check_input: Path | None = None,
) -> EngineBuild:
    """Build an engine, with its sidecar beside it.

    Args:
        save_onnx: write the model as this TensorRT is given it here too, with the plugin of NMS and
            any dynamic size.
        flavor_name: of `trtdet.engine.flavor.FLAVORS`; None: the first that is installed.
        check_input: images on which FP16's range is checked; None: a photograph that comes with the
            package.

    Raises:
        OSError, GraphError: the ONNX file is missing or not what stage 1 writes.
        EngineError: no TensorRT, or it cannot do what is asked, or failed.
        ValueError: a calibration cache of something else, or images that cannot be read.
    """
    start = time.monotonic()
    check_outputs(onnx_path, engine_path, options, int8, save_onnx)
    flavor = find_flavor(flavor_name)
    support.check_options(flavor, options)
    if save_onnx:
        support.check_saved(flavor, options)
    logger.info("%s", flavor)
    model, spec = load_model(onnx_path)
    build.check_batch(model, options)
    build.check_shapes(model)
    size = build.choose_size(spec.preprocessing, options.size)
    spec = spec.replace(preprocessing=size)
    prepared = prepare(
        model,
        spec,
        options.precision,
        int8,
        rest=options.rest,
        target=support.target_of(flavor, options),
        check_input=check_input,
    )
    if save_onnx:
        _save(save_onnx, flavor, prepared, options)
    built = build.build(flavor, prepared, options, spec.preprocessing)
    info = build.describe(
        flavor,
        built,
        options,
        spec=spec,
        onnx_path=onnx_path,
        quantization=prepared.quantization,
    )
    info = write_engine(engine_path, built.plan, info)
    return EngineBuild(engine_path, flavor, built, info, time.monotonic() - start)


def _save(path: Path, flavor: Flavor, prepared: Prepared, options: BuildOptions) -> None:
    """Write the model as TensorRT is given it. What it takes as flags is logged: the file alone
    does not say it.
    """
    files.write_bytes(path, build.choose_model(flavor, prepared, options).SerializeToString())
    flags = trtexec_flags(options, prepared) if support.weakly_typed(flavor, options) else []
    if not flags:
        return
    short = [flag for flag in flags if not flag.startswith("--layer")]
    pins = "" if short == flags else ", and --layerPrecisions and --layerOutputTypes, which -v shows: they keep nodes in float32"  # fmt: skip
    logger.warning("%s: %s takes the precision as flags, not from the file; for trtexec: %s%s", path, flavor, " ".join(short), pins)  # fmt: skip
    logger.debug("trtexec %s", shlex.join([f"--onnx={path}", *flags]))
