# SPDX-License-Identifier: Apache-2.0


import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import toy_detector
from conftest import ROOT
from toy_detector import image

from trtdet import machine, terminal
from trtdet.commands import infer, visualize
from trtdet.detections import Detections
from trtdet.errors import EngineError
from trtdet.images import files as source_files
from trtdet.results import image_files
from trtdet.results import writer as results_writer
from trtdet.results.found import Found
from trtdet.results.manifest import RunFolder
from trtdet.run import benchmark, detect
from trtdet.run import infer as run_infer
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.spec import ModelSpec


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_detector.save(tmp_path / "toy.onnx")


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith(("write", "image-batcher"))]
    assert left == []


def run(toy: Path, source: Path, output: Path, *more: str) -> int:
    return infer.main(
        ["--engine", str(toy), "--input", str(source), "--output", str(output), *more]
    )


def rows(path: Path) -> list[list[float]]:
    return [[float(x) for x in line.split("\t")] for line in path.read_text().splitlines()]


# ---- what is written


def test_one_picture_and_one_tsv_per_image(toy: Path, tmp_path: Path, capsys: Any) -> None:
    # Twice the network's size, so boxes are twice those of the network: y 2..10 x 4..20 -> x 8..40
    # y 4..20.
    image(tmp_path / "in" / "7.png", red=204, green=2, blue=1, size_wh=(96, 64))
    image(tmp_path / "in" / "12.png", red=255, green=0, blue=0)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "in", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "12.png",
        "12.tsv",
        "7.png",
        "7.tsv",
        "detections.json",
        "labels.txt",
        "manifest.json",
    ]
    assert rows(out / "7.tsv") == [[8, 4, 40, 20, 0.8, 1], [0, 0, 96, 64, 0.6, 2]]
    assert (out / "12.tsv").read_text() == ""
    assert json.loads((out / "detections.json").read_text()) == [
        {"image_id": 7, "category_id": 20, "bbox": [8, 4, 32, 16], "score": 0.8},
        {"image_id": 7, "category_id": 30, "bbox": [0, 0, 96, 64], "score": 0.6},
    ]
    drawn, plain = cv2.imread(str(out / "7.png")), cv2.imread(str(tmp_path / "in" / "7.png"))
    assert drawn.shape == (64, 96, 3)
    assert (drawn[4] != plain[4]).any()  # the top edge of the first box
    np.testing.assert_array_equal(
        cv2.imread(str(out / "12.png")), np.full((32, 48, 3), (0, 0, 255))
    )
    assert capsys.readouterr().out == f"{out / 'detections.json'}\n"


def test_pictures_as_jpeg(toy: Path, tmp_path: Path) -> None:
    """The same pictures, but for what JPEG loses."""
    for number in range(3):
        image(tmp_path / "in" / f"{number}.png", red=204, green=number, blue=1, size_wh=(96, 64))
    for kind in ("png", "jpg"):
        assert run(toy, tmp_path / "in", tmp_path / kind, "--image_format", kind) == 0
        assert len(list((tmp_path / kind).glob(f"*.{kind}"))) == 3
    for path in (tmp_path / "jpg").glob("*.jpg"):
        found, expected = cv2.imread(str(path)), cv2.imread(str(tmp_path / "png" / f"{path.stem}.png"))  # fmt: skip
        assert np.abs(found.astype(int) - expected).mean() < 4
    for name in ("0.tsv", "1.tsv", "2.tsv", "detections.json"):
        assert (tmp_path / "jpg" / name).read_bytes() == (tmp_path / "png" / name).read_bytes()


def test_boxes_are_clipped_and_letterboxed(toy: Path, tmp_path: Path) -> None:
    # 32 wide, 64 high: scale 1/2, 16 x 32 pixels of the 48 x 32 input; the second box covers the
    # padding too.
    image(tmp_path / "tall.png", red=204, green=2, blue=0, size_wh=(32, 64))
    assert run(toy, tmp_path / "tall.png", tmp_path / "out", "--no_images") == 0
    assert rows(tmp_path / "out" / "tall.tsv") == [[8, 4, 32, 20, 0.8, 0], [0, 0, 32, 64, 0.6, 1]]
    assert not (tmp_path / "out" / "tall.png").exists()


def test_header_and_labels_on_request(toy: Path, tmp_path: Path) -> None:
    image(tmp_path / "a.png", red=204, green=1, blue=2)
    assert run(toy, tmp_path / "a.png", tmp_path / "out", "--tsv_header") == 0
    assert (tmp_path / "out" / "a.tsv").read_text() == (
        "xmin\tymin\txmax\tymax\tscore\tclass\tlabel\n4.000\t2.000\t20.000\t10.000\t0.800000\t2\tplum\n"
    )


def test_labels_file_overrides_the_model(toy: Path, tmp_path: Path) -> None:
    image(tmp_path / "a.png", red=204, green=1, blue=0)
    (tmp_path / "names.txt").write_text("A\nB\nC\n")
    out = tmp_path / "out"
    more = ("--tsv_header", "--labels", str(tmp_path / "names.txt"))
    assert run(toy, tmp_path / "a.png", out, *more) == 0
    assert (out / "a.tsv").read_text().endswith("\t0\tA\n")


def test_labels_of_a_model_without_any() -> None:
    spec = ModelSpec.from_onnx(toy_detector.model())
    bare = spec.replace(labels=())
    assert list(detect.pick_labels(None, bare)) == []
    coco = bare.replace(category_ids=tuple(range(1, 91)))
    assert detect.pick_labels(None, coco)[0] == "person"
    assert detect.pick_labels(None, coco)[89] == "toothbrush"


def test_names_do_not_collide_and_folders_are_kept(toy: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    image(source / "a.png", red=51, green=1, blue=0)
    image(source / "a.bmp", red=102, green=1, blue=0)
    image(source / "deep" / "a.png", red=153, green=1, blue=0)
    out = tmp_path / "out"
    assert run(toy, source, out, "--recursive") == 0
    scores = {str(p.relative_to(out)): rows(p)[0][4] for p in out.rglob("*.tsv")}
    assert scores == {"a.png.tsv": 0.2, "a.bmp.tsv": 0.4, str(Path("deep/a.tsv")): 0.6}
    found = json.loads((out / "detections.json").read_text())
    assert {r["image_id"]: r["score"] for r in found} == {
        "a.png": 0.2,
        "a.bmp": 0.4,
        "deep/a.png": 0.6,
    }


def test_annotations_give_the_image_ids(toy: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in"
    for name in ("x.png", "y.png", "new.png"):
        image(source / name, red=51, green=1, blue=0)
    (tmp_path / "known.json").write_text(
        json.dumps(
            {
                "images": [{"id": 31, "file_name": "val/y.png"}, {"id": 32, "file_name": "x.png"}],
                "annotations": [],
                "categories": [{"id": 10}],
            }
        )
    )
    out = tmp_path / "out"
    assert run(toy, source, out, "--annotations", str(tmp_path / "known.json")) == 0
    found = json.loads((out / "detections.json").read_text())
    assert [r["image_id"] for r in found] == [32, 31]
    assert (out / "new.tsv").exists()
    assert "does not have 1 of 3 images" in capsys.readouterr().err


def test_pictures_do_not_overwrite_the_input(toy: Path, tmp_path: Path, capsys: Any) -> None:
    path = image(tmp_path / "in" / "a.png", red=51, green=4, blue=0)
    before = path.read_bytes()
    assert run(toy, path.parent, path.parent) == 1
    assert "the next run would read its own drawings" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_order_is_that_of_the_images(toy: Path, tmp_path: Path) -> None:
    for number in range(40):  # large and small in turn, so that later ones are done first
        size = (1500, 1000) if number % 8 == 0 else (48, 32)
        image(tmp_path / "in" / f"{number:02}.png", red=255 - number, green=1, blue=0, size_wh=size)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "in", out, "--batch_size", "3", "--workers", "4") == 0
    found = json.loads((out / "detections.json").read_text())
    assert [r["image_id"] for r in found] == list(range(40))
    assert [round(255 * (1 - r["score"])) for r in found] == list(range(40))


# ---- thresholds and batches


def test_classes_are_picked_by_name_or_id(toy: Path, tmp_path: Path, capsys: Any) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    names = toy_detector.LABELS
    for class_id, name in enumerate("abc"):
        image(photos / f"{name}.png", red=204, green=1, blue=class_id)

    def found(*more: str) -> list[list[float]]:
        assert run(toy, photos, out, *more) == 0
        entries = json.loads((out / "detections.json").read_text())
        tsvs = [row[5] for name in "abc" for row in rows(out / f"{name}.tsv")]
        assert len(entries) == len(tsvs)
        return tsvs

    assert found() == [0, 1, 2]
    assert found("--classes", names[2].upper()) == [2]
    assert found("--classes", f"{names[0]}, 2") == [0, 2]
    capsys.readouterr()
    assert run(toy, photos, out, "--classes", names[2][:-1]) == 1
    assert f"error: --classes: there is no class {names[2][:-1]!r}; did you mean {names[2]}?\n" in capsys.readouterr().err  # fmt: skip
    assert run(toy, photos, out, "--classes", "3") == 1
    assert "there is no class '3'; the model has " in capsys.readouterr().err


def test_quiet_shows_trouble_alone(toy: Path, tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "a.png", red=204, green=1, blue=2)
    (tmp_path / "b.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert run(toy, tmp_path, out) == 3
    assert "I 1 images, 1 detections" in capsys.readouterr().err
    for _ in range(2):
        assert run(toy, tmp_path, out, "--quiet") == 3
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("W ") and "b.png" in line
        assert captured.out == f"{out / 'detections.json'}\n"
        assert terminal.no_bar() is True
    assert run(toy, tmp_path, out, "-v") == 3
    assert terminal.no_bar() is None


def test_score_threshold_only_raises(toy: Path, tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "a.png", red=204, green=4, blue=0)  # 0.8, 0.6, 0.4, 0.2
    for option in ("--score_threshold", "--nms_threshold", "-t"):
        assert run(toy, tmp_path / "a.png", tmp_path / "out", option, "0.4") == 0
        assert [row[4] for row in rows(tmp_path / "out" / "a.tsv")] == [0.8, 0.6, 0.4]
    assert "nothing below" not in capsys.readouterr().err
    strict = toy_detector.save(tmp_path / "strict.onnx", score_threshold=0.5)
    assert run(strict, tmp_path / "a.png", tmp_path / "out", "-t", "0.1") == 0
    assert "the model keeps nothing below 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_results_do_not_depend_on_the_batch_size(
    toy: Path, tmp_path: Path, batch_size: int
) -> None:
    for number in range(5):
        image(tmp_path / "in" / f"{number}.png", red=51 * number, green=number, blue=0)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "in", out, "--no_images", "--batch_size", str(batch_size)) == 0
    assert [len(rows(out / f"{n}.tsv")) for n in range(5)] == [0, 1, 2, 3, 4]
    assert rows(out / "3.tsv")[0] == [4, 2, 20, 10, 0.6, 0]


def test_a_static_batch_is_filled_up(tmp_path: Path, capsys: Any) -> None:
    static = toy_detector.save(tmp_path / "static.onnx", batch=4)
    for number in range(6):
        image(tmp_path / "in" / f"{number}.png", red=255, green=number % 4 + 1, blue=0)
    out = tmp_path / "out"
    assert run(static, tmp_path / "in", out, "--no_images") == 0
    assert [len(rows(out / f"{n}.tsv")) for n in range(6)] == [1, 2, 3, 4, 1, 2]
    assert run(static, tmp_path / "in", out, "--batch_size", "3") == 1
    assert "takes 4 to 4 images, got 3" in capsys.readouterr().err


# ---- what goes wrong


@pytest.mark.parametrize("share", [0, 0.5])  # of its bytes
def test_an_unreadable_image_is_skipped_and_counted(
    toy: Path, tmp_path: Path, capsys: Any, share: float
) -> None:
    source = tmp_path / "in"
    image(source / "1.png", red=51, green=1, blue=0)
    broken = image(source / "2.png", red=255, green=4, blue=0, size_wh=(960, 640))
    broken.write_bytes(broken.read_bytes()[: int(broken.stat().st_size * share)])
    image(source / "3.png", red=102, green=1, blue=0)
    out = tmp_path / "out"
    assert run(toy, source, out, "--batch_size", "2") == 3
    assert sorted(p.name for p in out.glob("*.tsv")) == ["1.tsv", "3.tsv"]
    found = json.loads((out / "detections.json").read_text())
    assert [(r["image_id"], r["score"]) for r in found] == [(1, 0.2), (3, 0.4)]
    log = capsys.readouterr().err
    assert re.search(r"skipped: .*2\.png: (cannot be decoded|expected an image)", log)
    assert "2 images, 2 detections, 1 images skipped" in log


def test_no_readable_image_is_an_error(toy: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    assert run(toy, tmp_path / "in", tmp_path / "out") == 1
    assert "none of 1 images could be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_engine_is_an_error(tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "a.png", red=51, green=1, blue=0)
    assert run(tmp_path / "no.onnx", tmp_path / "a.png", tmp_path / "out") == 1
    assert "found nothing at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engine", "m.onnx"], "--input and --output are required"),
        (["--engine", "m.onnx", "--input", "a"], "--input and --output are required"),
        (["--input", "a", "--output", "b"], "missing --model FILE|URL"),
        (["--engine", "m", "--benchmark", "--output", "b"], "leave --output out"),
        (["--engine", "m", "--benchmark", "--labels", "b", "--annotations", "c", "--no_images", "--tsv_header", "-t", "0.4"], "leave --labels, --annotations, --no_images, --tsv_header, --score_threshold out"),
        (["--engine", "m", "--benchmark", "--classes", "person"], "leave --classes out"),
        (["--engine", "m", "--input", "a", "--output", "b", "--classes", "person,"], "expected names such as person,car"),
        (["--engine", "m", "--input", "a", "--output", "b", "-v", "--quiet"], "not allowed with argument"),
        (["--engine", "m", "--input", "a", "--output", "b", "--json", "x"], "needs --benchmark"),
        (["--engine", "m", "--input", "a", "--output", "b", "-t", "1.5"], "from 0 to 1"),
        (["--engine", "m", "--input", "a", "--output", "b", "--batch_size", "0"], "at least 1"),
        (["--engine", "m", "--input", "a", "--output", "b", "--devices", "0,0"], "different GPU numbers"),
        (["--engine", "m", "--benchmark", "--threads", "1"], "--threads: is for ONNX files (.onnx), m is taken for an engine"),
        (["--engine", "m", "--benchmark", "--provider", "cpu"], "--provider: is for ONNX files"),
        (["--engine", "m.onnx", "--benchmark", "--devices", "0"], "--devices: is for engines, m.onnx is taken for an ONNX file"),
        (["--engine", "m.onnx", "--benchmark", "--contexts", "1"], "--contexts: is for engines"),
        (["--engine", "m.onnx", "--benchmark", "--no_cuda_graph"], "--no_cuda_graph: is for engines"),
        (["--engine", "m.ONNX", "--benchmark", "--plugins", "a.so", "b.so"], "--plugins: is for engines"),
        (["--engine", "m.onnx", "--benchmark", "--allow_host_code"], "--allow_host_code: is for engines"),
    ],
)  # fmt: skip
def test_usage(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        infer.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def detections(count: int = 1) -> Detections:
    return Detections(
        np.ones((count, 4), np.float32), np.ones(count, np.float32), np.zeros(count, np.int32)
    )


def found(number: int) -> Found:
    return Found([Path(f"{number}.jpg")], [detections()])


def writer(output: Path, count: int) -> Any:
    paths = [Path(f"{n}.jpg") for n in range(count)]
    spec = ModelSpec.from_onnx(toy_detector.model())
    return results_writer.result_writer(
        output,
        spec,
        names={path: path.stem for path in paths},
        image_ids={path: int(path.stem) for path in paths},
        pictures=False,
    )


def test_an_output_directory_that_disappears_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="has disappeared during the run"):  # noqa: SIM117
        with writer(out, 200) as results:
            results.write(found(0))
            out.rename(tmp_path / "elsewhere")
            for number in range(1, 200):
                results.write(found(number))
    # Threads that had passed their check may have made the directory once more, but nobody goes on
    # filling it.
    assert not (out / "detections.json").exists()
    assert len(list(out.glob("*.tsv"))) <= machine.available_cores()


def test_an_output_directory_that_is_replaced_is_noticed_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="has disappeared"), writer(out, 1):
        out.rename(tmp_path / "elsewhere")
        out.mkdir()


def test_an_output_directory_that_disappears_before_the_first_result(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    out = tmp_path / "out"
    image(tmp_path / "in" / "a.png", red=51, green=1, blue=0)

    def move_and_fail(*_: Any, **__: Any) -> None:
        out.rename(tmp_path / "elsewhere")
        raise FileNotFoundError(2, "No such file or directory", str(out / ".manifest.json"))

    monkeypatch.setattr(RunFolder, "start", move_and_fail)
    assert run(toy, tmp_path / "in", out) == 1
    assert f"error: --output: {out} has disappeared during the run; its results are lost, run again\n" in capsys.readouterr().err  # fmt: skip


def test_a_result_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"cannot write the results of 1\.jpg"):  # noqa: SIM117
        with writer(out, 3) as results:
            (out / "1.tsv").mkdir()  # a directory where the file should go
            for number in range(3):
                results.write(found(number))
    assert not (out / "detections.json").exists()
    assert list(out.glob(".*")) == []  # no temporary file is left


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: detections.json is the first to reach
    it.
    """
    import resource

    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"--output: cannot write \S+/detections\.json: File too large; make room, or choose another folder"):  # fmt: skip  # noqa: SIM117
            with writer(out, 300) as results:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
                for number in range(300):
                    results.write(found(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (out / "detections.json").exists()
    assert list(out.glob(".*")) == []


def test_an_output_that_is_a_file_is_an_error(toy: Path, tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "in" / "a.png", red=51, green=1, blue=0)
    (tmp_path / "out").write_text("")
    for output in (tmp_path / "out", tmp_path / "out" / "deep"):
        assert run(toy, tmp_path / "in", output) == 1
        assert f"error: --output: expected a folder, {tmp_path / 'out'} is a file; choose another name\n" in capsys.readouterr().err  # fmt: skip


def test_a_benchmark_that_cannot_be_written_is_refused_first(toy: Path, tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    assert infer.main(["--model", str(toy), "--benchmark", "2", "--json", str(tmp_path / "file" / "x.json")]) == 1  # fmt: skip
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err and "Throughput" not in captured.out


def test_a_slow_disk_holds_the_runtime_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write_tsv = image_files.write_tsv

    def wait_then_write(*args: Any, **options: Any) -> None:
        go.wait(30)
        write_tsv(*args, **options)

    monkeypatch.setattr(image_files, "write_tsv", wait_then_write)
    taken: list[int] = []
    with writer(tmp_path / "out", 100) as results:

        def produce() -> None:
            for number in range(100):
                results.write(found(number))
                taken.append(number)

        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(0.5)
        assert producer.is_alive()
        each = results_writer.ResultWriter.PENDING[False, False]
        assert len(taken) == machine.available_cores() * each < 100
        go.set()
        producer.join(30)
    assert len(taken) == 100
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [r["image_id"] for r in written] == list(range(100))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (EngineError("device lost"), 1, r"error: batch 12: device lost \(images: .*2\.png\)"),
    ],
)
def test_a_run_that_is_cut_off_leaves_no_threads_and_no_json(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    for number in range(30):
        image(tmp_path / "in" / f"{number}.png", red=51, green=1, blue=0)
    infer_batch, calls = OnnxRuntime._infer, []

    def fail_at_the_third(self: OnnxRuntime, images: Any, session: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 13:  # "2.png", sorted as text: 0 1 10 .. 19 2
            raise error
        return infer_batch(self, images, session)

    monkeypatch.setattr(OnnxRuntime, "_infer", fail_at_the_third)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "in", out) == status
    assert re.search(message, capsys.readouterr().err)
    assert len(calls) == 13
    assert not (out / "detections.json").exists()
    assert list(out.glob(".*")) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c(toy: Path, tmp_path: Path) -> None:
    first = image(tmp_path / "in" / "0.png", red=51, green=4, blue=0, size_wh=(2000, 1500))
    for number in range(1, 200):
        os.link(first, tmp_path / "in" / f"{number}.png")
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "infer.py"),
        "-e",
        str(toy),
        "-i",
        str(first.parent),
        "-o",
        str(out),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(out.glob("*.png")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 130
    assert log.splitlines()[-1] == "interrupted"
    assert 0 < len(list(out.glob("*.tsv"))) < 200
    assert not (out / "detections.json").exists()
    assert list(out.glob(".*")) == []


# ---- --benchmark


def test_benchmark_prints_trtexecs_summary(toy: Path, tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "in" / "a.png", red=51, green=1, blue=0)
    report = tmp_path / "bench.json"
    argv = ["--engine", str(toy), "--input", str(tmp_path / "in"), "--benchmark", "30"]
    assert infer.main([*argv, "--batch_size", "2", "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d.e+-]+"
    time = rf"= {number} ms"
    patterns = [
        "Batch size: 2",
        "=== Performance summary ===",
        rf"Throughput: {number} qps \({number} images/s\)",
        rf"Latency: min {time}, max {time}, mean {time}, median {time}, "
        rf"percentile\(90%\) {time}, percentile\(95%\) {time}, percentile\(99%\) {time}",
        rf"Total Host Walltime: {number} s",
        rf"End to end from files: {number} images/s, [\d.]+% of the above",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    data = json.loads(report.read_text())
    assert (data["batch_size"], data["iterations"], data["warmup"]) == (2, 30, benchmark.WARMUP)
    assert (data["model"], data["input"]) == ("toy.onnx", "images")
    latency = data["Latency"]
    assert 0 < latency["min"] <= latency["median"] <= latency["percentile(90%)"]
    assert latency["percentile(90%)"] <= latency["percentile(99%)"] <= latency["max"]
    assert data["Throughput (qps)"] == pytest.approx(30 / data["Total Host Walltime (s)"])
    assert data["images_per_second"] == pytest.approx(2 * data["Throughput (qps)"])
    assert data["end_to_end"]["images_per_second"] > 0
    assert data["machine"]["cpu_cores"] >= 1


def test_benchmark_on_noise(toy: Path, capsys: Any) -> None:
    assert infer.main(["--engine", str(toy), "--benchmark", "5"]) == 0
    out = capsys.readouterr().out
    assert "Latency: min" in out
    assert "End to end" not in out


@pytest.mark.parametrize("source", [True, False])
def test_benchmark_of_a_batch_that_does_not_fit_names_the_option(
    tmp_path: Path, capsys: Any, source: bool
) -> None:
    fixed = toy_detector.save(tmp_path / "fixed.onnx", batch=4)
    image(tmp_path / "a.jpg", red=10, green=20, blue=30)
    argv = ["--engine", str(fixed), "--benchmark", "5", "--batch_size", "9"]
    assert infer.main([*argv, *(["--input", str(tmp_path / "a.jpg")] if source else [])]) == 1
    assert (
        "error: --batch_size: the model takes 4 to 4 images, got 9; leave it out, or build the engine for it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("count", "skip", "expected"),
    [
        (50, 20, 10 / 20),  # results 21 to 30, two seconds each
        (5, 20, 5 / 10),  # too few to leave any out
        (4, 0, 4 / 8),
    ],
)
def test_images_per_second(
    monkeypatch: pytest.MonkeyPatch, count: int, skip: int, expected: float
) -> None:
    now = [0.0]

    def results() -> Iterator[Any]:
        for _ in range(count):
            now[0] += 2
            yield None
        now[0] += 1  # clearing up

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    assert benchmark.images_per_second(results(), skip=skip) == pytest.approx(expected)


def test_benchmark_needs_a_readable_image(toy: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    assert (
        infer.main(["--engine", str(toy), "--input", str(tmp_path / "a.jpg"), "--benchmark", "5"])
        == 1
    )
    assert "none of" in capsys.readouterr().err


def test_ray_is_asked_for_before_anything_else(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    image(tmp_path / "in" / "a.png", red=51, green=1, blue=0)
    assert run(toy, tmp_path / "in", tmp_path / "out", "--ray", "local") == 1
    error = capsys.readouterr().err
    assert "error: --ray needs Ray" in error and "requirements-ray.txt" in error
    assert not (tmp_path / "out").exists()


# ---- what goes in, what is shown


def test_several_inputs_and_globs(toy: Path, tmp_path: Path, capsys: Any) -> None:
    """Names are relative to the folder that all inputs are in; an image that is named twice
    counts once.
    """
    for name in ("a/1.png", "a/2.png", "b/1.png", "c.png"):
        image(tmp_path / "in" / name, red=204, green=2, blue=1)
    (tmp_path / "in" / "notes.txt").write_text("x")
    given = [tmp_path / "in" / "a", tmp_path / "in" / "b" / "*", tmp_path / "in" / "a" / "2.png", tmp_path / "in" / "*.*"]  # fmt: skip
    out = tmp_path / "out"
    line = ["--model", toy, "--input", *given[:2], "--input", *given[2:], "--output", out]
    assert infer.main([str(word) for word in line]) == 0
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.tsv")} == {"a/1.tsv", "a/2.tsv", "b/1.tsv", "c.tsv"}  # fmt: skip
    ids = [row["image_id"] for row in json.loads((out / "detections.json").read_text())]
    assert list(dict.fromkeys(ids)) == ["a/1.png", "a/2.png", "b/1.png", "c.png"]
    assert "--input: 1 files are no images" in capsys.readouterr().err


def test_a_glob_of_nothing(toy: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(toy, tmp_path / "*.jpg", tmp_path / "out") == 1
    assert "--input: expected an image or a folder of images, found nothing at" in capsys.readouterr().err  # fmt: skip


def test_num_images_are_spread(toy: Path, tmp_path: Path) -> None:
    for number in range(10):
        image(tmp_path / "in" / f"{number}.png", red=204, green=2, blue=1)
    assert run(toy, tmp_path / "in", tmp_path / "out", "--num_images", "3") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tsv")) == ["0.tsv", "4.tsv", "9.tsv"]


def test_pictures_show_what_is_likely_and_files_keep_all(
    toy: Path, tmp_path: Path, capsys: Any
) -> None:
    """Detections of 0.8 in one image, of 0.2 in another: those are drawn, with --draw_threshold
    0 all.
    """
    path = image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    other = image(tmp_path / "in" / "b.png", red=51, green=2, blue=1)
    for options, likely in (((), 1), (("--draw_threshold", "0"), 2)):
        out = tmp_path / f"out{likely}"
        assert run(toy, tmp_path / "in", out, *options) == 0
        found = [len(rows(out / f"{name}.tsv")) for name in "ab"]
        changed = [
            int((cv2.imread(str(out / p.name)) != cv2.imread(str(p))).any()) for p in (path, other)
        ]
        assert found == [2, 2] and sum(changed) == likely
    assert (
        "pictures show detections from a score of 0.3 on; 2 are below it (--draw_threshold)"
        in capsys.readouterr().err
    )


def test_class_names_go_beside_the_tsvs(toy: Path, tmp_path: Path) -> None:
    """visualize.py draws the same pictures from them."""
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1, size_wh=(96, 64))
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(toy, tmp_path / "in", out) == 0
    names = (out / "labels.txt").read_text().splitlines()
    assert len(names) == ModelSpec.from_onnx(onnx.load(toy)).num_classes
    line = ["--input", tmp_path / "in", "--detections", out, "--output", again]
    assert visualize.main([str(word) for word in line]) == 0
    np.testing.assert_array_equal(cv2.imread(str(again / "a.png")), cv2.imread(str(out / "a.png")))


@pytest.mark.parametrize("recursive", [False, True])
def test_drawings_are_never_read(toy: Path, tmp_path: Path, capsys: Any, recursive: bool) -> None:
    image(tmp_path / "in" / "a.jpg", red=204, green=2, blue=1)
    inside = tmp_path / "in" / "found"
    options = ["--recursive"] if recursive else []
    assert run(toy, tmp_path / "in", inside, *options) == int(recursive)
    assert run(toy, tmp_path / "in", tmp_path / "in", *options) == 1
    assert f"choose another, such as --output {tmp_path / 'in_out'}" in capsys.readouterr().err  # fmt: skip
    assert run(toy, tmp_path / "in" / "a.jpg", tmp_path / "in") == 1
    assert run(toy, tmp_path / "in", tmp_path / "in", "--no_images") == 0  # nothing is drawn


def test_results_of_an_earlier_run_are_named(toy: Path, tmp_path: Path, capsys: Any) -> None:
    image(tmp_path / "one" / "a.png", red=204, green=2, blue=1)
    image(tmp_path / "two" / "b.png", red=204, green=2, blue=1)
    assert run(toy, tmp_path / "one", tmp_path / "out") == 0
    assert "earlier run" not in capsys.readouterr().err
    assert run(toy, tmp_path / "two", tmp_path / "out") == 0
    assert "has 2 files of an earlier run that this one does not write, such as a.png; they are kept (--clean removes them)" in capsys.readouterr().err  # fmt: skip
    (tmp_path / "out" / "manifest.json").unlink()
    assert run(toy, tmp_path / "two", tmp_path / "out") == 0
    assert "has results of 1 other images, which no manifest lists; they are kept" in capsys.readouterr().err  # fmt: skip


def test_old_results_of_images_that_cannot_be_read_now_are_named(toy: Path, tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    """They are of another picture of that name; nobody removes them."""
    for name in ("a.png", "b.png"):
        image(tmp_path / "in" / name, red=204, green=2, blue=1)
    assert run(toy, tmp_path / "in", tmp_path / "out") == 0
    old = (tmp_path / "out" / "a.tsv").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    assert run(toy, tmp_path / "in", tmp_path / "out") == 3
    assert f"{tmp_path / 'out'} has results of an earlier run of images that could not be read now, such as a.tsv" in capsys.readouterr().err  # fmt: skip
    assert (tmp_path / "out" / "a.tsv").read_bytes() == old
    assert "a.tsv" in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert run(toy, tmp_path / "in", tmp_path / "out", "--clean") == 3
    assert "could not be read now" not in capsys.readouterr().err
    assert names(tmp_path / "out") == ["b.png", "b.tsv", "detections.json", "labels.txt", "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("name", ["out/a.tsv", "out/a.png", "out/detections.json", "out/labels.txt", "out/manifest.json", "out/detections.partial.jsonl", "in/a.png", "toy.onnx"])  # fmt: skip
def test_a_report_replaces_nothing_that_is_read_or_written(name: str, toy: Path, tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    """By a link, as its own name ends in .html."""
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    (tmp_path / "page.html").symlink_to(name)
    assert run(toy, tmp_path / "in", tmp_path / "out", "--report", str(tmp_path / "page.html")) == 1
    assert "page.html: is an input, or written twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())  # fmt: skip


def test_clean_removes_what_the_manifest_lists(toy: Path, tmp_path: Path, capsys: Any) -> None:
    """Not the user's own files, not what a later run writes, and nothing beyond the folder."""
    image(tmp_path / "one" / "street" / "a.png", red=204, green=2, blue=1)
    image(tmp_path / "one" / "c.png", red=204, green=2, blue=1)
    image(tmp_path / "two" / "b.png", red=204, green=2, blue=1)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "one", out, "--recursive") == 0
    assert names(out) == ["c.png", "c.tsv", "detections.json", "labels.txt", "manifest.json", "street/a.png", "street/a.tsv"]  # fmt: skip
    (out / "notes.tsv").write_text("mine")
    (out / "street" / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert run(toy, tmp_path / "two", out, "--clean", "--no_images") == 0
    assert "--clean: removed 7 files of an earlier run" in capsys.readouterr().err
    assert names(out) == ["b.tsv", "detections.json", "labels.txt", "manifest.json", "notes.tsv", "street/mine.txt"]  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["files"] == ["b.tsv", "detections.json", "labels.txt"]  # fmt: skip


def test_a_page_is_a_file_of_the_run(toy: Path, tmp_path: Path, capsys: Any) -> None:
    """It is listed, named when it is stale, and cleaned."""
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    out = tmp_path / "out"
    assert run(toy, tmp_path / "in", out, "--report", str(out / "index.html")) == 0
    assert "index.html" in json.loads((out / "manifest.json").read_text())["files"]
    assert run(toy, tmp_path / "in", out) == 0
    assert "has 1 files of an earlier run that this one does not write, such as index.html" in capsys.readouterr().err  # fmt: skip
    assert run(toy, tmp_path / "in", out, "--clean") == 0
    assert names(out) == ["a.png", "a.tsv", "detections.json", "labels.txt", "manifest.json"]


def test_a_run_that_fails_cleans_nothing(toy: Path, tmp_path: Path) -> None:
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    assert run(toy, tmp_path / "in", tmp_path / "out") == 0
    before = names(tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    assert run(toy, tmp_path / "bad", tmp_path / "out", "--clean") == 1
    assert run(toy, tmp_path / "in", tmp_path / "out", "--clean", "--classes", "nothing") == 1
    assert names(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["../photo.png", "/etc/passwd", ""])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(name: str, toy: Path, tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    image(tmp_path / "photo.png", red=204, green=2, blue=1)
    (tmp_path / "out").mkdir()
    record = {"schema": 1, "complete": True, "run": {}, "suffixes": [], "files": [name]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(record))
    assert run(toy, tmp_path / "in", tmp_path / "out", "--clean") == 1
    assert "expected names within the folder" in capsys.readouterr().err
    assert (tmp_path / "photo.png").is_file()


def test_clean_follows_no_link_out_of_the_folder(toy: Path, tmp_path: Path) -> None:
    image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    image(tmp_path / "mine" / "b.png", red=204, green=2, blue=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "street").symlink_to(tmp_path / "mine")
    record = {"schema": 1, "complete": True, "run": {}, "suffixes": [], "files": ["street/b.png"]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(record))
    assert run(toy, tmp_path / "in", tmp_path / "out", "--clean") == 0
    assert (tmp_path / "mine" / "b.png").is_file()


class Broken(Exception):
    """A run that ends in the middle."""


def break_off(toy: Path, source: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:  # fmt: skip
    """A run whose writer gets results of `after` images."""
    write = results_writer.ResultWriter.write
    count = 0

    def write_some(self: Any, found: Found) -> None:
        nonlocal count
        part = found[: after - count]
        if part:
            write(self, part)
        count += len(part)
        if len(part) < len(found):
            self._submit()
            while self._pending:
                self._collect()
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(results_writer.ResultWriter, "write", write_some)
        with pytest.raises(Broken):
            run(toy, source, out, *options)


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("options", [(), ("--no_images",), ("--tsv_header", "--batch_size", "1")])
def test_a_run_that_was_broken_off_goes_on(processes: bool, options: tuple[str, ...], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    """The files are those of one run, to the last byte; what is done is not run again, not even
    read.
    """
    for number in range(9):
        image(
            tmp_path / "in" / f"{number}.png", red=100 + number, green=number % 5, blue=number % 2
        )
    (tmp_path / "in" / "5b.png").write_bytes(b"no image")
    assert run(toy, tmp_path / "in", tmp_path / "whole", *options) == 3
    monkeypatch.setattr(run_infer, "writes_in_processes", lambda *_: processes)
    out = tmp_path / "out"
    break_off(toy, tmp_path / "in", out, 4, monkeypatch, *options)
    assert not (out / "detections.json").exists() and not json.loads((out / "manifest.json").read_text())["complete"]  # fmt: skip
    done = (out / "detections.partial.jsonl").read_text().splitlines()
    assert len(done) == 4
    with (out / "detections.partial.jsonl").open("a") as file:
        file.write('{"name": "4", "id": 4, "te')  # cut in the middle
    (out / "2.tsv").unlink()  # is missing, so it is made again
    capsys.readouterr()
    read: list[str] = []
    load = source_files.load_image
    monkeypatch.setattr(source_files, "load_image", lambda path, *a, **k: read.append(path.name) or load(path, *a, **k))  # fmt: skip
    assert run(toy, tmp_path / "in", out, "--resume", *options) == 3
    log = capsys.readouterr().err
    assert "--resume: 3 of 10 images are done already" in log
    assert "9 images, " in log and "3 of these images were done before" in log
    assert sorted(read) == ["2.png", "4.png", "5.png", "5b.png", "6.png", "7.png", "8.png"]
    assert names(out) == names(tmp_path / "whole")
    for name in names(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("linked", [False, True])
def test_other_weights_in_a_file_of_their_own_are_another_model(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The weights lie beside the file itself, not beside a link to it."""
    (tmp_path / "models").mkdir()
    model = toy_detector.save_split(tmp_path / "models" / "split.onnx")
    if linked:
        (tmp_path / "link.onnx").symlink_to(model)
        model = tmp_path / "link.onnx"
    for number in range(3):
        image(tmp_path / "in" / f"{number}.png", red=100 + number, green=number % 5, blue=0)
    break_off(model, tmp_path / "in", tmp_path / "out", 2, monkeypatch)
    toy_detector.save_split(tmp_path / "models" / "split.onnx", shares=(1, 0.5, 0.25, 0.125))
    capsys.readouterr()
    assert run(model, tmp_path / "in", tmp_path / "out", "--resume") == 1
    assert "has results of a run with another model; finish that one" in capsys.readouterr().err
    toy_detector.save_split(tmp_path / "models" / "split.onnx")
    assert run(model, tmp_path / "in", tmp_path / "out", "--resume") == 0
    assert "--resume: 2 of 3 images are done already" in capsys.readouterr().err


def test_another_run_is_not_gone_on_with(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    for number in range(3):
        image(tmp_path / "in" / f"{number}.png", red=100 + number, green=number % 5, blue=0)
    break_off(toy, tmp_path / "in", tmp_path / "out", 2, monkeypatch)
    capsys.readouterr()
    assert run(toy, tmp_path / "in", tmp_path / "out", "--resume", "--score_threshold", "0.3") == 1
    assert "has results of a run with another score_threshold; finish that one" in capsys.readouterr().err  # fmt: skip
    assert run(toy, tmp_path / "in", tmp_path / "out") == 0  # anew
    assert "has a run that was broken off; this one begins anew (--resume goes on with it)" in capsys.readouterr().err  # fmt: skip
    assert run(toy, tmp_path / "in", tmp_path / "out", "--resume") == 0
    assert "has no run that was broken off; it begins anew" in capsys.readouterr().err
    assert not (tmp_path / "out" / "detections.partial.jsonl").exists()


def test_other_images_of_the_same_names_are_not_done(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Another folder, and a picture that was replaced: the run that was broken off does not fit."""
    for day, red in (("a", 100), ("b", 200)):
        for number in range(4):
            image(tmp_path / day / f"{number}.png", red=red + number, green=number % 5, blue=0)
    for day in "ab":
        assert run(toy, tmp_path / day, tmp_path / f"whole {day}") == 0
    break_off(toy, tmp_path / "a", tmp_path / "out", 2, monkeypatch)
    assert run(toy, tmp_path / "b", tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "0.tsv").read_bytes() == (tmp_path / "whole b" / "0.tsv").read_bytes()  # fmt: skip
    break_off(toy, tmp_path / "a", tmp_path / "again", 2, monkeypatch)
    shutil.copyfile(tmp_path / "b" / "0.png", tmp_path / "a" / "0.png")
    assert run(toy, tmp_path / "a", tmp_path / "again", "--resume") == 0
    assert (tmp_path / "again" / "0.tsv").read_bytes() == (tmp_path / "whole b" / "0.tsv").read_bytes()  # fmt: skip
    assert (tmp_path / "again" / "1.tsv").read_bytes() == (tmp_path / "whole a" / "1.tsv").read_bytes()  # fmt: skip


def test_clean_removes_only_what_was_written(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Of a run that was broken off, not what it would have written."""
    for number in range(4):
        image(tmp_path / "in" / f"{number}.png", red=100 + number, green=number % 5, blue=0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "3.png").write_bytes(b"mine")
    break_off(toy, tmp_path / "in", out, 2, monkeypatch)
    (tmp_path / "other").mkdir()
    shutil.copyfile(tmp_path / "in" / "0.png", tmp_path / "other" / "x.png")
    assert run(toy, tmp_path / "other", out, "--clean") == 0
    assert names(out) == [
        "3.png",
        "detections.json",
        "labels.txt",
        "manifest.json",
        "x.png",
        "x.tsv",
    ]
    assert (out / "3.png").read_bytes() == b"mine"


def test_all_images_may_be_done(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was broken off between the last image and detections.json."""
    for number in range(3):
        image(tmp_path / "in" / f"{number}.png", red=100 + number, green=number % 5, blue=0)
    assert run(toy, tmp_path / "in", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(results_writer.ResultWriter, "finish", lambda self: [self._collect() for _ in tuple(self._pending)] and 1 / 0)  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            run(toy, tmp_path / "in", tmp_path / "out")
    assert run(toy, tmp_path / "in", tmp_path / "out", "--resume") == 0
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    whole, found = (json.loads((tmp_path / f / "detections.json").read_text()) for f in ("whole", "out"))  # fmt: skip
    assert found == whole


# ---- what is no model


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("saved/saved_model.pb", b"x", "saved is a SavedModel; convert it: create_onnx.py --saved_model "),
        ("folder/x", b"x", "expected an engine or an ONNX file, found a folder at "),
        ("frozen.pb", b"x", "frozen.pb is a TensorFlow graph; convert the SavedModel folder"),
        ("best.pt", b"PK", "best.pt is a PyTorch model; export it to ONNX"),
        ("d0.engine.json", b"{}", "d0.engine.json is a JSON file; name the engine that it stands beside"),
        ("d0.engine", b"", "d0.engine is an empty file"),
        ("labels.txt", b"person\ncar\n", "labels.txt is a text file"),
        ("d0.engine", b"PK\x03\x04" + bytes(600), "d0.engine is a ZIP archive"),
        ("d0.engine", b"some text\n", "d0.engine is a text file"),
        ("d0.engine", b"\x08\x08\x12\x06trtdet", "d0.engine is an ONNX file (name it .onnx)"),
    ],
)  # fmt: skip
def test_what_is_no_model(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: Any
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    photo = image(tmp_path / "in" / "a.png", red=204, green=2, blue=1)
    model = path if path.parent == tmp_path else path.parent
    assert infer.main(["--model", str(model), "--input", str(photo), "--output", str(tmp_path / "out")]) == 1  # fmt: skip
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert message in line
    assert line.startswith("error: --model: expected an engine or an ONNX file, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "b", "--ray", "local", "--image_format", "jpg", "--draw_threshold", "0"], "--ray writes no pictures; leave --draw_threshold, --image_format out"),
        (["-o", "b", "--ray", "local", "--image_format", "png"], "leave --image_format out"),
        (["--benchmark", "--image_format", "jpg"], "--benchmark writes no detections; leave --image_format out"),
        (["--benchmark", "--draw_threshold", "0"], "--benchmark writes no detections; leave --draw_threshold out"),
        (["--benchmark", "--score_threshold", "0"], "--benchmark writes no detections; leave --score_threshold out"),
        (["-o", "b", "--ray", "local", "--report", "r.html"], "--report: not with --ray"),
        (["-o", "b", "--embed"], "--embed goes with --report"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as status:
        infer.parse_args(["--model", "m.onnx", "-i", "a", *options])
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_pictures_have_their_defaults() -> None:
    args = infer.parse_args(["--model", "m.onnx", "-i", "a", "-o", "b"])
    assert (args.draw_threshold, args.image_format) == (0.3, "png")
    args = infer.parse_args(["--model", "m.onnx", "-i", "a", "-o", "b", "--draw_threshold", "0", "--image_format", "jpg"])  # fmt: skip
    assert (args.draw_threshold, args.image_format) == (0.0, "jpg")
