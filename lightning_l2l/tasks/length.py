"""How long an unroll, or an inner training, is: a number, a random one, or one that grows with the meta-training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kind = Literal["fixed", "uniform", "log_uniform", "exponential", "curriculum"]


@dataclass(frozen=True)
class Length:
    """A number of inner steps, drawn anew for each unroll.

    Attributes:
        steps: The number (``"fixed"``), else the smallest.
        largest: The largest; for ``"exponential"`` the mean of what is added to ``steps``, without a bound.
        kind: ``"fixed"``; ``"uniform"`` or ``"log_uniform"`` between the two; ``"exponential"``; ``"curriculum"``: from
            ``steps`` to ``largest``, by a constant factor per update.
        updates: For ``"curriculum"``: after how many meta-updates the largest is reached.

    Raises:
        ValueError: Numbers that mean nothing.

    Example:
        >>> curriculum = Length(10, 1000, "curriculum", updates=100)
        >>> [curriculum.draw(torch.Generator(), update) for update in (0, 50, 100, 150)]
        [10, 100, 1000, 1000]
    """

    steps: int
    largest: int | None = None
    kind: Kind = "fixed"
    updates: int = 1000

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {list(get_args(Kind))}.")
        if (self.kind == "fixed") != (self.largest is None):
            raise ValueError(f"kind={self.kind!r} {'takes no' if self.kind == 'fixed' else 'needs'} largest.")
        if self.steps < 1 or self.updates < 1 or (self.largest is not None and self.largest < 1):
            raise ValueError("A length needs at least one step, and a curriculum at least one update.")
        if self.kind not in ("fixed", "exponential") and self.largest is not None and self.largest < self.steps:
            raise ValueError(f"largest={self.largest} is below steps={self.steps}.")

    @property
    def longest(self) -> int:
        """The largest number of steps that is to be expected (for ``"exponential"`` the mean)."""
        return self.steps + (self.largest or 0) if self.kind == "exponential" else self.largest or self.steps

    def draw(self, generator: torch.Generator, update: int) -> int:
        """A number of steps.

        Args:
            generator: Source of randomness.
            update: How many meta-updates have been made.
        """
        if self.largest is None:
            return self.steps
        share = min(1.0, update / self.updates)
        if self.kind != "curriculum":
            share = torch.rand((), generator=generator, dtype=torch.float64).item()
        if self.kind == "uniform":
            return self.steps + int(share * (self.largest - self.steps + 1))
        if self.kind == "exponential":
            return self.steps + round(-self.largest * math.log1p(-share))
        return round(self.steps * math.exp(share * math.log(self.largest / self.steps)))


def as_length(length: int | Length) -> Length:
    """A fixed length out of a number."""
    return length if isinstance(length, Length) else Length(length)
