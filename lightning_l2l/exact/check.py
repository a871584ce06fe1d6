"""A self-check that users run on their own module: is the meta-gradient of this loss right?

Second derivatives are used by few, so operations without one, or with a wrong one, go unnoticed until a learning rate
does not learn. Everything is compared with central differences here, in float64 where the loss allows it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from lightning_l2l.exact.differences import Differences
from lightning_l2l.exact.inner_step import Loss
from lightning_l2l.exact.second_order import custom_functions, known_wrong, not_twice_differentiable, wrong_modules
from lightning_l2l.exact.substitution import call_with
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.step_size import LearnedStepSize

# Central differences in float64 reach 1e-7 or better of smooth losses; a kink that is crossed costs a little more.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found. Print it.

    Attributes:
        passed: Nothing was found that makes the meta-gradient wrong or impossible.
        dtype: The floating-point type of the check.
        without_second_derivative: Operations that cannot be differentiated twice.
        known_wrong: Operations whose second derivative is known to be wrong, each with advice.
        custom_functions: The user's own ``torch.autograd.Function`` classes that the loss uses.
        without_gradient: Parameters that the loss does not depend on.
        random_error: Relative difference of the loss when it is computed again with the same random numbers.
        curvature_error: Relative error of a Hessian-vector product against central differences of the gradient.
        meta_gradient_error: Relative error of the meta-gradient against central differences of the meta-objective.
        tolerance: What the errors are compared with.
    """

    passed: bool
    dtype: torch.dtype
    without_second_derivative: tuple[str, ...]
    known_wrong: tuple[str, ...]
    custom_functions: tuple[str, ...]
    without_gradient: tuple[str, ...]
    random_error: float
    curvature_error: float
    meta_gradient_error: float
    tolerance: float

    def __str__(self) -> str:
        """One finding a line."""
        lines = [f"meta-gradient self-check in {str(self.dtype).removeprefix('torch.')}: "]
        lines[0] += "passed" if self.passed else "FAILED"
        lines.append(f"  relative error of the meta-gradient  {_error(self.meta_gradient_error)}")
        lines.append(
            f"  relative error of second derivatives {_error(self.curvature_error)} (allowed {self.tolerance:.0e})"
        )
        for name in self.without_second_derivative:
            lines.append(f"  {name}: no second derivative; only estimator='es' or second_order=False can be used")
        lines += [f"  {advice}" for advice in self.known_wrong]
        unclear = self.known_wrong or self.random_error > self.tolerance
        wrong = not self.curvature_error <= self.tolerance and not unclear
        if wrong and self.custom_functions:
            lines.append(
                f"  suspect: the torch.autograd.Function {', '.join(self.custom_functions)}, whose backward must "
                "itself be differentiable (no once_differentiable, no .detach() in it)"
            )
        elif wrong and not self.without_second_derivative:
            lines.append("  suspect: a .detach(), torch.no_grad or .item() on something that depends on the parameters")
        if self.random_error > self.tolerance:
            lines.append(
                "  the loss is not the same when it is computed again with the same random numbers: it draws from a "
                "generator of its own or changes something outside, so differences of it mean nothing"
            )
        if self.without_gradient:
            names = ", ".join(self.without_gradient[:3])
            lines.append(f"  {len(self.without_gradient)} parameter(s) that the loss does not depend on: {names}")
        return "\n".join(lines)


def check(
    subject: nn.Module | Loss,
    batch: Any,
    loss_function: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    meta_batch: Any = None,
    learned: LearnedOptimizer | None = None,
    steps: int = 3,
    learning_rate: float = 1e-2,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
) -> CheckReport:
    """Check derivatives of a module's or a loss's training step against finite differences.

    Costs about ten times ``steps`` training steps. Nothing that is passed in is changed; a module is copied.

    Args:
        subject: A module, or a loss as for :func:`lightning_l2l.meta_gradient` (then with ``params``). Of a module with
            a ``training_step`` (a LightningModule) that is the loss, unless ``loss_function`` is given; logging is
            switched off in it.
        batch: A batch to train on.
        loss_function: ``loss_function(module, batch)`` gives the loss, e.g. ``lambda m, b: F.mse_loss(m(b[0]), b[1])``.
        params: For a loss: what the inner optimizer moves, by name. Otherwise the module's parameters that require
            a gradient.
        buffers: For a loss: other tensors that it reads by name. Otherwise everything else of the module.
        meta_batch: Another batch, for the meta-objective; ``batch`` if not given.
        learned: The learned optimizer; a step size of plain SGD if not given.
        steps: Inner steps.
        learning_rate: Of that SGD.
        dtype: Parameters, buffers and batch are converted to it; ``None`` to check in their own types, for losses
            that insist on one.
        seed: Of the random numbers that the loss draws, and of the directions.

    Raises:
        TypeError: A loss without ``params``, or a module of which it is not known how it computes its loss.
        ValueError: No steps, no parameter that requires a gradient, or a loss that is not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> batch = (torch.randn(16, 4), torch.randn(16, 1))
        >>> report = check(model, batch, lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]))
        >>> report.passed, report.meta_gradient_error < 1e-6
        (True, True)
    """
    if isinstance(subject, nn.Module):
        loss, params, buffers = module_loss(subject, loss_function)
    elif params is None:
        raise TypeError(
            "check needs params, the tensors by name that the loss is called with, when it is given a loss. Or pass an "
            "nn.Module and a loss_function(module, batch)."
        )
    else:
        loss = subject
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: a meta-gradient needs a training step to look at.")
    if not params:
        raise ValueError(
            "There is no parameter that requires a gradient, so nothing is trained and nothing can be checked. "
            "Unfreeze what your optimizer moves (requires_grad_())."
        )
    batch, meta_batch, params, buffers = (
        _converted(tree, dtype) for tree in (batch, batch if meta_batch is None else meta_batch, params, buffers or {})
    )
    if learned is None:
        learned = LearnedStepSize("optimizer").attach(inner_optimizer(torch.optim.SGD, lr=learning_rate))
    differences = Differences(loss, params, buffers, [batch] * steps, meta_batch, learned, seed)
    value, gradients = differences.loss_and_gradients()
    if not bool(value.isfinite()):
        raise ValueError(
            f"The loss is {value.item()} at the start already, so there is no derivative to check. Look at the batch "
            "and at the parameters first."
        )
    missing = not_twice_differentiable(gradients.values())
    wrong = known_wrong(value) + (wrong_modules(subject) if isinstance(subject, nn.Module) else [])
    random_error = differences.random_error()
    curvature_error = differences.curvature_error()
    # An operation without a second derivative would only raise here what is already known.
    meta_error = math.nan if missing else differences.meta_gradient_error()
    kind = next(iter(params.values())).dtype
    tolerance = _TOLERANCE.get(kind, 0.2)
    # Not `>`: NaN fails as well.
    good = all(error <= tolerance for error in (random_error, curvature_error, meta_error))
    return CheckReport(
        passed=good and not missing and not wrong,
        dtype=kind,
        without_second_derivative=tuple(missing),
        known_wrong=tuple(wrong),
        custom_functions=tuple(custom_functions(value)),
        without_gradient=tuple(name for name, gradient in gradients.items() if gradient is None),
        random_error=random_error,
        curvature_error=curvature_error,
        meta_gradient_error=meta_error,
        tolerance=tolerance,
    )


class _ModuleLoss(nn.Module):
    """Lets ``functional_call`` reach a whole loss function, not only a module's forward."""

    def __init__(self, module: nn.Module, loss_function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._loss_function = loss_function

    def forward(self, batch: Any) -> Tensor:
        return self._loss_function(self.module, batch)


def module_loss(
    module: nn.Module, loss_function: Callable[[nn.Module, Any], Tensor] | None = None
) -> tuple[Loss, dict[str, Tensor], dict[str, Tensor]]:
    """A module's loss as a function of its tensors, with its parameters and buffers.

    Args:
        module: The module; it is copied.
        loss_function: ``loss_function(module, batch)``; a LightningModule's ``training_step`` if not given.

    Returns:
        ``loss(params, batch)``, the parameters that require a gradient, and all other tensors, by name.

    Raises:
        TypeError: No loss function, and no ``training_step``.
    """
    if loss_function is None:
        if not callable(getattr(module, "training_step", None)):
            raise TypeError(
                f"{type(module).__name__} has no training_step, so it is not known how it computes its loss. Pass "
                "loss_function, for example lambda module, batch: F.mse_loss(module(batch[0]), batch[1])."
            )
        loss_function = _training_step
    whole = _ModuleLoss(copy.deepcopy(module), loss_function)
    params = {name: tensor.detach() for name, tensor in whole.named_parameters() if tensor.requires_grad}
    rest = {name: tensor.detach() for name, tensor in whole.named_parameters() if not tensor.requires_grad}
    rest.update({name: tensor.detach() for name, tensor in whole.named_buffers()})

    def loss(parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        value: Tensor = call_with(whole, parameters, batch)
        return value

    return loss, params, rest


def _training_step(module: nn.Module, batch: Any) -> Tensor:
    with _silent(module):
        output = module.training_step(batch, 0)  # type: ignore[operator]
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return loss


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """``self.log`` needs a Trainer, and there is none. On the instance, it hides the class's method."""
    names = [name for name in ("log", "log_dict") if callable(getattr(module, name, None))]
    for name in names:
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]


def _converted(tree: Any, dtype: torch.dtype | None) -> Any:
    def convert(leaf: Any) -> Any:
        if dtype is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype)

    return optree.tree_map(convert, tree)


def _error(value: float) -> str:
    return "not computed" if math.isnan(value) else f"{value:.1e}"
