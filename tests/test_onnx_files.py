# SPDX-License-Identifier: Apache-2.0
"""The reader of ONNX files: what it says of files that are none, and of those that are damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import toy_detector
from onnx import TensorProto, helper, numpy_helper

from trtdet.errors import GraphError
from trtdet.onnx_files import EXPORT_AGAIN, external_files, read_onnx


def save_external(path: Path) -> Path:
    """A model whose weights, 1 KiB, are in `weights.bin` beside it: those of its graph and those
    inside an If.
    """
    weights = numpy_helper.from_array(np.arange(256, dtype=np.float32), "w")
    inner = helper.make_tensor("v", TensorProto.FLOAT, [256], np.ones(256, np.float32))
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=inner)], "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [256])],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["i"], then_branch=branch, else_branch=branch),
            helper.make_node("Add", ["i", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [256])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location="weights.bin", size_threshold=0, convert_attribute=True)  # fmt: skip
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    path = toy_detector.save(tmp_path / "a.onnx")
    assert read_onnx(path) == read_onnx(path, weights=False) == onnx.load(path)


def test_external_data_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    path = save_external(tmp_path / "a.onnx")
    (weights,) = read_onnx(path).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(weights), np.arange(256))
    (kept,) = read_onnx(path, weights=False).graph.initializer
    assert kept.data_location == TensorProto.EXTERNAL
    assert set(external_files(onnx.load(path, load_external_data=False).graph)) == {"weights.bin"}


def directory(path: Path) -> None:
    path.mkdir()


def saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"x")


def directory_of_one(path: Path) -> None:
    path.mkdir()
    toy_detector.save(path / "best.onnx")


def without_weights(path: Path) -> None:
    save_external(path)
    (path.parent / "weights.bin").unlink()


def short_weights(path: Path) -> None:
    save_external(path)
    os.truncate(path.parent / "weights.bin", 100)


def truncated(path: Path) -> None:
    toy_detector.save(path)
    os.truncate(path, path.stat().st_size // 2)


def without_graph(path: Path) -> None:
    path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda path: None, FileNotFoundError, "--onnx: expected an ONNX file, found nothing at {path}"),
        (directory, FileNotFoundError, "--onnx: expected an ONNX file, found a folder at {path}"),
        (directory_of_one, FileNotFoundError, "--onnx: expected an ONNX file, found a folder at {path}; give the file in it, {path}/best.onnx"),
        (saved_model, FileNotFoundError, "--onnx: expected an ONNX file, found a SavedModel at {path}; convert it with create_onnx.py --saved_model {path}"),
        (os.mkfifo, FileNotFoundError, "--onnx: expected an ONNX file, found a FIFO at {path}"),
        (lambda path: path.write_bytes(b""), GraphError, "{path}: expected an ONNX model, found an empty file; export the model again"),
        (lambda path: path.write_text("hello, I am text\n"), GraphError, "{path}: expected an ONNX file, found a text file; export the model again"),
        (lambda path: path.write_bytes(b"PK\x03\x04...."), GraphError, "{path}: expected an ONNX file, found a ZIP archive, as PyTorch's .pt and Keras' .keras are; export the model again"),
        (lambda path: path.write_bytes(b"\xff\x00\x81" * 50), GraphError, "{path}: expected an ONNX file, found something else, or a damaged one ("),
        (truncated, GraphError, "{path}: expected an ONNX file, found something else, or a damaged one ("),
        (without_graph, GraphError, "{path}: expected an ONNX model, found a file without outputs; export the model again"),
        (without_weights, GraphError, "{path}: expected its weights in the file weights.bin beside it (external data), found none; copy that file there too"),
        (short_weights, GraphError, "{path}: expected the weights 'w' in its external data, which has 100 bytes, found offset 0, length 1024; copy that file again, or export the model again"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    make: Callable[[Path], object], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx"
    make(path)
    with pytest.raises(kind) as caught:
        read_onnx(path, option="--onnx", remedy=EXPORT_AGAIN)
    message, expected = str(caught.value), said.format(path=path)
    assert "\n" not in message
    assert message == expected or (expected.endswith("(") and message.startswith(expected) and message.endswith("; export the model again"))  # fmt: skip


def test_without_an_option_the_file_comes_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^.*a\.onnx: expected an ONNX file, found nothing there$"):  # fmt: skip
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("nodes", "fault"),
    [
        ('["a"] y = Relu(x)', ""),
        ('["b"] y = Relu(z) ["a"] z = Relu(x)', ""),  # ONNX Runtime sorts nodes itself
        ('["a"] y = Add(x, z)', "nothing makes the tensor 'z' that Add 'a' reads"),
        ('["a"] y = Relu(x) ["b"] y = Neg(x)', "two nodes make the tensor 'y', the second is Neg 'b'"),
        ('["a"] z = Add(x, w) ["b"] w = Relu(z) ["c"] y = Relu(x)', "nodes feed each other in a circle, Add 'a' among them"),
        ('["a"] z = Relu(x)', "nothing makes the output 'y'"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_run_is_said_before_anything_is_done(
    nodes: str, fault: str, tmp_path: Path
) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) {{ {nodes} }}'
    )
    onnx.save(model, tmp_path / "a.onnx")
    if not fault:
        assert read_onnx(tmp_path / "a.onnx").graph.output[0].name == "y"
        return
    with pytest.raises(GraphError) as caught:
        read_onnx(tmp_path / "a.onnx", remedy=EXPORT_AGAIN)
    assert str(caught.value) == f"{tmp_path / 'a.onnx'}: expected a graph that can be run, {fault}; export the model again"  # fmt: skip


def test_names_that_are_no_text_are_said(tmp_path: Path) -> None:
    """protobuf reads them without a word, as bytes."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { ["first"] y = Relu(x) }'
    )
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString().replace(b"first", b"\xfffirs"))
    with pytest.raises(GraphError, match=r"a\.onnx: expected a graph that can be run, a name of node 0 is not UTF-8"):  # fmt: skip
        read_onnx(path)
