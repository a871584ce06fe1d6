"""The quadratic without its eigenvalues: a forward recursion that cannot overflow.

Gradient descent on ``1/2 w'Hw`` is linear in ``w``, so the iterate may be renormalised after every step as
long as the scale is remembered. The tangent ``u = d(w/|w|)/d step_size`` is kept orthogonal to the iterate;
the part along it goes into a scalar. The two scalars (log scale and its derivative) are float64 even when the
vectors are float32, because they are sums of ``t`` small terms. (Projected forward recursion; the estimator
"forward" of the general engine does the same for ordinary losses.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_l2l.tasks._quadratic_checks import broadcast_shapes
from lightning_l2l.tasks._quadratic_objectives import StepValues, to_signed_log


def step_values(hessian: Tensor, initial_point: Tensor, step_size: Tensor, first: int, last: int) -> StepValues:
    """Evaluate the iterates ``first .. last`` by iterating from zero.

    Costs two matrix-vector products per step, O(t d^2), and memory that does not grow with ``t`` but for the
    two numbers per recorded iterate.

    Args:
        hessian: ``[..., d, d]``, float32 or float64; vectors are computed in this dtype.
        initial_point: ``[..., d]``, same dtype.
        step_size: ``[...]``, same dtype, broadcast with the batch of tasks.
        first: First recorded iterate.
        last: Last recorded iterate.
    """
    batch = broadcast_shapes(hessian.shape[:-2], initial_point.shape[:-1], step_size.shape)
    norm = _norm(initial_point)
    direction = (initial_point / norm).expand(*batch, -1)
    log_norm = norm.double().log().squeeze(-1).expand(batch)
    tangent = torch.zeros_like(direction)
    log_norm_derivative = torch.zeros_like(log_norm)
    eta = step_size.unsqueeze(-1)
    recorded = []
    for step in range(last + 1):
        pushed_direction, pushed_tangent = _apply(hessian, torch.stack([direction, tangent]))
        if step >= first:
            curvature = _dot(direction, pushed_direction)
            log_loss = 2 * log_norm + curvature.log() - math.log(2)
            derivative = 2 * log_norm_derivative + 2 * _dot(pushed_direction, tangent) / curvature
            recorded.append((log_loss, derivative))
        if step == last:
            break
        moved = direction - eta * pushed_direction
        moved_tangent = tangent - eta * pushed_tangent - pushed_direction
        # The scalars must add up exactly what the vectors are divided by, so both take the rounded numbers:
        # then w = exp(log_norm) * direction and its derivative hold whether or not the direction is quite of
        # length one.
        norm = _norm(moved)
        log_norm = log_norm + norm.double().log().squeeze(-1)
        # An iterate that lands exactly on the minimum (only the first step can) stays there: keep the old
        # direction and its tangent of zero, remember log 0.
        landed = norm == 0
        norm = torch.where(landed, 1.0, norm)
        unit = moved / norm
        scaled_tangent = moved_tangent / norm
        along = _dot(unit, scaled_tangent).to(unit.dtype)
        log_norm_derivative = log_norm_derivative + torch.where(landed.squeeze(-1), 0.0, along.double())
        projected = scaled_tangent - along.unsqueeze(-1) * unit
        direction = torch.where(landed, direction, unit)
        tangent = torch.where(landed, tangent, projected)
    log_losses = torch.stack([log_loss for log_loss, _ in recorded], -1)
    derivatives = torch.stack([derivative for _, derivative in recorded], -1)
    steps = torch.arange(first, last + 1, dtype=torch.float64, device=log_losses.device)
    return StepValues(steps, log_losses, derivatives, to_signed_log(derivatives))


def _apply(hessian: Tensor, vectors: Tensor) -> Tensor:
    """Return ``H v`` for ``vectors`` ``[..., d]``; one shared Hessian becomes a single matrix product."""
    if hessian.dim() == 2:
        return vectors @ hessian  # symmetric, so v'H is (Hv)'
    return (hessian @ vectors.unsqueeze(-1)).squeeze(-1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product along the last dimension, accumulated in float64."""
    return (left.double() * right.double()).sum(-1)


def _norm(vector: Tensor) -> Tensor:
    """Euclidean norm along the last dimension, kept; float64 sums, rounded to the vector's dtype."""
    norm: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.to(vector.dtype)
