# SPDX-License-Identifier: Apache-2.0
"""ONNX files that are whole, and wrong inside: one line that names the file, for every command
that reads one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_desk
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto], None]

INT8 = "build_engine --model net.onnx --save_onnx out.onnx --precision int8 --int8_share 1 --calib_cache net.cache --calib_method minmax"  # fmt: skip
LINES = {
    "infer": "infer --model net.onnx --input photos --output out --no_images",
    "compare": "compare --reference net.onnx --candidate net.onnx --input photos --json out.json",
    "triton": "deploy triton --model net.onnx --output out --name d0",
    "pad_color": "deploy pad_color --model net.onnx --output out.onnx",
    "trtexec": "deploy trtexec --model net.onnx --tensorrt_version 10.13",
    "int8": INT8,
}


def plugin(name: str, value: Any) -> Edit:
    """The NMS node with another value of an attribute; None: without it."""

    def edit(model: onnx.ModelProto) -> None:
        (node,) = (n for n in model.graph.node if n.op_type == "EfficientNMS_TRT")
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return edit


def weights(change: Callable[[TensorProto], None]) -> Edit:
    return lambda model: change(model.graph.initializer[0])


def conv(change: Callable[[onnx.NodeProto], None]) -> Edit:
    return lambda model: change(next(n for n in model.graph.node if n.op_type == "Conv"))


def image(change: Callable[[onnx.TypeProto], None]) -> Edit:
    return lambda model: change(model.graph.input[0].type)


def set_field(name: str, value: Any) -> Callable[[Any], None]:
    return lambda message: setattr(message, name, value)


def side(value: int) -> Callable[[onnx.TypeProto], None]:
    def change(kind: onnx.TypeProto) -> None:
        kind.tensor_type.shape.dim[1].dim_value = value

    return change


def external(location: str) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def circle(model: onnx.ModelProto) -> None:
    first, *_, last = (n for n in model.graph.node if n.op_type == "Conv")
    first.input[0] = last.output[0]


def twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[3])


def sequence(kind: onnx.TypeProto) -> None:
    kind.CopyFrom(helper.make_sequence_type_proto(kind))


# fmt: off
#: Edit -> what is wrong.
EDITS: dict[str, Edit] = {
    **{f"{n} {v!a:.20}": plugin(n, v) for n, values in {
        "max_output_boxes": (2**31 - 1, 2**31, 2**62, 0, -1, "text", [1, 2], None),
        "score_threshold": (float("nan"), float("inf"), -1.0, "text", None),
        "iou_threshold": (float("nan"), 5.0, 0.0, "text", None),
        "background_class": (2**31, 2**62, -5, "text", None),
        "box_coding": (2, 7, "text", None),
        "score_activation": ("text", None),
        "class_agnostic": ("text",),
    }.items() for v in values},
    "weights of no type": weights(set_field("data_type", 99)), "weights undefined": weights(set_field("data_type", 0)),
    "weights cut": weights(lambda t: set_field("raw_data", t.raw_data[:-3])(t)),
    "weights of huge size": weights(lambda t: t.dims.__setitem__(0, 2**40)), "weights of negative size": weights(lambda t: t.dims.__setitem__(0, -3)),
    "weights of text": weights(lambda t: t.CopyFrom(numpy_helper.from_array(np.array(["x"], object), t.name))),
    "weights of no elements": weights(lambda t: t.CopyFrom(numpy_helper.from_array(np.zeros((0, 3), "f4"), t.name))),
    "weights in /etc": weights(external("/etc/passwd")), "weights above": weights(external("../../etc/passwd")),
    "weights in a folder": weights(external("photos")), "weights nowhere": weights(external("nowhere.bin")), "weights without a place": weights(external("")),
    "unknown operator": conv(set_field("op_type", "Nonsense")), "unknown domain": conv(set_field("domain", "evil.com")),
    "no inputs": conv(lambda n: n.ClearField("input")), "no outputs": conv(lambda n: n.ClearField("output")),
    "input that nothing makes": conv(lambda n: n.input.__setitem__(0, "nowhere")), "circle": circle, "a tensor made twice": twice,
    "opset 0": lambda m: set_field("version", 0)(m.opset_import[0]), "opset 99": lambda m: set_field("version", 99)(m.opset_import[0]),
    "opset -5": lambda m: set_field("version", -5)(m.opset_import[0]), "no opset": lambda m: m.ClearField("opset_import"),
    "IR 99": set_field("ir_version", 99), "no input": lambda m: m.graph.ClearField("input"), "no output": lambda m: m.graph.ClearField("output"),
    "no nodes": lambda m: m.graph.ClearField("node"), "no metadata": lambda m: m.ClearField("metadata_props"),
    "other outputs": lambda m: m.graph.output.pop(), "two inputs": lambda m: m.graph.input.add(name="other"),
    "input of 0": image(side(0)), "input of -4": image(side(-4)), "input of 2^40": image(side(2**40)),
    "input without a shape": image(lambda t: t.tensor_type.ClearField("shape")), "input of rank 0": image(lambda t: t.tensor_type.shape.ClearField("dim")),
    "input of a sequence": image(sequence), "input of text": image(lambda t: set_field("elem_type", TensorProto.STRING)(t.tensor_type)),
    "input of no type": image(lambda t: set_field("elem_type", 0)(t.tensor_type)),
}
# fmt: on

#: Commands that look at a part of the file alone: they may do their work, the others may not.
PARTIAL = ("pad_color", "trtexec", "int8", "triton")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_desk.make(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_graph_is_one_line(
    name: str, command: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    model = onnx.load(desk / "net.onnx")
    EDITS[name](model)
    (desk / "net.onnx").write_bytes(model.SerializeToString())
    outcome = fault_desk.run(desk, LINES[command], capsys)
    assert "Traceback" not in outcome.err, outcome.err
    assert not [left for left in outcome.left if Path(left).name.startswith(".")], outcome.left
    if outcome.status == 0 and command in PARTIAL:
        return
    # A graph that can be read and is another one: the calibration cache is not of it.
    fault_desk.check_one_line(outcome, 1, r"net\.onnx|net\.cache does not fit: model_sha256")
    assert outcome.left == (), outcome.left


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("text", [b"weights_XX.bin", b"location"])
def test_texts_of_external_data_that_are_not_utf8(
    text: bytes, command: str, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    model = onnx.load(desk / "net.onnx")
    weights(external("weights_XX.bin"))(model)
    data = model.SerializeToString()
    assert data.count(text) == 1
    (desk / "net.onnx").write_bytes(data.replace(text, b"\xff\xfe" + text[2:]))
    outcome = fault_desk.run(desk, LINES[command], capsys)
    if outcome.status == 0 and command in PARTIAL:
        return
    fault_desk.check_one_line(outcome, 1, r"net\.onnx|net\.cache does not fit: model_sha256")
    assert outcome.left == (), outcome.left


@pytest.mark.parametrize("command", LINES)
def test_the_graph_before_it_is_edited(command: str, sound: Path, tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    desk = fault_desk.copy(sound, tmp_path / "desk")
    assert fault_desk.run(desk, LINES[command], capsys).status == 0


@pytest.mark.parametrize("value", [np.nan, np.float32("nan")])
def test_weights_of_nan_are_warned_of_and_not_measured(
    value: float, sound: Path, tmp_path: Path, capsys: Any
) -> None:
    desk = fault_desk.copy(sound, tmp_path / "desk")
    model = onnx.load(desk / "net.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "stem_w")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[5] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, desk / "net.onnx")
    outcome = fault_desk.run(desk, LINES["infer"], capsys)
    assert outcome.status == 0
    assert "W net.onnx: the weights 'stem_w' hold NaN" in outcome.err
    line = (
        "eval_coco --model net.onnx --input photos --annotations objects.json --json metrics.json"
    )
    outcome = fault_desk.run(desk, line, capsys)
    fault_desk.check_one_line(outcome, 1, r"net\.onnx: the weights 'stem_w' hold NaN, so there is nothing to measure")  # fmt: skip
    assert outcome.left == ()
