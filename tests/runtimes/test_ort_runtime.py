# SPDX-License-Identifier: Apache-2.0


import ast
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import toy_detector
from conftest import ROOT
from numpy.typing import NDArray

from trtdet.errors import EngineError, GraphError
from trtdet.files import sha256
from trtdet.nms import lowering
from trtdet.run.detect import detect, open_batcher
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Outputs, Runtime, default_batch_size
from trtdet.runtimes.open import open_runtime
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.sessions import pick_providers, with_options
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Nms, Preprocessing

TENSORRT, CUDA, CPU = (
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
    "CPUExecutionProvider",
)


def images(*colours: tuple[int, int, int], dtype: str = "float32") -> NDArray[Any]:
    """One image of the toy detector's size per (red, green, blue)."""
    batch = np.empty((len(colours), *toy_detector.SIZE_HW, 3), dtype)
    for row, colour in zip(batch, colours, strict=True):
        row[:] = colour
    return batch


def test_outputs_are_those_of_the_graph(tmp_path: Path) -> None:
    path = toy_detector.save(tmp_path / "toy.onnx")
    with open_runtime(path) as runtime:
        found = runtime.infer(images((204, 2, 1), (255, 0, 0), (51, 4, 0)))
    assert isinstance(runtime, OnnxRuntime)
    assert found["num_detections"].tolist() == [[2], [0], [4]]
    assert found["num_detections"].dtype == np.int32
    np.testing.assert_allclose(found["detection_scores"][0], [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found["detection_scores"][2], [0.2, 0.15, 0.1, 0.05], rtol=1e-6)
    assert found["detection_classes"].tolist() == [[1, 2, 1, 2], [0, 1, 0, 1], [0, 1, 0, 1]]
    assert found["detection_boxes"][1].tolist() == [list(box) for box in toy_detector.BOXES_YXYX]


def test_results_are_not_overwritten_by_a_later_call(tmp_path: Path) -> None:
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx")) as runtime:
        first = runtime.infer(images((255, 1, 2)))
        runtime.infer(images((0, 4, 0)))
    assert first["num_detections"].tolist() == [[1]]
    assert first["detection_classes"][0, 0] == 2


@pytest.mark.parametrize("optimize", [True, False])
def test_uint8_input(tmp_path: Path, optimize: bool) -> None:
    path = toy_detector.save(tmp_path / "toy.onnx", dtype="uint8")
    with OnnxRuntime(path, threads=1, optimize=optimize) as runtime:
        found = runtime.infer(images((102, 3, 0), dtype="uint8"))
        assert found["detection_scores"][0, 0] == pytest.approx(0.4)
        with pytest.raises(ValueError, match=r"type uint8, got \(32, 48, 3\) float32"):
            runtime.infer(images((102, 3, 0)))


@pytest.mark.parametrize(
    ("batch", "expected", "default"),
    [
        ("N", (1, None), 1),  # a CPU gains nothing from more
        (4, (4, 4), 4),
        (1, (1, 1), 1),
    ],
)
def test_batch_range_is_read_from_the_graph(
    tmp_path: Path, batch: int | str, expected: tuple[int, int | None], default: int
) -> None:
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx", batch=batch)) as runtime:
        assert runtime.batch_range == expected
        assert default_batch_size(runtime) == default


def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with (
        OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx", batch=4)) as runtime,
        pytest.raises(ValueError, match="a batch of 4 to 4, got 3"),
    ):
        runtime.infer(images((0, 0, 0), (0, 0, 0), (0, 0, 0)))


def test_without_a_spec_the_next_step_is_create_onnx(tmp_path: Path) -> None:
    proto = toy_detector.model()
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(GraphError, match=r"bare\.onnx.*create_onnx\.py --source_onnx"):
        OnnxRuntime(tmp_path / "bare.onnx")


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    proto = toy_detector.model()
    del proto.graph.output[2:]
    onnx.save(proto, tmp_path / "two.onnx")
    with pytest.raises(
        GraphError, match=r"expected the outputs .* found num_detections, detection_"
    ):
        OnnxRuntime(tmp_path / "two.onnx")


def test_a_spec_of_another_model_is_refused(tmp_path: Path) -> None:
    proto = toy_detector.model()
    spec = ModelSpec.from_onnx(proto)
    spec.replace(preprocessing=Preprocessing((64, 64))).attach(proto)
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(GraphError, match=r"\(64, 64, 3\) float32.*\(32, 48, 3\) float32"):
        OnnxRuntime(tmp_path / "other.onnx")


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(GraphError, match=r"text\.onnx: expected an ONNX file"):
        OnnxRuntime(tmp_path / "text.onnx")


def test_a_graph_that_onnx_runtime_cannot_run_is_an_engine_error(tmp_path: Path) -> None:
    proto = toy_detector.model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, tmp_path / "broken.onnx")
    with pytest.raises(EngineError, match=r"broken\.onnx: ONNX Runtime cannot load it.*NoSuchOp"):
        OnnxRuntime(tmp_path / "broken.onnx")


def test_external_data_is_found_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    proto = toy_detector.model()
    for weight in proto.graph.initializer:  # only raw data goes into a file of its own
        weight.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), weight.name)
        )
    onnx.save(
        proto,
        folder / "toy.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=64,  # the boxes; what shapes hang on stays inside
        convert_attribute=False,
    )
    assert (folder / "weights.bin").stat().st_size > 0
    monkeypatch.chdir(tmp_path)
    with OnnxRuntime(Path("model/toy.onnx")) as runtime:
        assert runtime.infer(images((255, 3, 0)))["num_detections"].tolist() == [[3]]


def test_the_plugin_is_lowered_in_memory_only(tmp_path: Path) -> None:
    # Boxes 0 and 1 overlap with an IoU of 0.9: of the two, NMS keeps the better.
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "trt.plugins": 1]>
        nms (float[N, 1, 4, 3] images)
          => (int32[N, 1] num_detections, float[N, 5, 4] detection_boxes,
              float[N, 5] detection_scores, int32[N, 5] detection_classes)
          <int64[3] three_boxes = {-1, 3, 4}, int64[1] start = {0}, int64[1] end = {2}, int64[1] last = {2}, float zero = {0},
           float[1, 3, 4] corners = {0, 0, 10, 10, 0, 0, 9, 10, 20, 20, 30, 30},
           float[1, 3, 2] probabilities = {0.5, 0, 0.75, 0, 0, 0.25}>
        {
          none = Mul(images, zero)
          nothing = Reshape(none, three_boxes)
          two_columns = Slice(nothing, start, end, last)
          boxes = Add(nothing, corners)
          scores = Add(two_columns, probabilities)
          num_detections, detection_boxes, detection_scores, detection_classes =
            trt.plugins.EfficientNMS_TRT<score_threshold = 0.1, iou_threshold = 0.5, max_output_boxes = 5,
              background_class = -1, score_activation = 0, class_agnostic = 0, box_coding = 0,
              plugin_version = "1">(boxes, scores)
        }
    """)
    # NMS needs the numbers of boxes and classes in the graph, as create_onnx.py leaves them there.
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    nms = Nms(0.1, max_output_boxes=5, score_activation=False, box_coding=0)
    ModelSpec("toy", Preprocessing((1, 4)), nms, (1, 2)).attach(proto)
    path = tmp_path / "nms.onnx"
    onnx.save(proto, path)
    before = sha256(path)
    with OnnxRuntime(path) as runtime:
        found = runtime.infer(np.zeros((1, 1, 4, 3), np.float32))
    assert found["num_detections"].tolist() == [[2]]
    assert found["detection_scores"].tolist() == [[0.75, 0.25, 0, 0, 0]]
    assert found["detection_classes"].tolist() == [[0, 1, 0, 0, 0]]
    assert found["detection_boxes"][0, :2].tolist() == [[0, 0, 9, 10], [20, 20, 30, 30]]
    assert sha256(path) == before


def test_bound_buffers_give_the_same_numbers(tmp_path: Path) -> None:
    # The way of the GPU providers, on the one device that is everywhere.
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx")) as runtime:
        for batch in (images((10, 1, 0)), images((20, 2, 1)), images((30, 3, 0), (40, 4, 1))):
            expected = runtime.infer(batch)
            for value, name in zip(runtime._run_bound(batch), expected, strict=True):
                np.testing.assert_array_equal(value, expected[name])


def test_device_buffers_of_the_last_shapes_only_are_kept(tmp_path: Path) -> None:
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx")) as runtime:
        for count in (1, 2, 3, 4, 1, 5, 6):
            batch = images(*[(10 * count, 1, 0)] * count)
            expected = runtime.infer(batch)
            for value, name in zip(runtime._run_bound(batch), expected, strict=True):
                np.testing.assert_array_equal(value, expected[name])
        assert [shape[0] for shape in runtime._bound] == [4, 1, 5, 6]


def run_ahead(runtime: OnnxRuntime) -> OnnxRuntime:
    """The way of the GPU providers: one batch ahead, inputs bound to a device."""
    runtime.frees_cpu = runtime.one_size = True
    runtime._infer = lambda batch, session: dict(
        zip(OUTPUT_NAMES, runtime._run_bound(batch), strict=True)
    )  # type: ignore[method-assign]
    return runtime


def test_running_ahead_gives_the_same_numbers_in_order(tmp_path: Path) -> None:
    colours = [(10 * number, number % 5, 1) for number in range(1, 20)]
    batches = [NamedBatch(images(colour, colour), (Path(f"{colour}.jpg"),)) for colour in colours]
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx"), threads=1) as runtime:
        expected = [runtime.infer(batch.images) for batch in batches]
        found = list(run_ahead(runtime).map(batches))
    assert [batch for batch, _ in found] == batches
    for (_, outputs), others in zip(found, expected, strict=True):
        for name in OUTPUT_NAMES:
            np.testing.assert_array_equal(outputs[name], others[name])


def test_a_failure_while_running_ahead_names_its_images(tmp_path: Path) -> None:
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx"), threads=1) as runtime:
        run_bound = runtime._run_bound

        def failing(batch: NDArray[Any]) -> list[NDArray[Any]]:
            if batch[0, 0, 0, 0] == 13:
                raise EngineError("out of memory")
            return run_bound(batch)

        runtime._run_bound = failing  # type: ignore[method-assign]
        batches = [NamedBatch(images((red, 1, 0)), (Path(f"{red}.jpg"),)) for red in (3, 13, 5, 7)]
        results = run_ahead(runtime).map(batches)
        assert next(results)[0] is batches[0]
        with pytest.raises(EngineError, match=r"^batch 1: out of memory \(images: 13\.jpg\)$"):
            next(results)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("onnxruntime")]  # fmt: skip


def test_leaving_early_while_running_ahead_ends_its_thread(tmp_path: Path) -> None:
    taken: list[int] = []

    def batches() -> Iterator[NamedBatch]:
        for number in range(100):
            taken.append(number)
            yield NamedBatch(images((number, 1, 0)), (Path("a.jpg"),))

    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx"), threads=1) as runtime:
        results = run_ahead(runtime).map(batches())
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert taken == [0, 1]  # one ahead
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("onnxruntime")]


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_every_batch_has_one_size_where_another_takes_long(tmp_path: Path, count: int) -> None:
    paths = [toy_detector.image(tmp_path / "in" / f"{number:02}.png", red=20 * number, green=number % 5, blue=0) for number in range(count)]  # fmt: skip
    options = RunOptions(batch_size=4)
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx"), threads=1) as runtime:
        with open_batcher(runtime, paths, options) as batcher:
            expected = list(detect(runtime, batcher))
        shapes = set()
        honest = runtime._run_bound

        def noted(batch: NDArray[Any]) -> list[NDArray[Any]]:
            shapes.add(batch.shape[0])
            return honest(batch)

        runtime._run_bound = noted  # type: ignore[method-assign]
        with open_batcher(run_ahead(runtime), paths, options) as batcher:
            found = list(detect(runtime, batcher))
    assert shapes == {min(count, 4)}
    assert [result.path for result in found] == paths
    for one, other in zip(found, expected, strict=True):
        for name in ("boxes_xyxy", "scores", "class_ids"):
            np.testing.assert_array_equal(getattr(one.detections, name), getattr(other.detections, name))  # fmt: skip


def test_options_of_the_providers() -> None:
    options = {"cudnn_conv_algo_search": "HEURISTIC"}
    assert with_options([TENSORRT, CUDA, CPU], options) == [TENSORRT, (CUDA, options), CPU]
    assert with_options([CPU], options) == [CPU]


@pytest.mark.parametrize(
    ("provider", "available", "expected"),
    [
        ("auto", [TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU]),
        ("auto", ["AzureExecutionProvider", CPU], [CPU]),  # the plain package on Linux
        ("cuda", [TENSORRT, CUDA, CPU], [CUDA, CPU]),
        (
            "tensorrt",
            [TENSORRT, CUDA, CPU],
            [TENSORRT, CUDA, CPU],
        ),  # CUDA runs what TensorRT leaves
        ("cpu", [TENSORRT, CUDA, CPU], [CPU]),
    ],
)
def test_providers(
    provider: Any, available: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    assert pick_providers(provider) == expected


def test_a_provider_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    path = toy_detector.save(tmp_path / "toy.onnx")
    with pytest.raises(
        EngineError, match=r"--provider cuda: .* has CPU.* only; install onnxruntime-gpu"
    ):
        OnnxRuntime(path, provider="cuda")


def test_description_names_version_and_provider(tmp_path: Path) -> None:
    with OnnxRuntime(
        toy_detector.save(tmp_path / "toy.onnx"), provider="cpu", threads=1
    ) as runtime:
        assert runtime.description == f"ONNX Runtime {onnxruntime.__version__}, {CPU}, 1 threads"


# ---- what every runtime has


@dataclass(frozen=True)
class NamedBatch:
    images: NDArray[Any]
    paths: tuple[Path, ...]


class StandInRuntime(Runtime):
    """Answers with the batch's first pixel; fails at pixel 13."""

    spec = ModelSpec("toy", Preprocessing((1, 1)), Nms(), (1,))
    batch_range: tuple[int, int | None] = (2, 6)
    description = "stand-in"

    def infer(self, images: NDArray[Any]) -> Outputs:
        if images[0] == 13:
            raise EngineError("out of memory")
        return {"num_detections": images[:1]}

    def close(self) -> None: ...


def test_batches_keep_their_order_and_a_failure_names_its_images() -> None:
    batches = [NamedBatch(np.array([x]), (Path(f"{x}.jpg"), Path("b.jpg"))) for x in (3, 1, 13, 2)]
    results = StandInRuntime().map(batches)
    assert [
        (batch, found["num_detections"][0]) for batch, found in (next(results), next(results))
    ] == [
        (batches[0], 3),
        (batches[1], 1),
    ]
    with pytest.raises(EngineError, match=r"^batch 2: out of memory \(images: 13\.jpg, b\.jpg\)$"):
        next(results)


def test_a_batch_that_onnx_runtime_does_not_take_is_named(tmp_path: Path) -> None:
    batches = [NamedBatch(images((1, 1, 0), dtype=dtype), (Path(f"{dtype}.jpg"),)) for dtype in ("float32", "uint8")]  # fmt: skip
    with OnnxRuntime(toy_detector.save(tmp_path / "toy.onnx"), threads=1) as runtime:
        results = runtime.map(batches)
        next(results)
        with pytest.raises(ValueError, match=r"^batch 1: input: expected images of .* \(images: uint8\.jpg\)$"):  # fmt: skip
            next(results)


def test_a_runtime_needs_no_more_than_the_contract_says() -> None:
    with StandInRuntime() as runtime:
        assert (runtime.preferred_batch, runtime.frees_cpu, runtime.timed_on) == (8, False, "")
        assert runtime.infer_timed(np.zeros(1)) is None
        memory = runtime.allocate((2, 3), np.dtype("uint8"))
        assert (memory.shape, memory.dtype) == ((2, 3), np.uint8)

    class WithoutInfer(Runtime):
        def close(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        WithoutInfer()  # type: ignore[abstract]


def test_runtimes_are_asked_for_nothing_by_name() -> None:
    """What a runtime has is in its contract: no getattr and no hasattr."""
    asked = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "trtdet").rglob("*.py"))
        if path.name != "cuda.py"  # its `runtime` is CUDA's
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if ast.unparse(node.args[0]).rpartition(".")[2].strip("_") == "runtime"
        or (ast.unparse(node.args[0]) == "self" and path.parent.name == "runtimes")
    ]  # fmt: skip
    assert asked == []


@pytest.mark.parametrize(
    ("preferred", "batch_range", "expected"),
    [
        (None, (1, None), 8),
        (None, (2, 6), 6),
        (4, (1, 16), 4),  # an engine's OPT
        (1, (4, 4), 4),
    ],
)
def test_default_batch_size(
    preferred: int | None, batch_range: tuple[int, int | None], expected: int
) -> None:
    class Preferring(StandInRuntime):
        preferred_batch = property(lambda self: preferred)

    runtime = StandInRuntime() if preferred is None else Preferring()
    runtime.batch_range = batch_range
    assert default_batch_size(runtime) == expected


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # onnxruntime-gpu offers providers whose libraries are not there; the plain package starts as
    # little of them.
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    path = toy_detector.save(tmp_path / "toy.onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(EngineError, match="CUDAExecutionProvider does not start here"):
        OnnxRuntime(path, provider="cuda")
    forms: list[str] = []
    lower = lowering.lower
    monkeypatch.setattr(lowering, "lower", lambda model, form: (forms.append(form), lower(model, form))[1])  # fmt: skip
    monkeypatch.setattr(lowering, "FEW_CLASSES", 1)
    with OnnxRuntime(path) as runtime:
        assert forms == ["settled", "onnx"]  # each provider has the NMS that is fast there
        assert runtime.provider == CPU
        assert runtime.infer(images((255, 3, 0)))["num_detections"].tolist() == [[3]]
    assert "CUDAExecutionProvider does not start here" in caplog.text
