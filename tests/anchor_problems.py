"""The problems on which estimators over windows are compared, as losses and learned optimizers.

``InfluenceBalancing`` and ``ToyRegression`` are those of Vicol, Metz, Sohl-Dickstein 2021 (the first goes back to
Tallec and Ollivier 2017, arXiv 1702.05043), ``DigitsSchedule`` is their MNIST experiment on scikit-learn's digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torchopt.base import GradientTransformation

from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.windows import WindowEstimator
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned import LearnedOptimizer


class InfluenceBalancing(LearnedOptimizer):
    """``s <- A s + theta v`` with more negative than positive entries in v, judged by ``(s_1 - 1)**2 / 2``.

    The short-term effect of theta on s_1 has the opposite sign of its long-term effect, so every truncation goes
    the wrong way. The optimum is -1/6. The "update rule" of this problem ignores its gradients.
    """

    def __init__(self, size: int = 23, positive: int = 10) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        half = torch.full((size,), 0.5, dtype=torch.float64)
        self.matrix = torch.diag(half) + torch.diag(half[1:], 1)
        self.signs = torch.cat([torch.ones(positive), -torch.ones(size - positive)]).double()

    def start(self, seed: int = 0) -> dict[str, torch.Tensor]:
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

    def start(self, seed: int = 0) -> dict[str, torch.Tensor]:
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


class DigitsSchedule(LearnedOptimizer):
    """SGD with momentum 0.9 on a 64-32-10 network; the rate is ``e**theta_0 / (1 + t / 500)**(e**theta_1)``."""

    steps = 500

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([-6.0, 1.0], dtype=torch.float64))
        self._inner = inner_optimizer(torch.optim.SGD, lr=1.0, momentum=0.9)

    def start(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"first.weight": (32, 64), "first.bias": (32,), "last.weight": (10, 32), "last.bias": (10,)}
        width = {"first": 1 / math.sqrt(64), "last": 1 / math.sqrt(32)}
        return {
            name: (torch.rand(shape, generator=generator) * 2 - 1) * width[name.split(".")[0]]
            for name, shape in shapes.items()
        }

    def transformation(self) -> GradientTransformation:
        def init(params):
            return {"taken": 0, "inner": self._inner.transformation().init(params)}

        def update(updates, state, *, params=None, inplace=True):
            rate = (self.theta[0] - self.theta[1].exp() * math.log1p(state["taken"] / self.steps)).exp()
            moved = self._inner.transformation([{"lr": rate}])
            deltas, inner = moved.update(updates, state["inner"], params=params, inplace=False)
            return deltas, {"taken": state["taken"] + 1, "inner": inner}

        return GradientTransformation(init, update)

    def project_(self) -> None:
        with torch.no_grad():
            self.theta[1].clamp_(max=4.0)

    @staticmethod
    def loss(params, batch) -> torch.Tensor:
        inputs, labels = batch
        hidden = F.linear(inputs, params["first.weight"], params["first.bias"]).relu()
        return F.cross_entropy(F.linear(hidden, params["last.weight"], params["last.bias"]), labels)


def digits_batches(seed: int, count: int, size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random batches of the first 1200 digits."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(inputs[:1200] / 16, dtype=torch.float32), torch.tensor(labels[:1200])
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(1200, (size,), generator=generator) for _ in range(count)]
    return [(inputs[pick], labels[pick]) for pick in picks]


@dataclass(frozen=True)
class MetaTrainingRun:
    """Meta-training of one of the problems.

    Attributes:
        estimator: Name of the estimator over windows.
        particles: Its particles.
        unroll_steps: Steps per window.
        windows: Windows per episode; ``None`` never starts again.
        iterations: Meta-updates.
        factor: What the meta-gradient is multiplied by (the number of losses in a mean, to have their sum).
        annealing: Over the second half, the perturbations shrink to this fraction, and the meta-learning-rate falls to
            a twentieth; 1 for neither.
    """

    estimator: str
    particles: Particles
    unroll_steps: int
    windows: int | None
    iterations: int
    factor: float = 1.0
    annealing: float = 1.0

    def train(
        self,
        problem,
        optimizer: torch.optim.Optimizer,
        objective: str,
        batches: Callable[[int, int], list] | None = None,
        each: Callable[[int], None] | None = None,
    ) -> None:
        """Train the problem's theta in place.

        Args:
            problem: One of the problems above.
            optimizer: The meta-optimizer.
            objective: The meta-objective of a window.
            batches: ``batches(episode, window)`` gives those of a window and a last one for the meta-objective.
            each: Called after each iteration with its number.
        """
        window = self.windows
        episode_number = -1
        first_rate = optimizer.param_groups[0]["lr"]
        for iteration in range(self.iterations):
            if iteration == 0 or window == self.windows:
                window, episode_number = 0, episode_number + 1
                seed = self.particles.seed * 100_003 + episode_number
                late = max(0.0, 2 * iteration / self.iterations - 1) if self.annealing != 1 else 0.0
                width = self.particles.standard_deviation * self.annealing**late
                particles = replace(self.particles, seed=seed, standard_deviation=width)
                estimator = WindowEstimator(self.estimator, particles)
                optimizer.param_groups[0]["lr"] = first_rate * (1 - 0.95 * late)
                episode = estimator.begin(problem, problem.start(seed))
            given = [None] * (self.unroll_steps + 1) if batches is None else batches(seed, window)
            result, episode = estimator.meta_gradient(
                problem.loss, problem, episode, given[:-1], given[-1], objective=objective
            )
            problem.theta.grad = result.gradients["theta"] * self.factor
            if not result.usable:
                return
            optimizer.step()
            problem.project_()
            window += 1
            if each is not None:
                each(iteration)
