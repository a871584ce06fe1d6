"""The update rule of one tensor, and the arithmetic that all rules share.

A rule is the arithmetic of one step of a ``torch.optim`` optimizer as a pure function: out of place,
differentiable twice and in forward mode, with hyperparameters that may be tensors. What makes it fast on many
small tensors and what connects it with a live optimizer is elsewhere (``transformation.py``, ``mirror.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_l2l.functional.dual import Dual

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Number = float | Tensor
Hyperparameters = Mapping[str, Any]
State = dict[str, Any]
Update = Callable[[Tensor, Tensor, Mapping[str, Any], Hyperparameters], tuple[Tensor, State]]


def never(hyperparameters: Hyperparameters) -> bool:
    """The predicate that is false for every setting."""
    return False


def always(hyperparameters: Hyperparameters) -> bool:
    """The predicate that is true for every setting."""
    return True


@dataclass(frozen=True)
class Rule:
    """How an optimizer moves one tensor.

    Attributes:
        update: ``update(parameter, gradient, state, hyperparameters) -> (delta, new_state)``. ``delta`` is
            *added* to the parameter. ``state`` has the keys of ``torch.optim``'s own state; ``step`` is a
            Python int, other entries are tensors in the parameter's shape or Python numbers. A missing entry
            means that the first step is still to come. Nothing may be modified in place. A hyperparameter
            named in ``learnable`` is a Python number, a 0-dim tensor, or (only if ``elementwise``) a 1-d
            float64 tensor with one value for each element; :func:`times` and its neighbours accept all three.
        defaults: The hyperparameters that ``update`` reads, by their key in ``torch.optim``'s parameter
            groups (``betas`` as ``beta1`` and ``beta2``), with the value to take where a group lacks the key.
        learnable: Those that may be tensors.
        elementwise: Every element is treated on its own, so tensors may be concatenated. ``False`` is always
            right, and slower on many small tensors.
        dual_numbers: ``update`` consists of operations that :class:`~lightning_l2l.functional.dual.Dual` has, and
            asks :func:`is_tensor` instead of ``isinstance``. Makes forward mode faster; ``False`` is always right.
        proportional_to_rate: ``delta`` is the learning rate times something that does not depend on it, and neither
            does the new state. ``False`` is always right, and costs a Hessian-vector product in each step.
        scale_equivariant: Tells from the hyperparameters whether ``delta`` and ``new_state`` are homogeneous
            of degree one in (parameter, gradient, state): all three times c give both times c. True for SGD.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional.sgd import SGD
        >>> settings = {**SGD.defaults, "lr": torch.tensor(0.5, requires_grad=True)}
        >>> delta, state = SGD.update(torch.ones(2), torch.tensor([1.0, 2.0]), {}, settings)
        >>> delta.tolist(), state
        ([-0.5, -1.0], {})
    """

    update: Update
    defaults: Mapping[str, Any]
    learnable: tuple[str, ...] = ("lr",)
    elementwise: bool = False
    dual_numbers: bool = False
    proportional_to_rate: bool = False
    scale_equivariant: Callable[[Hyperparameters], bool] = never


def is_tensor(value: Any) -> TypeIs[Tensor]:
    """Whether something is a tensor, with tangents or without, and not a number."""
    # To the type checker a dual is a tensor: the rules may do with it what they do with one.
    return isinstance(value, (Tensor, Dual))


def coefficient(value: Any, like: Tensor) -> Any:
    """A coefficient that does not promote ``like``: one of as many dimensions would, so it is cast."""
    if is_tensor(value) and (value.dim() > 0 or like.dim() == 0):
        return value.to(like.dtype)
    return value


def times(tensor: Tensor, value: Number) -> Tensor:
    """``tensor * value`` in the tensor's dtype."""
    product: Tensor = tensor * coefficient(value, tensor)
    return product


def add_scaled(tensor: Tensor, other: Tensor, value: Number) -> Tensor:
    """``tensor + value * other`` in the tensor's dtype, rounded as ``torch.optim`` does for a number."""
    if is_tensor(value):
        return tensor + times(other, value)
    return torch.add(tensor, other, alpha=value)


def interpolate(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    """``start + weight * (end - start)``."""
    if is_tensor(weight):
        return start + times(end - start, weight)
    return torch.lerp(start, end, weight)


def decayed_square(average: Tensor, gradient: Tensor, beta: Number) -> Tensor:
    """``beta * average + (1 - beta) * gradient**2``."""
    if is_tensor(beta):
        return times(average, beta) + times(gradient * gradient, 1 - beta)
    return torch.addcmul(average * beta, gradient, gradient, value=1 - beta)


def square_root(tensor: Tensor) -> Tensor:
    """The square root, with derivative 0 (not infinity) where it is 0.

    An element that never had a gradient (a dead unit, an unused embedding row) has an exactly zero second
    moment; the infinite derivative there times zero would turn every meta-gradient into NaN. Zero is the mean
    of the one-sided derivatives of ``|gradient|``.
    """
    if isinstance(tensor, Dual):
        return tensor.square_root()
    # One where it is 0, else 0. Comparing takes four times as long, masked_fill ten times (torch 2.13, CPU).
    zero = 1 - tensor.detach().sign().abs()
    return (tensor + zero).sqrt() * (1 - zero)


def is_number(value: Any, number: float) -> bool:
    """Whether a hyperparameter is fixed at this number; a tensor never is, whatever its value."""
    return not is_tensor(value) and value == number


def entry(state: Mapping[str, Any], key: str, parameter: Tensor) -> Tensor:
    """A state tensor, zeros before the first step."""
    found = state.get(key)
    return torch.zeros_like(parameter) if found is None else found


def oriented(parameter: Tensor, gradient: Tensor, hyperparameters: Hyperparameters, *, decay: bool = True) -> Tensor:
    """The gradient to descend: turned round for ``maximize``, then with the weight decay of the L2 kind."""
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
