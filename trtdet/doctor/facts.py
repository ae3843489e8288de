# SPDX-License-Identifier: Apache-2.0
"""What is on this machine, read with the standard library alone.

Nothing is changed, and nothing is judged: `judge` does that.

Packages are imported in child processes with a time limit: one that crashes or hangs is a fact,
too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from trtdet.about import __version__
from trtdet.doctor.packages import BASE, REQUIREMENTS
from trtdet.machine import available_cores, cpu_name, memory_gib

#: Modules that are imported to see whether they work; each group in a process of its own.
PROBED = (
    ("numpy", "msgspec", "onnx", "onnx_graphsurgeon", "PIL", "cv2", "pycocotools", "tqdm"),
    ("onnxruntime",),
    ("tensorrt",),
    ("tensorrt_rtx",),
    ("cuda.bindings.runtime",),
    ("tensorflow",),
)
#: Distributions of which the version is enough.
LISTED = (
    "numpy", "msgspec", "onnx", "onnx-graphsurgeon", "pillow", "opencv-python-headless", "opencv-python", "pycocotools", "tqdm", "matplotlib",
    "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-cu11", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-dispatch", "tensorrt-rtx",
    "cuda-python", "cuda-bindings",
    "tensorflow", "tensorflow-cpu", "tf2onnx", "tritonclient", "ray", "av",
    "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13",
)  # fmt: skip
PROBE = Path(__file__).with_name("probe.py")
ROOT = Path(__file__).parents[2]
#: Variables that name folders in which modules leave something when they are imported: Keras,
#: Matplotlib, CUDA, anyone.
CACHES = ("KERAS_HOME", "MPLCONFIGDIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "TMPDIR")
#: Seconds for a group of modules, and for nvidia-smi.
PROBE_SECONDS = 120
TOOL_SECONDS = 30
#: Where the driver's tool is when PATH does not have it: WSL.
MORE_TOOLS = "/usr/lib/wsl/lib"


@dataclass(frozen=True)
class Gpu:
    """One card. None: the driver does not say.

    Attributes:
        capability: compute capability, such as "8.9".
    """

    name: str
    capability: str | None = None
    memory_mib: int | None = None
    free_mib: int | None = None


@dataclass(frozen=True)
class Module:
    """A module that is installed.

    Attributes:
        location: the folder it was imported from.
        error: why it does not import; "" where it does.
        providers: ONNX Runtime's.
        cuda: the CUDA that ONNX Runtime was built for; "" for none.
        library: the TensorRT library that it loaded.
        capabilities: compute capabilities that TensorRT-RTX names; () where it names none.
    """

    version: str = ""
    location: str = ""
    error: str = ""
    providers: tuple[str, ...] = ()
    cuda: str = ""
    library: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, and the folder it is in."""

    version: str
    location: str = ""


@dataclass(frozen=True)
class Facts:
    """What is on a machine.

    Attributes:
        environment: the virtual or conda environment that runs; "" for the system's Python.
        managed: the system's Python takes no packages from pip.
        checkout: this is a clone of the repository, which has the requirement files.
        other_environment: the repository has a .venv, and it is not the one that runs.
        gpu_error: why nvidia-smi gave no answer; "" where it did, or is not there.
        driver_cuda: the newest CUDA that the driver supports.
        jetson: the L4T release, such as "R36.4"; None elsewhere.
        jetpack_tensorrt: the folder of JetPack's TensorRT for Python; "" where there is none.
        modules: name -> what was found; one that is not installed has no entry.
        requirements: distribution -> the versions that this project takes, such as ">=1.26,<3".
    """

    system: str
    python: str
    trtdet: str = __version__
    environment: str = ""
    managed: bool = False
    checkout: bool = True
    other_environment: bool = False
    cpu: str = ""
    cores: int = 1
    memory_gib: float | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    driver: str | None = None
    driver_cuda: str | None = None
    jetson: str | None = None
    jetpack_tensorrt: str = ""
    trtexec: str = ""
    modules: Mapping[str, Module] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    requirements: Mapping[str, str] = field(default_factory=dict)


def collect() -> Facts:
    """Read this machine. Takes some seconds: TensorFlow alone needs that to be imported."""
    gpus, driver, cuda, gpu_error = read_gpus()
    checkout = (ROOT / BASE).is_file()
    environment = running_environment()
    venv = ROOT / ".venv"
    return Facts(
        system=platform.platform(),
        python=platform.python_version(),
        environment=shortened(environment),
        managed=Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists(),
        checkout=checkout,
        other_environment=checkout and venv.is_dir() and not same_folder(venv, Path(sys.prefix)),
        cpu=cpu_name(),
        cores=available_cores(),
        memory_gib=memory_gib(),
        gpus=gpus,
        gpu_error=gpu_error,
        driver=driver,
        driver_cuda=cuda,
        jetson=parse_l4t(read_text(Path("/etc/nv_tegra_release"))),
        jetpack_tensorrt=system_tensorrt(Path("/usr/lib")),
        trtexec=shortened(shutil.which("trtexec") or ""),
        modules=probe_all(),
        distributions=list_distributions(),
        requirements=read_requirements(ROOT) if checkout else package_requirements(),
    )


# --- Python and its packages ----------------------------------------------------------------------


def running_environment() -> str:
    """The folder of the virtual or conda environment that runs this; "" for the system's Python."""
    return sys.prefix if sys.prefix != sys.base_prefix else os.environ.get("CONDA_PREFIX", "")


def same_folder(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.resolve() == b.resolve()


def shortened(path: str) -> str:
    """A path with ~ for the home folder: a report need not say whose it is."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if home != "/" and path.startswith(f"{home}/") else path


def probe_all() -> dict[str, Module]:
    """Import the modules of `PROBED`, each group in a process of its own, at the same time."""
    with ThreadPoolExecutor(len(PROBED)) as pool:
        answers = pool.map(probe, PROBED)
        return {name: module for group in answers for name, module in group.items()}


def probe(names: Sequence[str], seconds: float = PROBE_SECONDS) -> dict[str, Module]:
    """Import modules in a child process; those that are not installed are left out."""
    environment = {"ORT_DISABLE_TELEMETRY": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    command = [sys.executable, *interpreter_flags(), str(PROBE), *names]
    with tempfile.TemporaryDirectory(prefix="trtdet-doctor-", ignore_cleanup_errors=True) as folder:
        return run_probe(command, names, seconds, {**environment, **dict.fromkeys(CACHES, folder)})


def run_probe(
    command: Sequence[str], names: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> dict[str, Module]:
    """The child process of `probe`."""
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds)  # fmt: skip
        output, ended = done.stdout, f"its import ended the process with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"its import took more than {seconds:g} s"
    return parse_probe(names, output.decode("utf-8", "replace"), ended)


def parse_probe(names: Sequence[str], output: str, ended: str) -> dict[str, Module]:
    """The child's lines; the first module without one is what ended it, those after it are left
    out.
    """
    found = {}
    answered = 0
    for name, line in zip(names, output.splitlines(), strict=False):
        answer = json.loads(line)
        answered += 1
        if answer.pop("missing", False):
            continue
        del answer["module"]
        answer["location"] = shortened(answer.get("location", ""))
        answer["library"] = shortened(answer.get("library", ""))
        lists = {key: tuple(answer.get(key, ())) for key in ("providers", "capabilities")}
        found[name] = Module(**{**answer, **lists})
    if answered < len(names):
        found[names[answered]] = Module(error=ended)
    return found


def interpreter_flags() -> list[str]:
    """Flags with which a child looks for modules where this process does; it leaves no compiled
    files.
    """
    flags = sys.flags
    chosen = {"-S": flags.no_site, "-E": flags.ignore_environment, "-s": flags.no_user_site, "-I": flags.isolated}  # fmt: skip
    return ["-B", *(flag for flag, given in chosen.items() if given)]


def list_distributions() -> dict[str, Distribution]:
    found = {}
    for name in LISTED:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        location = str(distribution.locate_file(""))
        found[name] = Distribution(distribution.version, shortened(location.rstrip("/")))
    return found


def read_requirements(root: Path) -> dict[str, str]:
    """What the requirement files of a clone ask for."""
    files = (BASE, *dict.fromkeys(REQUIREMENTS.values()))
    return parse_requirements([line for name in files for line in read_text(root / name).splitlines()])  # fmt: skip


def package_requirements() -> dict[str, str]:
    """What the installed package asks for."""
    try:
        return parse_requirements(metadata.requires("trtdet") or [])
    except metadata.PackageNotFoundError:
        return {}


def parse_requirements(lines: Sequence[str]) -> dict[str, str]:
    """ "ray[data]>=2.49,<2.61  # why" -> {"ray": ">=2.49,<2.61"}; the packaging standard's order
    of limits does not matter.
    """
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([<>=!~][^;#]*)", line)
        if match:
            found[match[1].lower()] = match[2].strip()
    return found


def read_text(path: Path) -> str:
    """A file's text; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- the GPU --------------------------------------------------------------------------------------


def read_gpus() -> tuple[tuple[Gpu, ...], str | None, str | None, str]:
    """The cards, the driver, the newest CUDA it supports, and why there is no answer."""
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=MORE_TOOLS)
    if tool is None:
        return (), None, None, ""
    error = ""
    # Drivers before 510 do not know compute_cap.
    for fields in ("name,compute_cap,memory.total,memory.free,driver_version", "name,name,memory.total,memory.free,driver_version"):  # fmt: skip
        status, output = run_tool([tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        if status == 0:
            gpus, driver = parse_gpus(output)
            return gpus, driver, parse_driver_cuda(run_tool([tool])[1]), ""
        error = error or " ".join(output.split()) or f"status {status}"
    return (), None, None, error


def run_tool(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a program of the driver."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TOOL_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {TOOL_SECONDS} s"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def parse_gpus(output: str) -> tuple[tuple[Gpu, ...], str | None]:
    """nvidia-smi's lines of name, compute capability, memory, free memory, driver; "[N/A]" is
    what a Jetson says.
    """
    gpus, driver = [], None
    for line in output.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5:
            continue
        name, capability, total, free, version = parts
        gpus.append(
            Gpu(
                name,
                capability if re.fullmatch(r"\d+\.\d+", capability) else None,
                int(total) if total.isdecimal() else None,
                int(free) if free.isdecimal() else None,
            )
        )
        driver = version if version[:1].isdigit() else None
    return tuple(gpus), driver


def parse_driver_cuda(output: str) -> str | None:
    """ "CUDA Version: 12.8" in the head of nvidia-smi's table: the newest that the driver supports,
    not what is installed.

    Source: docs.nvidia.com/deeplearning/tensorrt/11.4.0/installing-tensorrt/prerequisites.html
    """
    match = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", output)
    return match[1] if match else None


def parse_l4t(text: str) -> str | None:
    """ "# R36 (release), REVISION: 4.3, ..." of /etc/nv_tegra_release -> "R36.4.3".

    None where it says something else.
    """
    match = re.match(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"R{match[1]}.{match[2]}" if match else None


def system_tensorrt(root: Path) -> str:
    """The folder of the TensorRT that the system's packages bring to Python, as JetPack's do; ""
    for none.
    """
    found = sorted(root.glob("python3*/dist-packages/tensorrt/__init__.py"))
    return str(found[0].parent) if found else ""
