r"""Least squares from ``w_0 = 0``: gradient descent in closed form, and SGD step by step with its derivative.

The iterates of gradient descent on ``1/(2n) |y - X w|^2`` stay in the row space of X. With
``H = X'X/n = V diag(s) V'`` and ``beta = V'X'y/n`` their coordinates in the eigenvectors are

    V'w_t = phi(s) beta,      phi(s) = (1 - (1 - eta s)^t) / s,      d phi / d eta = t (1 - eta s)^(t-1),

and every quantity here follows, at O(r) per step size and any t. The eigenvectors come from the smaller of ``XX'/n``
and ``X'X/n``; r is the smaller of the number of samples and the dimension. Shapes: m tasks, g step sizes, n samples,
d dimensions.

Source: Wang, Yuan, Wu, Ge (ICML 2021), section 4; the formulas are linear algebra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Final:
    """A loss L after t steps and its derivatives in the step size, before truncation; each ``[m, g]``."""

    loss: Tensor
    gradient: Tensor
    log_loss: Tensor  # finite where L itself underflows, if the closed form of the training loss computed it
    log_gradient: Tensor
    population_error: Tensor
    truncated_step: Tensor  # the first step whose iterate left the ball, -1 for never; int64


@dataclass(frozen=True)
class Spectrum:
    """Many least-squares tasks in the eigenvectors of their training data; float64."""

    eigenvalues: Tensor  # s, [m, r], of the Hessian X'X/n, ascending
    slopes: Tensor  # beta, [m, r]: the negative gradient at zero
    energies: Tensor  # beta^2 / s, [m, r]: twice what fitting this direction takes off the loss
    floor: Tensor  # [m], the least training loss over all w; exactly zero where n <= d
    overlaps: Tensor  # V'w*, [m, r]
    solution_norm: Tensor  # |w*|^2, [m]
    validation_inputs: Tensor  # X_validation V, [m, n_validation, r]
    validation_targets: Tensor  # [m, n_validation]


def decompose(
    inputs: Tensor, targets: Tensor, solution: Tensor, validation_inputs: Tensor, validation_targets: Tensor
) -> Spectrum:
    """Diagonalise the training data of every task, in the data's dtype, which sets the accuracy and the cost.

    The result is in float64: what follows is cheap, and a search over the step size then sees a smooth function.

    Args:
        inputs: X, ``[m, n, d]``.
        targets: y, ``[m, n]``.
        solution: w*, ``[m, d]``.
        validation_inputs: ``[m, n_validation, d]``; there may be none.
        validation_targets: ``[m, n_validation]``.
    """
    samples, dimension = inputs.shape[1:]
    if samples <= dimension:
        eigenvalues, vectors = torch.linalg.eigh(inputs @ inputs.mT / samples)
        eigenvalues = eigenvalues.clamp_min(0.0)
        # V = X'Q / sqrt(n s); a direction with s = 0 is not in the row space and takes no part.
        inverse = torch.where(_present(eigenvalues), 1.0 / (samples * eigenvalues).sqrt(), 0.0)
        labels = _coordinates(vectors, targets)
        slopes = (eigenvalues / samples).sqrt() * labels
        energies = labels.square() / samples
        floor = torch.zeros_like(targets[:, 0])
        overlaps = inverse * _coordinates(vectors, (inputs @ solution[..., None])[..., 0])
        seen = (validation_inputs @ inputs.mT) @ (vectors * inverse[:, None, :])
    else:
        eigenvalues, vectors = torch.linalg.eigh(inputs.mT @ inputs / samples)
        eigenvalues = eigenvalues.clamp_min(0.0)
        slopes = _coordinates(vectors, (inputs.mT @ targets[..., None])[..., 0] / samples)
        energies = torch.where(_present(eigenvalues), slopes.square() / eigenvalues, 0.0)
        floor = 0.5 * (targets.square().mean(-1) - energies.sum(-1)).clamp_min(0.0)
        overlaps = _coordinates(vectors, solution)
        seen = validation_inputs @ vectors
    norm = solution.double().square().sum(-1)
    parts = (eigenvalues, slopes, energies, floor, overlaps, norm, seen, validation_targets)
    return Spectrum(*(part.double() for part in parts))


def descend(spectrum: Spectrum, step_sizes: Tensor, steps: int, *, on_validation: bool, radius: float) -> Final:
    """Loss after ``steps`` of gradient descent from zero, for each task and step size.

    Values of truncated runs are whatever the formulas give (possibly inf or NaN); the caller replaces them.

    Args:
        spectrum: From :func:`decompose`.
        step_sizes: eta, ``[g]``, float64.
        steps: t, at least 1.
        on_validation: Evaluate the loss on the validation samples instead of the training samples.
        radius: Iterates with a norm of at least this are truncated.
    """
    s, beta = spectrum.eigenvalues[:, None, :], spectrum.slopes[:, None, :]  # [m, 1, r]
    eta = step_sizes[None, :, None]  # [1, g, 1]
    coordinates = beta * _phi(eta, s, steps)  # V'w_t, [m, g, r]
    if on_validation:
        tangents = beta * (steps * _power(eta * s, steps - 1))  # d V'w_t / d eta
        residual = spectrum.validation_targets[..., None] - spectrum.validation_inputs @ coordinates.mT
        loss = 0.5 * residual.square().mean(1)
        gradient = -(residual * (spectrum.validation_inputs @ tangents.mT)).mean(1)
        log_loss, log_gradient = loss.log(), gradient / loss
    else:
        loss = spectrum.floor[:, None] + 0.5 * (spectrum.energies[:, None, :] * _power(eta * s, 2 * steps)).sum(-1)
        gradient = -steps * (beta.square() * _power(eta * s, 2 * steps - 1)).sum(-1)
        log_loss, log_gradient = _log_training_loss(spectrum, eta, steps)
    overlap = (coordinates * spectrum.overlaps[:, None, :]).sum(-1)
    error = spectrum.solution_norm[:, None] - 2.0 * overlap + coordinates.square().sum(-1)
    truncated = _first_truncated_step(spectrum, step_sizes, steps, radius)
    return Final(loss, gradient, log_loss, log_gradient, error, truncated)


def sgd(
    training: tuple[Tensor, Tensor],
    evaluation: tuple[Tensor, Tensor],
    solution: Tensor,
    step_sizes: Tensor,
    order: Tensor,
    *,
    radius: float,
) -> Final:
    """Loss after SGD from zero, and its derivative, with the tangents ``u_k = d w_k / d eta`` carried along.

    All tasks and all step sizes advance together and see the same samples, so that curves over the step size are
    smooth. Memory is constant in the number of steps.

    Args:
        training: X ``[m, n, d]`` and y ``[m, n]``.
        evaluation: The same for what the loss is evaluated on.
        solution: w*, ``[m, d]``.
        step_sizes: eta, ``[g]``.
        order: Sample indices of each step, ``[m, t, b]``.
        radius: Iterates with a norm of at least this are truncated; the run rests at its last iterate inside.
    """
    inputs, targets = training
    tasks = torch.arange(len(inputs), device=inputs.device)[:, None]
    eta = step_sizes.to(inputs.dtype)[None, :, None]
    weights = inputs.new_zeros(len(inputs), len(step_sizes), inputs.shape[2])
    tangents = torch.zeros_like(weights)
    truncated_step = torch.full(weights.shape[:2], -1, dtype=torch.int64, device=inputs.device)
    for step, chosen in enumerate(order.unbind(1), start=1):
        x, y = inputs[tasks, chosen], targets[tasks, chosen]
        gradient = (weights @ x.mT - y[:, None, :]) @ x / x.shape[1]  # [m, g, d]
        moved = weights - eta * gradient
        inside = moved.square().sum(-1) < radius**2  # False for NaN as well
        truncated_step = torch.where((truncated_step < 0) & ~inside, step, truncated_step)
        alive = (truncated_step < 0)[..., None]
        tangents = torch.where(alive, tangents - eta * ((tangents @ x.mT) @ x / x.shape[1]) - gradient, tangents)
        weights = torch.where(alive, moved, weights)
    residual = weights @ evaluation[0].mT - evaluation[1][:, None, :]  # [m, g, n]
    loss = 0.5 * residual.square().mean(-1)
    gradient = (residual * (tangents @ evaluation[0].mT)).mean(-1)
    error = (weights - solution[:, None, :]).square().sum(-1)
    return Final(loss, gradient, loss.log(), gradient / loss, error, truncated_step)


def _first_truncated_step(spectrum: Spectrum, step_sizes: Tensor, steps: int, radius: float) -> Tensor:
    """The first step at which ``|w|`` reaches the radius, ``-1`` for never; int64, ``[m, g]``.

    Most runs are cleared by a bound, at O(r); only the others are followed step by step, at O(t r).
    """
    s, eta = spectrum.eigenvalues[:, None, :], step_sizes[None, :, None]
    # Over the whole run |phi| <= phi(t) where 0 <= eta s <= 1 and |phi| <= 2/s where 1 < eta s <= 2.
    bound = torch.where(eta * s <= 1.0, _phi(eta, s, steps), 2.0 / s)
    norm = (spectrum.slopes[:, None, :] * bound).square().sum(-1)
    stable = step_sizes[None, :] * spectrum.eigenvalues[:, -1:] <= 2.0
    # The margin covers rounding in the bound; a run that is close to the radius is followed exactly.
    found = torch.full(norm.shape, -1, dtype=torch.int64, device=norm.device)
    task, column = torch.nonzero(~(stable & (norm < 0.999 * radius**2)), as_tuple=True)
    if len(task) == 0:
        return found
    eta_pairs, slopes = step_sizes[column, None], spectrum.slopes[task]  # [pairs, 1], [pairs, r]
    factor = 1.0 - eta_pairs * spectrum.eigenvalues[task]
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
    shares = (terms - log_loss[..., None]).exp()
    return log_loss, -2.0 * steps * torch.where(shares > 0.0, shares * s / (1.0 - eta * s), 0.0).sum(-1)


def _present(eigenvalues: Tensor) -> Tensor:
    """Which eigenvalues differ from zero by more than rounding."""
    return eigenvalues > torch.finfo(eigenvalues.dtype).eps * eigenvalues.shape[-1] * eigenvalues[..., -1:]


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
