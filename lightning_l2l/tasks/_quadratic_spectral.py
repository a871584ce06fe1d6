"""The quadratic in its eigenbasis: exact losses and derivatives as sums over eigenvalues, in log space.

With ``H = sum_i lambda_i u_i u_i'``, ``c_i = <w_0, u_i>`` and ``b_i = 1 - step_size * lambda_i`` gradient
descent gives ``f(w_k) = 1/2 sum_i c_i^2 lambda_i b_i^(2k)``. All functions here work in float64 whatever the
task's dtype: the cost is a handful of vector operations of length d, so there is nothing to win from less.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_l2l.tasks._quadratic_objectives import (
    SignedLog,
    StepValues,
    signed_logsumexp,
    to_signed_log,
)

# Elements of a temporary [..., K, d]; bounds the memory of the objectives that read every iterate (64 MiB
# each).
_CHUNK_ELEMENTS = 2**23


class Spectrum(NamedTuple):
    """Eigendecomposition of a batch of quadratics, float64.

    Attributes:
        eigenvalues: ``lambda``, ascending, ``[..., d]``.
        eigenvectors: Columns ``u_i``, ``[..., d, d]``.
        coefficients: ``c_i = <w_0, u_i>``, ``[..., d]``.
        log_weights: ``log(c_i^2 lambda_i / 2)``, ``[..., d]``; minus infinity where ``c_i = 0``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    coefficients: Tensor
    log_weights: Tensor


def decompose(hessian: Tensor, initial_point: Tensor) -> Spectrum:
    """Return the spectrum of ``hessian`` ``[..., d, d]`` seen from ``initial_point`` ``[..., d]``."""
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    coefficients = (eigenvectors.mT @ initial_point.unsqueeze(-1)).squeeze(-1)
    log_weights = 2 * coefficients.abs().log() + eigenvalues.log() - math.log(2)
    return Spectrum(eigenvalues, eigenvectors, coefficients, log_weights)


def contraction(step_size: Tensor, eigenvalues: Tensor) -> SignedLog:
    """Return ``b_i = 1 - step_size * lambda_i`` as sign and log, shape ``[..., d]``.

    ``log1p`` keeps the digits of small steps, which a power of ten thousand would otherwise multiply.
    """
    scaled = step_size.unsqueeze(-1) * eigenvalues
    shrinking = torch.log1p(-scaled.clamp(max=1.0))
    flipping = (scaled - 1).clamp(min=0.0).log()
    return SignedLog(torch.sign(1 - scaled), torch.where(scaled <= 1, shrinking, flipping))


def step_values(spectrum: Spectrum, step_size: Tensor, first: int, last: int, first_order: bool) -> StepValues:
    """Evaluate the iterates ``first .. last`` for step sizes that broadcast with the batch of tasks.

    Costs O(d) per iterate and step size; nothing is iterated, so one iterate is as cheap at t = 10^4 as at t
    = 1.
    """
    size = spectrum.log_weights.shape[-1] * max(step_size.numel(), spectrum.log_weights[..., 0].numel(), 1)
    chunk = max(1, _CHUNK_ELEMENTS // size)
    parts = []
    for begin in range(first, last + 1, chunk):
        numbers = torch.arange(begin, min(begin + chunk, last + 1), dtype=torch.float64)
        steps = numbers.to(step_size.device)
        parts.append(_chunk_of_step_values(spectrum, step_size, steps, first_order))
    return StepValues(
        torch.cat([part.steps for part in parts]),
        torch.cat([part.log_loss for part in parts], -1),
        torch.cat([part.log_derivative for part in parts], -1),
        SignedLog(
            torch.cat([part.signed.sign for part in parts], -1),
            torch.cat([part.signed.log_magnitude for part in parts], -1),
        ),
    )


def _chunk_of_step_values(spectrum: Spectrum, step_size: Tensor, steps: Tensor, first_order: bool) -> StepValues:
    factor_sign, factor_log = contraction(step_size, spectrum.eigenvalues)
    powers = _power_log(factor_log, steps)  # log |b_i^k|, [..., K, d]
    logs = spectrum.log_weights.unsqueeze(-2) + 2 * powers
    peak = logs.amax(-1, keepdim=True)
    alive = torch.isfinite(peak)  # false only where w_k is exactly zero
    weights = (logs - torch.where(alive, peak, 0.0)).exp()
    total = weights.sum(-1)
    log_loss = peak.squeeze(-1) + torch.where(alive.squeeze(-1), total, 1.0).log()
    if first_order:
        signed = _first_order_log_derivative(spectrum, step_size, factor_sign, powers, steps, log_loss)
        return StepValues(steps, log_loss, signed.value(), signed)
    # d b_i^(2k) = -2k lambda_i b_i^(2k-1): a factor b_i of exactly zero has weight zero (or k = 0), so that any
    # finite slope will do for it.
    inside = 1 - step_size.unsqueeze(-1) * spectrum.eigenvalues
    slope = spectrum.eigenvalues / torch.where(inside == 0, 1.0, inside)
    mean = (weights * slope.unsqueeze(-2)).sum(-1) / torch.where(alive.squeeze(-1), total, 1.0)
    log_derivative = -2 * steps * mean
    return StepValues(steps, log_loss, log_derivative, to_signed_log(log_derivative))


def _power_log(factor_log: Tensor, steps: Tensor) -> Tensor:
    """Return ``k * log|b_i|`` with ``0^0 = 1``, shape ``[..., K, d]``."""
    column = steps.unsqueeze(-1)
    return torch.where(column == 0, 0.0, column * factor_log.unsqueeze(-2))


def _first_order_log_derivative(
    spectrum: Spectrum,
    step_size: Tensor,
    factor_sign: Tensor,
    powers: Tensor,
    steps: Tensor,
    log_loss: Tensor,
) -> SignedLog:
    """Derivative of ``log f(w_k)`` when every inner gradient is taken for a constant.

    Then ``dw_k / d step_size = -sum_{j<k} H w_j = (w_k - w_0) / step_size``, so the derivative of the loss is
    ``sum_i c_i^2 lambda_i b_i^k (b_i^k - 1) / step_size``: it grows exponentially in k although the true one
    does not.
    """
    odd = (steps.unsqueeze(-1) % 2) == 1
    sign = torch.where(odd, factor_sign.unsqueeze(-2), factor_sign.abs().unsqueeze(-2))
    sign = torch.where(steps.unsqueeze(-1) == 0, 1.0, sign)
    # log|b^k - 1| for b^k = sign * exp(power), without cancellation and without overflow
    opposite = torch.nn.functional.softplus(powers)
    same = powers.clamp(min=0.0) + (-torch.expm1(-powers.abs())).log()
    difference = SignedLog(
        torch.where(sign > 0, torch.sign(powers), -torch.ones_like(powers)),
        torch.where(sign > 0, same, opposite),
    )
    safe_step = torch.where(step_size == 0, 1.0, step_size)[..., None, None]
    slope_log = difference.log_magnitude - safe_step.log()
    slope_sign = difference.sign
    # The limit of (b^k - 1) / step_size at zero is -k lambda.
    at_zero = (step_size == 0)[..., None, None]
    limit = steps.unsqueeze(-1).log() + spectrum.eigenvalues.log().unsqueeze(-2)
    slope_log = torch.where(at_zero, limit, slope_log)
    slope_sign = torch.where(at_zero, -torch.sign(steps).unsqueeze(-1), slope_sign)
    weights = spectrum.log_weights.unsqueeze(-2) + math.log(2)
    terms = SignedLog(sign * slope_sign, weights + powers + slope_log)
    total = signed_logsumexp(terms)
    dead = ~torch.isfinite(log_loss) | (total.sign == 0)
    return SignedLog(torch.where(dead, 0.0, total.sign), torch.where(dead, -math.inf, total.log_magnitude - log_loss))


def optimal_step_size(spectrum: Spectrum, steps: int) -> Tensor:
    """Return the minimiser of ``f(w_t)`` for each task, by bisection on the sign of its derivative.

    ``sum_i c_i^2 lambda_i^2 b_i^(2t-1)`` falls strictly in the step size, is positive at ``1/L`` and negative
    at ``1/alpha``; sixty-four halvings in log space exhaust float64.
    """
    logs = spectrum.log_weights + spectrum.eigenvalues.log()
    low = -spectrum.eigenvalues[..., -1].log().expand(logs.shape[:-1])
    high = -spectrum.eigenvalues[..., 0].log().expand(logs.shape[:-1])
    for _ in range(64):
        middle = (low + high) / 2
        sign, factor_log = contraction(middle.exp(), spectrum.eigenvalues)
        total = signed_logsumexp(SignedLog(sign, logs + (2 * steps - 1) * factor_log))
        low = torch.where(total.sign >= 0, middle, low)
        high = torch.where(total.sign <= 0, middle, high)
    return ((low + high) / 2).exp()


def directions(spectrum: Spectrum, step_size: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``w_k / |w_k|`` ``[..., K, d]`` and ``log |w_k|`` ``[..., K]`` for iterate numbers ``[K]``.

    The direction of a point that is exactly zero is the zero vector, its log norm minus infinity.
    """
    factor_sign, factor_log = contraction(step_size, spectrum.eigenvalues)
    column = steps.unsqueeze(-1)
    logs = spectrum.coefficients.abs().log().unsqueeze(-2) + _power_log(factor_log, steps)
    sign = torch.where(column % 2 == 1, factor_sign.unsqueeze(-2), 1.0)
    sign = sign * torch.sign(spectrum.coefficients).unsqueeze(-2)
    peak = logs.amax(-1, keepdim=True)
    scaled = sign * (logs - torch.where(torch.isfinite(peak), peak, 0.0)).exp()
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = scaled / torch.where(norm == 0, 1.0, norm)
    # rows times U': back from the eigenbasis
    return unit @ spectrum.eigenvectors.mT, (peak + torch.where(norm == 0, 1.0, norm).log()).squeeze(-1)
