"""Families of tasks: what a learned optimizer is meta-trained on, so that it does not memorise one run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_l2l.tasks.task import Task


class TaskFamily(ABC):
    """A distribution over tasks whose parameters have the same names and shapes (unless it is a :class:`Mixture`).

    A task that is drawn is a function of the generator's state alone, so a meta-training remembers the seed of a task
    instead of its data.

    Example:
        >>> family = RandomQuadratics(dim=3)
        >>> task = family.sample(torch.Generator().manual_seed(0))
        >>> sorted(task.initial_parameters())
        ['point']
    """

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Task:
        """Draw a task.

        Args:
            generator: The source of everything that is random about it.
        """

    def of_one_architecture(self, generator: torch.Generator) -> TaskFamily:
        """The family to draw tasks from that are trained side by side: itself, or one of a :class:`Mixture`."""
        return self


class Mixture(TaskFamily):
    """Several families, whose tasks may have different parameters; tasks that are trained side by side share one.

    Args:
        families: The families, each drawn with the same probability.

    Raises:
        ValueError: There are none.

    Example:
        >>> mixture = Mixture([RandomQuadratics(dim=2), RandomQuadratics(dim=3)])
        >>> mixture.of_one_architecture(torch.Generator().manual_seed(0)).dim in (2, 3)
        True
    """

    def __init__(self, families: Sequence[TaskFamily]) -> None:
        if not families:
            raise ValueError("There is no family to choose from: give at least one.")
        self.families = tuple(families)

    def of_one_architecture(self, generator: torch.Generator) -> TaskFamily:
        """One of the families."""
        return self.families[int(torch.randint(len(self.families), (), generator=generator))]

    def sample(self, generator: torch.Generator) -> Task:
        """Draw a task of any of the families."""
        return self.of_one_architecture(generator).sample(generator)


class StackableTask(Task):
    """A task whose loss is a pure function of parameters and batch.

    What distinguishes it from the other tasks of its family comes with the batch, so the losses of many tasks are one
    call of ``torch.func.vmap``. (Any other task works too, one after the other.) The loss may not branch on values,
    write in place into what it did not make, or call ``.item()``.
    """

    @abstractmethod
    def loss_signature(self) -> Any:
        """Tasks of one class with equal signatures have the same loss function and the same shapes of batches."""


class ChoiceOfTasks(TaskFamily):
    """One of several tasks, each with the same probability.

    Args:
        tasks: The tasks, of equal parameter names and shapes.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("There is no task to choose from: give at least one.")
        self.tasks = tuple(tasks)

    def sample(self, generator: torch.Generator) -> Task:
        """Return one of them."""
        return self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]


def as_family(tasks: Task | TaskFamily | Sequence[Task]) -> TaskFamily:
    """A family out of a family, a task or several tasks.

    Raises:
        TypeError: It is none of these.
        ValueError: A sequence without tasks.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> type(as_family(Quadratic.random(2, seed=0))).__name__
        'ChoiceOfTasks'
    """
    if isinstance(tasks, TaskFamily):
        return tasks
    if isinstance(tasks, Task):
        return ChoiceOfTasks([tasks])
    if isinstance(tasks, Sequence) and all(isinstance(task, Task) for task in tasks):
        return ChoiceOfTasks(tasks)
    raise TypeError(
        f"tasks must be a Task, a TaskFamily or a sequence of Tasks, got {type(tasks).__name__}. Write a Task whose "
        "loss(parameters, batch) calls your model with torch.func.functional_call."
    )


class LinearSystem(StackableTask):
    """``f(x) = |W x - y|**2`` with its own W and y; drawn by :class:`RandomQuadratics`.

    Args:
        matrix: W, ``[dim, dim]``.
        target: y, ``[dim]``.
        start_deviation: Standard deviation of the start.
    """

    def __init__(self, matrix: Tensor, target: Tensor, start_deviation: float) -> None:
        self.matrix, self.target, self.start_deviation = matrix, target, start_deviation

    def loss_signature(self) -> Any:
        """The shape of W."""
        return tuple(self.matrix.shape)

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``{"point": x}``, ``[dim]``."""
        point = torch.randn(self.target.shape, generator=generator, dtype=self.target.dtype)
        return {"point": self.start_deviation * point}

    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return ``|W x - y|**2``; W and y are the batch."""
        matrix, target = batch
        loss: Tensor = (matrix @ parameters["point"] - target).square().sum()
        return loss

    def sample_batch(
        self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(W, y)``: the loss is deterministic."""
        return self.matrix, self.target


class RandomQuadratics(TaskFamily):
    """The quadratics of the first learned neural optimizer: ``|W x - y|**2``, W and y uniform in [0, 1).

    Small, deterministic and hard for a fixed step size: the curvatures of one task span many orders of magnitude.
    Source: Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.1, with the distributions of its published code.

    Args:
        dim: Dimension; 10 in the paper.
        start_deviation: Standard deviation of the Gaussian start.

    Raises:
        ValueError: A dimension below 1.

    Example:
        >>> task = RandomQuadratics().sample(torch.Generator().manual_seed(0))
        >>> task.loss(task.initial_parameters(), task.sample_batch("train")).dim()
        0
    """

    def __init__(self, dim: int = 10, start_deviation: float = 0.01) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim} must be at least 1.")
        self.dim, self.start_deviation = dim, start_deviation

    def sample(self, generator: torch.Generator) -> LinearSystem:
        """Draw W and y."""
        matrix = torch.rand(self.dim, self.dim, generator=generator)
        return LinearSystem(matrix, torch.rand(self.dim, generator=generator), self.start_deviation)
