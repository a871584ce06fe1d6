"""A live optimizer that is itself a learned one: its meta-parameters are moved where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_l2l.learned import LearnedOptimizer, LearnedTorchOptimizer


class LearnedInPlace:
    """Takes the place of :class:`~lightning_l2l.host.applied.AppliedValues`: here nothing has to be written.

    The optimizer reads its meta-parameters at every step, and a meta-update moves those very tensors. Rates of the
    parameter groups, by which a schedule scales the learned step, stay the user's.

    Args:
        optimizer: What ``learned.as_torch_optimizer(...)`` returned.
        module: The module that owns the parameters.
    """

    def __init__(self, optimizer: LearnedTorchOptimizer, module: nn.Module) -> None:
        self._optimizer = optimizer
        self._module = module

    @property
    def learning_rates(self) -> list[float]:
        """The factor on the learned step in each group."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def values(self) -> list[dict[str, Any]]:
        """No hyperparameter of a group is learned."""
        return [{} for _ in self._optimizer.param_groups]

    def unrolled(self) -> tuple[LearnedOptimizer, Any]:
        """What the optimizer would do from here as a pure function, over the same meta-parameters, and its state."""
        return self._optimizer.mirror(self._module.named_parameters()), self._optimizer.read_state()

    @contextmanager
    def scheduled(self) -> Iterator[None]:
        """The groups always show the scheduled values."""
        yield

    def refresh(self, *, force: bool = False) -> None:
        """There is nothing to write."""

    def split(self) -> None:
        """No tensor has a rate of its own."""

    def join(self) -> None:
        """There was no split."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the optimizer's own state has the meta-parameters."""
        return {"scheduled": [], "written": []}
