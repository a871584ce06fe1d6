"""Refusals of :class:`~lightning_l2l.tasks.Quadratic`: what is wrong with an input, why, and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond this, step_size * curvature squares out of float32 range in the recursion; no experiment comes near
# it.
_LARGEST_SCALED_STEP = 1e30


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Return the common shape; torch's own function carries no types in 2.13."""
    return torch.Size(torch.broadcast_shapes(*shapes))


def check_hessian(hessian: Tensor) -> None:
    """Raise unless ``hessian`` is floating, square, finite, symmetric and positive definite."""
    if not isinstance(hessian, Tensor):
        raise TypeError(f"hessian must be a torch.Tensor, got {type(hessian).__name__}; use torch.as_tensor.")
    if not hessian.dtype.is_floating_point:
        raise TypeError(f"hessian must be a real floating-point tensor, got {hessian.dtype}.")
    if hessian.dim() < 2 or hessian.shape[-1] != hessian.shape[-2] or hessian.shape[-1] == 0:
        raise ValueError(f"hessian must be square, [..., d, d], d >= 1, got shape {tuple(hessian.shape)}.")
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian contains NaN or infinity, so the quadratic has no value anywhere.")
    matrix = hessian.double()
    asymmetry = float((matrix - matrix.mT).abs().max())
    if asymmetry > 100 * torch.finfo(hessian.dtype).eps * float(matrix.abs().max()):
        raise ValueError(
            f"hessian must be symmetric: it differs from its transpose by {asymmetry:.3g}. The gradient of "
            "1/2 w'Hw is only Hw for a symmetric H; pass (H + H.mT) / 2 if that is what you mean."
        )
    factor, failed = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    floor = matrix.shape[-1] * torch.finfo(torch.float64).eps * matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    if failed.any() or not (pivots.amin(-1) > floor).all():
        raise ValueError(_not_definite("a pivot of its Cholesky factorisation is not positive"))


def check_eigenvalues(eigenvalues: Tensor) -> None:
    """Raise if an eigenvalue (ascending, ``[..., d]``) is not positive to working precision."""
    floor = eigenvalues.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[..., -1]
    if not (eigenvalues[..., 0] > floor).all():
        raise ValueError(_not_definite(f"its smallest eigenvalue is {float(eigenvalues[..., 0].min()):.3g}"))


def _not_definite(reason: str) -> str:
    return (
        f"hessian must be positive definite, but {reason}. Without a positive smallest curvature the loss "
        "has no single minimum and the optimal step size no bound; add a small multiple of the identity, or "
        "drop the flat directions."
    )


def check_initial_point(initial_point: Tensor, hessian: Tensor) -> None:
    """Raise unless ``initial_point`` ``[..., d]`` is finite, nonzero and fits the ``hessian``."""
    if not isinstance(initial_point, Tensor):
        raise TypeError(
            f"initial_point must be a torch.Tensor, got {type(initial_point).__name__}; use torch.as_tensor."
        )
    if not initial_point.dtype.is_floating_point:
        raise TypeError(f"initial_point must be a real floating-point tensor, got {initial_point.dtype}.")
    if initial_point.dim() < 1 or initial_point.shape[-1] != hessian.shape[-1]:
        raise ValueError(
            f"initial_point must be [..., d] with d = {hessian.shape[-1]} as in the hessian, got shape "
            f"{tuple(initial_point.shape)}."
        )
    try:
        broadcast_shapes(hessian.shape[:-2], initial_point.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"The batches of hessian {tuple(hessian.shape[:-2])} and initial_point "
            f"{tuple(initial_point.shape[:-1])} do not broadcast."
        ) from None
    if not torch.isfinite(initial_point).all():
        raise ValueError("initial_point contains NaN or infinity.")
    if not (initial_point != 0).any(-1).all():
        raise ValueError(
            "initial_point is zero, which is the minimum: no step size changes anything there and the log "
            "objective is minus infinity everywhere. Start anywhere else."
        )


def check_steps(steps: int) -> None:
    """Raise unless ``steps`` is an integer of at least one."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__} {steps!r}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: with no step the step size has no effect.")


def as_step_size(step_size: float | Tensor, hessian: Tensor, batch_shape: torch.Size) -> Tensor:
    """Return ``step_size`` as a checked float64 tensor on the task's device.

    Raises:
        TypeError: If it is neither a number nor a real tensor.
        ValueError: If it is negative or not finite, does not broadcast with the batch of tasks, or is so
            large that ``step_size * curvature`` exceeds 1e30.
    """
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float, Tensor)):
        raise TypeError(f"step_size must be a number or a torch.Tensor, got {type(step_size).__name__}.")
    if isinstance(step_size, Tensor) and (step_size.is_complex() or step_size.dtype == torch.bool):
        raise TypeError(f"step_size must be real, got {step_size.dtype}.")
    # dtype given here: as_tensor would round a Python number to the default dtype, float32, first
    steps = torch.as_tensor(step_size, dtype=torch.float64, device=hessian.device).detach()
    if not torch.isfinite(steps).all():
        raise ValueError("step_size contains NaN or infinity; do not apply the meta-update that produced it.")
    if (steps < 0).any():
        raise ValueError(
            f"step_size must not be negative, got {float(steps.min()):.3g}: that would be ascent. Clamp at "
            "zero, or learn the logarithm."
        )
    try:
        broadcast_shapes(steps.shape, batch_shape)
    except RuntimeError:
        raise ValueError(
            f"step_size of shape {tuple(steps.shape)} does not broadcast with the batch of tasks "
            f"{tuple(batch_shape)}. For every step size on every task use step_size[:, None]."
        ) from None
    # The trace bounds the largest eigenvalue, so that the recursion needs no eigendecomposition.
    curvature = float(hessian.double().diagonal(dim1=-2, dim2=-1).sum(-1).max())
    if steps.numel() and float(steps.max()) * curvature > _LARGEST_SCALED_STEP:
        raise ValueError(
            f"step_size * trace(hessian) is {float(steps.max()) * curvature:.3g}, more than "
            f"{_LARGEST_SCALED_STEP:g}: a single step would leave the number range of float32. The stability "
            "limit is 2 / largest curvature."
        )
    return steps
