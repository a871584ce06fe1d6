"""Where the usable step sizes lie: a range test on held-out loss, before training starts.

Meta-gradients improve a step size that works; from one that is a thousand times too large the network is dead before
the first of them. So a few short runs from the initial weights find the region first.

The candidates are visited from the largest down. Those that are far too large diverge, and are stopped, within a few
steps; those that are far too small are never visited, since the search stops once a decade is clearly worse than the
one above it. What is left costs about eight short runs, so the length of a run follows from what the search may cost.

A short run favours a step size at the edge of stability, too large for the rest of the training by a factor of about
five, and more the shorter the run (measured; docs, "initial search"). Hence the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# What the best candidate of runs of the usual length is multiplied by: the geometric mean over twelve pairs of a
# task and an optimizer of best constant rate / best candidate, rounded up.
MARGIN = 0.2
# Steps of a candidate's run where the budget allows it; longer ones cost more and did not choose better.
USUAL_STEPS = 20
# What a candidate gets in a short training, whatever the budget's fraction says: a single step tells next to nothing.
# With two, an Adam that was given 1e-3 for 160 steps on digits ended at a held-out loss of 0.19 instead of 0.48.
_FEWEST_STEPS = 2
# A search visits about this many candidates to the end of their run.
_CANDIDATES = 8
# A loss that falls by less than this fraction of the first may be a dead network's; it ends no search. One that rises
# by less may be luck.
_REAL_CHANGE = 0.02
# Where no run changes the loss for the better by this fraction of it, training starts on a plateau.
_VISIBLE = 1e-3
# A candidate this much (of the improvement so far) worse than the best is on the far side of the valley.
_CLEARLY_WORSE = 0.1
# Candidates this close (of the improvement so far) to the best are as good; the largest of them is taken.
_AS_GOOD = 0.01


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


def search_budget(planned_steps: float, fraction: float = 0.05) -> int:
    """How many training steps the search may spend: a fraction of the run's, in a short run two for each candidate.

    Args:
        planned_steps: Optimizer steps of the run; ``math.inf`` where that is not known.
        fraction: Of these.

    Returns:
        A whole number, from 8 to 160. Where the fraction is below 16 steps, it is 16, or all of the planned steps if
        these are fewer still; where the length of the run is not known, what a search at the usual length costs.

    Example:
        >>> search_budget(400), search_budget(2000), search_budget(math.inf), search_budget(160), search_budget(10)
        (20, 100, 160, 16, 10)
    """
    usual = _CANDIDATES * USUAL_STEPS
    if not math.isfinite(planned_steps):
        return usual
    fewest = max(_CANDIDATES, min(_CANDIDATES * _FEWEST_STEPS, int(planned_steps)))
    return max(fewest, min(usual, int(fraction * planned_steps)))


def search_steps(budget: int) -> int:
    """How long a candidate's run may be, so that a search fits into a budget of training steps.

    Example:
        >>> search_steps(20), search_steps(100), search_steps(1000)
        (2, 12, 20)
    """
    return max(1, min(USUAL_STEPS, budget // _CANDIDATES))


def search_margin(steps: int) -> float:
    """What the best candidate of runs of this length is multiplied by: the shorter the run, the less.

    Example:
        >>> search_margin(20), search_margin(5)
        (0.2, 0.1)
    """
    return MARGIN * math.sqrt(min(steps, USUAL_STEPS) / USUAL_STEPS)


def search_learning_rate(
    loss_at: Callable[[float], tuple[float, int]],
    *,
    smallest: float = 1e-7,
    largest: float = 1e2,
    steps: int = USUAL_STEPS,
    budget: int | None = None,
    start_loss: float | None = None,
    margin: float | None = None,
) -> SearchResult:
    """The best learning rate of a half-decade grid, by decades from the top, then half a decade either side.

    The grid is absolute, so the result does not depend on the rate that the user started with.

    Args:
        loss_at: ``loss_at(rate)`` gives the held-out loss after a short run, and the steps that it took.
        smallest: Last candidate; a power of ten.
        largest: First candidate; a power of ten.
        steps: The most that a call of ``loss_at`` takes.
        budget: The most training steps to spend in all; what has been found by then is the result. ``None``
            for no limit. A budget below ``steps`` allows no candidate.
        start_loss: Held-out loss before training. With it, the search ends below the valley; without it every decade is
            visited, since a network that a too large step killed cannot be told from one that hardly moved.
        margin: What the best candidate is multiplied by; ``None``: :func:`search_margin`.

    Returns:
        The result. ``learning_rate`` is ``None`` if no candidate within the budget had a finite loss.

    Raises:
        ValueError: ``steps`` is not positive.

    Example:
        >>> result = search_learning_rate(lambda rate: ((math.log10(rate) + 1.5) ** 2, 20), start_loss=5.0)
        >>> round(result.learning_rate, 5), result.steps, len(result.losses)
        (0.00632, 160, 8)
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: a candidate is judged by what training with it does.")
    losses: dict[float, float] = {}
    spent = 0

    def visit(exponent: float) -> bool:
        """Try a rate, if the budget allows it; whether it did."""
        nonlocal spent
        if budget is not None and spent + steps > budget:
            return False
        rate = 10.0**exponent
        loss, taken = loss_at(rate)
        losses[rate] = loss if math.isfinite(loss) else math.inf
        spent += taken
        return True

    for exponent in range(round(math.log10(largest)), round(math.log10(smallest)) - 1, -1):
        if not visit(exponent) or _is_below_the_valley(losses, start_loss):
            break
    best = _best(losses, start_loss)
    if best is not None:
        # The smaller first, in case the budget allows only one: it is the safer one.
        for half_decade in (-0.5, 0.5):
            visit(math.log10(best) + half_decade)
        best = _best(losses, start_loss)
    factor = search_margin(steps) if margin is None else margin
    return SearchResult(None if best is None else best * factor, dict(sorted(losses.items())), spent)


def _is_below_the_valley(losses: dict[float, float], start_loss: float | None) -> bool:
    """Whether the rate visited last is past the best one, going down."""
    if start_loss is None:
        return False
    best, last = min(losses.values()), list(losses.values())[-1]
    improvement = start_loss - best
    return improvement > _REAL_CHANGE * abs(start_loss) and last - best > _CLEARLY_WORSE * improvement


def _best(losses: dict[float, float], start_loss: float | None) -> float | None:
    """The largest rate whose loss is as good as the best: of a plateau of rates that change nothing, the upper end.

    Where every rate so far did harm, the smallest: a good one can only lie below. Where training starts on a plateau,
    the largest that does no real harm: differences there are luck, and small rates would never leave it.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return None
    best = min(finite.values())
    improvement = 0.0 if start_loss is None else max(0.0, start_loss - best)
    # Rates that are too small to change a float32 weight give losses that are equal up to rounding.
    slack = max(_AS_GOOD * improvement, 1e-6 * abs(best))
    if start_loss is not None and best > start_loss + slack:
        return min(finite)
    if start_loss is not None and improvement <= _VISIBLE * abs(start_loss):
        return max(rate for rate, loss in finite.items() if loss <= start_loss + _REAL_CHANGE * abs(start_loss))
    return max(rate for rate, loss in finite.items() if loss <= best + slack)
