"""The entry point for plain PyTorch: one call, one meta-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchopt.base import GradientTransformation

from lightning_l2l.core import estimators
from lightning_l2l.core.inner_step import InnerStep, Iterate, Loss
from lightning_l2l.core.objectives import Objective, check_objective
from lightning_l2l.core.result import MetaGradient
from lightning_l2l.optimizers.base import LearnedOptimizer

Estimator = Literal["auto", "forward", "reverse"]

# Forward mode pays one Hessian-vector product per scalar and step, reverse mode about as much for all of them.
_LARGEST_FORWARD = 2

_ESTIMATORS: dict[
    str, Callable[[InnerStep, Iterate, Sequence[Any], Any, Objective, str], tuple[MetaGradient, Iterate]]
] = {
    "forward": estimators.forward,
    "reverse": estimators.reverse,
}


def check_estimator(estimator: str) -> None:
    """Refuse an unknown estimator.

    Raises:
        ValueError: ``estimator`` is not one of the names.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} is not known; choose one of {list(get_args(Estimator))}.")


def choose_estimator(learned: nn.Module, estimator: Estimator) -> tuple[str, str]:
    """The estimator that ``"auto"`` stands for, and why.

    Args:
        learned: The learned optimizer; its parameters that require a gradient are counted.
        estimator: The name asked for.

    Returns:
        The name of an estimator and a sentence.
    """
    if estimator != "auto":
        return estimator, "asked for"
    count = sum(tensor.numel() for tensor in learned.parameters() if tensor.requires_grad)
    if count <= _LARGEST_FORWARD:
        return "forward", f"{count} scalar meta-parameter(s): memory does not grow with the unroll"
    return "reverse", f"{count} scalar meta-parameters: one backward pass serves all of them"


def meta_gradient(
    loss: Loss,
    params: Mapping[str, Tensor],
    learned: LearnedOptimizer,
    batches: Sequence[Any],
    meta_batch: Any,
    *,
    objective: Objective = "log",
    estimator: Estimator = "auto",
    state: Any = None,
    buffers: Mapping[str, Tensor] | None = None,
    gradient_transformation: GradientTransformation | None = None,
    second_order: bool = True,
) -> MetaGradient:
    """How a meta-objective after some training steps depends on the meta-parameters of a learned optimizer.

    Trains a copy of ``params`` for ``len(batches)`` steps with the learned optimizer, evaluates the loss on
    ``meta_batch`` and differentiates that number with respect to the learned optimizer's parameters, through every
    step and exactly to second order. Nothing that is passed in is changed. Random numbers that the loss draws come from
    the global generators.

    Loss and gradient are exact also where plain back-propagation over- or underflows, as long as the loss itself
    is in the number range; for a homogeneous task (``loss.homogeneity`` set, e.g. a
    :class:`~lightning_l2l.tasks.Quadratic`) with SGD even beyond that. Where the result cannot be computed, the gradients
    are NaN and ``diagnostics`` says why: check ``result.usable`` before applying them.

    Args:
        loss: ``loss(params, batch)`` gives a tensor of one number, differentiable twice. ``params`` is a dictionary with
            the names of ``params`` and ``buffers`` together, as ``torch.func.functional_call`` takes it.
        params: What the inner optimizer moves. Floating-point tensors of any shape, by name.
        learned: The learned optimizer, e.g. ``LearnedStepSize().attach(...)``.
        batches: One batch for each inner step, passed to ``loss`` as they are.
        meta_batch: The batch that the meta-objective is evaluated on: held-out data, unless you know better.
        objective: ``"log"``, ``"naive"``, ``"log_mean"`` or ``"naive_mean"``; see
            :mod:`lightning_l2l.core.objectives`.
        estimator: ``"forward"`` (memory independent of the number of steps, cost proportional to the number of scalar
            meta-parameters), ``"reverse"`` (cost independent of that number, memory proportional to the
            number of steps) or ``"auto"``.
        state: The inner optimizer's state to start from, e.g. from :func:`~lightning_l2l.core.inner.read_state`;
            ``None`` for a fresh optimizer.
        buffers: Tensors that the loss reads, and may write in place, by name; copied before every step.
        gradient_transformation: A stateless torchopt transformation of the inner gradients, e.g. a clipping from
            :mod:`lightning_l2l.core.clip`.
        second_order: ``False`` leaves out the derivative of the inner gradients: cheaper and wrong in general.

    Returns:
        Value, gradients by meta-parameter name, diagnostics.

    Raises:
        TypeError: The loss is not one floating-point number.
        ValueError: No batches, no meta-parameters, a loss that depends on no parameter, or the logarithm of a
            negative loss.

    Example:
        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.core.inner import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> def loss(params, batch):
        ...     return 0.5 * (params["w"] - batch).square().sum()
        >>> result = meta_gradient(
        ...     loss, {"w": torch.ones(1)}, learned, [torch.zeros(1)], torch.zeros(1), objective="naive"
        ... )
        >>> round(result.value, 4)  # 0.5 * (1 - 0.1)**2
        0.405
        >>> round(result.gradients["learning_rate"].item(), 4)  # d/d log(0.1): -0.9 * 0.1
        -0.09
    """
    check_objective(objective)
    check_estimator(estimator)
    if not batches:
        raise ValueError("batches is empty: a meta-gradient needs at least one training step to look at.")
    if not params:
        raise ValueError("params is empty: there is nothing for the inner optimizer to move.")
    if not any(tensor.requires_grad for tensor in learned.parameters()):
        raise ValueError(
            f"{type(learned).__name__} has no parameter that requires a gradient, so there is nothing to learn. "
            "A LearnedStepSize gets its parameters from attach(...)."
        )
    homogeneity = getattr(loss, "homogeneity", None)
    linear = learned.scale_equivariant and gradient_transformation is None
    step = InnerStep(loss, learned, gradient_transformation, second_order, homogeneity if linear else None)
    name, reason = choose_estimator(learned, estimator)
    start = step.start(params, state, buffers or {})
    result, _ = _ESTIMATORS[name](step, start, batches, meta_batch, objective, reason)
    return result
