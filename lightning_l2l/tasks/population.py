"""Tasks that are trained side by side: where their training stands, and its next window.

All random numbers of a window come from one generator, which the caller seeds; with :meth:`Population.state_dict` that
makes a meta-training that was interrupted go on to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from lightning_l2l.exact.objectives import Objective, is_logarithmic
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.windows import Episode, WindowEstimator
from lightning_l2l.tasks.family import TaskFamily
from lightning_l2l.tasks.stacked import LOSS_CHANNEL, START_LOSS, BatchedTasks, StackedBatch, StackedTasks
from lightning_l2l.tasks.task import Task


@dataclass(frozen=True)
class Judgement:
    """What the inner trainings are judged by.

    Attributes:
        objective: The meta-objective.
        meta_data: The split that it is evaluated on.
        meta_batch: ``"sample"``: one batch for each window and task; ``"full"``: all of the split.
        iterates: ``"after"``: after each step, as everywhere in this package. ``"before"``: the mean objectives run
            over the iterates *before* each step, ``w_0 ... w_(K-1)``, as in the paper's code.
        estimator: How the meta-gradient is computed.
    """

    objective: Objective
    meta_data: Literal["train", "val"]
    meta_batch: Literal["sample", "full"]
    iterates: Literal["after", "before"]
    estimator: WindowEstimator


@dataclass(frozen=True)
class Population:
    """Inner trainings of several tasks, all at the same step.

    Attributes:
        stack: The tasks.
        seeds: What they were drawn from.
        episode: Where their training stands.
        steps: Inner steps taken.
        length: Inner steps at which the training ends.
    """

    stack: StackedTasks
    seeds: tuple[int, ...]
    episode: Episode
    steps: int
    length: int

    @classmethod
    def begin(
        cls,
        family: TaskFamily,
        learned: BatchedTasks,
        tasks: int,
        length: int,
        judgement: Judgement,
        generator: torch.Generator,
        device: torch.device,
        divergence: float,
    ) -> Population:
        """New tasks with fresh parameters.

        Raises:
            ValueError: A task's first loss is not finite.
        """
        seeds = tuple(torch.randint(2**62, (tasks,), generator=generator).tolist())
        stack = _stack(family, seeds, divergence)
        parameters, buffers = _start(stack, generator, device)
        windows = replace(judgement.estimator, particles=replace(judgement.estimator.particles, seed=seeds[0]))
        return cls(stack, seeds, windows.begin(learned, parameters, buffers=buffers), 0, length)

    def window(
        self, learned: BatchedTasks, steps: int, judgement: Judgement, generator: torch.Generator, device: torch.device
    ) -> tuple[MetaGradient, Population]:
        """Train for a window, and differentiate."""
        steps = min(steps, self.length - self.steps)
        batches = [_moved(self.stack.batch("train", generator), device) for _ in range(steps)]
        judged = "geometric_mean" if is_logarithmic(judgement.objective) else "mean"
        full = judgement.meta_batch == "full"
        meta_batch = _moved(self.stack.batch(judgement.meta_data, generator, judged, full), device)
        if judgement.iterates == "before" and judgement.objective == "naive_mean":
            return self._before(learned, batches, meta_batch, judgement)
        result, episode = judgement.estimator.meta_gradient(
            self.stack, learned, self.episode, batches, meta_batch, objective=judgement.objective
        )
        return result, replace(self, episode=episode, steps=self.steps + steps)

    def _before(
        self, learned: BatchedTasks, batches: list[Any], meta_batch: StackedBatch, judgement: Judgement
    ) -> tuple[MetaGradient, Population]:
        """The mean over ``w_0 ... w_(K-1)``: that over ``w_1 ... w_(K-1)`` plus a constant, and one more step."""
        count, here = len(batches), self.episode.iterate
        with torch.no_grad():
            first = self.stack({**here.parameters, **here.buffers}, meta_batch).item()
        episode, result = self.episode, None
        if count > 1:
            result, episode = judgement.estimator.meta_gradient(
                self.stack, learned, episode, batches[:-1], meta_batch, objective="naive_mean"
            )
        last, episode = judgement.estimator.meta_gradient(
            self.stack, learned, episode, batches[-1:], meta_batch, objective="naive_mean"
        )
        result = last if result is None else result
        share = (count - 1) / count if count > 1 else 0.0
        gradients = {name: gradient * share for name, gradient in result.gradients.items()}
        value = result.value * share + first / count
        return replace(result, value=value, gradients=gradients), replace(
            self, episode=episode, steps=self.steps + count
        )

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
        """New tasks in the places of those that diverged, the others as they are."""
        dead = self.diverged
        fresh_seeds = torch.randint(2**62, (len(self.seeds),), generator=generator).tolist()
        seeds = tuple(
            new if gone else old for old, new, gone in zip(self.seeds, fresh_seeds, dead.tolist(), strict=True)
        )
        stack = _stack(family, seeds, self.stack.divergence)
        parameters, buffers = _start(stack, generator, device)
        state = learned.transformation().init(parameters)
        iterate = self.episode.iterate
        new: Any = (parameters, state, buffers)
        old: Any = (iterate.parameters, iterate.state, iterate.buffers)
        merged: Any = optree.tree_map(
            lambda a, b: torch.where(dead.reshape(-1, *[1] * (b.dim() - 1)), a, b.detach()), new, old
        )
        iterate = replace(iterate, parameters=merged[0], state=merged[1], buffers=merged[2]).fresh()
        return replace(self, stack=stack, seeds=seeds, episode=replace(self.episode, iterate=iterate))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings in dictionaries and tuples."""
        own = {"seeds": torch.tensor(self.seeds), "steps": self.steps, "length": self.length}
        return {**own, "episode": self.episode.state_dict()}

    @classmethod
    def from_state_dict(
        cls,
        saved: Mapping[str, Any],
        family: TaskFamily,
        learned: BatchedTasks,
        divergence: float,
        device: torch.device,
    ) -> Population:
        """What :meth:`state_dict` was taken of, given the same family."""
        seeds = tuple(saved["seeds"].tolist())
        episode = Episode.from_state_dict(_moved(saved["episode"], device), learned)
        return cls(_stack(family, seeds, divergence), seeds, episode, saved["steps"], saved["length"])


def _stack(family: TaskFamily, seeds: tuple[int, ...], divergence: float) -> StackedTasks:
    tasks: list[Task] = [family.sample(torch.Generator().manual_seed(seed)) for seed in seeds]
    return StackedTasks(tasks, divergence)


def _start(
    stack: StackedTasks, generator: torch.Generator, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = _moved(stack.initial_parameters(generator), device)
    with torch.no_grad():
        losses = stack.losses(parameters, _moved(stack.batch("train", generator), device).data)
    if not bool(losses.isfinite().all()):
        bad = int((~losses.isfinite()).sum())
        raise ValueError(
            f"The first loss of {bad} of {len(losses)} tasks is not finite, before any step was taken. Check the "
            "tasks' "
            "initial parameters and data."
        )
    return {**parameters, LOSS_CHANNEL: torch.zeros_like(losses)}, {START_LOSS: losses}


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, StackedBatch):
        return replace(tree, data=_moved(tree.data, device))
    return optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
