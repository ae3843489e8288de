# SPDX-License-Identifier: Apache-2.0
"""The only reader of ONNX files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from trtdet import files
from trtdet.errors import GraphError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

#: What to do where a file of create_onnx.py is damaged, and where that of somebody else is.
WRITE_AGAIN = "write it again with create_onnx.py"
EXPORT_AGAIN = "export the model again"


def read_onnx(
    path: Path, *, option: str = "", remedy: str = WRITE_AGAIN, weights: bool = True
) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        option: the one that named the file, for messages.
        remedy: what to do with a file that cannot be read.
        weights: False leaves external data in its files, for who wants the graph alone, or lets
            ONNX Runtime read them.

    Raises:
        FileNotFoundError: no such file, or a folder.
        GraphError: not an ONNX file, a damaged one, a graph that cannot be run, or one whose
            external data is missing.
    """
    import onnx

    path = Path(path)
    _check_there(path, option)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError has no narrower base
        raise GraphError(
            f"{path}: expected an ONNX file, found {_found(path, error)}; {remedy}"
        ) from error
    if not model.graph.output or not model.opset_import:
        what = _kind(path) or "a file without outputs"
        raise GraphError(f"{path}: expected an ONNX model, found {what}; {remedy}")
    if fault := wiring_fault(model.graph) or weights_fault(model.graph):
        raise GraphError(f"{path}: expected a graph that can be run, {fault}; {remedy}")
    for location in set(external_files(model.graph)):
        if not _is_beside(location):
            raise GraphError(f"{path}: expected its weights in a file beside it (external data), found the place {location!r}; {remedy}")  # fmt: skip
    if weights:
        _read_external_data(model, path, remedy)
    return model


def _is_beside(location: str) -> bool:
    """Whether a place of external data is a path within the folder of the ONNX file."""
    path = PurePath(location)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in location  # fmt: skip


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The images of a batch that the first input has; None where the batch is dynamic."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def feed_of(model: onnx.ModelProto, image: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a model is fed for one image, as its preprocessing made it: in a fixed batch every
    row is that image.
    """
    import numpy as np

    batch = fixed_batch(model) or 1
    return {model.graph.input[0].name: np.repeat(image[None], batch, axis=0)}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what goes wrong with a graph name the file that it is from."""
    from trtdet.sessions import SessionError  # needs NumPy, which a command line does without

    try:
        yield
    except (GraphError, SessionError) as error:
        text = str(error)
        if Path(path).name in text:
            raise
        text = text.removeprefix("the ").removeprefix("model: ")
        raise type(error)(f"{path}: {text}") from error


def image_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """The one input of a model of create_onnx.py.

    Raises:
        GraphError: there are others, or it is no tensor of four dimensions and a known type.
    """
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise GraphError(f"{path}: expected one input, found {[value.name for value in inputs]}; {WRITE_AGAIN}")  # fmt: skip
    tensor = inputs[0].type.tensor_type
    if len(tensor.shape.dim) != 4 or tensor.elem_type not in _ELEMENTS:
        raise GraphError(f"{path}: expected images, a tensor of four dimensions, as input '{inputs[0].name}', found another; {WRITE_AGAIN}")  # fmt: skip
    return inputs[0]


#: ONNX's element types that have a whole number of bytes -> how many.
_ELEMENTS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


def weights_fault(graph: onnx.GraphProto) -> str:
    """What is wrong with the sizes and types of weights; "" where nothing is found."""
    import onnx

    known = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
    for tensor in graph.initializer:
        if tensor.data_type not in known:
            return f"the weights '{tensor.name}' are of a type that ONNX does not have, {tensor.data_type}"
        if any(size < 0 for size in tensor.dims):
            return f"the weights '{tensor.name}' have a negative size"
        size = math.prod(tensor.dims) * _ELEMENTS.get(tensor.data_type, 0)
        if tensor.data_location == tensor.EXTERNAL or not size:
            continue
        values = sum(len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "int64", "double", "uint64"))  # fmt: skip
        found = len(tensor.raw_data) if tensor.HasField("raw_data") else values * _ELEMENTS[tensor.data_type]  # fmt: skip
        if found != size:
            return f"the weights '{tensor.name}' have {found} bytes in place of {size}"
    return ""


def wiring_fault(graph: onnx.GraphProto) -> str:
    """Why a graph cannot be run, whatever its operators; "" where nothing is found.

    Looks at the tensors between nodes, not at what the bodies of If and Loop take from outside.
    """
    makers: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        names = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if not all(isinstance(name, str) for name in names):  # protobuf gives bytes
            return f"a name of node {index} is not UTF-8"
        for tensor in filter(None, node.output):
            if tensor in makers:
                return f"two nodes make the tensor '{tensor}', the second is {node.op_type} '{node.name}'"
            makers[tensor] = index
    given = {*(i.name for i in graph.input), *(t.name for t in graph.initializer)}
    given.update(sparse.values.name for sparse in graph.sparse_initializer)
    waits = [0] * len(graph.node)
    readers: dict[int, list[int]] = {}
    for index, node in enumerate(graph.node):
        for tensor in filter(None, node.input):
            if tensor in makers:
                waits[index] += 1
                readers.setdefault(makers[tensor], []).append(index)
            elif tensor not in given:
                return (
                    f"nothing makes the tensor '{tensor}' that {node.op_type} '{node.name}' reads"
                )
    ready = [index for index, count in enumerate(waits) if not count]
    done = 0
    while ready:
        index = ready.pop()
        done += 1
        for reader in readers.get(index, ()):
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
    if done < len(waits):
        node = next(n for n, count in zip(graph.node, waits, strict=True) if count)
        return f"nodes feed each other in a circle, {node.op_type} '{node.name}' among them"
    for output in graph.output:
        if output.name not in makers and output.name not in given:
            return f"nothing makes the output '{output.name}'"
    return ""


def without_value(graph: onnx.GraphProto, folder: Path) -> str:
    """Name of the first weights that hold NaN; "" where none do.

    Args:
        folder: of the ONNX file, and of the files with its weights.
    """
    import numpy as np
    from onnx import numpy_helper

    for tensor in graph.initializer:
        floats = (tensor.FLOAT, tensor.FLOAT16, tensor.BFLOAT16, tensor.DOUBLE)
        if tensor.data_type not in floats:
            continue
        try:
            values = numpy_helper.to_array(tensor, str(folder))
        except Exception:  # of another length than its shape, ...: ONNX Runtime says so
            continue
        if np.isnan(values).any():
            return str(tensor.name)
    return ""


def with_weights(
    model: onnx.ModelProto, path: Path, *, remedy: str = WRITE_AGAIN
) -> onnx.ModelProto:
    """A model that `read_onnx` read from `path` without weights, with them: a copy, or the model
    itself where it has them inside.

    Raises:
        GraphError: its external data is missing or damaged.
    """
    import onnx

    if not any(external_files(model.graph)):
        return model
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    _read_external_data(whole, path, remedy)
    return whole


def _read_external_data(model: onnx.ModelProto, path: Path, remedy: str) -> None:
    import onnx

    check_external_data(model, path)
    try:
        onnx.load_external_data_for_model(model, str(path.resolve().parent))
    except Exception as error:  # too short, outside of the folder, ...: errors of many kinds
        reason = " ".join(str(error).split())
        raise GraphError(f"{path}: its external data cannot be read ({reason}); {remedy}") from error  # fmt: skip


def check_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Find out whether the files that hold the weights of `model`, read from `path`, are there, and
    have the bytes that it reads.

    Raises:
        GraphError: one is not, is a link that leads elsewhere, or is too short.
    """
    folder = path.resolve().parent
    sizes: dict[str, int] = {}
    for location in sorted(set(external_files(model.graph))):
        place = folder / location
        if not os.path.isfile(place):
            found = "none" if not os.path.lexists(place) else files.found_at(place)
            raise GraphError(
                f"{path}: expected its weights in the file {location} beside it (external data), found {found}; copy that file there too"
            )
        if not Path(os.path.realpath(place)).is_relative_to(folder):
            raise GraphError(f"{path}: expected its weights in the file {location} beside it (external data), found a link that leads elsewhere; copy the file there")  # fmt: skip
        sizes[location] = place.stat().st_size
    for tensor in external_tensors(model.graph):
        entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
        bounds = [entries.get("offset", "0"), entries.get("length", "0")]
        whole = all(re.fullmatch("[0-9]{1,18}", text) for text in bounds)
        size = sizes.get(entries.get("location", ""), 0)
        if not whole or sum(map(int, bounds)) > size:
            raise GraphError(f"{path}: expected the weights '{tensor.name}' in its external data, which has {size} bytes, found offset {bounds[0]}, length {bounds[1]}; copy that file again, or export the model again")  # fmt: skip


def external_files(graph: onnx.GraphProto) -> Iterator[str]:
    """The files that hold weights of a graph, and of the graphs inside its nodes, relative to
    the ONNX file.
    """
    for tensor in external_tensors(graph):
        yield from (_text(entry.value) for entry in tensor.external_data if entry.key == "location")


def _text(value: str | bytes) -> str:
    """A text of an ONNX file: protobuf gives bytes where it is not UTF-8."""
    return value if isinstance(value, str) else os.fsdecode(value)


def external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Weights that lie in files of their own; of the graphs inside its nodes, too."""
    tensors = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from external_tensors(inner)
    yield from (tensor for tensor in tensors if tensor.data_location == tensor.EXTERNAL)


def weight_files(graph: onnx.GraphProto, path: Path) -> list[Path]:
    """The files that hold weights of the ONNX file at `path`, sorted."""
    folder = path.resolve().parent
    return [folder / name for name in sorted(set(external_files(graph)))]


def sha256(path: Path, model: onnx.ModelProto | None = None) -> str:
    """The SHA-256, in hex, of an ONNX file; where its weights lie in files of their own, of all of
    them one after the other.

    Args:
        model: what `read_onnx(path, weights=False)` gave, of who has read it.

    Raises:
        FileNotFoundError, GraphError: no ONNX file, or its weights are not all there.
    """
    if model is None:
        model = read_onnx(path, weights=False)
    check_external_data(model, path)
    return files.sha256(path, *weight_files(model.graph, path))


def check_apart(outputs: Iterable[Path | None], path: Path) -> None:
    """Find out whether an output would replace weights of the ONNX file at `path` that lie in files
    of their own.

    Raises:
        ValueError: names the output.
    """
    there = [output for output in outputs if output is not None and output.is_file()]
    if there:
        graph = read_onnx(path, weights=False).graph
        files.check_outputs(there, weight_files(graph, path))


def _check_there(path: Path, option: str) -> None:
    if path.is_file():
        return
    what, advice = files.found_at(path), ""
    if path.is_dir():
        models = sorted(path.glob("*.onnx"))
        if any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            what, advice = "a SavedModel", f"; convert it with create_onnx.py --saved_model {path}"
        elif models:
            advice = f"; give the file in it, {models[0]}"
    if option:
        raise FileNotFoundError(f"{option}: expected an ONNX file, found {what} at {path}{advice}")
    raise FileNotFoundError(f"{path}: expected an ONNX file, found {what} there{advice}")


def _kind(path: Path) -> str:
    with open(path, "rb") as file:
        return files.kind_of(file.read(512))


def _found(path: Path, error: Exception) -> str:
    return _kind(path) or f"something else, or a damaged one ({' '.join(str(error).split())})"
