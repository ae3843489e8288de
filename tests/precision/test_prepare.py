# SPDX-License-Identifier: Apache-2.0
"""A precision from end to end: the body is worked out once, and a calibration is as good from
its file as fresh.
"""

from pathlib import Path

import onnx
import pytest
import toy_network as toy
from conftest import EXAMPLES

from trtdet.precision import body as body_module
from trtdet.precision import calibration_cache
from trtdet.precision.body import Body
from trtdet.precision.options import Int8Options, Precision
from trtdet.precision.prepare import STRONGLY_TYPED, Prepared, Target, load_model, prepare
from trtdet.spec import ModelSpec

IMAGES = EXAMPLES / "images"


@pytest.fixture(params=["toy", "tiny_shapes"])
def loaded(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, ModelSpec]:
    if request.param == "toy":
        return toy.network(), toy.SPEC
    return load_model(request.getfixturevalue("tiny_onnx"))


def ranges(options: dict[str, object]) -> Int8Options:
    return Int8Options(num_images=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("to", "target"),
    [("int8", STRONGLY_TYPED), ("fp8", STRONGLY_TYPED), ("int8", Target(weak=True, calibrator=True))],
)  # fmt: skip
def test_a_cache_gives_the_bytes_of_the_calibration_that_wrote_it(to: Precision, target: Target, loaded: tuple[onnx.ModelProto, ModelSpec], tmp_path: Path) -> None:  # fmt: skip
    cache = tmp_path / "scales.cache"

    def prepared(**options: object) -> Prepared:
        return prepare(*loaded, to, ranges(options), target=target)

    fresh, unsaved, again = prepared(images=IMAGES, cache=cache), prepared(images=IMAGES), prepared(cache=cache)  # fmt: skip
    before = loaded[0].SerializeToString()
    assert len(calibration_cache.read_cache(cache).scales) > 10
    for other in (unsaved, again):
        assert other.typed.SerializeToString() == fresh.typed.SerializeToString()
        assert other.float32.SerializeToString() == fresh.float32.SerializeToString()
        assert other.quantization == fresh.quantization
        assert (other.scales is None) == (fresh.scales is None)
        if other.scales and fresh.scales:
            assert other.scales.to_text() == fresh.scales.to_text()
    assert loaded[0].SerializeToString() == before
    kinds = {weight.data_type for weight in fresh.typed.graph.initializer}
    narrow = onnx.TensorProto.INT8 if to == "int8" else onnx.TensorProto.FLOAT8E4M3FN
    assert (narrow in kinds) != target.calibrator


def test_the_body_is_cut_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a calibration, its cache, the Q/DQ and what goes between."""
    calls: list[str] = []
    for name in ("cut_to_body", "_conv_layers"):
        original = getattr(body_module, name)

        def counted(model: onnx.ModelProto, name: str = name, original: object = original) -> object:  # fmt: skip
            calls.append(name)
            return original(model)  # type: ignore[operator]

        monkeypatch.setattr(body_module, name, counted)
    options = {"images": IMAGES, "cache": tmp_path / "scales.cache"}
    found = prepare(toy.network(), toy.SPEC, "int8", ranges(options))
    assert found.quantization and 0.8 <= found.quantization.mac_share < 1
    assert sorted(calls) == ["_conv_layers", "cut_to_body"]
    calls.clear()
    prepare(toy.network(), toy.SPEC, "fp16")
    assert calls == []


def test_the_spec_is_an_argument(tmp_path: Path) -> None:
    """What metadata say counts between stages alone: sizes and sensitive nodes are those of the
    argument.
    """
    model = toy.free_network()
    spec = ModelSpec.from_onnx(model)
    del model.metadata_props[:]
    small = Body(model, spec)
    large = Body(model, spec.replace(preprocessing=spec.preprocessing.at((32, 32))))
    assert [b.macs for b in small.layers] == [8 * 27 * 64, 8 * 72 * 16, 3 * 8 * 64, 4 * 8 * 64, 3 * 8 * 16, 4 * 8 * 16]  # fmt: skip
    assert [b.macs for b in large.layers] == [4 * layer.macs for layer in small.layers]
    found = prepare(model, spec.replace(sensitive_nodes=("box_*",)), "int8", ranges({"images": IMAGES, "share": 1.0}))  # fmt: skip
    assert found.quantization and found.quantization.kept == dict.fromkeys(("box_0", "box_1"), "sensitive ('box_*')")  # fmt: skip
