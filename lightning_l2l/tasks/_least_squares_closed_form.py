r"""Gradient descent on least squares in closed form: one eigendecomposition, then O(r) per step size and any t.

From ``w_0 = 0`` the iterates of gradient descent on ``1/(2n) |y - X w|^2`` stay in the row space of X. With
``H = X'X/n = V diag(s) V'`` and ``beta = V'X'y/n`` their coordinates in the eigenvectors are

    V'w_t = phi(s) beta,      phi(s) = (1 - (1 - eta s)^t) / s,      d phi / d eta = t (1 - eta s)^(t-1),

and every quantity here follows. The eigenvectors come from the smaller of ``XX'/n`` and ``X'X/n``; r is the
smaller of the number of samples and the dimension. Shapes: m tasks, g step sizes, n samples, r eigenvalues.

Source: Wang, Yuan, Wu, Ge (ICML 2021), section 4; the formulas are linear algebra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FinalLoss:
    """A loss after t steps and its derivatives in the step size, before truncation; each ``[m, g]``.

    Attributes:
        loss: The loss L.
        gradient: dL / d eta.
        log_loss: log L, finite where L itself underflows if the closed form computed it.
        log_gradient: d log L / d eta.
        population_error: ``|w_t - w*|^2``.
        truncated_step: First step whose iterate left the ball, ``-1`` for never; int64.
    """

    loss: Tensor
    gradient: Tensor
    log_loss: Tensor
    log_gradient: Tensor
    population_error: Tensor
    truncated_step: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Many least-squares tasks in the eigenvectors of their training data; float64.

    Attributes:
        eigenvalues: s, ``[m, r]``, of the Hessian ``X'X/n``.
        slopes: beta, ``[m, r]``: the negative gradient at zero.
        energies: ``beta^2 / s``, ``[m, r]``: twice what fitting this direction takes off the loss.
        floor: ``[m]``, the least training loss over all w; exactly zero where n <= d.
        overlaps: ``V'w*``, ``[m, r]``.
        solution_norm: ``|w*|^2``, ``[m]``.
        validation_inputs: ``X_validation V``, ``[m, n_validation, r]``, or ``None``.
        validation_targets: ``[m, n_validation]``, or ``None``.
    """

    eigenvalues: Tensor
    slopes: Tensor
    energies: Tensor
    floor: Tensor
    overlaps: Tensor
    solution_norm: Tensor
    validation_inputs: Tensor | None
    validation_targets: Tensor | None


def decompose(
    inputs: Tensor,
    targets: Tensor,
    solution: Tensor,
    validation_inputs: Tensor | None,
    validation_targets: Tensor | None,
) -> Spectrum:
    """Diagonalise the training data of every task, in the data's dtype, which sets the accuracy and the cost.

    The result is in float64: what follows is cheap, and a search over the step size then sees a smooth
    function.

    Args:
        inputs: X, ``[m, n, d]``.
        targets: y, ``[m, n]``.
        solution: w*, ``[m, d]``.
        validation_inputs: ``[m, n_validation, d]``, or ``None``.
        validation_targets: ``[m, n_validation]``, or ``None``.
    """
    samples, dimension = inputs.shape[1:]
    if samples <= dimension:
        gram = inputs @ inputs.mT / samples
        eigenvalues, vectors = torch.linalg.eigh(gram)
        eigenvalues = eigenvalues.clamp_min(0.0)
        # V = X'Q / sqrt(n s); a direction with s = 0 is not in the row space and takes no part.
        length = (samples * eigenvalues).sqrt()
        inverse = torch.where(_present(eigenvalues), 1.0 / length, 0.0)
        labels = _coordinates(vectors, targets)
        slopes = (eigenvalues / samples).sqrt() * labels
        energies = labels.square() / samples
        floor = torch.zeros_like(targets[:, 0])
        overlaps = inverse * _coordinates(vectors, (inputs @ solution[..., None])[..., 0])
        seen = None
        if validation_inputs is not None:
            seen = (validation_inputs @ inputs.mT) @ (vectors * inverse[:, None, :])
    else:
        hessian = inputs.mT @ inputs / samples
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        eigenvalues = eigenvalues.clamp_min(0.0)
        slopes = _coordinates(vectors, (inputs.mT @ targets[..., None])[..., 0] / samples)
        energies = torch.where(_present(eigenvalues), slopes.square() / eigenvalues, 0.0)
        floor = 0.5 * (targets.square().mean(-1) - energies.sum(-1)).clamp_min(0.0)
        overlaps = _coordinates(vectors, solution)
        seen = None if validation_inputs is None else validation_inputs @ vectors
    return Spectrum(
        eigenvalues.double(),
        slopes.double(),
        energies.double(),
        floor.double(),
        overlaps.double(),
        solution.double().square().sum(-1),
        None if seen is None else seen.double(),
        None if validation_targets is None else validation_targets.double(),
    )


def evaluate(spectrum: Spectrum, step_sizes: Tensor, steps: int, *, on_validation: bool, radius: float) -> FinalLoss:
    """Loss after ``steps`` of gradient descent from zero, for each task and step size.

    Values of truncated runs are whatever the formulas give (possibly inf or NaN); the caller replaces them.

    Args:
        spectrum: From :func:`decompose`.
        step_sizes: eta, ``[g]``, float64.
        steps: t, at least 1.
        on_validation: Judge on the validation samples instead of the training samples.
        radius: Iterates with a norm of at least this are truncated.
    """
    s = spectrum.eigenvalues[:, None, :]  # [m, 1, r]
    beta = spectrum.slopes[:, None, :]
    eta = step_sizes[None, :, None]  # [1, g, 1]
    coordinates = beta * _phi(eta, s, steps)  # V'w_t, [m, g, r]
    tangents = beta * (steps * _power(eta * s, steps - 1))  # d V'w_t / d eta
    if on_validation:
        assert spectrum.validation_inputs is not None and spectrum.validation_targets is not None
        count = spectrum.validation_targets.shape[1]
        residual = spectrum.validation_targets[..., None] - spectrum.validation_inputs @ coordinates.mT
        slope = spectrum.validation_inputs @ tangents.mT  # [m, n_validation, g]
        loss = residual.square().sum(1) / (2 * count)
        gradient = -(residual * slope).sum(1) / count
        log_loss, log_gradient = loss.log(), gradient / loss
    else:
        factor = _power(eta * s, 2 * steps)
        loss = spectrum.floor[:, None] + 0.5 * (spectrum.energies[:, None, :] * factor).sum(-1)
        gradient = -steps * (beta.square() * _power(eta * s, 2 * steps - 1)).sum(-1)
        log_loss, log_gradient = _log_training_loss(spectrum, eta, steps)
    error = (
        spectrum.solution_norm[:, None]
        - 2.0 * (coordinates * spectrum.overlaps[:, None, :]).sum(-1)
        + coordinates.square().sum(-1)
    )
    truncated = first_truncated_step(spectrum, step_sizes, steps, radius)
    return FinalLoss(loss, gradient, log_loss, log_gradient, error, truncated)


def first_truncated_step(spectrum: Spectrum, step_sizes: Tensor, steps: int, radius: float) -> Tensor:
    """The first step at which ``|w|`` reaches the radius, ``-1`` for never; int64, ``[m, g]``.

    Most runs are cleared by a bound, at O(r); only the others are followed step by step, at O(t r).
    """
    s = spectrum.eigenvalues[:, None, :]
    eta = step_sizes[None, :, None]
    # Over the whole run |phi| <= phi(t) where 0 <= eta s <= 1 and |phi| <= 2/s where 1 < eta s <= 2.
    bound = torch.where(eta * s <= 1.0, _phi(eta, s, steps), 2.0 / s)
    norm = (spectrum.slopes[:, None, :] * bound).square().sum(-1)
    stable = step_sizes[None, :] * spectrum.eigenvalues[:, -1:] <= 2.0
    # The margin covers rounding in the bound; a run that is close to the radius is followed exactly.
    cleared = stable & (norm < 0.999 * radius**2)
    found = torch.full(norm.shape, -1, dtype=torch.int64, device=norm.device)
    task, column = torch.nonzero(~cleared, as_tuple=True)
    if len(task) == 0:
        return found
    eta_pairs = step_sizes[column, None]  # [pairs, 1]
    factor = 1.0 - eta_pairs * spectrum.eigenvalues[task]  # [pairs, r]
    slopes = spectrum.slopes[task]
    phi, power = torch.zeros_like(factor), torch.ones_like(factor)
    first = torch.full_like(task, -1)
    for step in range(1, steps + 1):
        phi = phi + eta_pairs * power
        power = power * factor
        inside = (slopes * phi).square().sum(-1) < radius**2  # False for NaN as well
        first = torch.where((first < 0) & ~inside, step, first)
        if bool((first > 0).all()):
            break
    found[task, column] = first
    return found


def _log_training_loss(spectrum: Spectrum, eta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``log L`` and its derivative by log-sum-exp: right where ``L`` underflows."""
    s = spectrum.eigenvalues[:, None, :]
    terms = (0.5 * spectrum.energies[:, None, :]).log() + 2 * steps * _log_factor(eta * s)
    floor = spectrum.floor.log()[:, None, None].expand(*terms.shape[:-1], 1)
    log_loss = torch.cat([terms, floor], -1).logsumexp(-1)
    weights = (terms - log_loss[..., None]).exp()
    factor = 1.0 - eta * s
    slopes = torch.where(weights > 0.0, weights * s / factor, 0.0)
    return log_loss, -2.0 * steps * slopes.sum(-1)


def _present(eigenvalues: Tensor) -> Tensor:
    """Which eigenvalues differ from zero by more than rounding."""
    tolerance = torch.finfo(eigenvalues.dtype).eps * eigenvalues.shape[-1]
    return eigenvalues > tolerance * eigenvalues[..., -1:]


def _coordinates(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors.mT @ values[..., None])[..., 0]


def _log_factor(x: Tensor) -> Tensor:
    """``log |1 - x|`` without the rounding of ``1 - x`` for small x."""
    return torch.where(x < 1.0, torch.log1p(-x.clamp_max(1.0)), (x - 1.0).log())


def _power(x: Tensor, exponent: int) -> Tensor:
    """``(1 - x)^exponent``, accurate for small x and large exponents."""
    if exponent == 0:
        return torch.ones_like(x)
    size = (exponent * _log_factor(x)).exp()
    return size if exponent % 2 == 0 else torch.where(x > 1.0, -size, size)


def _phi(eta: Tensor, s: Tensor, steps: int) -> Tensor:
    """``(1 - (1 - eta s)^steps) / s``; ``steps * eta`` where s is zero."""
    x = eta * s
    small = -torch.expm1(steps * torch.log1p(-x.clamp_max(1.0)))
    large = 1.0 - _power(x, steps)
    return torch.where(s > 0.0, torch.where(x < 1.0, small, large) / s, steps * eta)
