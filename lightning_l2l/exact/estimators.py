"""How a meta-gradient is computed, as objects that hold their own options.

:class:`Unroll` is exact: it differentiates the training steps. :class:`EvolutionStrategies` perturbs the
meta-parameters instead; it needs no derivative through the steps, and its answer is noisy. Both are plain data: they
can be compared, copied with ``dataclasses.replace``, and configured from a file by ``class_path`` and ``init_args``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_l2l.exact.objectives import Objective, check_objective

Mode = Literal["auto", "reverse", "forward", "segmented"]
Method = Literal["es", "pes", "es_single"]
Batching = Literal["auto", "vmap", "loop"]


@dataclass(frozen=True, kw_only=True)
class Unroll:
    """The exact derivative of a meta-objective through K training steps.

    Attributes:
        steps: The number of inner steps K. ``None``: one for each batch that is given.
        objective: ``"log"`` (the default: its derivative neither explodes nor vanishes with K), ``"naive"``,
            ``"log_mean"`` or ``"naive_mean"``; see :mod:`lightning_l2l.exact.objectives`.
        mode: How the derivative is computed; all give the same numbers.
            ``"reverse"``: cost independent of the number of meta-parameters, memory proportional to K.
            ``"segmented"``: reverse with the memory of about ``2 sqrt(K)`` steps, for one more training step per step.
            ``"forward"``: memory independent of K, cost proportional to the number of scalar meta-parameters.
            ``"auto"``: forward for a single scalar; else reverse, or segmented above 64 steps.
        second_order: ``False`` leaves out the derivative of the inner gradients: cheaper, and biased.

    Raises:
        ValueError: An unknown objective or mode, or fewer than one step.

    Example:
        >>> Unroll(steps=20, objective="naive").mode
        'auto'
    """

    steps: int | None = None
    objective: Objective = "log"
    mode: Mode = "auto"
    second_order: bool = True

    def __post_init__(self) -> None:
        """Refuses what means nothing."""
        _check_steps(self.steps)
        check_objective(self.objective)
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is not known; choose one of {list(get_args(Mode))}.")


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies:
    """An unbiased, noisy estimate from the meta-objectives of perturbed meta-parameters.

    Helps where the meta-objective is so rough that its exact derivative says nothing, where an operation has no second
    derivative, and (``"pes"``, ``"es_single"``) where short unrolls would be short-sighted. What is estimated is the
    gradient of the meta-objective smoothed by a Gaussian. Cost: one plain training step for each step and particle, in
    one batch; memory does not grow with the number of steps.

    Attributes:
        method: ``"es"``: every unroll stands alone. ``"pes"`` and ``"es_single"`` carry the particles from one unroll
            of an :class:`~lightning_l2l.exact.episodes.Episode` to the next, which removes the bias of truncation:
            ``"pes"`` draws new perturbations for each unroll, ``"es_single"`` keeps those of the episode's beginning
            and so has the smaller variance, as a rule.
        steps: The number of inner steps K. ``None``: one for each batch that is given.
        objective: As for :class:`Unroll`.
        particles: An even number, since they come in antithetic pairs. The standard error of a gradient falls with its
            square root; the time hardly rises until the batched tensors outgrow the cache.
        standard_deviation: The width of the perturbation of every meta-parameter, in its own units; it removes wiggles
            of the meta-objective that are narrower. For the logarithm of a step size, 0.1 is 10 %.
        seed: Where the perturbations come from.
        batching: ``"vmap"``: all particles at once by ``torch.func.vmap``; ``"loop"``: one after the other;
            ``"auto"``: vmap, or the loop if the loss cannot be batched (the diagnostics say so).
        loss_limit: Meta-losses above it, and those that are not finite, count as this number, so that a particle that
            diverged says "bad" instead of making the whole estimate NaN. ``None`` for no limit.

    Raises:
        ValueError: Settings that mean nothing.

    Example:
        >>> EvolutionStrategies(method="es_single", particles=100, standard_deviation=0.3).particles
        100
    """

    method: Method = "es"
    steps: int | None = None
    objective: Objective = "log"
    particles: int = 8
    standard_deviation: float = 0.1
    seed: int = 0
    batching: Batching = "auto"
    loss_limit: float | None = None

    def __post_init__(self) -> None:
        """Refuses what means nothing."""
        _check_steps(self.steps)
        check_objective(self.objective)
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is not known; choose one of {list(get_args(Method))}.")
        if self.particles < 2 or self.particles % 2:
            raise ValueError(
                f"particles must be a positive even number, since they come in antithetic pairs; got {self.particles}."
            )
        if not 0 < self.standard_deviation < math.inf:
            raise ValueError(f"standard_deviation must be finite and above 0, got {self.standard_deviation!r}.")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if self.batching not in get_args(Batching):
            raise ValueError(f"batching={self.batching!r} is not known; choose one of {list(get_args(Batching))}.")
        if self.loss_limit is not None and math.isnan(self.loss_limit):
            raise ValueError("loss_limit is NaN, so every loss would be; leave it out for no limit.")


def _check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1, or None for one step for each batch.")
