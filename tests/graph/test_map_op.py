# SPDX-License-Identifier: Apache-2.0
"""Custom operators become plugins; nothing else changes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from odtk_network import odtk_model
from onnx import helper, numpy_helper, parser

from trtdet.commands import create_onnx
from trtdet.errors import GraphError
from trtdet.families import retinanet
from trtdet.graph.map_op import OpMapping, map_ops, unknown_ops
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec

# As torch writes an autograd function of aloception's Deformable DETR, with an If around the
# second.
MODEL = """
<ir_version: 8, opset_import: ["" : 16, "alonet_custom" : 1]>
custom (float[N, 8] value, float[N, 8] locations, bool is_second) => (float[N, 8] result)
{
  [attention_0] first = alonet_custom.ms_deform_attn_forward <im2col_step = 64, plugin_version = "7"> (value, locations)
  second = Relu (first)
  result = If (is_second) <
    then_branch = then_graph () => (float[N, 8] then_out) {
      [attention_1] then_out = alonet_custom.ms_deform_attn_forward <im2col_step = 32> (second, locations)
    },
    else_branch = else_graph () => (float[N, 8] else_out) { else_out = Identity (second) }
  >
}
"""


def nodes_of(model, op):
    found = []

    def search(graph):
        for node in graph.node:
            if node.op_type == op:
                found.append(node)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    search(attribute.g)

    search(model.graph)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Custom=Plugin", OpMapping("Custom", "Plugin", "1")),
        ("Custom=Plugin:2", OpMapping("Custom", "Plugin", "2")),
        ("my.domain::Custom=Plugin_TRT:001", OpMapping("my.domain::Custom", "Plugin_TRT", "001")),
    ],
)
def test_parse(text, expected):
    assert OpMapping.parse(text) == expected


@pytest.mark.parametrize("text", ["", "Custom", "Custom=", "=Plugin", "Custom=Plugin:", "A=B:1:2"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="expected CustomOp=PluginName"):
        OpMapping.parse(text)


def test_nodes_keep_all_but_type_domain_and_version():
    model = parser.parse_model(MODEL)
    assert map_ops(model, [OpMapping("ms_deform_attn_forward", "MsDeformIm2ColTRT", "2")]) == 2
    plugins = nodes_of(model, "MsDeformIm2ColTRT")
    attributes = [{a.name: helper.get_attribute_value(a) for a in n.attribute} for n in plugins]
    assert [node.name for node in plugins] == ["attention_0", "attention_1"]
    assert [list(node.input) for node in plugins] == [
        ["value", "locations"],
        ["second", "locations"],
    ]
    assert {node.domain for node in plugins} == {"trt.plugins"}
    assert attributes == [
        {"im2col_step": 64, "plugin_version": b"2"},
        {"im2col_step": 32, "plugin_version": b"2"},
    ]
    assert {o.domain for o in model.opset_import} == {"", "trt.plugins"}
    onnx.checker.check_model(model)


def test_a_domain_narrows_it():
    model = parser.parse_model(MODEL)
    with pytest.raises(GraphError, match="expected such an operator"):
        map_ops(model, [OpMapping("other::ms_deform_attn_forward", "P")])
    assert map_ops(model, [OpMapping("alonet_custom::ms_deform_attn_forward", "P")]) == 2


def test_a_missing_operator_names_those_there_are():
    model = parser.parse_model(MODEL)
    with pytest.raises(GraphError, match="found alonet_custom::ms_deform_attn_forward"):
        map_ops(model, [OpMapping("ms_deform_attn", "P")])


def test_an_operator_mapped_twice_is_refused():
    with pytest.raises(GraphError, match="found several for"):
        map_ops(parser.parse_model(MODEL), [OpMapping("A", "P"), OpMapping("A", "Q")])


def test_no_mapping_changes_nothing():
    model = parser.parse_model(MODEL)
    before = model.SerializeToString()
    assert map_ops(model, []) == 0
    assert model.SerializeToString() == before


# ---- the plugin inside a network of a family


def with_custom_op(model: onnx.ModelProto, image: str) -> onnx.ModelProto:
    """`mine::Act` between the input and everything that takes it."""
    for node in model.graph.node:
        node.input[:] = ["activated" if name == image else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Act", [image], ["activated"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model


def convert(model: onnx.ModelProto, folder: Path) -> int:
    onnx.save(model, folder / "source.onnx")
    paths = ["--source_onnx", str(folder / "source.onnx"), "--onnx", str(folder / "out.onnx")]
    return create_onnx.main([*paths, "--map_op", "Act=MyPlugin:2", "--no_verify"])


@pytest.mark.parametrize("rotated", [False, True])
def test_retinanet_is_taken_by_its_declared_shapes(
    rotated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(with_custom_op(odtk_model(rotated=rotated), "input_1"), tmp_path) == 0
    assert "does not know trt.plugins::MyPlugin: the shapes of the" in capsys.readouterr().err
    model = onnx.load(tmp_path / "out.onnx")
    spec = ModelSpec.from_onnx(model)
    (plugin,) = nodes_of(model, "MyPlugin")
    plugin.op_type, plugin.domain = "Relu", ""
    del plugin.attribute[:]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 256)).astype(np.float32)
    (scores,) = run_onnx(model, ["class_logits"], {"input": images.transpose(0, 2, 3, 1)})
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (retinanet.MEAN, retinanet.STD))
    seen = np.maximum((images - mean) / std, 0).astype(np.float32)
    (first,) = run_onnx(odtk_model(rotated=rotated), ["score_1"], {"input_1": seen})
    cells = first.reshape(2, -1, 3, 16 * 32).transpose(0, 3, 1, 2).reshape(2, -1, 3)
    np.testing.assert_allclose(scores[:, : cells.shape[1]], cells, atol=1e-5)
    assert (spec.num_classes, spec.preprocessing.size_hw) == (3, (128, 256))
    assert spec.selection == ("rotated_nms" if rotated else "nms")


def test_a_family_that_measures_the_network_says_what_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A DETR of one convolution."""
    model = parser.parse_model("""
      <ir_version: 8, opset_import: ["": 17]>
      detr (float[1, 3, 8, 8] pixel_values) => (float[1, 4, 3] logits, float[1, 4, 4] pred_boxes)
      {
        weight = ConstantOfShape<value = float[1] {0.5}>(shape)
        maps = Conv(pixel_values, weight)
        logits = Reshape(maps, shape_l)
        pred_boxes = Reshape(maps, shape_b)
      }
    """)
    for name, value in (("shape", [4, 3, 1, 1]), ("shape_l", [1, 4, -1]), ("shape_b", [1, -1, 4])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    assert convert(with_custom_op(model, "pixel_values"), tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the family 'detr' is measured by running the network" in error
    assert "found trt.plugins::MyPlugin;" in error
    assert not (tmp_path / "out.onnx").exists()


def test_only_what_stands_before_the_tensors_counts(tmp_path: Path) -> None:
    """Operators behind them, ONNX Runtime's own, and the plugin that is replaced before anything
    runs are no obstacle.
    """
    model = parser.parse_model("""
      <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "trt.plugins": 1, "mine": 1]>
      network (float[1, 8] images) => (float[1, 8] result)
      {
        first = com.microsoft.Gelu(images)
        second = trt.plugins.MultiscaleDeformableAttnPlugin_TRT(first)
        result = mine.Act(second)
      }
    """)
    onnx.save(model, tmp_path / "m.onnx")
    source = OnnxSource(tmp_path / "m.onnx")
    assert unknown_ops(source, ["second"]) == []
    assert unknown_ops(source, ["result"]) == ["mine::Act"]
