# SPDX-License-Identifier: Apache-2.0
"""What the engine's own reports are read as: three spellings of types, and a plan."""

import json
from typing import Any

import pytest

from trtdet.engine import layers


@pytest.mark.parametrize(
    ("types", "precision"),
    [
        (["Row major linear FP32"], "FP32"),  # 8.6
        (["Channel major FP16 format where channel % 8 == 0", "Row major linear FP32"], "FP16"),  # a cast within
        (["Thirty-two wide channel vectorized row major Int8 format", "Row major linear FP16 format"], "INT8"),
        (["Half"], "FP16"),  # 11, and Myelin layers of 10
        (["Float", "Int32"], "FP32"),
        (["BFloat16"], "BF16"),
        (["bf16", "float"], "BF16"),  # plan
        (["fp8_e4m3"], "FP8"),
        (["UInt8", "Int64", "Bool"], None),
        (["uint4"], None),
        ([], None),
    ],
)  # fmt: skip
def test_precision_is_the_narrowest_float(types: list[str], precision: str | None) -> None:
    assert layers.precision_of(types) == precision


def layer(kind: str, key: str, *types: str) -> dict[str, Any]:
    *inputs, output = ({"Name": "t", "Dimensions": [1], key: t} for t in types)
    return {"Name": "l", "LayerType": kind, "Inputs": inputs, "Outputs": [output]}


@pytest.mark.parametrize("key", ["Format/Datatype", "Format/DataType", "DataType"])
def test_inspector_of_every_version(key: str) -> None:
    text = json.dumps({"Layers": [
        layer("CaskConvolution", key, "FP16", "FP16"),
        layer("CaskConvolution", key, "FP16", "FP32"),
        layer("Reformat", key, "FP32", "FP16"),  # converts only
        layer("PluginV2", key, "FP32", "Int32"),
        layer("Constant", key, "FP16"),
        layer("Shape", key, "Int32", "Int64"),
    ]})  # fmt: skip
    shares = layers.from_inspector(text)
    assert shares == layers.LayerShares("engine inspector", {"FP16": 2, "FP32": 1})
    assert str(shares) == "FP16 67%, FP32 33% of 3 layers (engine inspector)"


@pytest.mark.parametrize("text", ['{"Layers": ["conv", "nms"]}', "not json", "{}", '{"Layers": []}', "[]"])  # fmt: skip
def test_inspector_that_says_nothing_of_types(text: str) -> None:
    assert layers.from_inspector(text) is None


PLAN = b"""\x00header {
  accelerators={sm89 }
descriptors {
  tensor={ dims={ 1 3 } name="in" region="" type=float }
  tensor={ const_payload_size=4 name="w" type=half }
  tensor={ is_scratchspace=1 name="scratch" type=int8 }
  sub_tensor={ base="in" name="mid^deref" type=half }
  tensor={ name="count" type=int32 }
main {
 label bb1:
  function={ name=__myl_Cast args={ "in" "mid^deref" } layers="[ONNX Layer: a]
[ONNX Layer: b]" swap_ab=false }
  corrltn={ name="c" output={"mid^deref" } input={"mid^deref" "w" } scratchspace={"scratch" } layers="[ONNX Layer: in]" }
  signal={ name=s stream=0 }
  function={ name=__myl_Max args={ "in" "in" } layers="" }
  function={ name=__myl_Max args={ "count" } layers="" }
}
\x01\x02header {
  accelerators={*}
descriptors {
  tensor={ name="in" type=float }
main {
 label bb1:
  silu={ name="x" output={"in" } }
}
"""


def test_plan() -> None:
    assert layers.from_plan(PLAN) == layers.LayerShares("plan", {"FP16": 2, "FP32": 1})


@pytest.mark.parametrize("plan", [b"", b"vtrt\x00", PLAN[:200], PLAN.replace(b"sm89 ", b"*")])
def test_plan_of_another_kind(plan: bytes) -> None:
    assert layers.from_plan(plan) is None


def test_network() -> None:
    shares = layers.from_network([("CONVOLUTION", ["HALF"]), ("CAST", ["HALF"]), ("SHAPE", ["INT64"]), ("TOPK", ["FLOAT", "INT64"])])  # fmt: skip
    assert shares.counts == {"FP16": 1, "FP32": 1} and shares.source == "network"
