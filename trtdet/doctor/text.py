# SPDX-License-Identifier: Apache-2.0
"""Facts and diagnosis as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from trtdet.doctor.facts import Facts, Gpu, Module
from trtdet.doctor.judge import Diagnosis, Stage
from trtdet.files import printable

#: What is listed of packages: module, what it is called, its distributions, the one in use last.
SHOWN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tensorrt", "TensorRT", ("tensorrt", "tensorrt-cu11", "tensorrt-cu12", "tensorrt-cu13")),
    ("tensorrt_rtx", "TensorRT-RTX", ("tensorrt-rtx",)),
    ("onnxruntime", "ONNX Runtime", ("onnxruntime", "onnxruntime-gpu")),
    ("tensorflow", "TensorFlow", ("tensorflow", "tensorflow-cpu")),
    ("cuda.bindings.runtime", "CUDA for Python", ("cuda-bindings",)),
)
#: Optional parts of which the version is enough.
EXTRAS = (
    ("Triton client", ("tritonclient",)),
    ("Ray", ("ray",)),
    ("PyAV (video)", ("av",)),
    ("nvImageCodec", ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")),
    ("TensorRT lean runtime", ("tensorrt-lean",)),
)
LABEL_WIDTH = 22


def render(facts: Facts, diagnosis: Diagnosis) -> str:
    """The whole report; the last line says whether the main chain runs."""
    parts = [f"trtdet {facts.trtdet}", "", *machine_lines(facts), "", *stage_lines(diagnosis.stages)]  # fmt: skip
    if diagnosis.problems:
        parts += ["", "Does not fit:"]
        for number, problem in enumerate(diagnosis.problems, 1):
            parts.append(f"  {number}. {problem.what}")
            if problem.command:
                parts.append(f"     $ {problem.command}")
    chain = "create_onnx, infer and eval_coco with an ONNX file"
    parts += ["", f"Main chain ({chain}): {'ready' if diagnosis.ready else 'cannot run'}"]
    return "\n".join(map(printable, parts))


def machine_lines(facts: Facts) -> Iterator[str]:
    """What the machine is and has."""
    memory = f", {facts.memory_gib:g} GiB" if facts.memory_gib is not None else ""
    yield line("System", facts.system)
    yield line("Python", f"{facts.python}, {facts.environment or 'no virtual environment'}")
    yield line("CPU", f"{facts.cpu}, {facts.cores} cores{memory}")
    if facts.jetson:
        yield line("Jetson", f"L4T {facts.jetson}")
    for number, gpu in enumerate(facts.gpus):
        yield line(f"GPU {number}", gpu_text(gpu))
    if not facts.gpus and not facts.jetson:
        yield line("GPU", "none found (in a container, start it with --gpus all)")
    if facts.driver:
        yield line("Driver", f"{facts.driver}, supports CUDA {facts.driver_cuda or '?'}")
    for module, label, names in SHOWN:
        yield line(label, module_text(facts, module, names))
    for label, names in EXTRAS:
        yield line(label, versions(facts, names) or "-")
    yield line("trtexec", facts.trtexec or "-")


def line(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def gpu_text(gpu: Gpu) -> str:
    memory = ""
    if gpu.memory_mib is not None and gpu.free_mib is not None:
        memory = f", {gpu.free_mib / 1024:.1f} of {gpu.memory_mib / 1024:.1f} GiB free"
    return f"{gpu.name}, compute capability {gpu.capability or 'unknown'}{memory}"


def versions(facts: Facts, names: tuple[str, ...]) -> str:
    """The versions of the distributions that are installed, each with its name where there are
    several.
    """
    there = [name for name in names if name in facts.distributions]
    if len(there) == 1 and len(names) == 1:
        return facts.distributions[there[0]].version
    return ", ".join(f"{name} {facts.distributions[name].version}" for name in there)


def module_text(facts: Facts, name: str, names: tuple[str, ...]) -> str:
    """Version, what it runs on, and the folder."""
    module = facts.modules.get(name)
    if module is None:
        return "-"
    if module.error:
        return f"does not import: {module.error}"
    version = module.version or versions(facts, names[:1])
    return ", ".join(filter(None, [version, *details(module), module.library or module.location]))


def details(module: Module) -> Iterator[str]:
    if module.cuda:
        yield f"built for CUDA {module.cuda}"
    providers = [name.removesuffix("ExecutionProvider") for name in module.providers if name != "AzureExecutionProvider"]  # fmt: skip
    if providers:
        yield f"providers {' '.join(providers)}"


def stage_lines(stages: tuple[Stage, ...]) -> Iterator[str]:
    """One line for each row; below it the command that brings what is missing, once for rows
    that follow each other.
    """
    shown = ""
    for stage in stages:
        state = "ok" if stage.works else "--"
        text = f"needs {', '.join(stage.missing)}" if stage.missing else stage.note
        yield f"{state} {stage.name:<16}{stage.model:<17}{text}".rstrip()
        if stage.command and stage.command != shown:
            yield f"   {'':<33}$ {stage.command}"
        shown = stage.command
