# SPDX-License-Identifier: Apache-2.0
"""What a conversion to a narrow floating-point type did."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class KeptNode:
    """A node that stays float32, and why; `asked`: because its name was given."""

    name: str
    op_type: str
    reason: str
    asked: bool = False


@dataclass(frozen=True)
class PrecisionReport:
    """What a conversion did.

    Attributes:
        precision: of the body, "FP16".
        converted: number of nodes that compute in it.
        by_design: nodes in float32 because of where they stand: preprocessing, box decoding, NMS.
        kept: nodes in float32 for a reason of their own: a range, a name that was asked for.
        flushed: weights other than zero that became zero (all below the rounding error of their
            tensor's largest).
        casts: Cast nodes put in.
    """

    precision: str
    converted: int
    by_design: tuple[KeptNode, ...]
    kept: tuple[KeptNode, ...]
    flushed: int = 0
    casts: int = 0

    @property
    def float32_names(self) -> frozenset[str]:
        """Names of all nodes that stay float32, as far as they have any."""
        return frozenset(node.name for node in (*self.by_design, *self.kept)) - {""}

    def lines(self) -> list[str]:
        """For the log: one line of counts, then one per pattern that was asked for."""
        counts = ", ".join(
            f"{n} {reason}" for reason, n in Counter(k.reason for k in self.by_design).items()
        )
        lines = [
            f"{self.precision}: {self.converted} nodes, {self.casts} casts; float32: {counts or 'none'}"
            + (f"; {self.flushed} weights round to zero" if self.flushed else "")
        ]
        asked = Counter(node.reason for node in self.kept if node.asked)
        return lines + [f"stays float32: {n} nodes, {reason}" for reason, n in asked.items()]

    def warnings(self) -> list[str]:
        """One line per node that does not fit the type."""
        return [
            f"stays float32: {k.op_type} '{k.name}': {k.reason}" for k in self.kept if not k.asked
        ]
