"""The update rule of one tensor, and the arithmetic that all rules share.

A rule is the arithmetic of one step of a ``torch.optim`` optimizer as a pure function: out of place, differentiable
twice and in forward mode, with hyperparameters that may be tensors. The seven rules are in ``optimizers.py``, what
connects them with a live optimizer is in ``mirror.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Hyperparameters = Mapping[str, Any]
State = dict[str, Any]
Update = Callable[[Tensor, Tensor, Mapping[str, Any], Hyperparameters], tuple[Tensor, State]]


@dataclass(frozen=True)
class Rule:
    """How an optimizer moves one tensor.

    Attributes:
        update: ``update(parameter, gradient, state, hyperparameters) -> (delta, new_state)``. ``delta`` is *added* to
            the parameter. ``state`` has the keys of ``torch.optim``'s own state; ``step`` is a Python int, other
            entries are tensors in the parameter's shape or Python numbers. A missing entry means that the first step
            is still to come. Nothing may be modified in place. A hyperparameter named in ``learnable`` is a Python
            number or a 0-dim tensor; :func:`times` and the functions below it accept both.
        defaults: The hyperparameters that ``update`` reads, by their key in ``torch.optim``'s parameter groups
            (``betas`` as ``beta1`` and ``beta2``), with the value to take where a group lacks the key.
        learnable: Those that may be tensors.
        elementwise: Every element is treated on its own, so that tensors may be laid end to end. ``False`` is always
            right, and slower with many small tensors.
        homogeneous: ``delta`` and ``new_state`` are homogeneous of degree one in (parameter, gradient, state),
            whatever the hyperparameters: all three times c give both times c. True for SGD.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional.optimizers import SGD
        >>> settings = {**SGD.defaults, "lr": torch.tensor(0.5, requires_grad=True)}
        >>> delta, state = SGD.update(torch.ones(2), torch.tensor([1.0, 2.0]), {}, settings)
        >>> delta.tolist(), state
        ([-0.5, -1.0], {})
    """

    update: Update
    defaults: Mapping[str, Any]
    learnable: tuple[str, ...] = ("lr",)
    elementwise: bool = False
    homogeneous: bool = False


def coefficient(value: Any, like: Tensor) -> Any:
    """A coefficient that does not promote ``like``: one of as many dimensions would, so it is cast."""
    if isinstance(value, Tensor) and (value.dim() > 0 or like.dim() == 0):
        return value.to(like.dtype)
    return value


def times(tensor: Tensor, value: Number) -> Tensor:
    """``tensor * value`` in the tensor's dtype."""
    product: Tensor = tensor * coefficient(value, tensor)
    return product


def add_scaled(tensor: Tensor, other: Tensor, value: Number) -> Tensor:
    """``tensor + value * other`` in the tensor's dtype, rounded as ``torch.optim`` does for a number."""
    if isinstance(value, Tensor):
        return tensor + times(other, value)
    return torch.add(tensor, other, alpha=value)


def interpolate(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    """``start + weight * (end - start)``."""
    if isinstance(weight, Tensor):
        return start + times(end - start, weight)
    return torch.lerp(start, end, weight)


def decayed_square(average: Tensor, gradient: Tensor, beta: Number) -> Tensor:
    """``beta * average + (1 - beta) * gradient**2``."""
    if isinstance(beta, Tensor):
        return times(average, beta) + times(gradient * gradient, 1 - beta)
    return torch.addcmul(average * beta, gradient, gradient, value=1 - beta)


def square_root(tensor: Tensor) -> Tensor:
    """The square root of a second moment, with derivative 1/2 (not infinity) where it is 0.

    An element that never had a gradient (a dead unit, an unused embedding row) has an exactly zero second moment, whose
    own derivative is zero: twice the gradient. Infinity times that would turn every meta-gradient into NaN; any finite
    number gives zero, which is the mean of the one-sided derivatives of ``|gradient|``.
    """
    # One where it is 0, else 0. Comparing takes four times as long, masked_fill ten times (torch 2.13, CPU). Added and
    # subtracted, so that the graph need not keep it.
    zero = 1 - tensor.detach().sign().abs()
    return (tensor + zero).sqrt() - zero


def is_number(value: Any, number: float) -> bool:
    """Whether a hyperparameter is fixed at this number; a tensor never is, whatever its value."""
    return not isinstance(value, Tensor) and value == number


def entry(state: Mapping[str, Any], key: str, parameter: Tensor) -> Tensor:
    """A state tensor, zeros before the first step."""
    found = state.get(key)
    return torch.zeros_like(parameter) if found is None else found


def oriented(parameter: Tensor, gradient: Tensor, hyperparameters: Hyperparameters, *, decay: bool = True) -> Tensor:
    """The gradient to descend: negated for ``maximize``, then with the weight decay of the L2 kind."""
    if hyperparameters["maximize"]:
        gradient = -gradient
    weight_decay = hyperparameters["weight_decay"]
    if decay and not is_number(weight_decay, 0):
        gradient = add_scaled(gradient, parameter, weight_decay)
    return gradient


def decoupled_decay(parameter: Tensor, hyperparameters: Hyperparameters) -> Tensor | None:
    """What decoupled weight decay (AdamW) adds to the parameter; ``None`` for no decay."""
    weight_decay = hyperparameters["weight_decay"]
    if is_number(weight_decay, 0):
        return None
    # Not -lr * decay * parameter: torch.optim rounds the factor, to the same side in every step.
    return times(parameter, 1 - hyperparameters["lr"] * weight_decay) - parameter
