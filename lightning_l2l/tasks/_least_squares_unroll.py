r"""Gradient descent and SGD on least squares, step by step, with the derivative in the step size carried along.

    w_{k+1} = w_k - eta g_k,      g_k = (1/b) sum_{i in batch k} x_i (<w_k, x_i> - y_i)
    u_{k+1} = u_k - eta H_k u_k - g_k,      u_k = d w_k / d eta,      H_k = (1/b) sum_{i in batch k} x_i x_i'

All tasks and all step sizes advance together and see the same samples, so that curves over the step size are
smooth (common random numbers). Memory is constant in the number of steps. Shapes: m tasks, g step sizes, n
samples, d dimensions, b samples per step.

Source: Wang, Yuan, Wu, Ge (ICML 2021), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_l2l.tasks._least_squares_closed_form import FinalLoss


@dataclass(frozen=True)
class Iterate:
    """Where the runs stand after some steps.

    Attributes:
        weights: w, ``[m, g, d]``. A truncated run rests at its last iterate inside the ball.
        tangents: u, ``[m, g, d]``; ``None`` if they were not asked for.
        truncated_step: First step whose iterate left the ball, ``-1`` for never; int64, ``[m, g]``.
    """

    weights: Tensor
    tangents: Tensor | None
    truncated_step: Tensor


def iterates(
    inputs: Tensor,
    targets: Tensor,
    step_sizes: Tensor,
    steps: int,
    *,
    order: Tensor | None,
    radius: float,
    with_tangents: bool,
) -> Iterator[Iterate]:
    """The ``steps + 1`` iterates of each run, the starting point first.

    Args:
        inputs: X, ``[m, n, d]``.
        targets: y, ``[m, n]``.
        step_sizes: eta, ``[g]``.
        steps: t.
        order: Sample indices, ``[t, b]`` for all tasks alike or ``[m, t, b]``; ``None`` uses all samples each
            step.
        radius: Iterates with a norm of at least this are truncated.
        with_tangents: Carry u; doubles the cost.
    """
    tasks, _, dimension = inputs.shape
    eta = step_sizes.to(inputs.dtype)[None, :, None]
    weights = inputs.new_zeros(tasks, len(step_sizes), dimension)
    tangents = torch.zeros_like(weights) if with_tangents else None
    truncated_step = torch.full(weights.shape[:2], -1, dtype=torch.int64, device=inputs.device)
    every_task = torch.arange(tasks, device=inputs.device)[:, None]
    yield Iterate(weights, tangents, truncated_step)
    for step in range(1, steps + 1):
        x, y = inputs, targets
        if order is not None:
            chosen = order[..., step - 1, :]
            x, y = (
                (inputs[:, chosen], targets[:, chosen])
                if order.ndim == 2
                else (
                    inputs[every_task, chosen],
                    targets[every_task, chosen],
                )
            )
        count = x.shape[1]
        gradient = (weights @ x.mT - y[:, None, :]) @ x / count  # [m, g, d]
        moved = weights - eta * gradient
        inside = moved.square().sum(-1) < radius**2  # False for NaN as well
        truncated_step = torch.where((truncated_step < 0) & ~inside, step, truncated_step)
        alive = (truncated_step < 0)[..., None]
        if tangents is not None:
            tangents = torch.where(alive, tangents - eta * ((tangents @ x.mT) @ x / count) - gradient, tangents)
        weights = torch.where(alive, moved, weights)
        yield Iterate(weights, tangents, truncated_step)


def half_squared_error(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``1/(2n) |y - X w|^2``, ``[m, g]``, for inputs ``[m, n, d]``, targets ``[m, n]``, weights ``[m, g, d]``."""
    residual = weights @ inputs.mT - targets[:, None, :]
    return 0.5 * residual.square().mean(-1)


def evaluate(last: Iterate, inputs: Tensor, targets: Tensor, solution: Tensor) -> FinalLoss:
    """Loss at the last iterate and its derivative ``<grad loss(w_t), u_t>``; NaN if no tangents were carried.

    Args:
        last: The last of :func:`iterates`.
        inputs: What to judge on, ``[m, n, d]``.
        targets: ``[m, n]``.
        solution: w*, ``[m, d]``.
    """
    residual = last.weights @ inputs.mT - targets[:, None, :]  # [m, g, n]
    loss = 0.5 * residual.square().mean(-1)
    gradient = torch.full_like(loss, torch.nan)
    if last.tangents is not None:
        gradient = (residual * (last.tangents @ inputs.mT)).mean(-1)
    error = (last.weights - solution[:, None, :]).square().sum(-1)
    return FinalLoss(loss, gradient, loss.log(), gradient / loss, error, last.truncated_step)
