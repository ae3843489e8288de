# SPDX-License-Identifier: Apache-2.0
"""deploy.py trtexec: the line for each version, and trtexec's results in the table of infer.py
--benchmark.
"""

import json
import os
from pathlib import Path

import pytest
from conftest import EXAMPLES
from deploy_models import D0, make_engine, with_input

from trtdet.commands import build_engine, deploy
from trtdet.deploy.model import open_engine
from trtdet.deploy.trtexec import (
    TrtexecOptions,
    command,
    measurement_of_log,
    measurement_of_times,
    parse_banner,
)

#: Options that the trtexec of a release does not know, of those that lines like these use. It ends
#: with an error at one. Source: NVIDIA/TensorRT samples/common/sampleOptions.cpp at the releases.
UNKNOWN = {
    (8, 6): {"--stronglyTyped", "--includeDataTransfers"},
    (10, 0): {"--includeDataTransfers", "--buildOnly", "--explicitBatch", "--workspace"},
    (10, 16): {"--includeDataTransfers", "--buildOnly", "--explicitBatch", "--workspace"},
    (11, 0): {"--fp16", "--int8", "--best", "--bf16", "--calib", "--buildOnly", "--workspace"},
    (11, 1): {"--fp16", "--int8", "--best", "--bf16", "--calib", "--buildOnly", "--workspace"},
}
COMMON = "--iterations=200 --warmUp=500 --duration=0 --percentile=90,95,99 --device=0"


@pytest.mark.parametrize("version", UNKNOWN)
@pytest.mark.parametrize("batch", [(1, 1, 1), (8, 8, 8), (1, 8, 32)])
def test_line_for_an_engine(tmp_path, version, batch):
    engine = make_engine(tmp_path / "d0.engine", batch=batch)
    line = command(open_engine(engine), version, TrtexecOptions(times=Path("t.json")))
    shapes = ["--shapes=input:8x512x512x3"] if batch == (1, 8, 32) else []
    how = ["--useSpinWait", "--useCudaGraph"] if version < (11,) else ["--includeDataTransfers"]
    expected = [f"--loadEngine={engine}", *shapes, *how, *COMMON.split(), "--exportTimes=t.json"]
    assert line == expected
    assert not {argument.split("=")[0] for argument in line} & UNKNOWN[version]


@pytest.mark.parametrize("version", UNKNOWN)
def test_line_for_an_onnx_file(tiny_onnx, version):
    import dataclasses

    from trtdet.deploy.model import open_onnx

    model = open_onnx(tiny_onnx)
    options = TrtexecOptions(batch=4, save_engine=Path("x.engine"))
    line = command(model, version, options)
    assert line[0] == f"--onnx={tiny_onnx}"
    assert ("--stronglyTyped" in line) == (version[0] == 10)
    shapes = [argument for argument in line if "hapes=" in argument]
    shape = "=input:4x128x128x3"
    assert shapes == [
        f"--{name}{shape}" for name in ("minShapes", "optShapes", "maxShapes", "shapes")
    ]
    assert not {argument.split("=")[0] for argument in line} & UNKNOWN[version]

    fp16 = dataclasses.replace(options, precision="fp16")
    if version < (11,):
        assert "--fp16" in command(model, version, fp16)
    else:
        with pytest.raises(ValueError, match="--save_onnx FILE, and measure that"):
            command(model, version, fp16)


@pytest.mark.parametrize("version", UNKNOWN)
@pytest.mark.parametrize(
    ("precision", "rest", "flags"),
    [
        ("fp32", "fp32", []),
        ("fp16", "fp16", ["--fp16"]),
        ("int8", "fp32", ["--int8", "--fp16"]),
        ("int8", "fp16", "has Q/DQ of FP16 tensors, which TensorRT 8.6 does not read; write it again with float32"),
        ("bf16", "bf16", "is in BF16, which TensorRT 8.6 does not have"),
    ],
)  # fmt: skip
def test_types_in_an_onnx_file_for_every_version(precision, rest, flags, version, saved, tmp_path, capsys):  # fmt: skip
    """8.6 needs flags for them: it builds no Q/DQ without --int8."""
    path = saved(precision, rest)
    text = ".".join(map(str, version))
    status = deploy.main(["trtexec", "--model", str(path), "--tensorrt_version", text])
    captured = capsys.readouterr()
    if version[0] == 8 and isinstance(flags, str):
        assert status == 1 and flags in captured.err
        return
    wanted = {8: flags, 10: ["--stronglyTyped"], 11: []}[version[0]]
    line = captured.out.split()
    assert [word for word in line if word in ("--fp16", "--int8", "--stronglyTyped")] == wanted
    assert not {word.split("=")[0] for word in line} & UNKNOWN[version]


@pytest.fixture(scope="module")
def saved(tiny_onnx, tmp_path_factory):
    """A function: the file of build_engine.py --save_onnx in a precision."""
    folder = tmp_path_factory.mktemp("saved")

    def save(precision, rest):
        path = folder / f"{precision}_{rest}.onnx"
        options = ["--precision", precision]
        if precision == "int8":
            images = EXAMPLES / "images"
            options += ["--rest_precision", rest, "--calib_input", images, "--calib_num_images", 1]
            options += ["--int8_share", 1, "--calib_cache", folder / "cache"]
        if not path.exists():
            arguments = ["--model", tiny_onnx, "--save_onnx", path, *options]
            assert build_engine.main([str(a) for a in arguments]) == 0
        return path

    return save


def test_dynamic_input_size_and_dla(tmp_path):
    spec = with_input(D0, size_range=((256, 256), (1024, 1024)), size_multiple=128)
    engine = make_engine(tmp_path / "x.engine", spec, (1, 1, 1), dla_core=0)
    line = command(open_engine(engine), (10, 7), TrtexecOptions())
    assert line[1:3] == ["--useDLACore=0", "--shapes=input:1x512x512x3"]


def test_a_version_compatible_engine_carries_its_plugins(tmp_path):
    fields = {"plugins": ("liba.so",)}
    plain = open_engine(make_engine(tmp_path / "a.engine", **fields))
    line = command(plain, (10, 13), TrtexecOptions())
    assert "--staticPlugins=liba.so" in line and "--versionCompatible" not in line
    line = command(plain, (10, 13), TrtexecOptions(plugins=(Path("/lib/liba.so"),)))
    assert [a for a in line if "Plugins" in a] == ["--staticPlugins=/lib/liba.so"]
    compatible = make_engine(tmp_path / "b.engine", version_compatible=True, **fields)
    line = command(open_engine(compatible), (10, 13), TrtexecOptions())
    assert line[1] == "--versionCompatible" and not [a for a in line if "Plugins" in a]


@pytest.mark.parametrize(
    ("version", "compatible", "warned"),
    [("10.13", False, False), ("10.13.3", False, False), ("10.14", False, True), ("10.14", True, False), ("10.12", True, True)],
)  # fmt: skip
def test_another_version_than_the_engines(tmp_path, capsys, version, compatible, warned):
    engine = make_engine(tmp_path / "x.engine", version_compatible=compatible)
    assert deploy.main(["trtexec", "--engine", str(engine), "--tensorrt_version", version]) == 0
    said = f"built by TensorRT 10.13.3.9: trtexec of {version} does not load it"
    assert (said in capsys.readouterr().err) == warned


def test_refused(tmp_path):
    rtx = open_engine(make_engine(tmp_path / "rtx.engine", flavor="tensorrt_rtx"))
    with pytest.raises(Exception, match="trtexec loads engines of TensorRT, this one is of T"):
        command(rtx, (10, 0), TrtexecOptions())
    model = open_engine(make_engine(tmp_path / "x.engine"))
    with pytest.raises(ValueError, match=r"--batch_size 64: x\.engine takes batches of 1 to 32"):
        command(model, (10, 0), TrtexecOptions(batch=64))
    with pytest.raises(Exception, match=r"expected TensorRT 8\.6 or later"):
        command(model, (8, 5), TrtexecOptions())


@pytest.mark.parametrize(
    ("number", "version"),
    [(8601, (8, 6, 1)), (9300, (9, 3, 0)), (100300, (10, 3, 0)), (101303, (10, 13, 3)), (110100, (11, 1, 0))],
)  # fmt: skip
def test_banner(number, version):
    assert parse_banner(number) == version


LOG = """[11/21/2026-07:00:00] [I] === Performance summary ===
[11/21/2026-07:00:00] [I] Throughput: 412.5 qps
[11/21/2026-07:00:00] [I] Latency: min = 2.29 ms, max = 3.5 ms, mean = 2.4 ms, median = 2.39 ms, percentile(90%) = 2.41 ms, percentile(95%) = 2.5 ms, percentile(99%) = 3.1 ms
[11/21/2026-07:00:00] [I] Enqueue Time: min = 0.01 ms, max = 0.09 ms, mean = 0.02 ms, median = 0.02 ms, percentile(90%) = 0.03 ms, percentile(95%) = 0.04 ms, percentile(99%) = 0.05 ms
[11/21/2026-07:00:00] [I] H2D Latency: min = 0.1 ms, max = 0.2 ms, mean = 0.15 ms, median = 0.15 ms, percentile(90%) = 0.17 ms, percentile(95%) = 0.18 ms, percentile(99%) = 0.19 ms
[11/21/2026-07:00:00] [I] GPU Compute Time: min = 2.1 ms, max = 3.2 ms, mean = 2.2 ms, median = 2.2 ms, percentile(90%) = 2.3 ms, percentile(95%) = 2.4 ms, percentile(99%) = 3 ms
[11/21/2026-07:00:00] [I] D2H Latency: min = 0.004 ms, max = 0.01 ms, mean = 0.005 ms, median = 0.005 ms, percentile(90%) = 0.006 ms, percentile(95%) = 0.007 ms, percentile(99%) = 0.008 ms
[11/21/2026-07:00:00] [I] Total Host Walltime: 0.484848 s
[11/21/2026-07:00:00] [I] Total GPU Compute Time: 0.44 s
"""


def test_log():
    measured = measurement_of_log(LOG, 8)
    assert measured.iterations == 200
    assert measured.images_per_second == pytest.approx(3300, rel=1e-3)
    latency = measured.summaries["Latency"]
    assert (latency.min, latency.median, latency.percentiles[99]) == (2.29, 2.39, 3.1)
    assert measured.summaries["H2D Latency"].mean == 0.15
    assert len(measured.summaries) == 5
    # The table has trtexec's own lines.
    theirs = [line.split("] [I] ")[1] for line in LOG.splitlines() if "Time: min" in line]
    assert set(theirs) <= set(measured.lines())
    with pytest.raises(ValueError, match="expected a log of trtexec with its performance summary"):
        measurement_of_log("&&&& FAILED TensorRT.trtexec", 1)


def test_batch_of_a_log(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text(f"# trtexec --loadEngine=x --shapes=input:8x512x512x3 --device=0\n{LOG}")
    assert deploy.main(["trtexec", "--parse_log", str(log)]) == 0
    assert "3300" in capsys.readouterr().out.replace(",", "")
    log.write_text(LOG)
    assert deploy.main(["trtexec", "--parse_log", str(log)]) == 1
    assert "say it with --batch_size" in capsys.readouterr().err
    assert deploy.main(["trtexec", "--parse_log", str(tmp_path / "none")]) == 1
    assert "--parse_log: expected a log of trtexec, found nothing at" in capsys.readouterr().err


def times_file(path: Path) -> Path:
    """As trtexec --exportTimes writes it: one batch begins when the one before has ended."""
    records = []
    for i in range(100):
        start = 200 + 2.5 * i
        compute = 2.0 + 0.001 * i
        records.append(
            {
                "startEnqMs": start, "endEnqMs": start + 0.02,
                "startH2dMs": start, "endH2dMs": start + 0.3,
                "startComputeMs": start + 0.3, "endComputeMs": start + 0.3 + compute,
                "startD2hMs": start + 0.3 + compute, "endD2hMs": start + 0.4 + compute,
                "h2dMs": 0.3, "computeMs": compute, "d2hMs": 0.1, "latencyMs": 0.4 + compute,
            }
        )  # fmt: skip
    path.write_text(json.dumps(records))
    return path


def test_times(tmp_path, capsys):
    path = times_file(tmp_path / "times.json")
    measured = measurement_of_times(path, 8)
    assert measured.iterations == 100
    assert measured.walltime_s == pytest.approx((2.5 * 99 + 0.4 + 2.099) / 1000)
    assert measured.summaries["GPU Compute Time"].median == pytest.approx(2.0495)
    assert measured.summaries["Latency"].percentiles[90] == pytest.approx(2.4 + 0.089)
    assert deploy.main(["trtexec", "--parse_times", str(path), "--batch_size", "8"]) == 0
    assert "Throughput: 400.0" in capsys.readouterr().out  # 100 batches in 0.25 s
    path.write_text("[]")
    with pytest.raises(ValueError, match="with a record per batch"):
        measurement_of_times(path, 1)


def standin_trtexec(folder: Path, status: int = 0) -> Path:
    """Stands in for trtexec: says its version, notes its arguments, prints the log above."""
    log = folder / "log.txt"
    log.write_text(LOG)
    script = folder / "trtexec"
    script.write_text(
        "#!/bin/sh\n"
        'echo "&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b43] # trtexec $*"\n'
        f'[ "$1" = --help ] && exit 0\necho "$@" > {folder}/arguments\ncat {log}\n'
        f'[ {status} = 0 ] || echo "[E] Engine could not be loaded"\nexit {status}\n'
    )
    script.chmod(0o755)
    return script


def test_run(tmp_path, monkeypatch, capsys):
    standin_trtexec(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    engine = make_engine(tmp_path / "d0.engine")
    assert deploy.main(["trtexec", "--engine", str(engine), "--run"]) == 0
    assert "--includeDataTransfers" in (tmp_path / "arguments").read_text()  # it is an 11
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{tmp_path}/trtexec --loadEngine=")
    assert out[2].startswith("Throughput: 412.") and out[2].endswith("images/s)")

    standin_trtexec(tmp_path, status=1)
    assert deploy.main(["trtexec", "--engine", str(engine), "--run"]) == 1
    assert "exit status 1: [E] Engine could not be loaded" in capsys.readouterr().err


def test_no_trtexec_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trtdet.deploy.trtexec.USUAL_PLACE", tmp_path / "none")
    engine = make_engine(tmp_path / "d0.engine")
    assert deploy.main(["trtexec", "--engine", str(engine)]) == 1
    assert "trtexec: found none on PATH" in capsys.readouterr().err
    assert deploy.main(["trtexec", "--engine", str(engine), "--tensorrt_version", "10.13"]) == 0
    assert capsys.readouterr().out.startswith("trtexec --loadEngine=")
