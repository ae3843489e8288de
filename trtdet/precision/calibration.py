# SPDX-License-Identifier: Apache-2.0
"""INT8 calibration: how far each activation reaches, measured once on the CPU, kept in a file that
every TensorRT reads.

The cache is TensorRT's own text format, which trtexec --calib, DeepStream's int8-calib-file and
TensorRT 8 to 10 take:

    TRT-8601-EntropyCalibration2
    images: 3c010a14                 <- big-endian float32, largest magnitude / 127

`<cache>.json` beside it says what it was measured on, and is why a cache of another model, size or
normalisation is refused instead of silently used. It also keeps statistics per channel, which the
text format has no place for and `trtdet.precision.quantization` uses.

ONNX Runtime's own histogram calibrators are not used: they keep the activations of all images
before they look at them. Here one image (or batch) at a time is reduced to histograms whose ranges
are powers of two and grow by merging bins, so that memory does not depend on the number of images,
nor the result on their order.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet import sessions
from trtdet.errors import GraphError
from trtdet.graph.builder import POSITIONS_PREFIX
from trtdet.precision.body import Body, watched
from trtdet.precision.calibration_cache import CalibrationCache, Origin
from trtdet.precision.histograms import ChannelMoments, TensorHistogram
from trtdet.precision.options import (
    DEFAULT_METHOD,
    DEFAULT_NUM_IMAGES,
    DEFAULT_SEED,
    METHODS,
    Method,
    Provider,
)
from trtdet.precision.scales import INT8

#: Operators that pass on values as they are: input and output share one scale, so that TensorRT
#: need not requantize.
SAME_RANGE_OPS = frozenset(
    ["Flatten", "Identity", "MaxPool", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"]
)


def choose_images(
    paths: Sequence[Path],
    count: int = DEFAULT_NUM_IMAGES,
    *,
    fraction: float = 1.0,
    seed: int = DEFAULT_SEED,
) -> list[Path]:
    """At most `count` of all images, and at most `fraction` of them, at random with a fixed seed,
    sorted.

    The first images of a folder are often of one kind: COCO's are sorted by date of upload.
    """
    wanted = min(count, max(1, round(fraction * len(paths))))
    ordered = sorted(paths)
    if wanted >= len(ordered):
        return ordered
    chosen = np.random.default_rng(seed).permutation(len(ordered))[:wanted]
    return [ordered[i] for i in sorted(chosen)]


# ---- measuring


def wanted_providers(provider: Provider) -> list[str]:
    """ONNX Runtime's providers for a calibration, the wanted one first: CUDA or the CPU.

    Raises:
        EngineError: this ONNX Runtime was built without it.
    """
    named: sessions.Provider = provider
    if provider == "auto":
        named = "cuda" if sessions.PROVIDERS["cuda"] in sessions.available_providers() else "cpu"
    return sessions.pick_providers(named)


def calibrate(
    body: Body,
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    method: Method = DEFAULT_METHOD,
    *,
    origin: Origin | None = None,
    provider: Provider = "cpu",
    threads: int | None = None,
) -> CalibrationCache:
    """Run the FP32 model up to its heads over all feeds, once, and choose a scale for every
    activation.

    Args:
        feeds: input name -> array; any batch size the model takes, the last may be smaller. Looked
            at one at a time.
        method: minmax covers everything; percentile all but 0.01 %; mse minimizes the mean squared
            error, entropy the Kullback-Leibler divergence, as TensorRT's calibrator does.
        origin: what to note in the cache.
        provider: what ONNX Runtime runs on; on CUDA the scales differ in the last digits.

    Raises:
        ValueError: an unknown method, or no feeds.
        GraphError: an activation that is not finite.
        EngineError: `provider` is asked for by name, and this ONNX Runtime lacks it, or it does not
            start.
    """
    if method not in METHODS:
        raise ValueError(
            f"calibration method: expected one of {', '.join(METHODS)}, got {method!r}"
        )
    network = body.network
    tensors = _measured_tensors(network)
    session = _session(network, tensors, provider, threads)
    inputs = [i.name for i in network.graph.input]
    histograms = {name: TensorHistogram() for name in (*inputs, *tensors)}
    channelwise = body.quantizable_inputs
    channels = {name: ChannelMoments() for name in histograms if name in channelwise}
    count = 0
    for feed in feeds:
        values = [np.asarray(feed[name], np.float32) for name in inputs]
        values += session.run(tensors, dict(feed))
        for name, array in zip(histograms, values, strict=True):
            if not np.isfinite(array).all():
                raise GraphError(
                    f"calibration: activation '{name}' is not finite; the model or an image is broken"
                )
            histograms[name].add(array)
            if name in channels:
                channels[name].add(array)
        count += 1
    if not count:
        raise ValueError(
            "calibration: expected images, got none; check --calib_input and --calib_num_images"
        )
    scales = _all_scales(network, {n: INT8.scale(h.clip(method)) for n, h in histograms.items()})
    statistics = {
        name: c.statistics(histograms[name].noise(scales[name])) for name, c in channels.items()
    }
    return CalibrationCache(scales, statistics, origin)


def _measured_tensors(network: onnx.ModelProto) -> list[str]:
    """Float activations that are neither another's values passed on nor a Sigmoid, whose range
    is known; nor positions, which stay float.
    """
    float32 = onnx.TensorProto.FLOAT
    inferred = onnx.shape_inference.infer_shapes(network).graph
    types = {i.name: i.type.tensor_type.elem_type for i in inferred.value_info}
    return [
        name
        for node in network.graph.node
        if node.op_type not in SAME_RANGE_OPS and node.op_type != "Sigmoid"
        if not node.name.startswith(POSITIONS_PREFIX)
        for name in node.output
        if types.get(name, float32) == float32
    ]


def _all_scales(network: onnx.ModelProto, measured: Mapping[str, float]) -> dict[str, float]:
    """Scales of all float activations in the order of the graph, inputs first, rounded to
    float32.
    """
    scales = {i.name: measured[i.name] for i in network.graph.input if i.name in measured}
    for node in network.graph.node:
        for name in node.output:
            if node.op_type == "Sigmoid":
                scales[name] = INT8.scale(1.0)
            elif name in measured:
                scales[name] = measured[name]
            elif node.op_type in SAME_RANGE_OPS and node.input[0] in scales:
                scales[name] = scales[node.input[0]]
    return {name: float(np.float32(scale)) for name, scale in scales.items()}


def _session(
    body: onnx.ModelProto, tensors: Sequence[str], provider: Provider, threads: int | None
) -> sessions.Session:
    """A session on the CPU or on CUDA, where the CPU takes what CUDA cannot."""
    wanted = wanted_providers(provider)
    # Without TF32, CUDA's default: three digits are too few to measure with. As written: every
    # tensor is looked at, so there is nothing to fuse.
    session = sessions.open_session(
        watched(body, tensors),
        "the model",
        providers=sessions.with_options(wanted, {"use_tf32": "0"}),
        threads=threads,
        optimize=False,
    )
    sessions.check_provider(session.provider, wanted[0], provider)
    return session
