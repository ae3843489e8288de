# SPDX-License-Identifier: Apache-2.0
"""infer.py and eval_coco.py from their command lines on stand-in engines; needs no GPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trt_rig import Rig, write_engine

from trtdet import cuda
from trtdet.commands import eval_coco, infer
from trtdet.images import files as image_files
from trtdet.results import writer
from trtdet.results.found import Found
from trtdet.run import benchmark, detect
from trtdet.runtimes.trt import TensorRTRuntime

TIMED_ON = "TensorRT 10.13.3.9, GPU 0 (CPU stand-in, compute capability 9.0)"
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
    assert len(one) == 2 * IMAGES + 3
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
        assert eval_coco.main(["-e", str(engine), "-i", str(photos), "-a", str(annotations), "--detections", str(found), "--devices", devices]) == 0
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

    open_runtime = detect.open_runtime
    monkeypatch.setattr(detect, "open_runtime", open_and_break)
    assert run(engine, photos, tmp_path / "out", "--devices", "all", "--no_cuda_graph") == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.fullmatch(
        r"error: batch \d+: execute_async_v3 failed: .*a test made it fail \(images: \S+\d+\.png.*\)",
        line,
    )
    assert not (tmp_path / "out" / "detections.json").exists()
    assert list((tmp_path / "out").glob(".*")) == []


def test_a_truncated_jpeg_is_skipped_by_two_gpus(
    rig: Callable[..., Rig], engine: Path, tmp_path: Path, capsys: Any
) -> None:
    """Every other image has the results that it has where the broken one is not there."""
    rig(devices=2)
    rng = np.random.default_rng(0)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    for number in range(30):
        pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
        for name in ("whole", "broken"):
            path = tmp_path / name / f"{number:03}.jpg"
            Image.fromarray(pixels).save(path)
    data = path.with_name("013.jpg").read_bytes()
    path.with_name("013.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole" / "013.jpg").unlink()
    assert run(engine, tmp_path / "whole", tmp_path / "one") == 0
    assert run(engine, tmp_path / "broken", tmp_path / "two", "--devices", "all") == 3
    assert re.search(r"skipped: \S+013\.jpg: cannot be decoded", capsys.readouterr().err)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("error", [MemoryError, SystemExit])
def test_a_decoder_that_dies_ends_the_run(
    rig: Callable[..., Rig],
    engine: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    error: type[BaseException],
) -> None:
    """What is no fault of the image is raised, not skipped, and nothing waits for the dead
    thread.
    """
    rig(devices=2)
    load = image_files.load_image

    def die_at_20(path: Path) -> Any:
        if path.stem == "020":
            raise error("the decoder's")
        return load(path)

    monkeypatch.setattr(image_files, "load_image", die_at_20)
    if error is MemoryError:
        assert run(engine, photos, tmp_path / "out", "--devices", "all") == 1
        assert "the decoder's" in capsys.readouterr().err
    else:
        with pytest.raises(error, match="the decoder's"):
            run(engine, photos, tmp_path / "out", "--devices", "all")
    assert not (tmp_path / "out" / "detections.json").exists()
    assert list((tmp_path / "out").glob(".*")) == []


def test_an_output_directory_that_goes_away_ends_the_run(
    rig: Callable[..., Rig],
    engine: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    rig(devices=2)
    out, fetch, fetched = tmp_path / "out", TensorRTRuntime.fetch, []

    def remove_and_fetch(self: TensorRTRuntime) -> Any:
        fetched.append(1)
        if len(fetched) == 4:
            shutil.move(out, tmp_path / "unplugged")
        return fetch(self)

    monkeypatch.setattr(TensorRTRuntime, "fetch", remove_and_fetch)
    assert run(engine, photos, out, "--devices", "all") == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert errors == [f"error: --output: {out} has disappeared during the run; its results are lost, run again"]  # fmt: skip
    assert not (tmp_path / "unplugged" / "detections.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_run_on_two_gpus(
    engine: Path, tmp_path: Path, number: signal.Signals, status: int, message: str
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "0.jpg")
    for index in range(1, 400):
        os.link(photos / "0.jpg", photos / f"{index}.jpg")
    script = Path(__file__).resolve().parents[1] / "standins" / "standin_infer.py"
    arguments = ["-e", str(engine), "-i", str(photos), "-o", str(out), "--devices", "all"]
    command = [sys.executable, str(script), "cpu", "infer", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(out.glob("*.png")):
            time.sleep(0.01)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
    assert process.returncode == status
    assert log.splitlines()[-2:] == [message, "not freed: {}"]
    assert "Traceback" not in log
    assert 0 < len(list(out.glob("*.tsv"))) < 400
    assert not (out / "detections.json").exists()
    assert list(out.glob(".*")) == []


def test_eval_coco_in_a_process_of_its_own(engine: Path, photos: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in photos.iterdir() if path.suffix != ".json")
    coco = {
        "images": [{"id": n, "file_name": p.name, "height": 9, "width": 9} for n, p in enumerate(paths)],
        "categories": [{"id": n, "name": str(n)} for n in range(1, 91)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(coco))
    script = Path(__file__).resolve().parents[1] / "standins" / "standin_infer.py"
    arguments = [
        "-e",
        engine,
        "-i",
        photos,
        "-a",
        tmp_path / "a.json",
        "--json",
        tmp_path / "m.json",
    ]
    command = [sys.executable, script, "cpu", "eval_coco", *arguments, "--devices", "all"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["images"] == len(paths) > 1
    assert done.stderr.splitlines()[-1] == "not freed: {}"


def test_memory_is_flat_from_files_to_files(
    rig: Callable[..., Rig], engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, decoders, two GPUs, pictures and TSVs: 2000 images leave as much memory as 500."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    rig(devices=2, schedule="early")
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "0.jpg")
    for number in range(1, 2000):
        os.link(photos / "0.jpg", photos / f"{number}.jpg")
    resident: dict[int, int] = {}
    write = writer.ResultWriter.write

    def note_and_write(self: writer.ResultWriter, found: Found) -> None:
        write(self, found)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        for _ in found.paths:
            resident[len(resident)] = pages * os.sysconf("SC_PAGE_SIZE")

    monkeypatch.setattr(writer.ResultWriter, "write", note_and_write)
    assert run(engine, photos, tmp_path / "out", "--devices", "all") == 0
    assert len(resident) == 2000
    grown = max(resident[n] for n in range(1900, 2000)) - max(resident[n] for n in range(400, 500))
    assert grown < 12 << 20  # 1500 decoded images are 53 MiB


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
        pinned.append(cuda.is_pinned(images))
        submit(self, images)

    monkeypatch.setattr(TensorRTRuntime, "submit", note_and_submit)
    assert run(engine, photos, tmp_path / "out") == 0
    assert infer.main(["-e", str(engine), "--benchmark", "3"]) == 0  # noise too
    assert pinned == [True] * (11 + 3 * benchmark.WARMUP + 2 * 3)


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
    more = ("--allow_host_code", "--plugins", str(library), "--plugins", str(library))  # repeatable
    assert run(path, photos, tmp_path / "out", *more) == 1
    assert f"plugin library {library}: expected a shared library" in capsys.readouterr().err
    contexts, graphs = [], []
    fetch = TensorRTRuntime.fetch

    def note_and_fetch(self: TensorRTRuntime) -> Any:
        contexts.append([context._device for context in machine.contexts])
        return fetch(self)

    monkeypatch.setattr(TensorRTRuntime, "fetch", note_and_fetch)
    monkeypatch.setattr(cuda.Graph, "launch", lambda *_: graphs.append(1))
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
    assert infer.main([*argv, "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names == [
        "Batch size",
        "=== Performance summary ===",
        "Throughput",
        "Latency",
        "Enqueue Time",
        "H2D Latency",
        "GPU Compute Time",
        "D2H Latency",
        "Total Host Walltime",
        "Total GPU Compute Time",
        f"Throughput is that of all GPUs; latencies and times are those of {TIMED_ON}",
        "End to end from files",
    ]
    assert all("percentile(99%) = " in line for line in lines[3:8])
    data = json.loads(report.read_text())
    assert data["batch_size"] == 4
    assert data["runtime"].startswith("2 GPUs: ")
    assert data["timed_on"] == TIMED_ON
    parts = [data[name]["mean"] for name in ("H2D Latency", "GPU Compute Time", "D2H Latency")]
    assert data["Latency"]["mean"] == pytest.approx(sum(parts))


def test_no_such_gpu(
    rig: Callable[..., Rig], engine: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    rig(devices=2)
    assert run(engine, photos, tmp_path / "out", "--devices", "0,2") == 1
    assert "error: --devices: there is no GPU 2: GPUs 0 to 1 are here" in capsys.readouterr().err
