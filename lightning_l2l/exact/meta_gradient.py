"""The entry point for plain PyTorch: one call, one meta-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.exact import estimators
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.inner_step import InnerStep, Iterate, Loss, twice_differentiable
from lightning_l2l.exact.objectives import Objective, check_objective
from lightning_l2l.exact.plan import choose_estimator
from lightning_l2l.exact.processes import Processes
from lightning_l2l.exact.random_state import RandomState
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.second_order import lacks_second_derivative
from lightning_l2l.learned.base import LearnedOptimizer

Estimator = Literal["auto", "forward", "reverse", "segmented", "es", "mixed"]

# These carry something from one window of an episode to the next.
_OVER_WINDOWS = ("truncated", "pes", "es_single")

_EXACT: dict[str, Callable[[InnerStep, Iterate, Sequence[Any], Any, Objective, str], tuple[MetaGradient, Iterate]]] = {
    "forward": estimators.forward,
    "reverse": estimators.reverse,
    "segmented": estimators.segmented,
}
_SAMPLED = {"es": estimators.es, "mixed": estimators.mixed}


def check_estimator(estimator: str) -> None:
    """Refuse an unknown estimator.

    Raises:
        ValueError: ``estimator`` is not one of the names.
    """
    if estimator in _OVER_WINDOWS:
        same = "'reverse'" if estimator == "truncated" else "'es'"
        raise ValueError(
            f"estimator={estimator!r} carries state from one window of a training to the next, but here every unroll "
            f"stands alone, and {estimator!r} would be the same as {same}. Use that, or "
            f"lightning_l2l.exact.windows.WindowEstimator({estimator!r}) in a loop over windows."
        )
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} is not known; choose one of {list(get_args(Estimator))}.")


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
    particles: Particles | None = None,
    processes: Processes | None = None,
) -> MetaGradient:
    """How a meta-objective after some training steps depends on the meta-parameters of a learned optimizer.

    Trains a copy of ``params`` for ``len(batches)`` steps with the learned optimizer, evaluates the loss on
    ``meta_batch`` and differentiates that number with respect to the learned optimizer's parameters, through every
    step and exactly to second order. Nothing that is passed in is changed. Random numbers that the loss draws come from
    the global generators.

    Loss and gradient are exact also where plain back-propagation over- or underflows, as long as the loss itself
    is in the number range; for a homogeneous task (``loss.homogeneity`` set, e.g. a
    :class:`~lightning_l2l.tasks.Quadratic`) with SGD even beyond that. Where the result cannot be computed, the
    gradients are NaN and ``diagnostics`` says why: check ``result.usable`` before applying them.

    Args:
        loss: ``loss(params, batch)`` gives a tensor of one number, differentiable twice. ``params`` is a dictionary
            with the names of ``params`` and ``buffers`` together, as ``torch.func.functional_call`` takes it.
        params: What the inner optimizer moves. Floating-point tensors of any shape, by name.
        learned: The learned optimizer, e.g. ``LearnedStepSize().attach(...)``.
        batches: One batch for each inner step, passed to ``loss`` as they are.
        meta_batch: The batch that the meta-objective is evaluated on: held-out data, unless you know better.
        objective: ``"log"``, ``"naive"``, ``"log_mean"`` or ``"naive_mean"``; see
            :mod:`lightning_l2l.exact.objectives`.
        estimator: How the gradient is computed (docs, "which estimator").
            ``"forward"``: exact, memory independent of the number of steps, cost proportional to the number of scalar
            meta-parameters. ``"reverse"``: exact, cost independent of that number, memory proportional to the number of
            steps. ``"segmented"``: the numbers of reverse with the memory of about ``sqrt(K)`` steps, for one more
            training step per step. ``"es"``: evolution strategies, an unbiased, noisy estimate for a smoothed
            objective that needs no second derivatives. ``"mixed"``: the inverse-variance mix of es and reverse.
            ``"auto"``: forward for up to two scalars, else reverse, or segmented where that does not fit; if an
            operation turns out to have no second derivative, es. ``diagnostics.reason`` says which and why.
        state: The inner optimizer's state to start from, e.g. from :func:`~lightning_l2l.functional.read_state`;
            ``None`` for a fresh optimizer.
        buffers: Tensors that the loss reads, and may write in place, by name; copied before every step.
        gradient_transformation: A stateless torchopt transformation of the inner gradients, e.g. a clipping from
            :mod:`lightning_l2l.exact.clip`.
        second_order: ``False`` leaves out the derivative of the inner gradients: cheaper and wrong in general.
        particles: For ``"es"`` and ``"mixed"``: how many, how far apart, how computed.
        processes: In a data-parallel training, where each process has the same ``params`` and its own batches: how they
            reach each other. Then the result is that of all batches together (the mean of the losses over processes),
            on each process. The particles of ``"es"`` and ``"mixed"`` are spread over them where the loss allows it
            (:mod:`~lightning_l2l.exact.estimators.over_processes`).

    Returns:
        Value, gradients by meta-parameter name, diagnostics.

    Raises:
        TypeError: The loss is not one floating-point number.
        ValueError: No batches, no meta-parameters, or a loss that depends on no parameter.
        NegativeLossError: The objective takes the logarithm of a negative loss; a ``ValueError``.
        RuntimeError: The estimator that was asked for needs a second derivative that an operation does not have.

    Example:
        >>> import torch
        >>> from lightning_l2l import LearnedStepSize
        >>> from lightning_l2l.functional import inner_optimizer
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
    step = InnerStep(loss, learned, gradient_transformation, second_order, homogeneity if linear else None, processes)
    start = step.start(params, state, buffers or {})
    name, reason = choose_estimator(learned, estimator, step, start, batches)
    before = RandomState.now({leaf.device for leaf in start.leaves()})
    try:
        return _estimate(name, step, start, batches, meta_batch, objective, reason, particles)
    except RuntimeError as error:
        missing = lacks_second_derivative(error)
        if missing is None or name == "es":
            raise
        if estimator != "auto":
            raise RuntimeError(
                f"estimator={name!r} differentiates the training step twice, and {missing} cannot be. Use "
                "estimator='es', which needs no second derivative, second_order=False, which leaves it out (biased), "
                "or another operation. lightning_l2l.check shows all operations of that kind."
            ) from error
        reason = f"{missing} has no second derivative, and evolution strategies need none"
    before.restore()
    return _estimate("es", step, start, batches, meta_batch, objective, reason, particles)


def _estimate(
    name: str,
    step: InnerStep,
    start: Iterate,
    batches: Sequence[Any],
    meta_batch: Any,
    objective: Objective,
    reason: str,
    particles: Particles | None,
) -> MetaGradient:
    with twice_differentiable():  # once for all evaluations
        if name in _SAMPLED:
            result, _ = _SAMPLED[name](step, start, batches, meta_batch, objective, reason, particles)
        else:
            result, _ = _EXACT[name](step, start, batches, meta_batch, objective, reason)
    return result
