# SPDX-License-Identifier: Apache-2.0
"""Made-up machines: facts in, lines out. Nothing of the machine that runs this is looked at."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT
from test_imports import imports_of, modules, owner

from trtdet.doctor.cards import knows_card, oldest_card, tensorrt_for
from trtdet.doctor.facts import Distribution, Facts, Gpu, Module
from trtdet.doctor.judge import ROWS, judge
from trtdet.doctor.pairs import within
from trtdet.doctor.text import render

CPU_ORT = Module("1.31.1", providers=("AzureExecutionProvider", "CPUExecutionProvider"))
GPU_ORT = Module("1.26.0", providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"), cuda="12.8")  # fmt: skip
BASE = {name: Module("1") for name in ("numpy", "msgspec", "onnx", "onnx_graphsurgeon", "PIL", "cv2", "pycocotools", "tqdm")}  # fmt: skip
FULL = {
    **BASE,
    "onnxruntime": CPU_ORT,
    "tensorflow": Module("2.21.0"),
    "cuda.bindings.runtime": Module(),
}
LISTED = {"tf2onnx": Distribution("1.17.0"), "tritonclient": Distribution("2.73.0"), "ray": Distribution("2.60.0")}  # fmt: skip
TRT = Module("10.13.3.9", location="/env/tensorrt")
RTX = Module("1.7.1.116", capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"))

#: A server with an L4, TensorRT 10.13 and all the rest.
SERVER = Facts(
    system="Linux",
    python="3.11.7",
    environment="/env",
    gpus=(Gpu("NVIDIA L4", "8.9", 23034, 22000),),
    driver="575.57.08",
    driver_cuda="12.9",
    modules={**FULL, "tensorrt": TRT},
    distributions={**LISTED, "tensorrt-cu12": Distribution("10.13.3.9", "/env")},
)
ORIN = Facts(
    system="Linux-5.15-tegra",
    python="3.10.12",
    environment="/env",
    gpus=(Gpu("Orin (nvgpu)"),),
    driver="540.4.0",
    driver_cuda="12.6",
    jetson="R36.4.3",
    jetpack_tensorrt="/usr/lib/python3.10/dist-packages/tensorrt",
    modules={**FULL, "tensorrt": Module("10.3.0")},
    distributions={
        **LISTED,
        "tensorrt": Distribution("10.3.0", "/usr/lib/python3.10/dist-packages"),
    },
)


def machine(base: Facts = SERVER, *, without: tuple[str, ...] = (), modules: dict[str, Module] | None = None, distributions: dict[str, str] | None = None, **changes: Any) -> Facts:  # fmt: skip
    """`base` with other modules and distributions (name -> version)."""
    kept = {k: v for k, v in base.modules.items() if k not in without}
    listed = {k: v for k, v in base.distributions.items() if k not in without}
    added = {k: Distribution(v, "/env") for k, v in (distributions or {}).items()}
    return replace(base, modules={**kept, **(modules or {})}, distributions={**listed, **added}, **changes)  # fmt: skip


def broken_rows(facts: Facts) -> dict[tuple[str, str], tuple[str, str]]:
    """(stage, model) -> what is missing, and the command."""
    stages = judge(facts).stages
    return {(s.name, s.model): (", ".join(s.missing), s.command) for s in stages if not s.works}


def problems(facts: Facts) -> list[tuple[str, str]]:
    return [(problem.what, problem.command) for problem in judge(facts).problems]


@pytest.mark.parametrize("facts", [SERVER, ORIN, machine(modules={"onnxruntime": GPU_ORT})])
def test_a_complete_machine_has_nothing_to_mend(facts: Facts) -> None:
    diagnosis = judge(facts)
    assert diagnosis.ready and diagnosis.problems == ()
    assert len(diagnosis.stages) == len(ROWS) == 14
    assert broken_rows(facts) == {}


def test_what_onnx_runtime_computes_on() -> None:
    def note(facts: Facts) -> str:
        return next(s.note for s in judge(facts).stages if (s.name, s.model) == ("infer", "an ONNX file"))  # fmt: skip

    assert note(SERVER) == "on the CPU"
    assert note(machine(modules={"onnxruntime": GPU_ORT})) == "on the GPU"
    assert note(machine(modules={"onnxruntime": GPU_ORT}, gpus=())) == "on the CPU"
    new = replace(GPU_ORT, cuda="13.1")
    assert note(machine(modules={"onnxruntime": new})) == "on the CPU: the driver is too old for its CUDA"  # fmt: skip


NO_GPU = {"gpus": (), "driver": None, "driver_cuda": None}
RUN_ENGINE = [("infer", "an engine"), ("eval_coco", "an engine")]


@pytest.mark.parametrize(
    ("facts", "rows", "missing", "command"),
    [
        # Nothing but Python: a clone; a clone with an environment that is not active; an installed
        # package.
        (machine(modules={"tensorflow": Module("2.21.0")}, without=(*BASE, "onnxruntime", "tensorrt", "cuda.bindings.runtime"), environment="", managed=True, **NO_GPU),
         [("create_onnx", "an ONNX file"), ("create_onnx", "a SavedModel")], "the packages of requirements.txt (6 are not there)",
         "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"),
        (machine(without=(*BASE, "onnxruntime"), environment="", other_environment=True), [("infer", "an ONNX file")], "the packages of requirements.txt (7 are not there)", ". .venv/bin/activate"),
        (machine(without=tuple(BASE), checkout=False), [("infer", "an ONNX file")], "the packages of requirements.txt (6 are not there)", "pip install trtdet"),
        # One package.
        (machine(without=("pycocotools",)), [("eval_coco", "an ONNX file"), ("eval_coco", "an engine"), ("tune_precision", "an ONNX file")], "pycocotools", "pip install -r requirements.txt"),
        (machine(without=("tensorflow", "tf2onnx")), [("create_onnx", "a SavedModel")], "tensorflow, tf2onnx", "pip install -r requirements-tensorflow.txt"),
        (machine(without=("tensorflow", "tf2onnx"), checkout=False), [("create_onnx", "a SavedModel")], "tensorflow, tf2onnx", 'pip install "trtdet[tensorflow]"'),
        (machine(without=("tritonclient",)), [("infer", "a Triton server")], "tritonclient", "pip install -r requirements-triton.txt"),
        (machine(without=("ray",), checkout=False), [("infer", "a Ray cluster")], "ray", 'pip install "trtdet[ray]"'),
        (machine(modules={"cv2": Module(error="ImportError: libGL.so.1")}, without=("pycocotools",)), [("image_batcher", "images"), ("visualize", "TSV files")], "cv2 does not import (ImportError: libGL.so.1)", "pip install -r requirements.txt"),
        # TensorRT: none, for a driver of CUDA 12 and 13, on a GPU of 2017, without a GPU.
        (machine(without=("tensorrt", "tensorrt-cu12")), [("build_engine", "TensorRT"), *RUN_ENGINE], "TensorRT", 'pip install --upgrade "tensorrt-cu12>=8.6,<12" "cuda-python>=12.9.1,<13"'),
        (machine(without=("tensorrt", "tensorrt-cu12", "cuda.bindings.runtime"), driver="580.95.05", driver_cuda="13.0"), RUN_ENGINE, "cuda-python, TensorRT", 'pip install --upgrade "tensorrt>=8.6,<12" "cuda-python>=12.9.1,<14"'),
        (machine(without=("tensorrt", "tensorrt-cu12"), gpus=(Gpu("Tesla V100", "7.0"),)), RUN_ENGINE, "TensorRT", 'pip install --upgrade "tensorrt-cu12>=8.6,<10.5" "cuda-python>=12.9.1,<13"'),
        (machine(without=("tensorrt", "tensorrt-cu12"), **NO_GPU), [("build_engine", "TensorRT")], "TensorRT", "pip install -r requirements-rtx.txt"),
        (machine(**NO_GPU), [("build_engine", "TensorRT")], "an NVIDIA GPU (TensorRT builds for the card that is here)", "pip install -r requirements-rtx.txt"),
        (machine(**NO_GPU), RUN_ENGINE, "an NVIDIA GPU with its driver", ""),
        (machine(modules={"tensorrt_rtx": RTX}, without=("tensorrt",), **NO_GPU), RUN_ENGINE, "an NVIDIA GPU with its driver", ""),
        (machine(without=("tensorrt", "tensorrt-cu12"), driver="470.82.01", driver_cuda=None), RUN_ENGINE, "TensorRT", ""),
        # CUDA for Python alone brings no TensorRT; on a Jetson that would hide JetPack's.
        (machine(without=("cuda.bindings.runtime",)), RUN_ENGINE, "cuda-python", 'pip install "cuda-python>=12.9.1,<13"'),
        (machine(ORIN, without=("cuda.bindings.runtime",)), RUN_ENGINE, "cuda-python", 'pip install "cuda-python>=12.9.1,<13"'),
        (machine(without=("cuda.bindings.runtime", "pycocotools")), RUN_ENGINE[1:], "pycocotools, cuda-python", 'pip install -r requirements.txt "cuda-python>=12.9.1,<13"'),
        # Windows.
        (machine(without=("cv2",), system="Windows-10", environment="", managed=True), [("visualize", "TSV files")], "opencv-python-headless", "python3 -m venv .venv && .venv\\Scripts\\activate && pip install -r requirements.txt"),
        # TensorRT-RTX on a card of the data centre.
        (machine(modules={"tensorrt_rtx": RTX}, without=("tensorrt", "tensorrt-cu12"), gpus=(Gpu("NVIDIA H200", "9.0"),)), RUN_ENGINE, "a TensorRT that runs on this card", 'pip install --upgrade "tensorrt-cu12>=8.6,<12" "cuda-python>=12.9.1,<13"'),
        # A Jetson whose environment hides JetPack's TensorRT, and one without it.
        (machine(ORIN, without=("tensorrt",)), [("build_engine", "TensorRT"), *RUN_ENGINE], "TensorRT", "python3 -m venv --clear --system-site-packages .venv && . .venv/bin/activate && pip install -r requirements.txt"),
        (machine(ORIN, without=("tensorrt",), jetpack_tensorrt=""), RUN_ENGINE, "TensorRT", "sudo apt-get install nvidia-jetpack"),
    ],
)  # fmt: skip
def test_what_is_missing_and_what_brings_it(facts: Facts, rows: list[tuple[str, str]], missing: str, command: str) -> None:  # fmt: skip
    broken = broken_rows(facts)
    for row in rows:
        needs, brings = broken[row]
        assert needs == missing, row
        assert brings == command


def test_only_the_rows_that_need_it_break() -> None:
    assert set(broken_rows(machine(without=("pycocotools",)))) == {("eval_coco", "an ONNX file"), ("eval_coco", "an engine"), ("tune_precision", "an ONNX file")}  # fmt: skip
    assert set(broken_rows(machine(without=("tensorrt",)))) == {("build_engine", "TensorRT"), *RUN_ENGINE}  # fmt: skip
    assert set(broken_rows(machine(without=("tensorflow",)))) == {("create_onnx", "a SavedModel")}


@pytest.mark.parametrize(
    ("without", "ready"),
    [((), True), (("pycocotools",), False), (("onnxruntime",), False), (("onnx_graphsurgeon",), False), (("msgspec",), False), (("tensorrt", "tensorflow", "tritonclient", "ray"), True)],
)  # fmt: skip
def test_the_main_chain(without: tuple[str, ...], ready: bool) -> None:
    assert judge(machine(without=without)).ready is ready


#: What a stage imports for an option alone, or where it is lucky to have it: no row asks for it.
FOR_OPTIONS = {
    "infer": {"pycocotools"}, "compare": {"pycocotools"}, "deploy": {"pycocotools"},
    "image_batcher": {"onnx", "onnxruntime", "msgspec"}, "visualize": {"onnx", "onnxruntime", "msgspec", "pycocotools"},
}  # fmt: skip


@pytest.mark.parametrize("stage", dict.fromkeys(name for name, *_ in ROWS))
def test_rows_ask_for_what_the_stage_imports(stage: str) -> None:
    known = modules(ROOT)
    seen: set[str] = set()
    pending = [f"trtdet.commands.{stage}"]
    outside = set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        for name, _ in imports_of(known[module]):
            if name.split(".")[0] == "trtdet":
                pending.append(owner(name, known))
            else:
                outside.add(name.split(".")[0])
    asked = {module for name, _, wanted, _ in ROWS if name == stage for module in wanted}
    base = {name for name in (*BASE, "onnxruntime") if name in outside}
    assert base - FOR_OPTIONS.get(stage, set()) == {m for m in asked if m in (*BASE, "onnxruntime")}


BOTH_ORTS = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.26.0"}
REPLACE = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
UP_TO_DATE = 'pip install --upgrade "tensorrt-cu12>=8.6,<12" "cuda-python>=12.9.1,<13"'


@pytest.mark.parametrize(
    ("facts", "what", "command"),
    [
        # ONNX Runtime of another CUDA than the driver's; twice installed; broken.
        (machine(modules={"onnxruntime": replace(GPU_ORT, version="1.30.0", cuda="13.1")}), "ONNX Runtime 1.30.0 is for CUDA 13; driver 575.57.08 supports CUDA 12.9; CUDA 13 needs driver 580 or later", ""),
        (machine(distributions=BOTH_ORTS), "onnxruntime and onnxruntime-gpu are both installed, in one folder (the CPU's is in use now); keep one", REPLACE),
        (machine(distributions=BOTH_ORTS, modules={"onnxruntime": GPU_ORT}), "onnxruntime and onnxruntime-gpu are both installed, in one folder (the GPU's is in use now); keep one", REPLACE),
        (machine(modules={"onnxruntime": Module(error="ImportError: no")}, distributions={"onnxruntime": "1.31.1"}), "onnxruntime is installed but does not import: ImportError: no", "pip install --force-reinstall onnxruntime"),
        # TensorRT that does not know the card: too old a card, too new a card, too old a TensorRT.
        (machine(gpus=(Gpu("Tesla V100", "7.0"),)), "TensorRT 10.13.3.9 runs on compute capability 7.5 and later; here is Tesla V100 (compute capability 7.0)", 'pip install --upgrade "tensorrt-cu12>=8.6,<10.5" "cuda-python>=12.9.1,<13"'),
        (machine(gpus=(Gpu("Tesla P4", "6.1"),)), "TensorRT 10.13.3.9 runs on compute capability 7.5 and later; here is Tesla P4 (compute capability 6.1)", 'pip uninstall -y tensorrt-cu12 && pip install --upgrade "tensorrt>=8.6,<10" "cuda-python>=12.9.1,<13"'),
        (machine(modules={"tensorrt": Module("10.3.0")}, gpus=(Gpu("RTX 5090", "12.0"),)), "TensorRT 10.3.0 came before this card; here is RTX 5090 (compute capability 12.0)", 'pip install --upgrade "tensorrt-cu12>=10.8,<12" "cuda-python>=12.9.1,<13"'),
        (machine(gpus=(Gpu("NVIDIA GB10", "12.1"),)), "TensorRT 10.13.3.9 came before this card; here is NVIDIA GB10 (compute capability 12.1)", 'pip install --upgrade "tensorrt-cu12>=10.14,<12" "cuda-python>=12.9.1,<13"'),
        (machine(modules={"tensorrt": Module("8.5.3.1")}), "TensorRT 8.5.3.1: 8.6 or later is needed", UP_TO_DATE),
        (machine(ORIN, modules={"tensorrt": Module("8.5.2.2")}), "TensorRT 8.5.2.2: 8.6 or later is needed, which a newer JetPack brings (6.1: 10.3)", ""),
        (machine(gpus=(Gpu("Tesla V100", "7.0"), Gpu("RTX 5090", "12.0"))), "TensorRT 10.13.3.9 runs on compute capability 7.5 and later; here is Tesla V100 (compute capability 7.0)", ""),
        # A driver too old for the CUDA in use; one whose CUDA nvidia-smi does not tell; one that
        # does not answer.
        (machine(distributions={"tensorrt-cu13": "11.2.1"}, without=("tensorrt-cu12",)), "tensorrt-cu13 11.2.1 is for CUDA 13; driver 575.57.08 supports CUDA 12.9; CUDA 13 needs driver 580 or later", f"pip uninstall -y tensorrt-cu13 && {UP_TO_DATE}"),
        (machine(distributions={"cuda-bindings": "13.4.4"}), "cuda-bindings 13.4.4 is for CUDA 13; driver 575.57.08 supports CUDA 12.9; CUDA 13 needs driver 580 or later", UP_TO_DATE),
        (machine(driver="470.82.01", driver_cuda=None), "tensorrt-cu12 10.13.3.9 is for CUDA 12; here is driver 470.82.01; CUDA 12 needs driver 525 or later", ""),
        (machine(without=("tensorrt-cu12",), driver="470.82.01", driver_cuda="11.4"), "driver 470.82.01 supports CUDA 11; CUDA for Python from 12.9.1 on needs driver 525 or later: update the driver", ""),
        (machine(distributions={"tensorrt-cu12": "11.4.0"}, driver="525.60.13", driver_cuda="12.0"), "TensorRT 11.4.0 needs driver 535 or later, here is 525.60.13; update the driver", ""),
        (machine(gpus=(), driver=None, driver_cuda=None, gpu_error="NVIDIA-SMI has failed"), "nvidia-smi does not reach the driver: NVIDIA-SMI has failed; a reboot helps after an update of the driver", ""),
        # TensorRT-RTX on a card it refuses: with TensorRT beside it, and alone.
        (machine(modules={"tensorrt_rtx": RTX}, gpus=(Gpu("NVIDIA H200", "9.0"),)), "TensorRT-RTX 1.7.1.116 runs on compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; NVIDIA H200 (compute capability 9.0) needs TensorRT (--flavor tensorrt)", ""),
        (machine(modules={"tensorrt_rtx": RTX}, without=("tensorrt", "tensorrt-cu12"), gpus=(Gpu("NVIDIA H200", "9.0"),)), "TensorRT-RTX 1.7.1.116 runs on compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; NVIDIA H200 (compute capability 9.0) needs TensorRT (--flavor tensorrt)", UP_TO_DATE),
        # A Jetson with pip's TensorRT beside JetPack's.
        (machine(ORIN, distributions={"tensorrt": "11.2.1", "tensorrt-cu12": "11.2.1"}), "tensorrt 11.2.1, tensorrt-cu12 11.2.1 from pip hides JetPack's TensorRT in /usr/lib/python3.10/dist-packages/tensorrt; a Jetson (R36.4.3) needs that one", "pip uninstall -y tensorrt tensorrt-cu12"),
        # Two TensorRTs of one module; a module that does not load; versions out of range.
        (machine(distributions={"tensorrt-cu11": "10.11.0"}), "tensorrt-cu11 and tensorrt-cu12 bring one module, tensorrt; the one installed last is used", f"pip uninstall -y tensorrt-cu11 && {UP_TO_DATE}"),
        (machine(modules={"tensorrt": Module(error="OSError: libnvinfer.so.10")}), "tensorrt is installed but does not import: OSError: libnvinfer.so.10", ""),
        (machine(distributions={"numpy": "1.24.4"}, requirements={"numpy": ">=1.26,<3"}), "numpy 1.24.4 is installed, trtdet takes >=1.26,<3", 'pip install "numpy>=1.26,<3"'),
        (machine(distributions={"onnxruntime-gpu": "1.18.0"}, requirements={"onnxruntime": ">=1.22,<1.32"}), "onnxruntime-gpu 1.18.0 is installed, trtdet takes >=1.22,<1.32", 'pip install "onnxruntime-gpu>=1.22,<1.32"'),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(facts: Facts, what: str, command: str) -> None:
    assert (what, command) in problems(facts)


def test_one_fault_is_one_problem() -> None:
    assert len(problems(machine(distributions=BOTH_ORTS))) == 1
    assert len(problems(machine(gpus=(Gpu("Tesla V100", "7.0"),) * 2))) == 2
    assert problems(machine(gpus=(Gpu("Tesla V100", "7.0"), Gpu("NVIDIA L4", "8.9"))))[0][0].endswith("Tesla V100 (compute capability 7.0)")  # fmt: skip
    assert problems(machine(ORIN, distributions={"cuda-bindings": "12.9.1"})) == []
    # A Jetson's driver has a number of its own.
    assert problems(machine(ORIN, driver_cuda=None, distributions={"cuda-bindings": "13.0.0"})) == []  # fmt: skip


@pytest.mark.parametrize(
    ("tensorrt", "capability", "known"),
    [
        ((8, 6, 1), (5, 2), True), ((9, 3), (5, 2), False), ((9, 3), (6, 1), True), ((10, 4), (7, 0), True), ((10, 4), (6, 1), False),
        ((10, 5), (7, 0), False), ((10, 5), (7, 5), True), ((11, 2), (7, 2), False), ((10, 7), (12, 0), False), ((10, 8), (12, 0), True),
        ((10, 13), (12, 1), False), ((10, 14), (12, 1), True), ((10, 14), (10, 3), True), ((8, 6), (9, 0), True), ((10, 3), (8, 7), True),
        ((10, 13), (11, 0), True),  # of which no page was found
    ],
)  # fmt: skip
def test_which_tensorrt_knows_which_card(tensorrt: tuple[int, ...], capability: tuple[int, ...], known: bool) -> None:  # fmt: skip
    assert knows_card(tensorrt, capability) is known
    first, end = tensorrt_for(capability)
    assert (first <= tensorrt < end) is known
    assert oldest_card((8, 6)) == (5, 0)


@pytest.mark.parametrize(
    ("version", "wanted", "inside"),
    [("1.26.0", ">=1.26,<3", True), ("3.0", ">=1.26,<3", False), ("1.25.9", "<3,>=1.26", False), ("2.9", ">=2.49,<2.61", False), ("4.11.0.86", ">=4.11,<6", True)],
)  # fmt: skip
def test_ranges(version: str, wanted: str, inside: bool) -> None:
    assert within(version, wanted) is inside


def test_the_report() -> None:
    facts = machine(modules={"onnxruntime": GPU_ORT}, without=("tensorflow",), distributions=BOTH_ORTS, memory_gib=125.6, cpu="AMD EPYC", cores=16)  # fmt: skip
    lines = render(facts, judge(facts)).splitlines()
    assert lines[0] == f"trtdet {facts.trtdet}"
    assert "CPU                   AMD EPYC, 16 cores, 125.6 GiB" in lines
    assert "GPU 0                 NVIDIA L4, compute capability 8.9, 21.5 of 22.5 GiB free" in lines
    assert "Driver                575.57.08, supports CUDA 12.9" in lines
    assert "TensorRT              10.13.3.9, /env/tensorrt" in lines
    assert "ONNX Runtime          1.26.0, built for CUDA 12.8, providers Tensorrt CUDA CPU" in lines
    row = lines.index("-- create_onnx     a SavedModel     needs tensorflow")
    assert lines[row + 1].split("$ ")[1] == "pip install -r requirements-tensorflow.txt"
    assert "ok infer           an ONNX file     on the GPU" in lines
    assert "  1. onnxruntime and onnxruntime-gpu are both installed, in one folder (the GPU's is in use now); keep one" in lines  # fmt: skip
    assert lines[-1] == "Main chain (create_onnx, infer and eval_coco with an ONNX file): ready"
    jetson = render(ORIN, judge(ORIN)).splitlines()
    assert "Jetson                L4T R36.4.3" in jetson
    assert "GPU 0                 Orin (nvgpu), compute capability unknown" in jetson
