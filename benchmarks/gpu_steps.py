# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu_report.py: each runs one command of this project as a user would, in a
process of its own, and becomes a `Line`.
"""

import filecmp
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trtdet.deploy.trtexec import find_trtexec
from trtdet.errors import EngineError
from trtdet.parity.options import limits_for

ROOT = Path(__file__).resolve().parents[1]
STANDIN_INFER = ROOT / "tests" / "standins" / "standin_infer.py"

#: "ok" is a step that did what it should with a stand-in behind it: it says nothing about a GPU
#: with TensorRT.
Status = Literal["pass", "ok", "fail", "skipped"]

#: Seconds that a step may take.
LIMIT_S = 900
#: Characters of a log that are kept, from its end.
LOG_CHARACTERS = 6000
#: Images of the step that is interrupted.
MANY_IMAGES = 600
#: Names of lines, after that of the precision: of its build, and of the first run of its model.
BUILD, FIND = ": build", ": infer.py"
#: The first compute capability with each type.
CAPABILITY_OF = {"bf16": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its status, -1 where it ran out of time, and stdout and stderr
    together.
    """

    status: int
    text: str
    seconds: float


Execute = Callable[[Sequence[str]], Outcome]


def execute(command: Sequence[str]) -> Outcome:
    """Run a command in the repository; it is killed, children too, after `LIMIT_S`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=LIMIT_S)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            status, text = -1, f"{text}\nended after {LIMIT_S} s"
    return Outcome(status, text, time.monotonic() - start)


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        detail: what was found, or why it failed or was skipped.
        log: the end of what the command printed.
    """

    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0
    command: str = ""
    log: str = ""


@dataclass
class Row:
    """Figures of one precision; None: not measured.

    Attributes:
        ran_by: what computed all of them but the size.
        size_mib, size_of: of the engine, and what built it.
    """

    precision: str
    ran_by: str = ""
    ap: float | None = None
    ap_difference: float | None = None
    score_difference: float | None = None
    box_difference: float | None = None
    batch: int | None = None
    median_ms: float | None = None
    p99_ms: float | None = None
    images_per_second: float | None = None
    trtexec_images_per_second: float | None = None
    size_mib: float | None = None
    size_of: str = ""


@dataclass(frozen=True)
class Setup:
    """What is run, and on what.

    Attributes:
        out: absolute; everything that is written lies below it.
        batch: MIN:OPT:MAX of the engines; None: the model's own, which is fixed.
        flavor: of TensorRT; None: a stand-in runs.
        builder: of the stand-in: TensorRT-RTX, which builds without a GPU, where it is installed.
        capability: of the first GPU; None: there is none, or it does not say.
        ran_by: what runs the models, for the reader.
        provider: of ONNX Runtime, where it is the stand-in.
        gpus: how many there are.
    """

    out: Path
    model: Path
    source: Path
    annotations: Path | None
    flavor: str | None
    ran_by: str
    batch: str | None = None
    builder: str = ""
    capability: tuple[int, int] | None = None
    provider: str = "cpu"
    gpus: int = 0
    iterations: int = 200
    without: frozenset[str] = frozenset()
    execute: Execute = field(default=execute, compare=False)

    @property
    def stand_in(self) -> bool:
        return self.flavor is None

    @property
    def good(self) -> Status:
        """What a step that does what it should is called."""
        return "ok" if self.stand_in else "pass"

    def script(self, name: str, *options: object) -> list[str]:
        """A command line of one of the scripts in the root of the repository, or of another
        Python file.
        """
        return [sys.executable, name, *map(str, options)]

    def run(self, name: str, command: Sequence[str], *, good: Sequence[int] = (0,)) -> tuple[Line, Outcome]:  # fmt: skip
        """A line for a command, which passes with one of these exit statuses."""
        outcome = self.execute(command)
        status: Status = self.good if outcome.status in good else "fail"
        detail = "" if status != "fail" else last_error(outcome)
        line = Line(
            name, status, self.private(detail), outcome.seconds,
            self.private(shlex.join(["python", *command[1:]])), self.private(outcome.text[-LOG_CHARACTERS:]),
        )  # fmt: skip
        return line, outcome

    def private(self, text: str) -> str:
        """A text without the folders of this machine, which a report need not name."""
        for path, short in ((self.out, "OUT"), (ROOT, "."), (Path.home(), "~")):
            if str(path) != "/":
                text = text.replace(str(path), short)
        return text


def last_error(outcome: Outcome) -> str:
    """The line that says what is wrong."""
    lines = [line for line in outcome.text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "E "))]
    ended = f"exit status {outcome.status}" if outcome.status >= 0 else f"signal or time, {outcome.status}"  # fmt: skip
    return f"{ended}: {(errors or lines or ['no output'])[-1]}"


def changed(line: Line, **changes: Any) -> Line:
    return Line(**{**line.__dict__, **changes})


# ---- one precision


def skipped_precision(setup: Setup, precision: str) -> str:
    """Why a precision is not tried; "" where it is."""
    needed = CAPABILITY_OF.get(precision)
    if needed and setup.capability and setup.capability < needed:
        return f"compute capability {'.'.join(map(str, setup.capability))} has no {precision.upper()}, which begins with {'.'.join(map(str, needed))}"
    if setup.flavor is not None and needed:
        from trtdet.engine.flavor import find_flavor

        flavor = find_flavor(setup.flavor)
        if not (flavor.has_bf16 if precision == "bf16" else flavor.has_fp8):
            return f"{flavor} has no {precision.upper()}"
    if setup.stand_in and precision == "bf16":
        return "ONNX Runtime has no convolutions in BF16"
    return ""


def precision_lines(setup: Setup, precision: str, row: Row, reference_ap: float | None) -> Iterator[Line]:  # fmt: skip
    """Build, run, compare, measure; fills `row`."""
    if why := skipped_precision(setup, precision):
        yield Line(f"{precision}{BUILD}", "skipped", why)
        return
    folder = setup.out / precision
    folder.mkdir(parents=True, exist_ok=True)
    line, model = build(setup, precision, folder, row)
    yield line
    if model is None:
        yield Line(f"{precision}: the rest", "skipped", "nothing was built")
        return
    yield from find(setup, precision, model, folder)
    yield from compare(setup, precision, model, folder, row)
    yield from average_precision(setup, precision, model, folder, row, reference_ap)
    yield from latency(setup, precision, model, folder, row)
    yield from trtexec(setup, precision, model, row)


def build(setup: Setup, precision: str, folder: Path, row: Row) -> tuple[Line, Path | None]:
    """build_engine.py. The stand-in runs the ONNX file in its precision, as TensorRT gets it."""
    engine, typed = folder / "model.engine", folder / "model.onnx"
    options: list[object] = ["--model", setup.model, "--precision", precision]
    if precision in ("int8", "fp8"):
        options += ["--calib_input", setup.source, "--calib_cache", folder / "calibration.cache"]
    flavor = setup.flavor or setup.builder
    if setup.stand_in:
        options += ["--save_onnx", typed]
    if flavor:
        options += ["--engine", engine, "--flavor", flavor]
        options += ["--batch_size", setup.batch] if setup.batch else []
        if flavor == "tensorrt_rtx":
            capability = setup.capability or (8, 9)
            options += ["--compute_capability", "{}.{}".format(*capability)]
    for old in (engine, engine.with_name("model.engine.json"), typed):
        old.unlink(missing_ok=True)
    line, outcome = setup.run(f"{precision}{BUILD}", setup.script("build_engine.py", *options))
    built = typed if setup.stand_in else engine
    if line.status == "fail" or not built.is_file():
        return changed(line, status="fail", detail=line.detail or f"no {built.name}"), None
    measured = engine if engine.is_file() else typed
    row.size_mib = measured.stat().st_size / 2**20
    found = re.search(r"^engine +([^,]+)", outcome.text, re.MULTILINE)
    row.size_of = f"engine of {found[1]}" if found else "ONNX file"
    if setup.stand_in and found:
        row.size_of += ", which was not run"
    layers = re.search(r"^precision +(.+)", outcome.text, re.MULTILINE)
    return changed(line, detail=layers[1] if layers else f"{row.size_mib:.1f} MiB"), built


def run_options(setup: Setup) -> list[object]:
    """How models are run."""
    return ["--provider", setup.provider] if setup.stand_in else []


def find(setup: Setup, precision: str, model: Path, folder: Path) -> Iterator[Line]:
    """infer.py finds something."""
    found = folder / "found"
    command = setup.script("infer.py", "--model", model, "--input", setup.source, "--output", found, *run_options(setup))  # fmt: skip
    line, _ = setup.run(f"{precision}{FIND}", command)
    if line.status != "fail":
        count = len(read_json(found / "detections.json", []))
        pictures = len(list(found.rglob("*.png")))
        line = changed(line, detail=f"{count} detections in {pictures} pictures")
        if not count:
            line = changed(line, status="fail", detail="nothing was found in any image")
    yield line


def compare(setup: Setup, precision: str, model: Path, folder: Path, row: Row) -> Iterator[Line]:
    """compare.py against the float32 ONNX file in ONNX Runtime."""
    summary = folder / "compare.json"
    summary.unlink(missing_ok=True)
    options = ["--reference", setup.model, "--candidate", model, "--input", setup.source, "--tensor_images", 0]  # fmt: skip
    options += ["--annotations", setup.annotations] if setup.annotations else []
    options += ["--json", summary, "--report", folder / "compare.html", *run_options(setup)]
    line, outcome = setup.run(f"{precision}: compare.py", setup.script("compare.py", *options))
    found = read_json(summary, {})
    if found:
        row.score_difference = found["detections"]["score"]["percentile"]
        row.box_difference = found["detections"]["box"]["percentile"]
        row.ran_by = found["candidate"]["kind"]
        broken = [c for c in found["limits"] if not c["passed"]]
        said = "; ".join(f"{c['name']} {c['value']}, limit {c['limit']}" for c in broken)
        line = changed(line, detail=said or f"within {len(found['limits'])} limits")
    elif outcome.status == 0:
        line = changed(line, status="fail", detail="no summary was written")
    yield line


def average_precision(
    setup: Setup, precision: str, model: Path, folder: Path, row: Row, reference: float | None
) -> Iterator[Line]:
    """eval_coco.py: AP against that of the float32 ONNX file."""
    name = f"{precision}: eval_coco.py"
    if setup.annotations is None:
        yield Line(name, "skipped", "no --annotations")
        return
    line, ap = evaluate(setup, name, model, folder / "metrics.json", run_options(setup))
    row.ap = ap
    if ap is not None and reference is not None:
        row.ap_difference = ap - reference
        limit = limits_for(precision, (1, 1), {}).max_ap_drop
        text = f"AP {ap:.4f}, {ap - reference:+.4f} to float32 in ONNX Runtime"
        line = changed(line, detail=text)
        if reference - ap > limit:
            line = changed(line, status="fail", detail=f"{text}; limit -{limit:g}")
    yield line


def evaluate(
    setup: Setup, name: str, model: Path, output: Path, options: Sequence[object]
) -> tuple[Line, float | None]:
    """AP of a model by eval_coco.py."""
    output.unlink(missing_ok=True)
    command = setup.script("eval_coco.py", "--model", model, "--input", setup.source, "--annotations", setup.annotations, "--json", output, *options)  # fmt: skip
    line, _ = setup.run(name, command)
    ap = read_json(output, {}).get("AP")
    if line.status != "fail":
        line = changed(line, detail=f"AP {ap:.4f}") if ap is not None else changed(line, status="fail", detail="no AP was written")  # fmt: skip
    return line, ap


def latency(setup: Setup, precision: str, model: Path, folder: Path, row: Row) -> Iterator[Line]:
    """infer.py --benchmark."""
    output = folder / "benchmark.json"
    output.unlink(missing_ok=True)
    command = setup.script("infer.py", "--model", model, "--benchmark", setup.iterations, "--json", output, *run_options(setup))  # fmt: skip
    line, _ = setup.run(f"{precision}: infer.py --benchmark", command)
    found = read_json(output, {})
    if found:
        row.batch, row.images_per_second = found["batch_size"], found["images_per_second"]
        row.median_ms, row.p99_ms = (found["Latency"][key] for key in ("median", "percentile(99%)"))
        row.ran_by = row.ran_by or found["runtime"]
        line = changed(line, detail=f"batch {row.batch}: {row.median_ms:.3g} ms, {row.images_per_second:.4g} images/s")  # fmt: skip
    yield line


def trtexec(setup: Setup, precision: str, model: Path, row: Row) -> Iterator[Line]:
    """The same engine by NVIDIA's own program, where it is."""
    name = f"{precision}: trtexec"
    if setup.flavor != "tensorrt":
        yield Line(name, "skipped", "runs engines of TensorRT alone")
        return
    try:
        find_trtexec()
    except EngineError as error:
        yield Line(name, "skipped", setup.private(str(error)))
        return
    batch = ["--batch_size", row.batch] if row.batch else []
    command = setup.script("deploy.py", "trtexec", "--model", model, "--run", "--iterations", setup.iterations, *batch)  # fmt: skip
    line, outcome = setup.run(name, command)
    found = re.search(r"Throughput: .* qps \(([\d.e+]+) images/s\)", outcome.text)
    if found:
        row.trtexec_images_per_second = float(found[1])
        ours = f", infer.py {row.images_per_second / float(found[1]):.2f} times that" if row.images_per_second else ""  # fmt: skip
        line = changed(line, detail=f"{float(found[1]):.4g} images/s{ours}")
    yield line


def read_json(path: Path, otherwise: Any) -> Any:
    """What is in a file; `otherwise` where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


# ---- the runtime


def infer_command(setup: Setup, engine: Path | None, *options: object) -> list[str]:
    """infer.py on an engine, or on the stand-in engine: on the GPUs that are here, or in main
    memory.
    """
    if engine is not None:
        return setup.script("infer.py", "--model", engine, *options)
    kind = "cuda" if setup.gpus else "cpu"
    standin = setup.out / "standin.engine"
    return setup.script(str(STANDIN_INFER), kind, "infer", "--model", standin, *options)


def write_standin(setup: Setup) -> None:
    import standin_tensorrt_runtime

    spin_ms = 2.0 if setup.gpus else 0.0
    standin_tensorrt_runtime.write_engine(setup.out / "standin.engine", image_shape=(64, 64, 3), profiles=[(1, 8, 8)], slots=20, spin_ms=spin_ms)  # fmt: skip


def standin_text(setup: Setup) -> str:
    """What ran a step of the runtime."""
    if not setup.stand_in:
        return ""
    return f"; stand-in engine {'on CUDA memory' if setup.gpus else 'in main memory, two stand-in GPUs'}"  # fmt: skip


def devices(setup: Setup, engine: Path | None) -> Iterator[Line]:
    """infer.py writes the same files on one GPU and on all."""
    name = "the same files from one GPU and from all"
    found = []
    for chosen in ("0", "all"):
        output = setup.out / f"devices_{chosen}"
        remove_files(output)
        command = infer_command(setup, engine, "--input", setup.source, "--output", output, "--devices", chosen)  # fmt: skip
        line, _ = setup.run(name, command)
        if line.status == "fail":
            yield line
            return
        found.append(output)
    one, several = (sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in found)
    same = one == several and all(filecmp.cmp(found[0] / p, found[1] / p, shallow=False) for p in one)  # fmt: skip
    text = f"{len(one)} files, {setup.gpus or 'no'} GPU{'s' * (setup.gpus != 1)}{standin_text(setup)}"  # fmt: skip
    yield changed(line, status=setup.good if same and one else "fail", detail=text if same else f"the files differ; {text}")  # fmt: skip


def interrupt(setup: Setup, engine: Path | None) -> Iterator[Line]:
    """SIGTERM in the middle leaves nothing half written."""
    name = "SIGTERM leaves nothing half written"
    many, output = setup.out / "many", setup.out / "interrupted"
    remove_files(output)
    link_many(setup.source, many)
    command = infer_command(setup, engine, "--input", many, "--output", output)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    while process.poll() is None and not any(output.glob("*.tsv")):
        if time.monotonic() - start > LIMIT_S:
            break
        time.sleep(0.02)
    early = process.poll() is None
    process.terminate()
    try:
        text, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    done = len(list(output.glob("*.tsv")))
    left = [p.name for p in output.rglob("*") if p.name.startswith(".") or p.name == "detections.json"]  # fmt: skip
    good = process.returncode == 143 and not left
    detail = f"exit status {process.returncode} after {done} of {MANY_IMAGES} images; half written: {', '.join(left) or 'nothing'}{standin_text(setup)}"
    status: Status = setup.good if good else "fail"
    if not early and process.returncode == 0:
        status, detail = "skipped", f"all {done} images were done before it came"
    shown = setup.private(shlex.join(["python", *command[1:]]))
    yield Line(name, status, detail, time.monotonic() - start, shown, setup.private(text[-LOG_CHARACTERS:]))  # fmt: skip
    remove_files(output)
    remove_files(many)


def link_many(source: Path, folder: Path) -> None:
    """`MANY_IMAGES` links to the images of a folder, or to one image."""
    from trtdet.images.files import find_images

    images = find_images(source)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MANY_IMAGES):
        image = images[number % len(images)]
        target = folder / f"{number:04d}{image.suffix}"
        if not target.exists():
            target.symlink_to(image.resolve())


def remove_files(folder: Path) -> None:
    """What an earlier report left in one of its own folders."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def overlap(setup: Setup, engine: Path | None, batch: int) -> Iterator[Line]:
    """benchmarks/trt_runtime.py: how much of an engine's speed the runtime passes on."""
    output = setup.out / "trt_runtime.json"
    output.unlink(missing_ok=True)
    options: list[object] = ["--json", output, "--batch_size", batch]
    if engine is not None:
        options += ["--engine", engine]
    elif setup.gpus:
        options += ["--standin", "cuda", "--ms", 2, "--size", 512, "--check"]
    else:
        options += ["--standin", "cpu", "--size", 32, "--batches", 20, "--memory_batches", 120, "--kernels", 5]  # fmt: skip
    if setup.gpus > 1:
        options += ["--devices", "all"]
    line, _ = setup.run("benchmarks/trt_runtime.py", setup.script("benchmarks/trt_runtime.py", *options))  # fmt: skip
    found = read_json(output, {})
    if line.status != "fail" and found:
        share = found["overlap"]["in_memory_pageable"]["ratio"]
        text = f"{share:.1%} of the engine's own speed"
        if setup.stand_in and not setup.gpus:
            text = "the script runs; its times mean nothing without a GPU"
        line = changed(line, detail=f"{text}{standin_text(setup)}")
    yield line


def memcheck(setup: Setup, sanitizer: str | None, engine: Path | None, batch: int) -> Iterator[Line]:  # fmt: skip
    """compute-sanitizer on a short run.

    No --leak-check: it records the Python frames of an allocation and so keeps alive the arrays in
    them, which are then "leaked". cuda-bindings asks the driver for every entry point it knows;
    each one that an older driver lacks counts as an API error.
    """
    name = "compute-sanitizer memcheck"
    if sanitizer is None or not setup.gpus:
        yield Line(name, "skipped", "no GPU" if not setup.gpus else "compute-sanitizer is not installed; it comes with the CUDA toolkit")  # fmt: skip
        return
    chosen: list[object] = ["--engine", engine] if engine else ["--standin", "cuda", "--ms", 2, "--size", 512]  # fmt: skip
    options = [*chosen, "--batch_size", batch, "--batches", 40, "--memory_batches", 120, "--kernels", 20]  # fmt: skip
    tool = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    line, outcome = setup.run(name, [*tool, *setup.script("benchmarks/trt_runtime.py", *options)])
    said = re.search(r"ERROR SUMMARY: (\d+) errors?", outcome.text)
    yield changed(line, detail=f"{said[1]} errors{standin_text(setup)}") if said else line


def tests(setup: Setup) -> Iterator[Line]:
    """`pytest -m gpu`.

    The stand-in's tests on CUDA memory are among these; only those of TensorRT count as its.
    """
    command = setup.script("-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider")
    line, outcome = setup.run("pytest -m gpu", command)
    passed, failed, left_out = (count(outcome.text, word) for word in ("passed", "failed", "skipped"))  # fmt: skip
    of_tensorrt = len(re.findall(r"^PASSED \S*\[tensorrt", outcome.text, re.MULTILINE))
    detail = (
        f"{passed} passed ({of_tensorrt} with TensorRT itself), {failed} failed, {left_out} skipped"
    )
    status = line.status
    if status != "fail" and not passed:
        status, detail = "skipped", f"all {left_out} skipped: no GPU"
    elif status != "fail" and not setup.stand_in and not of_tensorrt:
        status, detail = "fail", f"{detail}: none ran with TensorRT itself"
    yield changed(line, status=status, detail=detail)


def count(text: str, word: str) -> int:
    """ "3 passed, 1 skipped in 2.0s" -> 3 of "passed"."""
    found = re.findall(rf"(\d+) {word}", text)
    return int(found[-1]) if found else 0
