"""The problems on which truncation is known to fail, as losses and learned optimizers.

They are those of Vicol, Metz, Sohl-Dickstein 2021 (the first goes back to Tallec and Ollivier 2017, arXiv 1702.05043).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torchopt.base import GradientTransformation

from lightning_l2l import EvolutionStrategies, LearnedOptimizer, Unroll
from lightning_l2l.exact.episodes import Episode


class InfluenceBalancing(LearnedOptimizer):
    """``s <- A s + theta v`` with more negative than positive entries in v, measured by ``(s_1 - 1)**2 / 2``.

    The short-term effect of theta on s_1 has the opposite sign of its long-term effect, so every truncation goes
    the wrong way. The optimum is -1/6. The "update rule" of this problem ignores its gradients.
    """

    def __init__(self, size: int = 23, positive: int = 10) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        half = torch.full((size,), 0.5, dtype=torch.float64)
        self.matrix = torch.diag(half) + torch.diag(half[1:], 1)
        self.signs = torch.cat([torch.ones(positive), -torch.ones(size - positive)]).double()

    def start(self) -> dict[str, torch.Tensor]:
        return {"s": torch.ones_like(self.signs)}

    def transformation(self) -> GradientTransformation:
        def update(updates, state, *, params=None, inplace=True):
            return {"s": self.matrix @ params["s"] + self.theta * self.signs - params["s"]}, state

        return GradientTransformation(lambda params: (), update)

    @staticmethod
    def loss(params, batch) -> torch.Tensor:
        return 0.5 * (params["s"][0] - 1).square()

    def final_loss(self) -> float:
        """The loss after 500 steps from the start."""
        s = self.start()["s"]
        for _ in range(500):
            s = self.matrix @ s + self.theta.detach() * self.signs
        return self.loss({"s": s}, None).item()


class ToyRegression(LearnedOptimizer):
    """Gradient descent on a wiggly function of two numbers; the rate goes linearly from e**theta_0 to e**theta_1."""

    steps = 100

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full((2,), -4.0, dtype=torch.float64))

    def start(self) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2, dtype=torch.float64)}

    def transformation(self) -> GradientTransformation:
        def update(updates, state, *, params=None, inplace=True):
            first, last = self.theta.exp().unbind()
            rate = first + (last - first) * (state["taken"] / self.steps)
            return {"x": -rate * updates["x"]}, {"taken": state["taken"] + 1}

        return GradientTransformation(lambda params: {"taken": 0}, update)

    @staticmethod
    def loss(params, batch) -> torch.Tensor:
        a, b = params["x"].unbind()
        square = a * a
        wave = b.sin()
        return (square + 5).sqrt() - math.sqrt(5) + wave * wave * (-5 * square).exp() + 0.25 * (b - 100).abs()

    def total_loss(self, theta: torch.Tensor | None = None) -> float:
        """Sum of the losses after each of the 100 steps."""
        first, last = (self.theta.detach() if theta is None else theta).exp().tolist()
        a, b, total = 1.0, 1.0, 0.0
        for taken in range(self.steps):
            rate = first + (last - first) * taken / self.steps
            bump, wave = math.exp(-5 * a * a), math.sin(b)
            a, b = (
                a - rate * (a / math.sqrt(a * a + 5) - 10 * a * wave * wave * bump),
                b - rate * (2 * wave * math.cos(b) * bump + math.copysign(0.25, b - 100)),
            )
            total += math.sqrt(a * a + 5) - math.sqrt(5) + math.sin(b) ** 2 * math.exp(-5 * a * a)
            total += 0.25 * abs(b - 100)
        return total


@dataclass(frozen=True)
class MetaTrainingRun:
    """Meta-training of one of the problems, one-batch unrolls of deterministic losses.

    Attributes:
        estimator: How the meta-gradients of the unrolls are computed; of several episodes, the seeds differ.
        unroll_steps: Steps per unroll.
        unrolls: Unrolls per episode; ``None`` never starts again.
        iterations: Meta-updates.
        factor: What the meta-gradient is multiplied by (the number of losses in a mean, to have their sum).
        annealing: Over the second half, the perturbations shrink to this fraction, and the meta-learning-rate falls to
            a twentieth; 1 for neither.
    """

    estimator: Unroll | EvolutionStrategies
    unroll_steps: int
    unrolls: int | None
    iterations: int
    factor: float = 1.0
    annealing: float = 1.0

    def train(
        self,
        problem: InfluenceBalancing | ToyRegression,
        optimizer: torch.optim.Optimizer,
        each: Callable[[int], None] | None = None,
    ) -> None:
        """Train the problem's theta in place; ``each`` is called after each iteration with its number."""
        first_rate = optimizer.param_groups[0]["lr"]
        episode = None
        for iteration in range(self.iterations):
            if episode is None or episode.unrolls == self.unrolls:
                late = max(0.0, 2 * iteration / self.iterations - 1) if self.annealing != 1 else 0.0
                estimator = self.estimator
                if isinstance(estimator, EvolutionStrategies):
                    width = estimator.standard_deviation * self.annealing**late
                    estimator = replace(estimator, seed=iteration, standard_deviation=width)
                optimizer.param_groups[0]["lr"] = first_rate * (1 - 0.95 * late)
                episode = Episode.begin(problem, problem.start(), estimator=estimator)
            result, episode = episode.unroll(problem.loss, problem, [None] * self.unroll_steps, None)
            assert result.usable, result.explain()
            problem.theta.grad = result.gradients["theta"] * self.factor
            optimizer.step()
            if each is not None:
                each(iteration)
