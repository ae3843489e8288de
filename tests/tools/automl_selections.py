# SPDX-License-Identifier: Apache-2.0
"""SavedModels of a small EfficientDet with every selection of google/automl, from a checkout of it.

    python tests/tools/automl_selections.py AUTOML/efficientdet SAVED_MODEL OUT NAME ...

SAVED_MODEL is an AutoML export with 128 pixels and 3 classes, such as examples/tiny_shapes: its
network is kept, its end replaced by `tf2/postprocess.py`. NAME: combined, or MODE_METHOD_INPUTS
with MODE global or per_class, METHOD hard or gaussian, and INPUTS `max_nms_inputs`, a number, or A
or 2A for as many as anchors or twice that.
"""

import os
import sys
import types
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3")
SIZE, CLASSES, KEPT = 128, 3, 100


def main() -> int:
    checkout, saved_model, out, *names = sys.argv[1:]
    sys.path.insert(0, checkout)
    # Imported by google/automl's packages, used by none of what is used here.
    unused = ("tensorflow_addons", "tensorflow_model_optimization", "neural_structured_learning")
    for name in unused:
        sys.modules[name] = types.ModuleType(name)
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2 as freeze,
    )
    from tf2 import postprocess

    postprocess.merge_class_box_level_outputs = lambda _, classes, boxes: (classes[0], boxes[0])
    frozen = freeze(tf.saved_model.load(saved_model).signatures["serving_default"])
    ends = [
        op.outputs[0]
        for op in frozen.graph.get_operations()
        if op.type == "ConcatV2" and op.outputs[0].shape.rank == 3
    ]
    classes = next(t for t in ends if t.shape[-1] == CLASSES)
    boxes = next(t for t in ends if t.shape[-1] == 4)
    image = frozen.inputs[0]
    pruned = frozen.prune(image, [classes, boxes])
    anchors = int(pruned(tf.zeros([1, SIZE, SIZE, 3], tf.uint8))[1].shape[1])

    def export(name: str) -> None:
        mode, method, inputs = (name, "hard", "0") if name == "combined" else name.rsplit("_", 2)
        most = int(inputs.removesuffix("A") or 1) * (anchors if inputs.endswith("A") else 1)
        params = {
            "min_level": 3, "max_level": 7, "num_scales": 3, "aspect_ratios": [1.0, 2.0, 0.5], "anchor_scale": 4.0,
            "image_size": SIZE, "num_classes": CLASSES, "data_format": "channels_last",
            "nms_configs": {
                "method": method, "iou_thresh": None, "score_thresh": 0.001 if mode == "combined" else 0.0, "sigma": None,
                "max_nms_inputs": most, "max_output_size": KEPT, "pyfunc": False,
            },
        }  # fmt: skip
        select = getattr(postprocess, f"postprocess_{mode}")

        class Model(tf.Module):  # type: ignore[misc]
            @tf.function(  # type: ignore[untyped-decorator]
                input_signature=[tf.TensorSpec([1, None, None, 3], tf.uint8, name="image_arrays")]
            )
            def __call__(self, images: Any) -> dict[str, Any]:
                logits, raw = tf.import_graph_def(
                    frozen.graph.as_graph_def(), input_map={image.name: images},
                    return_elements=[classes.name, boxes.name], name="",
                )  # fmt: skip
                logits = tf.ensure_shape(logits, [1, None, CLASSES])
                raw = tf.ensure_shape(raw, [1, None, 4])
                scale = tf.cast(tf.reduce_max(tf.shape(images)[1:3]), tf.float32) / SIZE
                found, scores, ids, _ = select(params, [logits], [raw], tf.ones([1]) * scale)
                columns = [found, scores[..., None], tf.cast(ids, tf.float32)[..., None]]
                return {"detections": tf.concat([tf.zeros_like(columns[1]), *columns], -1)}

        model = Model()
        tf.saved_model.save(model, f"{out}/{name}", signatures={"serving_default": model.__call__})

    for name in names:
        export(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
