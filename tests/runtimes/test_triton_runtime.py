# SPDX-License-Identifier: Apache-2.0
"""A model on a server, `--model URL`, against the protocol-true stand-in, and against a real Triton
where TRTDET_TRITON_VENV names a virtual environment.

That environment needs nvidia-pytriton, whose wheel has the server, onnxruntime, and numpy<2 (the
server's Python backend wants it).
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="needs requirements-triton.txt")
pytest.importorskip("grpc", reason="needs requirements-triton.txt")
pytest.importorskip("aiohttp", reason="needs requirements-triton.txt")

import protocol_triton_server
import standin_detector
from google.protobuf import text_format
from protocol_triton_server import Refusal, Server, serve_grpc, serve_http
from standin_onnxruntime_backend import serve_in_python

from trtdet.commands import deploy, eval_coco, infer
from trtdet.deploy import text_format as pbtxt
from trtdet.deploy.model import Deployable
from trtdet.deploy.triton_config import TritonOptions, model_config
from trtdet.detections import decode
from trtdet.errors import EngineError, GraphError
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.runtimes import triton
from trtdet.runtimes.open import open_runtime
from trtdet.runtimes.options import TritonUrl, parse_url
from trtdet.runtimes.triton import TritonRuntime
from trtdet.spec import METADATA_KEY, ModelSpec, Nms, Preprocessing

grpc = protocol_triton_server.grpc
ModelConfig = protocol_triton_server.model_config_pb2.ModelConfig
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SPEC = ModelSpec("toy", Preprocessing((6, 8)), Nms(max_output_boxes=20), category_ids=tuple(range(90)), boxes_normalized=True)  # fmt: skip
Sent = namedtuple("Sent", "images paths")


def make_server(spec: ModelSpec = SPEC, *, smallest: int = 1, largest: int = 4) -> Server:
    """The stand-in detector, every number of which depends on every byte, with the configuration
    that deploy.py writes for it.
    """
    model = Deployable(Path("toy.engine"), spec, "input", smallest, largest, largest)
    config = model_config("toy", "tensorrt_plan", model, TritonOptions())
    slots = spec.nms.max_output_boxes
    return Server(
        text_format.Parse(pbtxt.dumps(config), ModelConfig()),
        lambda images: standin_detector.detect(images, slots),
    )


def random_batches(count: int, size: int, spec: ModelSpec = SPEC) -> list[Sent]:
    random = np.random.default_rng(3)
    shape = (size, *spec.preprocessing.image_shape)
    images = [random.integers(0, 256, shape).astype(spec.preprocessing.dtype) for _ in range(count)]
    return [Sent(array, [Path(f"{i}.jpg")]) for i, array in enumerate(images)]


def check_same(outputs, images, slots=20):
    expected = standin_detector.detect(images, slots)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value)
        assert outputs[name].dtype == value.dtype and outputs[name].flags.writeable


@pytest.fixture(params=["grpc", "http"])
def serve(request):
    """A function: serves a `Server` until the test ends, and returns the model's URL."""
    with ExitStack() as stack:

        def start(server: Server) -> TritonUrl:
            serving = serve_grpc if request.param == "grpc" else serve_http
            address = stack.enter_context(serving(server))
            return parse_url(f"{request.param}://{address}/toy")

        yield start


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(triton, "RETRY_PAUSES_S", (0.02, 0.02))


# ---- the URL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grpc://h/m", TritonUrl("grpc", "h:8001", "m")),
        ("http://h/m", TritonUrl("http", "h:8000", "m")),
        ("https://h/m", TritonUrl("https", "h:443", "m")),
        ("grpcs://h:9/m/2", TritonUrl("grpcs", "h:9", "m", "2")),
        ("grpc://[::1]:7/m/", TritonUrl("grpc", "[::1]:7", "m")),
    ],
)
def test_a_url_names_server_model_and_version(text, expected):
    assert parse_url(text) == expected
    assert parse_url(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["h:8001/m", "ftp://h/m", "grpc://h:8001", "grpc://h/m/1/2", "grpc://h/m/one", "grpc://h:x/m", "grpc://:8001/m", "http://u:p@h/m", "http://h/m?x=1"],
)  # fmt: skip
def test_other_urls_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_url(text)


def test_one_model_has_one_name(capsys):
    with pytest.raises(SystemExit) as exit_status:
        infer.parse_args(["--engine", "m.onnx", "--model", "grpc://h/m", "--benchmark"])
    assert exit_status.value.code == 2
    assert "--engine and --model are names of one option; leave one out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "grpc://h/m", "--threads", "1"], "--threads: is for ONNX files (.onnx), grpc://h:8001/m is taken for a server"),
        (["--model", "grpc://h/m", "--devices", "0"], "--devices: is for engines"),
        (["--engine", "m.onnx", "--requests", "2"], "--requests: is for models on a server, m.onnx is taken for an ONNX file"),
        (["--engine", "m", "--no_shared_memory"], "--no_shared_memory: is for models on a server"),
        (["--model", "grpc://h/m", "--timeout", "0"], "--timeout: expected a number above 0"),
    ],
)  # fmt: skip
def test_options_of_other_runtimes_are_wrong_usage(options, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        infer.parse_args([*options, "--benchmark"])
    assert exit_status.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# ---- numbers


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "sent"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_byte_arrives_and_order_is_kept(serve, dtype, shared):
    spec = SPEC.replace(preprocessing=Preprocessing((6, 8), layout="NCHW", dtype=dtype))
    server = make_server(spec)
    server.faults.extend([0.08, 0.0, 0.04, 0.0])  # the first answers come last
    batches = [*random_batches(9, 4, spec), *random_batches(1, 3, spec)]
    with open_runtime(serve(server), requests=3, shared_memory=shared) as runtime:
        assert runtime.spec == spec and runtime.batch_range == (1, 4) and runtime.preferred_batch == 4  # fmt: skip
        assert ("in shared memory" in runtime.description) is shared
        own = []
        for batch in batches:
            images = runtime.allocate((4, *batch.images.shape[1:]), dtype)[: len(batch.images)]
            images[:] = batch.images
            own.append(Sent(images, batch.paths))
        results = list(runtime.map(own))
    assert [batch.paths for batch, _ in results] == [batch.paths for batch in batches]
    for batch, (_, outputs) in zip(batches, results, strict=True):
        check_same(outputs, batch.images)
    assert (server.shared, server.sent) == ((10, 0) if shared else (0, 10))
    assert 2 <= server.most_at_once <= 3
    assert not server.regions and not list(Path("/dev/shm").glob("trtdet-*"))


def test_a_slice_of_shared_memory_is_sent_from_where_it_is(serve):
    server = make_server()
    with TritonRuntime(serve(server)) as runtime:
        memory = runtime.allocate((4, 6, 8, 3), np.float32)
        memory[:] = np.arange(memory.size, dtype=np.float32).reshape(memory.shape)
        check_same(runtime.infer(memory[1:3]), memory[1:3])
        other = memory.copy()  # not shared
        check_same(runtime.infer(other), other)
    assert (server.shared, server.sent) == (1, 1)


@pytest.mark.parametrize(("smallest", "expected"), [(4, (4, 4)), (2, (1, None)), (1, (1, 4))])
def test_batch_sizes_are_those_of_the_configuration(serve, smallest, expected):
    with TritonRuntime(serve(make_server(smallest=smallest))) as runtime:
        assert runtime.batch_range == expected
        batch = random_batches(1, 4)[0].images
        check_same(runtime.infer(batch), batch)
        if expected[1] is not None:
            with pytest.raises(ValueError, match="expected a batch of"):
                runtime.infer(random_batches(1, 5)[0].images)


def test_benchmark_takes_latency_alone_and_throughput_together(serve, capsys, tmp_path):
    server = make_server()
    url = serve(server)
    assert (
        infer.main(
            [
                "--model",
                str(url),
                "--benchmark",
                "5",
                "--batch_size",
                "2",
                "--json",
                str(tmp_path / "b.json"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "b.json").read_text())["schema"] == 1
    out = capsys.readouterr().out
    assert "Throughput: " in out and "Latency: min = " in out
    assert server.shared == 20 + 5 + 20 + 5 + 20  # alone, then back to back


# ---- faults


def test_no_server_is_one_line(serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for scheme in ("grpc", "http"):
            url = parse_url(f"{scheme}://127.0.0.1:{free.getsockname()[1]}/toy")
            with pytest.raises(EngineError, match=r"--model: no Triton server answers at .*; start it"):  # fmt: skip
                TritonRuntime(url)


def test_an_unknown_model_names_those_that_are_there(serve):
    url = serve(make_server())
    for model in (f"{url.scheme}://{url.address}/other", f"{url}/7"):
        with pytest.raises(EngineError, match=r"expected a model '(other|toy/7)' that is ready.*found toy;"):  # fmt: skip
            TritonRuntime(parse_url(model))


def test_a_configuration_without_a_spec_wants_one(serve, tmp_path):
    server = make_server()
    del server.config.parameters[METADATA_KEY]
    url = serve(server)
    with pytest.raises(GraphError, match=r"expected the parameter 'trtdet.model_spec'.*--spec"):
        TritonRuntime(url)
    sidecar = tmp_path / "toy.engine.json"
    info = {"schema": 1, "flavor": "tensorrt", "version": "10.13", "precision": "fp16", "batch": {"min": 1, "opt": 4, "max": 4}}  # fmt: skip
    sidecar.write_text(json.dumps({**info, "model_spec": SPEC.to_dict()}))
    with TritonRuntime(url, spec=sidecar) as runtime:
        assert runtime.spec == SPEC
    sidecar.write_text("{")
    with pytest.raises(
        EngineError, match=r"toy.engine.json: expected JSON.*build the engine again"
    ):
        TritonRuntime(url, spec=sidecar)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC.replace(preprocessing=Preprocessing((6, 9))), r"'input': its ModelSpec says \(6, 9, 3\) float32 an image, the server \(6, 8, 3\) TYPE_FP32"),
        (SPEC.replace(preprocessing=Preprocessing((6, 8), dtype="uint8")), r"'input': .* uint8 an image"),
        (SPEC.replace(nms=Nms(max_output_boxes=100)), r"'detection_boxes': its ModelSpec says \(100, 4\)"),
        (SPEC.replace(selection="rotated_nms"), r"'detection_boxes': its ModelSpec says \(20, 5\)"),
    ],
)  # fmt: skip
def test_a_model_of_other_shapes_is_refused(serve, spec, message):
    server = make_server()
    server.config.parameters[METADATA_KEY].string_value = json.dumps(spec.to_dict())
    with pytest.raises(GraphError, match=message):
        TritonRuntime(serve(server))


def test_other_outputs_are_refused(serve):
    server = make_server()
    server.config.output[0].name = "boxes_xyxy"
    with pytest.raises(GraphError, match=r"expected one input and the outputs num_detections.*not its ensemble"):  # fmt: skip
        TritonRuntime(serve(server))


def test_a_request_that_was_not_taken_is_sent_again_and_said(serve, caplog):
    server = make_server()
    server.faults.extend([Refusal("Exceeds maximum queue size", UNAVAILABLE)] * 2)
    batch = random_batches(1, 4)[0].images
    with TritonRuntime(serve(server)) as runtime:
        check_same(runtime.infer(batch), batch)
    warnings = [r.message for r in caplog.records if "Exceeds maximum queue size; trying again" in r.message]  # fmt: skip
    assert len(warnings) == 2


def test_a_request_that_is_never_taken_is_an_error_with_its_images(serve):
    server = make_server()
    with TritonRuntime(serve(server), requests=2) as runtime:
        server.faults.extend([Refusal("shutting down", UNAVAILABLE)] * 50)
        with pytest.raises(
            EngineError, match=r"^batch 0: .*shutting down; tried 3 times.*\(images: 0\.jpg\)"
        ):
            list(runtime.map(random_batches(6, 2)))


def test_a_failure_of_the_model_is_not_retried(serve):
    server = make_server()
    with TritonRuntime(serve(server)) as runtime:
        server.faults.append(Refusal("CUDA out of memory", grpc.StatusCode.INTERNAL))
        with pytest.raises(EngineError, match=r"toy: CUDA out of memory$"):
            runtime.infer(random_batches(1, 1)[0].images)
        assert not server.faults


def test_a_request_that_takes_too_long_is_an_error(serve):
    server = make_server()
    with TritonRuntime(serve(server), timeout=0.2) as runtime:
        server.faults.append(1.0)
        start = time.perf_counter()
        with pytest.raises(EngineError, match=r"no answer within 0\.2 s \(--timeout\)"):
            runtime.infer(random_batches(1, 1)[0].images)
        assert time.perf_counter() - start < 0.8


def test_a_server_that_does_not_say_what_it_has_is_no_traceback(serve):
    server = make_server()
    server.index_seconds = 0.6
    url = dataclasses.replace(serve(server), model="other")
    with pytest.raises(EngineError, match=r"expected a model 'other' that is ready.*found none;"):
        TritonRuntime(url, timeout=0.2)


@pytest.mark.parametrize("serve", ["grpc"], indirect=True)
def test_grpc_needs_no_aiohttp(serve, monkeypatch):
    """tritonclient[grpc] comes without it: errors are the server's."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    server = make_server()
    url = serve(server)
    with pytest.raises(EngineError, match=r"expected a model 'other' that is ready.*found toy;"):
        TritonRuntime(dataclasses.replace(url, model="other"))
    with TritonRuntime(url) as runtime:
        server.faults.append(Refusal("CUDA out of memory", grpc.StatusCode.INTERNAL))
        with pytest.raises(EngineError, match=r"toy: CUDA out of memory$"):
            runtime.infer(random_batches(1, 1)[0].images)


def test_a_restarted_server_has_forgotten_the_shared_memory(serve, caplog):
    server = make_server()
    with TritonRuntime(serve(server)) as runtime:
        images = runtime.allocate((4, 6, 8, 3), np.float32)
        images[:] = 5
        server.regions.clear()
        check_same(runtime.infer(images), images)
        assert any("Unable to find shared memory region" in r.message for r in caplog.records)
        check_same(runtime.infer(images), images)
    assert (server.shared, server.sent) == (0, 2)


def test_without_the_extension_or_room_images_are_sent(serve, monkeypatch):
    server = make_server()
    server.extensions = ("model_configuration",)
    with TritonRuntime(serve(server)) as runtime:
        assert "images in the requests" in runtime.description
    monkeypatch.setattr(triton.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))  # fmt: skip
    server = make_server()
    with TritonRuntime(serve(server)) as runtime:
        assert "images in the requests" in runtime.description
        images = runtime.allocate((2, 6, 8, 3), np.float32)
        images[:] = 1
        check_same(runtime.infer(images), images)
    assert server.sent == 1 and not list(Path("/dev/shm").glob("trtdet-*"))


def test_leaving_map_early_cancels_what_is_in_flight(serve):
    server = make_server()
    server.faults.extend([0.0, *[0.5] * 20])
    with TritonRuntime(serve(server), requests=3) as runtime:
        results = runtime.map(random_batches(20, 1))
        next(results)
        start = time.perf_counter()
        results.close()
    assert time.perf_counter() - start < 0.4


def test_a_wrong_answer_is_an_error(serve):
    server = make_server()
    server.model = lambda images: standin_detector.detect(images[:1], 20)
    with (
        TritonRuntime(serve(server)) as runtime,
        pytest.raises(EngineError, match=r"'num_detections': expected 4 rows, got shape \(1, 1\)"),
    ):
        runtime.infer(random_batches(1, 4)[0].images)


def test_without_tritonclient_the_requirements_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.aio", None)
    with pytest.raises(EngineError, match=r"pip install -r requirements-triton\.txt"):
        TritonRuntime(parse_url("grpc://localhost/toy"))


# ---- the scripts


@pytest.fixture(scope="module")
def repository(tiny_onnx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    arguments = ["triton", "--onnx", str(tiny_onnx), "--output", str(folder), "--name", "toy"]
    assert deploy.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def reference(tiny_onnx, tmp_path_factory):
    """detections.json of infer.py without a server."""
    output = tmp_path_factory.mktemp("reference")
    images = str(tiny_images())
    assert infer.main(["--engine", str(tiny_onnx), "--input", images, "--output", str(output), "--no_images"]) == 0  # fmt: skip
    return json.loads((output / "detections.json").read_text())


def tiny_images() -> Path:
    return Path(__file__).resolve().parents[2] / "examples" / "images"


def check_detections(found: list, expected: list) -> None:
    """The same detections to 1e-5 (coordinates relative to the image's 100 to 200 pixels)."""
    assert [(d["image_id"], d["category_id"]) for d in found] == [(d["image_id"], d["category_id"]) for d in expected]  # fmt: skip
    np.testing.assert_allclose([d["score"] for d in found], [d["score"] for d in expected], atol=1e-5)  # fmt: skip
    np.testing.assert_allclose([d["bbox"] for d in found], [d["bbox"] for d in expected], atol=1e-3)


def check_scripts(url: str, reference: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, output = str(tiny_images()), tmp_path / "found"
    assert infer.main(["--model", url, "--input", images, "--output", str(output), "--no_images"]) == 0  # fmt: skip
    check_detections(json.loads((output / "detections.json").read_text()), reference)
    annotations = str(tiny_images().parent / "annotations.json")
    kept = tmp_path / "kept.json"
    assert eval_coco.main(["--model", url, "--input", images, "--annotations", annotations, "--detections", str(kept), "--json", str(tmp_path / "metrics.json")]) == 0  # fmt: skip
    capsys.readouterr()
    assert json.loads((tmp_path / "metrics.json").read_text())["engine"] == "toy"
    assert len(json.loads(kept.read_text())) == len(reference)


def test_infer_and_eval_through_a_server(serve, repository, tiny_onnx, reference, tmp_path, capsys):  # fmt: skip
    config = text_format.Parse((repository / "toy" / "config.pbtxt").read_text(), ModelConfig())
    with open_runtime(tiny_onnx) as served:
        url = serve(Server(config, served.infer))
        check_scripts(str(url), reference, tmp_path, capsys)


@pytest.fixture(scope="module")
def real_server(tiny_onnx, tmp_path_factory):
    """(grpc address, http address) of a Triton server that serves a model and its ensemble in
    its Python backend.
    """
    venv = os.environ.get("TRTDET_TRITON_VENV", "")
    homes = list(Path(venv).glob("lib/python3.*/site-packages/pytriton/tritonserver")) if venv else []  # fmt: skip
    if not homes:
        pytest.skip("needs TRTDET_TRITON_VENV, a virtual environment with nvidia-pytriton, onnxruntime, pillow, opencv-python-headless<4.12 and numpy<2")  # fmt: skip
    folder = tmp_path_factory.mktemp("real")
    assert deploy.main(["triton", "--onnx", str(tiny_onnx), "--output", str(folder / "models"), "--name", "toy", "--ensemble"]) == 0  # fmt: skip
    serve_in_python(folder / "models")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    python = homes[0].parents[1].parent.name.removeprefix("python")
    stub = homes[0] / "python_backend_stubs" / python / "triton_python_backend_stub"
    for file in (*(homes[0] / "backends" / "python").iterdir(), stub):
        (backend / file.name).symlink_to(file)  # they find their libraries by where they are
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        http_port, grpc_port = a.getsockname()[1], b.getsockname()[1]
    command = [
        homes[0] / "bin" / "tritonserver", f"--model-repository={folder / 'models'}", f"--backend-directory={backend.parent}",
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", f"--http-port={http_port}", f"--grpc-port={grpc_port}",
        "--allow-metrics=false", "--exit-timeout-secs=5",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": f"{venv}/bin:{os.environ['PATH']}", "PYTHONPATH": str(homes[0].parents[1])}  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = parse_url(f"grpc://127.0.0.1:{grpc_port}/toy")
        deadline = time.monotonic() + 60
        while True:
            try:
                TritonRuntime(url).close()
                break
            except EngineError:
                if time.monotonic() > deadline or process.poll() is not None:
                    pytest.fail(f"the server does not come up:\n{(folder / 'log').read_text()[-3000:]}")  # fmt: skip
                time.sleep(0.5)
        yield f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_infer_and_eval_through_a_real_server(scheme, real_server, reference, tmp_path, capsys):
    address = real_server[scheme == "http"]
    url = parse_url(f"{scheme}://{address}/toy")
    check_scripts(str(url), reference, tmp_path, capsys)
    with TritonRuntime(url) as shared, TritonRuntime(url, shared_memory=False) as sent:
        assert "in shared memory" in shared.description and "in the requests" in sent.description
        images = shared.allocate((3, *shared.spec.preprocessing.image_shape), np.float32)
        images[:] = np.random.default_rng(0).integers(0, 256, images.shape)
        one, other = shared.infer(images), sent.infer(images)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, atol=1e-5, err_msg=name)
    with pytest.raises(
        EngineError, match=r"expected a model 'other' that is ready.*found toy, toy_ensemble, "
    ):
        TritonRuntime(parse_url(f"{scheme}://{address}/other"))


def test_an_ensemble_of_a_real_server_finds_what_infer_finds(real_server, tiny_onnx):
    from tritonclient import grpc as client_grpc

    found = 0
    with (
        client_grpc.InferenceServerClient(real_server[0]) as client,
        open_runtime(tiny_onnx) as runtime,
    ):
        for path in sorted(tiny_images().iterdir()):
            image = client_grpc.InferInput("image", [1, 1], "BYTES")
            image.set_data_from_numpy(np.array([[path.read_bytes()]], object))
            answer = client.infer("toy_ensemble", [image])
            placed, transform = preprocess(load_image(path), runtime.spec.preprocessing)
            (expected,) = decode(runtime.infer(placed[None]), runtime.spec, [transform])
            n = int(answer.as_numpy("num_detections")[0, 0])
            assert n == len(expected)
            for name, atol in (("boxes_xyxy", 1e-3), ("scores", 1e-5), ("class_ids", 0)):
                np.testing.assert_allclose(answer.as_numpy(name)[0, :n], getattr(expected, name), atol=atol)  # fmt: skip
            found += n
    assert found > 100
