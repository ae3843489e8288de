# SPDX-License-Identifier: Apache-2.0
"""What precision a finished engine computes in, layer by layer.

TensorRT-free: it reads what TensorRT wrote.

A layer's precision is the narrowest floating-point type among its inputs and outputs; layers of
integers (shapes, indices) have none, and layers that only convert are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Names of types, as TensorRT's inspector, network and plan spell them, narrowest first.
PRECISIONS = {
    "FP4": re.compile(r"fp4"),
    "INT4": re.compile(r"(?<!u)int4"),
    "FP8": re.compile(r"fp8"),
    "INT8": re.compile(r"(?<!u)int8"),
    "BF16": re.compile(r"bf16|bfloat"),
    "FP16": re.compile(r"fp16|half"),
    "FP32": re.compile(r"fp32|float"),
}
#: Layers that change a type, a format or nothing.
CONVERSIONS = frozenset(
    ["CAST", "CONSTANT", "DEQUANTIZE", "IDENTITY", "NOOP", "QUANTIZE", "REFORMAT"]
)


@dataclass(frozen=True)
class LayerShares:
    """How many layers compute in which precision.

    Attributes:
        source: where that was read, for the reader: "engine inspector", "plan", "network".
        counts: "FP16" -> number of layers; fused layers count once where the source has them fused.
    """

    source: str
    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        shares = sorted(self.counts.items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} {count / self.total:.0%}" for name, count in shares)
        return f"{text} of {self.total} layers ({self.source})"


def precision_of(types: Iterable[str]) -> str | None:
    """The narrowest floating-point type among names such as "Half", "Row major linear FP32" or
    "bf16"; None without any.
    """
    found = [t.lower() for t in types]
    return next((p for p, pattern in PRECISIONS.items() if any(map(pattern.search, found))), None)


def from_network(layers: Iterable[tuple[str, Iterable[str]]]) -> LayerShares:
    """Of a strongly typed network before it is built, whose types the builder must keep: (layer
    type, tensor types) each.
    """
    return _count("network", layers)


def from_inspector(text: str) -> LayerShares | None:
    """Of `EngineInspector.get_engine_information` in JSON.

    None where it holds no types (an engine without detailed layers).
    """
    try:
        layers = json.loads(text)["Layers"]
        read = [(layer["LayerType"], _tensor_types(layer)) for layer in layers]
    except (ValueError, KeyError, TypeError):  # layers by name only are strings
        return None
    shares = _count("engine inspector", read)
    return shares if shares.counts else None


def from_plan(plan: bytes) -> LayerShares | None:
    """Of a TensorRT-RTX plan, which can be deserialised only on its GPU.

    None where it does not read as expected.
    """
    read = statements(plan)
    shares = _count("plan", read or ())
    return shares if shares.counts else None


def statements(plan: bytes) -> list[tuple[str, list[str]]] | None:
    """What a TensorRT-RTX plan runs: the kind of each kernel, and the types of its tensors; None
    where it does not read as expected.

    The format is not documented. A plan of 1.7 holds its fused graph as text: tensors with their
    types under `descriptors`, then one statement per kernel under `main`, naming its tensors.
    Graphs for "any" accelerator, `*`, are the insides of kernels that are compiled on the GPU,
    listed once more; they are passed over.
    """
    read = []
    for header in re.finditer(rb"accelerators=\{[^}*]+\}", plan):
        begin = plan.find(b"\nmain {", header.end())
        end = plan.find(b"\n}", begin)
        if begin < 0 or end < 0:
            return None
        tensors = plan[header.end() : begin].decode("latin-1").splitlines()
        types = {
            name[1]: kind[1]
            for line in tensors
            if "is_scratchspace=1" not in line
            and (name := re.search(r' name="([^"]+)"', line))
            and (kind := re.search(r" type=(\w+)", line))
        }
        parts = re.split(r"\n  (?=\w+=\{)", plan[begin:end].decode("latin-1"))[1:]
        for part in parts:
            operands = re.findall(r'"([^"]+)"', part.partition(" layers=")[0])
            read.append((part.partition("=")[0], [types.get(name, "") for name in operands]))
    return read


def _count(source: str, layers: Iterable[tuple[str, Iterable[str]]]) -> LayerShares:
    precisions = (precision_of(types) for kind, types in layers if kind.upper() not in CONVERSIONS)
    return LayerShares(source, dict(Counter(filter(None, precisions))))


def _tensor_types(layer: Mapping[str, Any]) -> list[str]:
    """Types of a layer's inputs and outputs: "Format/Datatype" to TensorRT 10, split in two
    fields from 11 on.
    """
    return [
        str(value)
        for tensor in [*layer.get("Inputs", []), *layer.get("Outputs", [])]
        for key, value in tensor.items()
        if "datatype" in key.lower()
    ]
