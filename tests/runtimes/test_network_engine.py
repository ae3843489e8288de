# SPDX-License-Identifier: Apache-2.0
"""From files to results through the code of `trtdet.runtimes.trt`, with a real network behind the
stand-in engine: what ONNX Runtime finds by itself.

On the CPU stand-in for CUDA everywhere; on real GPUs, with ONNX Runtime's CUDA provider, by `pytest
-m gpu`.
"""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_engines
import onnx
import pytest
import toy_network
from conftest import EXAMPLES
from PIL import Image
from standin_network import write_network_engine
from trt_rig import Rig

from trtdet import sessions
from trtdet.commands import create_onnx, eval_coco, infer
from trtdet.errors import EngineError
from trtdet.sessions import PROVIDERS

IMAGES = 14  # three batches of 4 and one of 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's pictures, and cuts of them in other sizes."""
    folder = tmp_path_factory.mktemp("photos")
    found = sorted(EXAMPLES.glob("images/*"))
    for number in range(IMAGES):
        picture = Image.open(found[number % len(found)]).convert("RGB")
        cut = (0, 0, picture.width - 7 * (number % 3), picture.height - 5 * (number % 4))
        picture.crop(cut).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def models(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"dynamic batch": tiny_onnx}
    for name, options in {
        "fixed batch": ("--input_shape", "4,128,128,3"),
        "float32, channels first": ("--input_format", "NCHW", "--input_dtype", "float32"),
    }.items():
        made[name] = folder / f"{name}.onnx"
        arguments = ["--saved_model", str(EXAMPLES / "tiny_shapes"), "--onnx", str(made[name])]
        assert create_onnx.main([*arguments, *options]) == 0
    made["dynamic size"] = folder / "dynamic size.onnx"
    onnx.save(toy_network.free_network(), made["dynamic size"])
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    """TSVs and detections.json."""
    found = [*folder.glob("*.tsv"), folder / "detections.json"]
    return {path.name: path.read_bytes() for path in found}


def written(model: Path, photos: Path, output: Path, *options: str) -> dict[str, bytes]:
    arguments = ["--model", str(model), "--input", str(photos), "--output", str(output)]
    assert infer.main([*arguments, "--no_images", "--batch_size", "4", *options]) == 0
    return files_of(output)


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("dynamic batch", ("--devices", "0"), ()),
        ("dynamic batch", ("--devices", "all"), ()),
        ("dynamic batch", ("--contexts", "2"), ()),
        ("fixed batch", ("--devices", "all"), ()),
        ("float32, channels first", ("--devices", "0"), ()),
        ("dynamic size", ("--devices", "0"), ("--resize", "32", "--max_size", "64")),
    ],
)
def test_files_are_those_of_onnxruntime(
    rig: Callable[..., Rig],
    models: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    name: str,
    options: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    rig(devices=2)
    engine = write_network_engine(tmp_path / "network.engine", models[name])
    want = written(models[name], photos, tmp_path / "onnxruntime", *more)
    got = written(engine, photos, tmp_path / "engine", *options, *more)
    assert len(want) == IMAGES + 1
    assert len(json.loads(want["detections.json"])) > 5 * IMAGES
    assert got == want


def test_ap_is_that_of_onnxruntime(rig: Callable[..., Rig], tiny_onnx: Path, tmp_path: Path) -> None:  # fmt: skip
    rig(devices=2)
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    found = {}
    for kind, model in {"onnxruntime": tiny_onnx, "engine": engine}.items():
        arguments = ["--model", str(model), "--input", str(EXAMPLES / "images")]
        arguments += ["--annotations", str(EXAMPLES / "annotations.json"), "--batch_size", "4"]
        assert eval_coco.main([*arguments, "--json", str(tmp_path / f"{kind}.json")]) == 0
        found[kind] = json.loads((tmp_path / f"{kind}.json").read_text())
    other = {key for key in found["engine"] if found["engine"][key] != found["onnxruntime"][key]}
    assert other == {"seconds", "runtime", "engine"}
    assert found["engine"]["AP"] == pytest.approx(0.7987, abs=5e-4)


# ---- on a GPU


@pytest.fixture
def on_gpu() -> Iterator[None]:
    if missing := gpu_engines.find_gpu():
        pytest.skip(f"no GPU: {missing}")
    if PROVIDERS["cuda"] not in sessions.available_providers():
        pytest.skip("needs onnxruntime-gpu")
    try:
        gpu_engines.install_standin()
    except (EngineError, ImportError, OSError) as error:
        pytest.skip(f"the stand-in engine: {error}")
    yield
    gpu_engines.remove_standin()
    gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("devices", ["0", "all"])
def test_real_gpus_write_the_files_of_onnxruntime_on_cuda(
    on_gpu: None, tiny_onnx: Path, photos: Path, tmp_path: Path, devices: str
) -> None:
    """Byte for byte: with its own buffers, and on the buffers and streams of this project."""
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    want = written(tiny_onnx, photos, tmp_path / "onnxruntime", "--provider", "cuda")
    got = written(engine, photos, tmp_path / "engine", "--devices", devices)
    assert len(json.loads(want["detections.json"])) > 5 * IMAGES
    assert got == want


@pytest.mark.gpu
def test_ap_of_d0_on_a_real_gpu(on_gpu: None, shared: Path, tmp_path: Path) -> None:
    """Within 0.0005 of the CPU's (its 100 photographs, score threshold 0.001); TSVs as ONNX
    Runtime on CUDA writes them.
    """
    d0 = shared / "d0_person.onnx"
    if not d0.is_file():
        pytest.skip("needs ../shared/d0_person.onnx, which create_onnx.py makes of ../shared/models/d0_person")  # fmt: skip
    photographs = shared / "images" / "person_val100"
    engine = write_network_engine(tmp_path / "network.engine", d0)
    arguments = ["--input", str(photographs), "--annotations", f"{photographs}.json"]
    arguments += ["--batch_size", "8", "--json", str(tmp_path / "metrics.json")]
    assert eval_coco.main(["--model", str(engine), *arguments]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] == pytest.approx(0.3213, abs=5e-4)  # fmt: skip
    want = written(d0, photographs, tmp_path / "onnxruntime", "--provider", "cuda")
    assert written(engine, photographs, tmp_path / "engine") == want
