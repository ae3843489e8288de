# SPDX-License-Identifier: Apache-2.0
"""Which convolutions INT8 hurts, and the smallest set that has to stay in FP16.

Two measures. What one quantized convolution does to the detections of float32 is cheap and without
scatter, so it ranks the convolutions; AP is what counts and takes a run over all annotated images,
so it is asked only where a decision hangs on it.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trtdet import checks, files, reading
from trtdet.errors import GraphError
from trtdet.precision import quantization
from trtdet.precision.body import Body, ConvLayer
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.choice import gains
from trtdet.precision.objective import Damage
from trtdet.precision.quantization import QuantizationOptions, QuantizationPlan

logger = logging.getLogger(__name__)


# ---- what may be quantized


def plan(body: Body, cache: CalibrationCache) -> QuantizationPlan:
    """What build_engine.py does when nothing is asked for, but that the rest stays float32: FP16 is
    that to within far less than INT8's error.

    Raises:
        GraphError: no convolution can be quantized, or the model brings its own Q/DQ.
    """
    if quantization.own_type(body.model) is not None:
        raise GraphError(
            "the model brings its own Q/DQ, from training: there is nothing to choose; build it as it is"
        )
    return quantization.plan_quantization(body, cache, QuantizationOptions(fp16_scales=True))


def patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match these names alone: `a[1]` is a name, and a pattern for `a1`."""
    return [escape(name) for name in names]


# ---- noise on the detections


@dataclass(frozen=True)
class LayerNoise:
    """What one quantized convolution does to the detections: `trtdet.precision.objective`.

    Attributes:
        gain: of the power of all errors, the share that goes where it is left out: the mean of that
            of boxes and that of scores.
    """

    layer: ConvLayer
    damage: Damage
    gain: float


def layer_noises(layers: Sequence[ConvLayer], costs: Mapping[str, Damage]) -> list[LayerNoise]:
    """In the order of the graph."""
    gain = gains(layers, costs)
    return [LayerNoise(layer, costs[layer.name], gain[layer.name]) for layer in layers]


# ---- the smallest set


def smallest_set(
    ranked: Sequence[ConvLayer], fits: Callable[[Collection[str]], bool], *, first: int = 1
) -> list[str] | None:
    """Names of as few convolutions as possible that, left out of INT8, make a model fit that else
    does not; None where all but one are not enough.

    The first so many are left out, then twice, four times, ... as many, then as many as bisection
    finds are needed. Of those, what the model can do without goes back into INT8: the greatest
    multiply-accumulates first, in halves, quarters, ..., one by one.

    Args:
        ranked: what is to be left out first comes first.
        first: so many are tried at first.
        fits: whether a model with these names left out is good enough. Asked about 2 log2(n) times,
            and for k names up to 2 k more.
    """
    names = [layer.name for layer in ranked]
    failed, count = 0, max(1, min(first, len(names) - 1))
    while count < len(names) and not fits(names[:count]):
        failed, count = count, count * 2
    if count >= len(names):
        count = len(names) - 1
        if count <= failed or not fits(names[:count]):
            return None
    while count - failed > 1:
        middle = (failed + count) // 2
        if fits(names[:middle]):
            count = middle
        else:
            failed = middle
    if count > 1:
        logger.info("%d are enough; which of them can go back into INT8?", count)
    macs = {layer.name: layer.macs for layer in ranked}
    return _put_back(sorted(names[:count], key=lambda name: -macs[name]), fits)


def _put_back(kept: list[str], fits: Callable[[Collection[str]], bool]) -> list[str]:
    """Leave out of `kept` what `fits` does not need: runs of half of it, of a quarter, ..., of
    one.
    """
    size = len(kept) // 2
    while size:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if fewer and fits(fewer):
                kept = fewer
            else:
                start += size
        size //= 2
    return kept


# ---- the journal


@dataclass(frozen=True)
class JournalLine:
    """One measurement.

    Attributes:
        key: fingerprint of the context and the configuration.
        values: what was measured, by name.
    """

    SCHEMA: ClassVar[int] = 1

    key: str
    values: dict[str, float]

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            checks.finite(name, value)


class Journal:
    """What was measured, one line of JSON each, so that an interrupted run goes on where it
    stopped.

    A result is found again only under the same context: model, scales, images, versions. Lines of
    another context stay and do no harm.
    """

    def __init__(self, path: Path, context: Mapping[str, Any]) -> None:
        self.path = path
        self._context = dict(context)
        self._known: dict[str, dict[str, float]] = {}
        if files.is_beside(path):
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def known(
        self, kind: str, layers: Iterable[str], names: Collection[str]
    ) -> dict[str, float] | None:
        """What was measured of this configuration; None: nothing yet, or no values of these
        names.
        """
        values = self._known.get(fingerprint(self._context, kind, sorted(layers)))
        if values is not None and set(values) != set(names):
            logger.warning("%s: measured again, as a line has other values than %s", self.path, ", ".join(names))  # fmt: skip
            return None
        return values

    def measure(
        self,
        kind: str,
        layers: Collection[str],
        names: Collection[str],
        measure: Callable[[], Mapping[str, float]],
    ) -> dict[str, float]:
        """What is known of this configuration, or else what `measure` returns, which is written
        down.

        Args:
            names: of the values.
        """
        known = self.known(kind, layers, names)
        if known is not None:
            return known
        key = fingerprint(self._context, kind, sorted(layers))
        values = dict(measure())
        line = json.dumps({"schema": JournalLine.SCHEMA, "key": key, "kind": kind, "layers": sorted(layers), "values": values})  # fmt: skip
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[key] = values
        return values

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8-sig", errors="replace")
        remedy = "delete it, and it is made anew, or give --output another name"
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry: JournalLine = reading.parse(line, JournalLine, name=f"{self.path}:{number}", remedy=remedy)  # fmt: skip
            except reading.OtherSchemaError:
                raise
            except ValueError as error:
                logger.warning("left out a line that is not whole: %s", error)
            else:
                self._known[entry.key] = entry.values
        if text and not text.endswith("\n"):  # cut off while it was written
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")


def fingerprint(*parts: Any) -> str:
    """SHA-256 of anything that JSON holds."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def cache_fingerprint(cache: CalibrationCache) -> str:
    """Of the scales, the statistics per channel and the rounding of weights."""
    channels = {name: c.to_dict() for name, c in cache.channels.items()}
    rounding = {name: dataclasses.asdict(row) for name, row in cache.rounding.items()}
    return fingerprint(dict(cache.scales), channels, rounding)


# ---- table and plot


def table(found: Sequence[LayerNoise], kept: Collection[str]) -> str:
    """TSV, what is worst first: what each convolution, alone in INT8, does to boxes and scores,
    its share of all errors, and its precision.
    """
    macs = sum(entry.layer.macs for entry in found) or 1
    rows = [["layer", "block", "kind", "macs_percent", "error_percent", "box_loss", "score_loss", "precision"]]  # fmt: skip
    for entry in sorted(found, key=lambda entry: -entry.gain):
        layer, damage = entry.layer, entry.damage.mean()
        rows.append(
            [
                layer.name,
                layer.block,
                "depthwise" if layer.depthwise else "convolution",
                f"{100 * layer.macs / macs:.3f}",
                f"{100 * entry.gain:.3f}",
                f"{damage.box_loss:.6f}",
                f"{damage.score_loss:.6f}",
                "fp16" if layer.name in kept else "int8",
            ]
        )
    return "".join("\t".join(row) + "\n" for row in rows)


def plot(path: Path, found: Sequence[LayerNoise], kept: Collection[str], *, title: str) -> None:
    """Draw the noise of every convolution, in the order of the network, to a picture file.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError as error:
        raise ValueError("--plot: needs matplotlib; pip install matplotlib") from error

    ordered = sorted(found, key=_block_order(found))
    figure = Figure(figsize=(max(8.0, 0.07 * len(ordered)), 5.0), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(ordered))
    noise = np.array([entry.gain for entry in ordered])
    out = np.array([entry.layer.name in kept for entry in ordered], bool)
    depthwise = np.array([entry.layer.depthwise for entry in ordered], bool)
    for chosen, color, label in (
        (~out & ~depthwise, "tab:blue", "INT8"),
        (~out & depthwise, "tab:cyan", "INT8, depthwise"),
        (out, "tab:red", "stays FP16"),
    ):
        if chosen.any():
            axes.bar(places[chosen], noise[chosen], color=color, label=label)
    blocks = [entry.layer.block for entry in ordered]
    middles = [places[[b == block for b in blocks]].mean() for block in dict.fromkeys(blocks)]
    axes.set_xticks(middles, list(dict.fromkeys(blocks)), rotation=90, fontsize=8)
    highest = max(noise.max(), 1e-12)
    axes.set(yscale="log", ylim=(highest / 1e5, highest * 2), xlim=(-1, len(ordered)))
    axes.set_ylabel("share of the error of boxes and scores")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _block_order(found: Sequence[LayerNoise]) -> Callable[[LayerNoise], int]:
    """Blocks in the order in which they begin: the two heads run side by side and alternate in
    the graph.
    """
    first: dict[str, int] = {}
    for entry in found:
        first.setdefault(entry.layer.block, len(first))
    return lambda entry: first[entry.layer.block]
