# SPDX-License-Identifier: Apache-2.0
"""`--ray` on a real Ray cluster of two workers on this machine, and what of
trtdet/run/ray_cluster.py needs none.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray.data", reason="needs requirements-ray.txt")

import deploy_models
import pyarrow.parquet
import toy_detector

from trtdet import files
from trtdet.commands import cli, infer
from trtdet.detections import Detections
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, sidecar_path, write_engine
from trtdet.errors import EngineError
from trtdet.run import ray, ray_cluster
from trtdet.run.detect import model_identity, run_identity
from trtdet.run.options import RunOptions
from trtdet.run.ray_cluster import Results, Workers, plan_workers
from trtdet.spec import METADATA_KEY, ModelSpec

IMAGES = 60


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_detector.save(tmp_path_factory.mktemp("toy") / "toy.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which every one has other detections, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        path = folder / f"{number:03d}.png"
        toy_detector.image(path, red=100 + number, green=number % 5, blue=number % 2)
    (folder / "030b.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def alone(toy: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one process."""
    output = tmp_path_factory.mktemp("alone")
    arguments = ["--engine", str(toy), "--input", str(photos), "--output", str(output)]
    assert infer.main([*arguments, "--no_images"]) == 3
    return output


def check_outputs(output: Path, alone: Path, photos: Path) -> None:
    """The same files to the last byte, and the same numbers in detections.parquet."""
    expected = {path.name: path.read_bytes() for path in alone.iterdir()}
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    parquet = pyarrow.parquet.read_table(output / "detections.parquet")
    del found["detections.parquet"]
    listed = [set(json.loads(files["manifest.json"])["files"]) for files in (found, expected)]
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected
    assert listed[0] - listed[1] == {"detections.parquet"} and listed[1] - listed[0] == set()
    spec = ModelSpec.from_json(parquet.schema.metadata[METADATA_KEY.encode()].decode())
    assert spec.category_ids == toy_detector.CATEGORY_IDS
    rows = parquet.to_pylist()
    assert [row["path"] for row in rows] == [str(path) for path in sorted(photos.iterdir())]
    assert [row["path"][-8:] for row in rows if row["error"]] == ["030b.jpg"]
    entries = json.loads((output / "detections.json").read_text())
    scores = [score for row in rows for score in row["scores"] or ()]
    np.testing.assert_allclose(scores, [entry["score"] for entry in entries], atol=1e-6)


def ray_main(toy: Path, photos: Path, output: Path) -> int:
    arguments = ["--engine", str(toy), "--input", str(photos), "--output", str(output)]
    return infer.main([*arguments, "--ray", "local", "--ray_workers", "2"])


# ---- without a cluster


@pytest.mark.parametrize(
    ("resources", "wanted", "threads", "on_gpu", "expected"),
    [
        ({"CPU": 2}, None, 1, False, Workers(2, 1, 0)),
        ({"CPU": 16, "GPU": 4}, None, 4, False, Workers(4, 4, 0)),  # a CPU run takes no GPU
        ({"CPU": 16, "GPU": 4}, None, 1, True, Workers(4, 4, 1)),  # the cores are shared out
        ({"CPU": 16, "GPU": 4}, 2, 1, True, Workers(2, 8, 1)),
        ({"CPU": 2, "GPU": 4}, None, 1, True, Workers(4, 1, 1)),
    ],
)
def test_workers_are_what_fits(resources, wanted, threads, on_gpu, expected):
    assert plan_workers(resources, wanted=wanted, threads=threads, on_gpu=on_gpu) == expected


@pytest.mark.parametrize(
    ("resources", "wanted", "on_gpu", "message"),
    [
        ({"CPU": 8}, None, True, "some workers of a GPU each do not fit a cluster of 8 CPU cores and 0 GPUs"),
        ({"CPU": 2}, 3, False, "3 workers of 1 CPU cores each do not fit.*--ray_workers"),
    ],
)  # fmt: skip
def test_workers_that_do_not_fit_are_refused(resources, wanted, on_gpu, message):
    with pytest.raises(ValueError, match=message):
        plan_workers(resources, wanted=wanted, threads=1, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("images", "multiple", "expected"),
    [(1, 8, 8), (100, 8, 8), (129, 8, 16), (10**6, 8, 256), (10**6, 48, 288), (0, 1, 1)],
)
def test_chunks_are_multiples_of_the_batch(images, multiple, expected):
    assert Workers(2, 1, 0).chunk_size(images, multiple) == expected


@pytest.mark.parametrize("rotated", [False, True])
def test_rows_keep_every_bit(rotated):
    random = np.random.default_rng(0)
    boxes, scores = random.random((3, 4), np.float32), random.random(3, np.float32)
    angles = random.random(3, np.float32) if rotated else None
    full = Detections(boxes, scores, np.array([2, 0, 1], np.int32), angles)
    empty = Detections(boxes[:0], scores[:0], np.zeros(0, np.int32), None if angles is None else angles[:0])  # fmt: skip
    table = ray_cluster.to_table(
        [(Path("/a"), full), (Path("/b"), empty), (Path("/c"), "no image")]
    )
    *detections, error = [ray_cluster.from_row(row) for row in table.to_pylist()]
    assert error == "no image"
    for found, expected in zip(detections, (full, empty), strict=True):
        for name in ("boxes_xyxy", "scores", "class_ids", "angles"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype


def test_results_of_another_run_are_not_mixed_in(tmp_path):
    with Results(tmp_path / "partial", {"engine": "a", "size": (8, 9)}) as results:
        results.add(ray_cluster.to_table([(Path("/a.jpg"), "broken")]))
    with Results(tmp_path / "partial", {"engine": "a", "size": (8, 9)}) as again:
        assert again.done == {"/a.jpg"}
    with pytest.raises(ValueError, match="another model or other options; finish that one, or remove the folder"):  # fmt: skip
        Results(tmp_path / "partial", {"engine": "b"})
    record = tmp_path / "partial" / "run.json"
    assert json.loads(record.read_text()) == {"schema": 1, "run": {"engine": "a", "size": [8, 9]}}
    for text, message in (('{"schema": 2}', "expected schema 1, found 2"), ("{", "expected JSON in UTF-8")):  # fmt: skip
        record.write_text(text)
        with pytest.raises(ValueError, match=rf"run\.json: {message}.*; remove the folder"):
            Results(tmp_path / "partial", {"engine": "a", "size": (8, 9)})


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "grpc://h/m", "--ray", "local"],
        ["--engine", "m", "--ray", "local", "--benchmark"],
        ["--engine", "m", "--ray", "local", "--devices", "0,1"],
        ["--engine", "m", "--ray_workers", "2"],
    ],
)
def test_wrong_usage(options):
    with pytest.raises(SystemExit) as status:
        infer.parse_args([*options, *([] if "--benchmark" in options else ["-i", "a", "-o", "b"])])
    assert status.value.code == 2


def test_a_worker_keeps_the_classes_it_is_asked_for(toy, photos):
    paths = sorted(photos.iterdir())
    every = dict(ray.PathDetector(toy, RunOptions())(paths))
    some = dict(ray.PathDetector(toy, RunOptions(), (1,))(paths))
    kept = 0
    for path, found in some.items():
        if not isinstance(found, str):
            assert set(found.class_ids.tolist()) <= {1}
            assert len(found) == (every[path].class_ids == 1).sum()
            kept += len(found)
    assert kept > 0
    options = RunOptions(score_threshold=0.0)
    assert run_identity("a", options, (1,)) != run_identity("a", options)


def test_an_engine_is_hashed_once(tmp_path, monkeypatch):
    engine = tmp_path / "x.engine"
    info = EngineInfo(deploy_models.D0, "tensorrt", "10.3.0", "fp16", BatchRange(1, 1, 1))
    hashed = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    write_engine(engine, b"plan", info)
    assert hashed == []  # the bytes are at hand
    spec, identity = ray.read_spec_and_identity(engine)
    assert spec == deploy_models.D0 and hashed == ["x.engine", "x.engine.json"]
    assert identity == model_identity(engine)  # as a run on one machine has it
    hashed.clear()
    sidecar_path(engine).write_text(json.dumps(info.to_dict()))  # without a hash
    spec, other = ray.read_spec_and_identity(engine)
    assert spec == deploy_models.D0 and hashed == ["x.engine", "x.engine.json"]
    assert other != identity and len(other) == 64


def test_results_of_other_weights_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """The weights lie in a file of their own: the ONNX file beside it stays the same."""
    model = toy_detector.save_split(tmp_path / "split.onnx")
    text = model.read_bytes()
    toy_detector.image(tmp_path / "in/a.png", red=204, green=2, blue=1)

    def broken_off(*arguments):
        detect_here(*arguments)
        raise ValueError("broken off")

    def run():
        arguments = ["--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out"]
        status = infer.main([*map(str, arguments), "--ray", "local"])
        return status, capsys.readouterr().err

    monkeypatch.setattr(ray, "detect_on_ray", broken_off)
    assert run()[0] == 1
    monkeypatch.setattr(
        ray, "detect_on_ray", lambda *a: Results(a[2] / ray.PARTIAL, a[6]).__enter__()
    )
    toy_detector.save_split(model, shares=(1, 0.5, 0.25, 0.125))
    assert model.read_bytes() == text
    status, said = run()
    assert status == 1 and "has results of a run with another model" in said
    toy_detector.save_split(model)
    assert run()[0] == 0


def detect_here(engine, paths, output, options, address, workers, identity):
    """A stand-in for the cluster: this process does its work."""
    detector = ray.PathDetector(engine, options)
    with Results(output / ray.PARTIAL, identity) as results:
        results.add(ray_cluster.to_table(detector(paths)))


def test_what_an_earlier_run_left_is_named_and_cleaned(toy, tmp_path, monkeypatch, capsys):
    """As without --ray."""
    monkeypatch.setattr(ray, "detect_on_ray", detect_here)
    for name in ("one/a.png", "one/b.png", "two/b.png"):
        toy_detector.image(tmp_path / name, red=204, green=2, blue=1)
    out = tmp_path / "out"

    def run(source, *options):
        arguments = ["--engine", toy, "--input", tmp_path / source, "--output", out]
        status = infer.main([str(word) for word in (*arguments, *options)])
        return status, capsys.readouterr().err, sorted(path.name for path in out.iterdir())

    always = ["b.tsv", "detections.json", "detections.parquet", "labels.txt", "manifest.json"]
    assert run("one")[0] == 0  # with pictures, on this machine
    (out / "mine.txt").write_text("mine")
    status, said, names = run("two", "--ray", "local")
    assert status == 0
    assert "has 3 files of an earlier run that this one does not write, such as a.png" in said
    assert names == sorted([*always, "a.png", "a.tsv", "b.png", "mine.txt"])
    status, said, names = run("two", "--ray", "local", "--clean")
    assert status == 0 and "--clean: removed 8 files of an earlier run" in said
    assert names == sorted([*always, "mine.txt"])
    (tmp_path / "two" / "c.png").write_bytes(b"no image")
    (tmp_path / "two" / "b.png").rename(tmp_path / "two" / "d.png")
    (tmp_path / "two" / "b.png").write_bytes(b"no image")
    status, said, names = run("two", "--ray", "local")
    assert status == 3
    assert "has results of an earlier run of images that could not be read now, such as b.tsv" in said  # fmt: skip


# ---- on a cluster


def test_two_workers_write_what_one_process_writes(toy, photos, alone, tmp_path, capsys):
    assert ray_main(toy, photos, tmp_path / "found") == 3
    assert capsys.readouterr().out.splitlines()[-1].endswith("detections.json")
    check_outputs(tmp_path / "found", alone, photos)


def test_a_run_that_was_broken_off_goes_on(toy, photos, alone, tmp_path, capsys):
    cli.setup_logging()
    output = tmp_path / "found"
    options = RunOptions(score_threshold=0.0, decode="auto")
    half = sorted(photos.iterdir())[: IMAGES // 2]
    detector = ray.PathDetector(toy, RunOptions())
    with Results(output / ray.PARTIAL, run_identity(files.sha256(toy), options)) as results:
        results.add(ray_cluster.to_table(detector(half)))
    assert ray_main(toy, photos, output) == 3
    log = capsys.readouterr().err
    assert f"{IMAGES // 2} of {IMAGES + 1} images are done already" in log
    assert f"workers: {IMAGES // 2 + 1} images" in log
    check_outputs(output, alone, photos)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster.connect("local") as resources:
        yield resources


def test_a_killed_worker_loses_nothing(cluster, toy, photos, alone, tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()

    class Slow(ray.PathDetector):
        """Says who it is and takes its time, so that a worker can be killed at its work."""

        def __call__(self, paths):
            (pids / str(os.getpid())).touch()
            time.sleep(0.3)
            return super().__call__(paths)

    paths = sorted(photos.iterdir())
    make = partial(Slow, toy, RunOptions(provider="cpu", threads=1, workers=1))
    with Results(tmp_path / "partial", {}) as results:
        killed = 0
        for table in ray_cluster.detect(paths, make, Workers(2, 1, 0), batch_size=4):
            results.add(table)
            if not killed:
                killed = int(next(pids.iterdir()).name)
                os.kill(killed, signal.SIGKILL)
        found = list(results.write_in_order(paths, tmp_path / "all.parquet", toy_detector_spec()))
    assert len(list(pids.iterdir())) == 3  # two, and the one in the place of the dead
    assert [path for path, _ in found] == paths
    single = ray.PathDetector(toy, RunOptions(provider="cpu", threads=1))(paths)
    expected = ray_cluster.to_table(sorted(single, key=lambda item: item[0])).to_pylist()
    assert ray_cluster.to_table(found).to_pylist() == expected


def toy_detector_spec() -> ModelSpec:
    return ModelSpec.from_onnx(toy_detector.model())


def test_an_error_of_a_worker_is_one_line(cluster, tmp_path):
    make = partial(ray.PathDetector, tmp_path / "none.onnx", RunOptions())
    with pytest.raises(EngineError, match=r"^--ray: a worker failed: .*found nothing at .*none\.onnx$"):  # fmt: skip
        list(ray_cluster.detect([tmp_path / "a.jpg"], make, Workers(1, 1, 0), batch_size=1))


def test_no_cluster_is_one_line(monkeypatch):
    import ray

    def refuse(*_, **__):
        raise ConnectionError("Failed to connect\nto Ray cluster")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(EngineError, match=r"no Ray cluster at h:1 \(Failed to connect to Ray cluster\); give HOST:PORT"),
        ray_cluster.connect("h:1"),
    ):  # fmt: skip
        pass
