# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 (fixtures)
"""infer.py and eval_coco.py from their command lines on stand-in engines; needs no GPU."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trt_rig import Rig, engine, rig, write_engine  # noqa: F401

import eval_coco
import infer
from trtdet import device
from trtdet.runtimes.trt import TensorRTRuntime

IMAGES = 41  # 10 batches of 4 and one of 1


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert [n for n in names if n.startswith(("gpu-", "write", "image-batcher"))] == []


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (24 + number % 5, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def run(engine: Path, photos: Path, output: Path, *more: str) -> int:
    return infer.main(["-e", str(engine), "-i", str(photos), "-o", str(output), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def until_both_gpus_ran(patch: pytest.MonkeyPatch) -> set[int]:
    """Hold the first GPU until the second has taken a batch. Returns those that ran."""
    both, ran = threading.Event(), set[int]()
    fetch = TensorRTRuntime.fetch

    def hold_and_fetch(self: TensorRTRuntime) -> Any:
        ran.add(self._device)
        if len(ran) == 2:
            both.set()
        assert both.wait(20)
        return fetch(self)

    patch.setattr(TensorRTRuntime, "fetch", hold_and_fetch)
    return ran


@pytest.mark.parametrize("devices", ["all", "1,0"])
def test_two_gpus_write_the_files_of_one(
    rig: Callable[..., Rig], engine: Path, photos: Path, tmp_path: Path, devices: str
) -> None:
    rig(devices=2)
    assert run(engine, photos, tmp_path / "one") == 0
    with pytest.MonkeyPatch.context() as patch:
        ran = until_both_gpus_ran(patch)
        assert run(engine, photos, tmp_path / "two", "--devices", devices) == 0
    assert ran == {0, 1}
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) == 2 * IMAGES + 1
    assert two == one
    found = json.loads(one["detections.json"])
    assert len(found) > IMAGES
    assert [r["image_id"] for r in found] == sorted(r["image_id"] for r in found)


def test_two_gpus_get_the_map_of_one(
    rig: Callable[..., Rig], engine: Path, photos: Path, tmp_path: Path
) -> None:
    rig(devices=2)
    annotations = tmp_path / "annotations.json"
    boxes = [
        {"id": n + 1, "image_id": n, "category_id": 1 + n % 90, "bbox": [1, 1, 20, 15], "area": 300, "iscrowd": 0}
        for n in range(IMAGES)
    ]  # fmt: skip
    images = [
        {"id": n, "file_name": f"{n:03}.png", "height": 24, "width": 32} for n in range(IMAGES)
    ]
    categories = [{"id": n, "name": str(n)} for n in range(1, 91)]
    annotations.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    written = []
    for devices in ("0", "0,1"):
        found = tmp_path / f"{devices}.json"
        # fmt: off
        assert eval_coco.main(["-e", str(engine), "-i", str(photos), "-a", str(annotations), "-d", str(found), "--devices", devices]) == 0
        # fmt: on
        written.append(found.read_bytes())
    assert written[0] == written[1]
    assert len(json.loads(written[0])) > IMAGES


def test_a_failed_gpu_ends_the_run(
    rig: Callable[..., Rig],
    engine: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    machine = rig(devices=2)

    def open_and_break(path: Path, **options: Any) -> Any:
        runtime = open_runtime(path, **options)
        for context in machine.contexts:  # whichever GPU is quicker, one fails
            context.fail_after = 0 if context._device == 1 else 5
        return runtime

    open_runtime = infer.open_runtime
    monkeypatch.setattr(infer, "open_runtime", open_and_break)
    assert run(engine, photos, tmp_path / "out", "--devices", "all", "--no_cuda_graph") == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.fullmatch(
        r"error: batch \d+: execute_async_v3 failed: .*a test made it fail \(images: \S+\d+\.png.*\)",
        line,
    )
    assert not (tmp_path / "out" / "detections.json").exists()
    assert list((tmp_path / "out").glob(".*")) == []


def test_images_are_decoded_into_pinned_memory(
    rig: Callable[..., Rig],
    engine: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig()
    pinned = []
    submit = TensorRTRuntime.submit

    def note_and_submit(self: TensorRTRuntime, images: Any) -> None:
        pinned.append(device.is_pinned(images))
        submit(self, images)

    monkeypatch.setattr(TensorRTRuntime, "submit", note_and_submit)
    assert run(engine, photos, tmp_path / "out") == 0
    assert infer.main(["-e", str(engine), "--benchmark", "3"]) == 0  # noise too
    assert pinned == [True] * (11 + 2 * (infer.WARMUP + 3))


def test_options_reach_the_runtime(
    rig: Callable[..., Rig],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    machine = rig(devices=2)
    info = {"version_compatible": True}
    path = write_engine(tmp_path / "vc.engine", info=info, host_code=True)
    assert run(path, photos, tmp_path / "out") == 1
    assert "allow it (--allow_host_code)" in capsys.readouterr().err
    library = tmp_path / "libmine.so"
    library.write_bytes(b"no library")
    assert run(path, photos, tmp_path / "out", "--allow_host_code", "--plugins", str(library)) == 1
    assert f"plugin library {library}: expected a shared library" in capsys.readouterr().err
    contexts, graphs = [], []
    fetch = TensorRTRuntime.fetch

    def note_and_fetch(self: TensorRTRuntime) -> Any:
        contexts.append([context._device for context in machine.contexts])
        return fetch(self)

    monkeypatch.setattr(TensorRTRuntime, "fetch", note_and_fetch)
    monkeypatch.setattr(device.Graph, "launch", lambda *_: graphs.append(1))
    more = ("--allow_host_code", "--contexts", "2", "--devices", "1", "--no_cuda_graph")
    assert run(path, photos, tmp_path / "out", *more) == 0
    assert contexts == [[1, 1]] * 11
    assert graphs == []


def test_benchmark_prints_the_times_of_the_gpu(
    rig: Callable[..., Rig], engine: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    rig(devices=2)
    report = tmp_path / "report.json"
    argv = ["-e", str(engine), "-i", str(photos), "--benchmark", "20", "--devices", "all"]
    assert infer.main([*argv, "--benchmark_json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names == [
        "=== Performance summary ===",
        "Throughput",
        "Latency",
        "Enqueue Time",
        "H2D Latency",
        "GPU Compute Time",
        "D2H Latency",
        "Total Host Walltime",
        "Total GPU Compute Time",
        "End to end from files",
    ]
    assert all("percentile(99%) = " in line for line in lines[2:7])
    data = json.loads(report.read_text())
    assert data["batch_size"] == 4
    assert data["runtime"].startswith("2 GPUs: ")
    parts = [data[name]["mean"] for name in ("H2D Latency", "GPU Compute Time", "D2H Latency")]
    assert data["Latency"]["mean"] == pytest.approx(sum(parts))


def test_no_such_gpu(
    rig: Callable[..., Rig], engine: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    rig(devices=2)
    assert run(engine, photos, tmp_path / "out", "--devices", "0,2") == 1
    assert "choose a device that nvidia-smi lists" in capsys.readouterr().err
