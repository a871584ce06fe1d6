"""Every name of the running Trainer that we use, public or not, behind a name of our own.

Checked against Lightning 2.6.6. What starts with an underscore there may move in a minor release: it is used here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

if TYPE_CHECKING:
    import lightning.pytorch as pl


def training_step_arguments(trainer: pl.Trainer, module: nn.Module, batch: Any, batch_index: int) -> Mapping[str, Any]:
    """The arguments that the training loop would pass: ``training_step(self, batch)`` without an index is legal."""
    arguments = {"batch": batch}
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):  # type: ignore[arg-type]
        arguments["batch_idx"] = batch_index
    return arguments


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the current micro-batch will not step the optimizer."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def planned_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps that this fit will take in all; ``inf`` where nobody knows. To be asked once loaders exist."""
    batches = trainer.num_training_batches
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if batches != math.inf and trainer.max_epochs is not None and trainer.max_epochs >= 0:
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        steps = min(steps, per_epoch * trainer.max_epochs)
    return float(steps)


def loads_from_iterator(module: nn.Module) -> bool:
    """Whether ``training_step`` takes the data iterator itself, so that no batch exists outside it."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)  # type: ignore[arg-type]


def validation_loaders(trainer: pl.Trainer) -> Any:
    """What the user passed for validation, in whatever collection; ``None`` if validation is off.

    Lightning builds the loaders in the first epoch that validates; this does it earlier where that is later.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and trainer.enable_validation:
        with _validating(trainer):
            loop.setup_data()
    return trainer.val_dataloaders


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    # Lightning's own switch around a validation inside training; transfer hooks ask `self.trainer.training`.
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
        connector._first_loop_iter = first


def moved_batch(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *, held_out: bool) -> Any:
    """A raw batch as the loops would hand it to the user's step: converted, transferred, hooks applied."""
    if held_out:
        with _validating(trainer):
            return moved_batch(trainer, module, batch, held_out=False)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def live_optimizer(trainer: pl.Trainer) -> torch.optim.Optimizer:
    """The one optimizer of automatic optimization."""
    return trainer.optimizers[0]


def is_stub(optimizer: Any) -> bool:
    """Whether ``configure_optimizers`` returned nothing and Lightning put its stand-in there."""
    return type(optimizer).__name__ == "_MockOptimizer"
