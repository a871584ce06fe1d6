"""The rule that moves a learning rate while it trains, and the rules it is compared with.

All of them are functions of numbers, for many runs at once (every tensor has one entry for each run); nothing here
knows a parameter. ``see`` is called before every optimizer step, ``update`` at the steps of ``times``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Optional = Tensor | None


class LeaveAlone:
    """The user's rate as it is, and what every rule has."""

    needs_held_out = False
    point = 1.0  # where the held-out gradient is taken: 0 at the weights, 1 at their average
    rescale = False  # whether the average is moved as if its displacement had been made with the new rate

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        self.factor = torch.ones(runs)
        self.steps, self.scheduled, self.passes = steps, scheduled, passes

    def times(self) -> set[int]:
        return set()

    def weight(self, t: int, stride: int) -> float:
        """Of the new weights in the average, ``stride`` steps after the last: mean age an eighth of the steps."""
        return min(1.0, 9 * stride / (t + 9))

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional, share: Tensor) -> Optional:
        """Which runs are lost and must return to the snapshot."""
        return None

    def update(self, t: int, held_cosine: Tensor | None) -> Tensor | None:
        """Which runs' present weights and optimizer state become the snapshot."""
        return None


@dataclass
class Rule(LeaveAlone):
    """Rise while the training gradients are unanimous, fall below the user's rate only if that diverges, then decay.

    The evidence is the cosine between the gradient that the optimizer is about to use and the displacement of the
    weights from their average (weight 9/(t+9)), its mean and standard error over the steps since the last update.
    Far below the best constant rate it is -0.2 to -0.6, at the best constant rate it is about zero, whatever the task,
    the optimizer and the length; above, noise makes it positive. Updates come at geometric times and moves are in
    proportion to the logarithm of time, so that no length is built in. No held-out data are needed.
    """

    speed: float = 2.0  # of the logarithm of the rate in that of time, where the evidence is full
    full: float = 0.2  # cosine beyond the margin at which the rise is fastest
    margin: float = 0.05  # a cosine that is no reason to rise
    early: float = 0.3  # the same, in addition, at the start; it falls to nothing until that is over
    start: float = 0.2  # this part of the planned steps
    ratio: float = 1.2  # of the times of two updates
    first: float = 10.0
    still: float = 0.3  # a rate that would move the weights by less of their norm in the whole training is absurdly low
    trial: float = 50.0  # this part of the planned steps shows what a rate is worth, once the user's has diverged
    worth: float = 0.05  # of the first loss: by so much a lower rate must do better
    tail: float = 0.85  # share of the planned steps after which the rate may decay to zero
    keep: float = -0.02  # a cosine below which progress goes on and the rate does not decay
    most: float = 3.0  # passes over the data, after which training gradients are no held-out gradients any more

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        super().begin(runs, steps, scheduled, passes)
        self.log = torch.zeros(runs)  # of the factor, without the decay
        self.floor, self.ceiling = torch.zeros(runs), torch.full((runs,), math.inf)
        self.count, self.sum, self.squares = torch.zeros(3, runs)
        self.initial, self.smooth, self.age, self.trouble, self.peak = torch.zeros(5, runs)
        self.lowest = torch.full((runs,), math.inf)
        self.decay = torch.full((runs,), math.inf)  # the step from which the rate decays
        self.searching, self.returned = torch.zeros(2, runs, dtype=torch.bool)
        self.result, self.chosen = torch.full((runs,), math.inf), torch.zeros(runs)

    def times(self) -> set[int]:
        last = self.steps if math.isfinite(self.steps) else 1e6
        count = math.ceil(math.log(max(1.0, last / self.first)) / math.log(self.ratio))
        return {round(self.first * self.ratio**k) for k in range(count)} | {math.ceil(self.tail * last)}

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional, share: Tensor) -> Tensor:
        if t == 0:
            self.initial = loss.clone()
        self.rising = share > self.share if t else torch.zeros_like(share, dtype=torch.bool)
        self.share, self.peak = share, torch.maximum(self.peak, share)
        self.smooth = torch.where(self.age == 0, loss, self.smooth + 0.2 * (loss - self.smooth))
        # Lost: not finite, far above the first loss, or twice the first loss for a twentieth of the steps.
        excess = (self.smooth - self.initial) / self.initial.abs()
        self.trouble = torch.where(excess > 1, self.trouble + 1, 0.0)
        lost = ~(excess <= 30) | (self.trouble > max(10.0, self.steps / 20 if math.isfinite(self.steps) else 100.0))
        # Where it was the user's rate that failed, and the loss was never below the first, that rate is no floor, and
        # one is searched: the same steps from the snapshot with a third of the rate, as long as that does better.
        own = lost & (self.log <= 0)
        self.searching |= own & self.lowest.isinf()
        self.ceiling = torch.where(lost, self.log - math.log(2), self.ceiling)
        lower = self.log - torch.where(self.age < 6, math.log(10), math.log(3))
        self.log = torch.where(lost, torch.where(own, lower, lower.clamp(min=0)), self.log)
        lowest = torch.where(self.searching, -math.inf, torch.minimum(self.floor, self.log))
        self.floor = torch.where(lost, lowest, self.floor)
        length = max(10, math.ceil(self.steps / self.trial)) if math.isfinite(self.steps) else 20
        tried = self.searching & ~lost & (self.age >= length)
        better = tried & (self.smooth < self.result - self.worth * self.initial.abs())
        self.returned |= lost
        self.result = torch.where(better, self.smooth, self.result)
        self.chosen = torch.where(better, self.log, self.chosen)
        self.log = torch.where(better, self.log - math.log(3), torch.where(tried, self.chosen, self.log))
        self.searching &= ~tried | better
        lost = lost | better
        for state in (self.count, self.sum, self.squares, self.trouble):
            state[lost] = 0.0
        if cosine is not None and moved is not None:
            ok = (self.age > 0) & cosine.isfinite() & ~lost
            cosine = torch.where(ok, cosine, 0.0)
            self.count, self.sum = self.count + ok, self.sum + cosine
            self.squares = self.squares + cosine.square()
            # Absurdly low: to the end, the weights would hardly move, and all gradients say further.
            steps = self.steps if math.isfinite(self.steps) else 1000
            per_step = moved / (self.age + 1).clamp(max=(t + 9) / 9)
            absurd = (per_step * steps < self.still) & (self.age > 2) & ~self.scheduled & ~self.returned
            absurd &= self.sum < torch.where(moved < 1e-5, 0.0, -0.1) * self.count
            if t < self.start * steps:
                step = torch.where(moved < 1e-5, math.log(10), math.log(2))
                self.log = torch.where(absurd, self.log + step, self.log)
        self.age = torch.where(lost, 0.0, self.age + 1)
        left = torch.where(self.decay.isinf(), 1.0, (self.steps - t) / (self.steps - self.decay))
        self.factor = self.log.exp() * left
        return lost

    def update(self, t: int, held_cosine: Tensor | None) -> Tensor:
        n = self.count.clamp(min=1)
        mean = self.sum / n
        error = torch.where(n < 3, 1.0, ((self.squares / n - mean.square()).clamp(min=0) / n).sqrt())
        mean = self.evidence(t, mean, held_cosine)
        margin = self.margin + self.early * max(0.0, 1 - t / (self.start * self.steps))
        rise = ((-mean - error - margin) / self.full).clamp(0, 1) * self.may_rise(t)
        if t * self.passes > self.most * self.steps:  # a schedule is a plan for so many passes
            rise = torch.where(self.scheduled, 0.0, rise)
        fall = ((mean - error) / self.full).clamp(0, 1)  # back towards the user's rate, not below
        log = self.log + self.speed * math.log(self.ratio) * (rise - fall)
        log = torch.maximum(torch.minimum(log, self.ceiling), torch.minimum(self.floor, self.log))
        # A warm-up is a plan; a schedule that comes down makes the gradients unanimous again, no reason to undo it.
        free = (self.share >= 0.9 * self.peak) & ~self.rising & self.decay.isinf() & ~self.searching
        self.log = torch.where(free, log, self.log)
        better = (self.smooth < torch.minimum(self.lowest, self.initial)) & (self.age > 8) & ~self.searching
        self.lowest = torch.where(better, self.smooth, self.lowest)
        if t >= self.tail * self.steps:
            begins = self.decay.isinf() & (mean > self.keep) & ~self.scheduled
            self.decay = torch.where(begins, float(t), self.decay)
        self.count, self.sum, self.squares = torch.zeros(3, len(mean))
        return better

    def evidence(self, t: int, mean: Tensor, held_cosine: Tensor | None) -> Tensor:
        return mean

    def may_rise(self, t: int) -> float:
        return 1.0


@dataclass
class HeldOut(Rule):
    """From the second pass over the data on, a held-out batch's cosine counts where it is larger."""

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        super().begin(runs, steps, scheduled, passes)
        self.needs_held_out, self.point = True, 0.0
        self.held = torch.zeros(runs)

    def evidence(self, t: int, mean: Tensor, held_cosine: Tensor | None) -> Tensor:
        if held_cosine is None or t * self.passes < self.steps:
            return mean
        self.held = self.held + 0.4 * (held_cosine.nan_to_num(0.0) - self.held)
        return torch.maximum(mean, self.held)


@dataclass
class FewPasses(Rule):
    """Training gradients alone: no rise after some passes."""

    def may_rise(self, t: int) -> float:
        return float(t * self.passes <= self.most * self.steps)


class Old(LeaveAlone):
    """The default before: held-out gradients, memory of 100 steps, an update every 20, without search and guard."""

    needs_held_out, rescale = True, True

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        super().begin(runs, steps, scheduled, passes)
        self.mean, self.square, self.log, self.moved = torch.zeros(4, runs)
        self.updates = 0

    def times(self) -> set[int]:
        interval = 20 if self.steps >= 40 else max(1, int(self.steps) // 4)
        times, t = [], interval
        while t < self.steps:
            times.append(t)
            t += max(1, round(0.03 * t / interval)) * interval
        return set(times)

    def weight(self, t: int, stride: int) -> float:
        return min(1.0, max(stride / (t + 1), 1 - 0.99**stride))

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional, share: Tensor) -> None:
        self.point = 0.4 * max(0.0, min(1.0, 2 * (1 - t / self.steps))) * max(0.0, 1 - self.passes / 20)

    def update(self, t: int, held_cosine: Tensor | None) -> None:
        self.updates += 1
        held_cosine = held_cosine.nan_to_num(0.0)
        self.square.lerp_(held_cosine.square(), 0.5)
        scale = (self.square / (1 - 0.5**self.updates)).sqrt()
        self.mean.lerp_(torch.where(scale > 0, held_cosine / scale, 0.0), 0.2)
        step = -0.4 * self.mean / (1 - 0.8**self.updates)
        self.moved = torch.where(step > 0, 0.25 * step, step)
        self.log = self.log + self.moved
        self.factor = self.log.exp()


@dataclass
class UnknownLength(Rule):
    """The same where the planned length is not known: the early margin stays, nothing decays."""

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        super().begin(runs, math.inf, scheduled, passes)


class Greedy(LeaveAlone):
    """GreedyLR: ten improvements of the smoothed training loss raise the rate by a twentieth, ten failures lower it."""

    def begin(self, runs: int, steps: float, scheduled: Tensor, passes: float) -> None:
        super().begin(runs, steps, scheduled, passes)
        self.good, self.bad = torch.zeros(2, runs)
        self.best = torch.full((runs,), math.inf)

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional, share: Tensor) -> None:
        self.smooth = loss if t == 0 else self.smooth + 0.04 * (loss - self.smooth)
        better = self.smooth < self.best
        self.best = torch.where(better, self.smooth, self.best)
        self.good, self.bad = torch.where(better, self.good + 1, 0.0), torch.where(better, 0.0, self.bad + 1)
        up, down = self.good > 10, self.bad > 10
        self.factor = self.factor * torch.where(up, 1 / 0.95, torch.where(down, 0.95, 1.0))
        self.good, self.bad = torch.where(up, 0.0, self.good), torch.where(down, 0.0, self.bad)


RULES = {
    "held": HeldOut,  # the default, with held-out data
    "few": FewPasses,  # the default, without
    "rule": Rule,
    "rule-unknown-length": UnknownLength,
    "greedy": Greedy,
    "none": LeaveAlone,
    "old": Old,
}
