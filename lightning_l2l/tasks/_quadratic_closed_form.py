"""Meta-objectives and meta-gradients of the quadratic: its mathematics, without the task."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_l2l.tasks import _quadratic_checks as checks
from lightning_l2l.tasks import _quadratic_recursion as recursion
from lightning_l2l.tasks import _quadratic_spectral as spectral
from lightning_l2l.tasks._quadratic_objectives import (
    Iterates,
    Objective,
    SignedLog,
    StepValues,
    iterates_of,
    objective_gradient,
    objective_value,
)

Method = Literal["spectral", "recursion"]


class Trajectory(NamedTuple):
    """A run of gradient descent, in a form that cannot overflow: ``w_k = exp(log_norms) * directions``.

    Attributes:
        log_losses: ``log f(w_k)`` for ``k = 0 .. t``, ``[..., t + 1]``.
        directions: ``w_k / |w_k|``, ``[..., t + 1, d]``; zero where ``w_k`` is exactly zero.
        log_norms: ``log |w_k|``, ``[..., t + 1]``.
    """

    log_losses: Tensor
    directions: Tensor
    log_norms: Tensor


class ClosedForm:
    """What is known about ``1/2 w'Hw``; described, with its options, at :class:`Quadratic`."""

    def __init__(self, hessian: Tensor, initial_point: Tensor) -> None:
        """Check and keep the Hessian and the starting point."""
        checks.check_hessian(hessian)
        checks.check_initial_point(initial_point, hessian)
        self.dtype = torch.promote_types(hessian.dtype, initial_point.dtype)
        symmetric = (hessian.detach().double() + hessian.detach().double().mT) / 2
        self.hessian = symmetric.to(self.dtype)
        self.initial_point = initial_point.detach().to(self.dtype)
        self.dimension = hessian.shape[-1]
        self.batch_shape = checks.broadcast_shapes(hessian.shape[:-2], initial_point.shape[:-1])

    @cached_property
    def _spectrum(self) -> spectral.Spectrum:
        spectrum = spectral.decompose(self.hessian.double(), self.initial_point.double())
        checks.check_eigenvalues(spectrum.eigenvalues)
        return spectrum

    @property
    def largest_curvature(self) -> Tensor:
        """``L``, the largest eigenvalue of each Hessian."""
        return self._spectrum.eigenvalues[..., -1].to(self.dtype)

    @property
    def smallest_curvature(self) -> Tensor:
        """``alpha``, the smallest eigenvalue of each Hessian."""
        return self._spectrum.eigenvalues[..., 0].to(self.dtype)

    @property
    def stability_limit(self) -> Tensor:
        """``2 / L``, above which gradient descent diverges."""
        return (2 / self._spectrum.eigenvalues[..., -1]).to(self.dtype)

    @property
    def limiting_step_size(self) -> Tensor:
        """``2 / (L + alpha)``, which the optimal step size approaches like ``log(L / alpha) / t``."""
        eigenvalues = self._spectrum.eigenvalues
        return (2 / (eigenvalues[..., -1] + eigenvalues[..., 0])).to(self.dtype)

    @torch.no_grad()
    def meta_objective(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: Objective = "log",
        *,
        iterates: Iterates = "1..t",
        method: Method = "spectral",
    ) -> Tensor:
        """Return the meta-objective after ``steps`` steps; the class describes objectives and options.

        The log objectives are always finite (minus infinity only for a loss of exactly zero); ``"naive"`` and
        ``"naive_mean"`` are infinite or zero where the true number is outside the dtype.

        Raises:
            TypeError: If ``steps`` is not an int or ``step_size`` not a real number or tensor.
            ValueError: If ``steps < 1``, a step size is negative or not finite, or an option is unknown.
        """
        values = self._step_values(step_size, steps, iterates_of(steps, objective, iterates), method, False)
        return objective_value(values, steps, objective).to(self.dtype)

    @torch.no_grad()
    def meta_gradient(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: Objective = "log",
        *,
        iterates: Iterates = "1..t",
        method: Method = "spectral",
        first_order: bool = False,
    ) -> Tensor:
        """Return the exact derivative of the meta-objective with respect to the step size.

        Never NaN. Infinite only where the true number is outside the dtype, and zero with the true sign
        (``-0.0`` included) where it is below the dtype's range; both happen to the naive objectives only, or
        to ``first_order``, and :meth:`signed_log_meta_gradient` then has the number.

        Args:
            step_size: Step sizes, ``[...]``; see the class for broadcasting.
            steps: Number of inner steps ``t``.
            objective: Which meta-objective.
            iterates: Which losses the means run over.
            method: ``"spectral"`` or ``"recursion"``.
            first_order: Treat the inner gradients as constants, as the reference TensorFlow code does. The
                result is *not* the derivative of the objective and explodes with ``t``; offered to reproduce
                and to show that.

        Raises:
            TypeError: As :meth:`meta_objective`.
            ValueError: As :meth:`meta_objective`, or for ``first_order`` with the recursion.
        """
        read = iterates_of(steps, objective, iterates)
        values = self._step_values(step_size, steps, read, method, first_order)
        if objective == "log":  # not through a logarithm and back: keeps the last digits
            return (values.log_derivative[..., -1] / steps).to(self.dtype)
        return objective_gradient(values, steps, objective).value().to(self.dtype)

    @torch.no_grad()
    def signed_log_meta_gradient(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: Objective = "log",
        *,
        iterates: Iterates = "1..t",
        method: Method = "spectral",
        first_order: bool = False,
    ) -> SignedLog:
        """Return :meth:`meta_gradient` as float64 ``(sign, log_magnitude)``, which nothing overflows.

        Example:
            >>> from lightning_l2l.tasks import Quadratic
            >>> task = Quadratic(torch.eye(2) + torch.ones(2, 2), torch.tensor([1.0, 0.0]))
            >>> sign, log_magnitude = task.signed_log_meta_gradient(10.0, steps=5000, objective="naive")
            >>> float(sign), round(float(log_magnitude), 3)
            (1.0, 33679.612)
        """
        read = iterates_of(steps, objective, iterates)
        values = self._step_values(step_size, steps, read, method, first_order)
        return objective_gradient(values, steps, objective)

    @torch.no_grad()
    def optimal_step_size(self, steps: int) -> Tensor:
        """Return the minimiser of ``f(w_t)``, and so of both last-step objectives, shape ``batch_shape``.

        It is unique (the naive objective is strictly convex), depends on ``t`` and ``w_0``, and is found to
        float64 precision by bisection on the sign of the exact gradient (then rounded to the task's dtype).
        """
        checks.check_steps(steps)
        return spectral.optimal_step_size(self._spectrum, steps).expand(self.batch_shape).to(self.dtype)

    @torch.no_grad()
    def trajectory(self, step_size: float | Tensor, steps: int) -> Trajectory:
        """Return losses and points ``w_0 .. w_t`` of gradient descent as logarithms and unit vectors.

        Costs O(t d^2) time and O(t d) memory per step size.
        """
        checks.check_steps(steps)
        eta = checks.as_step_size(step_size, self.hessian, self.batch_shape)
        values = spectral.step_values(self._spectrum, eta, 0, steps, False)
        unit, log_norms = spectral.directions(self._spectrum, eta, values.steps)
        return Trajectory(values.log_loss.to(self.dtype), unit.to(self.dtype), log_norms.to(self.dtype))

    def _step_values(
        self,
        step_size: float | Tensor,
        steps: int,
        read: tuple[int, int],
        method: Method,
        first_order: bool,
    ) -> StepValues:
        checks.check_steps(steps)
        eta = checks.as_step_size(step_size, self.hessian, self.batch_shape)
        if method == "spectral":
            return spectral.step_values(self._spectrum, eta, *read, first_order)
        if method != "recursion":
            raise ValueError(f"Unknown method {method!r}. Choose 'spectral' or 'recursion'.")
        if first_order:
            raise ValueError("first_order is only implemented for method='spectral'.")
        work = torch.promote_types(self.dtype, torch.float32)
        return recursion.step_values(self.hessian.to(work), self.initial_point.to(work), eta.to(work), *read)
