"""Where the usable step sizes lie: a range test on held-out loss, before training starts.

Meta-gradients improve a step size that works; from one that is a thousand times too large the network is dead before the first
of them. So a few short runs from the initial weights find the region first. A short run always favours a step size
at the edge of stability, too large for the rest of the training by about a factor of three (measured on
eight tasks; docs, "initial search"), hence the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Short runs pick about three times too much.
MARGIN = 0.3


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        learning_rate: The rate to start with: the best candidate times the margin; ``None`` if every candidate failed.
        losses: Held-out loss by candidate rate, in increasing order of the rate; ``inf`` for a run that diverged.
        steps: Training steps spent in all.
    """

    learning_rate: float | None
    losses: dict[float, float]
    steps: int


def search_learning_rate(
    loss_at: Callable[[float], tuple[float, int]],
    *,
    smallest: float = 1e-7,
    largest: float = 1e2,
    margin: float = MARGIN,
) -> SearchResult:
    """The best learning rate of a half-decade grid, by decades first.

    The grid is absolute, so the result does not depend on the rate that the user started with.

    Args:
        loss_at: ``loss_at(rate)`` gives the held-out loss after a short run, and the steps that it took.
        smallest: First candidate; a power of ten.
        largest: Last candidate; a power of ten.
        margin: What the best candidate is multiplied by.

    Example:
        >>> result = search_learning_rate(lambda rate: ((math.log10(rate) + 1.5) ** 2, 20))
        >>> round(result.learning_rate, 4), result.steps
        (0.0095, 240)
    """
    losses: dict[float, float] = {}
    steps = 0

    def visit(exponent: float) -> None:
        nonlocal steps
        rate = 10.0**exponent
        if rate not in losses:
            losses[rate], taken = loss_at(rate)
            steps += taken

    first, last = round(math.log10(smallest)), round(math.log10(largest))
    for exponent in range(first, last + 1):
        visit(exponent)
    best = min(losses, key=lambda rate: losses[rate])
    if math.isfinite(losses[best]):
        for exponent in (math.log10(best) - 0.5, math.log10(best) + 0.5):
            visit(exponent)
        best = min(losses, key=lambda rate: losses[rate])
    found = best * margin if math.isfinite(losses[best]) else None
    return SearchResult(found, dict(sorted(losses.items())), steps)
