"""Every name of the running Trainer that we use, public or not, behind a name of our own.

Checked against Lightning 2.6.6. What starts with an underscore there may move in a minor release: it is used here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_l2l.host.isolation import isolated_random_state

if TYPE_CHECKING:
    import lightning.pytorch as pl


def training_step_arguments(trainer: pl.Trainer, module: nn.Module, batch: Any, batch_index: int) -> Mapping[str, Any]:
    """The arguments that the training loop would pass: ``training_step(self, batch)`` without an index is legal."""
    arguments = {"batch": batch}
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):  # type: ignore[arg-type]
        arguments["batch_idx"] = batch_index
    return arguments


def loss_scale(trainer: pl.Trainer) -> float:
    """What the loss was multiplied by before the backward pass, in mixed half precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def planned_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps that this fit will take in all; ``inf`` where nobody knows. To be asked once loaders exist."""
    batches = trainer.num_training_batches
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if batches != math.inf and trainer.max_epochs is not None and trainer.max_epochs >= 0:
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        steps = min(steps, per_epoch * trainer.max_epochs)
    return float(steps)


def passes(trainer: pl.Trainer, steps: float) -> float:
    """How often so many optimizer steps see each training batch; 0 where there is no end of them."""
    return steps * trainer.accumulate_grad_batches / trainer.num_training_batches


def loads_from_iterator(module: nn.Module) -> bool:
    """Whether ``training_step`` takes the data iterator itself, so that no batch exists outside it."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)  # type: ignore[arg-type]


def validation_loaders(trainer: pl.Trainer) -> Any:
    """What the user passed for validation, in whatever collection; ``None`` if validation is off.

    Lightning builds the loaders in the first epoch that validates. Where that is later they are built here once more,
    and dropped again: the run builds its own when it is due, with the random numbers that it would have had.
    """
    if trainer.val_dataloaders is not None or not trainer.enable_validation:
        return trainer.val_dataloaders
    loop = trainer.fit_loop.epoch_loop.val_loop
    last_reload = loop._last_val_dl_reload_epoch
    with isolated_random_state(0), _validating(trainer):
        loop.setup_data()
    loaders = trainer.val_dataloaders
    loop._combined_loader = None
    loop._last_val_dl_reload_epoch = last_reload
    return loaders


def overfitted_batches(trainer: pl.Trainer, *, held_out: bool) -> int | None:
    """To how many batches ``overfit_batches`` restricts the data; ``None`` without it."""
    if not getattr(trainer, "overfit_batches", 0):  # set dynamically by Lightning
        return None
    numbers = trainer.num_val_batches if held_out else [trainer.num_training_batches]
    return int(numbers[0]) if numbers and math.isfinite(numbers[0]) and numbers[0] > 0 else None


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


def peak_rates(trainer: pl.Trainer, scheduled: Sequence[float]) -> list[float]:
    """The largest learning rate that each group had, has now (``scheduled``), or will reach in a cyclic schedule."""
    groups = live_optimizer(trainer).param_groups
    peaks = [
        float(max(rate, group.get("initial_lr", 0.0), group.get("max_lr", 0.0)))
        for group, rate in zip(groups, scheduled, strict=True)
    ]
    for config in trainer.lr_scheduler_configs:
        largest = getattr(config.scheduler, "max_lrs", None)  # CyclicLR keeps them to itself
        if largest is not None and len(largest) == len(peaks):
            peaks = [max(pair) for pair in zip(peaks, largest, strict=True)]
    return peaks


def overrides(module: nn.Module, hook: str) -> bool:
    """Whether the user wrote this hook of the LightningModule."""
    # Not Lightning's `is_overridden`: that one does not know modules of the `pytorch_lightning` namespace.
    method = getattr(module, hook)
    home = str(getattr(method, "__module__", ""))
    return not home.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))


def changes_averaging(strategy: Any) -> bool:
    """Whether a DDP strategy was asked for something else than the mean of the gradients over the processes."""
    names = ("_ddp_comm_hook", "_ddp_comm_state", "_ddp_comm_wrapper", "_model_averaging_period")
    return any(getattr(strategy, name, None) is not None for name in names)


def is_stub(optimizer: Any) -> bool:
    """Whether ``configure_optimizers`` returned nothing and Lightning put its stand-in there."""
    return type(optimizer).__name__ == "_MockOptimizer"


def log_on_step(
    trainer: pl.Trainer, module: pl.LightningModule, name: str, value: torch.Tensor, prog_bar: bool
) -> None:
    """``module.log(name, value, prog_bar=prog_bar, on_step=True)``, at a tenth of the cost where the name is known.

    Lightning 2.6.6 copies all that a metric holds each time that one is logged, to move it where the value is: 0.35 ms,
    a sixth of a training step of a small network.
    """
    connector, results, hook = trainer._logger_connector, trainer._results, module._current_fx_name
    key = f"{hook}.{name}"
    if results is None or hook is None or key not in results:
        module.log(name, value, prog_bar=prog_bar, on_step=True)
        return
    if connector.should_reset_tensors(hook):  # the first one of this hook in an epoch
        results.reset(metrics=False, fx=hook)
    results.update_metrics(key, value, 1)  # the size of the batch matters to means over an epoch only
    connector._current_fx = hook
