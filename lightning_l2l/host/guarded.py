"""Whose fault it is that a number is not finite: the rate's, the data's, or that of what the step did about it.

Published modules guard themselves: ``if loss.isnan(): raise``. In a look-ahead at too large a rate such a guard does
its work, and must not end the run: it is a look-ahead that has diverged. Any other exception of the step is raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_l2l.exact.processes import Processes, StepSkippedError
from lightning_l2l.exact.result import Diagnostics, MetaGradient
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.learned import LearnedOptimizer

_Result = TypeVar("_Result")

HELD_OUT_DATA = "The held-out loss is not finite, and not for the rate: its data has numbers that are not."


class StepRefusedError(ArithmeticError):
    """The step raised, and a number that it had computed by then, such as its loss, was not finite."""


def unless_diverged(call: Callable[[], _Result], processes: Processes | None = None) -> _Result:
    """What the call returns; where it fails, it is repeated to see whether it had come to a loss that is not finite.

    Args:
        call: What to call; it must do the same each time.
        processes: Those that make the same call, where a failure on one is a failure on all.

    Raises:
        StepRefusedError: It raised, and so it had.
        Exception: What it raised otherwise.

    Example:
        >>> def guarded(loss):
        ...     if not loss.isfinite():
        ...         raise ValueError("Loss is NaN")
        ...     return loss.item()
        >>> unless_diverged(lambda: guarded(torch.tensor(2.0)))
        2.0
        >>> unless_diverged(lambda: guarded(torch.tensor(2.0).log() / 0))
        Traceback (most recent call last):
            ...
        lightning_l2l.host.guarded.StepRefusedError: training_step raised ValueError('Loss is NaN')
    """
    try:
        return call()
    except (NegativeLossError, StepSkippedError):
        raise  # ours, on steps that returned
    except Exception as error:
        watching = _SeesNumbers()
        try:
            with watching:
                call()
        except Exception:
            # The first error is what is told; that this one follows from a bad number is what it was repeated for.
            if watching.found if processes is None else processes.any(watching.found):
                raise StepRefusedError(f"training_step raised {error!r}") from error
        raise


def refused(learned: LearnedOptimizer, estimator: str, error: StepRefusedError) -> MetaGradient:
    """The meta-gradient of a look-ahead that the step refused to go on with: none that could be used."""
    unknown = {name: torch.full_like(value, math.nan) for name, value in learned.named_parameters()}
    return MetaGradient(
        math.inf, unknown, Diagnostics(estimator, str(error), torch.zeros(0), True, False, None, math.nan)
    )


def is_only_held_out(result: MetaGradient) -> bool:
    """Whether training ran to its end with finite losses, and the held-out loss alone is not finite."""
    state = result.diagnostics
    return state.truncated_step is None and not state.underflow and not math.isfinite(result.value)


def with_note(result: MetaGradient, note: str) -> MetaGradient:
    """The same result with a further remark."""
    return replace(result, diagnostics=replace(result.diagnostics, notes=(*result.diagnostics.notes, note)))


class _SeesNumbers(TorchDispatchMode):
    """Notes whether a single number (a loss is one; a mask with -inf is not) that was computed is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
                self.found = self.found or not bool(torch.isfinite(value.detach()).all())
        return output
