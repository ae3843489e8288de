# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: the same ONNX file on a CPU, or on a GPU that has no TensorRT engine yet.

The file keeps its EfficientNMS_TRT node, which ONNX Runtime does not know; it is lowered in memory (`trtdet.nms`).
"""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.errors import EngineError, GraphError
from trtdet.machine import available_cores
from trtdet.nms import lowering
from trtdet.runtimes.base import Outputs, check_batch
from trtdet.spec import OUTPUT_NAMES, ModelSpec

logger = logging.getLogger(__name__)


Provider = Literal["auto", "tensorrt", "cuda", "cpu"]

#: ONNX Runtime's names, fastest first: the order in which "auto" takes what is there.
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}

#: Shapes of batches whose buffers are kept on the device: those of free size come in any number.
KEPT_INPUTS = 4


class OnnxRuntime(Closing):
    """`trtdet.runtimes.Runtime` on ONNX Runtime.

    Args:
        path: an ONNX file written by create_onnx.py; external data is found beside it.
        provider: "auto" is the first of TensorRT, CUDA, CPU that this ONNX Runtime has. A named one is used or it is an error.
        threads: CPU threads of one operator; default: every core this process may use.
        optimize: False keeps the graph as it is written, to compare numbers (fusions alone move D0's logits by 1e-2).
        integer_kernels: False computes every Q/DQ pair of an INT8 model as it is written. ONNX Runtime's integer kernels, which else replace them,
            saturate on processors without VNNI.

    Raises:
        GraphError: not an ONNX file, no ModelSpec in it, other inputs or outputs than stage 1 writes.
        EngineError: ONNX Runtime cannot run it, or lacks `provider`.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        optimize: bool = True,
        integer_kernels: bool = True,
    ) -> None:
        import onnxruntime

        path = Path(path)
        model = _load(path)
        self.spec = ModelSpec.from_onnx(model, path)
        self._input, self.batch_range = _check_interface(model, self.spec, path)
        threads = threads or available_cores()
        # Weights in files of their own (all of those over protobuf's 2 GB) stay there: the bytes refer to them.
        lowered = lowering.lower(model, form="onnx").SerializeToString()
        self._session: Any = _open_session(
            lowered,
            path,
            provider,
            threads=threads,
            optimize=optimize,
            integer_kernels=integer_kernels,
        )
        self.provider: str = self._session.get_providers()[0]
        self._device = "cpu" if self.provider == PROVIDERS["cpu"] else "cuda"
        # Shape -> buffer on the device, the one used last at the end.
        self._device_inputs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        where = f"{threads} threads" if self._device == "cpu" else "GPU 0"
        self.description = f"ONNX Runtime {onnxruntime.__version__}, {self.provider}, {where}"

    @property
    def preferred_batch(self) -> int:
        """The batch size to use where nobody names one: a CPU gains nothing from more than one image (D0: 34 ms for 1, 48 ms each for 8)."""
        return 1 if self._device == "cpu" else 8

    def infer(self, images: NDArray[Any]) -> Outputs:
        """Run one batch. See `trtdet.runtimes.Runtime.infer`."""
        check_batch(images, self.spec, self.batch_range)
        try:
            if self._device == "cpu":  # reads the array in place: nothing to bind
                values = self._session.run(OUTPUT_NAMES, {self._input: images})
            else:
                values = self._run_bound(images)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(
                f"ONNX Runtime failed on a batch of {len(images)}: {error}"
            ) from error
        return dict(zip(OUTPUT_NAMES, values, strict=True))

    def _run_bound(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Run with the input copied into a device buffer, kept for the shapes used last."""
        import onnxruntime

        buffer = self._device_inputs.get(images.shape)
        if buffer is None:
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(images, self._device, 0)
            self._device_inputs[images.shape] = buffer
            if len(self._device_inputs) > KEPT_INPUTS:
                self._device_inputs.popitem(last=False)
        else:
            self._device_inputs.move_to_end(images.shape)
            buffer.update_inplace(images)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, buffer)
        for name in OUTPUT_NAMES:
            binding.bind_output(name)  # in host memory: 100 boxes an image
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()]

    def close(self) -> None:
        self._device_inputs.clear()
        self._session = None


def pick_providers(provider: Provider, available: list[str]) -> list[str]:
    """ONNX Runtime's provider list for `provider`, the wanted one first, CPU last.

    Raises:
        EngineError: this ONNX Runtime was built without it.
    """
    there = [name for name in PROVIDERS.values() if name in available]
    if provider == "auto":
        return there
    wanted = PROVIDERS[provider]
    if wanted not in there:
        raise EngineError(
            f"--provider {provider}: this ONNX Runtime has {', '.join(there)} only; "
            "install onnxruntime-gpu, or leave --provider out"
        )
    return there[there.index(wanted) :]


def _open_session(
    model: bytes,
    path: Path,
    provider: Provider,
    *,
    threads: int,
    optimize: bool,
    integer_kernels: bool,
) -> Any:
    """An `onnxruntime.InferenceSession` of `model`, whose external data lies beside `path`.

    Raises:
        EngineError: ONNX Runtime cannot load the model, or a provider that was named does not start.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a CPU build warns about GPUs it cannot see
    options.intra_op_num_threads = threads
    # Threads that spin while they wait for work take the cores from those that decode and draw. With 20 us of it D0 keeps its speed
    # on 2 cores (25.6 against 26.5 images/s; 23.0 against 22.6 with pictures), and where other programs want the cores too it is
    # 2.5 times as fast. Versions that do not know the entry ignore it.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
    )
    if not integer_kernels:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = pick_providers(provider, onnxruntime.get_available_providers())
    if wanted != [PROVIDERS["cpu"]] and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    try:
        session = onnxruntime.InferenceSession(model, options, providers=wanted)
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise EngineError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    got = session.get_providers()[0]
    if got != wanted[0]:
        message = f"{wanted[0]} does not start here (its own message is above)"
        if provider != "auto":
            raise EngineError(
                f"--provider {provider}: {message}; install its libraries or choose another"
            )
        logger.warning("%s; running on %s", message, got)
    return session


def _load(path: Path) -> onnx.ModelProto:
    """The model without its external data, which ONNX Runtime reads itself."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no narrower base
        raise GraphError(
            f"{path}: expected an ONNX file, this is none ({error}); write it again with create_onnx.py"
        ) from error


def _check_interface(
    model: onnx.ModelProto, spec: ModelSpec, path: Path
) -> tuple[str, tuple[int, int | None]]:
    """The input's name and the batch sizes it takes.

    Raises:
        GraphError: the graph's input or outputs are not those that its ModelSpec promises.
    """
    outputs = tuple(output.name for output in model.graph.output)
    if set(outputs) != set(OUTPUT_NAMES):
        raise GraphError(
            f"{path}: expected the outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(outputs) or 'none'}; "
            "write it again with create_onnx.py (any --nms but none)"
        )
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise GraphError(
            f"{path}: expected one input, found {[value.name for value in inputs]}; "
            "write it again with create_onnx.py"
        )
    tensor = inputs[0].type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    expected = spec.preprocessing
    declared = tuple(d if isinstance(d, int) else None for d in expected.image_dims)  # None: free
    if tuple(dims[1:]) != declared or dtype != np.dtype(expected.dtype):
        raise GraphError(
            f"{path}: its ModelSpec says images of {declared} {expected.dtype}, its input "
            f"'{inputs[0].name}' takes {tuple(dims[1:])} {dtype}; write it again with create_onnx.py"
        )
    batch = dims[0]
    return inputs[0].name, (1, None) if batch is None else (batch, batch)
