"""The entry point for plain PyTorch: one call, one meta-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.evolution import evolution_strategies
from lightning_l2l.exact.forward import forward
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss, twice_differentiable
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.exact.processes import Processes
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.reverse import reverse, segmented
from lightning_l2l.exact.second_order import lacks_second_derivative
from lightning_l2l.learned.base import LearnedOptimizer

# Longer unrolls are differentiated in segments: about the square root of the memory, a third more time.
_LONGEST_REVERSE = 64
_MODES: dict[str, Callable[[InnerStep, Iterate, Sequence[Any], Any, Objective, str], tuple[MetaGradient, Iterate]]] = {
    "forward": forward,
    "reverse": reverse,
    "segmented": segmented,
}


def meta_gradient(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    learned: LearnedOptimizer,
    batches: Sequence[Any],
    meta_batch: Any,
    *,
    estimator: Unroll | EvolutionStrategies | None = None,
    state: Any = None,
    buffers: Mapping[str, Tensor] | None = None,
    gradient_transformation: GradientTransformation | None = None,
    processes: Processes | None = None,
) -> MetaGradient:
    """How a meta-objective after some training steps depends on the meta-parameters of a learned optimizer.

    Trains a copy of ``parameters`` for ``len(batches)`` steps with the learned optimizer, evaluates the loss on
    ``meta_batch`` and differentiates that number with respect to the learned optimizer's parameters, through every
    step and exactly to second order. Nothing that is passed in is changed. Random numbers that the loss draws come from
    the global generators.

    Loss and gradient are exact also where plain back-propagation over- or underflows, as long as the loss itself is in
    the number range; for a homogeneous task (``loss.homogeneity`` set, e.g. a :class:`~lightning_l2l.tasks.Quadratic`)
    with SGD even beyond that. Where the result cannot be computed, the gradients are NaN and ``diagnostics`` says why:
    check ``result.usable`` before applying them.

    Args:
        loss: ``loss(parameters, batch)`` gives a tensor of one number, differentiable twice. Its first argument is a
            dictionary with the names of ``parameters`` and ``buffers`` together, as ``torch.func.functional_call``
            takes it.
        parameters: What the inner optimizer moves. Floating-point tensors of any shape, by name.
        learned: The learned optimizer, e.g. ``LearnedStepSize().attach(...)``.
        batches: One batch for each inner step, passed to ``loss`` as they are.
        meta_batch: The batch that the meta-objective is evaluated on: held-out data, unless you know better.
        estimator: How the gradient is computed, and of which meta-objective; ``Unroll()`` by default, which takes
            evolution strategies where an operation turns out to have no second derivative.
        state: The inner optimizer's state to start from, e.g. from :func:`~lightning_l2l.functional.read_state`;
            ``None`` for a fresh optimizer.
        buffers: Tensors that the loss reads, and may write in place, by name; copied before every step.
        gradient_transformation: A stateless torchopt transformation of the inner gradients, e.g. a clipping from
            :mod:`lightning_l2l.exact.clip`.
        processes: In a data-parallel training, where each process has the same ``parameters`` and its own batches: how
            they reach each other. Then the result is that of all batches together (the mean of the losses over
            processes), on each process.

    Returns:
        Value, gradients by meta-parameter name, diagnostics.

    Raises:
        TypeError: The loss is not one floating-point number.
        ValueError: No batches, or another number of them than the estimator's ``steps``; no meta-parameters; a loss
            that depends on no parameter.
        NegativeLossError: The objective takes the logarithm of a negative loss; a ``ValueError``.
        RuntimeError: The mode that was asked for needs a second derivative that an operation does not have, or that
            PyTorch is known to compute wrongly.

    Example:
        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> def loss(parameters, batch):
        ...     return 0.5 * (parameters["w"] - batch).square().sum()
        >>> result = meta_gradient(
        ...     loss, {"w": torch.ones(1)}, learned, [torch.zeros(1)], torch.zeros(1),
        ...     estimator=Unroll(objective="naive"),
        ... )
        >>> round(result.value, 4)  # 0.5 * (1 - 0.1)**2
        0.405
        >>> round(result.gradients["learning_rate"].item(), 4)  # d/d log(0.1): -0.9 * 0.1
        -0.09
    """
    estimator = Unroll() if estimator is None else estimator
    check_batches(estimator, batches)
    check_problem(learned, parameters)
    if isinstance(estimator, EvolutionStrategies):
        if estimator.method != "es":
            raise ValueError(
                f"method={estimator.method!r} carries particles from one unroll of a training to the next, but here "
                f"the unroll stands alone. Use method='es', or lightning_l2l.exact.episodes.Episode for a training "
                "unroll by unroll."
            )
        step = InnerStep(loss, learned, gradient_transformation, processes=processes)
        start = step.start(parameters, state, buffers or {})
        with twice_differentiable():
            return evolution_strategies(step, start, batches, meta_batch, estimator)[0]
    linear = learned.scale_equivariant and gradient_transformation is None
    homogeneity = getattr(loss, "homogeneity", None) if linear else None
    step = InnerStep(loss, learned, gradient_transformation, estimator.second_order, homogeneity, processes)
    start = step.start(parameters, state, buffers or {})
    return unrolled(step, start, batches, meta_batch, estimator)[0]


def unrolled(
    step: InnerStep, start: Iterate, batches: Sequence[Any], meta_batch: Any, estimator: Unroll
) -> tuple[MetaGradient, Iterate]:
    """The exact meta-gradient, and the iterate after the unroll.

    Args:
        step: The inner training step.
        start: The iterate to start from.
        batches: One batch per inner step.
        meta_batch: The batch that the meta-objective is evaluated on.
        estimator: How the derivative is computed.

    Raises:
        RuntimeError: As for :func:`meta_gradient`.
    """
    mode, reason = _chosen_mode(estimator, step.learned, len(batches))
    before = RandomState.now({leaf.device for leaf in start.leaves()}) if estimator.mode == "auto" else None
    with twice_differentiable():  # once for all evaluations
        try:
            return _MODES[mode](step, start, batches, meta_batch, estimator.objective, reason)
        except RuntimeError as error:
            missing = lacks_second_derivative(error)
            if missing is None:
                raise
            if before is None:
                raise RuntimeError(
                    f"mode={mode!r} differentiates the training step twice, and {missing} cannot be. Use "
                    "EvolutionStrategies(), which needs no second derivative, Unroll(second_order=False), which leaves "
                    "it out (biased), or another operation."
                ) from error
        before.restore()
        strategy = EvolutionStrategies(objective=estimator.objective)
        reason = f"{missing} has no second derivative, and evolution strategies need none"
        return evolution_strategies(step, start, batches, meta_batch, strategy, reason=reason)


def check_problem(learned: LearnedOptimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a problem with nothing to learn or nothing to move.

    Raises:
        ValueError: No parameters, or no meta-parameters.
    """
    if not parameters:
        raise ValueError("parameters is empty: there is nothing for the inner optimizer to move.")
    if not any(tensor.requires_grad for tensor in learned.parameters()):
        raise ValueError(
            f"{type(learned).__name__} has no parameter that requires a gradient, so there is nothing to learn. "
            "A LearnedStepSize gets its parameters from attach(...)."
        )


def check_batches(estimator: Unroll | EvolutionStrategies, batches: Sequence[Any]) -> None:
    """Refuse batches that are not one for each step.

    Raises:
        ValueError: There are none, or another number than ``estimator.steps``.
    """
    if not batches:
        raise ValueError("batches is empty: a meta-gradient needs at least one training step to look at.")
    if estimator.steps not in (None, len(batches)):
        raise ValueError(
            f"{type(estimator).__name__}(steps={estimator.steps}) needs one batch for each step, but {len(batches)} "
            "were given. Leave steps out to unroll over as many steps as there are batches."
        )


def _chosen_mode(estimator: Unroll, learned: LearnedOptimizer, steps: int) -> tuple[str, str]:
    if estimator.mode != "auto":
        return estimator.mode, "asked for"
    count = sum(tensor.numel() for tensor in learned.parameters() if tensor.requires_grad)
    if count == 1:
        return "forward", "a single scalar meta-parameter: the cost of reverse, and memory that no step adds to"
    if steps <= _LONGEST_REVERSE:
        return "reverse", f"{count} scalar meta-parameters, {steps} steps"
    return "segmented", f"{count} scalar meta-parameters, {steps} steps: too many to keep the graph of each"
