# SPDX-License-Identifier: Apache-2.0
"""Load a Triton server on this machine as perf_analyzer does: so many clients, each sending the
next request when it has the answer.

    python benchmarks/triton_load.py --model grpc://localhost:8001/d0 --input photos --concurrency
    1,8,32 --duration 60

Every client has a connection of its own. Every answer is compared with the one that the same images
got before the load: the scores of all slots to 1e-3, as batches put together by the server may
round differently. Exit status 1 where a request failed or was answered wrongly.

Only for a server of your own on this machine; at most 256 clients and 600 s.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trtdet import files
from trtdet.commands.cli import run_main, setup_logging
from trtdet.commands.values import parse_url, positive_int
from trtdet.errors import EngineError
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images
from trtdet.machine import describe_machine
from trtdet.run.benchmark import Summary, noise
from trtdet.runtimes.base import Outputs
from trtdet.runtimes.options import TritonUrl
from trtdet.runtimes.triton import TritonRuntime

MAX_CLIENTS = 256
MAX_SECONDS = 600
SCORE_TOLERANCE = 1e-3


@dataclass
class Tally:
    """What came of the requests of all clients."""

    latencies_ms: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, latency_ms: float, right: bool) -> None:
        self.latencies_ms.append(latency_ms)  # atomic, as are the others: each client adds its own
        self.wrong += not right


@dataclass(frozen=True)
class Load:
    """The requests: batches, and what the server answers to each when it has nothing else to do."""

    batches: Sequence[NDArray[Any]]
    answers: Sequence[Outputs]

    def is_right(self, number: int, outputs: Outputs) -> bool:
        expected = self.answers[number]["detection_scores"]
        return bool(np.abs(outputs["detection_scores"] - expected).max() < SCORE_TOLERANCE)


def make_load(
    url: TritonUrl, source: Path | None, batch_size: int, options: dict[str, Any]
) -> Load:
    """Up to 16 batches, of images or of noise."""
    with TritonRuntime(url, **options) as runtime:
        print(runtime.description, file=sys.stderr)
        if source is None:
            batches = [noise(runtime.spec, batch_size).images]
        else:
            paths = find_images(source)[: 16 * batch_size]
            with ImageBatcher(paths, runtime.spec.preprocessing, batch_size) as batcher:
                batches = [batch.images for batch in batcher if len(batch) == batch_size]
        if not batches:
            raise ValueError(f"--input: expected {batch_size} images or more, for a batch")
        return Load(batches, [runtime.infer(images) for images in batches])


def client(
    url: TritonUrl, load: Load, first: int, end: float, tally: Tally, lock: threading.Lock, options: dict[str, Any]
) -> None:  # fmt: skip
    """One client: from its connection to its last answer."""
    try:
        with TritonRuntime(url, requests=1, **options) as runtime:
            images = runtime.allocate(load.batches[0].shape, load.batches[0].dtype)
            for turn in count(first):
                if time.perf_counter() >= end:
                    return
                number = turn % len(load.batches)
                images[:] = load.batches[number]
                start = time.perf_counter()
                outputs = runtime.infer(images)
                latency_ms = (time.perf_counter() - start) * 1000
                with lock:
                    tally.add(latency_ms, load.is_right(number, outputs))
    except (EngineError, OSError) as error:
        with lock:
            tally.errors.append(str(error))


def run_clients(
    url: TritonUrl, load: Load, clients: int, seconds: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Keep `clients` requests in flight for some time, and wait for every answer."""
    tally, lock = Tally(), threading.Lock()
    start = time.perf_counter()
    threads = [
        threading.Thread(
            target=client, args=(url, load, number, start + seconds, tally, lock, options)
        )
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    for error in tally.errors[:5]:
        print(f"failed: {error}", file=sys.stderr)
    if not tally.latencies_ms:
        raise EngineError(f"{url}: not one request of {clients} clients was answered")
    batch_size = len(load.batches[0])
    return {
        "clients": clients,
        "seconds": elapsed,
        "answered": len(tally.latencies_ms),
        "failed": len(tally.errors),
        "wrong": tally.wrong,
        "requests_per_second": len(tally.latencies_ms) / elapsed,
        "images_per_second": len(tally.latencies_ms) * batch_size / elapsed,
        "latency_ms": Summary.of(tally.latencies_ms).to_dict(),
    }


def table_row(report: dict[str, Any]) -> str:
    times = report["latency_ms"]
    columns = [
        *(f"{report[name]:8d}" for name in ("clients", "answered", "failed", "wrong")),
        f"{report['images_per_second']:10.1f}",
        *(f"{times[name]:9.1f}" for name in ("mean", "median", "percentile(90%)", "percentile(95%)", "percentile(99%)", "max")),
    ]  # fmt: skip
    return " ".join(columns)


HEADER = " clients answered   failed    wrong   images/s   mean ms    median       90%       95%       99%       max"


def parse_clients(text: str) -> list[int]:
    """argparse type: numbers of clients separated by commas."""
    numbers = [positive_int(part) for part in text.split(",")]
    if max(numbers) > MAX_CLIENTS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_CLIENTS} clients, got {text}")
    return numbers


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--model", type=parse_url, required=True, metavar="URL", help="grpc://localhost:8001/MODEL or http://localhost:8000/MODEL")
    parser.add_argument("--input", type=Path, metavar="PATH", help="images to send; default: noise")
    parser.add_argument("--concurrency", type=parse_clients, default=[1, 8, 32], metavar="N,...", help="clients at the same time, one measurement each (default: 1,8,32)")
    parser.add_argument("--duration", type=positive_int, default=60, metavar="SECONDS", help="of each measurement (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=1, metavar="N", help="images in a request (default: %(default)s)")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="as of infer.py")
    parser.add_argument("--no_shared_memory", action="store_true", help="send the images in the requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine to this file, as JSON")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.model.is_local:
        parser.error(f"--model: expected a server on this machine, got {args.model}")
    if args.duration > MAX_SECONDS:
        parser.error(f"--duration: expected at most {MAX_SECONDS} s, got {args.duration}")
    return args


def run(args: argparse.Namespace) -> int:
    options = {"spec": args.spec, "shared_memory": not args.no_shared_memory}
    load = make_load(args.model, args.input, args.batch_size, options)
    print(HEADER)
    reports = []
    for clients in args.concurrency:
        reports.append(run_clients(args.model, load, clients, args.duration, options))
        print(table_row(reports[-1]), flush=True)
    if args.json:
        report = {"machine": describe_machine(), "url": str(args.model), "batch_size": args.batch_size, "loads": reports}  # fmt: skip
        files.write_text(args.json, json.dumps(report, indent=2) + "\n")
    return int(any(report["failed"] or report["wrong"] for report in reports))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging()
    return run_main(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
