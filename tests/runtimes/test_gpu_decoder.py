# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.gpu_decoder` where nvImageCodec fails, is old, or finds no decoding unit."""

import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from trt_rig import Rig

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.runtimes import gpu_decoder


class CodecThatFails:
    """Stands where the module `nvidia.nvimgcodec` would: a decoder that starts and then fails."""

    __version__ = "0.9.0"
    BackendKind = SimpleNamespace(HW_GPU_ONLY=0, GPU_ONLY=1, HYBRID_CPU_GPU=2)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def decode(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("nvImageCodec failure: '#8'")


def test_nvimagecodec_that_fails_is_an_error(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig()
    monkeypatch.setattr(gpu_decoder, "_import_nvimgcodec", CodecThatFails)
    with cuda.Stream() as stream, pytest.raises(EngineError, match=r"nvImageCodec failed \(nvImageCodec failure: '#8'\); --decode cpu"):  # fmt: skip
        gpu_decoder.Decoder(0).decode([b"a JPEG"], stream)
    monkeypatch.setattr(CodecThatFails, "__version__", "0.3.0")
    with pytest.raises(
        EngineError, match=r"nvImageCodec 0\.3\.0 is too old, expected 0\.9 or later"
    ):
        gpu_decoder.Decoder(0)


class CodecWithoutUnit(CodecThatFails):
    """The same on a GPU that has no decoding unit, of which native code writes to stderr."""

    def Backend(self, kind: int) -> int:
        return kind

    def Decoder(self, backends: list[int], **_: Any) -> Any:
        if backends == [self.BackendKind.HW_GPU_ONLY]:
            os.write(2, b"[ERROR] no hardware decoder\n")
            raise RuntimeError("nvImageCodec failure: '#9'")
        return self


def test_a_gpu_without_a_decoding_unit_is_no_error(
    rig: Callable[..., Rig],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig()
    caplog.set_level(logging.INFO, "trtdet")
    monkeypatch.setattr(gpu_decoder, "_import_nvimgcodec", CodecWithoutUnit)
    assert len(gpu_decoder.Decoder(0)._decoders) == 1
    assert capfd.readouterr().err == ""
