# SPDX-License-Identifier: Apache-2.0
"""Every kind of set prediction in FP16, rounded as on a GPU, and as engines of TensorRT-RTX:
docs/families.md has the figures.
"""

import json
from pathlib import Path

import onnx
import pytest

from trtdet.commands import build_engine, compare, create_onnx
from trtdet.precision.graph_types import element_types

CASES = ("conditional_detr", "yolos_batch1", "rtdetr", "dfine", "rfdetr")
PHOTOGRAPHS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    paths = {}
    for case in CASES:
        source = shared / "cases" / "readings" / case / "model.onnx"
        if not source.is_file():
            pytest.skip("needs ../shared/cases/readings, which is not here")
        paths[case] = folder / f"{case}.onnx"
        assert (
            create_onnx.main(["--source_onnx", str(source), "--onnx", str(paths[case]), "--quiet"])
            == 0
        )
    return paths


@pytest.mark.parametrize("case", CASES)
def test_fp16(converted: dict[str, Path], shared: Path, tmp_path: Path, case: str) -> None:
    narrow, summary = tmp_path / "fp16.onnx", tmp_path / "summary.json"
    asked = ["--model", str(converted[case]), "--save_onnx", str(narrow), "--precision", "fp16"]
    assert build_engine.main(asked) == 0
    model = onnx.load(narrow)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    kinds = element_types(model)
    assert norms and {kinds[n.output[0]] for n in norms} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}  # fmt: skip
    assert all(a.i == 1 for n in norms for a in n.attribute if a.name == "stash_type")
    sides = ["--reference", str(converted[case]), "--candidate", str(narrow)]
    photographs = ["--input", str(shared / "images" / "person_val100")]
    limit = ["--num_images", str(PHOTOGRAPHS), "--json", str(summary)]
    status = compare.main([*sides, *photographs, *limit])
    found = json.loads(summary.read_text())
    heads = {t["name"]: t for t in found["tensors"] if t["head"]}
    assert not sum(t["non_finite"] for t in found["tensors"])
    assert all(t["cosine"] > 0.999 for t in heads.values()) and len(heads) == 2
    if case != "rfdetr":  # whose random ranks lie closer together than FP16 rounds
        assert status == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_tensorrt_rtx_builds_it(
    converted: dict[str, Path], shared: Path, tmp_path: Path, case: str, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs requirements-rtx.txt")
    engine = tmp_path / "a.engine"
    options = ["--flavor", "tensorrt_rtx", "--compute_capability", "8.9", "--optimization_level", "0"]  # fmt: skip
    if precision == "int8":
        (tmp_path / "photos").mkdir()
        for photograph in sorted((shared / "images" / "person_val100").glob("*.jpg"))[:4]:
            (tmp_path / "photos" / photograph.name).symlink_to(photograph)
        options += ["--calib_input", str(tmp_path / "photos"), "--int8_share", "1"]
    asked = ["--model", str(converted[case]), "--engine", str(engine), "--precision", precision]
    assert build_engine.main([*asked, *options]) == 0
    assert engine.stat().st_size > 50_000
