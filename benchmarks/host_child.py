# SPDX-License-Identifier: Apache-2.0
"""A process that runs `ImageBatcher`, of this checkout or of another: a line of JSON on stdin is
a run, its seconds are a line on stdout.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def serve(root: str) -> None:
    """Of the child."""
    sys.path.insert(0, root)
    from trtdet.images.batcher import ImageBatcher
    from trtdet.images.preprocess import IMAGENET_MEAN
    from trtdet.spec import Preprocessing

    for line in sys.stdin:
        run = json.loads(line)
        preprocessing = Preprocessing(
            tuple(run["size_hw"]), run["layout"], run["dtype"], pad_rgb=IMAGENET_MEAN
        )
        paths = [Path(path) for path in run["paths"]]
        start = time.perf_counter()
        batches = ImageBatcher(paths, preprocessing, run["batch_size"], workers=run["workers"])
        for batch in batches:
            batch.release()
        print(time.perf_counter() - start, flush=True)


class Child:
    """One such process.

    Args:
        root: of the checkout whose `ImageBatcher` it runs.
    """

    def __init__(self, root: Path) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, __file__, str(root)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def start(self, run: dict[str, object]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(run), file=self._process.stdin, flush=True)

    def seconds(self) -> float:
        """Wait for the run."""
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def run_all(children: Sequence[Child], run: dict[str, object], paths: Sequence[Path]) -> None:
    """A run whose images are shared out among the children, all at the same time."""
    for number, child in enumerate(children):
        share = [str(path) for path in paths[number :: len(children)]]
        child.start(run | {"paths": share})
    for child in children:
        child.seconds()


if __name__ == "__main__":
    serve(sys.argv[1])
