r"""Meta-objectives: what the unrolled training is judged by.

With ``L_k`` the loss on the meta-batch after ``k`` inner steps and ``K`` the number of steps,

================  ==========================================  ======================================
name              value                                       the paper's name
================  ==========================================  ======================================
``naive``         ``L_K``                                     F(theta), the naive objective
``log``           ``(1/K) log L_K``                           (1/t) log F(theta)
``naive_mean``    ``(1/K) sum_{k=1..K} L_k``                  mean over the steps of ``naive``
``log_mean``      ``(1/K) sum_{k=1..K} (1/k) log L_k``        mean over the steps of ``log``
================  ==========================================  ======================================

Every one of them is a weighted sum of ``phi(L_k)`` with ``phi`` the identity or the logarithm, and that is all an
estimator needs to know: :func:`objective_weights` gives the weights, :func:`is_logarithmic` the ``phi``.

Source: Wang, Yuan, Wu, Ge (ICML 2021), sections 3 and 4.
"""

from __future__ import annotations

from typing import Literal, get_args

Objective = Literal["log", "naive", "log_mean", "naive_mean"]


def check_objective(objective: str) -> None:
    """Refuse an unknown objective.

    Raises:
        ValueError: ``objective`` is not one of the four names.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is not known; choose one of {list(get_args(Objective))}.")


def is_logarithmic(objective: Objective) -> bool:
    """Whether the losses enter through their logarithm (they must be positive then)."""
    return objective in ("log", "log_mean")


def objective_weights(objective: Objective, steps: int) -> dict[int, float]:
    """The weight of each step that counts, by the number of inner steps taken (``1 ... steps``).

    Args:
        objective: The name of the meta-objective.
        steps: The number of inner steps K.

    Example:
        >>> objective_weights("log", 4)
        {4: 0.25}
        >>> objective_weights("naive_mean", 2)
        {1: 0.5, 2: 0.5}
        >>> objective_weights("log_mean", 2)
        {1: 0.5, 2: 0.25}
    """
    if objective == "naive":
        return {steps: 1.0}
    if objective == "log":
        return {steps: 1.0 / steps}
    if objective == "naive_mean":
        return {step: 1.0 / steps for step in range(1, steps + 1)}
    return {step: 1.0 / (steps * step) for step in range(1, steps + 1)}
