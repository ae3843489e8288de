# SPDX-License-Identifier: Apache-2.0
"""deploy.py triton and check: configurations for Triton, read by its own protobuf, and the
faults that must not pass.
"""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_detector
from deploy_models import D0, DETR, YOLO, make_engine, with_input

from trtdet.commands import deploy
from trtdet.deploy import text_format, triton
from trtdet.deploy.model import open_engine
from trtdet.deploy.triton_config import TritonOptions
from trtdet.nms import lowering

config_pb2 = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]"
)


def run(*arguments: object) -> int:
    return deploy.main([str(argument) for argument in arguments])


def read(repository: Path, name: str):
    from google.protobuf import text_format as google_text_format

    text = (repository / name / "config.pbtxt").read_text()
    return google_text_format.Parse(text, config_pb2.ModelConfig())


def write(repository: Path, engine: Path, *options: object) -> int:
    return run("triton", "--engine", engine, "--output", repository, "--name", "d0", *options)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batch", [(1, 1, 1), (8, 8, 8), (1, 8, 32), (4, 8, 16)])
def test_repository_of_every_kind_of_engine(tmp_path, batch, layout, dtype, precision):
    spec = with_input(D0, layout=layout, dtype=dtype)
    engine = make_engine(tmp_path / "d0.engine", spec, batch, precision=precision)
    assert write(tmp_path / "models", engine, "--ensemble") == 0

    config = read(tmp_path / "models", "d0")
    image = [512, 512, 3] if layout == "NHWC" else [3, 512, 512]
    lead = {1: [], 8: [8], 4: [-1]}[batch[0]]  # Triton batches only from 1 on
    assert config.max_batch_size == (batch[2] if batch[0] == 1 else 0)
    assert list(config.input[0].dims) == lead + image
    assert config.input[0].data_type == getattr(
        config_pb2, "TYPE_FP32" if dtype == "float32" else "TYPE_UINT8"
    )
    shapes = {output.name: list(output.dims) for output in config.output}
    assert shapes == {
        "num_detections": [*lead, 1],
        "detection_boxes": [*lead, 100, 4],
        "detection_scores": [*lead, 100],
        "detection_classes": [*lead, 100],
    }
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == ([8, 32] if batch == (1, 8, 32) else [])
    assert config.optimization.cuda.graphs
    assert (tmp_path / "models/d0/labels.txt").read_text().splitlines()[0] == "person"
    assert run("check", "--output", tmp_path / "models") == 0


@pytest.mark.parametrize("spec", [YOLO, DETR], ids=["yolo", "detr"])
def test_other_families(tmp_path, spec):
    engine = make_engine(tmp_path / "x.engine", spec)
    assert write(tmp_path / "models", engine, "--ensemble") == 0
    config = read(tmp_path / "models", "d0")
    assert list(config.input[0].dims) == [3, 384, 640]
    assert list(config.output[1].dims) == [300, 4]


def test_dynamic_input_size_and_rotated_boxes(tmp_path):
    spec = with_input(D0, size_range=((256, 256), (1024, 1024)), size_multiple=128)
    assert write(tmp_path / "free", make_engine(tmp_path / "free.engine", spec)) == 0
    assert list(read(tmp_path / "free", "d0").input[0].dims) == [-1, -1, 3]
    rotated = make_engine(tmp_path / "rotated.engine", D0.replace(selection="rotated_nms"))
    assert write(tmp_path / "rotated", rotated, "--ensemble") == 0
    assert read(tmp_path / "rotated", "d0_ensemble").output[5].name == "angles"
    assert list(read(tmp_path / "rotated", "d0").output[1].dims) == [100, 5]


def test_onnx_is_served_without_the_plugin(tmp_path, tiny_onnx):
    import onnxruntime

    arguments = ("triton", "--onnx", tiny_onnx, "--output", tmp_path, "--name", "tiny")
    assert run(*arguments, "--batch_size", 4) == 0
    config = read(tmp_path, "tiny")
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 4)
    served = onnx.load(tmp_path / "tiny/1/model.onnx")
    assert not [node for node in served.graph.node if node.op_type == "EfficientNMS_TRT"]
    session = onnxruntime.InferenceSession(
        served.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(None, {"input": np.zeros((3, 128, 128, 3), np.float32)})
    names = [output.name for output in session.get_outputs()]
    for output in config.output:  # as ONNX Runtime gives them, so says the configuration
        value = values[names.index(output.name)]
        assert list(value.shape) == [3, *output.dims]
        wanted = {"float32": config_pb2.TYPE_FP32, "int32": config_pb2.TYPE_INT32}[str(value.dtype)]
        assert output.data_type == wanted


def test_an_onnx_file_of_batch_1_has_the_batch_in_its_dims(tmp_path, tiny_onnx, capsys):
    """Triton's ONNX Runtime backend wants a dynamic first dimension wherever max_batch_size is
    above 0.
    """
    model = onnx.load(tiny_onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    static = tmp_path / "static.onnx"
    onnx.save(model, static)
    models = tmp_path / "models"
    arguments = ("--onnx", static, "--output", models, "--name", "one", "--ensemble")
    assert run("triton", *arguments) == 0
    config = read(models, "one")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [1, 128, 128, 3])
    assert {output.dims[0] for output in config.output} == {1}
    assert list(read(models, "one_ensemble").input[0].dims) == [1]
    assert run("check", "--output", models) == 0

    path = models / "one/config.pbtxt"
    text = path.read_text().replace("max_batch_size: 0", "max_batch_size: 1")
    path.write_text(text.replace("dims: [ 1, ", "dims: [ "))
    assert run("check", "--output", models) == 1
    error = capsys.readouterr().err
    assert "version 1: max_batch_size: expected 0" in error and "would not load it" in error


def test_engine_and_onnx_together(tmp_path, tiny_onnx):
    engine = make_engine(tmp_path / "d0.engine")
    assert write(tmp_path / "models", engine, "--onnx", tiny_onnx) == 0
    assert read(tmp_path / "models", "d0").platform == "tensorrt_plan"
    assert read(tmp_path / "models", "d0_onnx").platform == "onnxruntime_onnx"


@pytest.mark.parametrize(
    ("beside_engine", "options", "op"),
    [
        (True, (), "Loop"),
        (False, ("--devices", "0"), "Loop"),
        (False, (), "NonMaxSuppression"),  # the server may have no GPU
    ],
)
def test_an_onnx_file_for_a_gpu_has_the_nms_that_is_fast_there(
    beside_engine, options, op, tmp_path, tiny_onnx, monkeypatch
):
    # As of many classes; the model looks at all of its three together.
    monkeypatch.setattr(lowering, "fast_form", lambda spec, cuda: "settled" if cuda else "onnx")
    model = ("--engine", make_engine(tmp_path / "d0.engine")) if beside_engine else ()
    arguments = ("triton", *model, "--onnx", tiny_onnx, "--output", tmp_path / "m", "--name", "d0")
    assert run(*arguments, *options) == 0
    served = onnx.load(tmp_path / "m" / ("d0_onnx" if beside_engine else "d0") / "1/model.onnx")
    found = {node.op_type for node in served.graph.node}
    found |= {node.op_type for outer in served.graph.node for attribute in outer.attribute for node in attribute.g.node}  # fmt: skip
    assert found & {"Loop", "NonMaxSuppression"} == {op}


def test_versions_are_added_and_never_overwritten(tmp_path):
    models = tmp_path / "models"
    engine = make_engine(tmp_path / "first.engine")
    assert write(models, engine) == 0
    config = models / "d0/config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 3"))  # an edit is kept
    assert write(models, make_engine(tmp_path / "second.engine")) == 0
    assert (models / "d0/1/model.plan").read_bytes().endswith(b"first.engine")
    assert (models / "d0/2/model.plan").read_bytes().endswith(b"second.engine")
    assert "count: 3" in config.read_text()
    assert {path.name for path in (models / "d0").iterdir()} == {
        "config.pbtxt", "labels.txt", "1", "2",
    }  # fmt: skip


def test_another_model_under_the_same_name_is_refused(tmp_path, capsys):
    models = tmp_path / "models"
    assert write(models, make_engine(tmp_path / "a.engine")) == 0
    other = make_engine(tmp_path / "b.engine", with_input(D0, dtype="uint8"))
    assert write(models, other) == 1
    error = capsys.readouterr().err
    assert "expected 'data_type: TYPE_UINT8', found 'data_type: TYPE_FP32'" in error
    assert not (models / "d0/2").exists()

    other = make_engine(tmp_path / "c.engine", with_input(D0, pad_rgb=(0.0, 0.0, 0.0)))
    assert write(models, other) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = "'preprocessing.pad_rgb: [123.675, 116.28, 103.53]'"
    assert f"expected 'preprocessing.pad_rgb: [0.0, 0.0, 0.0]', found {found};" in line


def test_a_second_version_says_what_it_does_not_apply(tmp_path, capsys):
    models = tmp_path / "models"
    engine = make_engine(tmp_path / "a.engine")
    assert write(models, engine) == 0
    assert write(models, engine) == 0
    assert "not applied" not in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name {i}\n" for i in range(90)))
    assert write(models, engine, "--instances", 3, "--queue_delay_us", 7, "--labels", names) == 0
    error = capsys.readouterr().err
    assert "not applied: max_queue_delay_microseconds: 7, count: 3\n" in error
    assert "labels.txt is kept as it is; other class names not applied" in error
    assert (models / "d0/labels.txt").read_text().startswith("person\n")


def test_faults_of_another_model_do_not_fail_the_one_written(tmp_path, capsys):
    models = tmp_path / "models"
    (models / "theirs/1").mkdir(parents=True)
    (models / "theirs/config.pbtxt").write_text("max_batch: 32\n")
    assert write(models, make_engine(tmp_path / "a.engine")) == 0
    assert "W {}: not a model configuration".format(models / "theirs/config.pbtxt") in (
        capsys.readouterr().err
    )
    assert run("check", "--output", models) == 1


def test_what_triton_would_not_read_is_not_written(tmp_path):
    options = TritonOptions(queue_delay_us=-5)
    model = open_engine(make_engine(tmp_path / "a.engine"))
    with pytest.raises(ValueError, match="not a model configuration"):
        triton.write_repository(tmp_path / "models", "d0", [model], None, options)
    assert not (tmp_path / "models").exists()


def test_engines_for_several_gpus(tmp_path):
    engines = [
        make_engine(tmp_path / f"{capability}.engine", compute_capabilities=(capability,))
        for capability in ("8.9", "9.0")
    ]
    arguments = ("--output", tmp_path / "models", "--name", "d0")
    assert run("triton", "--engine", *engines, *arguments) == 0
    config = read(tmp_path / "models", "d0")
    assert dict(config.cc_model_filenames) == {"8.9": "model_89.plan", "9.0": "model_90.plan"}
    assert (tmp_path / "models/d0/1/model_90.plan").read_bytes().endswith(b"9.0.engine")

    (tmp_path / "models/d0/1/model_90.plan").unlink()
    assert run("check", "--output", tmp_path / "models") == 1


def test_engines_that_do_not_belong_together(tmp_path, capsys):
    engines = [
        make_engine(tmp_path / "a.engine"),
        make_engine(tmp_path / "b.engine", batch=(1, 1, 1), compute_capabilities=("9.0",)),
    ]
    arguments = ("--output", tmp_path / "models", "--name", "d0")
    assert run("triton", "--engine", *engines, *arguments) == 1
    assert "differs from a.engine in more than the GPU" in capsys.readouterr().err


def test_serve_command_names_plugins_and_version_compatibility(tmp_path, capsys):
    engine = make_engine(
        tmp_path / "x.engine", plugins=("libb.so", "liba.so"), version_compatible=True
    )
    assert write(tmp_path / "models", engine) == 0
    assert capsys.readouterr().out.strip() == (
        f"tritonserver --model-repository={tmp_path / 'models'} '--backend-config=tensorrt,plugins=liba.so;libb.so' "
        "--backend-config=tensorrt,version-compatible=true"
    )


def test_serve_command_turns_the_telemetry_of_onnx_runtime_off(tmp_path, capsys):
    engine = make_engine(tmp_path / "x.engine")
    assert write(tmp_path / "models", engine) == 0
    assert capsys.readouterr().out.startswith("tritonserver ")
    assert write(tmp_path / "both", engine, "--onnx", str(toy_detector.save(tmp_path / "a.onnx"))) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith("ORT_DISABLE_TELEMETRY=1 tritonserver ")


def test_dla_gpus_and_instances(tmp_path):
    engine = make_engine(tmp_path / "x.engine", dla_core=1)
    assert write(tmp_path / "models", engine, "--instances", 2, "--devices", "0,2") == 0
    (group,) = read(tmp_path / "models", "d0").instance_group
    assert (group.count, list(group.gpus), group.profile[0]) == (2, [0, 2], "0")
    assert group.secondary_devices[0].device_id == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"flavor": "tensorrt_rtx"},
            "Triton loads engines of TensorRT, this one is of TensorRT-RTX",
        ),
        ({"stripped": True}, "has no weights"),
    ],
)
def test_engines_that_triton_cannot_load(tmp_path, capsys, fields, message):
    assert write(tmp_path / "models", make_engine(tmp_path / "x.engine", **fields)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_file_where_a_folder_belongs(tmp_path, capsys):
    engine = make_engine(tmp_path / "x.engine")
    assert write(engine, engine) == 1
    assert run("deepstream", "--engine", engine, "--output", engine) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: --output: expected a folder, {engine} is a file; choose another name"
    assert second == f"error: --output: expected a folder, {engine} is a file; choose another name"


def test_more_than_the_engine_takes(tmp_path, capsys):
    engine = make_engine(tmp_path / "x.engine")
    assert write(tmp_path / "models", engine, "--batch_size", 64) == 1
    assert "--batch_size 64: x.engine takes batches of 1 to 32" in capsys.readouterr().err


def test_labels_of_a_file(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"a;b {i}" for i in range(90)))
    assert write(tmp_path / "models", make_engine(tmp_path / "x.engine"), "--labels", names) == 0
    labels = (tmp_path / "models/d0/labels.txt").read_text().splitlines()
    assert labels[89] == "a,b 89"  # a semicolon would split the line for nvinfer


MISTAKES = [  # what is edited, into what, what must be said
    ("dims: [ 512, 512, 3 ]", "dims: [ 3, 512, 512 ]", r"input 'input': expected dims \[512, 512, 3\], found \[3, 512, 512\]"),
    ("dims: [ 100, 4 ]", "dims: [ 200, 4 ]", r"output 'detection_boxes': expected dims \[100, 4\], found \[200, 4\]"),
    ("max_batch_size: 32", "max_batch_size: 64", r"max_batch_size: the model takes batches of 1 to 32, found 64"),
    ('TYPE_INT32\n  dims: [ 100 ]', 'TYPE_FP32\n  dims: [ 100 ]', r"output 'detection_classes': expected TYPE_INT32, found TYPE_FP32"),
    ('  label_filename: "labels.txt"\n', "", r"detection_classes: expected label_filename"),
    ('label_filename: "labels.txt"', 'label_filename: "names.txt"', r"expected the labels names.txt, found none"),
    ("[ 8, 32 ]", "[ 8, 48 ]", r"expected preferred sizes of 1 to max_batch_size 32, found 48"),
    ('name: "d0"', 'name: "d1"', r"name: expected 'd0', as the folder, found 'd1'"),
    ('"detection_scores"', '"scores"', r"output 'detection_scores': expected, found none of that name"),
    ("kind: KIND_GPU", "kind: KIND_CPU", r"expected KIND_GPU, found KIND_CPU"),
    ("max_batch_size: 32", "max_batch: 32", r'no field named "max_batch"'),
    ("TYPE_INT32", "INT32", r"not a model configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_planted_mistakes(tmp_path, capsys, old, new, message):
    models = tmp_path / "models"
    assert write(models, make_engine(tmp_path / "d0.engine")) == 0
    config = models / "d0/config.pbtxt"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    capsys.readouterr()
    assert run("check", "--output", models) == 1
    assert re.search(message, capsys.readouterr().err)


def test_planted_mistakes_in_files(tmp_path, capsys):
    models = tmp_path / "models"
    assert write(models, make_engine(tmp_path / "d0.engine")) == 0
    labels = models / "d0/labels.txt"
    labels.write_text("person\n")
    assert run("check", "--output", models) == 1
    assert "labels.txt: expected 90 lines, one per class, found 1" in capsys.readouterr().err
    (models / "d0/1/model.plan").unlink()
    assert run("check", "--output", models) == 1
    assert "expected 1/model.plan, found none" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [(8, 8, 8), (4, 8, 16)])
def test_a_batch_that_triton_may_not_choose(tmp_path, capsys, batch):
    models = tmp_path / "models"
    assert write(models, make_engine(tmp_path / "d0.engine", batch=batch)) == 0
    config = models / "d0/config.pbtxt"
    lead = f"[ {8 if batch[0] == 8 else -1}, "
    text = config.read_text().replace(lead, "[ ").replace("max_batch_size: 0", "max_batch_size: 8")
    config.write_text(text)
    assert run("check", "--output", models) == 1
    assert "max_batch_size: expected 0, with the batch in the dims" in capsys.readouterr().err


ENSEMBLE_MISTAKES = [
    ('model_name: "d0_preprocess"', 'model_name: "d0_pre"', "step 'd0_pre': expected that model in the repository, found none"),
    ('key: "input"\n      value: "input"', 'key: "inputs"\n      value: "input"', "expected an output of that name, made once"),
    ("TYPE_STRING", "TYPE_UINT8", "step 'd0_preprocess': 'image' and its input 'image' differ in type or dims"),
    ("max_batch_size: 32", "max_batch_size: 64", "max_batch_size: 'd0' has 32, the ensemble 64"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), ENSEMBLE_MISTAKES)
def test_planted_mistakes_in_an_ensemble(tmp_path, capsys, old, new, message):
    models = tmp_path / "models"
    assert write(models, make_engine(tmp_path / "d0.engine"), "--ensemble") == 0
    config = models / "d0_ensemble/config.pbtxt"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert run("check", "--output", models) == 1
    assert message in capsys.readouterr().err


def test_a_folder_to_check_that_is_missing(tmp_path, capsys):
    missing = tmp_path / "none"
    assert run("check", "--output", missing) == 1
    assert capsys.readouterr().err == f"error: --output: expected the folder that deploy.py wrote, found nothing at {missing}\n"  # fmt: skip
    missing.write_text("a file")
    assert run("check", "--output", missing) == 1
    assert f"wrote, found a file at {missing}\n" in capsys.readouterr().err


def test_without_tritonclient_it_says_what_was_not_checked(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    assert write(tmp_path / "models", make_engine(tmp_path / "d0.engine")) == 0
    assert "config.pbtxt not validated" in capsys.readouterr().err
    assert run("check", "--output", tmp_path / "models") == 1
    captured = capsys.readouterr()
    assert "not checked" in captured.err and "requirements-triton.txt" in captured.err
    assert captured.out == ""


def test_text_format_escapes_what_it_writes():
    from google.protobuf import text_format as google_text_format

    message = {"name": 'a "b" \\ \n c\tü', "max_batch_size": 3, "parameters": []}
    parsed = google_text_format.Parse(text_format.dumps(message), config_pb2.ModelConfig())
    assert (parsed.name, parsed.max_batch_size) == (message["name"], 3)


def test_next_version_looks_at_numbers_only(tmp_path):
    for name in ("3", "10", "old", "01"):
        (tmp_path / name).mkdir()
    assert triton.next_version(tmp_path) == 11


def test_an_engine_without_its_sidecar(tmp_path, capsys):
    engine = make_engine(tmp_path / "x.engine")
    (tmp_path / "x.engine.json").unlink()
    engine.write_bytes(bytes(600))  # no text, as an engine is none
    assert write(tmp_path / "models", engine) == 1
    assert "expected x.engine.json beside it, found none" in capsys.readouterr().err
    assert open_engine(make_engine(engine)).batches == "1 to 32"


@pytest.mark.parametrize(
    "arguments",
    [
        ("triton", "--output", "r", "--name", "n"),
        ("triton", "--onnx", "x", "--output", "r", "--name", "../n"),
        ("trtexec", "--engine", "x", "--tensorrt_version", "10", "--run"),
        ("trtexec", "--engine", "x", "--precision", "fp16"),
        ("trtexec", "--engine", "x", "--output", "y"),
        ("trtexec", "--engine", "x", "--devices", "-1"),
        ("trtexec", "--parse_times", "x"),
        ("trtexec", "--parse_log", "x", "--run"),
        ("triton", "--engine", "x", "--output", "r", "--name", "n", "--queue_delay_us", "-5"),
        ("triton", "--engine", "x", "--output", "r", "--name", "n", "--devices", "0,-1"),
        ("deepstream", "--engine", "x", "--output", "o", "--devices", "-1"),
        ("deepstream", "--engine", "x", "--output", "o", "--stream_width", "0"),
        ("deepstream", "--engine", "x", "--output", "o", "--class_threshold", "0:0.5"),
        (),
    ],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", 'automl\nbackend: "python"\n#'),
        ("precision", "fp16\nx: 1"),
        ("version", "10.13\nx: 1"),
        ("flavor", "tensorrt\r#"),
        ("labels", ["a\tb\n"] * 90),
    ],
)
def test_text_of_a_sidecar_that_would_end_a_line_is_refused(tmp_path, field, value, capsys):
    engine = make_engine(tmp_path / "d0.engine")
    sidecar = tmp_path / "d0.engine.json"
    data = json.loads(sidecar.read_text())
    (data["model_spec"] if field in ("family", "labels") else data)[field] = value
    sidecar.write_text(json.dumps(data))
    assert write(tmp_path / "models", engine) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(sidecar) in line and field in line
    assert not (tmp_path / "models").exists()


def test_a_file_name_stays_in_its_comment(tmp_path):
    engine = make_engine(tmp_path / 'd0\nbackend: "python"\n#.engine')
    assert write(tmp_path / "models", engine) == 0
    assert read(tmp_path / "models", "d0").backend == ""
