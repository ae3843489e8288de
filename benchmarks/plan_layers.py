# SPDX-License-Identifier: Apache-2.0
"""What TensorRT-RTX makes of the graph of create_onnx.py, and of that of NVIDIA's sample for the
same weights: layers and casts of the network that it parses, kernels of the plan that it builds.

    python benchmarks/plan_layers.py --onnx d0.onnx --sample_onnx sample.onnx

Needs TensorRT-RTX (requirements-rtx.txt), no GPU. Both files are cut to the network, without NMS
and box decoding, and built for batch 1. benchmarks/graph_time.py says how to make sample.onnx, and
what a GPU takes for both.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from criteria import add_ending, add_graphs, run_benchmark

from trtdet.engine import layers
from trtdet.machine import describe_machine
from trtdet.onnx_files import image_input, read_onnx
from trtdet.precision.body import cut_to_body
from trtdet.precision.floats import to_fp16

#: Kinds of statements in a plan that wait for others and compute nothing.
MARKS = ("signal", "wait")


def for_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with batch 1."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    image_input(fixed, "model").type.tensor_type.shape.dim[0].dim_value = 1
    return fixed


def build(model: onnx.ModelProto, name: str, capability: str) -> dict[str, Any]:
    """What TensorRT-RTX makes of a network, for GPUs of a compute capability."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise ValueError(f"{name}: TensorRT-RTX does not parse it ({parser.get_error(0)})")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"{name}: TensorRT-RTX does not build it")
    data = bytes(plan)
    read = layers.statements(data)
    if read is None:
        raise ValueError(f"{name}: this TensorRT-RTX writes plans that cannot be read")
    kinds = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    return {
        "layers": network.num_layers,
        "casts": kinds["CAST"],
        "shuffles": kinds["SHUFFLE"],
        "kernels": sum(kind not in MARKS for kind, _ in read),
        "MiB": len(data) / 2**20,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    networks = {
        "ours": cut_to_body(read_onnx(args.onnx, option="--onnx")),
        "sample": cut_to_body(read_onnx(args.sample_onnx, option="--sample_onnx")),
    }
    convert: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "fp32": lambda model: model,
        "fp16": lambda model: to_fp16(model)[0],
    }
    return {
        "machine": describe_machine(),
        "plans": {
            precision: {
                name: build(for_one_image(to(network)), name, args.compute_capability)
                for name, network in networks.items()
            }
            for precision, to in convert.items()
        },
    }


def criteria(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it is so."""
    return {
        f"{precision}: no more {what} than the sample's": plans["ours"][what] <= plans["sample"][what]
        for precision, plans in report["plans"].items()
        for what in ("layers", "casts", "kernels")
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    for precision, plans in report["plans"].items():
        print(f"{precision:<12}" + "".join(f"{what:>12}" for what in plans["ours"]))
        for name, counts in plans.items():
            print(f"{name:<12}" + "".join(f"{count:>12.4g}" for count in counts.values()))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_graphs(parser)
    # fmt: off
    parser.add_argument("--compute_capability", default="89", metavar="XY", help="of the GPU to build for (default: %(default)s)")
    # fmt: on
    add_ending(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_benchmark(args, partial(measure, args), show, criteria)


if __name__ == "__main__":
    raise SystemExit(main())
