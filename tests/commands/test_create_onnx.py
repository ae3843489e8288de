# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on real models: what is read, what is written, how close it is, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EXAMPLES

from trtdet.commands import create_onnx
from trtdet.conversion import convert as conversion
from trtdet.conversion import verification
from trtdet.nms import lowering, reference
from trtdet.sources.base import run_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec

TINY = EXAMPLES / "tiny_shapes"
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
#: Acceptance: heads of a converted model against TensorFlow's, on a photograph, no graph
#: optimisations.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 2e-3, 1e-4


def convert(saved_model: Path, path: Path, *options: str) -> tuple[int, onnx.ModelProto | None]:
    status = create_onnx.main(["--saved_model", str(saved_model), "--onnx", str(path), *options])
    return status, onnx.load(path) if path.exists() else None


def differences(text: str) -> list[tuple[float, float]]:
    """(max, mean) of raw boxes and logits, from what the script prints."""
    return [
        (float(a), float(b)) for a, b in re.findall(r"max abs difference (\S+), mean (\S+)", text)
    ]


@pytest.mark.parametrize(
    ("name", "size_hw", "anchors", "classes", "normalisation"),
    [
        ("tiny_shapes", (128, 128), 3069, 3, IMAGENET),
        ("tiny_batch0", (128, 128), 3069, 3, IMAGENET),
        ("tiny_batch4", (128, 128), 3069, 3, IMAGENET),
        ("tiny_rect", (128, 192), 4608, 3, IMAGENET),
        ("tiny_mean127", (128, 128), 3069, 3, ((127, 127, 127), (128, 128, 128))),
        pytest.param("d0_person", (512, 512), 49104, 90, IMAGENET, marks=pytest.mark.slow),
    ],
)
def test_shared_models_convert_and_agree_with_tensorflow(
    name: str,
    size_hw: tuple[int, int],
    anchors: int,
    classes: int,
    normalisation: tuple,
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, model = convert(shared / "models" / name, tmp_path / "m.onnx")
    assert status == 0 and model is not None
    found = differences(capsys.readouterr().out)
    assert len(found) == (
        2 if name == "tiny_batch0" else 3
    )  # its NMS is in a loop, where decoded boxes cannot be seen
    assert all(maximum < MAX_DIFFERENCE and mean < MEAN_DIFFERENCE for maximum, mean in found[:2])
    assert all(maximum < 0.05 for maximum, _ in found[2:])  # decoded boxes, pixels
    spec = ModelSpec.from_onnx(model)
    assert spec.preprocessing.size_hw == size_hw
    assert (spec.preprocessing.mean, spec.preprocessing.std) == normalisation
    assert spec.preprocessing.pad_rgb == normalisation[0]
    assert spec.category_ids == tuple(range(1, classes + 1))
    constant = {i.name: i.dims for i in model.graph.initializer}
    assert list(constant["nms/anchors"])[-2:] == [anchors, 4]


def shape(info: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]


def test_default_file_is_the_contract(tiny_onnx: Path) -> None:
    """Dynamic batch, NHWC float32 in; EfficientNMS and four outputs with complete shapes out;
    readable names; checker clean.
    """
    model = onnx.load(tiny_onnx)
    onnx.checker.check_model(model, full_check=True)
    assert [(i.name, shape(i)) for i in model.graph.input] == [("input", ["N", 128, 128, 3])]
    assert tuple(o.name for o in model.graph.output) == OUTPUT_NAMES
    assert [shape(o) for o in model.graph.output] == [
        ["N", 1],
        ["N", 100, 4],
        ["N", 100],
        ["N", 100],
    ]
    (node,) = [n for n in model.graph.node if n.op_type == "EfficientNMS_TRT"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert list(node.input) == ["raw_boxes", "class_logits", "nms/anchors"]
    assert (
        attributes["box_coding"],
        attributes["score_activation"],
        attributes["class_agnostic"],
    ) == (1, 1, 1)
    assert attributes["score_threshold"] == pytest.approx(0.001) and attributes[
        "iou_threshold"
    ] == pytest.approx(0.5)
    assert {n.op_type for n in model.graph.node} == {
        "Add", "Concat", "Conv", "EfficientNMS_TRT", "GlobalAveragePool", "MaxPool", "Mul", "Reshape", "Resize", "Sigmoid", "Sub", "Transpose",
    }  # fmt: skip
    assert not [n.name for n in model.graph.node if re.search(r"__\d+", n.name)]
    assert ModelSpec.from_onnx(model).labels == ("circle", "square", "triangle")


def test_same_model_same_file(tiny_onnx: Path, tmp_path: Path) -> None:
    status, model = convert(TINY, tmp_path / "again.onnx", "--labels", str(EXAMPLES / "labels.txt"))
    assert status == 0
    assert model == onnx.load(tiny_onnx)


@pytest.mark.parametrize(
    ("options", "input_shape", "dtype"),
    [
        (["--input_shape", "1,128,128,3"], [1, 128, 128, 3], onnx.TensorProto.FLOAT),
        (["--input_shape", "2,3,128,128"], [2, 3, 128, 128], onnx.TensorProto.FLOAT),
        (["--input_shape", "-1,3,128,128"], ["N", 3, 128, 128], onnx.TensorProto.FLOAT),
        (["--input_dtype", "uint8"], ["N", 128, 128, 3], onnx.TensorProto.UINT8),
    ],
)
def test_input_forms_give_the_same_heads(
    options: list[str], input_shape: list[int | str], dtype: int, tiny_onnx: Path, tmp_path: Path
) -> None:
    """From the converted ONNX, TensorFlow not needed."""
    path = tmp_path / "other.onnx"
    assert create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(path), *options]) == 0
    model = onnx.load(path)
    (info,) = model.graph.input
    assert shape(info) == input_shape
    assert info.type.tensor_type.elem_type == dtype
    pixels = np.random.default_rng(3).integers(0, 256, (2, 128, 128, 3), np.uint8)
    want = run_onnx(onnx.load(tiny_onnx), ["class_logits"], {"input": pixels.astype(np.float32)})[0]
    fed = pixels if input_shape[-1] == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    fed = fed[: input_shape[0]] if isinstance(input_shape[0], int) else fed
    fed = fed.astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
    (got,) = run_onnx(model, ["class_logits"], {"input": fed})
    np.testing.assert_allclose(got, want[: len(got)], atol=1e-5)


@pytest.mark.parametrize("form", ["plugin", "onnx", "graph"])
def test_forms_of_nms_give_the_same_detections(form: str, tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{form}.onnx"
    assert (
        create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(path), "--nms", form]) == 0
    )
    model = onnx.load(path)
    assert lowering.has_plugin(model) == (form == "plugin")
    image = verification.verification_image(ModelSpec.from_onnx(model).preprocessing)[None].astype(
        np.float32
    )
    boxes, logits = run_onnx(model, ["raw_boxes", "class_logits"], {"input": image})
    anchors = next(
        onnx.numpy_helper.to_array(i)
        for i in onnx.load(tiny_onnx).graph.initializer
        if i.name == "nms/anchors"
    )
    want = reference.reference(boxes, logits, ModelSpec.from_onnx(model).nms, anchors)
    got = run_onnx(
        lowering.lower(model, "onnx") if form == "plugin" else model, OUTPUT_NAMES, {"input": image}
    )
    for name, value in zip(OUTPUT_NAMES, got, strict=True):
        np.testing.assert_allclose(value, want[name], atol=1e-3, err_msg=name)


def test_no_nms(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert (
        create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(path), "--nms", "none"])
        == 0
    )
    assert [(o.name, shape(o)) for o in onnx.load(path).graph.output] == [
        ("boxes", ["N", 3069, 4]),
        ("scores", ["N", 3069, 3]),
    ]


def test_options_override_the_model(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    options = [
        "--nms_threshold",
        "0.3",
        "--iou_threshold",
        "0.6",
        "--max_detections",
        "50",
        "--nms_mode",
        "per_class",
    ]
    assert create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(path), *options]) == 0
    found = ModelSpec.from_onnx(onnx.load(path)).nms
    assert (
        found.score_threshold,
        found.iou_threshold,
        found.max_output_boxes,
        found.class_agnostic,
    ) == (0.3, 0.6, 50, False)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (
            ["--input_shape", "1,256,256,3"],
            1,
            "asks for 256x256 (height x width), the model was exported for 128x128",
        ),
        (["--labels", "two.txt"], 1, "expected 3"),
        (["--input_shape", "1,128,128"], 2, "expected N,HEIGHT,WIDTH,3 or N,3,HEIGHT,WIDTH"),
        (["--score_threshold", "1.5"], 2, "expected a number from 0 to 1, got '1.5'"),
        (["--legacy_plugins", "--nms", "none"], 2, "--legacy_plugins is a form of NMS of its own"),
        (["--opset", "9"], 2, "invalid choice"),
    ],
)
def test_contradictions_are_refused(
    options: list[str],
    status: int,
    message: str,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    arguments = ["--source_onnx", str(tiny_onnx), "--onnx", "out.onnx", *options]
    try:
        got = create_onnx.main(arguments)
    except SystemExit as error:
        got = int(error.code or 0)
    assert got == status
    assert message in capsys.readouterr().err
    assert not Path("out.onnx").exists()


def test_bad_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    for option, path, message in (
        ("--saved_model", tmp_path / "nowhere", "expected a SavedModel folder"),
        ("--source_onnx", tmp_path / "nowhere.onnx", "expected an ONNX file, found nothing"),
        ("--source_onnx", tmp_path / "broken.onnx", "expected an ONNX file, found a text file"),
    ):
        assert create_onnx.main([option, str(path), "--onnx", str(tmp_path / "out.onnx")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("fault", ["normalisation", "class logits", "raw boxes", "anchors"])
def test_a_wrong_model_never_leaves(
    fault: str,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Faults planted between reading and writing are caught, and nothing is written."""
    plain = tmp_path / "plain.onnx"  # decodes in the graph, so that its anchors can be checked too
    assert (
        create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(plain), "--nms", "onnx"])
        == 0
    )
    honest = conversion.select

    def plant(model, reading, spec, options):  # type: ignore[no-untyped-def]
        model = honest(model, reading, spec, options)
        name = {"normalisation": "preprocess/mean", "anchors": "nms/anchors"}.get(fault)
        scope = {"class logits": "class_net/class-predict", "raw boxes": "box_net/box-predict"}.get(
            fault
        )
        for tensor in model.graph.initializer:
            if tensor.name == name or (
                scope and tensor.name.startswith(scope) and tensor.name.endswith("/bias")
            ):
                wrong = onnx.numpy_helper.to_array(tensor) + np.float32(1)
                tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
        return model

    monkeypatch.setattr(conversion, "select", plant)
    path = tmp_path / "wrong.onnx"
    source = (
        ["--saved_model", str(TINY)] if fault == "anchors" else ["--source_onnx", str(tiny_onnx)]
    )
    assert create_onnx.main([*source, "--onnx", str(path)]) == 1
    assert "verification failed" in capsys.readouterr().err
    assert not path.exists()
    assert create_onnx.main([*source, "--onnx", str(path), "--no_verify"]) == 0


@pytest.fixture(scope="module")
def foreign_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole SavedModel, preprocessing and NMS too, as `python -m tf2onnx.convert` writes it."""
    pytest.importorskip("tf2onnx", reason="needs requirements-tensorflow.txt")
    path = tmp_path_factory.mktemp("foreign") / "plain.onnx"
    command = [
        sys.executable,
        "-m",
        "tf2onnx.convert",
        "--saved-model",
        str(TINY),
        "--output",
        str(path),
        "--opset",
        "17",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.mark.slow
def test_a_plain_tf2onnx_conversion_needs_no_tensorflow(
    foreign_onnx: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """The same heads and anchors as from the SavedModel, with a dynamic batch that the plain
    conversion does not have.
    """
    path = tmp_path / "m.onnx"
    assert create_onnx.main(["--source_onnx", str(foreign_onnx), "--onnx", str(path)]) == 0
    model, twin = onnx.load(path), onnx.load(tiny_onnx)
    found, expected = ModelSpec.from_onnx(model), ModelSpec.from_onnx(twin)
    assert found.preprocessing == expected.preprocessing and found.nms == expected.nms
    pixels = np.random.default_rng(5).integers(0, 256, (3, 128, 128, 3)).astype(np.float32)
    names = ["raw_boxes", "class_logits"]
    for got, want in zip(
        run_onnx(model, names, {"input": pixels}),
        run_onnx(twin, names, {"input": pixels}),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-4)
    anchors = [
        next(onnx.numpy_helper.to_array(i) for i in m.graph.initializer if i.name == "nms/anchors")
        for m in (model, twin)
    ]
    np.testing.assert_allclose(anchors[0], anchors[1], atol=1e-3)


@pytest.mark.parametrize(
    "options", [["--opset", "11"], ["--opset", "13"], ["--opset", "18"], ["--legacy_plugins"]]
)
def test_opsets_from_a_saved_model(options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    status, model = convert(TINY, tmp_path / "m.onnx", *options)
    assert status == 0 and model is not None
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    assert opset == (11 if "--legacy_plugins" in options else int(options[1]))
    legacy = [n.op_type for n in model.graph.node if n.op_type.startswith("BatchedNMS")]
    assert legacy == (["BatchedNMSDynamic_TRT"] if "--legacy_plugins" in options else [])


@pytest.mark.parametrize(
    ("options", "warns", "agnostic"),
    [
        ((), False, True),
        (("--legacy_plugins",), True, False),
        (("--legacy_plugins", "--nms_mode", "per_class"), False, False),
    ],
)
def test_legacy_plugins_say_that_they_are_per_class(
    options: tuple[str, ...],
    warns: bool,
    agnostic: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """AutoML's NMS is class-agnostic, BatchedNMS_TRT is not."""
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    status, model = convert(TINY, tmp_path / "m.onnx", *options)
    assert status == 0 and model is not None
    assert capsys.readouterr().err.count("knows no class-agnostic NMS") == warns
    spec = ModelSpec.from_onnx(model)
    assert spec.nms.class_agnostic == agnostic
    selection = next(fact for fact in spec.evidence if fact.name == "selection")
    assert ("across classes" in selection.value) == agnostic


def test_an_opset_below_the_sources_is_refused(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--source_onnx",
        str(tiny_onnx),
        "--onnx",
        str(tmp_path / "m.onnx"),
        "--opset",
        "13",
    ]
    assert create_onnx.main(arguments) == 1
    assert "has opset 17, which cannot be lowered" in capsys.readouterr().err


def test_warnings_are_settled_by_the_option_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    assert convert(TINY, tmp_path / "m.onnx")[0] == 0
    assert "gaussian soft NMS" in capsys.readouterr().err
    assert convert(TINY, tmp_path / "m.onnx", "--iou_threshold", "0.5")[0] == 0
    assert "gaussian" not in capsys.readouterr().err


def test_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create_onnx.main(["--saved_model", "nowhere", "--onnx", str(tmp_path)]) == 1
    assert "found a folder" in capsys.readouterr().err


def test_preprocessor_override_is_verified_behind_the_normalisation(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "advprop.onnx"
    assert (
        create_onnx.main(
            ["--source_onnx", str(tiny_onnx), "--onnx", str(path), "--preprocessor", "scale_range"]
        )
        == 0
    )
    assert ModelSpec.from_onnx(onnx.load(path)).preprocessing.mean == (127.5, 127.5, 127.5)
    assert all(maximum < 1e-4 for maximum, _ in differences(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rotated_nms", "exact"], "--rotated_nms: this automl model has no rotated boxes"),
        (["--deformable_attention", "keep"], "--deformable_attention: this automl model has none"),
        (["--resize_mode", "stretch"], "--resize_mode stretch: this automl model was trained with letterbox"),
        (["--input_shape", "-1,-1,-1,3"], "--input_shape asks for a dynamic size, the model takes 128x128"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(
    arguments: list[str], message: str, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    path = tmp_path / "again.onnx"
    assert create_onnx.main(["--source_onnx", str(tiny_onnx), "--onnx", str(path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_an_unknown_model_shows_its_outputs_and_where_to_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.parser.parse_model("""
      <ir_version: 8, opset_import: ["": 17]>
      other (float[1, 3, 8, 8] image) => (float[1, 3, 8, 8] heat, float[1, 3, 8, 8] sizes)
      { heat = Sigmoid(image)  sizes = Relu(image) }
    """)
    onnx.save(model, tmp_path / "other.onnx")
    paths = ["--source_onnx", str(tmp_path / "other.onnx"), "--onnx", str(tmp_path / "out.onnx")]
    for options, message in (
        (
            [],
            "none matches its outputs heat, sizes; nearest are heads: it takes boxes and scores [N, A, ...]; its inputs: image",
        ),
        (
            ["--family", "retinanet"],
            "score_1 to score_5 and box_1 to box_5 of ODTK's export, found heat, sizes",
        ),
    ):
        assert create_onnx.main([*paths, *options]) == 1
        error = capsys.readouterr().err
        assert message in error and "docs/adding_a_family.md" in error
        assert error.count("\n") == 2  # after "read"
