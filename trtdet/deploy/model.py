# SPDX-License-Identifier: Apache-2.0
"""What is to be deployed: an engine with its sidecar, or an ONNX file, and the tensors that a
server sees of it.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from trtdet.engine.sidecar import EngineInfo, read_sidecar, sidecar_path
from trtdet.errors import EngineError, GraphError
from trtdet.graph import tidy
from trtdet.labels import label_of, names_of, read_labels
from trtdet.onnx_files import image_input, read_onnx
from trtdet.precision.graph_types import narrow_types
from trtdet.precision.quantization import precision_of
from trtdet.runtimes.kinds import check_model
from trtdet.spec import OUTPUT_NAMES, ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """A tensor of one image: without the batch dimension.

    `dtype` is NumPy's name; -1 is a dynamic dimension.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Deployable:
    """A model file and what servers must be told of it.

    Attributes:
        smallest, preferred, largest: batch sizes it takes; `largest` is None where nothing bounds
            it.
        engine: what its sidecar says; None for an ONNX file.
        precision: of the engine, or of the types in the ONNX file.
        rest: of the other types in an ONNX file in 8 bits.
    """

    path: Path
    spec: ModelSpec
    input_name: str
    smallest: int
    preferred: int
    largest: int | None
    engine: EngineInfo | None = None
    precision: str = "fp32"
    rest: str = "fp32"

    def check_one_size(self, who: str) -> None:
        """Refuse a model that takes each picture at a size of its own, for a server that feeds
        all at the one that the file names.

        Raises:
            ValueError: it is one.
        """
        own = self.spec.preprocessing.shorter_side
        if own or self.spec.preprocessing.own_size:
            shorter = f", the shorter side {own[0]} pixels" if own else ""
            raise ValueError(
                f"{who} makes all pictures as large as one network input; this model takes each at a size of its own{shorter}: convert it for one size (create_onnx.py --size H,W), or prepare the pictures in the client, as infer.py does"
            )

    @property
    def is_static(self) -> bool:
        return self.smallest == self.largest

    @property
    def takes_any_batch(self) -> bool:
        """Whether Triton may send it any batch from 1 to the largest.

        Triton's ONNX Runtime backend wants a dynamic first dimension for that, even where the
        largest is 1; its TensorRT backend does not.
        """
        return self.smallest == 1 and not (self.engine is None and self.is_static)

    @property
    def has_dynamic_shape(self) -> bool:
        """Whether a runtime must be told the shape of the input."""
        return not self.is_static or self.spec.preprocessing.size_range is not None

    @property
    def batches(self) -> str:
        """The batch sizes in words."""
        if self.is_static:
            return f"{self.largest} only"
        return f"{self.smallest} to {self.largest}" if self.largest else f"{self.smallest} or more"

    @property
    def input(self) -> Tensor:
        preprocessing = self.spec.preprocessing
        dims = tuple(dim if isinstance(dim, int) else -1 for dim in preprocessing.image_dims)
        return Tensor(self.input_name, preprocessing.dtype, dims)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        slots = self.spec.nms.max_output_boxes
        values = 5 if self.spec.selection == "rotated_nms" else 4  # a rotated box has an angle
        dims = ((1,), (slots, values), (slots,), (slots,))
        dtypes = ("int32", "float32", "float32", "int32")
        return tuple(Tensor(*fields) for fields in zip(OUTPUT_NAMES, dtypes, dims, strict=True))


def open_engine(path: Path) -> Deployable:
    """An engine as its sidecar describes it.

    Raises:
        FileNotFoundError, GraphError: no engine there, or something else.
        EngineError: no sidecar, or that of another engine; or an engine of TensorRT-RTX, which
            neither server loads.
    """
    check_model(path)
    if path.suffix.lower() == ".onnx":
        raise EngineError(
            f"--model: expected an engine, {path} is an ONNX file; build one: build_engine.py --model {path} --engine {path.stem}.engine"
        )
    info = read_sidecar(path)
    if info is None:
        raise EngineError(
            f"{path}: expected {sidecar_path(path).name} beside it, found none; build the engine with build_engine.py"
        )
    if info.stripped:
        raise EngineError(
            f"{path} has no weights, and servers do not refit; build it again without --strip"
        )
    batch = info.batch
    return Deployable(
        path, info.spec, tidy.INPUT, batch.min, batch.opt, batch.max, info, info.precision
    )


def check_servable(model: Deployable, server: str) -> None:
    """Refuse what a server cannot load.

    Raises:
        EngineError: an engine of TensorRT-RTX.
    """
    if model.engine is not None and model.engine.flavor == "tensorrt_rtx":
        raise EngineError(
            f"{model.path}: {server} loads engines of TensorRT, this one is of TensorRT-RTX; build it on the machine that runs it with "
            f"build_engine.py --flavor tensorrt{', or serve the ONNX file' if server == 'Triton' else ''}"
        )


def open_onnx(path: Path) -> Deployable:
    """An ONNX file of create_onnx.py, with or without the EfficientNMS plugin.

    Raises:
        FileNotFoundError, GraphError: no such file, or not one of create_onnx.py.
    """
    check_model(path)
    return describe_onnx(read_onnx(path, option="--model", weights=False), path)


def describe_onnx(model: onnx.ModelProto, path: Path) -> Deployable:
    """The same of a file that was read.

    Raises:
        GraphError: it is not one of create_onnx.py.
    """
    spec = ModelSpec.from_onnx(model, path)
    names = {output.name for output in model.graph.output}
    if names != set(OUTPUT_NAMES):
        raise GraphError(
            f"{path}: expected the outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(sorted(names))}; "
            "write it again with create_onnx.py (any --nms but none)"
        )
    tensor = image_input(model, path)
    batch = tensor.type.tensor_type.shape.dim[0].dim_value  # 0: dynamic
    return Deployable(
        path,
        spec,
        tensor.name,
        batch or 1,
        batch or 1,
        batch or None,
        precision=precision_of(model),
        rest=min(narrow_types(model), default="fp32"),
    )


def label_lines(spec: ModelSpec) -> Iterator[str]:
    """One line per class, none empty: nvinfer skips empty lines, and every later class would get
    the name of the one after it.

    nvinfer splits lines at semicolons, so these become commas.
    """
    for class_id in range(spec.num_classes):
        text = label_of(spec.labels, class_id).replace(";", ",")
        yield " ".join(text.split()) or f"class {class_id}"


def with_labels(model: Deployable, labels: Path | None) -> Deployable:
    """The model with its class names, those of a file in place of its own."""
    spec = model.spec
    names = names_of(spec.labels, spec.num_classes)
    if labels is not None:
        names = read_labels(labels, num_classes=spec.num_classes)
    spec = spec.replace(labels=tuple(names))
    if not spec.labels:
        logger.warning("no class names known: they are 'class 0', ...; --labels takes a file")
    return dataclasses.replace(model, spec=spec)
