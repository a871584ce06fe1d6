"""What recent meta-gradients say about themselves: is there a signal, do two kinds of data agree, is it stable.

Pure functions of the last few meta-gradients, one row of numbers each. Only directions count where several updates are
put together, since the scale of meta-gradients falls by orders of magnitude within a training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# So many recent meta-gradients are put together; fewer than half of them say nothing yet.
RECENT = 10
_FEWEST = RECENT // 2
# For a warning: so many, of which seventeen in twenty have to say the same.
_FOR_A_VERDICT = 2 * RECENT
_MOSTLY = 0.7

Rows = Sequence[Sequence[float]]


def signal_to_noise(gradients: Rows) -> float:
    """How consistent the signs of recent meta-gradients are: mean over standard deviation of the signs.

    With ``m`` the mean sign of an entry over ``n`` meta-gradients and ``R`` the root mean square of ``m`` over the
    entries, this is ``R / sqrt(1 - R**2 + 1 / n)``: about 0.3 where signs are a matter of luck, above 1 where most
    agree, ``sqrt(n)`` where all do. Near the best rate it is low by right: there the expected gradient is zero. What
    luck gives is for meta-gradients that know nothing of each other. Those by a displacement whose memory is longer
    than the interval share most of their steps, and agree more often.

    Args:
        gradients: The last meta-gradients, oldest first; those that are not finite, or of another length than the last,
            are left out. Only the last ten count.

    Returns:
        NaN for fewer than five.

    Example:
        >>> round(signal_to_noise([[-0.1]] * 10), 2), round(signal_to_noise([[-0.1], [2.0]] * 5), 2)
        (3.16, 0.0)
    """
    rows = _usable(gradients)
    if len(rows) < _FEWEST:
        return math.nan
    means = [sum(map(_sign, column)) / len(rows) for column in zip(*rows, strict=True)]
    square = sum(mean**2 for mean in means) / len(means)
    return math.sqrt(square / (1 - square + 1 / len(rows)))


def agreement(gradients: Rows, others: Rows) -> float:
    """Whether two kinds of data asked for the same: mean cosine of pairs of meta-gradients.

    Args:
        gradients: The last meta-gradients by one kind, oldest first; see :func:`signal_to_noise`.
        others: Those by the other kind, in the same order. Pairs in which one is missing or not finite are left out.

    Returns:
        1 for the same direction every time, 0 for no relation, -1 for opposite ones; NaN for fewer than five pairs.

    Example:
        >>> agreement([[0.1]] * 10, [[3.0]] * 10), agreement([[0.1]] * 6, [[-3.0]] * 6), agreement([[0.1]], [[1.0]])
        (1.0, -1.0, nan)
    """
    pairs = _pairs(gradients, others)[-RECENT:]
    if len(pairs) < _FEWEST:
        return math.nan
    return sum(_cosine(a, b) for a, b in pairs) / len(pairs)


def overfits(held_out: Rows, training: Rows) -> bool:
    """Whether training batches ask for larger learning rates against held-out ones that ask for smaller ones.

    For meta-gradients with respect to logarithms of learning rates. Of the last twenty pairs, seventeen have to be
    opposite, with the held-out ones positive in seventeen. (Pairs by a displacement with a long memory are not
    independent, so that luck does that more often than a coin would. Measured: docs, "reading the signals".)

    Args:
        held_out: The last meta-gradients by held-out batches, oldest first.
        training: Those by training batches that had not been trained on in between, in the same order.

    Example:
        >>> overfits([[0.1]] * 20, [[-3.0]] * 20), overfits([[-0.1]] * 20, [[3.0]] * 20), overfits([[0.1]], [[-3.0]])
        (True, False, False)
    """
    pairs = _pairs(held_out, training)[-_FOR_A_VERDICT:]
    if len(pairs) < _FOR_A_VERDICT:
        return False
    cosine = sum(_cosine(a, b) for a, b in pairs) / len(pairs)
    sign = sum(sum(map(_sign, a)) / len(a) for a, _ in pairs) / len(pairs)
    return cosine <= -_MOSTLY and sign >= _MOSTLY


def excess_growth(growth_rate: float, steps: int) -> float:
    """How much faster the tangent grew than by adding up: zero for steps that know nothing of each other.

    A tangent that only collects ``K`` equal contributions grows by ``log(K) / (K - 1)`` per step.

    Args:
        growth_rate: :attr:`~lightning_l2l.Diagnostics.growth_rate`, of an estimator that carries tangents.
        steps: The number of steps K.

    Example:
        >>> round(excess_growth(math.log(5) / 4, 5), 9)
        0.0
    """
    return growth_rate - math.log(steps) / (steps - 1) if steps > 1 else math.nan


def _usable(gradients: Rows) -> Rows:
    length = len(gradients[-1]) if gradients else 0
    return [row for row in gradients if row and len(row) == length and all(map(math.isfinite, row))][-RECENT:]


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


def _pairs(gradients: Rows, others: Rows) -> list[tuple[Sequence[float], Sequence[float]]]:
    return [
        (a, b)
        for a, b in zip(gradients, others, strict=True)
        if a and len(a) == len(b) and all(map(math.isfinite, [*a, *b]))
    ]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    # Divided first: a square may under- or overflow.
    sizes = [max(map(abs, row)) for row in (a, b)]
    if 0 in sizes:
        return 0.0
    a, b = ([value / size for value in row] for row, size in zip((a, b), sizes, strict=True))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
