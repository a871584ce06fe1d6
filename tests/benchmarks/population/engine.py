"""Many runs of one task in lockstep, with whatever rule moves their learning rates.

Every parameter has a leading dimension of runs; one backward pass of the sum of the runs' losses gives every run's own
gradient. Runs of the same seed see the same initial weights, batches and drawn noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from families import Family
from opponents import Opponent, Step
from rule import LeaveAlone
from torch import Tensor

LOOKS = 20  # at the held-out loss of the average, for what is chosen by it
WEIGHT_DECAY = 0.05


@dataclass
class Runs:
    """What is trained for each seed: base rates, whether they follow a cosine, and the rule of each."""

    rates: Tensor
    cosine: Tensor
    rules: Sequence[tuple[LeaveAlone, slice]] = ()


class Optimizer:
    """SGD with momentum, Adam, AdamW, Muon (vectors by Adam) for rows of parameters."""

    def __init__(self, kind: str, weights: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self.kind, self.shapes = kind, shapes
        self.first = torch.zeros_like(weights)
        self.second = torch.zeros_like(weights)
        self.age = torch.zeros(len(weights), 1)
        self.kept = [state.clone() for state in (self.first, self.second, self.age)]

    def direction(self, gradient: Tensor, weights: Tensor) -> Tensor:
        self.age += 1
        if self.kind == "sgd":
            self.first.mul_(0.9).add_(gradient)
            return self.first.clone()
        beta = 0.95 if self.kind == "muon" else 0.9
        self.first.lerp_(gradient, 1 - beta)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (self.second / (1 - 0.999**self.age)).sqrt_().add_(1e-8)
        step = self.first / (1 - beta**self.age) / scale
        if self.kind == "adamw":
            step += WEIGHT_DECAY * weights
        if self.kind == "muon":
            blend = torch.lerp(gradient, self.first, beta)
            at = 0
            for shape in self.shapes:
                size = math.prod(shape)
                if len(shape) == 2 and min(shape) > 1:
                    block = blend[:, at : at + size].reshape(-1, *shape)
                    step[:, at : at + size] = orthogonal(block).reshape(-1, size) * max(1, shape[1] / shape[0]) ** 0.5
                else:
                    step[:, at : at + size] *= 0.1
                at += size
        return step

    def keep(self, rows: Tensor) -> None:
        """What ``put_back`` returns to."""
        for state, kept in zip((self.first, self.second, self.age), self.kept, strict=True):
            kept[rows] = state[rows]

    def put_back(self, rows: Tensor) -> None:
        for state, kept in zip((self.first, self.second, self.age), self.kept, strict=True):
            state[rows] = kept[rows]


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
        sets = [family.draw(g) for g in generators]
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
        optimizer = Optimizer("adam", self.initial, self.family.shapes)
        for _ in range(400):
            index = torch.randint(data[0].shape[1], (self.seeds, 32), generator=generators[0])
            batch = [t[torch.arange(self.seeds)[:, None], index] for t in data]
            gradient = self.gradient(self.initial, batch)[1]
            self.initial = self.initial - 3e-3 * optimizer.direction(gradient, self.initial)

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


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each pair of rows; NaN where there is none."""
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).clamp(-1, 1)


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
    state = Optimizer(optimizer, weights, family.shapes)
    base, cosine = runs.rates.repeat(seeds), runs.cosine.repeat(seeds)
    order = task.batches(steps)
    noise = torch.Generator().manual_seed(5)
    held_size, per_seed = min(family.batch, task.held[0].shape[1]), torch.arange(seeds)[:, None]
    mine = [(rule, torch.arange(seeds * each).reshape(seeds, each)[:, part].flatten()) for rule, part in runs.rules]
    passes = steps * order.shape[2] / task.train[0].shape[1]
    for rule, index in mine:
        rule.begin(len(index), steps, cosine[index], passes)
        if isinstance(rule, Opponent):
            rule.prepare(optimizer, weights[index], WEIGHT_DECAY, not family.nats)
    others = [(rule, index) for rule, index in mine if isinstance(rule, Opponent)]
    factor = torch.ones(len(weights))
    asked = [rule.times() for rule, _ in mine]
    look = max(1, steps // LOOKS)
    for t in range(steps):
        pick = order[:, t]
        batch = [part[per_seed, pick].repeat_interleave(each, 0) for part in task.train]
        if family.noise:
            batch.append(torch.stack([family.noise(noise, pick.shape[1])] * len(weights)))
        loss, gradient = task.gradient(weights, batch)
        shape = torch.where(cosine, 0.5 + 0.5 * math.cos(math.pi * t / steps), 1.0)
        stride = max(1, t // 64)
        sampled = t % stride == 0
        if mine and sampled:
            way = weights - average
            along, moved = angle(gradient, way), way.norm(dim=1) / weights.norm(dim=1)
        for (rule, index), times in zip(mine, asked, strict=True):
            if t in times:
                displacement = (weights - average)[index]
                held = None
                if rule.needs_held_out:
                    choice = torch.randint(task.held[0].shape[1], (seeds, held_size), generator=noise)
                    part = [p[per_seed, choice].repeat_interleave(each, 0)[index] for p in task.held]
                    held = angle(task.gradient(weights[index] - rule.point * displacement, part)[1], displacement)
                keep = rule.update(t, held)
                if rule.rescale:
                    average[index] += (1 - rule.moved.exp())[:, None] * displacement
                if keep is not None:
                    start[index[keep]] = weights[index[keep]]
                    state.keep(index[keep])
            evidence = (along[index], moved[index]) if sampled else (None, None)
            lost = rule.see(t, loss[index], *evidence, shape[index])
            if lost is not None and lost.any():
                back = index[lost]
                weights[back], average[back], gradient[back] = start[back], start[back], 0.0
                state.put_back(back)
            factor[index] = rule.factor
        direction = state.direction(gradient, weights)
        step = (base * shape * factor)[:, None] * direction
        for rule, index in others:
            step[index] = rule.step(Step(*(x[index] for x in (weights, gradient, loss, direction, base, shape))))
        weights = weights - step
        if sampled:
            weight = torch.full((len(weights),), min(1.0, stride * 9 / (t + 9)))
            for rule, index in mine:
                weight[index] = rule.weight(t, stride)
            average = average + weight[:, None] * (returned(weights, others) - average)
        if (t + 1) % look == 0:
            now = task.losses(average, task.held)
            better = now < lowest
            chosen = torch.where(better[:, None], average, chosen)
            lowest = torch.where(better, now, lowest)
    found = {"last": returned(weights, others), "averaged": average, "chosen": chosen}
    tested = {name: task.losses(w, task.test).nan_to_num(math.inf, math.inf) for name, w in found.items()}
    return {name: values.reshape(seeds, each) for name, values in (tested | {"factor": factor}).items()}
