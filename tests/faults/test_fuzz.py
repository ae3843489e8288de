# SPDX-License-Identifier: Apache-2.0
"""Every reader on files that are damaged at random: a result, or one line; nothing else, whatever
stands in them.

    python -m pytest -m fuzz                        a small budget, always the same inputs
    python -m pytest -m fuzz --fuzz_seconds 3600    new seeds for an hour, with figures at its end

Inputs that failed once lie in tests/data/faults, a folder for each reader, and are run first. What
fails now is kept in the folder that the message names: mend the fault, and copy the file to
tests/data/faults.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fault_desk
import fault_inputs
import pytest
from conftest import ROOT
from test_matrix import READERS, Reader

pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.fuzz

CORPUS = Path(__file__).resolve().parents[1] / "data" / "faults"
#: Inputs of each reader in the small budget, and in each round of a longer one.
EXAMPLES, ROUND = 25, 40
#: What one input may take.
LONGEST_S, MOST_BYTES = 20, 3 << 30
#: And one in a process of its own, with TensorFlow.
LONGEST_APART_S = 100

INFER = "infer --model model.onnx --output out"
VIDEOS = {
    f"video {suffix}": Reader(f"{INFER} --input clip.{suffix}", f"clip.{suffix}")
    for suffix in fault_inputs.VIDEOS
}
PICTURES = {
    f"picture {name}": Reader(f"{INFER} --input {name.replace('.', '_')}", f"{name.replace('.', '_')}/{name}")
    for name in fault_inputs.PICTURES
}  # fmt: skip
#: The readers, each of one file. That of a family is left out: its file is code, which is trusted.
TARGETS = {
    **{name: reader for name, reader in READERS.items() if name != "family"},
    **(VIDEOS if find_spec("av") else {}),
    **PICTURES,
    "split model": Reader("infer --model split.onnx --input photos --output out", "split.onnx"),
    "split weights": Reader("infer --model split.onnx --input photos --output out", "split.onnx.data"),
    "build_engine split": Reader("build_engine --model split.onnx --save_onnx out.onnx", "split.onnx"),
    "journal": Reader(fault_inputs.TUNE, "tuned.json.journal"),
    "long label map": Reader(f"{INFER} --input photos --labels long.pbtxt", "long.pbtxt"),
    "saved model": Reader("create_onnx --saved_model shapes --onnx out.onnx", "shapes/saved_model.pb"),
}  # fmt: skip
#: Those of the small budget: without some that differ in the command alone, or take long.
LEFT_OUT = ("compare", "tune", "visualize image", "deepstream", "picture", "video", "split", "build_engine split", "journal", "long", "saved")  # fmt: skip
SMALL = [name for name in TARGETS if not name.startswith(LEFT_OUT)]
#: Those that TensorFlow reads, which may end the process: in one of their own, and few.
APART = ("saved model",)
FEW = 3

# ---- damage

#: Text that parsers stumble over.
TOKENS = (
    b"", b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"-0.0", b"9" * 400, b"2147483648", b"18446744073709551616", b"null", b"true", b"[]", b"{}",
    b'""', b"[[[[", b"}}}}", b"\\u0000", b"\\ud800", b"\n", b"\t", b"\0", b"\r", b"\x1b[2J", b"\xff\xfe", b"\xef\xbb\xbf", b"'", b'"', b"\\", b"/",
    b"../" * 40, b"%s%n", b"x" * 3000, b"\xf0\x9f\x98\x80", "\u2028".encode(), b":", b",", b"=", b"#", b"//",
)  # fmt: skip


def damaged(data: bytes, random_: random.Random) -> bytes:
    """A file with a few of its bytes, pieces or words changed."""
    for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
        data = random_.choice(WAYS)(data, random_)
    return data


def _at(data: bytes, random_: random.Random) -> tuple[int, int]:
    start = random_.randrange(len(data) + 1)
    return start, min(len(data), start + random_.choice((1, 1, 2, 4, 16, 256)))


def _flip(data: bytes, random_: random.Random) -> bytes:
    start, _ = _at(data, random_)
    return data[:start] + bytes(b ^ (1 << random_.randrange(8)) for b in data[start : start + 1]) + data[start + 1 :]  # fmt: skip


def _drop(data: bytes, random_: random.Random) -> bytes:
    start, end = _at(data, random_)
    return data[:start] + data[end:]


def _double(data: bytes, random_: random.Random) -> bytes:
    start, end = _at(data, random_)
    return data[:end] + data[start:end] * random_.choice((1, 2, 50)) + data[end:]


def _insert(data: bytes, random_: random.Random) -> bytes:
    start, _ = _at(data, random_)
    return data[:start] + random_.choice(TOKENS) + data[start:]


def _replace(data: bytes, random_: random.Random) -> bytes:
    start, end = _at(data, random_)
    return data[:start] + random_.choice(TOKENS) + data[end:]


def _noise(data: bytes, random_: random.Random) -> bytes:
    start, end = _at(data, random_)
    return data[:start] + random_.randbytes(end - start) + data[end:]


def _cut(data: bytes, random_: random.Random) -> bytes:
    return data[: random_.randrange(len(data) + 1)]


def _move(data: bytes, random_: random.Random) -> bytes:
    (start, end), (target, _) = _at(data, random_), _at(data, random_)
    return data[:target] + data[start:end] + data[target:]


def _word(data: bytes, random_: random.Random) -> bytes:
    """A number or a word of a text file, in place of another."""
    words = data.split(b'"') if random_.random() < 0.5 else data.split(b" ")
    if len(words) > 1:
        words[random_.randrange(len(words))] = random_.choice((*TOKENS, random_.choice(words)))
    return (b'"' if b'"' in data else b" ").join(words)


def _value(data: bytes, random_: random.Random) -> bytes:
    """A value in JSON, in place of another; other files as they are."""
    try:
        document = json.loads(data)
    except ValueError:
        return _word(data, random_)
    node: Any = document
    while isinstance(node, dict | list) and node:
        key = random_.choice(list(node)) if isinstance(node, dict) else random_.randrange(len(node))
        if random_.random() < 0.35 or not isinstance(node[key], dict | list):
            node[key] = random_.choice(VALUES)
            break
        node = node[key]
    return json.dumps(document).encode()


VALUES = (None, True, 0, -1, 1.5, 2**31, 2**63, 10**400, float("inf"), float("nan"), 1e308, "", "1", "../x", "a\nb", "\x1b[2J", "x" * 5000, [], {}, [[]], [None], [1, 2], {"a": 1}, "\ud800")  # fmt: skip
Way = Callable[[bytes, random.Random], bytes]
WAYS: tuple[Way, ...] = (_flip, _flip, _drop, _double, _insert, _replace, _noise, _cut, _move, _word, _value, _value, _value)  # fmt: skip


# ---- what is asked of every run


def fault_of(outcome: fault_desk.Outcome, name: str, seconds: float, changed: Sequence[str]) -> str:
    """What is wrong with how a run ended; "" where nothing is.

    Args:
        changed: files that are not what they were.
    """
    lines = (outcome.err + outcome.out).split("\n")
    if "Traceback" in outcome.err:
        return f"a traceback: {outcome.err[-400:]}"
    if outcome.status not in (0, 1, 3):
        return f"status {outcome.status}"
    compared = name.startswith("compare") and "limits broken" in outcome.out
    if outcome.status == 1 and not compared and len(outcome.errors) != 1:
        return f"status 1 with {len(outcome.errors)} lines of error: {outcome.err[-400:]}"
    if outcome.status != 1 and outcome.errors:
        return f"an error and status {outcome.status}"
    if outcome.status == 3 and not re.search("skipped|it ends after [0-9]+ frames", outcome.err):
        return "status 3, and nothing is named"
    if raw := [line for line in lines if not line.isprintable()]:
        return f"characters that steer a terminal: {raw[0]!a:.200}"
    if long := [line for line in outcome.errors if len(line) > 2 * fault_desk.LONGEST_LINE]:
        return f"a line of {len(long[0])} characters"
    if outcome.status == 1 and not compared and outcome.left:
        return f"left {outcome.left}"
    if outcome.status == 1 and not compared and changed:
        return f"changed {changed}"
    if [left for left in outcome.left if Path(left).name.startswith(".")]:
        return f"left {outcome.left}"
    longest = LONGEST_APART_S if name in APART else LONGEST_S
    return f"{seconds:.0f} s" if seconds > longest else ""


class Workbench:
    """Runs readers on damaged files, in one folder that is put in order after each."""

    def __init__(self, sound: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.sound, self._folder, self._capsys = sound, folder, capsys
        self._desk = fault_desk.copy(sound, folder / "desk", served=True)
        self._there = fault_desk.everything(sound)
        self._stamps = self._stamp()
        self._number = itertools.count()
        self.runs: Counter[int] = Counter()

    def run(self, name: str, data: bytes) -> str:
        """The fault of a run, and where its input is kept; "" where it has none."""
        reader = TARGETS[name]
        (self._desk / reader.file).write_bytes(data)
        stamps = self._stamp()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            run = run_apart if name in APART else fault_desk.run
            outcome = run(self._desk, reader.line, self._capsys)
        except (fault_desk.TookTooLongError, subprocess.TimeoutExpired) as error:
            fault = str(error)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            self.runs[outcome.status] += 1
            after = self._stamp()
            changed = sorted(file for file in self._there if stamps[file] != after[file])
            fault = fault_of(outcome, name, time.monotonic() - start, changed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        fault = fault or (f"{grown >> 20} MiB of memory" if grown > MOST_BYTES else "")
        self._put_in_order()
        if not fault:
            return ""
        kept = self._folder / f"{name.replace(' ', '_')}-{next(self._number)}"
        kept.write_bytes(data)
        return f"{name}, {reader.line!r} on {kept}: {fault}"

    def _stamp(self) -> dict[str, tuple[int, int] | None]:
        """Of every file that belongs here: what changes when it is written."""
        return {file: _stamp_of(self._desk / file) for file in self._there}

    def _put_in_order(self) -> None:
        for left in sorted(fault_desk.everything(self._desk) - self._there, reverse=True):
            path = self._desk / left
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        now = self._stamp()
        for file in sorted(self._there):
            if now[file] != self._stamps[file]:
                (self._desk / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.sound / file, self._desk / file)
                self._stamps[file] = _stamp_of(self._desk / file)


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return None if path.is_dir() else (found.st_size, found.st_mtime_ns)


def run_apart(desk: Path, line: str, capsys: pytest.CaptureFixture[str]) -> fault_desk.Outcome:
    """Run a command line as a process."""
    stage, *words = line.split()
    before = fault_desk.everything(desk)
    command = [sys.executable, str(ROOT / f"{stage}.py"), *words]
    result = subprocess.run(command, cwd=desk, capture_output=True, text=True, errors="backslashreplace", timeout=2 * fault_desk.BOUND_S, check=False)  # fmt: skip
    errors = tuple(text for text in result.stderr.splitlines() if text.startswith("error: "))
    left = tuple(sorted(fault_desk.everything(desk) - before))
    return fault_desk.Outcome(result.returncode, result.stdout, result.stderr, errors, left)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fault_desk.make(tmp_path_factory.mktemp("sound"))
    fault_inputs.add(folder)
    shutil.copytree(ROOT / "examples" / "tiny_shapes", folder / "shapes")
    return folder


@pytest.fixture
def workbench(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    return Workbench(sound, tmp_path, capsys)


PAST = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", PAST, ids=[f"{p.parent.name}-{p.name}" for p in PAST])
def test_what_failed_once_fails_no_more(path: Path, workbench: Workbench) -> None:
    names = [known for known in TARGETS if known.replace(" ", "_") == path.parent.name]
    if not names and path.parent.name.startswith("video"):
        pytest.skip("needs requirements-video.txt")
    (name,) = names
    assert workbench.run(name, path.read_bytes()) == ""


@pytest.mark.parametrize("name", SMALL)
def test_a_few_inputs_of_every_reader(
    name: str, workbench: Workbench, request: pytest.FixtureRequest
) -> None:
    """The same inputs on every machine: Hypothesis' seed is the name of the test."""
    if request.config.getoption("--fuzz_seconds"):
        pytest.skip("in a longer run with new seeds")
    data = (workbench.sound / TARGETS[name].file).read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, print_blob=True, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def check(number: int) -> None:
        fault = workbench.run(name, damaged(data, random.Random(number)))
        assert not fault, f"seed {number}: {fault}"

    check()


def test_many_inputs_of_every_reader(
    workbench: Workbench, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """For `--fuzz_seconds`: rounds over all readers, each with a new seed.

    All faults are collected: one must not hide the others.
    """
    budget = request.config.getoption("--fuzz_seconds")
    if not budget:
        pytest.skip("needs --fuzz_seconds")
    end = time.monotonic() + budget
    first = random.SystemRandom().randrange(2**31)
    faults: dict[str, str] = {}

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    say(f"\nfuzz: seed {first}")
    for round_ in itertools.count():
        for name in TARGETS:
            if time.monotonic() > end:
                break
            fuzz(workbench, name, first + round_, end, faults, say)
        if time.monotonic() > end:
            break
    say(f"fuzz: seed {first}, {workbench.runs.total()} runs in {round_ + 1} rounds of {len(TARGETS)} readers: {dict(workbench.runs)} by status, {len(faults)} faults")  # fmt: skip
    assert not faults, "\n".join(faults.values())


def fuzz(
    workbench: Workbench,
    name: str,
    number: int,
    end: float,
    faults: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """A round of one reader, until `end`; what fails is said and added to `faults`, each kind
    once.
    """
    data = (workbench.sound / TARGETS[name].file).read_bytes()

    @seed(number)
    @settings(max_examples=FEW if name in APART else ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def check(way: int) -> None:
        if time.monotonic() > end:
            return
        if fault := workbench.run(name, damaged(data, random.Random(way))):
            kind = re.sub(r"[0-9]+|'[^']*'", "N", fault.partition(": ")[2])[:100]
            if f"{name}: {kind}" not in faults:
                faults[f"{name}: {kind}"] = f"seed {way}: {fault}"
                say(faults[f"{name}: {kind}"])

    check()
