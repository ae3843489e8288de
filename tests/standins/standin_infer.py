# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the path comes first)
"""infer.py or eval_coco.py on the stand-in engine, in a process of its own.

    python tests/standins/standin_infer.py cpu infer --engine standin.engine --input photos --output
    found --devices all python tests/standins/standin_infer.py cuda eval_coco --engine
    standin.engine ...

"cpu" has two stand-in GPUs and says at the end, on stderr, what was not freed; "cuda" is the
stand-in engine on the GPUs that are here.
"""

import gc
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers"), str(TESTS / "tools")]

import standin_tensorrt_runtime as standin

from trtdet import cuda
from trtdet.commands import eval_coco, infer

SCRIPTS = {"infer": infer.main, "eval_coco": eval_coco.main}


def main(argv: list[str]) -> int:
    kind, script, *arguments = argv
    if kind == "cuda":
        import gpu_engines

        gpu_engines.install_standin()
        return SCRIPTS[script](arguments)
    from standin_cudart import StandinCudart
    from standin_detector import CpuBackend

    cudart = StandinCudart(devices=2, schedule="early")
    cuda.cudart = lambda: cudart  # type: ignore[assignment]
    sys.modules["tensorrt"] = standin.make_module(CpuBackend(cudart))
    status = SCRIPTS[script](arguments)
    gc.collect()
    sys.stderr.write(f"not freed: {cudart.live()}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
