# SPDX-License-Identifier: Apache-2.0
"""The graph that create_onnx.py makes, against that of NVIDIA's sample (TensorRT 10.13, deleted in
11.0) for the same weights: what a GPU takes for it, on ONNX Runtime's CUDA provider.

    python TensorRT/samples/python/efficientdet/create_onnx.py --saved_model d0 --onnx sample.onnx
    --input_size 512,512
    python benchmarks/graph_time.py --onnx d0.onnx --sample_onnx sample.onnx

No TensorRT engine is timed: this is a proxy. Both files are cut to the network, without NMS and box
decoding. Per precision and batch, the two take turns; each turn is the mean of --runs, input and
outputs stay on the GPU; the ratio is the median of --rounds pairs. Then what NMS, as the ordinary
operators that take the plugin's place, adds to the network: that depends on what is found, so give
it photographs by --input. --provider cpu tries the script without a GPU.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from criteria import add_ending, add_graphs, run_benchmark

from trtdet import sessions
from trtdet.commands.values import positive_int
from trtdet.images.files import find_images, load_image
from trtdet.images.preprocess import preprocess
from trtdet.machine import describe_machine
from trtdet.nms import lowering
from trtdet.onnx_files import image_input, read_onnx
from trtdet.precision.body import cut_to_body
from trtdet.precision.floats import to_fp16
from trtdet.sessions import PROVIDERS
from trtdet.spec import ModelSpec

logger = logging.getLogger("trtdet.benchmarks")

#: What --check asks for: of the sample's time, and of NMS in the time of the whole.
WANTED_OF_SAMPLE, WANTED_OF_NMS = 1.02, 0.10
BATCHES = (1, 8)


class Timed:
    """A model whose input and outputs lie on the device."""

    def __init__(
        self,
        model: onnx.ModelProto,
        name: str,
        provider: str,
        batch: int,
        pixels: NDArray[Any] | None = None,
    ) -> None:
        """
        Args:
            pixels: the input; None: noise.
        """
        providers: list[Any] = [sessions.CPU]
        if provider == "cuda":
            options = {"cudnn_conv_algo_search": "HEURISTIC"}
            providers.insert(0, (PROVIDERS["cuda"], options))
        self._session = sessions.open_session(model, name, providers=providers)
        if provider == "cuda" and self._session.provider != PROVIDERS["cuda"]:
            raise ValueError("--provider cuda: ONNX Runtime's CUDA provider does not start here")
        self._raw: Any = self._session._session  # sessions offers no such loop
        image = image_input(model, name)
        if pixels is None:
            shape = [dim.dim_value or batch for dim in image.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
            pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
        ort = sessions.load_onnxruntime()
        self._value = ort.OrtValue.ortvalue_from_numpy(pixels, provider, 0)
        self._binding = self._raw.io_binding()
        self._binding.bind_ortvalue_input(image.name, self._value)
        for output in model.graph.output:
            self._binding.bind_output(output.name, provider)
        self.run(10)

    def run(self, times: int) -> float:
        """Milliseconds a run takes."""
        start = time.perf_counter()
        for _ in range(times):
            self._raw.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return (time.perf_counter() - start) / times * 1000


def pairs(first: Timed, second: Timed, rounds: int, runs: int) -> tuple[float, float, float]:
    """Median milliseconds of each, and the median of their ratios."""
    times = []
    for number in range(rounds):
        order = (first, second) if number % 2 else (second, first)
        found = {one: one.run(runs) for one in order}
        times.append((found[first], found[second]))
    ours, theirs = (median(column) for column in zip(*times, strict=True))
    return ours, theirs, median(a / b for a, b in times)


def photographs(source: Path, model: onnx.ModelProto, path: Path, batch: int) -> NDArray[Any]:
    """The first images of a folder as an input of a model."""
    preprocessing = ModelSpec.from_onnx(model, path).preprocessing
    found = find_images(source, num_images=batch)
    return np.stack([preprocess(load_image(one), preprocessing)[0] for one in found])


def nms_share(
    whole: onnx.ModelProto, args: argparse.Namespace, batch: int
) -> tuple[float, float, float]:
    """Milliseconds with NMS and without, and its share of the former."""
    pixels = photographs(args.input, whole, args.onnx, batch) if args.input else None
    spec = ModelSpec.from_onnx(whole, args.onnx)
    form = lowering.fast_form(spec, cuda=args.provider == "cuda")
    lowered = lowering.lower(whole, form)
    ends = Timed(lowered, "with NMS", args.provider, batch, pixels)
    network = Timed(cut_to_body(whole), "network", args.provider, batch, pixels)
    with_nms, without, ratio = pairs(ends, network, args.rounds, args.runs)
    return with_nms, without, 1 - 1 / ratio


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes there are, and of the kinds that cost time without computing."""
    kinds = Counter(node.op_type for node in model.graph.node)
    shown = ("Conv", "Transpose", "Reshape", "Cast", "BatchNormalization", "Resize")
    return {"nodes": len(model.graph.node), **{kind: kinds[kind] for kind in shown}}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    whole = read_onnx(args.onnx, option="--onnx")
    networks = {"ours": cut_to_body(whole), "sample": cut_to_body(read_onnx(args.sample_onnx, option="--sample_onnx"))}  # fmt: skip
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "operators": {name: operators(network) for name, network in networks.items()},
        "times": {},
        "nms": {},
    }
    convert: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "fp32": lambda model: model,
        "fp16": lambda model: to_fp16(model)[0],
    }
    for precision, to in convert.items():
        made = {name: to(network) for name, network in networks.items()}
        for batch in BATCHES:
            ours, theirs = (Timed(made[name], name, args.provider, batch) for name in made)
            found = pairs(ours, theirs, args.rounds, args.runs)
            report["times"][f"{precision}, batch {batch}"] = found
            logger.info("%s, batch %d: %.3f ms, sample %.3f ms, ratio %.3f", precision, batch, *found)  # fmt: skip
    for batch in BATCHES:
        report["nms"][f"batch {batch}"] = found = nms_share(whole, args, batch)
        logger.info("batch %d: %.3f ms with NMS, %.3f ms without", batch, *found[:2])
    return report


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it is so."""
    checks = {
        f"{name}: at most {WANTED_OF_SAMPLE} of the sample's": ratio <= WANTED_OF_SAMPLE
        for name, (_, _, ratio) in report["times"].items()
    }
    for name, (_, _, share) in report["nms"].items():
        checks[f"NMS, {name}: below {WANTED_OF_NMS:.0%} of the whole"] = share < WANTED_OF_NMS
    return checks


def show(report: dict[str, Any]) -> None:
    print(f"{'operators':<24}" + "".join(f"{kind:>20}" for kind in report["operators"]["ours"]))
    for name, counts in report["operators"].items():
        print(f"{name:<24}" + "".join(f"{count:>20}" for count in counts.values()))
    print(f"\n{'network':<24}{'ours, ms':>12}{'sample, ms':>12}{'ratio':>10}")
    for name, (ours, theirs, ratio) in report["times"].items():
        print(f"{name:<24}{ours:>12.3f}{theirs:>12.3f}{ratio:>10.3f}")
    print(f"\n{'NMS of operators':<24}{'with, ms':>12}{'without, ms':>12}{'share':>10}")
    for name, (with_nms, without, share) in report["nms"].items():
        print(f"{name:<24}{with_nms:>12.3f}{without:>12.3f}{share:>10.1%}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_graphs(parser)
    # fmt: off
    parser.add_argument("--input", type=Path, help="photographs for NMS, at least 8; left out: noise")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=20, help="pairs (default: %(default)s)")
    parser.add_argument("--runs", type=positive_int, default=30, help="runs of a turn (default: %(default)s)")
    # fmt: on
    add_ending(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_benchmark(args, partial(measure, args), show, criteria)


if __name__ == "__main__":
    raise SystemExit(main())
