# SPDX-License-Identifier: Apache-2.0
"""What the facts mean: for each stage whether it runs, what is missing and the one command that
brings it; and pairs known not to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trtdet.doctor.facts import Facts
from trtdet.doctor.install import bring
from trtdet.doctor.packages import BASE, DISTRIBUTIONS, requirement_file
from trtdet.doctor.pairs import (
    Finding,
    find_problems,
    has_gpu,
    imports,
    major,
    rtx_knows,
    tensorrt_refuses,
)

#: The modules that are probed under another name than their package's.
PROBED_AS = {"cuda": "cuda.bindings.runtime"}

#: What each stage imports of requirements.txt; tests/doctor/test_judge.py holds it against the
#: code.
LOOK = ("numpy", "PIL", "cv2")
RUN = (*LOOK, "tqdm", "msgspec", "onnx", "onnxruntime")
CONVERT = ("numpy", "msgspec", "onnx", "onnx_graphsurgeon", "onnxruntime", "PIL")

#: What a row needs beyond modules.
Needs = Literal["", "builder", "runner"]

#: Stage, with what, modules, and what else. The rows of the main chain are those with an ONNX file
#: of `MAIN_CHAIN`.
ROWS: tuple[tuple[str, str, tuple[str, ...], Needs], ...] = (
    ("create_onnx", "an ONNX file", CONVERT, ""),
    ("create_onnx", "a SavedModel", (*CONVERT, "tensorflow", "tf2onnx"), ""),
    ("build_engine", "TensorRT", RUN, "builder"),
    ("infer", "an ONNX file", RUN, ""),
    ("infer", "an engine", (*RUN, "cuda"), "runner"),
    ("infer", "a Triton server", (*RUN, "tritonclient"), ""),
    ("infer", "a Ray cluster", (*RUN, "ray"), ""),
    ("eval_coco", "an ONNX file", (*RUN, "pycocotools"), ""),
    ("eval_coco", "an engine", (*RUN, "pycocotools", "cuda"), "runner"),
    ("compare", "ONNX files", (*RUN, "onnx_graphsurgeon"), ""),
    ("tune_precision", "an ONNX file", (*RUN, "pycocotools"), ""),
    ("deploy", "any model", (*RUN, "onnx_graphsurgeon"), ""),
    ("image_batcher", "images", LOOK, ""),
    ("visualize", "TSV files", LOOK, ""),
)  # fmt: skip
#: So many missing packages of one file are not listed one by one.
MANY = 4
MAIN_CHAIN = ("create_onnx", "infer", "eval_coco")


@dataclass(frozen=True)
class Stage:
    """One row: a stage with one kind of model.

    Attributes:
        missing: what it lacks, in words; empty: it runs.
        command: what brings it; "" where no command does.
        note: what is to be known where it runs.
    """

    name: str
    model: str
    missing: tuple[str, ...] = ()
    command: str = ""
    note: str = ""

    @property
    def works(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Diagnosis:
    """What the facts mean.

    Attributes:
        ready: an ONNX file can be converted, run and evaluated.
    """

    stages: tuple[Stage, ...]
    problems: tuple[Finding, ...]
    ready: bool


def judge(facts: Facts) -> Diagnosis:
    """Say what works on a machine. Reads the facts alone."""
    stages = tuple(judge_stage(facts, *row) for row in ROWS)
    ready = all(s.works for s in stages if s.name in MAIN_CHAIN and s.model == "an ONNX file")
    return Diagnosis(stages, tuple(find_problems(facts)), ready)


def judge_stage(facts: Facts, name: str, model: str, modules: Sequence[str], needs: Needs) -> Stage:
    """One row of the table."""
    absent = [module for module in modules if lacking(facts, module)]
    missing = words(facts, absent)
    tensorrt = False
    if needs:
        reasons = no_builder(facts) if needs == "builder" else no_runner(facts)
        missing += reasons
        tensorrt = bool(reasons) and has_gpu(facts)  # which also brings CUDA for Python
        if reasons and needs == "builder" and not has_gpu(facts):
            absent.append("tensorrt_rtx")
    note = ""
    if not missing and needs == "builder":
        note = builder_note(facts)
    if not missing and model == "an ONNX file" and "cv2" in modules:
        note = provider_note(facts)
    to_install = [module for module in absent if not (tensorrt and module == "cuda")]
    command = bring(facts, to_install, tensorrt=tensorrt)
    return Stage(name, model, tuple(missing), command, note)


def words(facts: Facts, absent: Sequence[str]) -> list[str]:
    """What is missing; where nearly all of requirements.txt is, its name says it better."""
    base = [module for module in absent if requirement_file(module) == BASE]
    if len(base) < MANY:
        return [lacking(facts, module) for module in absent]
    others = [lacking(facts, module) for module in absent if module not in base]
    return [f"the packages of {BASE} ({len(base)} are not there)", *others]


def lacking(facts: Facts, module: str) -> str:
    """What is wrong with a module, in words; "" where it is there and imports."""
    found = facts.modules.get(PROBED_AS.get(module, module))
    if found is None:
        distribution = DISTRIBUTIONS.get(module, module)
        return "" if distribution in facts.distributions and not is_probed(module) else distribution
    return f"{module} does not import ({found.error})" if found.error else ""


def is_probed(module: str) -> bool:
    """Whether a module is imported to see if it works; of the others the version is all that is
    known.
    """
    return module not in ("tf2onnx", "tritonclient", "ray")


def no_builder(facts: Facts) -> list[str]:
    """Why no engine can be built here; empty where one can.

    TensorRT-RTX builds without a GPU, for cards that are named.
    """
    if imports(facts, "tensorrt_rtx"):
        return []
    if not imports(facts, "tensorrt"):
        return [broken_or_missing(facts)]
    if not has_gpu(facts):
        return ["an NVIDIA GPU (TensorRT builds for the card that is here)"]
    return tensorrt_refuses(facts)


def no_runner(facts: Facts) -> list[str]:
    """Why no engine runs here; empty where one does."""
    reasons = []
    if not has_gpu(facts):
        reasons.append("an NVIDIA GPU with its driver")
    runs_rtx = imports(facts, "tensorrt_rtx") and all(rtx_knows(facts, gpu) for gpu in facts.gpus)
    if runs_rtx:
        return reasons
    if not imports(facts, "tensorrt"):
        if imports(facts, "tensorrt_rtx"):
            return [*reasons, "a TensorRT that runs on this card"]
        return [*reasons, broken_or_missing(facts)]
    return reasons + tensorrt_refuses(facts)


def broken_or_missing(facts: Facts) -> str:
    """What to say of a TensorRT that cannot be used."""
    for name in ("tensorrt", "tensorrt_rtx"):
        if name in facts.modules:
            return f"{name} does not import ({facts.modules[name].error})"
    return "TensorRT"


def builder_note(facts: Facts) -> str:
    """With what engines are built, and for what."""
    works_here = imports(facts, "tensorrt") and has_gpu(facts) and not tensorrt_refuses(facts)
    names = ["TensorRT"] if works_here else []
    if imports(facts, "tensorrt_rtx"):
        names.append("TensorRT-RTX" if has_gpu(facts) else "TensorRT-RTX, for cards you name with --compute_capability")  # fmt: skip
    return ", ".join(names)


def provider_note(facts: Facts) -> str:
    """What ONNX Runtime computes on."""
    module = facts.modules["onnxruntime"]
    if "CUDAExecutionProvider" not in module.providers or not facts.gpus:
        return "on the CPU"
    if module.cuda and facts.driver_cuda and major(module.cuda) > major(facts.driver_cuda):
        return "on the CPU: the driver is too old for its CUDA"
    return "on the GPU"
