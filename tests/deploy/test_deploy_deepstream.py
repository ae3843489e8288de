# SPDX-License-Identifier: Apache-2.0
"""deploy.py deepstream and check: what nvinfer, nvinferserver and deepstream-app would be told,
and planted mistakes.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from conftest import EXAMPLES, ROOT
from deploy_models import D0, DETR, YOLO, make_engine, with_input

from trtdet.commands import build_engine, deploy
from trtdet.deploy.deepstream_check import read_groups
from trtdet.deploy.model import label_lines
from trtdet.spec import ModelSpec


def run(*arguments: object) -> int:
    return deploy.main([str(argument) for argument in arguments])


def write(folder: Path, spec=D0, batch=(1, 8, 32), *options: object, **fields) -> int:
    engine = make_engine(folder / "x.engine", spec, batch, **fields)
    return run("deepstream", "--engine", engine, "--output", folder / "ds", *options)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batch", [(1, 1, 1), (8, 8, 8), (1, 8, 32)])
def test_folder_of_every_kind_of_engine(tmp_path, batch, layout, dtype, precision):
    spec = with_input(D0, layout=layout, dtype=dtype)
    status = write(tmp_path, spec, batch, precision=precision)
    if dtype == "uint8" and batch == (8, 8, 8):
        assert status == 1  # neither nvinfer nor nvinferserver could feed it
        return
    assert status == 0
    folder = tmp_path / "ds"
    files = {path.name for path in folder.iterdir()} - {"parser", "triton", "deepstream_app.txt"}
    for_nvinfer = {"config_infer.txt", "config_infer.yml"} if dtype == "float32" else set()
    for_server = {"config_inferserver.txt"} if batch[0] == 1 else set()
    assert files == for_nvinfer | for_server
    if find_spec("tritonclient"):  # without it a check is an error, see test_deploy_triton
        assert run("check", "--output", folder) == 0
    if not for_nvinfer:
        return
    properties = read_groups(folder / "config_infer.txt")["property"]
    assert properties["infer-dims"] == "3;512;512"
    assert properties["network-input-order"] == ("1" if layout == "NHWC" else "0")
    assert properties["batch-size"] == str(batch[1])
    assert properties["network-mode"] == {"fp32": "0", "int8": "1", "fp16": "2"}[precision]
    assert (folder / properties["model-engine-file"]).read_bytes().startswith(b"stands for")
    assert read_groups(folder / "config_infer.yml") == read_groups(folder / "config_infer.txt")


def test_yaml_is_yaml(tmp_path):
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    assert write(tmp_path) == 0
    found = yaml.safe_load((tmp_path / "ds/config_infer.yml").read_text())
    expected = read_groups(tmp_path / "ds/config_infer.txt")
    assert {
        name: {k: str(v) for k, v in group.items()} for name, group in found.items()
    } == expected


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        (D0, ("1", "0", "NvDsInferParseCustomTrtdet")),
        (YOLO, ("1", "1", "NvDsInferParseCustomTrtdetXyxy")),
        (DETR, ("0", "0", "NvDsInferParseCustomTrtdetXyxyNormalized")),
    ],
    ids=["automl", "yolo", "detr"],
)
def test_keys_follow_the_model(tmp_path, spec, keys):
    assert write(tmp_path, spec, (1, 4, 8), "--class_threshold", "3=0.6", "7=0.7") == 0
    groups = read_groups(tmp_path / "ds/config_infer.txt")
    names = ("maintain-aspect-ratio", "symmetric-padding", "parse-bbox-func-name")
    assert tuple(groups["property"][name] for name in names) == keys
    assert groups["class-attrs-7"] == {"pre-cluster-threshold": "0.7"}
    assert groups["property"]["num-detected-classes"] == str(spec.num_classes)
    labels = (tmp_path / "ds" / groups["property"]["labelfile-path"]).read_text().splitlines()
    assert tuple(labels) == spec.labels


def test_labels_without_names_have_no_empty_line(tmp_path):
    assert write(tmp_path, D0.replace(labels=())) == 0
    labels = (tmp_path / "ds/triton/detector/labels.txt").read_text()
    assert labels.splitlines()[:2] == ["person", "bicycle"]  # COCO's, as infer.py draws them
    assert list(label_lines(D0.replace(labels=())))[:2] == ["class 0", "class 1"]


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (("--batch_size", 64), {}, "--batch_size 64: the engine takes batches of 1 to 32"),
        (("--class_threshold", "90=0.5"), {}, r"expected class ids of 0 to 89, found \[90\]"),
        ((), {"flavor": "tensorrt_rtx"}, "DeepStream loads engines of TensorRT, this one is of TensorRT-RTX"),
    ],
)  # fmt: skip
def test_refused(tmp_path, capsys, options, fields, message):
    assert write(tmp_path, D0, (1, 8, 32), *options, **fields) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_pictures_smaller_than_the_input_are_refused(dtype, tmp_path, capsys):
    """YOLO-NAS: nvinferserver, which alone takes uint8, would fill the input too. A letterbox of
    the whole input is not refused.
    """
    assert write(tmp_path / "a", with_input(YOLO, dtype=dtype)) == 0
    capsys.readouterr()
    assert write(tmp_path / "b", with_input(YOLO, dtype=dtype, longest=636)) == 1
    assert (
        "DeepStream makes pictures as large as the network input; this model takes them 636 pixels long in an input of 384x640; "
        "export it for 636 pixels, or serve it with Triton" in capsys.readouterr().err
    )
    assert not (tmp_path / "b/ds").exists()


def test_an_edited_folder_is_not_overwritten(tmp_path, capsys):
    assert write(tmp_path) == 0
    assert write(tmp_path) == 1
    assert "has a DeepStream configuration already" in capsys.readouterr().err


def test_padding_in_another_colour_is_said(tmp_path, capsys):
    assert write(tmp_path) == 0
    assert (
        "nvinfer pads with black, this model was trained on padding of (123.7, 116.3, 103.5)"
        in (capsys.readouterr().err)
    )


def test_warped_images_are_said(tmp_path, capsys):
    said = "nvinfer places pictures at whole pixels of the network input, this model's are warped"
    assert write(tmp_path / "a") == 0
    assert said not in capsys.readouterr().err
    warped = dataclasses.replace(D0.preprocessing, placement="center", rounding="none")
    assert write(tmp_path / "b", D0.replace(preprocessing=warped)) == 0
    assert said in capsys.readouterr().err
    assert "symmetric-padding=1" in next((tmp_path / "b").rglob("config_infer*.txt")).read_text()


def test_cubic_interpolation_is_said(tmp_path, capsys):
    said = "nvinfer resizes pictures bilinearly, this model's are interpolated cubically"
    assert write(tmp_path / "a") == 0
    assert said not in capsys.readouterr().err
    cubic = dataclasses.replace(D0.preprocessing, sampling="cubic")
    assert write(tmp_path / "b", D0.replace(preprocessing=cubic)) == 0
    assert said in capsys.readouterr().err


def test_padding_that_was_made_good_is_not(tmp_path, capsys):
    assert write(tmp_path, D0.replace(source={"pad_color": "black"})) == 0
    assert "nvinfer pads with black" not in capsys.readouterr().err


def test_an_engine_that_is_refused_has_no_advice_on_padding(tmp_path, capsys):
    assert write(tmp_path, flavor="tensorrt_rtx") == 1
    error = capsys.readouterr().err
    assert "build_engine.py --flavor tensorrt\n" in error and "pads with black" not in error


def test_check_without_tritonclient_reports_what_it_finds(tmp_path, monkeypatch, capsys):
    assert write(tmp_path) == 0
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    assert run("check", "--output", tmp_path / "ds") == 1
    assert "requirements-triton.txt" in capsys.readouterr().err
    path = tmp_path / "ds/config_infer.txt"
    path.write_text(path.read_text().replace("cluster-mode=4", "cluster-mode=2"))
    assert run("check", "--output", tmp_path / "ds") == 1
    assert "cluster-mode: expected 4" in capsys.readouterr().err


MISTAKES = [  # file, what is edited, into what, what must be said
    ("config_infer.txt", "infer-dims=3;512;512", "infer-dims=512;512;3", "infer-dims: expected 3;512;512"),
    ("config_infer.txt", "network-input-order=1", "network-input-order=0", "network-input-order: expected 1"),
    ("config_infer.txt", "batch-size=8", "batch-size=64", "batch-size: the engine takes batches of 1 to 32, found 64"),
    ("config_infer.txt", "offsets=0;0;0", "offsets=123.7;116.3;103.5", "offsets: expected 0;0;0"),
    ("config_infer.txt", "cluster-mode=4", "cluster-mode=2", "cluster-mode: expected 4"),
    ("config_infer.txt", "cluster-mode=4", "cluster-mode=7", r"cluster-mode: expected one of \[0, 1, 2, 3, 4\], found 7"),
    ("config_infer.txt", "net-scale-factor=1.0", "net-scale-factor=one", "net-scale-factor: expected float, found 'one'"),
    ("config_infer.txt", "gpu-id=0", "gpu=0", "gpu: unknown to nvinfer 9.1"),
    ("config_infer.txt", "num-detected-classes=90", "num-detected-classes=80", "num-detected-classes: expected 90"),
    ("config_infer.txt", "CustomTrtdet", "CustomEfficientDetTAO", "parse-bbox-func-name: expected NvDsInferParseCustomTrtdet"),
    ("config_infer.txt", "labelfile-path=triton/detector/labels.txt\n", "", "labelfile-path: expected, found none"),
    ("config_infer.txt", "[class-attrs-all]", "[class-attrs-90]", "class-attrs-90.*below num-detected-classes 90"),
    ("config_infer.txt", "[property]", "[properties]", "expected a group 'property', found none"),
    ("config_infer.txt", "parser/lib", "lib/lib", "the parser's library: expected parser/libnvdsinfer_trtdet.so"),
    ("config_infer.yml", "  gpu-id: 0", "  enable-dbscan: 0", "enable-dbscan: unknown to nvinfer 9.1"),
    ("config_infer.yml", "  gpu-id: 0", "gpu-id: 0", "expected 'group:' or"),
    ("config_inferserver.txt", "TENSOR_ORDER_NHWC", "TENSOR_ORDER_LINEAR", "tensor_order: expected 2 for the engine, found 1"),
    ("config_inferserver.txt", "[ 0.0, 0.0, 0.0 ]", "[ 103.9, 116.8, 123.7 ]", "channel_offsets: expected False"),
    ("config_inferserver.txt", "max_batch_size: 8", "max_batch_size: 64", "max_batch_size: the engine takes batches of 1 to 32, found 64"),
    ("config_inferserver.txt", "unique_id", "uniqe_id", 'no field named "uniqe_id"'),
    ("config_inferserver.txt", "max_batch_size: 8", 'max_batch_size: "8"', "not a configuration of nvinferserver 9.1"),
    ("config_inferserver.txt", 'root: "triton"', 'root: "models"', "expected detector/1/model.plan below"),
    ("deepstream_app.txt", "config-file=", "config=", "config: unknown to deepstream-app"),
    ("triton/detector/labels.txt", "bicycle", "", "line 2 is empty; nvinfer skips it"),
    ("triton/detector/labels.txt", "bicycle\n", "", "labels.txt: expected 90 lines, one per class, found 89"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "message"), MISTAKES)
def test_planted_mistakes(tmp_path, capsys, file, old, new, message):
    assert write(tmp_path) == 0
    path = tmp_path / "ds" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    capsys.readouterr()
    assert run("check", "--output", tmp_path / "ds") == 1
    assert re.search(message, capsys.readouterr().err)


def test_an_engine_that_is_not_the_one(tmp_path, capsys):
    assert write(tmp_path) == 0
    (tmp_path / "ds/triton/detector/1/model.plan").write_bytes(b"another")
    assert run("check", "--output", tmp_path / "ds") == 1
    assert "was written for another engine than model.plan is now" in capsys.readouterr().err


def test_the_parser_is_made(tmp_path):
    if not (shutil.which("make") and shutil.which("g++")):
        pytest.skip("needs make and g++")
    assert write(tmp_path) == 0
    includes = tmp_path / "deepstream/sources"  # as DeepStream is laid out
    includes.mkdir(parents=True)
    shutil.copytree(ROOT / "tests/nvdsinfer_headers", includes / "includes")
    make = ["make", "-C", tmp_path / "ds/parser", f"DEEPSTREAM={tmp_path / 'deepstream'}"]
    subprocess.run([*map(str, make), "CXXFLAGS=-O0 -Wall -Wextra -Werror"], check=True)
    assert (tmp_path / "ds/parser/libnvdsinfer_trtdet.so").stat().st_size > 0


# ---- of an ONNX file


def typed(tiny: Path, folder: Path, precision: str) -> Path:
    if precision == "fp32":
        return tiny
    path = folder / "typed.onnx"
    options = ["--model", tiny, "--precision", precision, "--save_onnx", path]
    options += (
        ["--calib_input", EXAMPLES / "images", "--int8_share", "1"] if precision == "int8" else []
    )
    assert build_engine.main([str(o) for o in options]) == 0
    return path


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "0"), ("fp16", "2"), ("int8", "1")])
def test_an_onnx_file_in_its_precision(precision, mode, tiny_onnx, tmp_path, capsys):
    model = typed(tiny_onnx, tmp_path, precision)
    capsys.readouterr()
    assert (
        run(
            "deepstream",
            "--model",
            model,
            "--output",
            tmp_path / "ds",
            "--name",
            "shapes",
            "--batch_size",
            4,
        )
        == 0
    )
    assert ("is in float32, and so will be the engine" in capsys.readouterr().err) == (
        precision == "fp32"
    )
    folder = tmp_path / "ds"
    assert {p.name for p in folder.iterdir()} == {
        "config_infer.txt",
        "config_infer.yml",
        "deepstream_app.txt",
        "parser",
        "model",
    }
    properties = read_groups(folder / "config_infer.txt")["property"]
    assert (folder / properties["onnx-file"]).read_bytes() == model.read_bytes()
    assert properties["onnx-file"] == "model/shapes.onnx"
    assert properties["model-engine-file"] == f"model/shapes.onnx_b4_gpu0_{precision}.engine"
    assert (properties["network-mode"], properties.get("strongly-typed")) == (
        mode,
        None if precision == "fp32" else "1",
    )
    assert (folder / properties["labelfile-path"]).read_text().split() == [
        "circle",
        "square",
        "triangle",
    ]
    assert run("check", "--output", folder) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("network-mode=2", "network-mode=0", "network-mode: expected 2 for shapes.onnx, found 0"),
        (
            "strongly-typed=1",
            "strongly-typed=0",
            "strongly-typed: expected 1 for shapes.onnx, found 0",
        ),
        (
            "onnx-file=model/shapes.onnx",
            "onnx-file=model/other.onnx",
            "onnx-file: expected a file, found nothing at model/other.onnx",
        ),
        ("infer-dims=3;128;128", "infer-dims=3;64;64", "infer-dims: expected 3;128;128"),
    ],
)
def test_mistakes_about_an_onnx_file_are_found(old, new, message, tiny_onnx, tmp_path, capsys):
    model = typed(tiny_onnx, tmp_path, "fp16")
    assert run("deepstream", "--model", model, "--output", tmp_path / "ds", "--name", "shapes") == 0
    path = tmp_path / "ds/config_infer.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    capsys.readouterr()
    assert run("check", "--output", tmp_path / "ds") == 1
    assert message in capsys.readouterr().err


def test_onnx_files_that_nvinfer_cannot_build(tiny_onnx, tmp_path, capsys):
    model = onnx.load(tiny_onnx)
    spec = ModelSpec.from_onnx(model)
    with_input(spec, dtype="uint8").attach(model)
    onnx.save(model, tmp_path / "bytes.onnx")
    assert run("deepstream", "--model", tmp_path / "bytes.onnx", "--output", tmp_path / "ds") == 1
    assert "nvinfer feeds float32 and this file takes uint8" in capsys.readouterr().err
    assert (
        run(
            "deepstream", "--model", typed(tiny_onnx, tmp_path, "bf16"), "--output", tmp_path / "ds"
        )
        == 1
    )
    assert "is in BF16, which nvinfer does not build" in capsys.readouterr().err


def test_weights_in_a_file_of_their_own_are_copied(tiny_onnx, tmp_path):
    (tmp_path / "in").mkdir()
    onnx.save(
        onnx.load(tiny_onnx),
        tmp_path / "in/m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    assert (
        run(
            "deepstream",
            "--model",
            tmp_path / "in/m.onnx",
            "--output",
            tmp_path / "ds",
            "--name",
            "shapes",
        )
        == 0
    )
    assert (tmp_path / "ds/model/w.bin").read_bytes() == (tmp_path / "in/w.bin").read_bytes()
    onnx.load(tmp_path / "ds/model/shapes.onnx")
