"""What LearnToLearn cannot work with, said before training starts: what, why, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2l.functional import mirror
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.trainer import changes_averaging, is_stub, live_optimizer, loads_from_iterator, overrides
from lightning_l2l.learned import LearnedOptimizer, LearnedTorchOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The default of LearnToLearn is for log step sizes; weights of a network of this scale are gone after one such step.
_LARGEST_STEP_OF_WEIGHTS = 0.05

# By class name, since `pytorch_lightning` has its own copies of these classes.
_WHOLE_PARAMETERS = ("SingleDeviceStrategy", "DDPStrategy")
_REASONS = {
    "DeepSpeedStrategy": "DeepSpeed's engine owns parameters, gradients and optimizer",
    "FSDPStrategy": "each process holds a shard of the parameters only",
    "ModelParallelStrategy": "each process holds a part of the parameters only",
    "XLAStrategy": "several XLA devices were never tried",
}


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse what can be seen in ``setup``: the device, and the way the training is distributed.

    Raises:
        MisconfigurationException: A device without double precision, parameters that are not whole on each process, or
            gradients that are not the plain mean over the processes.
    """
    strategy = trainer.strategy
    names = {base.__name__ for base in type(strategy).__mro__}
    reasons = [reason for name, reason in _REASONS.items() if name in names]
    if reasons or not names & set(_WHOLE_PARAMETERS):
        reason = reasons[0] if reasons else "it is not known whether each process holds the whole parameters"
        raise MisconfigurationException(
            f"LearnToLearn cannot be used with {type(strategy).__name__}: {reason}, and a look-ahead replaces whole "
            "parameters by name. Use a single device or strategy='ddp'."
        )
    if "SingleDeviceStrategy" in names and strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "LearnToLearn adds up in float64, which Apple's GPUs (the device 'mps') do not have. Use "
            "Trainer(accelerator='cpu')."
        )
    if changes_averaging(strategy):
        raise MisconfigurationException(
            "LearnToLearn cannot be used with a communication hook of DDP or with post-local SGD: the gradients would "
            "not be the plain mean over the processes, which is what a look-ahead takes. Leave ddp_comm_hook, "
            "ddp_comm_state, ddp_comm_wrapper and model_averaging_period out."
        )


def refuse_several(trainer: pl.Trainer, kind: type) -> None:
    """Refuse a second callback of the same kind that Lightning let through, such as one of a subclass.

    Args:
        trainer: The Trainer.
        kind: The class of the callback.

    Raises:
        MisconfigurationException: There are two.
    """
    found = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"There are {len(found)} LearnToLearn callbacks in this Trainer ({', '.join(found)}), and each would move "
            "the same learning rates. Keep one: it learns a rate for each parameter group."
        )


def refuse_module(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what can be seen once optimizers exist, in ``on_fit_start``.

    Raises:
        MisconfigurationException: Manual optimization, no optimizer, a step that loads its own data, weight
            normalisation, or an overridden gradient clipping.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "LearnToLearn needs automatic optimization: in manual mode training_step steps the optimizer itself, so "
            "calling it for an unroll would train your weights. Remove `self.automatic_optimization = False`, or "
            "use lightning_l2l.meta_gradient in your own loop."
        )
    if not trainer.optimizers or is_stub(live_optimizer(trainer)):
        raise MisconfigurationException(
            "LearnToLearn has no optimizer to work on: configure_optimizers returned None. Return a torch.optim "
            "optimizer from it."
        )
    if loads_from_iterator(module):
        raise MisconfigurationException(
            "LearnToLearn cannot be used with training_step(self, dataloader_iter): no batch exists outside the step "
            "that could be remembered for the unroll. Take `batch` (and `batch_idx`) instead."
        )
    normalised = [name for name, child in module.named_modules() if _has_weight_norm(child)]
    if normalised:
        raise MisconfigurationException(
            f"LearnToLearn cannot be used with weight_norm (here: {', '.join(normalised[:3])}): PyTorch's second "
            "derivative of it is wrong, silently, so every meta-gradient would be. Remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations, or use LayerNorm."
        )
    if overrides(module, "configure_gradient_clipping"):
        raise MisconfigurationException(
            "LearnToLearn cannot unroll a configure_gradient_clipping of your own: it changes gradients in place, "
            "which has no derivative. Use gradient_clip_val and gradient_clip_algorithm of the Trainer alone."
        )


def _has_weight_norm(module: nn.Module) -> bool:
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None:
        return any(type(step).__name__ == "_WeightNorm" for steps in parametrizations.values() for step in steps)
    hooks = module._forward_pre_hooks.values()
    return any(type(hook).__name__ == "WeightNorm" for hook in hooks)


def refuse_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Refuse an optimizer without a mirror, and sparse gradients.

    Raises:
        TypeError: No mirror; the message lists those that have one and how to add another.
        MisconfigurationException: An embedding with sparse gradients.
    """
    if not isinstance(optimizer, LearnedTorchOptimizer):
        mirror(optimizer, module.named_parameters())
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    sparse = [name for name, child in module.named_modules() if isinstance(child, embeddings) and child.sparse]
    if sparse:
        raise MisconfigurationException(
            f"LearnToLearn cannot be used with sparse gradients (here: {', '.join(sparse[:3])}). Pass sparse=False."
        )


def refuse_second_learned(
    optimizer: torch.optim.Optimizer, learned: LearnedOptimizer | None, settings: Settings
) -> None:
    """Refuse settings that do not fit a live optimizer that is itself a learned one.

    Raises:
        MisconfigurationException: Another ``learned``, or a meta-step that is far too large for weights.
    """
    if not isinstance(optimizer, LearnedTorchOptimizer):
        return
    kind = type(optimizer.learned).__name__
    if learned is not None:
        raise MisconfigurationException(
            f"The optimizer is a learned one already, {kind}, and LearnToLearn goes on training it. Leave "
            f"learned={type(learned).__name__}() out."
        )
    if settings.meta_learning_rate > _LARGEST_STEP_OF_WEIGHTS and optimizer.learned.scaled_rate(1.0) is None:
        raise MisconfigurationException(
            f"LearnToLearn(meta_learning_rate={settings.meta_learning_rate}) is a step for the logarithm of a learning "
            f"rate. Here it would move the weights of {kind}, and destroy them: choose 1e-3 or less (0 only observes)."
        )
