# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a run. Standard library only: the command lines read it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trtdet import sessions
from trtdet.images.options import Decode, Resample
from trtdet.precision.options import DEFAULT_SHARE
from trtdet.runtimes.options import TritonUrl

#: What ONNX Runtime runs on.
PROVIDERS = ("auto", *sessions.PROVIDERS)

#: By how much AP may fall in another precision.
MAX_AP_DROP = 0.005

#: Options that only one of the runtimes has, by their names there -> what they are called here.
ONNX_OPTIONS = {"provider": "--provider", "threads": "--threads"}
ENGINE_OPTIONS = {
    "devices": "--devices",
    "contexts": "--contexts",
    "cuda_graph": "--no_cuda_graph",
    "plugins": "--plugins",
    "allow_host_code": "--allow_host_code",
}
TRITON_OPTIONS = {
    "spec": "--spec",
    "requests": "--requests",
    "timeout": "--timeout",
    "shared_memory": "--no_shared_memory",
}
#: What --model is taken for -> in general, and its options.
RUNTIME_OPTIONS = {
    "an engine": ("engines", ENGINE_OPTIONS),
    "an ONNX file": ("ONNX files (.onnx)", ONNX_OPTIONS),
    "a server": ("models on a server", TRITON_OPTIONS),
}


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over image files: what `add_run_options` reads.

    None is the runtime's own choice.
    """

    score_threshold: float | None = None
    recursive: bool = False
    num_images: int | None = None
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    resize: int | None = None
    max_size: int | None = None
    resample: Resample | None = None
    decode: Decode = "cpu"
    workers: int | None = None
    provider: str | None = None
    threads: int | None = None
    devices: Sequence[int] | Literal["all"] | None = None
    contexts: int | None = None
    cuda_graph: bool | None = None
    plugins: Sequence[Path] | None = None
    allow_host_code: bool | None = None
    spec: Path | None = None
    requests: int | None = None
    timeout: float | None = None
    shared_memory: bool | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "RunOptions":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def for_runtime(self, engine: Path | TritonUrl) -> dict[str, Any]:
        """What `open_runtime` is given for `engine`, an engine, an ONNX file, or a model on a
        server.

        Raises:
            ValueError: an option of another runtime is set.
        """
        if isinstance(engine, TritonUrl):
            kind = "a server"
        else:
            kind = "an ONNX file" if engine.suffix.lower() == ".onnx" else "an engine"
        for other, (wanted, names) in RUNTIME_OPTIONS.items():
            for name, option in names.items():
                if other != kind and getattr(self, name) is not None:
                    raise ValueError(f"{option}: is for {wanted}, {engine} is taken for {kind}; leave it out")  # fmt: skip
        chosen = {name: getattr(self, name) for name in RUNTIME_OPTIONS[kind][1]}
        return {name: value for name, value in chosen.items() if value is not None}


METRICS = ("AP", "AP50", "AP75")
#: Images on which noise is measured: its ranking hardly changes with more.
NOISE_IMAGES = 8


#: Views of each image (`View`), where the images are few.
FEW_IMAGES, VIEWS_OF_FEW = 500, 4


@dataclass(frozen=True)
class TuneOptions:
    """What is asked for.

    Attributes:
        max_drop: of `metric`, below float32's.
        views: of each image; None: `VIEWS_OF_FEW`, 1 for `FEW_IMAGES` and more.
        noise_images: images on which each convolution is measured alone.
        threads: of ONNX Runtime; None: one per core.
        share: of the multiply-accumulates: the search begins with what build_engine.py leaves out
            to keep so much in INT8.
    """

    max_drop: float = MAX_AP_DROP
    metric: str = "AP"
    views: int | None = None
    noise_images: int = NOISE_IMAGES
    threads: int | None = None
    share: float = DEFAULT_SHARE
