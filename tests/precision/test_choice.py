# SPDX-License-Identifier: Apache-2.0
"""What is left out of 8 bits for given costs."""

import itertools

import numpy as np
import pytest

from trtdet.precision.body import ConvLayer
from trtdet.precision.choice import best_set, choose, gains, rank, table
from trtdet.precision.objective import Damage


def layer(name: str, macs: int) -> ConvLayer:
    return ConvLayer(
        name, f"{name}/in", f"{name}/w", "", f"{name}/out", "block", macs,
        depthwise=False, pooled=False, padded=False, constant=True,
    )  # fmt: skip


LAYERS = [layer("a", 50), layer("b", 30), layer("c", 10), layer("d", 10)]
#: Shares of the boxes' power .5 .3 .1 .1; of the scores' .2 .2 .6 0.
COSTS = {
    "a": Damage(2, 1.0, 0.04),
    "b": Damage(2, 0.6, 0.04),
    "c": Damage(2, 0.2, 0.12),
    "d": Damage(2, 0.2, 0.0),
}


def test_gain_is_the_mean_of_both_shares() -> None:
    assert gains(LAYERS, COSTS) == pytest.approx({"a": 0.35, "b": 0.25, "c": 0.35, "d": 0.05})
    assert [found.name for found in rank(LAYERS, COSTS)] == ["c", "b", "a", "d"]


@pytest.mark.parametrize(
    ("share", "kept", "left"),
    [
        (1.0, [], 1.0),
        (0.9, ["c"], 0.9),
        (0.8, ["c", "d"], 0.8),
        (0.6, ["c", "b"], 0.6),
        (0.39, ["c", "a"], 0.4),
        (0.0, ["c", "b", "a", "d"], 0.0),
    ],
)
def test_budget_is_kept(share: float, kept: list[str], left: float) -> None:
    found = choose(LAYERS, COSTS, share, total_macs=100)
    assert list(found.kept) == kept
    assert found.mac_share == pytest.approx(left)


def test_what_stays_out_anyway_counts() -> None:
    found = choose(LAYERS, COSTS, 0.8, total_macs=110, kept_macs=10)
    assert found.kept == ("c",) and found.mac_share == pytest.approx(90 / 110)
    assert (found.box_share, found.score_share) == pytest.approx((0.1, 0.6))
    assert choose(LAYERS, COSTS, 0.95, total_macs=110, kept_macs=10).kept == ()


def test_what_errs_nowhere_stays_in_8_bits() -> None:
    costs = {name: Damage(weight=1) for name in "abcd"} | {"d": Damage(1, 0.5)}
    found = choose(LAYERS, costs, 0.0, total_macs=100)
    assert found.kept == ("d",) and found.score_share == 0
    nothing = {name: Damage() for name in "abcd"}
    assert choose(LAYERS, nothing, 0.0, total_macs=100).kept == ()


def test_best_set_is_as_good_as_trying_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        items = [(float(w), float(g)) for w, g in rng.random((9, 2))]
        budget = float(rng.uniform(0.3, 4))
        usable = budget * (1 - len(items) / 2**15)  # weights are rounded up
        most = max(
            sum(gain for _, gain in some)
            for n in range(10)
            for some in itertools.combinations(items, n)
            if sum(weight for weight, _ in some) <= usable
        )
        found = best_set(items, budget)
        assert sum(items[i][0] for i in found) <= budget
        assert sum(items[i][1] for i in found) >= most - 1e-9


def test_best_set_of_nothing() -> None:
    assert best_set([(1, 1)], 0) == [] and best_set([], 1) == [] and best_set([(2, 1)], 1) == []


def test_table_says_what_each_costs() -> None:
    lines = table(LAYERS, COSTS, ["c"])
    assert len(lines) == 5
    assert lines[1].split() == ["c", "10.00%", "0.00000", "0.00000", "10.00%", "60.00%", "left", "out"]  # fmt: skip
    assert lines[4].split()[-3:] == ["in", "8", "bits"]
