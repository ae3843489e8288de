# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_report.py: with the stand-in on any machine; what it calls passed, and what
not.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium
import gpu_page
import gpu_report
import gpu_steps
import pytest
from conftest import EXAMPLES, ROOT
from gpu_steps import Line, Outcome, Row, Setup

from trtdet.doctor.facts import Facts
from trtdet.errors import EngineError


@pytest.fixture(scope="module")
def folder(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two precisions by the stand-in."""
    out = tmp_path_factory.mktemp("gpu") / "report"
    arguments = ["--stand_in", "--model", tiny_onnx, "--input", EXAMPLES / "images", "--annotations", EXAMPLES / "annotations.json"]  # fmt: skip
    arguments += [
        "--precisions",
        "fp16,bf16",
        "--iterations",
        5,
        "--skip",
        "tests",
        "--output",
        out,
    ]
    assert gpu_report.main([str(a) for a in arguments]) == 0
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "gpu_report.json").read_text())
    return data


def test_the_stand_in_passes_nothing(report: dict[str, Any]) -> None:
    """Every step ran, and none of it is called passed."""
    assert report["verdict"] == "stand-in" and report["stand_in"]
    states = {line["name"]: line["status"] for line in report["lines"]}
    assert "pass" not in states.values()
    done = ["fp16: build", "fp16: infer.py", "fp16: compare.py", "fp16: eval_coco.py", "fp16: infer.py --benchmark"]  # fmt: skip
    done += ["the same files from one GPU and from all", "SIGTERM leaves nothing half written", "benchmarks/trt_runtime.py"]  # fmt: skip
    assert {states[name] for name in done} == {"ok"}
    assert (states["fp16: trtexec"], states["compute-sanitizer memcheck"], states["tests"]) == ("skipped",) * 3  # fmt: skip
    assert report["summary"].startswith("No TensorRT engine was run. Stand-in: ")


def test_figures_say_what_ran_them(report: dict[str, Any]) -> None:
    half, brain = report["precisions"]
    assert half["ap"] == pytest.approx(0.7987, abs=2e-3)
    assert abs(half["ap_difference"]) < 2e-3 and half["score_difference"] < 0.005
    assert half["images_per_second"] > 1 and half["p99_ms"] >= half["median_ms"] > 0
    assert 1 < half["size_mib"] < 20
    assert half["ran_by"].startswith("ONNX Runtime") and half["size_of"]
    assert brain["ran_by"] == "" and brain["ap"] is None  # no BF16 on a CPU


def test_a_report_names_no_folder_of_this_machine(folder: Path) -> None:
    for name in ("gpu_report.json", "gpu_report.html"):
        text = (folder / name).read_text()
        lines = json.loads((folder / "gpu_report.json").read_text())["lines"] if name.endswith("json") else []  # fmt: skip
        assert str(folder) not in text
        assert all(str(ROOT) not in line["command"] + line["log"] for line in lines)


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page(page: chromium.Page, folder: Path, report: dict[str, Any], width: int) -> None:
    page.open(folder / "gpu_report.html", width=width)
    assert page.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.requests == [(folder / "gpu_report.html").resolve().as_uri()]
    assert page.js("document.getElementById('verdict').textContent").startswith("◦ Tried with a stand-in")  # fmt: skip
    assert page.js("JSON.parse(document.getElementById('report').textContent)") == report
    assert page.js("document.querySelectorAll('.line').length") == len(report["lines"])
    shown = page.js("document.querySelector('tr.figures td[data-key=ap]').textContent")
    assert shown == f"{report['precisions'][0]['ap']:.4f}"
    assert page.js("document.querySelectorAll('details[open]').length") == 0


def test_a_failed_line_is_open_and_escaped(tmp_path: Path) -> None:
    bad = Line("fp16: build", "fail", "exit status 1: <b>no</b>", 1.0, "python build_engine.py", "a <script> & more")  # fmt: skip
    done = gpu_report.Report("TensorRT 10", False, "m.onnx", (Row("fp16"),), (bad,), Facts("Linux", "3.11"))  # fmt: skip
    text = gpu_page.render(done.to_dict(), done.facts)
    assert done.verdict == "fail" and '<details class="line fail" open>' in text
    assert "<script> &" not in text and "&lt;b&gt;no&lt;/b&gt;" in text


def test_it_passes_only_where_nothing_failed_and_tensorrt_ran() -> None:
    good, ok, bad, left = (Line("fp16: infer.py", status) for status in ("pass", "ok", "fail", "skipped"))  # fmt: skip
    built = Line("fp16: build", "pass")
    facts = Facts("Linux", "3.11")
    reports = [
        gpu_report.Report("TensorRT", stand_in, "m", (), lines, facts)
        for stand_in, lines in (
            (False, (good, left)), (False, (good, bad)), (True, (ok,)), (True, (bad,)),
            (False, (built, left)), (False, (ok,)), (True, (left,)), (False, ()),
        )
    ]  # fmt: skip
    assert [r.verdict for r in reports] == ["pass", "fail", "stand-in", "fail"] + ["nothing"] * 4
    assert reports[4].summary() == "Nothing was run: 1 lines pass, 0 fail, 1 skipped"
    page = gpu_page.render(reports[4].to_dict(), facts)
    assert "✗ Nothing was run" in page and "It works" not in page


def test_where_nothing_is_run_it_does_not_pass(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A card without the only type that was asked for."""
    monkeypatch.setattr(gpu_steps, "skipped_precision", lambda setup, precision: "has none")
    options = ["--stand_in", "--precisions", "bf16", "--skip", *gpu_report.OPTIONAL]
    arguments = [*options, "--model", tiny_onnx, "--input", EXAMPLES / "images", "--output", tmp_path / "out"]  # fmt: skip
    assert gpu_report.main([str(a) for a in arguments]) == 1
    assert json.loads((tmp_path / "out" / "gpu_report.json").read_text())["verdict"] == "nothing"


@pytest.mark.parametrize(("precisions", "used"), [(["bf16"], None), (["bf16", "int8"], "int8"), (["bf16", "fp16"], "fp16")])  # fmt: skip
def test_an_engine_of_an_earlier_report_is_not_run(precisions: list[str], used: str | None, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def execute(command: Sequence[str]) -> Outcome:
        if command[1] == "build_engine.py":
            Path(command[command.index("--engine") + 1]).write_bytes(b"new")
        return Outcome(0, "", 1.0)

    for name in ("fp16", "bf16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.engine").write_bytes(b"old")
    taken = []
    monkeypatch.setattr(gpu_report, "runtime_lines", lambda setup, engine, batch: taken.append(engine) or [])  # fmt: skip
    setup = replace(setup_with(tmp_path, Outcome(0, "", 0)), execute=execute, model=tiny_onnx, annotations=None, capability=(7, 5))  # fmt: skip
    lines = list(gpu_report.measure(setup, precisions, [], convert=False))
    assert taken == ([tmp_path / used / "model.engine"] if used else [])
    assert (lines[-1] == Line("the runtime", "skipped", "no engine was built")) == (used is None)


def test_help_shows_its_commands_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.parse_args(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index("bash examples/gpu.sh")
    assert lines[at + 1 : at + 3] == [
        "python benchmarks/gpu_report.py --model d0.onnx --input val2017 \\",
        "--annotations instances_val2017.json",
    ]


def test_the_script_leaves_paths_to_the_folder_of_its_caller(tmp_path: Path) -> None:
    """A stand-in for Python that has everything: it says where it is, and what it is given."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || { pwd; printf "%s\\n" "$@"; }\n')
    python.chmod(0o755)
    options = ["--stand_in", "--model", "mine/d0.onnx", "--input", "my photos"]
    done = subprocess.run(["bash", ROOT / "examples" / "gpu.sh", *options], cwd=tmp_path, env={**os.environ, "PYTHON": "bin/python"}, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path.resolve()), str(ROOT / "benchmarks" / "gpu_report.py"), *options]  # fmt: skip


def test_without_a_gpu_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def none(index: int) -> None:
        raise EngineError("no GPU")

    monkeypatch.setattr(gpu_report.cuda, "device_info", none)
    assert gpu_report.main(["--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "none can run here" in captured.err and "--stand_in" in captured.err
    assert "pass" not in captured.out and not (tmp_path / "out").exists()


# ---- single steps


def setup_with(tmp_path: Path, outcome: Outcome, **changes: Any) -> Setup:
    def execute(command: Sequence[str]) -> Outcome:
        return outcome

    made = Setup(tmp_path, tmp_path / "m.onnx", EXAMPLES / "images", EXAMPLES / "annotations.json", "tensorrt", "TensorRT", execute=execute)  # fmt: skip
    return replace(made, **changes)


TESTS = "PASSED tests/runtimes/test_gpu.py::test_a[tensorrt-True]\nPASSED tests/runtimes/test_gpu.py::test_a[stand-in]\n"


@pytest.mark.parametrize(
    ("status", "text", "want"),
    [
        (0, TESTS + "2 passed, 3 skipped in 1s", ("pass", "2 passed (1 with TensorRT itself), 0 failed, 3 skipped")),
        (1, TESTS + "1 failed, 2 passed in 1s", ("fail", "2 passed (1 with TensorRT itself), 1 failed, 0 skipped")),
        (0, "PASSED tests/runtimes/test_gpu.py::test_a[stand-in]\n1 passed in 1s", ("fail", "1 passed (0 with TensorRT itself), 0 failed, 0 skipped: none ran with TensorRT itself")),
        (0, "5 skipped in 1s", ("skipped", "all 5 skipped: no GPU")),
    ],
)  # fmt: skip
def test_tests_of_the_stand_in_are_not_tensorrts(status: int, text: str, want: tuple[str, str], tmp_path: Path) -> None:  # fmt: skip
    (line,) = gpu_steps.tests(setup_with(tmp_path, Outcome(status, text, 1.0)))
    assert (line.status, line.detail) == want


def test_what_is_not_written_is_a_failure(tmp_path: Path) -> None:
    """A command that ends well and leaves nothing has not done it."""
    setup = setup_with(tmp_path, Outcome(0, "", 1.0))
    lines = list(gpu_steps.precision_lines(setup, "fp16", Row("fp16"), 0.8))
    assert [(line.name, line.status) for line in lines] == [("fp16: build", "fail"), ("fp16: the rest", "skipped")]  # fmt: skip
    for step in (gpu_steps.find(setup, "fp16", tmp_path, tmp_path), gpu_steps.compare(setup, "fp16", tmp_path, tmp_path, Row("fp16"))):  # fmt: skip
        (line,) = step
        assert line.status == "fail", line
    line, ap = gpu_steps.evaluate(setup, "ap", tmp_path, tmp_path / "none.json", [])
    assert (line.status, ap) == ("fail", None)


@pytest.mark.parametrize(("ap", "precision", "status"), [(0.794, "fp16", "fail"), (0.796, "fp16", "pass"), (0.794, "int8", "pass"), (0.78, "int8", "fail")])  # fmt: skip
def test_ap_may_fall_by_what_compare_allows(ap: float, precision: str, status: str, tmp_path: Path) -> None:  # fmt: skip
    def execute(command: Sequence[str]) -> Outcome:
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"AP": ap}))
        return Outcome(0, "", 1.0)

    setup = replace(setup_with(tmp_path, Outcome(0, "", 0)), execute=execute)
    (line,) = gpu_steps.average_precision(setup, precision, tmp_path, tmp_path, Row(precision), 0.8)
    assert line.status == status and f"AP {ap:.4f}, {ap - 0.8:+.4f}" in line.detail


@pytest.mark.parametrize(("capability", "precision", "why"), [((7, 5), "bf16", "7.5 has no BF16"), ((8, 6), "fp8", "8.6 has no FP8"), ((7, 5), "int8", "")])  # fmt: skip
def test_a_card_without_a_type_skips_it(capability: tuple[int, int], precision: str, why: str, tmp_path: Path) -> None:  # fmt: skip
    setup = setup_with(tmp_path, Outcome(0, "", 0), capability=capability)
    found = gpu_steps.skipped_precision(setup, precision)
    assert why in found and bool(found) == bool(why)


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "LIMIT_S", 1)
    outcome = gpu_steps.execute(["bash", "-c", "echo begun; sleep 60"])
    assert outcome.status == -1 and outcome.text.startswith("begun") and outcome.seconds < 20


def test_the_script_names_files_that_are_there() -> None:
    script = (ROOT / "examples" / "gpu.sh").read_text().replace("$root/", "")
    subprocess.run(["bash", "-n", ROOT / "examples" / "gpu.sh"], check=True)
    for word in re.findall(r"[\w./-]+", script):
        if word.endswith((".txt", "setup.sh")) or word == "benchmarks/gpu_report.py":
            assert (ROOT / word).is_file(), word


def test_the_script_refuses_before_it_installs(tmp_path: Path) -> None:
    """No driver, no --stand_in: nothing is installed."""
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run([tmp_path / "bash", ROOT / "examples" / "gpu.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no NVIDIA driver found") and "--stand_in" in done.stderr
