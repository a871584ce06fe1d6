"""The user's ``training_step`` as a pure function ``loss(parameters, batch)``."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_l2l.exact.processes import StepSkippedError
from lightning_l2l.exact.substitution import call_with
from lightning_l2l.host.trainer import training_step_arguments

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        batches: One with its index in the epoch for each micro-batch.
        divisor: What Lightning divides each micro-batch's loss by (``accumulate_grad_batches``).
    """

    batches: tuple[tuple[Any, int], ...]
    divisor: int


class _Cloneable(ABC):  # noqa: B024  (it only recognises)
    """Tensors, and batch objects that know how to copy themselves (PyTorch Geometric's, say)."""

    @classmethod
    def __subclasshook__(cls, subclass: type) -> Any:
        return callable(getattr(subclass, "clone", None)) or NotImplemented


def copied_batch(batch: Any) -> Any:
    """A copy that later in-place changes of the batch, its containers or its tensors, do not reach."""
    return apply_to_collection(
        batch, _Cloneable, lambda item: item.detach().clone() if isinstance(item, Tensor) else item.clone()
    )


class _CallTrainingStep(nn.Module):
    """``functional_call`` reaches ``forward`` only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, arguments: Mapping[str, Any]) -> Any:
        return self.module.training_step(*arguments.values())  # type: ignore[operator]


class TrainingStep:
    """``loss(parameters, window)``: mean training loss of a window's micro-batches at substituted parameters.

    Runs under the Trainer's precision context, in the modes (train or eval) that the module is in.

    Args:
        trainer: The running Trainer.
        module: The user's LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: nn.Module) -> None:
        self._trainer = trainer
        self._call = _CallTrainingStep(module)
        self._module = module

    def __call__(self, parameters: Mapping[str, Tensor], window: Window) -> Tensor:
        """The loss; buffers that the step writes are written in ``parameters``.

        Raises:
            StepSkippedError: ``training_step`` returned ``None``.
            TypeError: It returned something without a scalar loss.
        """
        substitutes = {f"module.{name}": tensor for name, tensor in parameters.items()}
        total: Tensor | None = None
        for batch, batch_index in window.batches:
            # A copy each time: the user's step may pop from a dictionary, or scale a tensor in place.
            arguments = training_step_arguments(self._trainer, self._module, copied_batch(batch), batch_index)
            with self._trainer.precision_plugin.train_step_context():
                output = call_with(self._call, substitutes, arguments)
            loss = _loss_of(output) / window.divisor
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if output is None:
        raise StepSkippedError(
            "training_step returned None, which skips a batch; LearnToLearn needs the loss to differentiate it. Return "
            "the loss, at the latest for the batches that it looks at."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise TypeError(
            f"training_step must return a scalar loss (or a dictionary with it under 'loss'), but it returned {found}. "
            "LearnToLearn differentiates that number: reduce the loss, for example with .mean()."
        )
    return loss


def owned_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the optimizer moves, and the module's buffers, both by name.

    Parameters that the optimizer does not own, and frozen ones, are in neither: the step reads the live ones.
    """
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if id(parameter) in owned and parameter.requires_grad
    }
    return dict(parameters), dict(module.named_buffers())


def joined(windows: Sequence[Window]) -> Window:
    """Several windows as one: the mean of their losses."""
    batches = tuple(batch for window in windows for batch in window.batches)
    return Window(batches, len(batches))
