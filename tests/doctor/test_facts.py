# SPDX-License-Identifier: Apache-2.0
"""How a machine is read: what its tools print, and this machine as it is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trtdet.doctor import facts
from trtdet.doctor.facts import Gpu, Module

#: As an H200's driver prints it; the second card is made up.
SMI = """NVIDIA H200, 9.0, 143771, 143156, 580.159.04
NVIDIA GeForce RTX 3060 Ti, 8.6, 8192, 512, 580.159.04
"""
HEAD = "| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |"


def test_what_nvidia_smi_says() -> None:
    assert facts.parse_gpus(SMI) == ((Gpu("NVIDIA H200", "9.0", 143771, 143156), Gpu("NVIDIA GeForce RTX 3060 Ti", "8.6", 8192, 512)), "580.159.04")  # fmt: skip
    assert facts.parse_gpus("Orin (nvgpu), [N/A], [N/A], [N/A], 540.4.0\n") == ((Gpu("Orin (nvgpu)"),), "540.4.0")  # fmt: skip
    assert facts.parse_gpus("Tesla K80, Tesla K80, 11441, 11000, 450.80.02") == ((Gpu("Tesla K80", None, 11441, 11000),), "450.80.02")  # fmt: skip
    assert facts.parse_gpus("") == ((), None)
    assert facts.parse_gpus("No devices were found") == ((), None)
    assert facts.parse_driver_cuda(HEAD) == "13.0"
    assert facts.parse_driver_cuda("| CUDA Version: N/A |") is None


@pytest.mark.parametrize(
    ("tool", "gpus", "cuda", "error"),
    [
        (f"case $1 in --query*compute_cap*) echo '{SMI.splitlines()[0]}';; *) echo '{HEAD}';; esac", 1, "13.0", ""),
        ("case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; --query*) echo 'Tesla K80, Tesla K80, 11441, 11000, 450.80.02';; *) echo 'CUDA Version: 11.0';; esac", 1, "11.0", ""),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", 0, None, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."),
        ("exit 5", 0, None, "status 5"),
    ],
)  # fmt: skip
@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_standin_for_nvidia_smi(tool: str, gpus: int, cuda: str | None, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{tool}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found, _, driver_cuda, why = facts.read_gpus()
    assert (len(found), driver_cuda, why) == (gpus, cuda, error)


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(facts, "MORE_TOOLS", str(tmp_path))
    assert facts.read_gpus() == ((), None, None, "")


def test_a_jetson(tmp_path: Path) -> None:
    line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    assert facts.parse_l4t(line) == "R36.4.3"
    assert facts.parse_l4t("") is None
    assert facts.system_tensorrt(tmp_path) == ""
    module = tmp_path / "python3.10" / "dist-packages" / "tensorrt" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.touch()
    assert facts.system_tensorrt(tmp_path) == str(module.parent)


def test_requirements() -> None:
    lines = ["# Tests", "numpy>=1.26,<3", "ray[data]>=2.49,<2.61", 'tensorrt<12,>=8.6; extra == "tensorrt"', ""]  # fmt: skip
    assert facts.parse_requirements(lines) == {"numpy": ">=1.26,<3", "ray": ">=2.49,<2.61", "tensorrt": "<12,>=8.6"}  # fmt: skip
    read = facts.read_requirements(ROOT)
    assert read["onnxruntime"].startswith(">=") and {"tensorflow", "tensorrt", "tensorrt-rtx", "tritonclient", "ray", "cuda-python"} <= set(read)  # fmt: skip


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in a folder of their own, on PYTHONPATH."""
    sources = {
        "fine_one": "print('chatter')\n__version__ = '1.2'",
        "hangs": "import time\ntime.sleep(60)",
        "crashes": "import os\nos.abort()",
        "raises": "raise OSError('libGL.so.1: cannot open shared object file')",
        "half": "import not_there_at_all",
        "onnxruntime": "__version__ = '1.26.0'\ncuda_version = '12.8'\ndef get_available_providers():\n    return ['CUDAExecutionProvider']\nimport os\nassert os.environ['ORT_DISABLE_TELEMETRY'] == '1'",
        "tensorrt_rtx": "__version__ = '1.7.1'\nclass ComputeCapability:\n    __members__ = {'SM120': 1, 'SM75': 2, 'CURRENT': 3}",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("made_up")
def test_modules_in_a_process_of_their_own(tmp_path: Path) -> None:
    where = facts.shortened(str(tmp_path))
    names = ("fine_one", "not_there_at_all", "empty_folder", "raises", "half")
    assert facts.probe(names) == {
        "fine_one": Module("1.2", where),
        "raises": Module(error="OSError: libGL.so.1: cannot open shared object file"),
        "half": Module(error="needs not_there_at_all, which is not installed"),
    }
    assert facts.probe(("onnxruntime",)) == {"onnxruntime": Module("1.26.0", where, providers=("CUDAExecutionProvider",), cuda="12.8")}  # fmt: skip
    assert facts.probe(("tensorrt_rtx",)) == {"tensorrt_rtx": Module("1.7.1", where, capabilities=("7.5", "12.0"))}  # fmt: skip
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.usefixtures("made_up")
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_module_that_crashes_or_hangs_takes_nothing_with_it() -> None:
    found = facts.probe(("fine_one", "crashes", "raises"))
    assert found["fine_one"].version == "1.2"
    assert found["crashes"].error == "its import ended the process with status -6"
    found = facts.probe(("fine_one", "hangs"), seconds=3)
    assert set(found) <= {"fine_one", "hangs"}
    assert found["hangs"].error == "its import took more than 3 s"


def doctor(*flags: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "trtdet", "doctor", "--json", str(home / "doctor.json")]  # fmt: skip
    folders = {"HOME": str(home), "TMPDIR": str(home)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **folders}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_this_machine_with_the_standard_library_alone(tmp_path: Path) -> None:
    done = doctor("-S", "-E", home=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "-- create_onnx     an ONNX file     needs the packages of requirements.txt (6 are not there)" in done.stdout  # fmt: skip
    assert done.stdout.endswith("with an ONNX file): cannot run\n")
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["facts"]["modules"] == {}
    assert content["diagnosis"]["ready"] is False
    assert all(stage["missing"] for stage in content["diagnosis"]["stages"])


def test_this_machine(tmp_path: Path) -> None:
    """The environment of the tests has all of requirements.txt."""
    done = doctor(home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]  # nothing else was written
    import numpy
    import onnxruntime

    modules = content["facts"]["modules"]
    assert modules["numpy"]["version"] == numpy.__version__
    assert modules["onnxruntime"]["version"] == onnxruntime.__version__
    assert modules["onnxruntime"]["providers"] == onnxruntime.get_available_providers()
    assert re.search(rf"ONNX Runtime +{re.escape(onnxruntime.__version__)}, ", done.stdout)
    assert content["diagnosis"]["ready"] is True
