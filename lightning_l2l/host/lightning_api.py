"""Every name of the running Trainer that we use, public or not, behind a name of our own.

Checked against Lightning 2.2 to 2.6, in both namespaces: classes are told by name, since ``pytorch_lightning`` has its
own copies. What starts with an underscore in Lightning may move in a minor release: it is used here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import IterableDataset

from lightning_l2l.preserve import preserved_random_state

if TYPE_CHECKING:
    import lightning.pytorch as pl


def is_a(value: Any, name: str) -> bool:
    """Whether a class of this name is among the bases of the value's class."""
    kind: Any = type(value)
    return name in _base_names(kind)


@cache
def _base_names(kind: Any) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__)


def training_step_arguments(module: nn.Module, batch: Any, index: int = 0) -> Mapping[str, Any]:
    """The arguments that the training loop would pass: ``training_step(self, batch)`` without an index is legal."""
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):  # type: ignore[arg-type]
        return {"batch": batch, "batch_idx": index}
    return {"batch": batch}


def takes_iterator(module: nn.Module) -> bool:
    """Whether ``training_step`` takes the data iterator itself, so that no batch exists outside it."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)  # type: ignore[arg-type]


def loss_scale(trainer: pl.Trainer) -> float:
    """What the loss is multiplied by before the backward pass, in mixed half precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def planned_steps(trainer: pl.Trainer, steps: int = 0, epoch: int = 0) -> float:
    """Optimizer steps that this fit will take in all; ``inf`` where nobody knows. To be asked once loaders exist.

    Args:
        trainer: The Trainer.
        steps: Those before the epoch.
        epoch: The first epoch that is as long as the present one.
    """
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    batches = trainer.num_training_batches
    if batches != math.inf and trainer.max_epochs is not None and trainer.max_epochs >= 0:
        most = min(most, steps + steps_of_an_epoch(trainer) * (trainer.max_epochs - epoch))
    return float(most)


def steps_of_an_epoch(trainer: pl.Trainer) -> float:
    """Optimizer steps of the present epoch; ``inf`` where nobody knows."""
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if batches != math.inf else math.inf


def passes(trainer: pl.Trainer) -> int:
    """How often the training has seen all of its data; 0 for a stream, whose examples are new in every epoch."""
    loader, _ = first_loader(trainer.train_dataloader)
    dataset = getattr(loader, "dataset", None)
    return 0 if dataset is None or isinstance(dataset, IterableDataset) else trainer.current_epoch


def has_schedule(trainer: pl.Trainer) -> bool:
    """Whether ``configure_optimizers`` returned a learning rate scheduler."""
    return bool(trainer.lr_scheduler_configs)


def is_manual(module: pl.LightningModule) -> bool:
    """Whether ``training_step`` steps the optimizers itself."""
    return not module.automatic_optimization


def real_optimizers(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
    """The optimizers of the run; none where ``configure_optimizers`` returned nothing."""
    return [optimizer for optimizer in trainer.optimizers if type(optimizer).__name__ != "_MockOptimizer"]


def refuse_several(trainer: pl.Trainer, kind: type) -> None:
    """Refuse a second callback of the same kind that Lightning let through, such as one of a subclass.

    Raises:
        MisconfigurationException: There are two.
    """
    found = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"There are {len(found)} LearnToLearn callbacks in this Trainer ({', '.join(found)}), and each would move "
            "the same learning rates. Keep one: it learns a rate for each parameter group."
        )


def refuse(trainer: pl.Trainer) -> None:
    """Refuse what would be wrong, once there are optimizers.

    Raises:
        MisconfigurationException: No optimizer, or one whose steps an engine makes.
    """
    if not real_optimizers(trainer):
        raise MisconfigurationException(
            "LearnToLearn has no optimizer to work on: configure_optimizers returned None. Return a torch.optim "
            "optimizer from it."
        )
    if is_a(trainer.strategy, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            "LearnToLearn cannot be used with DeepSpeed: its engine keeps gradients and steps to itself, so there is "
            "nothing to measure. Use strategy='ddp', or FSDP2 by ModelParallelStrategy."
        )


def refuse_averages(trainer: pl.Trainer) -> None:
    """Refuse what would not return the averages that the tuners keep.

    Raises:
        MisconfigurationException: Another callback returns its own, or the strategy loads checkpoints by itself.
    """
    others = [
        type(callback).__name__
        for callback in getattr(trainer, "callbacks", ())
        if is_a(callback, "WeightAveraging") or is_a(callback, "StochasticWeightAveraging")
    ]
    if others:
        raise MisconfigurationException(
            f"LearnToLearn(average_weights=True) and {others[0]} are in one Trainer, and each would put its own "
            "average in the place of the weights. Keep one of them."
        )
    if is_a(trainer.strategy, "FSDPStrategy"):
        raise MisconfigurationException(
            "LearnToLearn(average_weights=True) cannot resume the flattened parameters of FSDPStrategy. Use FSDP2 by "
            "ModelParallelStrategy, or leave average_weights out."
        )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the strategy reads and loads the parts of sharded parameters by itself (FSDP2)."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def whole_state(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """The module's state for the part of a checkpoint that the first process writes: of whole tensors."""
    if not is_sharded(trainer):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(_model(trainer), options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state(trainer: pl.Trainer, module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Load what :func:`whole_state` returned, on every process."""
    if not is_sharded(trainer):
        module.load_state_dict(state, strict=module.strict_loading)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=module.strict_loading)
    set_model_state_dict(_model(trainer), state, options=options)


def _model(trainer: pl.Trainer) -> nn.Module:
    model = trainer.strategy.model
    assert model is not None
    return model


def forget_gathered(module: nn.Module) -> None:
    """Drop whole parameters that FSDP2 keeps from the last forward pass: they would hide that their shards moved."""
    for child in module.modules():
        if is_a(child, "FSDPModule"):
            child.reshard()  # type: ignore[operator]


def first_loader(loaders: Any) -> tuple[Any, int]:
    """The first loader of a loader, list, dictionary or ``CombinedLoader``, and how many there are."""
    if is_a(loaders, "CombinedLoader"):
        loaders = loaders.flattened
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return (first_loader(loaders[0])[0], len(loaders)) if loaders else (None, 0)
    return loaders, int(loaders is not None)


def validation_loaders(trainer: pl.Trainer) -> Any:
    """What the user passed for validation, in whatever collection; ``None`` if validation is off.

    Lightning builds the loaders in the first epoch that validates. Where that is later they are built here once more,
    and dropped again: the run builds its own when it is due, with the random numbers that it would have had.
    """
    if trainer.val_dataloaders is not None or not trainer.enable_validation:
        return trainer.val_dataloaders
    loop = trainer.fit_loop.epoch_loop.val_loop
    last_reload = loop._last_val_dl_reload_epoch
    with preserved_random_state(0), _validating(trainer):
        loop.setup_data()
    loaders = trainer.val_dataloaders
    loop._combined_loader = None
    loop._last_val_dl_reload_epoch = last_reload
    return loaders


def overfitted_batches(trainer: pl.Trainer) -> int | None:
    """To how many validation batches ``overfit_batches`` restricts the data; ``None`` without it."""
    if not getattr(trainer, "overfit_batches", 0):  # set dynamically by Lightning
        return None
    numbers = trainer.num_val_batches
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


def moved_batch(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A raw validation batch as the validation loop would hand it over: converted, transferred, hooks applied."""
    with _validating(trainer):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def run_training_step(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int = 0
) -> torch.Tensor | None:
    """The loss that the user's ``training_step`` returns for a batch, with its graph; ``None`` if it skips the batch.

    A wrapper that reduces gradients (DDP) is passed by, since it would wait for a backward pass of all processes; a
    wrapper that gathers parameters (FSDP) is not.
    """
    arguments = training_step_arguments(module, batch, index)
    if is_a(trainer.strategy, "DDPStrategy"):
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments.values())
    else:
        output = trainer.strategy.training_step(*arguments.values())
    if isinstance(output, Mapping):
        output = output.get("loss")
    return output


def show_last_rates(trainer: pl.Trainer) -> None:
    """``scheduler.get_last_lr()`` says what the groups show."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def averages(trainer: pl.Trainer) -> list[torch.Tensor]:
    """How many states each average of the weights holds that a callback keeps; at zero it starts afresh.

    ``WeightAveraging`` counts in the averaged model, ``StochasticWeightAveraging`` itself.
    """
    owners = [
        owner
        for callback in getattr(trainer, "callbacks", ())
        for owner in (callback, getattr(callback, "_average_model", None))
    ]
    counts = [getattr(owner, "n_averaged", None) for owner in owners]
    return [count for count in counts if isinstance(count, torch.Tensor)]


def log_on_step(
    trainer: pl.Trainer, module: pl.LightningModule, name: str, value: torch.Tensor, prog_bar: bool = False
) -> None:
    """``module.log(name, value, prog_bar=prog_bar, on_step=True)``, at a tenth of the cost where the name is known.

    Lightning 2.6.6 copies all that a metric holds each time that one is logged, to move it where the value is: 0.35 ms,
    a sixth of a training step of a small network.
    """
    connector, results, hook = trainer._logger_connector, trainer._results, module._current_fx_name
    key = f"{hook}.{name}"
    if results is None or hook is None or key not in results:
        # The batch size, where training_step takes an iterator, can only be told; it matters to means only.
        module.log(name, value, prog_bar=prog_bar, on_step=True, batch_size=1)
        return
    if connector.should_reset_tensors(hook):  # the first one of this hook in an epoch
        results.reset(metrics=False, fx=hook)
    results.update_metrics(key, value, 1)  # the size of the batch matters to means over an epoch only
    connector._current_fx = hook
