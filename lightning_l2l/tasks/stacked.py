"""Many tasks as one inner problem: parameters with a leading task dimension, one loss, one optimizer.

The estimators of :mod:`lightning_l2l.exact` know nothing of tasks. The training loss of the stack is the *sum* of the
tasks' losses, so each task sees its own full gradient; the meta-loss is their mean, or for logarithmic objectives their
geometric mean, whose logarithm is the mean of the logarithms.

A task that diverges is *frozen*: it stays where it is before anything leaves the number range, its meta-loss
counts as a fixed number from then on, and it no longer contributes to the meta-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.tasks.family import StackableTask
from lightning_l2l.tasks.task import Task

# A pseudo-parameter, always zero. Its "gradient" is how the optimizer learns which tasks diverged: 1 for a loss above
# its limit, else 0.
LOSS_CHANNEL = "l2l.diverged"
# Another one, where the learning rate follows a schedule: its "gradient" is what the updates are multiplied by.
RATE_CHANNEL = "l2l.rate"
# A buffer, so that it goes with the iterate: the loss of each task at its start.
START_LOSS = "l2l.start_loss"
Mean = Literal["mean", "geometric_mean"]
# One update may not be longer than this many times the parameters and the vector of ones.
_LONGEST_UPDATE = 10.0


@dataclass(frozen=True)
class StackedBatch:
    """The batches of all tasks.

    Attributes:
        data: For stackable tasks one tree with the task as the first dimension of every tensor, else a list.
        mean: ``None`` for a training step; over the tasks, for a meta-loss.
        rate: What the schedule multiplies the update of a training step by.
    """

    data: Any
    mean: Mean | None = None
    rate: float = 1.0


class StackedTasks:
    """Tasks of equal parameter shapes as one loss for the estimators.

    Args:
        tasks: The tasks.
        divergence: A task is frozen once its loss is this many times its start's loss above the start's.

    Example:
        >>> from lightning_l2l.tasks.family import RandomQuadratics
        >>> family, generator = RandomQuadratics(dim=2), torch.Generator().manual_seed(0)
        >>> stack = StackedTasks([family.sample(generator) for _ in range(3)])
        >>> parameters = stack.initial_parameters(generator)
        >>> parameters["point"].shape, stack.losses(parameters, stack.batch("train", generator).data).shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, tasks: Sequence[Task], divergence: float = 10.0) -> None:
        self.tasks = list(tasks)
        self.divergence = divergence
        first = self.tasks[0]
        self._stackable = isinstance(first, StackableTask) and all(
            type(task) is type(first) and task.loss_signature() == first.loss_signature()
            for task in self.tasks
            if isinstance(task, StackableTask) or _refuse_mixture(first, task)
        )

    def initial_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters of all tasks, the task as the first dimension.

        Raises:
            ValueError: The tasks have parameters of different names or shapes.
        """
        found = [task.initial_parameters(generator) for task in self.tasks]
        shapes = [{name: tuple(tensor.shape) for name, tensor in own.items()} for own in found]
        for own in shapes:
            if own != shapes[0]:
                raise ValueError(
                    "Tasks that are trained together need parameters of the same names and shapes, but one has "
                    f"{shapes[0]} and another {own}. Meta-train on families of one architecture at a time."
                )
        return {name: torch.stack([own[name].detach() for own in found]) for name in found[0]}

    def batch(
        self,
        split: Literal["train", "val", "test"],
        generator: torch.Generator,
        mean: Mean | None = None,
        full: bool = False,
    ) -> StackedBatch:
        """A batch of every task.

        Args:
            split: Of each task's data.
            generator: Source of randomness.
            mean: See :class:`StackedBatch`.
            full: The whole split instead of a sample; the tasks need a method ``full_batch(split)``.

        Raises:
            ValueError: ``full`` for a task that has no such method.
        """
        if full and not all(hasattr(task, "full_batch") for task in self.tasks):
            raise ValueError(
                f"{type(self.tasks[0]).__name__} has no full_batch(split), so the meta-objective cannot be evaluated "
                "on all of its data. Use meta_batch='sample'."
            )
        tasks: Any = self.tasks
        found = [task.full_batch(split) if full else task.sample_batch(split, generator) for task in tasks]
        data: Any = optree.tree_map(lambda *parts: torch.stack(parts), *found) if self._stackable else found
        return StackedBatch(data, mean)

    def losses(self, parameters: Mapping[str, Tensor], data: Any) -> Tensor:
        """The loss of each task, ``[tasks]``."""
        if not self._stackable:
            return torch.stack(
                [
                    task.loss({name: tensor[index] for name, tensor in parameters.items()}, data[index])
                    for index, task in enumerate(self.tasks)
                ]
            )
        found: Tensor = torch.func.vmap(self.tasks[0].loss, randomness="different")(dict(parameters), data)
        return found

    def limit(self, start: Tensor) -> Tensor:
        """Above this loss a task counts as diverged, ``[tasks]``."""
        # A number, so that the mean over the tasks is one too.
        largest = torch.finfo(start.dtype).max / (2 * len(self.tasks))
        return (start + self.divergence * start.abs().clamp(min=1e-12)).clamp(max=largest)

    def __call__(self, parameters: Mapping[str, Tensor], batch: StackedBatch) -> Tensor:
        """The loss of the stack; ``parameters`` holds :data:`LOSS_CHANNEL` and :data:`START_LOSS` too."""
        own = {name: tensor for name, tensor in _without_channels(parameters).items() if name != START_LOSS}
        losses, start = self.losses(own, batch.data), parameters[START_LOSS]
        limit = self.limit(start).to(losses)
        if batch.mean is None:
            diverged = (~(losses.detach() <= limit)).to(parameters[LOSS_CHANNEL].dtype)
            told = (parameters[LOSS_CHANNEL] * diverged).sum()
            if RATE_CHANNEL in parameters:
                told = told + parameters[RATE_CHANNEL].sum() * batch.rate
            return torch.where(losses.isfinite(), losses, 0.0).sum() + told
        # NaN is not below the limit either.
        capped = torch.where(losses < limit, losses, limit)
        return capped.log().mean().exp() if batch.mean == "geometric_mean" else capped.mean()


def _refuse_mixture(first: Task, other: Task) -> bool:
    raise ValueError(
        f"{type(first).__name__} and {type(other).__name__} cannot be trained together: the one is stackable, the "
        "other is not."
    )


class BatchedTasks(LearnedOptimizer):
    """A learned optimizer for stacked tasks: the same update for each of them, by ``torch.func.vmap``.

    Diverging tasks are frozen here: a task whose loss or gradient is not finite, whose loss is above its limit, or
    whose update is absurdly long, does not move again.

    The state is ``{"optimizer": ..., "alive": bool [tasks]}``; tensors in ``"optimizer"`` have the task as first
    dimension, numbers (Adam's step) are shared by the tasks, which are then all of the same age.

    Args:
        learned: The learned optimizer, whose meta-parameters these are. Its transformation may not branch on values.
    """

    def __init__(self, learned: LearnedOptimizer) -> None:
        super().__init__()
        self.learned = learned

    def transformation(self) -> GradientTransformation:
        """The optimizer, over dictionaries of tensors ``[tasks, ...]`` with :data:`LOSS_CHANNEL` among them."""
        inner = self.learned.transformation()

        def init(params: Mapping[str, Tensor]) -> dict[str, Any]:
            own = _without_channels(params)
            alive = torch.ones_like(params[LOSS_CHANNEL], dtype=torch.bool)
            return {"optimizer": _over_tasks(inner.init, own), "alive": alive}

        def update(
            updates: Mapping[str, Tensor], state: Mapping[str, Any], *, params: Any = None, inplace: bool = True
        ) -> tuple[dict[str, Tensor], dict[str, Any]]:
            own, gradients = _without_channels(params), _without_channels(updates)
            norm = _square_norm(gradients)
            alive = state["alive"] & (updates[LOSS_CHANNEL].detach() < 0.5) & norm.isfinite()
            # Zero gradients for frozen tasks, so that their state stays finite as well.
            gradients = _masked(gradients, alive)
            moves, following = _over_tasks(
                lambda g, s, p: inner.update(g, s, params=p, inplace=False), gradients, state["optimizer"], own
            )
            moves = {name: torch.zeros_like(own[name]) if move is None else move for name, move in moves.items()}
            if RATE_CHANNEL in params:
                moves = {name: _per_task(updates[RATE_CHANNEL], move) * move for name, move in moves.items()}
            elements = sum(tensor.numel() // tensor.shape[0] for tensor in own.values())
            longest = _LONGEST_UPDATE**2 * (_square_norm(own) + elements)
            alive = alive & (_square_norm(moves) <= longest)
            masked = _masked(moves, alive)
            masked |= {name: torch.zeros_like(params[name]) for name in (LOSS_CHANNEL, RATE_CHANNEL) if name in params}
            return masked, {"optimizer": following, "alive": alive}

        return GradientTransformation(init, update)

    def project_(self) -> None:
        """As the learned optimizer does."""
        self.learned.project_()


def _without_channels(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name not in (LOSS_CHANNEL, RATE_CHANNEL)}


def _per_task(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _square_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """For each task, over all tensors."""
    norms = [torch.linalg.vector_norm(tensor.detach().flatten(1), dim=1) for tensor in tensors.values()]
    return torch.stack(norms).square().sum(0)


def _masked(tensors: Mapping[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
    return {name: torch.where(_per_task(alive, tensor), tensor, 0.0) for name, tensor in tensors.items()}


def _over_tasks(function: Any, *trees: Any) -> Any:
    """``function`` for each task; what is no tensor in the trees is the same for all of them and goes past vmap."""
    given_trees: Any = trees
    leaves, structure = optree.tree_flatten(given_trees)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    found: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for index, tensor in zip(places, tensors, strict=True):
            given[index] = tensor
        results, shape = optree.tree_flatten(function(*optree.tree_unflatten(structure, given)))
        found[:] = [results, shape]
        return tuple(result for result in results if isinstance(result, Tensor))

    stacked = iter(torch.func.vmap(flat, randomness="different")(*[leaves[index] for index in places]))
    results, shape = found
    return optree.tree_unflatten(shape, [next(stacked) if isinstance(r, Tensor) else r for r in results])
