"""Gradient clipping as part of the inner step: ``torch.nn.utils``' formulas, differentiable through the norm.

A clipped step depends on the gradient through its norm as well. torchopt's own clipping treats the norm as a
constant, which gives another derivative; Trainer's gradient clipping is mirrored by these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

# As in torch.nn.utils.clip_grad_norm_, so that clipped steps agree to the last bits.
_EPSILON = 1e-6


def clip_gradient_norm(max_norm: float, norm_type: float = 2.0) -> GradientTransformation:
    """Scales all gradients together so that their norm is at most ``max_norm``.

    The same numbers as ``torch.nn.utils.clip_grad_norm_``: each gradient times
    ``min(1, max_norm / (norm + 1e-6))``, with the norm over all gradients as one vector. Gradients that are
    ``None`` stay ``None``. At norm 0 the derivative is that of the unclipped gradient.

    Args:
        max_norm: The largest norm, 0 or more (0 makes every gradient zero, as torch does).
        norm_type: Order p of the norm, above 0; ``math.inf`` for the largest entry.

    Returns:
        A stateless torchopt transformation over dictionaries of tensors by name; to be chained before an
        optimizer.

    Raises:
        ValueError: A negative ``max_norm`` or a ``norm_type`` that is not positive.

    Example:
        >>> import torch
        >>> clip = clip_gradient_norm(1.0)
        >>> clip.update({"w": torch.tensor([3.0, 4.0])}, clip.init({}))[0]["w"]
        tensor([0.6000, 0.8000])
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be 0 or more, got {max_norm!r}.")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0 (math.inf for the largest entry), got {norm_type!r}.")

    def clip(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        present = [gradient for gradient in gradients.values() if gradient is not None]
        if not present:
            return gradients
        device = present[0].device
        norms = torch.stack([_norm(gradient, norm_type).to(device) for gradient in present])
        factor = (max_norm / (_norm(norms, norm_type) + _EPSILON)).clamp(max=1.0)
        return {
            name: None if gradient is None else gradient * factor.to(gradient.device, gradient.dtype)
            for name, gradient in gradients.items()
        }

    return _stateless(clip)


def clip_gradient_value(value: float) -> GradientTransformation:
    """Clamps every entry of every gradient to ``[-value, value]``, as ``torch.nn.utils.clip_grad_value_``.

    The derivative is 1 for entries inside and 0 for clamped ones.

    Args:
        value: The largest magnitude, 0 or more.

    Returns:
        A stateless torchopt transformation over dictionaries of tensors by name; ``None`` stays ``None``.

    Raises:
        ValueError: A negative value.

    Example:
        >>> import torch
        >>> clip = clip_gradient_value(0.5)
        >>> clip.update({"w": torch.tensor([3.0, -0.25])}, clip.init({}))[0]["w"]
        tensor([ 0.5000, -0.2500])
    """
    if not value >= 0:
        raise ValueError(f"value must be 0 or more, got {value!r}.")

    def clip(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: None if g is None else g.clamp(-value, value) for name, g in gradients.items()}

    return _stateless(clip)


def _stateless(
    change: Callable[[dict[str, Tensor | None]], dict[str, Tensor | None]],
) -> GradientTransformation:
    def init(params: Any) -> tuple[()]:
        return ()

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return change(updates), state

    return GradientTransformation(init, update)


def _norm(tensor: Tensor, order: float) -> Tensor:
    """The vector norm, with derivative 0 (not NaN) where it is 0."""
    # For zeros the norm is taken of ones instead, and then masked: torch masks only the first derivative.
    zero = (tensor == 0).all()
    safe = tensor.masked_fill(zero, 1.0)
    norm: Tensor = torch.linalg.vector_norm(safe, order)
    return norm.masked_fill(zero, 0.0)
