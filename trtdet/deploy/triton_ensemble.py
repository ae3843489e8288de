# SPDX-License-Identifier: Apache-2.0
"""The configurations of an ensemble for Triton: encoded images in, boxes in source pixels out."""

from collections.abc import Sequence
from typing import Any

from trtdet.deploy import parameter
from trtdet.deploy.model import Deployable, Tensor
from trtdet.deploy.parameter import PostprocessParameter, PreprocessParameter
from trtdet.deploy.text_format import Word
from trtdet.deploy.triton_config import TritonOptions, leading_dims, tensor_dict

#: What the preprocessing of an ensemble passes by the detector: scale x, scale y, offset x, offset
#: y, source width, source height.
TRANSFORM = Tensor("transform", "float32", (6,))

#: The result of an ensemble, in source pixels.
RESULT_NAMES = ("num_detections", "boxes_xyxy", "scores", "class_ids", "category_ids")


def python_config(
    name: str,
    max_batch: int,
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]],
    told: PreprocessParameter | PostprocessParameter,
    instances: int,
) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_batch,
        "input": list(inputs),
        "output": list(outputs),
        "instance_group": [{"count": instances, "kind": Word("KIND_CPU")}],
        "parameters": [
            {"key": parameter.PARAMETER, "value": {"string_value": parameter.dumps(told)}}
        ],
    }


def result_tensors(model: Deployable) -> list[Tensor]:
    """What an ensemble answers with."""
    slots = model.spec.nms.max_output_boxes
    dims = ((1,), (slots, 4), (slots,), (slots,), (slots,))
    dtypes = ("int32", "float32", "float32", "int32", "int32")
    tensors = [Tensor(*fields) for fields in zip(RESULT_NAMES, dtypes, dims, strict=True)]
    if model.spec.selection == "rotated_nms":
        tensors.append(Tensor("angles", "float32", (slots,)))
    return tensors


def ensemble_configs(
    name: str, detector: dict[str, Any], model: Deployable, options: TritonOptions
) -> list[dict[str, Any]]:
    """Preprocessing, postprocessing and the ensemble around a detector's configuration: encoded
    images in, boxes in source pixels out.
    """
    largest: int = detector["max_batch_size"]
    batch = leading_dims(model, largest)
    # With max_batch_size 0 the images are the one dimension there is.
    image = {
        "name": "image",
        "data_type": Word("TYPE_STRING"),
        "dims": batch or [1],
    }
    transform = tensor_dict(TRANSFORM, batch)
    results = [tensor_dict(tensor, batch) for tensor in result_tensors(model)]
    raw = [tensor_dict(tensor, batch) for tensor in model.outputs]
    spec = model.spec
    model.check_one_size("the ensemble")
    before = PreprocessParameter(spec.preprocessing)
    after = PostprocessParameter(
        spec.preprocessing.size_hw,
        spec.box_order,
        spec.boxes_normalized,
        spec.inclusive_corners,
        spec.category_ids,
    )
    workers = max(2, options.instances)
    network_input = tensor_dict(model.input, batch)
    names = [f"{name}_preprocess", name, f"{name}_postprocess"]
    steps = [
        (names[0], ["image"], [model.input_name, TRANSFORM.name]),
        (detector["name"], [model.input_name], [tensor["name"] for tensor in raw]),
        (
            names[2],
            [*(tensor["name"] for tensor in raw), TRANSFORM.name],
            [tensor["name"] for tensor in results],
        ),
    ]
    ensemble = {
        "name": f"{name}_ensemble",
        "platform": "ensemble",
        "max_batch_size": largest,
        "input": [image],
        "output": results,
        "ensemble_scheduling": {"step": [_step(*step, results) for step in steps]},
    }
    return [
        python_config(names[0], largest, [image], [network_input, transform], before, workers),
        python_config(names[2], largest, [*raw, transform], results, after, 1),
        ensemble,
    ]


def _step(
    model_name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    results: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """One step; tensors inside are called "raw_X" where a result of the ensemble has their name."""
    final = {tensor["name"] for tensor in results}
    last = set(outputs) == final

    def inside(name: str) -> str:
        return f"raw_{name}" if name in final else name

    return {
        "model_name": model_name,
        "model_version": -1,
        "input_map": [{"key": key, "value": inside(key)} for key in inputs],
        "output_map": [{"key": key, "value": key if last else inside(key)} for key in outputs],
    }
