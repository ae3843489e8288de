# SPDX-License-Identifier: Apache-2.0
"""The one command that brings what is missing, for this Python and this card."""

from __future__ import annotations

from collections.abc import Sequence

from trtdet.doctor.cards import OLDEST_CUDA, OLDEST_DRIVER, tensorrt_for
from trtdet.doctor.facts import Facts
from trtdet.doctor.packages import BASE, extra_of, requirement_file
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
        return activate(facts)
    if tensorrt and facts.jetson and facts.jetpack_tensorrt:  # there, but not to be seen from here
        base = f"pip install -r {BASE}" if facts.checkout else "pip install trtdet"
        return (
            f"python3 -m venv --clear --system-site-packages .venv && {activate(facts)} && {base}"
        )
    parts = [pip_install(facts, modules)] if modules else []
    if tensorrt:
        parts.append(tensorrt_command(facts))
    commands = " && ".join(filter(None, parts))
    return f"{new_environment(facts)}{commands}" if commands else ""


def pip_install(facts: Facts, modules: Sequence[str]) -> str:
    """pip with the files of the repository that list these modules, or with the extras of the
    installed package.

    CUDA for Python is named alone: the files that have it bring a TensorRT, which is another
    question.
    """
    files = dict.fromkeys(requirement_file(module) for module in modules if module != "cuda")
    if facts.checkout:
        what = [f"-r {file}" for file in files]
    else:
        extras = ",".join(filter(None, map(extra_of, files)))
        what = [f'"trtdet[{extras}]"' if extras else "trtdet"] if files else []
    if "cuda" in modules:
        what.append(f'"{cuda_python(facts)}"')
    return f"pip install {' '.join(what)}"


def cuda_python(facts: Facts) -> str:
    """The CUDA for Python that goes with the driver."""
    return f"cuda-python>=12.9.1,<{13 if driver_cuda(facts) == 12 else 14}"


def activate(facts: Facts) -> str:
    """The line that activates the environment of the repository."""
    windows = facts.system.startswith("Windows")
    return ".venv\\Scripts\\activate" if windows else ". .venv/bin/activate"


def new_environment(facts: Facts) -> str:
    """What goes before pip where the system's Python takes no packages; JetPack's TensorRT stays
    visible in it.
    """
    if facts.environment or not facts.managed:
        return ""
    visible = " --system-site-packages" if facts.jetson else ""
    return f"python3 -m venv{visible} .venv && {activate(facts)} && "


def tensorrt_command(facts: Facts) -> str:
    """The command that brings a TensorRT for this machine: JetPack's on a Jetson, else wheels
    for the card and the driver's CUDA.
    """
    if facts.jetson:  # a newer one comes with a newer JetPack alone
        return "" if facts.jetpack_tensorrt else "sudo apt-get install nvidia-jetpack"
    cuda = driver_cuda(facts)
    if cuda is not None and cuda < OLDEST_CUDA:  # the driver comes first
        return ""
    capabilities = [parse_version(gpu.capability) for gpu in facts.gpus if gpu.capability]
    ranges = [tensorrt_for(capability) for capability in capabilities] or [((8, 6), (12,))]
    first, end = max(low for low, _ in ranges), min(high for _, high in ranges)
    if first >= end:  # cards that no release knows together
        return ""
    # "tensorrt" brings CUDA 13's:
    # docs.nvidia.com/deeplearning/tensorrt/10.16.1/installing-tensorrt/install-pip.html
    wheel = "tensorrt-cu12" if cuda == 12 and end > (10,) else "tensorrt"
    old = [name for name in TENSORRT_WHEELS if name in facts.distributions and name != wheel]
    remove = f"pip uninstall -y {' '.join(old)} && " if old else ""
    return f'{remove}pip install --upgrade "{wheel}>={text(first)},<{text(end)}" "{cuda_python(facts)}"'


def driver_cuda(facts: Facts) -> int | None:
    """The newest major version of CUDA that the driver supports.

    None where there is no driver, or a Jetson's that does not say.
    """
    if facts.driver_cuda:
        return parse_version(facts.driver_cuda)[0]
    if not facts.driver or facts.jetson:  # L4T numbers the drivers of a Jetson in its own way
        return None
    number = parse_version(facts.driver)[0]
    return max((cuda for cuda, driver in OLDEST_DRIVER.items() if number >= driver), default=0)


def text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
