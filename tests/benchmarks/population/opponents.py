"""Other methods that choose a learning rate, in lockstep over runs like the rules: every tensor has a row for each run.

Each takes over the optimizer step of its runs. They see the same batches, their weights enter the same average, and
that average is chosen by held-out loss at the same times. Constants are the defaults of the papers or packages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from rule import LeaveAlone
from torch import Tensor

ALL, ADAM = ("sgd", "adam", "adamw", "muon"), ("adam", "adamw")


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Of each pair of rows, as a column."""
    return (x * y).sum(1, keepdim=True)


class Step(NamedTuple):
    """What is known when the weights are to move."""

    weights: Tensor
    gradient: Tensor
    loss: Tensor
    direction: Tensor  # of the optimizer itself
    base: Tensor  # the rate of the start
    share: Tensor  # of it, by its schedule


class Opponent(LeaveAlone):
    """The optimizer at the rate of the start, and what every opponent has."""

    optimizers: tuple[str, ...] = ALL  # for which the method is defined

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        """Start from ``weights``; ``decay`` is decoupled, ``bounded`` says that zero bounds the loss from below."""
        self.optimizer, self.bounded = optimizer, bounded
        self.decay = decay if optimizer == "adamw" else 0.0
        # SGD with momentum 0.9 adds up ten gradients, where methods that average them make one step.
        self.gain = 10.0 if optimizer == "sgd" else 1.0
        self.initial, self.age = weights.clone(), 0

    def step(self, now: Step) -> Tensor:
        """What to subtract from the weights."""
        raise NotImplementedError

    def returned(self, weights: Tensor) -> Tensor:
        """The weights that the method evaluates and returns."""
        return weights


class Linear(Opponent):
    """From the rate of the start in a line to zero, instead of its schedule."""

    def step(self, now: Step) -> Tensor:
        self.age += 1
        return (1 - (self.age - 1) / self.steps) * now.base[:, None] * now.direction


class Finder(Opponent):
    """A range test on a tenth of the steps (20 to 100), which count; then anew at a tenth of the best rate it met.

    Settings of Lightning and fastai: from 1e-8 to 1 in equal factors, smoothed losses (in proportion to the number of
    steps), stopped at four times the lowest of them; a tenth of the rate of the lowest loss.
    """

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.count = min(100, max(20, int(self.steps) // 10))
        self.tried = 10 ** torch.linspace(-8, 0, self.count)
        self.testing = torch.ones(len(weights), dtype=torch.bool)
        self.found = torch.full((len(weights),), self.tried[0].item())
        self.losses: list[Tensor] = []

    def see(self, t: int, loss: Tensor, cosine: Tensor | None, moved: Tensor | None) -> None:
        keep, t = 1 - 2 / self.count, t - 1
        self.ends = torch.zeros_like(self.testing)
        if not self.testing.any():
            return
        if t == 0:
            self.sum, self.lowest = torch.zeros_like(loss), torch.full_like(loss, math.inf)
        self.sum = keep * self.sum + (1 - keep) * loss
        smooth = self.sum / (1 - keep ** (t + 1))
        self.lowest = torch.minimum(self.lowest, smooth)
        self.ends = self.testing & (~(smooth <= 4 * self.lowest.abs()) | (t == self.count)) & (t > 2)
        if self.ends.any():
            skip = min(10, self.count // 10, t // 2)  # what comes first says nothing yet
            losses = torch.stack(self.losses)[skip:].nan_to_num(math.inf, math.inf)
            self.found = torch.where(self.ends, 0.1 * self.tried[skip + losses.argmin(0)], self.found)
        self.losses.append(smooth)
        self.testing = self.testing & ~self.ends

    def decide(self, t: int, worse: Tensor | None) -> Tensor:
        return self.ends

    def step(self, now: Step) -> Tensor:
        tried = self.tried[min(self.age, self.count - 1)]
        self.age += 1
        return torch.where(self.testing, tried, self.found * now.share)[:, None] * now.direction


class Hypergradient(Opponent):
    """Multiplicative hypergradient descent (arXiv 1703.04782): the cosine of gradient and last step moves the rate."""

    strength = 0.02

    def step(self, now: Step) -> Tensor:
        if self.age:
            cosine = inner(now.gradient, self.last) / (now.gradient.norm(dim=1) * self.last.norm(dim=1))[:, None]
            self.log_rate = self.log_rate + torch.log1p(self.strength * cosine.nan_to_num(0.0))
        else:
            self.log_rate = now.base.log()[:, None]
        self.age, self.last = self.age + 1, now.direction
        return now.share[:, None] * self.log_rate.exp() * now.direction


class MetaOptimize(Opponent):
    """MetaOptimize (arXiv 2402.02342), AdamW with one rate, moved by Lion without Hessians."""

    optimizers = ADAM
    speed, memory = 1e-3, 0.9999

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.trace, self.second = torch.zeros_like(weights), torch.zeros_like(weights)
        self.momentum = torch.zeros(len(weights), 1)

    def step(self, now: Step) -> Tensor:
        if self.age == 0:
            self.log_rate = now.base.log()[:, None]
        self.age += 1
        rate = now.share[:, None] * self.log_rate.exp()
        self.second.mul_(0.999).addcmul_(now.gradient, now.gradient, value=0.001)
        scaled = now.gradient / ((self.second / (1 - 0.999**self.age)).sqrt() + 1e-8)
        found = inner(self.trace, now.gradient)
        self.trace = self.memory * (1 - rate * self.decay) * self.trace + rate * scaled
        self.momentum = 0.99 * self.momentum + 0.01 * found
        self.log_rate = self.log_rate + self.speed * (0.9 * self.momentum + 0.1 * found).sign()
        return rate * now.direction


class ScheduleFree(Opponent):
    """Schedule-free SGD and AdamW (arXiv 2405.15682), without warm-up; returned is their average."""

    optimizers = ("sgd", *ADAM)
    blend = 0.9

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.base_point, self.second = weights.clone(), torch.zeros_like(weights)
        self.largest, self.total = torch.zeros(2, len(weights), 1)

    def step(self, now: Step) -> Tensor:
        self.age += 1
        rate = self.gain * (now.base * now.share)[:, None]
        self.largest = torch.maximum(self.largest, rate)
        weight = self.largest.square()
        self.total = self.total + weight
        new = weight / self.total
        gradient = now.gradient
        if self.optimizer != "sgd":
            self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            gradient = gradient / ((self.second / (1 - 0.999**self.age)).sqrt() + 1e-8) + self.decay * now.weights
        step = new * (now.weights - self.base_point) + rate * (1 - self.blend * (1 - new)) * gradient
        self.base_point = self.base_point - rate * gradient
        return step

    def returned(self, weights: Tensor) -> Tensor:
        return torch.lerp(weights, self.base_point, 1 - 1 / self.blend)


class Prodigy(Opponent):
    """Prodigy (arXiv 2306.06101), Adam's form; the rate of the start plays no part."""

    optimizers = ADAM
    first = 1e-6  # estimate of the distance

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.momentum, self.second, self.sum = torch.zeros(3, *weights.shape)
        self.numerator, self.most = torch.zeros(len(weights), 1), torch.full((len(weights), 1), self.first)
        self.distance = self.most.clone()

    def step(self, now: Step) -> Tensor:
        distance, memory = self.distance, math.sqrt(0.999)
        rate = distance * now.share[:, None]
        relative = distance / self.first * rate
        self.numerator = memory * self.numerator + relative * inner(now.gradient, self.initial - now.weights)
        self.momentum = 0.9 * self.momentum + 0.1 * distance * now.gradient
        self.second = 0.999 * self.second + 0.001 * (distance * now.gradient).square()
        self.sum = memory * self.sum + relative * now.gradient
        estimate = self.numerator / self.sum.abs().sum(1, keepdim=True)
        start = torch.where(distance == self.first, torch.maximum(distance, estimate), distance)
        self.most = torch.maximum(self.most, estimate)
        self.distance = torch.maximum(start, self.most)
        return rate * (self.decay * now.weights + self.momentum / (self.second.sqrt() + self.distance * 1e-8))


class DAdaptation(Opponent):
    """D-Adaptation (arXiv 2301.07733), Adam's form; the rate of the start plays no part."""

    optimizers = ADAM
    first = 1e-6

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.momentum, self.second, self.sum = torch.zeros(3, *weights.shape)
        self.numerator, self.distance = torch.zeros(len(weights), 1), torch.full((len(weights), 1), self.first)

    def step(self, now: Step) -> Tensor:
        memory, rate = math.sqrt(0.999), self.distance * now.share[:, None]
        found = rate * inner(now.gradient, self.sum / (self.second.sqrt() + 1e-8))
        self.momentum = 0.9 * self.momentum + 0.1 * rate * now.gradient
        self.second = 0.999 * self.second + 0.001 * now.gradient.square()
        self.sum = memory * self.sum + (1 - memory) * rate * now.gradient
        self.numerator = memory * self.numerator + (1 - memory) * found
        estimate = self.numerator / ((1 - memory) * self.sum.abs().sum(1, keepdim=True))
        self.distance = torch.maximum(self.distance, estimate)
        return rate * self.decay * now.weights + self.momentum / (self.second.sqrt() + 1e-8)


class MoMo(Opponent):
    """MoMo and MoMo-Adam (arXiv 2305.07583): Polyak's step for the average of the loss's models caps the rate.

    The bound of the loss is zero; where losses cross zero it is estimated (the papers' MoMo*, from -10).
    """

    optimizers = ("sgd", *ADAM)

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.momentum, self.second = torch.zeros(2, *weights.shape)
        self.loss, self.products = torch.zeros(2, len(weights), 1)
        self.least = 0.0 if bounded else -10.0
        self.bound = torch.full((len(weights), 1), self.least)

    def step(self, now: Step) -> Tensor:
        self.age += 1
        loss, product = now.loss[:, None], inner(now.weights, now.gradient)
        corrected, scale = 1 - 0.9**self.age, torch.ones(())
        if self.optimizer == "sgd":
            corrected = 1.0
            if self.age == 1:
                self.loss, self.momentum, self.products = loss, now.gradient, product
        else:
            self.second = 0.999 * self.second + 0.001 * now.gradient.square()
            scale = (self.second / (1 - 0.999**self.age)).sqrt() + 1e-8
        self.loss = 0.9 * self.loss + 0.1 * loss
        self.momentum = 0.9 * self.momentum + 0.1 * now.gradient
        self.products = 0.9 * self.products + 0.1 * product
        rate = self.gain * (now.base * now.share)[:, None]
        shrink = 1 + rate * self.decay
        size, along = inner(self.momentum, self.momentum / scale), inner(now.weights, self.momentum)
        model = shrink * self.loss + along - shrink * self.products
        if not self.bounded:
            low = (model / (2 * shrink * corrected)).clamp(min=self.least)
            self.bound = torch.where(model < shrink * corrected * self.bound, low, self.bound)
        polyak = (model - shrink * corrected * self.bound).clamp(min=0) / size
        applied = torch.minimum(rate / corrected, polyak)
        if not self.bounded:
            lowest = (self.loss + along - self.products - 0.5 * applied * size) / corrected
            self.bound = lowest.clamp(min=self.least)
        return now.weights - (now.weights - applied * self.momentum / scale) / shrink


class ScheduleFreeDefault(ScheduleFree):
    """The same at its package's default rates, whatever the rate of the start."""

    def prepare(self, optimizer: str, weights: Tensor, decay: float, bounded: bool) -> None:
        super().prepare(optimizer, weights, decay, bounded)
        self.rate, self.gain = (1.0 if optimizer == "sgd" else 0.0025), 1.0

    def step(self, now: Step) -> Tensor:
        return super().step(now._replace(base=torch.full_like(now.base, self.rate)))


class Greedy(LeaveAlone):
    """GreedyLR: ten improvements of the smoothed training loss raise the rate by a twentieth, ten failures lower it."""

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        super().begin(runs, steps, scheduled, per_pass)
        self.good, self.bad = torch.zeros(2, runs)
        self.best = torch.full((runs,), math.inf)

    def see(self, t: int, loss: Tensor, cosine: Tensor | None, moved: Tensor | None) -> None:
        self.smooth = loss if t == 1 else self.smooth + 0.04 * (loss - self.smooth)
        better = self.smooth < self.best
        self.best = torch.where(better, self.smooth, self.best)
        self.good, self.bad = torch.where(better, self.good + 1, 0.0), torch.where(better, 0.0, self.bad + 1)
        up, down = self.good > 10, self.bad > 10
        self.log = self.log - math.log(0.95) * (up.float() - down.float())
        self.good, self.bad = torch.where(up, 0.0, self.good), torch.where(down, 0.0, self.bad)


OPPONENTS: dict[str, type[LeaveAlone]] = {
    "linear": Linear,
    "finder": Finder,
    "hypergradient": Hypergradient,
    "metaoptimize": MetaOptimize,
    "schedule-free": ScheduleFree,
    "schedule-free-default": ScheduleFreeDefault,
    "prodigy": Prodigy,
    "d-adaptation": DAdaptation,
    "momo": MoMo,
    "greedy": Greedy,
}
