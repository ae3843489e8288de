# SPDX-License-Identifier: Apache-2.0
"""trtexec: the command lines that measure a model as `infer.py --benchmark` does, and its results
in the same table.

Options come and go between releases, and TensorRT 11 changed three defaults: it leaves out the
copies of inputs and outputs, waits actively, and uses a CUDA graph, none of which 8.6 and 10 do
unless asked. The lines here ask for the same on all: copies, active waiting, a graph.

| | 8.6 | 10 | 11 |
|---|---|---|---|
| copies counted | default | default | --includeDataTransfers |
| active waiting, CUDA graph | --useSpinWait --useCudaGraph | the same | default |
| FP16, INT8 of a float32 file | --fp16, --int8 | --fp16, --int8 | removed: in the ONNX file |
| the types in the ONNX file | --fp16; --int8 --fp16 for Q/DQ | --stronglyTyped | default |
| libraries of plugins | --staticPlugins | --staticPlugins | --staticPlugins |
| an engine of another version | --versionCompatible | --versionCompatible | --versionCompatible |

Source: NVIDIA/TensorRT samples/common/sampleOptions.cpp and sampleReporting.cpp of releases 8.6 to
11.1.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtdet import checks, reading
from trtdet.deploy.model import Deployable, check_servable
from trtdet.errors import EngineError
from trtdet.machine import parse_version
from trtdet.run.benchmark import PERCENTILES, Measurement, Summary
from trtdet.runtimes.base import BatchTimes

#: Where NVIDIA's packages put it.
USUAL_PLACE = Path("/usr/src/tensorrt/bin/trtexec")
OLDEST = (8, 6)

Version = tuple[int, ...]


@dataclass(frozen=True)
class TrtexecOptions:
    """What to measure.

    Attributes:
        batch: images at a time; None: what the model prefers.
        precision: for an ONNX file: fp32, fp16, int8; "typed" takes the types in the file.
        save_engine: for an ONNX file: keep what is built.
        times: where trtexec writes the time of every batch.
        plugins: libraries that the model needs; those of the same name in an engine's sidecar are
            meant by it.
    """

    batch: int | None = None
    precision: str = "typed"
    save_engine: Path | None = None
    times: Path | None = None
    iterations: int = 200
    warmup_ms: int = 500
    device: int = 0
    plugins: tuple[Path, ...] = ()


def command(model: Deployable, version: Version, options: TrtexecOptions) -> list[str]:
    """trtexec's arguments for one version of TensorRT.

    Raises:
        EngineError: a version before 8.6, or an engine of TensorRT-RTX.
        ValueError: a batch the model does not take, or a precision that this version does not
            choose.
    """
    check_servable(model, "trtexec")
    if version < OLDEST:
        raise EngineError(
            f"--tensorrt_version {'.'.join(map(str, version))}: expected TensorRT 8.6 or later"
        )
    batch = options.batch or model.preferred
    if batch < model.smallest or (model.largest is not None and batch > model.largest):
        raise ValueError(
            f"--batch_size {batch}: {model.path.name} takes batches of {model.batches}"
        )
    arguments = _build_arguments(model, version, options, batch)
    if model.has_dynamic_shape:
        arguments.append(f"--shapes={_shape(model, batch)}")
    arguments += [f"--staticPlugins={path}" for path in _plugins(model, options)]
    if version >= (11,):
        arguments.append("--includeDataTransfers")
    else:
        arguments += ["--useSpinWait", "--useCudaGraph"]
    arguments += [
        f"--iterations={options.iterations}",
        f"--warmUp={options.warmup_ms}",
        "--duration=0",  # the iterations alone count
        f"--percentile={','.join(map(str, PERCENTILES))}",
        f"--device={options.device}",
    ]
    if options.times:
        arguments.append(f"--exportTimes={options.times}")
    return arguments


def _plugins(model: Deployable, options: TrtexecOptions) -> list[Path]:
    """Those named, and those that the sidecar names; a version-compatible engine carries its
    own.
    """
    named = {path.name for path in options.plugins}
    info = model.engine
    needed = info.plugins if info is not None and not info.version_compatible else ()
    return [*options.plugins, *(Path(name) for name in needed if name not in named)]


def version_fault(model: Deployable, version: Version) -> str | None:
    """Why this version would not load an engine, as far as the version tells."""
    if model.engine is None:
        return None
    built = parse_version(model.engine.version)
    parts = min(len(built), len(version))
    if model.engine.version_compatible:
        fits = version[:parts] >= built[:parts]
    else:
        fits = version[:parts] == built[:parts]
    if fits:
        return None
    return (
        f"{model.path} was built by TensorRT {model.engine.version}: trtexec of {'.'.join(map(str, version))} does not load it; "
        "build it again with that version"
    )


def _shape(model: Deployable, batch: int) -> str:
    return (
        f"{model.input_name}:{'x'.join(map(str, (batch, *model.spec.preprocessing.image_shape)))}"
    )


def _build_arguments(
    model: Deployable, version: Version, options: TrtexecOptions, batch: int
) -> list[str]:
    if model.engine is not None:
        arguments = [f"--loadEngine={model.path}"]
        if model.engine.version_compatible:  # or the runtime it carries is not let run
            arguments.append("--versionCompatible")
        if model.engine.dla_core is not None:
            arguments.append(f"--useDLACore={model.engine.dla_core}")
        return arguments
    arguments = [f"--onnx={model.path}", *_precision_arguments(model, version, options)]
    if model.has_dynamic_shape:
        arguments += [f"--{bound}Shapes={_shape(model, batch)}" for bound in ("min", "opt", "max")]
    if options.save_engine:
        arguments.append(f"--saveEngine={options.save_engine}")
    return arguments


def _precision_arguments(model: Deployable, version: Version, options: TrtexecOptions) -> list[str]:
    if options.precision == "typed":
        if version < (9, 1):
            return _flags_for_types(model, version)
        return ["--stronglyTyped"] if version < (11,) else []
    if options.precision == "fp32":
        return []
    if version >= (11,):
        raise ValueError(
            f"--precision {options.precision}: trtexec of TensorRT 11 takes the types in the ONNX file; write one with build_engine.py "
            f"--model {model.path} --precision {options.precision} --save_onnx FILE, and measure that"
        )
    # Without a calibration file, --int8 makes up its scales: a time to measure, not detections.
    return [f"--{options.precision}"] + (["--fp16"] if options.precision == "int8" else [])


def _flags_for_types(model: Deployable, version: Version) -> list[str]:
    """What a TensorRT without strong typing needs for the types in an ONNX file: it refuses Q/DQ
    without --int8, and computes nothing in FP16 without --fp16.

    Raises:
        ValueError: types that it does not have.
    """
    if model.precision == "fp32":
        return []
    name = ".".join(map(str, version))
    again = f"build_engine.py --model FILE --save_onnx {model.path} --precision"
    if model.precision not in ("fp16", "int8"):
        raise ValueError(
            f"{model.path}: is in {model.precision.upper()}, which TensorRT {name} does not have; write it again in another precision ({again} fp16), "
            "or take TensorRT 10 or later"
        )
    if model.precision == "int8" and model.rest != "fp32":
        raise ValueError(
            f"{model.path}: has Q/DQ of {model.rest.upper()} tensors, which TensorRT {name} does not read; write it again with float32 between "
            f"them ({again} int8 --rest_precision fp32)"
        )
    return [f"--{model.precision}"] + (["--fp16"] if model.precision == "int8" else [])


# ---- the installed one


def find_trtexec() -> Path:
    """The installed trtexec.

    Raises:
        EngineError: none.
    """
    found = shutil.which("trtexec")
    if found:
        return Path(found)
    if USUAL_PLACE.is_file():
        return USUAL_PLACE
    raise EngineError(
        f"trtexec: found none on PATH or at {USUAL_PLACE}; it comes with TensorRT's packages, not with pip. --tensorrt_version prints the "
        "line for another machine"
    )


def installed_version(trtexec: Path) -> Version:
    """What `trtexec --help` says of itself in its first line: "[TensorRT v101303]", "[TensorRT
    v8601]".

    Raises:
        EngineError: it does not run, or says something else.
    """
    try:
        result = subprocess.run(
            [str(trtexec), "--help"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{trtexec}: does not run: {error}") from error
    match = re.search(r"\[TensorRT v(\d+)\]", result.stdout + result.stderr)
    if match is None:
        raise EngineError(
            f"{trtexec}: expected '[TensorRT v...]' in its output, found none; name it with --tensorrt_version"
        )
    return parse_banner(int(match[1]))


def parse_banner(number: int) -> Version:
    """NV_TENSORRT_VERSION: 8601 -> (8, 6, 1); two digits a part from TensorRT 10 on, 101303 ->
    (10, 13, 3).
    """
    if number < 100_000:
        return number // 1000, number // 100 % 10, number % 100
    return number // 10_000, number // 100 % 100, number % 100


def run(trtexec: Path, arguments: Sequence[str]) -> str:
    """Run it.

    Returns:
        Its log.

    Raises:
        EngineError: it failed; with its errors.
    """
    line = [str(trtexec), *arguments]
    try:
        result = subprocess.run(
            line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise EngineError(f"{trtexec}: does not run: {error}") from error
    if result.returncode != 0:
        errors = [text for text in result.stdout.splitlines() if "[E]" in text]
        reason = " ".join(errors[:3]) or result.stdout[-500:]
        raise EngineError(f"{shlex.join(line)}: exit status {result.returncode}: {reason}")
    return result.stdout


# ---- results


#: Longest time, in ms: a month.
LONGEST_MS = 2.7e9


@dataclass(frozen=True)
class _Record:
    """One batch of --exportTimes, under trtexec's names; it writes more than these."""

    startEnqMs: float
    endEnqMs: float
    startH2dMs: float
    endD2hMs: float
    h2dMs: float
    computeMs: float
    d2hMs: float

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            checks.finite(name, value, 0, LONGEST_MS)


def measurement_of_times(path: Path, batch_size: int) -> Measurement:
    """The table from --exportTimes: one record per batch.

    Raises:
        ValueError: not such a file.
    """
    records: list[_Record] = reading.read(
        path,
        list[_Record],
        remedy="give the file of trtexec --exportTimes, with a record per batch",
    )
    if not records:
        raise ValueError(f"{path}: expected the file of trtexec --exportTimes, with a record per batch, found none")  # fmt: skip
    times = [BatchTimes(r.endEnqMs - r.startEnqMs, r.h2dMs, r.computeMs, r.d2hMs) for r in records]
    walltime_s = (records[-1].endD2hMs - records[0].startH2dMs) / 1000
    if walltime_s <= 0:
        raise ValueError(f"{path}: expected batches one after the other, found an end at {records[-1].endD2hMs:g} ms, a start at {records[0].startH2dMs:g} ms")  # fmt: skip
    summaries = {
        "Latency": Summary.of([t.latency_ms for t in times]),
        "Enqueue Time": Summary.of([t.enqueue_ms for t in times]),
        "H2D Latency": Summary.of([t.h2d_ms for t in times]),
        "GPU Compute Time": Summary.of([t.compute_ms for t in times]),
        "D2H Latency": Summary.of([t.d2h_ms for t in times]),
    }
    return Measurement(batch_size, len(times), 0, walltime_s, summaries)


def batch_of_log(text: str) -> int | None:
    """The batch size in the command line that a log begins with.

    None for a model of one shape, which needs no --shapes.
    """
    found = re.search(r"--shapes=[^\s:]+:(\d{1,9})x", text)
    return int(found[1]) if found else None


def measurement_of_log(text: str, batch_size: int) -> Measurement:
    """The table from a log's performance summary.

    Raises:
        ValueError: no summary in it.
    """
    throughput = re.search(r"Throughput: ([\d.e+-]+) qps", text)
    walltime = re.search(r"Total Host Walltime: ([\d.e+-]+) s", text)
    summaries = {}
    for name in ("Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency"):
        line = re.search(rf"(?:^|\] ){name}: (min = .*)$", text, re.MULTILINE)
        if line:
            summaries[name] = _summary(line[1])
    if not (throughput and walltime and summaries):
        raise ValueError(
            "expected a log of trtexec with its performance summary, found none; it ends in one when the inference was not skipped"
        )
    walltime_s = _logged("Total Host Walltime", walltime[1], LONGEST_MS / 1000)
    if walltime_s <= 0:
        raise ValueError(f"Total Host Walltime: expected more than 0 s, found {walltime[1]}")
    batches = round(_logged("Throughput", throughput[1], 1e9) * walltime_s)
    return Measurement(batch_size, batches, 0, walltime_s, summaries)


def _logged(name: str, text: str, largest: float = LONGEST_MS) -> float:
    """A number of a log.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number, found {checks.shown(text)}") from None
    checks.finite(name, value, 0, largest)
    return value


def _summary(text: str) -> Summary:
    values = {
        name: _logged(name, value)
        for name, value in re.findall(r"([\w()%.]+) = ([\d.e+-]+) ms", text)
    }
    missing = [name for name in ("min", "max", "mean", "median") if name not in values]
    if missing:
        raise ValueError(f"expected min, max, mean and median in ms, found no {missing[0]} in {checks.shown(text)}")  # fmt: skip
    percentiles = {
        percent: values.get(f"percentile({percent}%)", float("nan")) for percent in PERCENTILES
    }
    return Summary(values["min"], values["max"], values["mean"], values["median"], percentiles)
