# SPDX-License-Identifier: Apache-2.0
"""Sources that bring their own Q/DQ pairs, as quantization aware training exports them, that keep
their nodes in functions, or that use names of the converted file: the converted model computes what
they compute.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yolo_networks
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtdet.commands import compare, create_onnx
from trtdet.families.outputs import photographs
from trtdet.precision.quantization import precision_of, quantized_convs
from trtdet.sources.base import run_onnx

SIDES = (yolo_networks.HEIGHT, yolo_networks.WIDTH)


class Pictures:
    """What onnxruntime.quantization calibrates on."""

    def __init__(self, name: str) -> None:
        self._rest: Iterator[dict[str, NDArray[Any]]] = iter([{name: x} for x in pixels()])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._rest, None)


def pixels() -> list[NDArray[np.float32]]:
    return [x.astype(np.float32).transpose(2, 0, 1)[None] / 255 for x in photographs(SIDES)]


def quantized(folder: Path, *, stored: bool) -> Path:
    """A YOLO with pairs at every convolution, weights in INT8 or as float32 before a pair."""
    from onnxruntime import quantization as q

    plain, path = folder / "plain.onnx", folder / "quantized.onnx"
    onnx.save(yolo_networks.v8(), plain)
    q.quantize_static(
        plain,
        path,
        Pictures("images"),
        quant_format=q.QuantFormat.QDQ,
        activation_type=q.QuantType.QInt8,
        weight_type=q.QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": not stored,
        },
    )
    return path


@pytest.mark.parametrize("stored", [True, False])
def test_pairs_stay(stored: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = quantized(tmp_path, stored=stored), tmp_path / "out.onnx"
    before, photos = onnx.load(source), str(Path(__file__).parents[1].parent / "examples/images")
    wanted = sum(node.op_type == "Conv" for node in before.graph.node)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out)]) == 0
    model = onnx.load(out)
    assert len(quantized_convs(model)) == len(quantized_convs(before)) == wanted >= 5
    assert precision_of(model) == "int8"
    dequantized = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    kept = [w for w in model.graph.initializer if w.name in dequantized]
    assert not any(w.data_type == onnx.TensorProto.INT32 for w in kept)  # which TensorRT refuses
    capsys.readouterr()
    command = ["--reference", str(source), "--candidate", str(out), "--input", photos]
    assert compare.main([*command, "--num_images", "3"]) == 0
    assert ", 0 missing, 0 extra, 0 of another class" in capsys.readouterr().out


def detections_of(model: onnx.ModelProto, folder: Path) -> list[NDArray[Any]]:
    """Of the converted model, for a photograph."""
    source, out = folder / "source.onnx", folder / "out.onnx"
    onnx.save(model, source)
    assert create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), "--nms", "onnx"]) == 0  # fmt: skip
    feed = {"input": photographs(SIDES)[0][None].astype(np.float32)}
    names = ["detection_boxes", "detection_scores", "detection_classes"]
    return run_onnx(onnx.load(out), names, feed)


def test_weights_in_8_bits_alone_are_float32(tmp_path: Path) -> None:
    """They save memory; what is computed in 8 bits is chosen by build_engine.py."""
    plain, model = yolo_networks.v8(), yolo_networks.v8()
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    for each in (plain, model):
        weight = next(w for w in each.graph.initializer if w.name == conv.input[1])
        value = numpy_helper.to_array(weight)
        scale = np.float32(np.abs(value).max() / 127)
        stored = np.round(value / scale).astype(np.int8)
        if each is plain:
            weight.CopyFrom(numpy_helper.from_array(stored * scale, weight.name))
            continue
        weight.CopyFrom(numpy_helper.from_array(stored, weight.name))
        each.graph.initializer.append(numpy_helper.from_array(scale, "weight_scale"))
        dequantize = helper.make_node("DequantizeLinear", [weight.name, "weight_scale"], ["weight"])
        conv.input[1] = "weight"
        each.graph.node.insert(0, dequantize)
    for want, got in zip(detections_of(plain, tmp_path), detections_of(model, tmp_path), strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)
    assert not any(
        n.op_type == "DequantizeLinear" for n in onnx.load(tmp_path / "out.onnx").graph.node
    )


def test_images_in_whole_numbers_are_dequantized_once(tmp_path: Path) -> None:
    """A DequantizeLinear without its QuantizeLinear is the division by 255."""
    plain, model = yolo_networks.v8(), yolo_networks.v8()
    image = model.graph.input[0]
    image.name, image.type.tensor_type.elem_type = "bytes", onnx.TensorProto.UINT8
    scale = numpy_helper.from_array(np.float32(1 / 255), "byte_scale")
    model.graph.initializer.append(scale)
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["bytes", "byte_scale"], ["images"]))  # fmt: skip
    want, got = detections_of(plain, tmp_path), detections_of(model, tmp_path)
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    np.testing.assert_array_equal(got[2], want[2])


def test_functions_are_read(tmp_path: Path) -> None:
    plain = yolo_networks.v8()
    graph = plain.graph
    called = [w.name for w in graph.initializer]
    body = helper.make_function("mine", "Network", ["images", *called], ["output0"], graph.node, list(plain.opset_import))  # fmt: skip
    call = helper.make_node("Network", ["images", *called], ["output0"], domain="mine")
    outer = helper.make_graph([call], "g", graph.input, graph.output, graph.initializer)
    opsets = [*plain.opset_import, helper.make_opsetid("mine", 1)]
    model = helper.make_model(outer, opset_imports=opsets, functions=[body], ir_version=8)
    model.metadata_props.extend(plain.metadata_props)
    for want, got in zip(detections_of(plain, tmp_path), detections_of(model, tmp_path), strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "name", ["input", "network_input", "raw_boxes", "class_logits", "detection_scores", "num_detections", "preprocess/scale"]
)  # fmt: skip
def test_an_inner_tensor_may_have_any_name(name: str, tmp_path: Path) -> None:
    model = yolo_networks.v8()
    wanted = detections_of(model, tmp_path)
    inner = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if each == inner else each for each in names]
    for want, got in zip(wanted, detections_of(model, tmp_path), strict=True):
        np.testing.assert_array_equal(got, want)
