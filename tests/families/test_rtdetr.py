"""RT-DETR as Ultralytics exports it: rows of boxes and probabilities, with its metadata."""

from pathlib import Path

import detr_data
import numpy as np
import onnx
import pytest
from onnx import helper

from trtdet.commands import create_onnx
from trtdet.families import load_families
from trtdet.families.base import pick_family
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec


@pytest.fixture(params=[None, 2])
def export(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The tiny Deformable DETR, its two outputs as one, without its mask; with two of its classes,
    too, where a row is as wide as a detection.
    """
    model = detr_data.load("deformable_detr_tiny")[0]
    values = [info.name for info in model.graph.output]
    all_classes = model.graph.output[values.index("logits")].type.tensor_type.shape.dim[2].dim_value
    classes = request.param or all_classes
    assert classes <= all_classes
    queries = model.graph.output[values.index("logits")].type.tensor_type.shape.dim[1].dim_value
    model.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["all_probabilities"]))
    for name, bound in (("from", 0), ("to", classes), ("of", 2)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([bound]), name))
    model.graph.node.append(
        helper.make_node("Slice", ["all_probabilities", "from", "to", "of"], ["probabilities"])
    )
    model.graph.node.append(
        helper.make_node("Concat", ["pred_boxes", "probabilities"], ["output0"], axis=2)
    )
    mask = next(i for i in model.graph.input if "mask" in i.name)
    dims = [d.dim_value for d in mask.type.tensor_type.shape.dim][1:]
    dtype = helper.tensor_dtype_to_np_dtype(mask.type.tensor_type.elem_type)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((1, *dims), dtype), mask.name)
    )
    inputs = [i for i in model.graph.input if i.name != mask.name]
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(inputs)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output.append(
        helper.make_tensor_value_info("output0", 1, [1, queries, 4 + classes])
    )
    names = {i: f"c{i}" for i in range(classes)}
    helper.set_model_props(model, {"names": str(names), "stride": "32", "task": "detect"})
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    return path


def test_rows_with_metadata(export: Path, tmp_path: Path) -> None:
    assert pick_family(OnnxSource(export), load_families()).NAME == "rtdetr"
    out = tmp_path / "out.onnx"
    options = ["--input_format", "NCHW", "--input_dtype", "float32"]
    assert create_onnx.main(["--source_onnx", str(export), "--onnx", str(out), *options]) == 0
    model = onnx.load(out)
    spec = ModelSpec.from_onnx(model)
    assert (spec.selection, spec.labels[0], spec.preprocessing.resize) == ("topk", "c0", "stretch")
    assert spec.preprocessing.std == (255.0,) * 3
    image = (
        np.random.default_rng(0)
        .integers(0, 256, (1, *spec.preprocessing.image_shape))
        .astype(np.float32)
    )
    source = onnx.load(export)
    (rows,) = run_onnx(source, ["output0"], {source.graph.input[0].name: image / 255})
    scores = np.sort(rows[0, :, 4:].reshape(-1))[::-1]
    (found,) = run_onnx(model, ["detection_scores"], {"input": image})
    n = min(len(scores), found.shape[1])
    assert n >= 20
    np.testing.assert_allclose(found[0, :n], scores[:n], atol=1e-4)
