# SPDX-License-Identifier: Apache-2.0
"""What the scripts in benchmarks/ say of the figures they measure; the figures themselves are theirs to measure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_pipeline
import onnx_runtime_busy
import pytest
import toy_detector
import trt_runtime
from trt_rig import Rig


@pytest.mark.parametrize(
    ("of_decode", "of_nvidia", "met"),
    [
        (0.75, None, [True]),
        (0.749, None, [False]),
        (0.9, 2.0, [True, True]),
        (0.9, 1.99, [True, False]),
    ],
)
def test_criteria_of_the_host_pipeline(
    of_decode: float, of_nvidia: float | None, met: list[bool]
) -> None:
    # The others are not what is asked for.
    report = {
        "of_decode": {"uint8 NHWC": of_decode, "float32 NHWC": 0.1},
        "of_nvidia": {} if of_nvidia is None else {"uint8 NHWC": of_nvidia, "float32 NHWC": 0.1},
    }
    checks = host_pipeline.criteria(report)
    assert list(checks.values()) == met
    assert [text for text in checks if "0.75 of decoding" in text]
    assert len([text for text in checks if "2.0 times NVIDIA" in text]) == (of_nvidia is not None)


@pytest.mark.parametrize(("rate", "status"), [(0.9, 0), (0.7, 1)])
def test_check_of_the_host_pipeline(
    rate: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def measure(folder: Path, args: Any) -> dict[str, Any]:
        rates = {"decode alone": 100.0, "uint8 NHWC": 100 * rate}
        return {"images_per_second": rates, "of_decode": {name: r / 100 for name, r in rates.items()}, "of_nvidia": {}}  # fmt: skip

    monkeypatch.setattr(host_pipeline, "measure", measure)
    assert host_pipeline.main(["--input", str(tmp_path), "--check"]) == status
    assert host_pipeline.main(["--input", str(tmp_path)]) == 0
    assert f"decoding alone: {'NO' if status else 'yes'}" in capsys.readouterr().out


@pytest.mark.parametrize(("wanted", "status"), [(0.0, 0), (1.01, 1)])
def test_check_of_a_busy_onnx_runtime(
    wanted: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    model = toy_detector.save(tmp_path / "toy.onnx")
    for number in range(6):
        toy_detector.image(tmp_path / "in" / f"{number}.png", red=10, green=20, blue=30)
    monkeypatch.setattr(onnx_runtime_busy, "WANTED", wanted)
    argv = ["--onnx", str(model), "--input", str(tmp_path / "in")]
    assert onnx_runtime_busy.main([*argv, "--check"]) == status
    assert onnx_runtime_busy.main(argv) == 0
    assert "ONNX Runtime busy" in capsys.readouterr().out


def test_enqueue_times_come_with_their_ratio(rig: Callable[..., Rig], engine: Path) -> None:
    rig(schedule="early")
    found = trt_runtime.measure_enqueue(engine, 4, 20)
    assert found["graph_over_plain"] == found["graph_median_us"] / found["plain_median_us"] > 0
