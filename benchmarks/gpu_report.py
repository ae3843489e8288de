# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the path comes first)
"""Does it work on this GPU?

Every step on the example model and pictures, in one page and one JSON file for a report.

    bash examples/gpu.sh
    python benchmarks/gpu_report.py --model d0.onnx --input val2017 \\
        --annotations instances_val2017.json

In FP32, FP16 and INT8, and in BF16 and FP8 if the card has them: builds an engine, runs it,
compares it with ONNX Runtime, measures AP and latency, and runs trtexec on the same engine if it is
installed. Then the runtime itself: all GPUs, an interrupted run, `pytest -m gpu`,
compute-sanitizer. About ten minutes.

Writes gpu_report.html and gpu_report.json; they name no host and no user. Exit status: 0 a model
ran and no line failed; 1 a line failed, or nothing was run, or there is no GPU with TensorRT; 2
wrong usage.

--stand_in tries the report itself on any machine: ONNX Runtime runs the models in each precision.
No line is called "pass" then, and every figure says what ran it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "standins"), str(ROOT / "benchmarks")]

import gpu_page
import gpu_steps
from gpu_steps import Line, Row, Setup

from trtdet import about, cuda, files, sessions
from trtdet.commands.cli import ArgumentParser, run_main, setup_logging
from trtdet.commands.values import positive_int
from trtdet.doctor.facts import Facts, collect
from trtdet.doctor.judge import judge
from trtdet.errors import EngineError

SCHEMA = 1
PRECISIONS = ("fp32", "fp16", "int8", "bf16", "fp8")
EXAMPLES = ROOT / "examples"
#: Steps that --skip leaves out.
OPTIONAL = ("runtime", "tests", "memcheck")


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        ran_by: what ran the models.
        rows: precision by precision.
    """

    ran_by: str
    stand_in: bool
    model: str
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    facts: Facts

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.status == "fail"]

    @property
    def verdict(self) -> str:
        """ "pass" only where TensorRT ran and nothing failed; "nothing" where no model ran."""
        if self.failed:
            return "fail"
        good = "ok" if self.stand_in else "pass"
        if not any(line.name.endswith(gpu_steps.FIND) and line.status == good for line in self.lines):  # fmt: skip
            return "nothing"
        return "stand-in" if self.stand_in else "pass"

    def summary(self) -> str:
        """One sentence."""
        counts = {status: sum(line.status == status for line in self.lines) for status in ("pass", "ok", "fail", "skipped")}  # fmt: skip
        done = counts["ok" if self.stand_in else "pass"]
        if self.stand_in:
            return f"No TensorRT engine was run. Stand-in: {done} lines ran, {counts['fail']} failed, {counts['skipped']} skipped"
        text = f"{done} lines pass, {counts['fail']} fail, {counts['skipped']} skipped"
        return f"Nothing was run: {text}" if self.verdict == "nothing" else text

    def to_dict(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "trtdet": about.__version__,
            "verdict": self.verdict,
            "summary": self.summary(),
            "ran_by": self.ran_by,
            "stand_in": self.stand_in,
            "model": self.model,
            "precisions": [asdict(row) for row in self.rows],
            "lines": [asdict(line) for line in self.lines],
            "machine": {"facts": asdict(self.facts), "diagnosis": asdict(judge(self.facts))},
        }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    # fmt: off
    parser.add_argument("--model", type=Path, metavar="FILE", help="an ONNX file of create_onnx.py, in float32 (default: examples/tiny_shapes, converted)")
    parser.add_argument("--input", type=Path, metavar="PATH", help="images, to run and to calibrate on (default: those of examples)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations of the images (default: those of examples; with --input none)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_report", metavar="DIR", help="the folder to write to (default: build/gpu_report)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), metavar="NAME,...", help="those to try (default: %(default)s)")
    parser.add_argument("--iterations", type=positive_int, default=200, metavar="N", help="batches measured (default: %(default)s)")
    parser.add_argument("--skip", nargs="+", default=[], choices=OPTIONAL, help="leave these out (default: none)")
    parser.add_argument("--stand_in", action="store_true", help="run without TensorRT, to try this report; see above")
    # fmt: on
    args = parser.parse_args(argv)
    args.precisions = args.precisions.split(",")
    if unknown := set(args.precisions).difference(PRECISIONS):
        parser.error(f"--precisions: expected some of {', '.join(PRECISIONS)}, got {', '.join(sorted(unknown))}")  # fmt: skip
    if args.model and not args.input:
        parser.error("--model needs --input: images of what it detects")
    return args


# ---- what is here


def set_up(args: argparse.Namespace) -> Setup:
    """What runs the models.

    Raises:
        EngineError: no GPU with TensorRT, and no --stand_in.
    """
    out = args.output.resolve()
    gpus, capability = count_gpus()
    common = {
        "out": out,
        "model": (args.model or out / "tiny.onnx").resolve(),
        "source": (args.input or EXAMPLES / "images").resolve(),
        "annotations": args.annotations.resolve() if args.annotations else None if args.input else EXAMPLES / "annotations.json",
        "capability": capability,
        "gpus": gpus,
        "iterations": args.iterations,
        "without": frozenset(args.skip),
    }  # fmt: skip
    if args.stand_in:
        provider = (
            "cuda" if gpus and "CUDAExecutionProvider" in sessions.available_providers() else "cpu"
        )
        builder = "tensorrt_rtx" if find_spec("tensorrt_rtx") else ""
        return Setup(**common, flavor=None, builder=builder, provider=provider, ran_by=f"stand-in: ONNX Runtime {sessions.version()}, {provider.upper()}")  # fmt: skip
    try:
        from trtdet.engine.flavor import find_flavor

        flavor = find_flavor(None)
        card = cuda.device_info(0)
    except EngineError as error:
        raise EngineError(f"this report is about engines on a GPU, and none can run here: {error}. --stand_in tries the report without one") from error  # fmt: skip
    return Setup(**common, flavor=flavor.name, ran_by=f"{flavor}, {card.name}")


def count_gpus() -> tuple[int, tuple[int, int] | None]:
    """How many there are, and the compute capability of the first."""
    try:
        count = cuda.device_count()
        return count, cuda.device_info(0).compute_capability if count else None
    except EngineError:
        return 0, None


def batch_range(model: Path) -> str | None:
    """The batches to build for; None where the model's batch is fixed."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return None if graph.input[0].type.tensor_type.shape.dim[0].dim_value else "1:8:8"


# ---- the report


def measure(setup: Setup, precisions: Sequence[str], rows: list[Row], convert: bool) -> Iterator[Line]:  # fmt: skip
    """All lines, one after the other; fills `rows`."""
    if convert:
        command = setup.script("create_onnx.py", "--saved_model", EXAMPLES / "tiny_shapes", "--labels", EXAMPLES / "labels.txt", "--onnx", setup.model)  # fmt: skip
        line, _ = setup.run("the example, converted", command)
        yield line
        if line.status == "fail":
            return
    setup = replace(setup, batch=batch_range(setup.model))
    reference = None
    if setup.annotations:
        line, reference = gpu_steps.evaluate(setup, "float32 in ONNX Runtime: eval_coco.py", setup.model, setup.out / "reference.json", ["--provider", "cpu"])  # fmt: skip
        yield line
    built = []  # in this run: the folder may have engines of an earlier one
    for precision in precisions:
        row = Row(precision)
        rows.append(row)
        for line in gpu_steps.precision_lines(setup, precision, row, reference):
            yield line
            if line.name == f"{precision}{gpu_steps.BUILD}" and line.status == setup.good:
                built.append(precision)
    engine = next((setup.out / p / "model.engine" for p in ("fp16", *precisions) if p in built), None)  # fmt: skip
    if setup.stand_in:
        engine = None
        gpu_steps.write_standin(setup)
    elif engine is None:
        yield Line("the runtime", "skipped", "no engine was built")
        return
    yield from runtime_lines(setup, engine, 8 if setup.batch else 1)


def runtime_lines(setup: Setup, engine: Path | None, batch: int) -> Iterator[Line]:
    """What is not about a precision."""
    if "runtime" not in setup.without:
        yield from gpu_steps.devices(setup, engine)
        yield from gpu_steps.interrupt(setup, engine)
        yield from gpu_steps.overlap(setup, engine, batch)
    if "memcheck" not in setup.without:
        yield from gpu_steps.memcheck(setup, find_sanitizer(), engine, batch)
    if "tests" not in setup.without:
        yield from gpu_steps.tests(setup)
    for name in sorted(setup.without):
        yield Line(name, "skipped", "--skip")


def find_sanitizer() -> str | None:
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or next(map(str, places), None)


def shown(line: Line) -> str:
    return f"{line.status:<8}{line.name:<42}{line.seconds:>6.0f} s  {line.detail}"


def run(args: argparse.Namespace) -> int:
    setup = set_up(args)
    setup.out.mkdir(parents=True, exist_ok=True)
    pages = [setup.out / f"gpu_report.{kind}" for kind in ("html", "json")]
    for path in pages:
        files.check_writable(path)
        path.unlink(missing_ok=True)
    print(f"{setup.ran_by}; model {setup.model.name}, images {setup.private(str(setup.source))}")
    rows: list[Row] = []
    lines = []
    for line in measure(setup, args.precisions, rows, convert=args.model is None):
        print(shown(line), flush=True)
        lines.append(line)
    report = Report(setup.ran_by, setup.stand_in, setup.model.name, tuple(rows), tuple(lines), collect())  # fmt: skip
    files.write_text(pages[1], json.dumps(report.to_dict(), indent=2) + "\n")
    files.write_text(pages[0], gpu_page.render(report.to_dict(), report.facts))
    print("", gpu_page.table_text(rows), "", *pages, report.summary(), sep="\n")
    return 1 if report.verdict in ("fail", "nothing") else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()
    return run_main(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
