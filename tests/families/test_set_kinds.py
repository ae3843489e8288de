# SPDX-License-Identifier: Apache-2.0
"""Which kind of set prediction a network is, told by its structure: small networks, of which only
the structure is as in the real ones.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from trtdet.commands import create_onnx
from trtdet.families import deformable_detr, rfdetr, rtdetr
from trtdet.families.base import NO_HINTS
from trtdet.families.set_outputs import has_attention, kind_of, maybe_outputs
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec

SIDE, WIDTH, CLASSES, BINS = 64, 8, 5, 6


class Network:
    """images [1, 3, 64, 64] -> logits and pred_boxes of every cell, about reference points."""

    def __init__(self, *, patches: bool, before: int, distributed: bool, cast: bool) -> None:
        self.rng = np.random.default_rng(3)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.cast = cast
        size, step = (16, 16) if patches else (3, 8)
        kernel = self.weight(self.rng.normal(0, 0.1, (WIDTH, 3, size, size)))
        pads = [0 if patches else 1] * 4
        maps = self.node("Conv", "images", kernel, kernel_shape=[size, size], strides=[step, step], pads=pads)  # fmt: skip
        rows = self.rows(maps)
        for _ in range(before):
            rows = self.attend(rows)
        if before:
            side = SIDE // step
            turned = self.node("Transpose", rows, perm=[0, 2, 1])
            maps = self.node("Reshape", turned, self.weight([1, WIDTH, side, side], np.int64))
            maps = self.node(
                "Conv", maps, self.weight(self.rng.normal(0, 0.4, (WIDTH, WIDTH, 1, 1)))
            )
            rows = self.rows(maps)
        rows = self.attend(rows)
        count = (SIDE // step) ** 2
        self.linear(rows, CLASSES, "logits")
        values = self.linear(rows, 4 * BINS if distributed else 4)
        if distributed:
            bins = self.node("Reshape", values, self.weight([1, count, 4, BINS], np.int64))
            shares = self.node("Softmax", bins, axis=-1)
            summed = self.node("MatMul", shares, self.weight(np.linspace(-1, 1, BINS)[:, None]))
            values = self.node("Reshape", summed, self.weight([1, count, 4], np.int64))
        reference = self.weight(self.rng.normal(0, 0.5, (1, count, 4)))
        self.node("Sigmoid", self.node("Add", values, reference), name="pred_boxes")

    def weight(self, values: ArrayLike, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, *inputs: str, name: str = "", **attributes: object) -> str:
        output = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def rows(self, maps: str) -> str:
        flat = self.node("Reshape", maps, self.weight([1, WIDTH, -1], np.int64))
        return self.node("Transpose", flat, perm=[0, 2, 1])

    def linear(self, rows: str, width: int, name: str = "") -> str:
        return self.node(
            "MatMul", rows, self.weight(self.rng.normal(0, 0.5, (WIDTH, width))), name=name
        )

    def attend(self, rows: str) -> str:
        turned = self.node("Transpose", rows, perm=[0, 2, 1])
        shares = self.node("Softmax", self.node("MatMul", rows, turned), axis=-1)
        if self.cast:
            shares = self.node("Cast", shares, to=TensorProto.DOUBLE)
            shares = self.node("Cast", shares, to=TensorProto.FLOAT)
        return self.node("Add", rows, self.node("MatMul", shares, rows))

    def save(self, path: Path, *, check: bool = True) -> Path:
        outputs = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, w])
            for n, w in (("logits", CLASSES), ("pred_boxes", 4))
        ]
        graph = helper.make_graph(
            self.nodes, "set", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])], outputs, self.weights
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if check:
            onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    ("patches", "before", "distributed", "kind"),
    [
        (False, 0, False, "sigmoid"),  # Conditional and DAB-DETR
        (False, 0, True, "rtdetr"),  # DEIMv2 atto: no attention in its encoder
        (False, 1, False, "rtdetr"),  # RT-DETR
        (False, 1, True, "rtdetr"),  # D-FINE
        (False, 6, True, "edge"),  # DEIMv2 s
        (True, 6, True, "edge"),
        (True, 6, False, "rfdetr"),  # RF-DETR, LW-DETR
        (False, 6, False, "transformer"),  # EC
    ],
)
def test_kind(
    patches: bool, before: int, distributed: bool, kind: str, cast: bool, tmp_path: Path
) -> None:
    network = Network(patches=patches, before=before, distributed=distributed, cast=cast)
    source = OnnxSource(network.save(tmp_path / "set.onnx"))
    assert has_attention(source)
    outputs = maybe_outputs(source, NO_HINTS)
    assert outputs is not None and kind_of(source, outputs) == kind
    families = [f.NAME for f in (deformable_detr, rfdetr, rtdetr) if f.matches(source)]
    assert families == [{"sigmoid": "deformable_detr", "rfdetr": "rfdetr"}.get(kind, "rtdetr")]


@pytest.mark.parametrize(
    ("options", "sampling", "dtype", "resize"),
    [
        ((), "cubic", "uint8", "stretch, cubic"),
        (("--interpolation", "linear"), "half_pixel", "uint8", "stretch"),
        (("--antialias", "yes"), "half_pixel", "uint8", "stretch, antialiased"),
    ],
)
def test_pixels_of_paddles_export(
    options: tuple[str, ...], sampling: str, dtype: str, resize: str, tmp_path: Path
) -> None:
    """RT-DETR: OpenCV's INTER_CUBIC on 8 bits, where transformers has Pillow's antialiasing."""
    path = Network(patches=False, before=1, distributed=False, cast=False).save(tmp_path / "s.onnx")
    model = onnx.load(path)
    model.graph.name = "PaddlePaddle Graph in PIR mode"
    onnx.save(model, path)
    out = tmp_path / "out.onnx"
    assert create_onnx.main(["--source_onnx", str(path), "--onnx", str(out), *options]) == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    found = spec.preprocessing
    assert (found.sampling, found.dtype, found.antialias) == (sampling, dtype, "--antialias" in options)  # fmt: skip
    assert {fact.name: fact.value for fact in spec.evidence}["resize"] == resize
    assert (spec.family, found.std) == ("rtdetr", (255.0, 255.0, 255.0))


def test_normalisation_of_a_vision_transformer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ImageNet's where boxes are sums over distributions; else it is asked for."""
    out = tmp_path / "out.onnx"
    for distributed in (True, False):
        network = Network(patches=False, before=6, distributed=distributed, cast=False)
        asked = ["--source_onnx", str(network.save(tmp_path / "set.onnx")), "--onnx", str(out)]
        if not distributed:
            out.unlink()
            assert create_onnx.main(asked) == 1 and not out.exists()
            assert "nothing in the file says normalisation; give --preprocessor" in capsys.readouterr().err  # fmt: skip
            asked += ["--preprocessor", "imagenet", "--antialias", "no"]
        assert create_onnx.main(asked) == 0
        spec = ModelSpec.from_onnx(onnx.load(out))
        assert spec.preprocessing.mean == (123.675, 116.28, 103.53)
        assert spec.preprocessing.antialias == distributed
        facts = {fact.name: (fact.value, fact.origin) for fact in spec.evidence}
        assert facts["resize"][0] == ("stretch, antialiased" if distributed else "stretch")
        assert facts["resize"][1].endswith("--antialias no") != distributed


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (None, "they follow from 'input_ids' too; a detector that takes a text is not converted"),
        (16, "expected an image [N, 3, H, W] and at most a mask [N, H, W] called so"),
    ],
)
def test_a_text_is_no_input_of_ours(
    width: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grounding DINO and OmDet look for what a text names."""
    network = Network(patches=False, before=1, distributed=False, cast=False)
    for node in network.nodes:
        node.output[:] = ["plain" if name == "logits" else name for name in node.output]
    network.node("Cast", "input_ids", name="tokens", to=TensorProto.FLOAT)
    network.node("ReduceMean", "tokens", name="meaning", keepdims=0)
    network.node("Add", "plain", "meaning", name="logits")
    path = tmp_path / "set.onnx"
    model = onnx.load(network.save(path, check=False))
    model.graph.input.append(
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, width])
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    out = tmp_path / "out.onnx"
    assert (
        create_onnx.main(["--source_onnx", str(path), "--onnx", str(out), "--family", "rtdetr"])
        == 1
    )
    assert said in capsys.readouterr().err and not out.exists()
