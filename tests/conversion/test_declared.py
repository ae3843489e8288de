"""Detectors that no family knows: declared on the command line, or in a family file of the
user's own.
"""

import json
import re
from pathlib import Path

import detr_data
import numpy as np
import onnx
import onnxruntime
import pytest
import yolo_networks as networks
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from test_mutations import IMAGES, found_by, pair

from trtdet.commands import compare as compare_stage
from trtdet.commands import create_onnx
from trtdet.errors import GraphError
from trtdet.families.base import NO_HINTS, Declaration, Hints
from trtdet.families.heads_finder import _behind_box
from trtdet.sources.base import run_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_family.md"


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def convert(source: Path, *options: str) -> tuple[int, Path]:
    out = source.with_suffix(".out.onnx")
    out.unlink(missing_ok=True)
    return create_onnx.main(["--source_onnx", str(source), "--onnx", str(out), *options]), out


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


DECLARED = ("--boxes_output", "boxes_out", "--scores_output", "scores_out", *IMAGES)


def test_two_outputs(tmp_path: Path) -> None:
    source = save(pair(), tmp_path / "pair.onnx")
    status, out = convert(
        source,
        *DECLARED,
        "--box_format",
        "xyxy",
        "--box_units",
        "pixels",
        "--score_activation",
        "none",
    )
    assert status == 0
    evidence = {f.name: f.origin for f in ModelSpec.from_onnx(onnx.load(out)).evidence}
    assert evidence["boxes"] == "given: --box_format"
    assert evidence["normalisation"] == "given: --preprocessor unit"
    boxes, scores = found_by(out)
    _, measured = convert(source, *IMAGES)
    for a, b in zip((boxes, scores), found_by(measured), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_scores_that_nothing_holds_to_0_to_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of YOLOv1: declared, they are cut."""
    model = pair()
    graph = model.graph
    scaled = [
        helper.make_node("Mul", ["plain", "factor"], ["more"]),
        helper.make_node("Sub", ["more", "less"], ["scores_out"]),
    ]
    graph.node[-1].output[0] = "plain"
    graph.node.extend(scaled)
    constants = {"factor": np.float32(1.4), "less": np.float32(0.2)}
    graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
    source = save(model, tmp_path / "linear.onnx")
    assert convert(source, *DECLARED)[0] == 1
    assert "--score_activation sigmoid|softmax|clip" in error_of(capsys)
    assert convert(source, *DECLARED, "--score_activation", "none")[0] == 1
    assert "no probabilities; clip cuts them to 0..1" in error_of(capsys)
    status, out = convert(source, *DECLARED, "--score_activation", "clip")
    assert status == 0
    wanted = found_by(convert(save(pair(), tmp_path / "pair.onnx"), *DECLARED)[1])[1]
    np.testing.assert_allclose(found_by(out)[1], np.clip(1.4 * wanted - 0.2, 0, 1), atol=1e-5)
    graph.initializer[-2].CopyFrom(numpy_helper.from_array(np.array(np.float32(9)), "factor"))
    source = save(model, tmp_path / "logits.onnx")
    assert convert(source, *DECLARED, "--score_activation", "clip")[0] == 1
    assert "no probabilities that go a little beyond 0..1" in error_of(capsys)


def test_a_normalisation_in_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(pair(), tmp_path / "pair.onnx")
    status, out = convert(
        source, "--resize_mode", "warp", "--channel_order", "bgr", "--preprocessor", "1,2,3/4,5,6",
        "--score_activation", "none", "--box_format", "xyxy", "--box_units", "pixels",
    )  # fmt: skip
    assert status == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    found = spec.preprocessing
    assert (found.mean, found.std, found.bgr) == ((1, 2, 3), (4, 5, 6), True)
    assert found.is_warped and (found.placement, found.sampling) == ("center", "corner")
    facts = {fact.name: (fact.value, fact.origin) for fact in spec.evidence}
    assert facts["resize"] == ("affine warp, center on 0,0,0", "given: --resize_mode warp")
    with pytest.raises(SystemExit):
        convert(source, "--resize_mode", "warp", "--antialias")
    assert "--antialias: an affine warp has none; leave it out" in capsys.readouterr().err
    for text in ("1,2,3", "1,2,3/4,5", "1,2,3/4,5,0", "a,2,3/4,5,6", "1,2,3/4,5,inf"):
        with pytest.raises(SystemExit):
            convert(source, *IMAGES[2:], "--preprocessor", text)
        assert f"mean and standard deviation on the scale of 0 to 255, got '{text}'" in capsys.readouterr().err  # fmt: skip


def test_how_a_letterbox_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(pair(), tmp_path / "pair.onnx")
    asked = ["--preprocessor", "unit", "--resize_mode", "letterbox", "--placement", "center"]
    asked += ["--pad_color", "9", "--rounding", "floor", "--longest_side", "30", "--antialias"]
    status, out = convert(source, *asked, "--clip_boxes")
    assert status == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    found = spec.preprocessing
    assert (found.rounding, found.longest, found.antialias) == ("floor64", 30, True)
    facts = {fact.name: fact.value for fact in spec.evidence}
    assert facts["resize"] == "letterbox, center on 9,9,9, its size rounded down, its longer side 30, antialiased"  # fmt: skip
    assert "boxes clipped to the picture" in facts["selection"]
    with pytest.raises(SystemExit):
        convert(source, *IMAGES, "--rounding", "floor")
    assert "--rounding is of a letterbox, not of --resize_mode stretch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--box_format", "cxcywh"), "--box_format cxcywh: the boxes are xyxy: boxes lie"),
        (("--box_units", "unit"), "--box_units unit: the boxes are in pixels, up to"),
        (("--score_activation", "sigmoid"), "have their activation already; leave it out"),
        (
            ("--scores_layout", "NCA"),
            "--scores_layout NCA: 'scores_out' is [1, 42, 3] for 42 boxes",
        ),
        (("--label_base", "1"), "--label_base 1: a box has one score for each class"),
        (("--num_classes", "4"), "--num_classes 4: there are 3, one for each score of a box"),
    ],
)
def test_what_is_measured_contradicts_what_is_declared(
    tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = convert(save(pair(), tmp_path / "pair.onnx"), *DECLARED, *options)
    assert status == 1 and not out.exists()
    assert message in error_of(capsys)


def test_rows_of_an_undeclared_detector_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head of v8 without its metadata: nothing says how images come in, and the refusal
    names the options.
    """
    model = networks.v8()
    del model.metadata_props[:]
    source = save(model, tmp_path / "rows.onnx")
    status, _ = convert(source)
    assert status == 1
    message = error_of(capsys)
    assert (
        "nothing in the file says normalisation and resize" in message
        and "--resize_mode stretch" in message
    )
    status, out = convert(
        source, "--rows_output", "output0", "--columns", "cx,cy,w,h,scores", *IMAGES
    )
    assert status == 0
    status, plain = convert(save(networks.v8(), tmp_path / "v8.onnx"), "--resize_mode", "stretch")
    assert status == 0
    for a, b in zip(found_by(out), found_by(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def selecting(outputs: dict[str, list[int | str]], batch: int | str = 1) -> onnx.ModelProto:
    """A convolution, and outputs of other shapes behind it, of values that do not matter."""
    nodes = [helper.make_node("Conv", ["images", "weight"], ["features"])]
    weights = [numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")]
    for name, dims in outputs.items():
        shape = np.array([d if isinstance(d, int) else 1 for d in dims], np.int64)
        weights.append(numpy_helper.from_array(shape, f"{name}_shape"))
        nodes += [
            helper.make_node("ReduceMax", ["features"], [f"{name}_top"], keepdims=0),
            helper.make_node("Expand", [f"{name}_top", f"{name}_shape"], [name]),
        ]
    images = helper.make_tensor_value_info("images", 1, [batch, 3, 32, 32])
    infos = [helper.make_tensor_value_info(n, 1, dims) for n, dims in outputs.items()]
    graph = helper.make_graph(nodes, "selecting", [images], infos, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("outputs", "line"),
    [
        ({"out_7": ["n", 4], "out_8": ["n"], "out_9": ["n"]}, "--boxes_output out_7 --scores_output out_8 --labels_output out_9"),
        ({"out_7": ["n", 4], "out_8": ["n"]}, "--boxes_output out_7 --scores_output out_8"),
        ({"out_7": ["n", 6]}, "--rows_output out_7 --columns label,score,x1,y1,x2,y2"),
        ({"out_7": ["n", 7]}, "--rows_output out_7 --columns unused,x1,y1,x2,y2,label,score"),
    ],
)  # fmt: skip
def test_outputs_without_a_batch_axis_are_asked_for(
    outputs: dict[str, list[int | str]],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save(selecting(outputs), tmp_path / "m.onnx")
    assert convert(source)[0] == 1
    assert f"Declare them: {line} " in error_of(capsys)


@pytest.mark.parametrize(
    "outputs",
    [
        {"boxes": ["batch", 4], "scores": ["batch"]},
        {"boxes": ["batch", 9, 4], "scores": ["batch", 9, 3], "rois": ["n", 4]},
    ],
)
def test_outputs_with_a_batch_axis_are_not_said_to_have_none(
    outputs: dict[str, list[int | str]], tmp_path: Path
) -> None:
    from trtdet.families.heads_plan import describe_outputs
    from trtdet.sources.onnx_file import OnnxSource

    source = OnnxSource(save(selecting(outputs, "batch"), tmp_path / "m.onnx"))
    assert "Declare them: --boxes_output boxes --scores_output scores" in describe_outputs(source)


def with_objectness(*, logit: bool, scores: str) -> onnx.ModelProto:
    """Rows of boxes, an objectness that equals the probability of the first class, and scores."""
    model = pair()
    ends = {"one": [1], "zero": [0], "axis": [2]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in ends.items())
    one = numpy_helper.from_array(np.float32(1), "unity")
    model.graph.initializer.append(one)
    model.graph.node.extend([
        helper.make_node("Sub", ["unity", "scores_out"], ["rest"]),
        helper.make_node("Div", ["scores_out", "rest"], ["odds"]),
        helper.make_node("Log", ["odds"], ["class_logits"]),
        helper.make_node("Slice", ["class_logits" if logit else "scores_out", "zero", "one", "axis"], ["object"]),
        helper.make_node("Concat", ["boxes_out", "object", scores], ["rows"], axis=2),
    ])  # fmt: skip
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("rows", 1, [1, 42, 8]))
    return model


@pytest.mark.parametrize("logit", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_logits_behind_an_objectness(logit: bool, activation: str, tmp_path: Path) -> None:
    """Activated before they are multiplied, and the objectness only where it is a logit."""
    columns = ("--rows_output", "rows", "--columns", "x1,y1,x2,y2,objectness,scores")
    options = (*IMAGES, *columns, "--score_activation", activation, "--background", "none")
    model = with_objectness(logit=logit, scores="class_logits")
    status, out = convert(save(model, tmp_path / "rows.onnx"), *options)
    assert status == 0
    boxes, plain = found_by(convert(save(pair(), tmp_path / "pair.onnx"), *DECLARED)[1])
    odds = plain / (1 - plain)
    classes = plain if activation == "sigmoid" else odds / odds.sum(axis=2, keepdims=True)
    found = found_by(out)
    np.testing.assert_allclose(found[0], boxes, atol=1e-4)
    np.testing.assert_allclose(found[1], plain[..., :1] * classes, atol=1e-4)


def test_an_objectness_without_its_sigmoid_beside_probabilities_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_objectness(logit=True, scores="scores_out")
    columns = ("--rows_output", "rows", "--columns", "x1,y1,x2,y2,objectness,scores")
    assert convert(save(model, tmp_path / "rows.onnx"), *IMAGES, *columns)[0] == 1
    assert "expected an objectness of 0 to 1 beside probabilities in 'rows'" in error_of(capsys)


@pytest.mark.parametrize("channels", [1, 4])
def test_an_input_of_other_channels_is_not_said_to_need_options(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pair()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = channels
    assert convert(save(model, tmp_path / "m.onnx"), *IMAGES)[0] == 1
    said = error_of(capsys)
    assert f"its inputs: images [1, {channels}, 32, 64]" in said
    assert "export the model with one image input" in said and "Declare them" not in said


def test_columns_of_y_and_x(tmp_path: Path) -> None:
    """y1,x1,y2,x2 are told from x1,y1,x2,y2 by their order."""
    options = (*IMAGES, "--rows_output", "rows_out", "--columns", "y1,x1,y2,x2,scores")
    model = pair()
    order = numpy_helper.from_array(np.array([1, 0, 3, 2]), "order")
    model.graph.initializer.append(order)
    model.graph.node.extend([
        helper.make_node("Gather", ["boxes_out", "order"], ["turned"], axis=2),
        helper.make_node("Concat", ["turned", "scores_out"], ["rows_out"], axis=2),
    ])  # fmt: skip
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("rows_out", 1, [1, 42, 7]))
    status, out = convert(save(model, tmp_path / "rows.onnx"), *options)
    assert status == 0 and ModelSpec.from_onnx(onnx.load(out)).box_order == "yxyx"
    wanted = found_by(convert(save(pair(), tmp_path / "pair.onnx"), *DECLARED)[1])
    boxes, scores = found_by(out)
    np.testing.assert_allclose(boxes[..., [1, 0, 3, 2]], wanted[0], atol=1e-4)
    np.testing.assert_allclose(scores, wanted[1], atol=1e-4)


def test_the_table_names_the_columns_beside_the_box(tmp_path: Path) -> None:
    model = pair()
    model.graph.node.append(helper.make_node("Concat", ["scores_out", "boxes_out"], ["rows"], axis=2))  # fmt: skip
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("rows", 1, [1, 42, 7]))
    options = (*IMAGES, "--rows_output", "rows", "--columns", "scores,x1,y1,x2,y2")
    status, out = convert(save(model, tmp_path / "rows.onnx"), *options)
    facts = {fact.name: fact.value for fact in ModelSpec.from_onnx(onnx.load(out)).evidence}
    assert (status, facts["scores"]) == (0, "scores: probabilities")


def test_a_wrong_reading_of_columns_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = networks.v8()
    del model.metadata_props[:]
    source = save(model, tmp_path / "rows.onnx")
    status, out = convert(
        source, "--rows_output", "output0", "--columns", "x1,y1,x2,y2,scores", *IMAGES
    )
    assert status == 1 and not out.exists()
    assert "the boxes are cxcywh" in error_of(capsys)


def test_a_batch_of_1_that_was_freed_is_said_to_be_dynamic(tmp_path: Path) -> None:
    model = pair()
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    for options, said in (
        ((), ("dynamic", "measured: 1 in the source, but its network takes any")),
        (("--input_shape", "1,32,64,3"), ("1", "read: the shape of the input")),
        (("--input_shape", "4,32,64,3"), ("4", "given: --input_shape")),
    ):
        status, out = convert(save(model, tmp_path / "pair.onnx"), *DECLARED, *options)
        assert status == 0
        facts = {f.name: (f.value, f.origin) for f in ModelSpec.from_onnx(onnx.load(out)).evidence}
        assert facts["batch"] == said


def of_two() -> onnx.ModelProto:
    """`pair`, exported for a batch of 2, with the shapes of its inner tensors declared."""
    model = pair()
    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in shapes:
            shape = numpy_helper.to_array(node.attribute[0].t).copy()
            shape[0] = 2
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(shape))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    return onnx.shape_inference.infer_shapes(model)


def test_shapes_of_the_sources_batch_are_forgotten(tmp_path: Path) -> None:
    """ONNX Runtime folds reshapes by what is declared of inner tensors."""
    model = of_two()
    assert len(model.graph.value_info) > 10
    status, out = convert(save(model, tmp_path / "two.onnx"), *DECLARED, "--nms", "graph")
    assert status == 0
    made = onnx.load(out)
    first = [v.type.tensor_type.shape.dim for v in made.graph.value_info]
    assert not any(d and len(d) > 1 and d[0].dim_value == 2 for d in first)
    session = onnxruntime.InferenceSession(out)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), np.uint8)
    name, dtype = session.get_inputs()[0].name, session.get_inputs()[0].type
    images = images if dtype == "tensor(uint8)" else images.astype(np.float32)
    boxes = session.run(["detection_boxes"], {name: images})[0]
    for row in range(3):
        alone = session.run(["detection_boxes"], {name: images[row : row + 1]})[0]
        np.testing.assert_allclose(boxes[row : row + 1], alone, atol=1e-3)


def test_a_batch_of_2_that_holds_2_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not freed because two images run."""
    model = of_two()
    ones = numpy_helper.from_array(np.ones((2, 1, 1), np.float32), "of_each")
    model.graph.initializer.append(ones)
    model.graph.node.append(helper.make_node("Mul", ["boxes_out", "of_each"], ["boxes_of_two"]))
    model.graph.output[0].name = "boxes_of_two"
    declared = ["boxes_of_two" if word == "boxes_out" else word for word in DECLARED]
    status, out = convert(save(model, tmp_path / "two.onnx"), *declared)
    assert status == 0
    assert "the export is fixed to a batch of 2, and so is this model" in capsys.readouterr().err
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_assume_is_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = convert(save(pair(), tmp_path / "pair.onnx"), "--assume")
    assert status == 0
    errors = capsys.readouterr().err
    assert errors.count("is ASSUMED (--assume)") == 2
    origins = {f.name: f.origin for f in ModelSpec.from_onnx(onnx.load(out)).evidence}
    assert origins["normalisation"].startswith("ASSUMED") and origins["resize"].startswith(
        "ASSUMED"
    )


def test_every_family_has_every_fact(tmp_path: Path) -> None:
    from trtdet.families.evidence import FACTS

    models = {
        "v8": networks.v8(),
        "yolox": networks.yolox(),
        "pair": pair(),
        "detr": detr_data.load("detr_tiny")[0],
    }
    for name, model in models.items():
        options = IMAGES if name == "pair" else ()
        status, out = convert(save(model, tmp_path / f"{name}.onnx"), *options)
        assert status == 0
        assert {f.name for f in ModelSpec.from_onnx(onnx.load(out)).evidence} >= set(FACTS)


# ---- a family in a file


def example(name: str, folder: Path) -> Path:
    """A file that the page prints."""
    (text,) = [
        x
        for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
        if x.startswith(f"# {name}")
    ]
    path = folder / name
    path.write_text(text)
    return path


def test_a_sigmoid_detr_in_a_file(tmp_path: Path) -> None:
    source = save(detr_data.load("deformable_detr_tiny")[0], tmp_path / "m.onnx")
    family = example("sigmoid_detr.py", tmp_path)
    status, out = convert(source, "--family", str(family), "--resize_mode", "stretch")
    assert status == 0
    spec = ModelSpec.from_onnx(onnx.load(out))
    assert (spec.family, spec.preprocessing.std, spec.selection) == (
        "sigmoid_detr",
        (255.0,) * 3,
        "topk",
    )
    assert spec.nms.score_activation


def test_a_model_that_selects_by_itself_in_a_file(tmp_path: Path) -> None:
    model = networks.v8(end="topk")
    del model.metadata_props[:]
    model.graph.node[-1].output[0] = model.graph.output[0].name = "detections"
    source = save(model, tmp_path / "m.onnx")
    status, out = convert(
        source, "--family", str(example("selecting.py", tmp_path)), "--input_format", "NCHW"
    )
    assert status == 0
    converted = onnx.load(out)
    spec = ModelSpec.from_onnx(converted)
    assert (spec.selection, spec.labels[0], spec.preprocessing.placement) == (
        "topk",
        "circle",
        "top_left",
    )
    image = (
        np.random.default_rng(0)
        .integers(0, 256, (1, 3, networks.HEIGHT, networks.WIDTH))
        .astype(np.float32)
    )
    (rows,) = run_onnx(model, ["detections"], {"images": image / 255})
    names = ["detection_boxes", "detection_scores", "detection_classes"]
    boxes, scores, classes = run_onnx(
        converted, names, {"input": image.astype(spec.preprocessing.dtype)}
    )
    order = np.argsort(-rows[0, :, 4], kind="stable")
    n = len(order)
    np.testing.assert_allclose(scores[0, :n], rows[0, order, 4], atol=1e-5)
    np.testing.assert_allclose(boxes[0, :n], rows[0, order, :4], atol=1e-2)
    assert classes[0, :n].tolist() == rows[0, order, 5].astype(int).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found nothing there"),
        ("NAME = 'x'\n", "expected NAME, matches and read, missing: matches, read"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_family_file_that_is_none(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family = tmp_path / "mine.py"
    if text is not None:
        family.write_text(text)
    status, _ = convert(save(pair(), tmp_path / "m.onnx"), "--family", str(family))
    assert status == 1
    assert message in error_of(capsys)


@pytest.mark.parametrize("step", ["optimized", "quantized"])
def test_files_that_only_onnxruntime_reads(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, plain = tmp_path / "m.onnx", save(networks.v8(), tmp_path / "plain.onnx")
    if step == "quantized":
        quantize_dynamic(plain, source, weight_type=QuantType.QUInt8)
        expected = "ConvInteger, DynamicQuantizeLinear"
    else:
        model = networks.v8()
        conv = next(node for node in model.graph.node if list(node.output) == ["mean"])
        conv.op_type, conv.domain = "FusedConv", "com.microsoft"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        save(model, source)
        expected = "com.microsoft::FusedConv"
    status, _ = convert(source)
    assert status == 0
    assert f"TensorRT does not read {expected}, which ONNX Runtime's" in capsys.readouterr().err


def test_an_angle_behind_the_scores_is_no_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotated boxes of YOLO without the metadata that say so, angles within 0 and 1."""
    model = networks.v8(task="obb")
    del model.metadata_props[:]
    (angle,) = [node for node in model.graph.node if list(node.output) == ["rotated"]]
    angle.op_type = "Sigmoid"
    source = save(model, tmp_path / "m.onnx")
    assert convert(source, *IMAGES)[0] == 1
    columns = "cx,cy,w,h,scores,unused"
    said = f"--rows_output output0 --columns x1,y1,x2,y2,scores,unused|{columns} ("
    assert said in error_of(capsys)
    for options in (("--rows_output", "output0", "--columns", columns), ("--num_classes", "3")):
        status, out = convert(source, *IMAGES, *options)
        assert status == 0
        assert ModelSpec.from_onnx(onnx.load(out)).num_classes == 3


@pytest.mark.parametrize(
    ("pieces", "columns"),
    [
        ((4, 3, 1), "scores,unused"),
        ((2, 2, 3, 2), "scores,unused,unused"),
        ((4, 1, 3, 2), "objectness,scores,unused,unused"),
    ],
)
def test_columns_behind_a_box_by_how_they_were_put_together(
    pieces: tuple[int, ...], columns: str
) -> None:
    assert _behind_box(pieces) == columns


@pytest.mark.parametrize("form", [("--legacy_plugins",), ("--nms", "onnx"), ("--nms", "graph")])
def test_a_form_of_nms_where_there_is_none(
    form: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes nothing, and says so."""
    source = save(networks.v8(end="topk"), tmp_path / "m.onnx")
    status, out = convert(source)
    assert status == 0
    plain = onnx.load(out)
    status, out = convert(source, *form, "--opset", "17")
    assert status == 0
    assert (
        f"{' '.join(form)} changes nothing: this yolo model has no NMS" in capsys.readouterr().err
    )
    asked = onnx.load(out)
    assert ModelSpec.from_onnx(asked).nms == ModelSpec.from_onnx(plain).nms
    image = np.random.default_rng(3).random((1, networks.HEIGHT, networks.WIDTH, 3), np.float32)
    fed = {plain.graph.input[0].name: image * 255}
    for ours, theirs in zip(
        run_onnx(asked, list(OUTPUT_NAMES), fed),
        run_onnx(plain, list(OUTPUT_NAMES), fed),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_boxes_scores_and_labels(tmp_path: Path) -> None:
    """Selected detections in three outputs: the rows of the export, labels and all."""
    model = networks.v8(end="topk")
    del model.metadata_props[:]
    graph = model.graph
    parts = numpy_helper.from_array(np.array([4, 1, 1]), "parts")
    two = numpy_helper.from_array(np.array([2]), "two")
    graph.initializer.extend([parts, two])
    graph.node.extend([
        helper.make_node("Split", ["output0", "parts"], ["d_boxes", "d_score", "d_label"], axis=2),
        helper.make_node("Squeeze", ["d_score", "two"], ["d_scores"]),
        helper.make_node("Squeeze", ["d_label", "two"], ["d_float"]),
        helper.make_node("Cast", ["d_float"], ["d_labels"], to=7),
    ])  # fmt: skip
    del graph.output[:]
    k = networks.K
    for name, kind, shape in (
        ("d_labels", 7, [1, k]),
        ("d_boxes", 1, [1, k, 4]),
        ("d_scores", 1, [1, k]),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    source = save(model, tmp_path / "m.onnx")
    status, out = convert(
        source, *IMAGES, "--num_classes", "3", "--box_format", "xyxy", "--input_format", "NCHW"
    )
    assert status == 0
    converted = onnx.load(out)
    spec = ModelSpec.from_onnx(converted)
    assert (spec.selection, spec.num_classes, spec.nms.max_output_boxes) == ("topk", 3, k)
    image = (
        np.random.default_rng(2)
        .integers(0, 256, (1, 3, networks.HEIGHT, networks.WIDTH))
        .astype(np.float32)
    )
    boxes, scores, labels = run_onnx(
        model, ["d_boxes", "d_scores", "d_labels"], {"images": image / 255}
    )
    names = ["detection_boxes", "detection_scores", "detection_classes"]
    got = run_onnx(converted, names, {"input": image.astype(spec.preprocessing.dtype)})
    np.testing.assert_allclose(got[1][0], scores[0], atol=1e-5)
    np.testing.assert_allclose(got[0][0], boxes[0], atol=1e-2)
    assert got[2][0].tolist() == labels[0].tolist()


def test_best_class(tmp_path: Path) -> None:
    """--nms_mode best_class: a box counts for its best class alone."""
    source = save(networks.v8(), tmp_path / "v8.onnx")
    _, every = convert(source)
    _, wanted = found_by(every)
    status, out = convert(source, "--nms_mode", "best_class")
    assert status == 0
    _, scores = found_by(out)
    best = wanted == wanted.max(axis=2, keepdims=True)
    np.testing.assert_allclose(scores, np.where(best, wanted, 0), atol=1e-5)


def test_boxes_of_another_detector_beside_a_lone_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head is not read while boxes that nothing explains stand beside it."""
    model = networks.v8()
    model.graph.node.append(helper.make_node("Transpose", ["pixels"], ["other"], perm=[0, 2, 1]))
    model.graph.node.append(helper.make_node("Abs", ["other"], ["beside"]))
    model.graph.output.append(helper.make_tensor_value_info("beside", 1, [1, networks.BOXES, 4]))
    status, _ = convert(save(model, tmp_path / "m.onnx"))
    assert status == 1
    assert "nothing explains the outputs beside beside it" in error_of(capsys)


def compare(source: Path, out: Path, folder: Path) -> int:
    """compare.py on two pictures of noise and shapes."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    for number in range(2):
        picture = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(np.kron(picture, np.ones((8, 8, 1), np.uint8))).save(
            photos / f"{number}.png"
        )
    sides = ["--reference", str(source), "--candidate", str(out), "--input", str(photos)]
    return compare_stage.main([*sides, "--min_score", "0.01"])


@pytest.mark.parametrize(
    "options",
    [
        DECLARED,
        ("--boxes_output", "boxes_out", "--scores_output", "scores_out", "--preprocessor", "imagenet",
         "--channel_order", "bgr", "--resize_mode", "letterbox", "--placement", "center", "--pad_color", "20"),
    ],
)  # fmt: skip
def test_compare_reads_the_source_as_it_was_converted(
    tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What options said of the source stands in the converted file, and compare.py takes it from
    there.
    """
    source = save(pair(), tmp_path / "pair.onnx")
    status, out = convert(source, *options)
    assert status == 0
    assert compare(source, out, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "within all limits" in printed
    count = re.search(r"on (\d+) and (\d+) detections, (\d+) matched", printed)
    assert count and len(set(count.groups())) == 1 and int(count.group(1)) > 0


def test_compare_finds_a_family_file_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = tmp_path / "mine.py"
    family.write_text(
        "from trtdet.families import heads\n"
        "from trtdet.families.base import Declaration\n"
        "from trtdet.families.pixels import Normal\n"
        "NAME = 'mine'\n"
        "def matches(source):\n    return True\n"
        "def read(source, hints):\n"
        "    normal = Normal((0.0,) * 3, (255.0,) * 3)\n"
        "    framework = heads.Framework('mine', normal, resize='stretch', declared=Declaration('boxes_out', 'scores_out'))\n"
        "    return heads.read(source, hints, framework)\n"
    )
    source = save(pair(), tmp_path / "pair.onnx")
    status, out = convert(source, "--family", str(family))
    assert status == 0
    assert compare(source, out, tmp_path) == 0
    family.unlink()
    assert compare(source, out, tmp_path) == 1
    assert "found nothing there" in capsys.readouterr().err


def test_the_choices_of_the_command_line_come_back() -> None:
    declared = Declaration(rows="rows", columns=("x1", "y1", "x2", "y2", "score"), label_base=0)
    hints = Hints(
        size_hw=(64, 96), preprocessor="unit", pad_rgb=(1.0, 2.0, 3.0), antialias=False, rounding="none", longest=90, clipped=True,
        declared=declared, assume=True,
    )  # fmt: skip
    text = json.dumps(hints.to_dict())
    assert Hints.from_dict(json.loads(text), "choices") == hints
    assert NO_HINTS.to_dict() == {} and Hints.from_dict({}, "choices") == NO_HINTS
    with pytest.raises(GraphError, match="choices: resize: expected"):
        Hints.from_dict({"resize": "squash"}, "choices")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("detr_tiny", ("--deformable_attention", "plugin"), "this detr model has none that could be rewritten"),
        ("detr_tiny", ("--placement", "center"), "--placement: how images come into this detr model is known"),
        ("deformable_detr_tiny", ("--boxes_output", "pred_boxes", "--scores_output", "logits", "--family", "deformable_detr"),
         "the outputs of this deformable_detr model are known"),
        ("detr_tiny", ("--rounding", "floor"), "--rounding: how images come into this detr model is known"),
        ("v8", ("--clip_boxes",), "--clip_boxes: what this yolo model does with boxes is known"),
        ("v8", ("--num_classes", "3"), "--num_classes: how many classes this yolo model has is known"),
        ("v8", ("--rotated_nms", "exact"), "--rotated_nms: this yolo model has no rotated boxes"),
        ("v8", ("--deformable_attention", "keep"), "--deformable_attention: this yolo model has none"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(
    tmp_path: Path,
    make: str,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = networks.v8() if make == "v8" else detr_data.load(make)[0]
    status, out = convert(save(model, tmp_path / "model.onnx"), *options)
    assert status == 1 and not out.exists()
    assert message in error_of(capsys)
