# SPDX-License-Identifier: Apache-2.0
"""hash_chain.py tells results from versions and times."""

import json
from pathlib import Path

import hash_chain
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper


def model(*, weight: float = 1.0, version: str = "1", size: int = 8) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Mul(x, w) }'
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([weight]), "w"))
    proto.producer_version = version
    spec = {"size": size, "source": {"name": "a.onnx", "trtdet": version}}
    onnx.helper.set_model_props(proto, {"spec": json.dumps(spec), "names": "{0: 'circle'}"})
    return proto


def test_an_onnx_file_is_its_graph_and_metadata_without_versions() -> None:
    base = hash_chain.onnx_content(model())
    assert hash_chain.onnx_content(model(version="2")) == base
    assert hash_chain.onnx_content(model(weight=1.0000001)) != base
    assert hash_chain.onnx_content(model(size=9)) != base


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_json_is_its_results(tmp_path: Path) -> None:
    base = {"AP": 0.5, "seconds": 1.0, "engine": "a", "inner": [{"tool": "trtdet 1", "count": 2}]}
    path = write(tmp_path / "m.json", base)
    assert json.loads(hash_chain.content(path)) == {"AP": 0.5, "inner": [{"count": 2}]}


def test_a_line_per_output_and_one_for_all(tmp_path: Path) -> None:
    write(tmp_path / "a-fp32" / "metrics.json", {"AP": 1})
    found = tmp_path / "a-fp32" / "found"
    write(found / "detections.json", [])
    (found / "1.tsv").write_text("1\t2\n")
    (found / "2.tsv").write_text("3\n")
    first = hash_chain.hash_lines(tmp_path)
    assert [line.split("  ")[1] for line in first] == [
        "a-fp32/found/*.tsv (2 files)", "a-fp32/found/detections.json", "a-fp32/metrics.json", "total of 3 lines",
    ]  # fmt: skip
    (found / "2.tsv").write_text("4\n")
    second = hash_chain.hash_lines(tmp_path)
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True, False]


def test_what_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--models", str(tmp_path), "--case", "tfod"]
    assert hash_chain.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: --models: expected {tmp_path / 'tfod.onnx.gz'}")  # fmt: skip
    keep = write(tmp_path / "keep" / "a.json", {}).parent
    assert hash_chain.main([*arguments, "--keep", str(keep)]) == 1
    assert "expected an empty folder" in capsys.readouterr().err
