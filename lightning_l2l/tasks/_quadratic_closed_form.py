"""Gradient descent on a quadratic in closed form, in log space: exact for every step size and any number of steps.

With ``H = sum_i lambda_i u_i u_i'``, ``c_i = <w_0, u_i>`` and ``b_i = 1 - step_size * lambda_i`` gradient descent gives
``f(w_k) = 1/2 sum_i c_i^2 lambda_i b_i^(2k)``. Losses and derivatives span thousands of decades, so that a number is
kept as its sign and the logarithm of its size wherever it may leave the range of float64.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Objective = Literal["log", "naive", "log_mean", "naive_mean"]

# Elements of one temporary [..., K, d], 64 MiB: the means over the iterates take K = steps at once where they fit.
_CHUNK_ELEMENTS = 2**23


class SignedLog(NamedTuple):
    """A number as its sign and the natural logarithm of its size; zero is ``(0, -inf)``."""

    sign: Tensor
    log_magnitude: Tensor

    def value(self) -> Tensor:
        """The number itself: infinite or zero where it does not fit float64."""
        return self.sign * self.log_magnitude.exp()


class Spectrum(NamedTuple):
    """What the loss depends on, float64: eigenvalues, ascending, and ``log(c_i^2 lambda_i / 2)``; both ``[d]``."""

    eigenvalues: Tensor
    log_weights: Tensor


def decompose(hessian: Tensor, initial_point: Tensor) -> Spectrum:
    """Diagonalise the Hessian ``[d, d]`` and express the starting point ``[d]`` in its eigenvectors."""
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian.double())
    coefficients = eigenvectors.mT @ initial_point.double()
    return Spectrum(eigenvalues, 2 * coefficients.abs().log() + eigenvalues.log() - math.log(2))


def meta_objective(spectrum: Spectrum, step_size: Tensor, steps: int, objective: Objective) -> Tensor:
    """The meta-objective after ``steps`` steps for step sizes ``[...]``; the naive ones may overflow or underflow."""
    numbers, log_losses, _ = _iterates(spectrum, step_size, steps, objective)
    if objective in ("log", "log_mean"):
        return (log_losses / numbers).mean(-1)
    return (log_losses.logsumexp(-1) - math.log(len(numbers))).exp()


def meta_gradient(spectrum: Spectrum, step_size: Tensor, steps: int, objective: Objective) -> SignedLog:
    """The derivative of :func:`meta_objective` in the step size, which no number of steps overflows."""
    numbers, log_losses, log_derivatives = _iterates(spectrum, step_size, steps, objective)
    if objective in ("log", "log_mean"):
        gradient = (log_derivatives / numbers).mean(-1)
        return SignedLog(gradient.sign(), gradient.abs().log())
    terms = SignedLog(log_derivatives.sign(), log_derivatives.abs().log() + log_losses)  # f' = f (log f)'
    total = _sum(terms)
    return SignedLog(total.sign, total.log_magnitude - math.log(len(numbers)))


def optimal_step_size(spectrum: Spectrum, steps: int) -> Tensor:
    """The minimiser of ``f(w_t)``, by bisection on the sign of its derivative.

    ``sum_i c_i^2 lambda_i^2 b_i^(2t-1)`` falls strictly in the step size, from positive at ``1/L`` to negative at
    ``1/alpha``; sixty-four halvings in log space exhaust float64.
    """
    logs = spectrum.log_weights + spectrum.eigenvalues.log()
    low, high = -spectrum.eigenvalues[-1].log(), -spectrum.eigenvalues[0].log()
    for _ in range(64):
        middle = (low + high) / 2
        factor = _contraction(middle.exp(), spectrum.eigenvalues)
        sign = _sum(SignedLog(factor.sign, logs + (2 * steps - 1) * factor.log_magnitude)).sign
        low = torch.where(sign >= 0, middle, low)
        high = torch.where(sign <= 0, middle, high)
    return ((low + high) / 2).exp()


def _iterates(spectrum: Spectrum, step_size: Tensor, steps: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The iterates that an objective reads: numbers ``[K]``, ``log f(w_k)`` and its derivative ``[..., K]``."""
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is not known; choose one of {list(get_args(Objective))}.")
    first = steps if objective in ("log", "naive") else 1
    numbers = torch.arange(first, steps + 1, dtype=torch.float64, device=step_size.device)
    chunk = max(1, _CHUNK_ELEMENTS // (max(1, step_size.numel()) * len(spectrum.eigenvalues)))
    parts = [_log_losses(spectrum, step_size, part) for part in numbers.split(chunk)]
    log_losses, log_derivatives = (torch.cat(tensors, -1) for tensors in zip(*parts, strict=True))
    return numbers, log_losses, log_derivatives


def _log_losses(spectrum: Spectrum, step_size: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """``log f(w_k)`` and its derivative in the step size, ``[..., K]``, both -inf and 0 where ``w_k`` is exactly zero.

    Nothing is iterated: one iterate is as cheap at ``k = 10^4`` as at ``k = 1``.
    """
    factor = _contraction(step_size, spectrum.eigenvalues).log_magnitude.unsqueeze(-2)
    logs = spectrum.log_weights + 2 * numbers.unsqueeze(-1) * factor  # [..., K, d]
    log_losses = logs.logsumexp(-1)
    alive = log_losses.isfinite()
    shares = (logs - torch.where(alive, log_losses, 0.0).unsqueeze(-1)).exp()  # of each eigenvector in the loss
    # d log b_i^(2k) = -2k lambda_i / b_i; a factor of exactly zero has no share, so that any finite number will do.
    inside = 1 - step_size.unsqueeze(-1) * spectrum.eigenvalues
    rates = spectrum.eigenvalues / torch.where(inside == 0, 1.0, inside)
    return log_losses, -2 * numbers * (shares * rates.unsqueeze(-2)).sum(-1)


def _contraction(step_size: Tensor, eigenvalues: Tensor) -> SignedLog:
    """``b_i = 1 - step_size * lambda_i``, ``[..., d]``.

    ``log1p`` keeps the digits of small steps, which a power of ten thousand would otherwise multiply.
    """
    scaled = step_size.unsqueeze(-1) * eigenvalues
    shrinking = torch.log1p(-scaled.clamp(max=1.0))
    flipping = (scaled - 1).clamp(min=0.0).log()
    return SignedLog(torch.sign(1 - scaled), torch.where(scaled <= 1, shrinking, flipping))


def _sum(terms: SignedLog) -> SignedLog:
    """The sum over the last dimension, without leaving the number range."""
    peak = terms.log_magnitude.amax(-1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    total = (terms.sign * (terms.log_magnitude - peak).exp()).sum(-1)
    return SignedLog(total.sign(), peak.squeeze(-1) + total.abs().log())
