# SPDX-License-Identifier: Apache-2.0
"""The one command that brings what is missing, for this Python and this card."""

from __future__ import annotations

from collections.abc import Sequence

from trtdet.doctor.cards import OLDEST_CUDA, OLDEST_DRIVER, tensorrt_for
from trtdet.doctor.facts import Facts
from trtdet.doctor.packages import extra_of, requirement_file
from trtdet.machine import parse_version

#: Distributions that bring the module `tensorrt`. `tensorrt` is the one for the newest CUDA.
TENSORRT_WHEELS = ("tensorrt", "tensorrt-cu11", "tensorrt-cu12", "tensorrt-cu13")


def bring(facts: Facts, modules: Sequence[str], *, tensorrt: bool = False) -> str:
    """The command that installs modules, and a TensorRT for this card; "" for nothing.

    Where the repository has an environment that does not run, it is that which is missing.
    """
    if not modules and not tensorrt:
        return ""
    if facts.other_environment:
        return ". .venv/bin/activate"
    if (
        tensorrt and facts.jetson and facts.jetpack_tensorrt
    ):  # it is there, this environment does not see it
        return "python3 -m venv --clear --system-site-packages .venv && . .venv/bin/activate && pip install -r requirements.txt"
    parts = [pip_install(facts, modules)] if modules else []
    if tensorrt:
        parts.append(tensorrt_command(facts))
    commands = " && ".join(filter(None, parts))
    return f"{new_environment(facts)}{commands}" if commands else ""


def pip_install(facts: Facts, modules: Sequence[str]) -> str:
    """pip with the files of the repository that list these modules, or with the extras of the installed package."""
    files = dict.fromkeys(requirement_file(module) for module in modules)
    if facts.checkout:
        return "pip install " + " ".join(f"-r {file}" for file in files)
    extras = ",".join(filter(None, map(extra_of, files)))
    return f'pip install "trtdet[{extras}]"' if extras else "pip install trtdet"


def new_environment(facts: Facts) -> str:
    """What goes before pip where the system's Python takes no packages; JetPack's TensorRT stays visible in it."""
    if facts.environment or not facts.managed:
        return ""
    visible = " --system-site-packages" if facts.jetson else ""
    return f"python3 -m venv{visible} .venv && . .venv/bin/activate && "


def tensorrt_command(facts: Facts) -> str:
    """The command that brings a TensorRT for this machine: JetPack's on a Jetson, else wheels for the card and the driver's CUDA."""
    if facts.jetson:
        return "sudo apt-get install nvidia-jetpack"
    cuda = driver_cuda(facts)
    if cuda is not None and cuda < OLDEST_CUDA:  # the driver comes first
        return ""
    capabilities = [parse_version(gpu.capability) for gpu in facts.gpus if gpu.capability]
    ranges = [tensorrt_for(capability) for capability in capabilities] or [((8, 6), (12,))]
    first, end = max(low for low, _ in ranges), min(high for _, high in ranges)
    # "tensorrt" brings CUDA 13's: docs.nvidia.com/deeplearning/tensorrt/10.16.1/installing-tensorrt/install-pip.html
    wheel = "tensorrt-cu12" if cuda == 12 and end > (10,) else "tensorrt"
    bindings = "cuda-python>=12.9.1,<13" if cuda == 12 else "cuda-python>=12.9.1,<14"
    old = [name for name in TENSORRT_WHEELS if name in facts.distributions and name != wheel]
    remove = f"pip uninstall -y {' '.join(old)} && " if old else ""
    return f'{remove}pip install --upgrade "{wheel}>={text(first)},<{text(end)}" "{bindings}"'


def driver_cuda(facts: Facts) -> int | None:
    """The newest major version of CUDA that the driver supports; None where there is no driver, or a Jetson's that does not say."""
    if facts.driver_cuda:
        return parse_version(facts.driver_cuda)[0]
    if not facts.driver or facts.jetson:  # L4T numbers the drivers of a Jetson in its own way
        return None
    number = parse_version(facts.driver)[0]
    return max((cuda for cuda, driver in OLDEST_DRIVER.items() if number >= driver), default=0)


def text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
