"""The package's rule of the learning rate, for many runs at once, and what every rule and opponent has.

All are functions of numbers (every tensor has one entry for each run); nothing here knows a parameter. After each
optimizer step the engine calls ``see`` with what the step was made with, ``decide`` on the runs that are to go back,
and, at the steps of ``times``, ``update``; then it asks for the factor of the next step. Steps are counted as in
``lightning_l2l.displacement`` and ``lightning_l2l.guard``, of which these are the formulas: ``t`` is their number so
far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Optional = Tensor | None


class LeaveAlone:
    """The user's rate as it is, and what every rule has."""

    watches = False  # the cosine of gradient and displacement
    needs_held_out = False
    unroll = 0  # steps to differentiate at each update

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        """Training of so many steps; ``scheduled`` are the runs with a schedule, ``per_pass`` steps are an epoch."""
        self.log = torch.zeros(runs)  # of the factor, without a decay
        self.steps, self.scheduled, self.per_pass = steps, scheduled, per_pass

    def times(self) -> set[int]:
        return set()

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional) -> Optional:
        """Which runs may be lost: they are compared with their snapshot on the last batch.

        ``cosine`` is that of gradient and displacement before the step, ``moved`` the length of the displacement over
        that of the weights; both only at sampled steps.
        """
        return None

    def decide(self, t: int, worse: Optional) -> Optional:
        """Which runs go back to the snapshot; ``worse`` are the suspected ones that do worse than it."""
        return None

    def update(
        self, t: int, share: Tensor, held_cosine: Optional, derivative: Optional, diverged: Optional
    ) -> Optional:
        """Which runs' present weights become the snapshot.

        ``share`` is that of the base rate by its schedule; of an unroll, the derivative of the meta-objective in the
        log of the rate (NaN where it cannot be used), and whether the unrolled training diverged.
        """
        return None

    def see_held_out(self, t: int, loss: Tensor) -> None:
        """The losses of the held-out batch, after an update."""

    def factor(self, t: int) -> Tensor:
        """What the base rates of the next step are multiplied by."""
        return self.log.exp()


@dataclass
class Rule(LeaveAlone):
    """Rise while the gradients are unanimous, fall below the user's rate only if that diverges, then decay.

    ``lightning_l2l.displacement.Rule`` and ``lightning_l2l.guard.LossWatch``, whose words explain these formulas. Its
    evidence are training gradients, however many passes.
    """

    speed: float = 2.0
    full: float = 0.2
    margin: float = 0.05
    early: float = 0.3
    start: float = 0.2
    ratio: float = 1.2
    first_update: float = 10.0
    still: float = 0.3
    nowhere: float = 1e-5
    unanimous: float = -0.1
    ramp: float = 2.0
    ramp_from_nowhere: float = 10.0
    careless: float = 0.003
    bold: float = 1.0
    nearly: float = 0.7
    clearly: float = -0.2
    trial: float = 0.02
    worth: float = 0.05
    tail: float = 0.85
    progress: float = -0.02
    few_passes: float = 3.0
    decays: bool = True
    most_rollbacks: int = 10

    watches = True

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        super().begin(runs, steps, scheduled, per_pass)
        self.length = steps if math.isfinite(steps) else 1000.0
        self.patience = max(10.0, steps / 20 if math.isfinite(steps) else 100.0)
        self.decay_at = math.ceil(self.tail * steps) if self.decays and math.isfinite(steps) else math.inf
        self.floor, self.ceiling = torch.zeros(runs), torch.full((runs,), math.inf)
        self.count, self.sum, self.squares = torch.zeros(3, runs)
        self.decay = torch.full((runs,), math.inf)  # the step from which the rate decays
        self.peak = self.share = torch.ones(runs)
        self.ramps = ~scheduled
        self.judged, self.chosen_by_user, self.has_moved = torch.zeros(3, runs, dtype=torch.bool)
        self.agreed, self.agreements, self.agree, self.since, self.raised_at = torch.zeros(5, runs)
        self.raised_by = torch.ones(runs)
        # The losses.
        self.first, self.lowest = torch.full((runs,), math.nan), torch.full((runs,), math.inf)
        self.mean, self.seen, self.high, self.returns, self.rollbacks = torch.zeros(5, runs)
        self.tolerance = torch.ones(runs)
        # The search for a rate, once the user's has diverged; age in steps since a run began, or went back.
        self.age, self.chosen = torch.zeros(2, runs)
        self.best, self.trial_ends = torch.full((2, runs), math.inf)

    @property
    def searching(self) -> Tensor:
        return self.trial_ends.isfinite()

    def times(self) -> set[int]:
        last = self.steps if math.isfinite(self.steps) else 1e6
        count = math.ceil(math.log(max(1.0, last / self.first_update)) / math.log(self.ratio))
        times = {round(self.first_update * self.ratio**k) for k in range(count)}
        return times | {self.decay_at} if math.isfinite(self.decay_at) else times

    def see(self, t: int, loss: Tensor, cosine: Optional, moved: Optional) -> Tensor:
        finite = loss.isfinite()
        self.first = torch.where(self.first.isnan() & finite, loss, self.first)
        mean = torch.where(self.seen > 0, self.mean + 0.2 * (loss - self.mean), loss)
        self.mean = torch.where(finite, mean, self.mean)
        self.seen, self.age = self.seen + finite, self.age + 1
        size = self.tolerance * self.first.abs()
        self.high = torch.where(self.mean > self.first + size, self.high + finite, 0.0)
        if cosine is not None and moved is not None:
            ok = cosine.isfinite()
            cosine = torch.where(ok, cosine, 0.0)
            self.count, self.sum = self.count + ok, self.sum + cosine
            self.squares = self.squares + cosine.square()
            if t <= self.start * self.length:
                self.rise_at_once(t, moved, cosine, ok)
        suspected = ~finite | (self.mean > self.first + 30 * size) | (self.high > self.patience)
        self.suspected = suspected & (self.rollbacks < self.most_rollbacks)
        return self.suspected

    def rise_at_once(self, t: int, moved: Tensor, cosine: Tensor, ok: Tensor) -> None:
        asks = self.ramps & (self.age > 3)
        moved = torch.where(t - self.raised_at < 2, moved * self.raised_by, moved)
        reach = moved / self.age.clamp(max=(t + 8) / 9) * self.length
        self.chosen_by_user = torch.where(self.judged | ~asks, self.chosen_by_user, reach >= self.careless)
        self.judged = self.judged | asks
        self.has_moved = self.has_moved | (asks & (reach >= self.still))
        small, mean = (reach < self.still) & ~self.has_moved, self.sum / self.count.clamp(min=1)
        nowhere = (moved < self.nowhere) & ((self.count == 0) | (self.sum < 0)) & small
        self.agree, self.since = self.agree + cosine, self.since + ok
        asked = (self.nearly * self.agreed / self.agreements.clamp(min=1)).clamp(min=self.clearly)
        further = (reach >= self.still) & (reach < self.bold)
        further &= (asked < 0) & (self.since * asked.square() >= self.clearly**2)
        further &= self.agree <= asked * self.since
        agree = (self.agree < 0) & (self.agree.square() >= self.clearly**2 * self.since)
        careless = torch.where(small, agree, further)
        rises = nowhere | torch.where(self.chosen_by_user, small & (mean < self.unanimous), careless)
        counts = asks & small & ok
        self.agreed, self.agreements = self.agreed + torch.where(counts, cosine, 0.0), self.agreements + counts
        step = torch.where(nowhere, math.log(self.ramp_from_nowhere), math.log(self.ramp))
        self.log = torch.where(rises & asks, self.log + step, self.log)
        self.agree, self.since = torch.where(rises & asks, 0.0, self.agree), torch.where(rises & asks, 0.0, self.since)
        self.raised_at = torch.where(rises & asks, t, self.raised_at)
        self.raised_by = torch.where(rises & asks, step.exp(), self.raised_by)

    def fits(self, t: int) -> bool:
        return t + self.trial_length < self.tail * self.steps

    @property
    def trial_length(self) -> int:
        return max(10, math.ceil(self.trial * self.length))

    def decide(self, t: int, worse: Optional) -> Tensor:
        lost = torch.zeros(len(self.log), dtype=torch.bool) if worse is None else worse
        unfounded = torch.zeros_like(lost) if worse is None else self.suspected & ~worse
        self.tolerance = torch.where(unfounded, 4 * self.tolerance, self.tolerance)
        self.high = torch.where(unfounded, 0.0, self.high)
        if lost.any():
            self.cut(t, lost)
        tried = self.searching & ~lost & (t >= self.trial_ends)
        if tried.any():
            better = tried & (self.mean < self.best - self.worth * self.first.abs())
            self.best = torch.where(better, self.mean, self.best)
            self.chosen = torch.where(better, self.log, self.chosen)
            again = better & self.fits(t)
            ends = tried & ~again
            known = ends & self.best.isfinite()
            self.log = torch.where(again, self.log - math.log(3), torch.where(known, self.chosen, self.log))
            self.trial_ends = torch.where(again, t + self.trial_length, torch.where(ends, math.inf, self.trial_ends))
            lost = lost | again
        for state in (self.count, self.sum, self.squares, self.seen, self.high, self.age):
            state[lost] = 0.0
        self.returns = self.returns + lost
        return lost

    def cut(self, t: int, lost: Tensor) -> None:
        self.rollbacks = self.rollbacks + lost
        rose = self.mean > self.first + self.first.abs()
        never_learned = self.lowest.isinf() & (rose | (self.returns > 0))
        given = self.log <= 0
        lower = self.log - torch.where(self.age <= 6, math.log(10), math.log(3))
        self.ceiling = torch.where(lost, self.log - math.log(2), self.ceiling)
        self.log = torch.where(lost, torch.where(given, lower, lower.clamp(min=0)), self.log)
        self.floor = torch.where(lost, torch.minimum(self.floor, self.log), self.floor)
        self.ramps = self.ramps & ~lost
        begins = lost & ~self.searching & never_learned & given & self.fits(t)
        self.best = torch.where(begins, math.inf, self.best)
        trial = lost & (self.searching | begins)
        self.floor = torch.where(trial, -math.inf, self.floor)
        self.trial_ends = torch.where(trial, t + self.trial_length, self.trial_ends)

    def update(self, t: int, share: Tensor, held_cosine: Optional, derivative: Optional, diverged: Optional) -> Tensor:
        # A warm-up is a plan, and a schedule that comes down makes the gradients unanimous again.
        level = (self.share >= share) & (share >= 0.9 * self.peak)
        self.peak, self.share = torch.maximum(self.peak, share), share
        n = self.count.clamp(min=1)
        mean = self.sum / n
        error = torch.where(self.count < 3, 1.0, ((self.squares / n - mean.square()).clamp(min=0) / n).sqrt())
        passes = (t - 1) // self.per_pass  # that are complete, as Lightning counts
        mean = self.evidence(passes, mean, held_cosine)
        margin = self.margin + self.early * max(0.0, 1 - t / (self.start * self.steps))
        rise = ((-mean - error - margin) / self.full).clamp(0, 1)
        if passes >= self.few_passes:
            rise = torch.where(self.scheduled, 0.0, rise)
        fall = ((mean - error) / self.full).clamp(0, 1)
        log = torch.minimum(self.log + self.speed * math.log(self.ratio) * (rise - fall), self.ceiling)
        log = torch.maximum(log, torch.minimum(self.floor, self.log))
        measured = self.count > 0
        self.log = torch.where(measured & level & self.decay.isinf() & ~self.searching, log, self.log)
        if t >= self.decay_at:
            begins = measured & self.decay.isinf() & (mean > self.progress) & ~self.scheduled
            self.decay = torch.where(begins, float(t), self.decay)
        self.count, self.sum, self.squares = torch.zeros(3, len(mean))
        better = (self.seen > 8) & (self.mean < torch.minimum(self.lowest, self.first)) & ~self.searching
        self.lowest = torch.where(better, self.mean, self.lowest)
        return better

    def evidence(self, passes: int, mean: Tensor, held_cosine: Optional) -> Tensor:
        return mean

    def after_few_passes(self, passes: int, mean: Tensor) -> Tensor:
        """Training gradients are no held-out gradients any more, and no reason to rise."""
        return mean.clamp(min=-self.margin) if passes >= self.few_passes else mean

    def factor(self, t: int) -> Tensor:
        left = torch.where(self.decay.isinf(), 1.0, (self.steps - t) / (self.steps - self.decay))
        return self.log.exp() * left.clamp(min=0.0)


@dataclass
class HeldOut(Rule):
    """The default, ``LearnToLearn()``: from the second pass on a held-out batch's cosine counts where it is larger."""

    risen: float = 0.1

    needs_held_out = True

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        super().begin(runs, steps, scheduled, per_pass)
        self.held = torch.zeros(runs)
        self.held_loss, self.lowest_held = torch.full((2, runs), math.inf)
        self.held_count = torch.zeros(runs)

    def decide(self, t: int, worse: Optional) -> Tensor:
        back = super().decide(t, worse)
        self.held_count[back] = 0.0
        self.held_loss[back] = self.lowest_held[back] = math.inf
        return back

    def see_held_out(self, t: int, loss: Tensor) -> None:
        if (t - 1) // self.per_pass == 0:
            return
        known = loss.isfinite()
        mean = torch.where(self.held_count > 0, self.held_loss, loss)
        self.held_loss = torch.where(known, mean + 0.4 * (loss - mean), self.held_loss)
        self.lowest_held = torch.minimum(self.lowest_held, self.held_loss)
        self.held_count = self.held_count + known
        progress = self.first - self.lowest_held
        risen = (self.held_loss - self.lowest_held > self.risen * progress) & (progress > self.risen * self.first.abs())
        risen &= (
            (self.mean < self.lowest_held)
            & (self.held_count >= 3)
            & ~self.searching
            & ~(self.judged & ~self.chosen_by_user)
        )
        self.log = torch.where(risen, self.log.clamp(max=0.0), self.log)
        self.ceiling = torch.where(risen, self.ceiling.clamp(max=0.0), self.ceiling)

    def evidence(self, passes: int, mean: Tensor, held_cosine: Optional) -> Tensor:
        if held_cosine is None or passes == 0:
            return mean
        known = held_cosine.isfinite()
        self.held = torch.where(known, self.held + 0.4 * (held_cosine - self.held), self.held)
        return torch.where(known, torch.maximum(mean, self.held), self.after_few_passes(passes, mean))


@dataclass
class FewPasses(Rule):
    """The default without held-out data, ``LearnToLearn(meta_data="train")``: no rise after some passes."""

    def evidence(self, passes: int, mean: Tensor, held_cosine: Optional) -> Tensor:
        return self.after_few_passes(passes, mean)


@dataclass
class UnknownLength(HeldOut):
    """The same where the planned length is not known: the early margin stays, nothing decays."""

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        super().begin(runs, math.inf, scheduled, per_pass)


@dataclass
class Unrolled(Rule):
    """``LearnToLearn(Unroll(steps=5))``: start, guard, search and times of the rule, and exact derivatives.

    The derivative is that of the log of a held-out batch's loss after the last five steps, made once more from the
    present weights; it moves the log of the rate as ``lightning_l2l.exact.meta_optimizer.MetaOptimizer`` does.
    """

    decays: bool = False
    stride: float = 0.4  # of the meta-optimizer: the most that the log of the rate falls in one update

    needs_held_out = True
    unroll = 5

    def begin(self, runs: int, steps: float, scheduled: Tensor, per_pass: int) -> None:
        super().begin(runs, steps, scheduled, per_pass)
        self.offset, self.average, self.square, self.updates = torch.zeros(4, runs, dtype=torch.float64)

    def decide(self, t: int, worse: Optional) -> Tensor:
        back = super().decide(t, worse)
        for state in (self.average, self.square, self.updates):
            state[back] = 0.0
        return back

    def update(self, t: int, share: Tensor, held_cosine: Optional, derivative: Optional, diverged: Optional) -> Tensor:
        assert derivative is not None and diverged is not None
        log = self.log
        better = super().update(t, share, None, None, None)
        self.log = log  # the displacement moves nothing here
        usable = derivative.isfinite()
        found = torch.where(usable, derivative, 0.0).double()
        self.updates = self.updates + usable
        square = torch.lerp(self.square, found.square(), 0.5)
        scale = (square / (1 - 0.5**self.updates)).sqrt()
        average = torch.lerp(self.average, torch.where(scale > 0, found / scale, 0.0), 0.2)
        step = -self.stride * average / (1 - 0.8**self.updates)
        step = torch.where(step > 0, 0.25 * step, step)
        self.square = torch.where(usable, square, self.square)
        self.average = torch.where(usable, average, self.average)
        self.offset = self.offset + torch.where(usable, step, torch.where(diverged, math.log(0.5), 0.0))
        return better

    def factor(self, t: int) -> Tensor:
        return (self.log + self.offset).exp().to(self.log.dtype)


RULES: dict[str, type[LeaveAlone]] = {
    "held": HeldOut,  # the default, with held-out data
    "few": FewPasses,  # the default, without
    "unroll": Unrolled,  # exact derivatives
    "unknown-length": UnknownLength,  # the default where nobody knows the length
    "none": LeaveAlone,
}
