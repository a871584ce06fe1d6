"""The interface of a task: where training starts, what it minimises, where its batches come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor


class Task(ABC):
    """An inner problem to learn an optimizer on.

    A task is a pure description: it holds data, never the parameters that are being trained. It is callable,
    and calling it is the same as :meth:`loss`, so a task can be handed to anything that expects
    ``loss(parameters, batch)``.

    Attributes:
        homogeneity: The degree ``p`` for which ``loss(c * w) = |c|**p * loss(w)`` holds for every number
            ``c`` and every batch, or ``None`` when there is none. A homogeneous task may be rescaled during a
            long unroll, which keeps its log objective exact where the loss itself has left the number range.

    Example:
        >>> class Bowl(Task):
        ...     homogeneity = 2.0
        ...     def initial_parameters(self, generator=None):
        ...         return {"point": torch.ones(2)}
        ...     def loss(self, parameters, batch):
        ...         return parameters["point"].square().sum()
        ...     def sample_batch(self, split, generator=None):
        ...         return None
        >>> task = Bowl()
        >>> task(task.initial_parameters(), task.sample_batch("train"))
        tensor(2.)
    """

    homogeneity: float | None = None

    @abstractmethod
    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return fresh parameters to start training from.

        Args:
            generator: Source of randomness for tasks with a random start; others ignore it.

        Returns:
            Name to tensor; the caller owns the tensors and may change them.
        """

    @abstractmethod
    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the inner loss, a scalar tensor that is differentiable in the parameters.

        Args:
            parameters: Name to tensor, as returned by :meth:`initial_parameters`.
            batch: What :meth:`sample_batch` returned; ``None`` for tasks without batches.
        """

    @abstractmethod
    def sample_batch(self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None) -> Any:
        """Return one batch of the given split, or ``None`` if the loss needs none.

        Args:
            split: ``"train"`` for inner steps, ``"val"`` for a held-out meta-objective, ``"test"`` for the
                final report.
            generator: Source of randomness; ``None`` uses the global one.
        """

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return ``loss(parameters, batch)``."""
        return self.loss(parameters, batch)
