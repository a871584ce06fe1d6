"""What the exact estimators cannot unroll, said before training starts: what, why, and what to do instead."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.functional import mirror
from lightning_l2l.host import lightning_api
from lightning_l2l.learned import LearnedHyperparameters, LearnedOptimizer, LearnedStepSize, LearnedTorchOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

WAY_OUT = "Or leave the estimator out: LearnToLearn() learns the learning rate of any optimizer, and unrolls nothing."
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "XLAStrategy")
_HOOKS_THAT_SEE_GRADIENTS = ("on_after_backward", "on_before_optimizer_step", "optimizer_step")


def prepare(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    estimator: Unroll | EvolutionStrategies,
    learned: LearnedHyperparameters | None,
) -> LearnedOptimizer:
    """What this fit learns, attached to the optimizer that ``configure_optimizers`` has just made.

    Args:
        trainer: The Trainer, in ``on_fit_start``.
        module: The user's module.
        estimator: How meta-gradients will be computed.
        learned: The user's template; it is copied.

    Raises:
        MisconfigurationException: Steps that cannot be unrolled, or values that cannot be learned.
    """
    _refuse(trainer, module, twice=isinstance(estimator, Unroll) and estimator.second_order)
    optimizer = lightning_api.real_optimizers(trainer)[0]
    if isinstance(optimizer, LearnedTorchOptimizer):
        if learned is not None:
            raise MisconfigurationException(
                f"The optimizer is a learned one already, {type(optimizer.learned).__name__}, whose weights "
                f"LearnToLearn goes on training. Leave learned={type(learned).__name__}() out."
            )
        assert isinstance(optimizer.learned, LearnedOptimizer)
        return optimizer.learned
    found = LearnedStepSize() if learned is None else copy.deepcopy(learned)
    try:
        return found.attach(mirror(optimizer, module.named_parameters()))
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"LearnToLearn cannot unroll this optimizer. {error} {WAY_OUT}") from error


def _refuse(trainer: pl.Trainer, module: pl.LightningModule, *, twice: bool) -> None:
    """Refuse steps that cannot be unrolled, or not differentiated twice.

    Raises:
        MisconfigurationException: With the reason, and the way out.
    """
    reasons = []
    if lightning_api.is_manual(module):
        reasons.append(
            "with manual optimization training_step steps the optimizer itself, so calling it would train your "
            "weights; lightning_l2l.meta_gradient serves loops of your own"
        )
    if lightning_api.takes_iterator(module):
        reasons.append("training_step(self, dataloader_iter) leaves no batch to remember: take `batch` instead")
    if _overrides(module, "configure_gradient_clipping"):
        reasons.append(
            "a configure_gradient_clipping of your own changes gradients in place, which has no derivative: use the "
            "Trainer's gradient_clip_val and gradient_clip_algorithm"
        )
    for hook in _HOOKS_THAT_SEE_GRADIENTS:
        code = getattr(getattr(module, hook), "__code__", None)
        if _overrides(module, hook) and any("clip_grad" in name for name in getattr(code, "co_names", ())):
            reasons.append(f"{hook} clips gradients in place, out of sight: use the Trainer's gradient_clip_val")
    sharded = any(hasattr(parameter, "to_local") for parameter in module.parameters())
    if sharded or any(lightning_api.is_a(trainer.strategy, name) for name in _SHARDED):
        reasons.append(
            f"with {type(trainer.strategy).__name__} no process holds whole parameters: use one device, or "
            "strategy='ddp'"
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        reasons.append(
            "a communication hook makes gradients other than the mean over processes: leave ddp_comm_hook out"
        )
    if module.device.type == "mps":
        reasons.append("meta-gradients are added up in float64, which 'mps' does not have: use accelerator='cpu'")
    children = dict(module.named_modules())
    if twice and (normalised := [name for name, child in children.items() if _has_weight_norm(child)]):
        reasons.append(
            f"PyTorch's second derivative of weight_norm is wrong, silently (here: {', '.join(normalised[:3])}): "
            "remove it with torch.nn.utils.parametrize.remove_parametrizations, or use LayerNorm"
        )
    if sparse := [n for n, c in children.items() if isinstance(c, (nn.Embedding, nn.EmbeddingBag)) and c.sparse]:
        reasons.append(f"sparse gradients have no derivative (here: {', '.join(sparse[:3])}): pass sparse=False")
    if reasons:
        raise MisconfigurationException(f"LearnToLearn cannot unroll this training: {'; '.join(reasons)}. {WAY_OUT}")


def _has_weight_norm(module: nn.Module) -> bool:
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None:
        return any(type(step).__name__ == "_WeightNorm" for steps in parametrizations.values() for step in steps)
    return any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())


def _overrides(module: pl.LightningModule, hook: str) -> bool:
    """Whether the user wrote this hook of the LightningModule."""
    # Not Lightning's `is_overridden`: that one does not know modules of the `pytorch_lightning` namespace.
    home = str(getattr(getattr(module, hook), "__module__", ""))
    return not home.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))
