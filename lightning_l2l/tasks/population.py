"""Inner trainings of several tasks side by side: where they are, and their next unroll.

All random numbers of an unroll come from one generator, which the caller seeds; with :meth:`Population.state_dict` that
makes a meta-training that was interrupted go on to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.episodes import Episode
from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.objectives import is_logarithmic
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.tasks.family import TaskFamily
from lightning_l2l.tasks.stacked import LOSS_CHANNEL, RATE_CHANNEL, START_LOSS, BatchedTasks, StackedBatch, StackedTasks
from lightning_l2l.tasks.task import Task


@dataclass(frozen=True)
class MetaLoss:
    """What the meta-objective is evaluated on.

    Attributes:
        split: The split of the tasks' data.
        full: All of the split; else one batch for each unroll and task.
        iterates: ``"after"``: the iterates after each step, as everywhere in this package. ``"before"``: the mean
            objectives run over those *before* each step, ``w_0 ... w_(K-1)``, as in the paper's code.
    """

    split: Literal["train", "val"] = "val"
    full: bool = False
    iterates: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Population:
    """Inner trainings of several tasks, all at the same step.

    Attributes:
        stack: The tasks.
        seed: What their family (of a mixture) and the perturbations of evolution strategies are drawn from.
        seeds: What the tasks are drawn from.
        episode: Their training so far.
        steps: Inner steps taken.
        length: Inner steps at which the training ends.
    """

    stack: StackedTasks
    seed: int
    seeds: tuple[int, ...]
    episode: Episode
    steps: int
    length: int

    @classmethod
    def begin(
        cls,
        family: TaskFamily,
        learned: BatchedTasks,
        estimator: Unroll | EvolutionStrategies,
        *,
        tasks: int,
        length: int,
        divergence: float,
        annealed: bool,
        generator: torch.Generator,
        device: torch.device,
    ) -> Population:
        """New tasks with fresh parameters; ``annealed``: with steps that fall to zero linearly over the training.

        Raises:
            ValueError: A task's first loss is not finite.
        """
        seed, *seeds = torch.randint(2**62, (tasks + 1,), generator=generator).tolist()
        stack = _stack(family, seed, seeds, divergence)
        parameters, buffers = _start(stack, annealed, generator, device)
        episode = Episode.begin(learned, parameters, estimator=_seeded(estimator, seed), buffers=buffers)
        return cls(stack, seed, tuple(seeds), episode, 0, length)

    def unroll(
        self, learned: BatchedTasks, steps: int, meta_loss: MetaLoss, generator: torch.Generator, device: torch.device
    ) -> tuple[MetaGradient, Population]:
        """Train for some steps (fewer at the end of the training), and differentiate."""
        steps = min(steps, self.length - self.steps)
        batches = [
            replace(moved(self.stack.batch("train", generator), device), rate=1.0 - (self.steps + taken) / self.length)
            for taken in range(steps)
        ]
        mean: Literal["mean", "geometric_mean"] = "mean"
        if is_logarithmic(self.episode.estimator.objective):
            mean = "geometric_mean"
        meta_batch = moved(self.stack.batch(meta_loss.split, generator, mean, meta_loss.full), device)
        if meta_loss.iterates == "before":
            result, episode = self._over_iterates_before(learned, batches, meta_batch)
        else:
            result, episode = self.episode.unroll(self.stack, learned, batches, meta_batch)
        return result, replace(self, episode=episode, steps=self.steps + steps)

    def _over_iterates_before(
        self, learned: BatchedTasks, batches: list[Any], meta_batch: StackedBatch
    ) -> tuple[MetaGradient, Episode]:
        """The mean over ``w_0 ... w_(K-1)``: that over ``w_1 ... w_(K-1)`` plus a constant, and one more step."""
        count, start = len(batches), self.episode.iterate
        with torch.no_grad():
            first = self.stack({**start.parameters, **start.buffers}, meta_batch).item()
        episode, result = self.episode, None
        if count > 1:
            result, episode = episode.unroll(self.stack, learned, batches[:-1], meta_batch)
        last, episode = episode.unroll(self.stack, learned, batches[-1:], meta_batch)
        result, share = (last, 0.0) if result is None else (result, (count - 1) / count)
        gradients = {name: gradient * share for name, gradient in result.gradients.items()}
        return replace(result, value=result.value * share + first / count, gradients=gradients), episode

    @property
    def finished(self) -> bool:
        """Whether the inner training has come to its end."""
        return self.steps >= self.length

    @property
    def diverged(self) -> Tensor:
        """Which tasks are frozen, ``[tasks]``; with particles, those of which at least one particle is."""
        alive: Tensor = self.episode.iterate.state["alive"]
        return ~(alive if alive.dim() == 1 else alive.all(0))

    @property
    def restartable(self) -> bool:
        """Whether one task can begin anew: not if it shares a step count, or particles' history, with others."""
        leaves = optree.tree_leaves(self.episode.iterate.state)
        return not self.episode.directions and all(isinstance(leaf, Tensor) for leaf in leaves)

    def restarted(
        self, family: TaskFamily, learned: BatchedTasks, generator: torch.Generator, device: torch.device
    ) -> Population:
        """New tasks for those that diverged, the others as they are."""
        dead = self.diverged
        fresh = torch.randint(2**62, (len(self.seeds),), generator=generator).tolist()
        seeds = tuple(new if gone else old for old, new, gone in zip(self.seeds, fresh, dead.tolist(), strict=True))
        stack = _stack(family, self.seed, seeds, self.stack.divergence)
        parameters, buffers = _start(stack, RATE_CHANNEL in self.episode.iterate.parameters, generator, device)
        iterate = self.episode.iterate
        new: Any = (parameters, learned.transformation().init(parameters), buffers)
        old: Any = (iterate.parameters, iterate.state, iterate.buffers)
        merged: Any = optree.tree_map(
            lambda a, b: torch.where(dead.reshape(-1, *[1] * (b.dim() - 1)), a, b.detach()), new, old
        )
        iterate = replace(iterate, parameters=merged[0], state=merged[1], buffers=merged[2]).fresh()
        return replace(self, stack=stack, seeds=seeds, episode=replace(self.episode, iterate=iterate))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings in dictionaries and tuples."""
        own = {"seed": self.seed, "seeds": torch.tensor(self.seeds), "steps": self.steps, "length": self.length}
        return {**own, "episode": self.episode.state_dict()}

    @classmethod
    def from_state_dict(
        cls,
        saved: Mapping[str, Any],
        family: TaskFamily,
        learned: BatchedTasks,
        estimator: Unroll | EvolutionStrategies,
        *,
        divergence: float,
        device: torch.device,
    ) -> Population:
        """What :meth:`state_dict` was taken of, given the same family and estimator."""
        seed, seeds = saved["seed"], tuple(saved["seeds"].tolist())
        episode = Episode.from_state_dict(moved(saved["episode"], device), learned, _seeded(estimator, seed))
        stack = _stack(family, seed, seeds, divergence)
        return cls(stack, seed, seeds, episode, saved["steps"], saved["length"])


def moved(tree: Any, device: torch.device) -> Any:
    """The tree with its tensors on a device."""
    if isinstance(tree, StackedBatch):
        return replace(tree, data=moved(tree.data, device))
    return optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def _seeded(estimator: Unroll | EvolutionStrategies, seed: int) -> Unroll | EvolutionStrategies:
    """With perturbations of its own for each inner training."""
    return estimator if isinstance(estimator, Unroll) else replace(estimator, seed=seed)


def _stack(family: TaskFamily, seed: int, seeds: Sequence[int], divergence: float) -> StackedTasks:
    family = family.of_one_architecture(torch.Generator().manual_seed(seed))
    tasks: list[Task] = [family.sample(torch.Generator().manual_seed(each)) for each in seeds]
    return StackedTasks(tasks, divergence)


def _start(
    stack: StackedTasks, annealed: bool, generator: torch.Generator, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = moved(stack.initial_parameters(generator), device)
    with torch.no_grad():
        losses = stack.losses(parameters, moved(stack.batch("train", generator), device).data)
    if not bool(losses.isfinite().all()):
        bad = int((~losses.isfinite()).sum())
        raise ValueError(
            f"The first loss of {bad} of {len(losses)} tasks is not finite, before any step was taken. Check the "
            "tasks' initial parameters and data."
        )
    channels = [LOSS_CHANNEL, RATE_CHANNEL] if annealed else [LOSS_CHANNEL]
    return {**parameters, **{name: torch.zeros_like(losses) for name in channels}}, {START_LOSS: losses}
