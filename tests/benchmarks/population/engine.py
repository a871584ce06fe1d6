"""Many runs of one task in lockstep, with whatever rule moves their learning rates.

Every parameter has a leading dimension of runs; one backward pass of the sum of the runs' losses gives every run's own
gradient. Runs of the same seed see the same initial weights, batches and drawn noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from families import Family
from opponents import Opponent, Step
from rule import LeaveAlone
from torch import Tensor

LOOKS = 20  # at the held-out loss of the average, for what is chosen by it
WEIGHT_DECAY = 0.05
CONSTANT, COSINE, LINE = range(3)  # shapes of a schedule


@dataclass
class Runs:
    """What is trained for each seed: base rates, the shape of the schedule of each, and the rules."""

    rates: Tensor
    shapes: Tensor
    rules: Sequence[tuple[LeaveAlone, slice]] = ()


Memory = tuple[Tensor, Tensor, Tensor]  # of an optimizer: first and second moment, steps


def fresh(weights: Tensor) -> Memory:
    return torch.zeros_like(weights), torch.zeros_like(weights), weights.new_zeros(len(weights), 1)


def direction(
    kind: str, shapes: Sequence[tuple[int, ...]], memory: Memory, gradient: Tensor, weights: Tensor
) -> tuple[Tensor, Memory]:
    """What SGD with momentum, Adam, AdamW or Muon (vectors by Adam) moves rows of weights against, differentiable."""
    first, second, age = memory
    age = age + 1
    if kind == "sgd":
        first = torch.add(gradient, first, alpha=0.9)
        return first, (first, second, age)
    beta = 0.95 if kind == "muon" else 0.9
    first = torch.lerp(first, gradient, 1 - beta)
    second = torch.addcmul(0.999 * second, gradient, gradient, value=0.001)
    # Nothing below the smallest numbers, where the root has no derivative.
    scale = (second / (1 - 0.999**age)).clamp(min=1e-36).sqrt() + 1e-8
    step = first / (1 - beta**age) / scale
    if kind == "adamw":
        step = step + WEIGHT_DECAY * weights
    if kind == "muon":
        blend = torch.lerp(gradient, first, beta)
        sizes = [math.prod(shape) for shape in shapes]
        pieces = []
        for shape, vector, matrix in zip(shapes, step.split(sizes, 1), blend.split(sizes, 1), strict=True):
            if len(shape) == 2 and min(shape) > 1:
                stretch = max(1, shape[1] / shape[0]) ** 0.5
                pieces.append(orthogonal(matrix.reshape(-1, *shape)).flatten(1) * stretch)
            else:
                pieces.append(0.1 * vector)
        step = torch.cat(pieces, 1)
    return step, (first, second, age)


def orthogonal(x: Tensor) -> Tensor:
    """The five Newton-Schulz steps of Muon."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Task:
    """A family with its data for some seeds."""

    def __init__(self, family: Family, seeds: int) -> None:
        self.family, self.seeds = family, seeds
        self.sizes = [math.prod(shape) for shape in family.shapes]
        generators = [torch.Generator().manual_seed(1000 * seed + 17) for seed in range(seeds)]
        default = torch.get_default_dtype()
        sets = [[t.to(default) if t.is_floating_point() else t for t in family.draw(g)] for g in generators]
        n, held = family.train, family.held
        self.train = [torch.stack(parts) for parts in zip(*([t[:n] for t in s] for s in sets), strict=True)]
        self.held = [torch.stack(parts) for parts in zip(*([t[n : n + held] for t in s] for s in sets), strict=True)]
        tests = ([t[n + held : n + held + 1000] for t in s] for s in sets)
        self.test = [torch.stack(parts) for parts in zip(*tests, strict=True)]
        self.initial = torch.stack([torch.cat([p.flatten() for p in family.start(g)]) for g in generators])
        if family.noise and not family.noise_in_training_only:
            for part in (self.held, self.test):
                part.append(torch.stack([family.noise(g, part[0].shape[1]) for g in generators]))
        if family.pretrain:
            self.pretrain(generators)

    def pretrain(self, generators: list[torch.Generator]) -> None:
        data = [torch.stack(parts) for parts in zip(*(self.family.pretrain(g) for g in generators), strict=True)]
        memory = fresh(self.initial)
        for _ in range(400):
            index = torch.randint(data[0].shape[1], (self.seeds, 32), generator=generators[0])
            batch = [t[torch.arange(self.seeds)[:, None], index] for t in data]
            gradient = self.gradient(self.initial, batch)[1]
            step, memory = direction("adam", self.family.shapes, memory, gradient, self.initial)
            self.initial = self.initial - 3e-3 * step

    def split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split(self.sizes, 1)
        return [p.reshape(len(flat), *shape) for p, shape in zip(pieces, self.family.shapes, strict=True)]

    def gradient(self, flat: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        parameters = [p.detach().requires_grad_() for p in self.split(flat)]
        losses = self.family.loss(parameters, tuple(batch))
        found = torch.autograd.grad(losses.sum(), parameters)
        return losses.detach(), torch.cat([g.flatten(1) for g in found], 1)

    @torch.no_grad()
    def losses(self, flat: Tensor, part: Sequence[Tensor]) -> Tensor:
        each = len(flat) // self.seeds
        return self.family.loss(self.split(flat), tuple(t.repeat_interleave(each, 0) for t in part))

    @torch.no_grad()
    def batch_losses(self, flat: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return self.family.loss(self.split(flat), tuple(batch))

    def batches(self, steps: int) -> Tensor:
        """Indices of all training batches: passes over the data, shuffled anew for each."""
        n, size = self.family.train, min(self.family.batch, self.family.train)
        generators = [torch.Generator().manual_seed(1000 * seed + 29) for seed in range(self.seeds)]
        per = n // size
        passes = math.ceil(steps / per)
        order = torch.stack(
            [torch.stack([torch.randperm(n, generator=g)[: per * size] for _ in range(passes)]) for g in generators]
        )
        return order.reshape(self.seeds, -1, size)[:, :steps]


def shares(shape: Tensor, done: float) -> Tensor:
    """Of the base rates by their schedules, after that part of the steps."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return torch.where(shape == COSINE, cosine, torch.where(shape == LINE, 1.0 - done, 1.0))


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each pair of rows; NaN where there is none."""
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).clamp(-1, 1)


def unrolled(
    task: Task,
    optimizer: str,
    weights: Tensor,
    memory: Memory,
    rates: Tensor,
    batches: Sequence[Sequence[Tensor]],
    held: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The derivative of each run's log held-out loss after a step for each batch, in the log of its rate.

    It is that of the package's objective, ``log``: divided by the number of steps, NaN where it cannot be used (the
    loss is not positive, or something not finite). The second result says which runs diverged on the way.
    """
    log = torch.zeros(len(weights), requires_grad=True, dtype=weights.dtype)
    rate, now = (log.exp() * rates)[:, None], weights.detach().requires_grad_()
    diverged = torch.zeros(len(weights), dtype=torch.bool)
    for batch in batches:
        parameters = task.split(now)
        losses = task.family.loss(parameters, tuple(batch))
        diverged |= ~losses.isfinite()
        found = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
        step, memory = direction(
            optimizer, task.family.shapes, memory, torch.cat([g.flatten(1) for g in found], 1), now
        )
        now = now - rate * step
    reached = task.family.loss(task.split(now), tuple(held))
    (derivative,) = torch.autograd.grad(reached.sum(), log)
    usable = (reached > 0) & ~diverged
    return torch.where(usable, derivative / reached.detach() / len(batches), math.nan), diverged


def returned(weights: Tensor, others: Sequence[tuple[Opponent, Tensor]]) -> Tensor:
    """What is evaluated; some methods train other weights than they return."""
    weights = weights.clone()
    for rule, index in others:
        weights[index] = rule.returned(weights[index])
    return weights


def train(task: Task, optimizer: str, steps: int, runs: Runs) -> dict[str, Tensor]:
    """Test losses of the last, the averaged and the chosen weights, each of shape (seeds, runs)."""
    family, seeds, each = task.family, task.seeds, len(runs.rates)
    weights = task.initial.repeat_interleave(each, 0)
    start, average = weights.clone(), weights.clone()
    chosen, lowest = weights.clone(), torch.full((len(weights),), math.inf)
    memory = fresh(weights)
    base, shape = runs.rates.repeat(seeds), runs.shapes.repeat(seeds)
    order = task.batches(steps)
    noise, drawn = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    held_size, per_seed = min(family.batch, task.held[0].shape[1]), torch.arange(seeds)[:, None]
    mine = [(rule, torch.arange(seeds * each).reshape(seeds, each)[:, part].flatten()) for rule, part in runs.rules]
    for rule, index in mine:
        rule.begin(len(index), steps, shape[index] != CONSTANT, task.train[0].shape[1] // order.shape[2])
        if isinstance(rule, Opponent):
            rule.prepare(optimizer, weights[index], WEIGHT_DECAY, not family.nats)
    others = [(rule, index) for rule, index in mine if isinstance(rule, Opponent)]
    times = [rule.times() for rule, _ in mine]
    # Whether the weights move is asked of the matrices: a bias is zero at first.
    counts = [len(form) > 1 or all(len(f) < 2 for f in family.shapes) for form in family.shapes]
    matrices = torch.cat([torch.full((size,), c) for size, c in zip(task.sizes, counts, strict=True)])
    matrices = matrices.nonzero().flatten()
    watched = any(rule.watches for rule, _ in mine)
    remembered: deque[list[Tensor]] = deque(maxlen=max([rule.unroll for rule, _ in mine], default=0))
    factor = torch.ones(len(weights))
    look, folded = max(1, steps // LOOKS), 0
    share = shares(shape, 0.0)
    for t in range(steps):
        pick = order[:, t]
        batch = [part[per_seed, pick].repeat_interleave(each, 0) for part in task.train]
        if family.noise:
            batch.append(torch.stack([family.noise(noise, pick.shape[1])] * len(weights)))
        remembered.append(batch)
        loss, gradient = task.gradient(weights, batch)
        sampled = t % max(1, t // 64) == 0
        if watched and sampled:
            way = weights - average
            along, moved = angle(gradient, way), way[:, matrices].norm(dim=1) / weights[:, matrices].norm(dim=1)
            moved = torch.where(gradient.norm(dim=1) > 0, moved, math.nan)
        toward, memory = direction(optimizer, family.shapes, memory, gradient, weights)
        step = (base * share * factor)[:, None] * toward
        for rule, index in others:
            step[index] = rule.step(Step(*(x[index] for x in (weights, gradient, loss, toward, base, share))))
        weights = weights - step
        done = t + 1
        if sampled:
            stays = math.prod(s / (s + 9) for s in range(folded + 1, done + 1))
            average, folded = torch.lerp(average, returned(weights, others) if others else weights, 1 - stays), done
        share = shares(shape, done / steps)
        for (rule, index), due in zip(mine, times, strict=True):
            evidence = (along[index], moved[index]) if rule.watches and sampled else (None, None)
            suspected, worse = rule.see(done, loss[index], *evidence), None
            if suspected is not None and suspected.any():
                rows, worse = index[suspected], suspected.clone()
                before, now = (task.batch_losses(w[rows], [part[rows] for part in batch]) for w in (start, weights))
                worse[suspected] = before.isfinite() & ~(now <= before)
            back = rule.decide(done, worse)
            if back is not None and back.any():
                rows = index[back]
                weights[rows], average[rows] = start[rows], start[rows]
                for state in memory:
                    state[rows] = 0.0
            if done in due:
                found = []
                if rule.needs_held_out:
                    choice = torch.randint(task.held[0].shape[1], (seeds, held_size), generator=drawn)
                    part = [p[per_seed, choice].repeat_interleave(each, 0)[index] for p in task.held]
                if rule.unroll:
                    mine_of = [[p[index] for p in b] for b in remembered]
                    rates = (base * share)[index] * rule.factor(done)
                    state = tuple(s[index] for s in memory)
                    found = [None, *unrolled(task, optimizer, weights[index], state, rates, mine_of, part)]
                elif rule.needs_held_out:
                    held_losses, gradients = task.gradient(weights[index], part)
                    found = [angle(gradients, (weights - average)[index]), None, None]
                keep = rule.update(done, share[index], *(found or (None, None, None)))
                if rule.needs_held_out and not rule.unroll:
                    rule.see_held_out(done, held_losses)
                if keep is not None:
                    start[index[keep]] = weights[index[keep]]
            factor[index] = rule.factor(done)
        if done % look == 0:
            now = task.losses(average, task.held)
            better = now < lowest
            chosen = torch.where(better[:, None], average, chosen)
            lowest = torch.where(better, now, lowest)
    found = {"last": returned(weights, others), "averaged": average, "chosen": chosen}
    tested = {name: task.losses(w, task.test).nan_to_num(math.inf, math.inf) for name, w in found.items()}
    return {name: values.reshape(seeds, each) for name, values in (tested | {"factor": factor}).items()}
