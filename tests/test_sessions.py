# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime is opened in one place, without its telemetry."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import toy_detector
from conftest import ROOT
from PIL import Image

from trtdet import sessions
from trtdet.errors import EngineError

#: What ONNX Runtime 1.31 does where its telemetry is on, as strace writes it.
TELEMETRY = """\
12 mkdir("/home/a/.cache/Microsoft", 0700) = 0
12 openat(AT_FDCWD, "/scratch/.ses", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 6
12 socket(AF_INET, SOCK_DGRAM|SOCK_CLOEXEC|SOCK_NONBLOCK, IPPROTO_IP) = 7
12 connect(7, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.1")}, 16) = 0
"""


def add(name: str = "y") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] {name}) {{ {name} = Add(x, x) }}'
    )


def traces_of_telemetry(trace: str, scratch: Path) -> list[str]:
    """System calls that reach the network, Microsoft's cache, or a file of a fixed name made in
    the folder for temporary files.
    """
    # Local sockets (AF_UNIX) and the kernel's list of interfaces (AF_NETLINK) leave no machine.
    network = re.compile(r"\b(socket|connect|sendto|sendmsg)\(.*AF_INET")
    fixed = re.compile(rf'"{re.escape(str(scratch))}/[^"]*", [^)]*O_CREAT')
    return [
        line
        for line in trace.splitlines()
        if network.search(line)
        or ".cache/Microsoft" in line
        or (fixed.search(line) and "O_EXCL" not in line)
    ]


def test_the_trace_is_read() -> None:
    local = '12 socket(AF_UNIX, SOCK_STREAM, 0) = 3\n12 openat(AT_FDCWD, "/scratch/x7", O_RDWR|O_CREAT|O_EXCL, 0600) = 4\n'
    assert traces_of_telemetry(TELEMETRY + local, Path("/scratch")) == TELEMETRY.splitlines()


def test_a_run_reaches_no_network_and_leaves_nothing(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, which is not here")
    home, scratch, trace = tmp_path / "home", tmp_path / "scratch", tmp_path / "trace"
    home.mkdir()
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}  # fmt: skip
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(home / ".cache")}  # fmt: skip
    model = toy_detector.save(tmp_path / "toy.onnx")
    Image.new("RGB", (48, 32), (100, 2, 0)).save(tmp_path / "a.png")
    command = [sys.executable, ROOT / "infer.py", "--engine", model, "--input", tmp_path / "a.png", "--output", tmp_path / "out"]  # fmt: skip
    traced = [strace, "-f", "-e", "trace=network,openat,creat,mkdir,mkdirat", "-o", trace, *command]
    done = subprocess.run(traced, env=environment, capture_output=True, text=True)
    if "ptrace" in done.stderr and not (tmp_path / "out").exists():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    text = trace.read_text(encoding="utf-8", errors="replace")
    assert "onnxruntime" in text and str(model) in text  # it was this run that was traced
    assert traces_of_telemetry(text, scratch) == []
    assert not (home / ".cache" / "Microsoft").exists()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("", "")])
def test_telemetry_is_off_unless_the_user_has_set_it(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if before is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", before)
    sessions.load_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == after


def test_a_session_runs() -> None:
    session = sessions.open_session(add(), "g")
    assert session.provider == sessions.CPU
    x = np.array([1, 2], np.float32)
    for outputs in (["y"], None):
        (y,) = session.run(outputs, {"x": x})
        assert y.tolist() == [2, 4]
    bound = session.bind("x", x, ["y"], "cpu")
    (first,), (second,) = bound.run(x + 1), bound.run(x)
    assert (first.tolist(), second.tolist()) == ([4, 6], [2, 4])  # the first is still what it was
    assert x.tolist() == [1, 2]  # and so is the input
    with pytest.raises(sessions.SessionError, match=r"^g: ONNX Runtime failed: "):
        bound.run(np.zeros((2, 2), np.float32))


def test_failures_are_one_line_that_names_the_model() -> None:
    broken = add()
    broken.graph.node[0].op_type = "NoSuchOp"
    for model in (broken, b"no model"):
        with pytest.raises(sessions.SessionError) as load:
            sessions.open_session(model, "a.onnx", log_level=sessions.FATAL_ERRORS)
        assert str(load.value).startswith("a.onnx: ONNX Runtime cannot load it: ")
        assert "\n" not in str(load.value)
    session = sessions.open_session(add(), "a.onnx")
    with pytest.raises(sessions.SessionError) as run:
        session.run(["y"], {"x": np.zeros((2, 2), np.float32)})
    assert str(run.value).startswith("a.onnx: ONNX Runtime failed: ")
    assert "\n" not in str(run.value)


def test_without_onnx_runtime_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not sessions.is_installed()
    for call in (sessions.version, sessions.available_providers, lambda: sessions.open_session(add(), "g")):  # fmt: skip
        with pytest.raises(EngineError, match=r"^ONNX Runtime is not installed: pip install onnxruntime$"):  # fmt: skip
            call()
