# SPDX-License-Identifier: Apache-2.0
"""Which convolutions stay out of 8 bits, from what each costs alone: pure functions of costs.

The powers of errors add up (`trtdet.precision.objective`), so the best set under a budget of
multiply-accumulates is a knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtdet.precision.body import ConvLayer
from trtdet.precision.objective import Damage

#: Of a budget of multiply-accumulates: finer than any convolution worth a thought.
KNAPSACK_STEPS = 1 << 15


@dataclass(frozen=True)
class Choice:
    """What stays out, and what that is worth.

    Attributes:
        kept: names, in the order in which they were taken.
        mac_share: of all multiply-accumulates of convolutions, those that remain in 8 bits.
        box_share, score_share: of the power of the errors of boxes and scores, what `kept` made.
    """

    kept: tuple[str, ...]
    mac_share: float
    box_share: float
    score_share: float


def gains(layers: Sequence[ConvLayer], costs: Mapping[str, Damage]) -> dict[str, float]:
    """Convolution -> its share of the power of all errors: the mean of its shares of boxes' and
    of scores'; 0 where nothing errs.
    """
    shares = _shares(layers, costs)
    return {name: (box + score) / 2 for name, (box, score) in shares.items()}


def rank(layers: Sequence[ConvLayer], costs: Mapping[str, Damage]) -> list[ConvLayer]:
    """The greatest gain per multiply-accumulate first; the order of the graph among equals."""
    gain = gains(layers, costs)
    return sorted(layers, key=lambda layer: -gain[layer.name] / max(layer.macs, 1))


def choose(
    layers: Sequence[ConvLayer],
    costs: Mapping[str, Damage],
    least_share: float,
    *,
    total_macs: int,
    kept_macs: int = 0,
) -> Choice:
    """The convolutions to leave out of 8 bits.

    Args:
        layers: those that may be in 8 bits.
        costs: of each, alone in 8 bits.
        least_share: of `total_macs`, how much has to remain in 8 bits.
        total_macs: of all convolutions.
        kept_macs: of those that stay out whatever is chosen.
    """
    budget = (1 - least_share) * total_macs - kept_macs
    gain = gains(layers, costs)
    kept = best_set([(layer.macs, gain[layer.name]) for layer in layers], budget)
    names = {layers[i].name for i in kept}
    macs = kept_macs + sum(layers[i].macs for i in kept)
    shares = _shares(layers, costs)
    box, score = (sum(shares[name][i] for name in names) for i in (0, 1))
    ordered = tuple(layer.name for layer in rank(layers, costs) if layer.name in names)
    return Choice(ordered, 1 - macs / max(total_macs, 1), box, score)


def best_set(items: Sequence[tuple[float, float]], budget: float) -> list[int]:
    """Which items to take so that their weights stay within a budget and their gains are greatest;
    a knapsack, by dynamic programming.

    Args:
        items: weight and gain of each; what gains nothing is not taken.

    Weights count in 1 / `KNAPSACK_STEPS` of the budget, rounded up.
    """
    if budget <= 0:
        return []
    if sum(weight for weight, _ in items) <= budget:
        return [i for i, (_, gain) in enumerate(items) if gain > 0]
    best = np.zeros(KNAPSACK_STEPS + 1)  # [budget] -> gain
    taken = np.zeros((len(items), KNAPSACK_STEPS + 1), bool)
    steps = [math.ceil(weight / budget * KNAPSACK_STEPS - 1e-9) for weight, _ in items]
    for i, (_, gain) in enumerate(items):
        if gain <= 0 or steps[i] > KNAPSACK_STEPS:
            continue
        with_it = best[: len(best) - steps[i]] + gain
        taken[i, steps[i] :] = with_it > best[steps[i] :]
        best[steps[i] :] = np.maximum(best[steps[i] :], with_it)
    left, found = KNAPSACK_STEPS, []
    for i in reversed(range(len(items))):
        if taken[i, left]:
            found.append(i)
            left -= steps[i]
    return found[::-1]


def table(layers: Sequence[ConvLayer], costs: Mapping[str, Damage], kept: Collection[str]) -> list[str]:  # fmt: skip
    """For the log: what each convolution costs, alone in 8 bits, in the order in which they are
    taken out.
    """
    total = sum(layer.macs for layer in layers) or 1
    shares = _shares(layers, costs)
    names = {layer.name for layer in layers}
    width = max((len(name) for name in names), default=0)
    lines = [f"{'convolution':<{width}} {'MACs':>7} {'box loss':>9} {'score loss':>10} {'of the power':>16}"]  # fmt: skip
    for layer in rank(layers, costs):
        cost, (box, score) = costs[layer.name].mean(), shares[layer.name]
        lines.append(
            f"{layer.name:<{width}} {layer.macs / total:>7.2%} {cost.box_loss:>9.5f} {cost.score_loss:>10.5f} "
            f"{box:>7.2%} {score:>7.2%}  {'left out' if layer.name in kept else 'in 8 bits'}"
        )
    return lines


def _shares(
    layers: Sequence[ConvLayer], costs: Mapping[str, Damage]
) -> dict[str, tuple[float, float]]:
    """Convolution -> its share of the power of the boxes' errors, and of the scores'."""
    means = {layer.name: costs[layer.name].mean() for layer in layers}
    box = sum(cost.box_power for cost in means.values()) or 1.0
    score = sum(cost.score_power for cost in means.values()) or 1.0
    return {name: (cost.box_power / box, cost.score_power / score) for name, cost in means.items()}
