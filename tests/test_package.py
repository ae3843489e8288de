# SPDX-License-Identifier: Apache-2.0
"""The package as users install it: its requirements, its wheel, its command."""

import os
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT
from test_imports import ONLY_STAGES, SCRIPTS

from trtdet.about import __version__
from trtdet.commands import main as entry
from trtdet.commands.stages import STAGES

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

#: Requirement file -> where pyproject.toml says the same.
EXTRAS = {
    "requirements.txt": "",
    "requirements-tensorflow.txt": "tensorflow",
    "requirements-tensorrt.txt": "tensorrt",
    "requirements-rtx.txt": "rtx",
    "requirements-cuda.txt": "cuda",
    "requirements-gpu.txt": "gpu",
    "requirements-triton.txt": "triton",
    "requirements-ray.txt": "ray",
    "requirements-video.txt": "video",
    "requirements-dev.txt": "dev",
}

CHAIN = """
set -e
python -c 'import sys, trtdet; assert "numpy" not in sys.modules; print(trtdet.__file__)'
trtdet --version
trtdet create_onnx --saved_model "$EXAMPLES/tiny_shapes" --onnx tiny.onnx --labels "$EXAMPLES/labels.txt" --score_threshold 0.001
trtdet build_engine --model tiny.onnx --save_onnx tiny_fp16.onnx --precision fp16
trtdet infer --model tiny.onnx --input "$EXAMPLES/images" --output found --provider cpu
trtdet eval_coco --model tiny.onnx --input "$EXAMPLES/images" --annotations "$EXAMPLES/annotations.json" --provider cpu
trtdet deploy triton --model tiny.onnx --output models --name tiny --ensemble
trtdet compare --reference tiny.onnx --candidate tiny_fp16.onnx --input "$EXAMPLES/images" --report report.html
"""

API = """
import sys
from pathlib import Path

import trtdet

photo = sorted(Path(sys.argv[1], "images").glob("*.png"))[0]
with trtdet.load("tiny.onnx", provider="cpu") as model:
    detections = model(photo)
    assert detections.to_tsv() == Path("found", f"{photo.stem}.tsv").read_text()
    assert set(detections.labels) <= {"circle", "square", "triangle"}, detections.labels
    print(len(detections), "detections")
"""


def requirements(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sorted(line for line in lines if line)


def test_requirement_files_and_pyproject_say_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {path.name for path in ROOT.glob("requirements*.txt")} == set(EXTRAS)
    assert set(project["optional-dependencies"]) == set(EXTRAS.values()) - {""}
    for name, extra in EXTRAS.items():
        listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
        assert requirements(ROOT / name) == sorted(listed), name


def test_every_script_is_a_stage() -> None:
    assert tuple(STAGES) == (*SCRIPTS, *ONLY_STAGES)
    assert not [name for name in ONLY_STAGES if (ROOT / f"{name}.py").exists()]


def test_the_command_hands_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["trtdet"])
    with pytest.raises(SystemExit) as stopped:
        entry.main(["infer", "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: trtdet infer")
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"trtdet {__version__}\n"
    for words, error in (
        ([], f"give a stage: {', '.join(STAGES)}"),
        (["infre"], "unknown stage infre: did you mean infer?"),
        (["--model", "a"], f"give a stage before --model: {', '.join(STAGES)}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            entry.main(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[1] == f"trtdet: error: {error}"


def test_an_old_python_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("trtdet", run_name="__main__")
    assert str(stopped.value.code).startswith(
        "error: trtdet needs Python 3.10 or later, this is 3."
    )


@pytest.mark.slow
def test_the_wheel_runs_the_chain_without_the_repository(tmp_path: Path) -> None:
    """Built, installed with its dependencies in a new environment, run from another folder."""
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)  # fmt: skip
    (wheel,) = tmp_path.glob("trtdet-*.whl")
    assert __version__ in wheel.name
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    install = [str(home / "bin" / "python"), *pip[1:], "install", f"{wheel}[tensorflow]"]
    subprocess.run(install, check=True)
    work = tmp_path / "work"
    work.mkdir()
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), "EXAMPLES": str(EXAMPLES), "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
    done = subprocess.run(["bash", "-c", CHAIN], cwd=work, env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(home)) and lines[1] == f"trtdet {__version__}"
    (ap,) = [line for line in lines if line.split()[:1] == ["AP"]]
    assert 0.75 < float(ap.split()[1]) < 0.85
    done = subprocess.run(["python", "-c", API, str(EXAMPLES)], cwd=work, env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 5
