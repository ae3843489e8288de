# SPDX-License-Identifier: Apache-2.0
"""The configuration of a model in a Triton repository, `config.pbtxt`.

Source of the rules: triton-inference-server core/src/model_config_utils.cc,
tensorrt_backend/src/{model_state,instance_state}.cc
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format as google_text_format

from trtdet.deploy.model import Deployable, Tensor
from trtdet.deploy.options import DEFAULT_MAX_BATCH
from trtdet.deploy.text_format import Word
from trtdet.errors import EngineError
from trtdet.spec import METADATA_KEY

TRITON_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32"}
LABELS_FILE = "labels.txt"


@dataclass(frozen=True)
class TritonOptions:
    """What the sidecar cannot know.

    Attributes:
        max_batch: at most so many images at a time; None: what the model takes.
        instances: execution contexts, per GPU.
        gpus: their numbers; empty: every one that the server sees.
        queue_delay_us: how long a request may wait for others to share its batch.
    """

    max_batch: int | None = None
    instances: int = 1
    gpus: tuple[int, ...] = ()
    queue_delay_us: int = 1000
    cuda_graphs: bool = True


def max_batch_size(model: Deployable, wanted: int | None) -> int:
    """Triton's `max_batch_size`; 0, "the dims are all there is", where Triton must not choose the
    batch.

    A model with `max_batch_size` N is sent any batch from 1 to N. One that takes 8 and only 8, or 4
    to 16, would refuse most of them, and Triton does not load an ONNX file whose batch is fixed, be
    it 1, with an N above 0.

    Raises:
        ValueError: more is wanted than the model takes.
    """
    if model.largest is not None and wanted is not None and wanted > model.largest:
        raise ValueError(
            f"--batch_size {wanted}: {model.path.name} takes batches of {model.batches}; ask for less, or build it for more"
        )
    if not model.takes_any_batch:
        return 0
    return wanted or model.largest or DEFAULT_MAX_BATCH


def leading_dims(model: Deployable, max_batch: int) -> list[int]:
    """The batch as part of the dims: none where Triton batches."""
    if max_batch:
        return []
    return [model.smallest if model.is_static else -1]


def tensor_dict(tensor: Tensor, batch: Sequence[int], **fields: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "data_type": Word(TRITON_TYPES[tensor.dtype]),
        "dims": [*batch, *tensor.dims],
        **fields,
    }


def model_config(
    name: str, platform: str, model: Deployable, options: TritonOptions
) -> dict[str, Any]:
    """The part of the configuration that an engine and an ONNX file share."""
    largest = max_batch_size(model, options.max_batch)
    batch = leading_dims(model, largest)
    outputs = [tensor_dict(tensor, batch) for tensor in model.outputs]
    outputs[-1]["label_filename"] = LABELS_FILE
    config: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "max_batch_size": largest,
        "input": [tensor_dict(model.input, batch)],
        "output": outputs,
    }
    if largest > 1:
        # CUDA graphs are captured for 1, these and the largest only.
        preferred = sorted({min(model.preferred, largest), largest} - {1})
        config["dynamic_batching"] = {
            "preferred_batch_size": preferred,
            "max_queue_delay_microseconds": options.queue_delay_us,
        }
    group: dict[str, Any] = {"count": options.instances}
    if options.gpus:
        group |= {"kind": Word("KIND_GPU"), "gpus": list(options.gpus)}
    config["instance_group"] = [group]
    config["parameters"] = [{"key": METADATA_KEY, "value": {"string_value": _served_spec(model)}}]
    return config


def _served_spec(model: Deployable) -> str:
    """The ModelSpec as JSON, for clients (`infer.py --model URL`); without what only the
    building of an engine needs.
    """
    spec = model.spec.replace(source={}, sensitive_nodes=())
    return json.dumps(spec.to_dict(), separators=(",", ":"))


def plan_config(name: str, engines: Sequence[Deployable], options: TritonOptions) -> dict[str, Any]:
    """The configuration of an engine, or of engines of the same model for several kinds of GPU.

    Raises:
        EngineError: engines that do not belong together.
    """
    model = engines[0]
    config = model_config(name, "tensorrt_plan", model, options)
    group = config["instance_group"][0] | {"kind": Word("KIND_GPU"), "profile": ["0"]}
    if model.engine and model.engine.dla_core is not None:
        group["secondary_devices"] = [
            {"kind": Word("KIND_NVDLA"), "device_id": model.engine.dla_core}
        ]
    config["instance_group"] = [group]
    if len(engines) > 1:
        config["cc_model_filenames"] = [
            {"key": capability, "value": plan_name(capability)}
            for capability in capabilities(engines)
        ]
    if options.cuda_graphs:
        cuda = {"graphs": True, "busy_wait_events": True, "output_copy_stream": True}
        config["optimization"] = {"cuda": cuda}
    return config


def plan_name(capability: str | None) -> str:
    """ "8.9" -> "model_89.plan"; without one Triton's default."""
    return f"model_{capability.replace('.', '')}.plan" if capability else "model.plan"


def capabilities(engines: Sequence[Deployable]) -> list[str]:
    """The compute capability of each engine.

    Raises:
        EngineError: one is for none or several, two are for the same, or they differ in more than
            the GPU.
    """
    found: list[str] = []
    for model in engines:
        named = model.engine.compute_capabilities if model.engine else ()
        if len(named) != 1:
            raise EngineError(
                f"{model.path}: expected one compute capability in its .json, to tell engines for several GPUs apart, found "
                f"{', '.join(named) or 'none'}; build it again with build_engine.py"
            )
        if (model.spec, model.smallest, model.largest) != (
            engines[0].spec,
            engines[0].smallest,
            engines[0].largest,
        ):
            raise EngineError(
                f"{model.path} differs from {engines[0].path.name} in more than the GPU; build both from one ONNX file with the same "
                "batch sizes"
            )
        found += named
    if len(set(found)) < len(found):
        raise EngineError(f"expected one engine per kind of GPU, found two for {found}")
    return found


def config_class() -> Any:
    """Triton's own message class of a configuration; None without tritonclient."""
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        return None
    return ModelConfig


def parse_config(text: str) -> Any:
    """A configuration as Triton reads it.

    Raises:
        ValueError: Triton would refuse it.
    """
    try:
        return google_text_format.Parse(text, config_class()())
    except google_text_format.ParseError as error:
        raise ValueError(f"not a model configuration: {error}") from error
