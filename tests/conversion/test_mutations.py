"""Valid exports changed in one place: what keeps their meaning stays right, what changes it is
refused, nothing is silently wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import detr_data
import numpy as np
import onnx
import pytest
import yolo_networks as networks
from onnx import TensorProto, helper, numpy_helper

from trtdet.commands import create_onnx
from trtdet.families.base import CLASS_LOGITS, RAW_BOXES
from trtdet.graph import deformable_attention
from trtdet.nms import reference
from trtdet.sources.base import run_onnx
from trtdet.spec import ModelSpec

Edit = Callable[[onnx.ModelProto], None]
IMAGES = ("--preprocessor", "unit", "--resize_mode", "stretch")


def pair() -> onnx.ModelProto:
    """boxes [1, A, 4], x1 y1 x2 y2 in pixels, and scores [1, A, C]: the head of v8 as two
    outputs, without metadata.
    """
    model = networks.v8(end="nms")
    graph = model.graph
    keep = [n for n in graph.node if n.name != "/model.22/Concat_5"]
    wanted = {"pixels", "scores"}
    while True:
        more = wanted | {i for n in keep if wanted & set(n.output) for i in n.input}
        if more == wanted:
            break
        wanted = more
    nodes = [n for n in keep if wanted & set(n.output)]
    nodes += [
        helper.make_node("Transpose", ["pixels"], ["boxes_out"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["scores"], ["scores_out"], perm=[0, 2, 1]),
    ]
    del graph.node[:], graph.output[:], model.metadata_props[:]
    graph.node.extend(nodes)
    for name, width in (("boxes_out", 4), ("scores_out", networks.CLASSES)):
        graph.output.append(helper.make_tensor_value_info(name, 1, [1, networks.BOXES, width]))
    return model


BASES: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "v8": (networks.v8, ()),
    "end_to_end": (lambda: networks.v8(end="topk"), ()),
    "v5": (networks.v5, ()),
    "yolox": (networks.yolox, ()),
    "pair": (pair, IMAGES),
    "detr": (lambda: detr_data.load("detr_tiny")[0], ("--resize_mode", "stretch")),
    "deformable": (lambda: detr_data.load("deformable_detr_tiny")[0], ("--resize_mode", "stretch")),
}


# ---- edits


def rename(**names: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for tensors in (node.input, node.output):
                tensors[:] = [names.get(name, name) for name in tensors]
        for info in [*model.graph.input, *model.graph.output]:
            info.name = names.get(info.name, info.name)

    return edit


def reorder(model: onnx.ModelProto) -> None:
    outputs = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in model.graph.output]
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))


def drop(position: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        del model.graph.output[position]

    return edit


def extra(op: str) -> Edit:
    """Another output: a map from within the network, or a copy of the first output."""

    def edit(model: onnx.ModelProto) -> None:
        if op == "map":
            inner = next(n.output[0] for n in model.graph.node if n.op_type == "Conv")
            model.graph.output.append(helper.make_tensor_value_info(inner, 1, None))
        else:
            first = model.graph.output[0].name
            model.graph.node.append(helper.make_node("Identity", [first], ["again"]))
            model.graph.output.append(helper.make_tensor_value_info("again", 1, None))

    return edit


def before(*ops: str) -> Edit:
    """Operators between the image input and the network: "/255", "imagenet" (of 0 to 1),
    "uint8", "nhwc", "bgr".
    """

    def edit(model: onnx.ModelProto) -> None:
        image = model.graph.input[0]
        name = image.name
        for node in model.graph.node:
            node.input[:] = [
                "inside" if n == name and node.op_type != "Shape" else n for n in node.input
            ]
        current, nodes = name, []
        for number, op in enumerate(ops):
            out = "inside" if number == len(ops) - 1 else f"step{number}"
            if op == "/255":
                model.graph.initializer.append(
                    numpy_helper.from_array(np.float32(255), f"c{number}")
                )
                nodes.append(helper.make_node("Div", [current, f"c{number}"], [out]))
            elif op == "imagenet":
                for key, values in (("m", (0.485, 0.456, 0.406)), ("s", (0.229, 0.224, 0.225))):
                    value = np.array(values, np.float32).reshape(1, 3, 1, 1)
                    model.graph.initializer.append(numpy_helper.from_array(value, f"{key}{number}"))
                nodes.append(helper.make_node("Sub", [current, f"m{number}"], [f"{out}_shifted"]))
                nodes.append(helper.make_node("Div", [f"{out}_shifted", f"s{number}"], [out]))
            elif op == "uint8":
                image.type.tensor_type.elem_type = TensorProto.UINT8
                nodes.append(helper.make_node("Cast", [current], [out], to=TensorProto.FLOAT))
            elif op == "nhwc":
                dims = image.type.tensor_type.shape.dim
                sizes = [dims[2].dim_value, dims[3].dim_value, 3]
                for dim, size in zip(list(dims)[1:], sizes, strict=True):
                    dim.dim_value = size
                nodes.append(helper.make_node("Transpose", [current], [out], perm=[0, 3, 1, 2]))
            elif op == "double":
                nodes.append(helper.make_node("Add", [current, current], [out]))
            current = out
        nodes += model.graph.node
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return edit


def without(op: str) -> Edit:
    """The last node of a kind left out."""

    def edit(model: onnx.ModelProto) -> None:
        for node in reversed(model.graph.node):
            if node.op_type == op:
                node.op_type = "Identity"
                del node.attribute[:]
                return
        raise AssertionError(op)

    return edit


def after(position: int, op: str, value: float | None = None, **attributes: object) -> Edit:
    """An operator behind an output."""

    def edit(model: onnx.ModelProto) -> None:
        name = model.graph.output[position].name
        rename(**{name: "was"})(model)
        model.graph.output[position].name = name
        model.graph.output[position].type.tensor_type.ClearField("shape")
        operands = ["was"]
        if value is not None:
            model.graph.initializer.append(numpy_helper.from_array(np.float32(value), "factor"))
            operands.append("factor")
        model.graph.node.append(helper.make_node(op, operands, [name], **attributes))

    return edit


def corners(model: onnx.ModelProto) -> None:
    """The boxes as corners, under the same name."""
    rename(pred_boxes="was")(model)
    next(o for o in model.graph.output if o.name == "was").name = "pred_boxes"
    parts = {"num_outputs": 2} if model.opset_import[0].version >= 18 else {}
    split = helper.make_node("Split", ["was"], ["centre", "size"], axis=2, **parts)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "a_half"))
    model.graph.node.extend(
        [
            split,
            helper.make_node("Mul", ["size", "a_half"], ["reach"]),
            helper.make_node("Sub", ["centre", "reach"], ["first"]),
            helper.make_node("Add", ["centre", "reach"], ["last"]),
            helper.make_node("Concat", ["first", "last"], ["pred_boxes"], axis=2),
        ]
    )


def one_image_only(model: onnx.ModelProto) -> None:
    """An output that holds one image, whatever the input says."""
    dims = [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    name = model.graph.output[0].name
    after(0, "Reshape")(model)
    shape = numpy_helper.from_array(np.array([1, *dims[1:]], np.int64), f"shape_of_{name}")
    model.graph.initializer.append(shape)
    model.graph.node[-1].input.append(shape.name)


def dynamic_as_minus_one(model: onnx.ModelProto) -> None:
    for info in [*model.graph.input, *model.graph.output]:
        info.type.tensor_type.shape.dim[0].dim_value = -1


def not_a_number(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[1] == 3)
    value = numpy_helper.to_array(weight).copy()
    value.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))


def metadata(**entries: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        known = {p.key: p.value for p in model.metadata_props}
        helper.set_model_props(model, known | entries)

    return edit


@dataclass(frozen=True)
class Mutation:
    base: str
    edit: Edit
    keeps: bool
    name: str
    options: tuple[str, ...] = ()


MUTATIONS = [
    # what keeps the meaning
    Mutation("v8", rename(output0="predictions"), True, "renamed"),
    Mutation("v8", rename(images="x"), True, "input renamed"),
    Mutation("v8", extra("map"), True, "a map more"),
    Mutation("v8", extra("copy"), True, "a copy more"),
    Mutation("v8", before("/255"), True, "/255 inside"),
    Mutation("v8", before("uint8", "/255"), True, "uint8, /255 inside"),
    Mutation("v8", before("nhwc"), True, "channels last"),
    Mutation("v8", dynamic_as_minus_one, True, "-1"),
    Mutation(
        "v8",
        metadata(names='{"0": "circle", "1": "square", "2": "triangle"}'),
        True,
        "names as JSON",
    ),
    Mutation("end_to_end", rename(output0="dets"), True, "renamed"),
    Mutation("end_to_end", before("/255"), True, "/255 inside"),
    Mutation("end_to_end", extra("map"), True, "a map more"),
    Mutation("v5", rename(output0="predictions"), True, "renamed"),
    Mutation("v5", before("/255"), True, "/255 inside"),
    Mutation("yolox", rename(output="predictions"), True, "renamed"),
    Mutation("yolox", extra("map"), True, "a map more"),
    Mutation("pair", rename(boxes_out="a", scores_out="b"), True, "renamed"),
    Mutation("pair", reorder, True, "reordered"),
    Mutation("pair", after(1, "Transpose", perm=[0, 2, 1]), True, "classes first"),
    Mutation("pair", extra("map"), True, "a map more"),
    Mutation("detr", rename(logits="a", pred_boxes="b"), True, "renamed"),
    Mutation("detr", reorder, True, "reordered"),
    Mutation("pair", one_image_only, True, "one image only"),
    Mutation("detr", extra("map"), True, "a map more"),
    Mutation("detr", corners, True, "corners"),
    Mutation("detr", before("nhwc"), True, "channels last"),
    Mutation("deformable", corners, True, "corners"),
    Mutation("deformable", rename(logits="labels", pred_boxes="dets"), True, "renamed"),
    Mutation("deformable", reorder, True, "reordered"),
    # what changes it
    Mutation("v8", without("Sigmoid"), False, "no sigmoid"),
    Mutation("v8", before("/255", "/255", "/255"), False, "normalised three times"),
    Mutation("v8", before("/255", "/255"), False, "normalised twice"),
    Mutation("v8", not_a_number, False, "NaN"),
    Mutation("v8", metadata(names="{0: 'circle', 1: 'square'}"), False, "a name too few"),
    Mutation("v8", metadata(task="classify"), False, "another task"),
    Mutation("v5", after(0, "Mul", 3.0), False, "scores and boxes times 3"),
    Mutation("end_to_end", not_a_number, False, "NaN"),
    Mutation("yolox", without("Sigmoid"), False, "no sigmoid"),
    Mutation("yolox", not_a_number, False, "NaN"),
    Mutation("pair", without("Sigmoid"), False, "no sigmoid"),
    Mutation("pair", drop(0), False, "boxes dropped"),
    Mutation("pair", drop(1), False, "scores dropped"),
    Mutation("pair", after(1, "Mul", 0.0), False, "scores of nothing"),
    Mutation("detr", drop(0), False, "an output dropped"),
    Mutation("detr", drop(1), False, "an output dropped"),
    Mutation("deformable", drop(0), False, "an output dropped"),
    Mutation("detr", not_a_number, False, "NaN"),
]


def pictures(preprocessing: object, size_hw: tuple[int, int]) -> np.ndarray:
    """Two pictures [2, H, W, 3], whole numbers."""
    return np.random.default_rng(3).integers(0, 256, (2, *size_hw, 3)).astype(np.float32)


def found_by(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Corner boxes [N, A, 4] and probabilities [N, A, C] of a converted file."""
    model = onnx.load(path)
    spec = ModelSpec.from_onnx(model)
    images = pictures(spec.preprocessing, spec.preprocessing.size_hw).astype(
        spec.preprocessing.dtype
    )
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 2
    rows = [
        run_onnx(deformable_attention.lower(model), [RAW_BOXES, CLASS_LOGITS], {"input": images[i : i + batch]})
        for i in range(0, 2, batch)
    ]  # fmt: skip
    boxes, scores = (np.concatenate(x) for x in zip(*rows, strict=True))
    anchors = next(
        (numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "nms/anchors"), None
    )
    corners = reference.decode_boxes(boxes.reshape(2, -1, 4), spec.nms.box_coding, anchors)
    return corners, 1 / (1 + np.exp(-scores)) if spec.nms.score_activation else scores


def convert(model: onnx.ModelProto, folder: Path, *options: str) -> Path | None:
    """The converted file; None where it is refused."""
    source, out = folder / "source.onnx", folder / "out.onnx"
    out.unlink(missing_ok=True)
    onnx.save(model, source)
    status = create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options])
    assert out.exists() == (status == 0)
    return out if status == 0 else None


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each export finds, unchanged."""
    found = {}
    for name, (make, options) in BASES.items():
        path = convert(make(), tmp_path_factory.mktemp(name), *options)
        assert path is not None, name
        found[name] = found_by(path)
    return found


def outcome(
    mutation: Mutation, folder: Path, expected: dict[str, tuple[np.ndarray, np.ndarray]]
) -> str:
    make, options = BASES[mutation.base]
    model = make()
    mutation.edit(model)
    path = convert(model, folder, *options, *mutation.options)
    if path is None:
        return "refused"
    boxes, scores = found_by(path)
    wanted_boxes, wanted_scores = expected[mutation.base]
    same = boxes.shape == wanted_boxes.shape and scores.shape == wanted_scores.shape
    close = (
        same
        and np.abs(scores - wanted_scores).max() < 1e-3
        and (
            np.abs(boxes - wanted_boxes).max() < 1e-2 * max(1.0, float(np.abs(wanted_boxes).max()))
        )
    )
    return "right" if close else "silently wrong"


def test_mutations(
    tmp_path: Path,
    expected: dict[str, tuple[np.ndarray, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(MUTATIONS) >= 40
    counts = {"right": 0, "refused": 0, "silently wrong": 0}
    wrong = []
    for mutation in MUTATIONS:
        result = outcome(mutation, tmp_path, expected)
        counts[result] += 1
        if result != ("right" if mutation.keeps else "refused"):
            message = capsys.readouterr().err.strip().splitlines()[-1:]
            wrong.append((mutation.base, mutation.name, result, *message))
    assert not wrong, wrong
    assert counts["silently wrong"] == 0
    assert counts["right"] == sum(m.keeps for m in MUTATIONS)
