# SPDX-License-Identifier: Apache-2.0
"""What a build would be, from the model and the options alone: nothing is built, calibrated or
written.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from trtdet import files
from trtdet.engine import build, stage, support
from trtdet.engine.flavor import find_flavor
from trtdet.engine.options import BatchRange, BuildOptions
from trtdet.errors import EngineError
from trtdet.images.files import find_images
from trtdet.precision.body import Body
from trtdet.precision.calibration import choose_images
from trtdet.precision.calibration_cache import CalibrationCache, needs_header, sidecar_path
from trtdet.precision.floats import to_bf16, to_fp16
from trtdet.precision.graph_types import narrow_types
from trtdet.precision.options import DEFAULT_SHARE, QUANTIZED_PRECISIONS, Int8Options
from trtdet.precision.prepare import QUANTIZED, check_calibration, kept_nodes, load_model
from trtdet.precision.quantization import (
    QuantizationOptions,
    own_type,
    plan_quantization,
    report_of,
)
from trtdet.sources.subgraphs import reads

MIB = 2**20
#: Bytes of a number in the layers that are not in 8 bits.
WIDTHS = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class DryRun:
    """What would be built.

    Attributes:
        rows: what it is about -> what there is to say, in order.
    """

    rows: dict[str, list[str]]

    def __str__(self) -> str:
        lines = []
        for name, texts in self.rows.items():
            lines += [f"{name if i == 0 else '':<13}{text}" for i, text in enumerate(texts)]
        return "\n".join([*lines, "nothing was built or written (--dry_run)"])


def plan_file(
    onnx_path: Path,
    engine_path: Path | None,
    options: BuildOptions,
    int8: Int8Options,
    *,
    save_onnx: Path | None = None,
    flavor_name: str | None = None,
    check_input: Path | None = None,
) -> DryRun:
    """What `stage.build_file` with the same arguments would do, `stage.prepare_file` without an
    engine.

    Raises:
        OSError, GraphError, EngineError, ValueError: what a build would refuse, as far as it is
            known before calibration.
    """
    outputs = stage.check_outputs(onnx_path, engine_path, options, int8, save_onnx)
    about = (
        _flavor(flavor_name, options, save_onnx)
        if engine_path
        else "none: the ONNX file alone is written"
    )
    model, spec = load_model(onnx_path)
    if check_input:
        find_images(check_input, option="--fp16_check_input")
    preprocessing = spec.preprocessing
    if engine_path:
        build.check_batch(model, options)
        build.check_shapes(model)
        preprocessing = build.choose_size(spec.preprocessing, options.size)
    body = Body(model, spec.replace(preprocessing=preprocessing))
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    batch = BatchRange(fixed, fixed, fixed) if fixed else options.batch or BatchRange(1, 1, 1)
    image = "x".join(map(str, preprocessing.image_shape))
    sizes = f"{preprocessing.layout} {image} {preprocessing.dtype}"
    if preprocessing.size_range:
        sizes += ", of {}x{} to {}x{}".format(*preprocessing.size_range[0], *preprocessing.size_range[1])  # fmt: skip
    counts = f"batch {batch.min}" if batch.min == batch.max else f"batches of {batch.min} to {batch.max}, tuned for {batch.opt}"  # fmt: skip
    rows = {
        "TensorRT": [about],
        "input": [f"{sizes}; {counts}{' (fixed in the ONNX file)' if fixed else ''}"],
        "precision": _precision(body, options, int8),
    }
    written = [str(path) for path in outputs]
    if options.precision in QUANTIZED_PRECISIONS and own_type(model) is None:
        rows["calibration"] = _calibration(body, int8)
        written += _written_caches(int8)
    rows["memory"] = _memory(body, options, batch.max)
    rows["writes"] = written
    return DryRun(rows)


def _flavor(name: str | None, options: BuildOptions, save_onnx: Path | None) -> str:
    """What there is to say of the TensorRT that would build."""
    try:
        flavor = find_flavor(name)
    except EngineError as error:
        return f"not found, so its limits are not checked: {error}"
    support.check_options(flavor, options)
    if save_onnx:
        support.check_saved(flavor, options)
    capabilities = options.compute_capabilities or support.local_compute_capability()
    target = f"compute capability {', '.join(capabilities)}" if capabilities else "every GPU from 8.0 on" if flavor.is_rtx else "the GPU of this machine; none was found"  # fmt: skip
    typing = "weakly typed" if support.weakly_typed(flavor, options) else "strongly typed"
    return f"{flavor}, {target}, {typing}"


def _precision(body: Body, options: BuildOptions, int8: Int8Options) -> list[str]:
    """Which nodes get which precision."""
    to = options.precision
    if to in QUANTIZED_PRECISIONS:
        return _quantized(body, options, int8)
    narrow = narrow_types(body.model)
    if to in ("fp32", "tf32") or narrow == {to}:
        count = len(body.model.graph.node)
        return [f"{to.upper()}: all of {count} nodes{', as the ONNX file has them' if narrow else ''}"]  # fmt: skip
    names = [node.name for node in body.model.graph.node if node.name]
    kept = kept_nodes(body, int8, to, names)
    wide = [pattern for pattern, kind in kept.items() if kind == "fp32"]
    if to == "bf16":
        return to_bf16(body.model, keep_fp32=wide)[1].lines()
    lines = to_fp16(body.model, keep_fp32=wide)[1].lines()
    return [*lines, "nodes whose activations do not fit FP16 stay float32 too: a build runs images to find them"]  # fmt: skip


def _quantized(body: Body, options: BuildOptions, int8: Int8Options) -> list[str]:
    """The convolutions that may be in 8 bits; which of them leave it is measured by a build."""
    to = options.precision
    if own_type(body.model) is not None:
        return report_of(body).lines()
    convs = [node.name for node in body.model.graph.node if node.op_type == "Conv"]
    kept = kept_nodes(body, int8, to, convs)
    # Every tensor is taken to have a scale; no statistics, so nothing is rescaled.
    anywhere = CalibrationCache({layer.input: 1.0 for layer in body.layers})
    settings = QuantizationOptions(keep=tuple(kept), to=QUANTIZED[to], equalize="none")
    report = plan_quantization(body, anywhere, settings).report()
    first, *rest = report.lines()
    share = int8.share or (1.0 if kept or not int8.images else DEFAULT_SHARE)
    note = f"of these the build leaves out those that hurt most, and keeps at least {share:.0%} (--int8_share)"  # fmt: skip
    return [f"{first} may be in 8 bits, the rest in {options.rest.upper()}", *rest, *([note] if share < 1 else [])]  # fmt: skip


def _calibration(body: Body, int8: Int8Options) -> list[str]:
    """Images and cache."""
    lines = []
    if int8.images:
        found = find_images(int8.images, option="--calib_input")
        chosen = choose_images(found, int8.num_images, fraction=int8.fraction, seed=int8.seed)
        lines.append(f"{len(chosen)} of {len(found)} images of {int8.images} (seed {int8.seed})")
    if int8.cache is None:
        lines.append("the scales are not kept; --calib_cache FILE keeps them for the next build")
    elif int8.cache.is_file():
        lines.append(f"scales from {int8.cache}, if it was made for this model and these images")
    else:
        files.check_writable(int8.cache)
        files.check_writable(sidecar_path(int8.cache))
        lines.append(f"the scales are written to {int8.cache}")
    cached = int8.cache is not None and int8.cache.is_file()
    if not int8.images and not cached:
        raise ValueError("calibration: expected images or an existing cache, found neither; give --calib_input DIR, or --calib_cache FILE")  # fmt: skip
    if not cached:
        check_calibration(body, int8)
    return lines


def _written_caches(int8: Int8Options) -> list[str]:
    """Of the calibration cache and what lies beside it, what is written."""
    cache = int8.cache
    if cache is None:
        return []
    sidecar = sidecar_path(cache)
    if not cache.is_file():
        return [str(cache), str(sidecar)]
    found = []
    if int8.cache_version and needs_header(cache, int8.cache_version):
        found.append(f"{cache}: its first line, for another TensorRT")
    if int8.images and sidecar.is_file():  # without one the cache is another program's
        found.append(f"{sidecar}: what it does not say yet, of rounding and of --int8_share")
    return found


# ---- memory


def _memory(body: Body, options: BuildOptions, batch: int) -> list[str]:
    """Weights and activations, and what TensorRT may take besides."""
    quantized = options.precision in QUANTIZED_PRECISIONS
    width = WIDTHS[options.rest if quantized else options.precision]
    weights = sum(math.prod(w.dims) for w in body.model.graph.initializer)
    convolutions = sum(math.prod(w.dims) for w in body.model.graph.initializer if quantized and len(w.dims) > 2)  # fmt: skip
    weight_bytes = (weights - convolutions) * width + convolutions
    peak, unknown = peak_values(body.network, batch, body.spec.preprocessing.image_shape)
    largest = f"{options.workspace_gib:g} GiB at most" if options.workspace_gib else "up to the memory of the GPU; --workspace limits it"  # fmt: skip
    left = f" ({unknown} tensors of unknown size are not counted)" if unknown else ""
    return [
        f"weights about {weight_bytes / MIB:.1f} MiB",
        f"activations about {peak * width / MIB:.0f} MiB at a batch of {batch}: what is alive at the same time, without fusion{left}",
        f"scratch memory of the builder {largest}",
    ]


def peak_values(
    network: onnx.ModelProto, batch: int, image_shape: tuple[int, ...]
) -> tuple[int, int]:
    """The most numbers that are alive at the same time when the nodes run in their order, and
    tensors of unknown size.
    """
    model = onnx.ModelProto()
    model.CopyFrom(network)
    del model.graph.value_info[:]
    for dim, value in zip(model.graph.input[0].type.tensor_type.shape.dim, (batch, *image_shape), strict=True):  # fmt: skip
        dim.Clear()
        dim.dim_value = value
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            sizes[info.name] = math.prod(d.dim_value for d in dims)
    readers = Counter(name for node in graph.node for name in set(reads(node)))
    readers.update(output.name for output in graph.output)
    alive = {graph.input[0].name: sizes.get(graph.input[0].name, 0)}
    now = peak = sum(alive.values())
    unknown = 0
    for node in graph.node:
        for name in node.output:
            if name and name not in sizes:
                unknown += 1
            elif name and readers[name]:
                alive[name] = sizes[name]
                now += sizes[name]
        peak = max(peak, now)
        for name in set(reads(node)):
            readers[name] -= 1
            if not readers[name]:
                now -= alive.pop(name, 0)
    return peak, unknown
