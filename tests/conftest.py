# SPDX-License-Identifier: Apache-2.0
"""Paths and models that several test modules use."""

import os
import signal
from pathlib import Path

import pytest
from chromium import page  # noqa: F401 (a fixture)
from gpu_batches_rig import decoder  # noqa: F401 (a fixture)
from trt_rig import engine, rig  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]

# Read when ONNX Runtime is first imported: trtdet.sessions says why.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Read when TensorFlow is first imported, which may be in a test module: trtdet.sources.saved_model
# says why.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large test inputs beside the repository; not part of it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs ../shared/models, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tiny_shapes converted by create_onnx.py: three classes, 128x128, dynamic batch,
    EfficientNMS at the end.
    """
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    from trtdet.commands import create_onnx

    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    status = create_onnx.main(
        [
            "--saved_model",
            str(EXAMPLES / "tiny_shapes"),
            "--onnx",
            str(path),
            "--labels",
            str(EXAMPLES / "labels.txt"),
        ]
    )
    assert status == 0
    return path


def pytest_configure() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and processes inherit that: the tests
    of Ctrl-C shall not depend on it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz_seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="with -m fuzz: go on with new seeds for so long (default: a small fixed budget)",
    )
