# SPDX-License-Identifier: Apache-2.0
"""Pairs that are known not to go together: driver and CUDA, TensorRT and card, two packages of
one module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trtdet.doctor.cards import (
    DRIVER_OF_TENSORRT_11,
    OLDEST_CUDA,
    OLDEST_DRIVER,
    knows_card,
    oldest_card,
)
from trtdet.doctor.facts import Facts, Gpu
from trtdet.doctor.install import TENSORRT_WHEELS, driver_cuda, tensorrt_command, text
from trtdet.machine import parse_version

#: The oldest TensorRT that engine/flavor.py takes.
OLDEST_TENSORRT = (8, 6)
REPLACE_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


@dataclass(frozen=True)
class Finding:
    """What does not fit, and the command that mends it; "" where no command does."""

    what: str
    command: str = ""


def find_problems(facts: Facts) -> Iterator[Finding]:
    """All that is known not to fit, in the order in which it is best mended."""
    yield from driver_problems(facts)
    yield from tensorrt_problems(facts)
    yield from onnxruntime_problems(facts)
    for name, module in facts.modules.items():
        if module.error and name != "onnxruntime":
            yield Finding(f"{name} is installed but does not import: {module.error}")
    yield from version_problems(facts)


def driver_problems(facts: Facts) -> Iterator[Finding]:
    """The driver itself, and packages of a CUDA that it is too old for."""
    if facts.gpu_error:
        yield Finding(f"nvidia-smi does not reach the driver: {facts.gpu_error}; a reboot helps after an update of the driver")  # fmt: skip
    newest = driver_cuda(facts)
    if newest is not None and newest < OLDEST_CUDA:
        yield Finding(f"driver {facts.driver} supports CUDA {newest}; CUDA for Python from 12.9.1 on needs driver {OLDEST_DRIVER[OLDEST_CUDA]} or later: update the driver")  # fmt: skip
    for what, cuda in cuda_in_use(facts):
        if reason := driver_refuses(facts, cuda):
            command = "" if what.startswith("ONNX Runtime") else tensorrt_command(facts)
            yield Finding(f"{what} is for CUDA {cuda}; {reason}", command)
    version = facts.distributions.get("tensorrt-cu12") or facts.distributions.get("tensorrt")
    old = facts.driver is not None and major(facts.driver) < DRIVER_OF_TENSORRT_11
    if version and old and not facts.jetson and major(version.version) >= 11:
        yield Finding(f"TensorRT {version.version} needs driver {DRIVER_OF_TENSORRT_11} or later, here is {facts.driver}; update the driver")  # fmt: skip


def cuda_in_use(facts: Facts) -> Iterator[tuple[str, int]]:
    """Packages that were built for one major version of CUDA."""
    for name in ("tensorrt-cu11", "tensorrt-cu12", "tensorrt-cu13"):
        if name in facts.distributions:
            yield f"{name} {facts.distributions[name].version}", int(name[-2:])
    if bindings := facts.distributions.get("cuda-bindings"):
        yield f"cuda-bindings {bindings.version}", major(bindings.version)
    module = facts.modules.get("onnxruntime")
    if module and module.cuda:
        yield f"ONNX Runtime {module.version}", major(module.cuda)


def driver_refuses(facts: Facts, cuda: int) -> str:
    """Why the driver does not run a major version of CUDA; "" where it does, or where there is no
    driver to ask.

    Within a major version any driver that supports the first release will do.
    """
    supported = driver_cuda(facts)
    if supported is None or cuda <= supported:
        return ""
    needed = OLDEST_DRIVER.get(cuda)
    advice = f"CUDA {cuda} needs driver {needed} or later" if needed else "update the driver"
    here = f" supports CUDA {facts.driver_cuda}" if facts.driver_cuda else ""
    return f"{'' if here else 'here is '}driver {facts.driver}{here}; {advice}"


def tensorrt_problems(facts: Facts) -> Iterator[Finding]:
    """TensorRT and the cards, and several TensorRTs for one module."""
    for reason in tensorrt_refuses(facts):
        yield Finding(reason, tensorrt_command(facts))
    if imports(facts, "tensorrt_rtx"):
        names = ", ".join(facts.modules["tensorrt_rtx"].capabilities)
        for gpu in facts.gpus:
            if not rtx_knows(facts, gpu):
                command = "" if imports(facts, "tensorrt") else tensorrt_command(facts)
                yield Finding(f"TensorRT-RTX {facts.modules['tensorrt_rtx'].version} runs on compute capability {names}; {card(gpu)} needs TensorRT (--flavor tensorrt)", command)  # fmt: skip
    wheels = [name for name in TENSORRT_WHEELS if from_pip(facts, name)]
    if facts.jetson and facts.jetpack_tensorrt and wheels:
        # "NVIDIA JetPack is not supported":
        # docs.nvidia.com/deeplearning/tensorrt/11.2.1/installing-tensorrt/install-pip.html
        found = ", ".join(f"{name} {facts.distributions[name].version}" for name in wheels)
        yield Finding(f"{found} from pip hides JetPack's TensorRT in {facts.jetpack_tensorrt}; a Jetson ({facts.jetson}) needs that one", f"pip uninstall -y {' '.join(wheels)}")  # fmt: skip
    majors = [name for name in wheels if name != "tensorrt"]
    if len(majors) > 1:
        yield Finding(f"{' and '.join(majors)} bring one module, tensorrt; the one installed last is used", tensorrt_command(facts))  # fmt: skip


def tensorrt_refuses(facts: Facts) -> list[str]:
    """Why the TensorRT that is here cannot be used with the cards; empty where it can, or where
    it does not import.
    """
    module = facts.modules.get("tensorrt")
    if module is None or module.error:
        return []
    version = parse_version(module.version)
    if version < OLDEST_TENSORRT:
        # docs.pytorch.org/TensorRT/getting_started/jetpack: JetPack 6.1 and 6.2 have TensorRT 10.3.
        jetpack = ", which a newer JetPack brings (6.1: 10.3)" if facts.jetson else ""
        return [f"TensorRT {module.version}: 8.6 or later is needed{jetpack}"]
    reasons = []
    for gpu in facts.gpus:
        capability = parse_version(gpu.capability) if gpu.capability else None
        if capability is None or knows_card(version, capability):
            continue
        runs_on = f"runs on compute capability {text(oldest_card(version))} and later"
        why = runs_on if capability < oldest_card(version) else "came before this card"
        reasons.append(f"TensorRT {module.version} {why}; here is {card(gpu)}")
    return reasons


def onnxruntime_problems(facts: Facts) -> Iterator[Finding]:
    """Both packages write the same folder; whichever came last has its files there, and GPU
    providers vanish without a word.

    Source: github.com/microsoft/onnxruntime/issues/26996.
    """
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in facts.distributions]
    module = facts.modules.get("onnxruntime")
    if len(both) == 2:
        gpu = bool(module and "CUDAExecutionProvider" in module.providers)
        state = "the GPU's is in use now" if gpu else "the CPU's is in use now"
        yield Finding(f"onnxruntime and onnxruntime-gpu are both installed, in one folder ({state}); keep one", REPLACE_ONNXRUNTIME)  # fmt: skip
    if module and module.error:
        yield Finding(f"onnxruntime is installed but does not import: {module.error}", f"pip install --force-reinstall {both[-1] if both else 'onnxruntime'}")  # fmt: skip


def version_problems(facts: Facts) -> Iterator[Finding]:
    """Packages whose version is not one that this project takes.

    TensorRT has rules of its own, above.
    """
    for name, wanted in facts.requirements.items():
        for installed in (name, "onnxruntime-gpu") if name == "onnxruntime" else (name,):
            found = facts.distributions.get(installed)
            if found and name != "tensorrt" and not within(found.version, wanted):
                yield Finding(f"{installed} {found.version} is installed, trtdet takes {wanted}", f'pip install "{installed}{wanted}"')  # fmt: skip


def within(version: str, wanted: str) -> bool:
    """Whether a version lies in ">=1.26,<3"; other signs are not looked at."""
    number = parse_version(version)
    for part in wanted.replace(" ", "").split(","):
        if part.startswith(">=") and number < parse_version(part[2:]):
            return False
        if part[:1] == "<" and part[1:2].isdigit() and number >= parse_version(part[1:]):
            return False
    return True


# --- questions that `judge` asks, too -------------------------------------------------------------


def has_gpu(facts: Facts) -> bool:
    return bool(facts.gpus) or facts.jetson is not None


def imports(facts: Facts, module: str) -> bool:
    return module in facts.modules and not facts.modules[module].error


def rtx_knows(facts: Facts, gpu: Gpu) -> bool:
    """Whether the TensorRT-RTX that is here runs on a card; it says so itself."""
    known = facts.modules["tensorrt_rtx"].capabilities
    return gpu.capability is None or not known or gpu.capability in known


def from_pip(facts: Facts, name: str) -> bool:
    """Whether a distribution is none of the system's packages."""
    found = facts.distributions.get(name)
    return found is not None and not found.location.startswith("/usr/lib/")


def card(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.capability})"


def major(version: str) -> int:
    return parse_version(version)[0]
