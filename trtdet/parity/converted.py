# SPDX-License-Identifier: Apache-2.0
"""A model that stage 1 converted, as one of the two of a comparison."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.engine.sidecar import read_sidecar
from trtdet.families.base import CLASS_LOGITS, RAW_BOXES
from trtdet.images.files import ImageArray
from trtdet.images.preprocess import preprocess
from trtdet.onnx_files import feed_of, fixed_batch, with_weights
from trtdet.parity.base import Found, GraphPart, Side, TensorReader, at_own_size, by_category
from trtdet.parity.rows import are_sorted_inside
from trtdet.parity.summary import SideInfo
from trtdet.precision import quantization
from trtdet.precision.emulation import emulate
from trtdet.precision.equalization import read_rescaled
from trtdet.run.detect import open_batcher, open_model, run_batches
from trtdet.run.options import ENGINE_OPTIONS, ONNX_OPTIONS, RunOptions
from trtdet.runtimes.base import Runtime
from trtdet.runtimes.open import open_runtime
from trtdet.sources.subgraphs import reads

#: Protobuf ends at 2 GiB; beyond this, weights go into a file beside the model.
EXTERNAL_DATA_BYTES = 1 << 30


class ConvertedSide(Closing):
    """An ONNX file of stage 1 or 2, or an engine: preprocessing and NMS are this project's.

    Args:
        model: what `read_onnx(path, weights=False)` gave; None for an engine.
    """

    def __init__(
        self, path: Path, options: RunOptions, model: onnx.ModelProto | None = None
    ) -> None:
        self._options = options
        whole = with_weights(model, path) if model else None
        self._model = emulate(whole) if whole and on_cpu(options) else whole
        if self._model is None or self._model is whole:
            self._runtime = open_model(path, options, model=model)
            kind = self._runtime.description
        else:
            self._runtime = open_in_memory(self._model, path.name, options)
            kind = f"{self._runtime.description}, rounding as a GPU does"
        self.info = SideInfo(path.name, kind, self._runtime.spec, precision_of(path, whole))
        self._rescaled = read_rescaled(whole) if whole else {}
        self.heads = frozenset((RAW_BOXES, CLASS_LOGITS))
        graph = self._model
        self.tensors = tensors_before(graph, self.heads) if graph else ()
        self.sorts_rows = graph is not None and are_sorted_inside(graph, self.heads)

    def detect(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Found]]:
        spec = self.info.spec
        with open_batcher(self._runtime, paths, self._options) as batcher:
            for batch, outputs in run_batches(self._runtime, batcher):
                found = outputs.decoded(spec)
                for path, one, transform in zip(batch.paths, found, batch.transforms, strict=True):
                    yield path, (by_category(one, spec), transform)

    def tensor_reader(self, names: Sequence[str]) -> TensorReader:
        if self._model is None:
            raise ValueError(f"{self.info.name}: is an engine, whose tensors cannot be read")
        network_input = self._model.graph.input[0]
        elem_type = network_input.type.tensor_type.elem_type
        model = self._model
        part = GraphPart(model, {network_input.name: elem_type}, names)
        batch = fixed_batch(model) or 1

        def read(some: Sequence[str], image: ImageArray) -> list[NDArray[Any]]:
            pixels, _ = preprocess(image, at_own_size(self.info.spec.preprocessing, image))
            values = part.run(some, feed_of(model, pixels))
            ones = [_first(value, batch) for value in values]
            return [self._scaled_back(n, v) for n, v in zip(some, ones, strict=True)]

        return read

    def _scaled_back(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """A tensor as the float model has it, where INT8 rescales its channels."""
        if name not in self._rescaled:
            return value
        return self._rescaled[name].undo(value.astype(np.float32))

    def close(self) -> None:
        self._runtime.close()


def open_converted(path: Path, options: RunOptions, model: onnx.ModelProto | None) -> Side:
    """An ONNX file of create_onnx.py or an engine, with those of the options that it takes."""
    other = ENGINE_OPTIONS if path.suffix.lower() == ".onnx" else ONNX_OPTIONS
    unset: dict[str, Any] = dict.fromkeys(other)
    return ConvertedSide(path, dataclasses.replace(options, **unset), model)


def on_cpu(options: RunOptions) -> bool:
    """Whether ONNX Runtime is left to run on a CPU: only there are narrow types emulated."""
    return options.provider in (None, "auto", "cpu")


def open_in_memory(model: onnx.ModelProto, name: str, options: RunOptions) -> Runtime:
    """ONNX Runtime on the CPU with a model that is in no file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        onnx.save(model, path, save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES)
        chosen = dataclasses.replace(options, provider="cpu").for_runtime(path)
        return open_runtime(path, **chosen)


def precision_of(path: Path, model: onnx.ModelProto | None) -> str:
    """Of an engine as its .json says it, "fp32" without one; of an ONNX file as its nodes and
    weights say it.
    """
    if model is None:
        info = read_sidecar(path)
        return "fp32" if info is None else info.precision
    return quantization.precision_of(model)


def tensors_before(model: onnx.ModelProto, heads: frozenset[str]) -> tuple[str, ...]:
    """The tensors that the network computes on its way to `heads`, these included, in its order."""
    needed = set(heads)
    names: list[str] = []
    for node in reversed(model.graph.node):  # sorted, as ONNX demands
        if needed.isdisjoint(node.output):
            continue
        needed.update(reads(node))
        if node.op_type != "Constant":
            names += [name for name in node.output if name in needed]
    return tuple(reversed(names))


def _first(value: NDArray[Any], batch: int) -> NDArray[Any]:
    """The first image's part of a tensor; a tensor without a batch dimension as it is."""
    return value[0] if value.ndim and len(value) == batch else value
