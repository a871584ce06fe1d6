"""Plain training runs for comparisons: many tasks at once, the same tasks, starts and batches for every optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.hyperparameters import LearnedHyperparameters
from lightning_l2l.tasks.family import TaskFamily
from lightning_l2l.tasks.stacked import LOSS_CHANNEL, START_LOSS, BatchedTasks, StackedTasks

Baseline = Literal["adam", "sgd_momentum", "sgd"]


@dataclass(frozen=True)
class Curve:
    """How runs went, on all examples at some steps.

    Attributes:
        steps: Training steps done before each evaluation, ``[evaluations]``.
        train: Loss on all training examples, ``[runs, evaluations]``.
        test_accuracy: ``[runs, evaluations]``.
    """

    steps: tuple[int, ...]
    train: Tensor
    test_accuracy: Tensor


@dataclass(frozen=True)
class Runs:
    """What a set of runs gave.

    Attributes:
        name: The optimizer.
        train: Loss on the batch of each step, before the step; ``[runs, steps]``. A run that diverged has the capped
            loss.
        test: Loss on test data at the end, ``[runs]``; NaN where the tasks have none.
        val: The same on validation data.
        test_accuracy: Fraction classified correctly, ``[runs]``; NaN where that means nothing.
        train_accuracy: The same on all training data.
        diverged: How many runs were frozen.
        seconds: Processor time of one step of one run.
        learning_rate: For tuned baselines.
        curve: Where it was asked for.
    """

    name: str
    train: Tensor
    test: Tensor
    val: Tensor
    test_accuracy: Tensor
    train_accuracy: Tensor
    diverged: int
    seconds: float
    learning_rate: float | None = None
    curve: Curve | None = None

    @property
    def score(self) -> float:
        """Mean training loss over runs and steps, what the optimizers are ranked by."""
        return self.train.mean().item()


def runs(
    name: str,
    learned: LearnedOptimizer,
    family: TaskFamily,
    steps: int,
    seeds: Sequence[int],
    divergence: float = 10.0,
    every: int | None = None,
) -> Runs:
    """Train one task for each seed.

    Args:
        name: For the report.
        learned: The optimizer.
        family: Where the tasks come from.
        steps: Training steps.
        seeds: Each gives a task, a start and the batches.
        divergence: See :class:`~lightning_l2l.tasks.stacked.StackedTasks`.
        every: Steps between the evaluations of the curve, for tasks that can evaluate all of their examples; they draw
            no random numbers, so that the runs are the same without them.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tasks = [family.sample(generator) for generator in generators]
    stack, generator = StackedTasks(tasks, divergence), torch.Generator().manual_seed(sum(seeds) + 1)
    parameters = stack.initial_parameters(generator)
    start = stack.losses(parameters, stack.batch("train", generator).data).detach()
    step = InnerStep(stack, BatchedTasks(learned))
    iterate = step.start({**parameters, LOSS_CHANNEL: torch.zeros_like(start)}, None, {START_LOSS: start})
    limit, history = stack.limit(start), []
    spent, evaluated = 0.0, []
    for number in range(steps):
        if every is not None and number % every == 0:
            evaluated.append((number, *_evaluated(stack, _own(iterate.parameters), generator)))
        batch = stack.batch("train", generator)
        begun = time.process_time()
        losses = stack.losses(_own(iterate.parameters), batch.data)
        told = (~(losses.detach() <= limit)).to(losses.dtype)
        total = torch.where(losses.isfinite(), losses, 0.0).sum()
        gradients = {**step.gradients(total, iterate, create_graph=False), LOSS_CHANNEL: told}
        with torch.no_grad():
            iterate = step.update(iterate, gradients).fresh()
        spent += time.process_time() - begun
        history.append(torch.where(losses.detach() < limit, losses.detach(), limit))
    own = _own(iterate.parameters)
    if every is not None:
        evaluated.append((steps, *_evaluated(stack, own, generator)))
    ends = [_on_split(stack, own, split, generator) for split in ("test", "val", "train")]
    (test, accuracy), (val, _), (_, train_accuracy) = ends
    diverged = int((~iterate.state["alive"]).sum())
    seconds = spent / (steps * len(seeds))
    curve = None
    if evaluated:
        places, train, test_accuracy = zip(*evaluated, strict=True)
        curve = Curve(places, torch.stack(train, 1), torch.stack(test_accuracy, 1))
    return Runs(
        name, torch.stack(history, 1), test, val, accuracy, train_accuracy, diverged, seconds, curve=curve
    )  # fmt: skip


def baseline(kind: Baseline, learning_rate: float) -> LearnedOptimizer:
    """Adam, or SGD with momentum 0.9, or without."""
    cls, options = {
        "adam": (torch.optim.Adam, {}),
        "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "sgd": (torch.optim.SGD, {}),
    }[kind]
    return LearnedHyperparameters(("learning_rate",)).attach(inner_optimizer(cls, lr=learning_rate, **options))


def tuned(
    kind: Baseline,
    family: TaskFamily,
    steps: int,
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    score: Callable[[Runs], float] = lambda found: found.score,
    exponents: tuple[int, int] = (-8, 2),
    every: int | None = None,
) -> Runs:
    """A baseline at the best step size of a half-decade grid: chosen on some seeds, reported on others.

    Args:
        kind: Which.
        family: Where the tasks come from.
        steps: Training steps.
        tuning_seeds: Those that the step size is chosen on.
        seeds: Those that are reported.
        score: What the best has least of.
        exponents: First and last half-decade: ``10**(exponent / 2)``.
        every: See :func:`runs`; for the reported runs.
    """
    grid = [10 ** (exponent / 2) for exponent in range(exponents[0], exponents[1] + 1)]
    scores = [score(runs(kind, baseline(kind, rate), family, steps, tuning_seeds)) for rate in grid]
    # NaN loses.
    best = min(range(len(grid)), key=lambda index: scores[index] if scores[index] == scores[index] else float("inf"))
    found = runs(kind, baseline(kind, grid[best]), family, steps, seeds, every=every)
    return Runs(**{**found.__dict__, "learning_rate": grid[best]})


def speed_up(learned: Runs, reference: Runs) -> float:
    """Steps that the reference takes to its final loss, by the steps that the learned optimizer takes to the same loss.

    Losses are means over runs, smoothed over 5 % of the steps; 0 if the learned optimizer never gets there.
    """
    width = max(1, learned.train.shape[1] // 20)
    own, other = (_smoothed(found.train.mean(0), width) for found in (learned, reference))
    reached = [(curve <= other[-1]).nonzero() for curve in (own, other)]
    return 0.0 if len(reached[0]) == 0 else (int(reached[1][0]) + width) / (int(reached[0][0]) + width)


def _smoothed(curve: Tensor, width: int) -> Tensor:
    return curve.unfold(0, width, 1).mean(1)


def _own(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in parameters.items() if name != LOSS_CHANNEL}


def _evaluated(stack: StackedTasks, parameters: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Loss on all training examples and accuracy on all test examples."""
    return _on_split(stack, parameters, "train", generator)[0], _on_split(stack, parameters, "test", generator)[1]


@torch.no_grad()
def _on_split(
    stack: StackedTasks, parameters: dict[str, Tensor], split: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy on a split, all of it where the tasks know how; NaN for what there is not."""
    nothing = torch.full((len(stack.tasks),), torch.nan)
    try:
        data = stack.batch(split, generator, full=hasattr(stack.tasks[0], "full_batch")).data
    except ValueError:  # no such split, which the task refuses
        return nothing, nothing
    accuracy: Any = getattr(stack.tasks[0], "accuracy", None)
    correct = nothing if accuracy is None else torch.func.vmap(accuracy)(parameters, data)
    return stack.losses(parameters, data), correct
