"""The quadratic of arXiv 2006.16495, section 3: a task whose every meta-gradient is known exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_l2l.tasks import _quadratic_closed_form as closed_form
from lightning_l2l.tasks._quadratic_closed_form import Objective, SignedLog
from lightning_l2l.tasks.task import Task

Family = Literal["square", "wide", "condition"]
Start = Literal["gaussian", "sphere"]


class Quadratic(Task):
    r"""Gradient descent on ``1/2 w'Hw`` from a fixed start, with exact meta-objectives and meta-gradients.

    The meta-parameter is the constant step size of ``t`` steps of gradient descent. Everything is a sum over the
    eigenvalues of ``H``, evaluated in log space in float64: right from step size zero to far beyond the stability limit
    and for any number of steps, where back-propagation returns NaN or a silent zero. Use it to see what the log
    objective does, and as an oracle for estimators.

    The objectives, for ``t`` steps:

    ==============  ====================================================================
    ``log``         ``(1/t) log f(w_t)``: bounded, with a bounded gradient
    ``naive``       ``f(w_t)``: strictly convex, but explodes or vanishes exponentially
    ``log_mean``    ``(1/t) sum_k (1/k) log f(w_k)``, ``k = 1 .. t``
    ``naive_mean``  ``(1/t) sum_k f(w_k)``, ``k = 1 .. t``
    ==============  ====================================================================

    Step sizes are numbers or tensors of any shape, and results have their shape, the task's dtype and no autograd
    graph. Python numbers are taken as float64, so that a float32 task loses nothing to the rounding of the step size.
    The cost is one eigendecomposition, O(d^3), when the task is made, then O(d) per step size for ``log`` and
    ``naive``, O(t d) for the means.

    Where the loss is exactly zero (a multiple of the identity with the perfect step size) the log objective is minus
    infinity and its gradient, which does not exist, is returned as 0: it is the optimum.

    Args:
        hessian: ``H``, symmetric positive definite, ``[d, d]``, floating point.
        initial_point: ``w_0``, not zero, ``[d]``. Dtypes are promoted.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the Hessian is not square, finite, symmetric and positive definite, or the point is zero, not
            finite or of another dimension.

    Source: Wang, Yuan, Wu, Ge, "Guarantees for Tuning the Step Size using a Learning-to-Learn Approach" (ICML 2021),
    section 3; the formulas are linear algebra.

    Example:
        >>> task = Quadratic(torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([0.6, 0.8]))
        >>> float(task.limiting_step_size)
        1.3333333730697632
        >>> task.meta_gradient(torch.tensor([1e-6, 1.0, 20.0]), steps=10_000)
        tensor([-1.5269, -2.0000,  0.1053])
        >>> task.meta_gradient(20.0, steps=10_000, objective="naive")
        tensor(inf)
    """

    homogeneity = 2.0

    def __init__(self, hessian: Tensor, initial_point: Tensor) -> None:
        """See the class."""
        _check_hessian(hessian)
        _check_initial_point(initial_point, hessian)
        self.dtype = torch.promote_types(hessian.dtype, initial_point.dtype)
        symmetric = (hessian.detach().double() + hessian.detach().double().mT) / 2
        self.hessian = symmetric.to(self.dtype)
        self.initial_point = initial_point.detach().to(self.dtype)
        self._spectrum = closed_form.decompose(self.hessian, self.initial_point)
        _check_eigenvalues(self._spectrum.eigenvalues)

    @classmethod
    def random(
        cls,
        dim: int,
        *,
        seed: int,
        kind: Family = "square",
        condition_number: float | None = None,
        start: Start = "gaussian",
        dtype: torch.dtype = torch.float64,
    ) -> Quadratic:
        """Draw a quadratic from one of the paper's families.

        Args:
            dim: Dimension ``d``.
            seed: Seed of the generator; the start is drawn before the matrix, as in the reference code.
            kind: ``"square"``: ``H = X'X`` with Gaussian ``X`` of shape d x d (the reference code; the smallest
                curvature is near zero). ``"wide"``: ``H = XX'`` with ``X`` of shape d x 2d (the paper's theorem).
                ``"condition"``: largest curvature 1, smallest ``1 / condition_number``, the others log-uniform
                between, random eigenvectors.
            condition_number: Required for, and only for, ``kind="condition"``.
            start: ``"gaussian"`` (the reference code) or ``"sphere"``, of length one (the paper).
            dtype: Floating dtype of the result; drawn in float64.

        Raises:
            ValueError: An option that is not known, or numbers out of range.

        Example:
            >>> Quadratic.random(20, seed=0, kind="wide").hessian.shape
            torch.Size([20, 20])
        """
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r} must be an int of at least 1.")
        for name, chosen, known in (("kind", kind, get_args(Family)), ("start", start, get_args(Start))):
            if chosen not in known:
                raise ValueError(f"{name}={chosen!r} is not known; choose one of {list(known)}.")
        if (kind == "condition") != (condition_number is not None):
            raise ValueError("condition_number belongs to kind='condition': give both or neither.")
        generator = torch.Generator().manual_seed(seed)
        point = torch.randn(dim, generator=generator, dtype=torch.float64)
        if start == "sphere":
            point = point / torch.linalg.vector_norm(point)
        if condition_number is not None:
            hessian = _with_condition_number(dim, condition_number, generator)
        else:
            columns = dim if kind == "square" else 2 * dim
            factor = torch.randn(dim, columns, generator=generator, dtype=torch.float64)
            hessian = factor.mT @ factor if kind == "square" else factor @ factor.mT
        return cls(hessian.to(dtype), point.to(dtype))

    @property
    def largest_curvature(self) -> Tensor:
        """``L``, the largest eigenvalue of the Hessian."""
        return self._spectrum.eigenvalues[-1].to(self.dtype)

    @property
    def smallest_curvature(self) -> Tensor:
        """``alpha``, the smallest eigenvalue of the Hessian."""
        return self._spectrum.eigenvalues[0].to(self.dtype)

    @property
    def stability_limit(self) -> Tensor:
        """``2 / L``, above which gradient descent diverges."""
        return (2 / self._spectrum.eigenvalues[-1]).to(self.dtype)

    @property
    def limiting_step_size(self) -> Tensor:
        """``2 / (L + alpha)``, which the optimal step size approaches like ``log(L / alpha) / t``."""
        return (2 / (self._spectrum.eigenvalues[-1] + self._spectrum.eigenvalues[0])).to(self.dtype)

    @torch.no_grad()
    def meta_objective(self, step_size: float | Tensor, steps: int, objective: Objective = "log") -> Tensor:
        """Return the meta-objective after ``steps`` steps; the class describes the objectives.

        The log objectives are always finite (minus infinity only for a loss of exactly zero); the naive ones are
        infinite or zero where the true number is outside the dtype.

        Raises:
            TypeError: If ``steps`` is not an int or ``step_size`` not a real number or tensor.
            ValueError: If ``steps < 1``, a step size is negative or not finite, or the objective is unknown.
        """
        eta = self._checked(step_size, steps)
        return closed_form.meta_objective(self._spectrum, eta, steps, objective).to(self.dtype)

    def meta_gradient(self, step_size: float | Tensor, steps: int, objective: Objective = "log") -> Tensor:
        """Return the exact derivative of the meta-objective with respect to the step size.

        Never NaN. Infinite only where the true number is outside the dtype, and zero with the true sign (``-0.0``
        included) where it is below the dtype's range; both happen to the naive objectives only, and
        :meth:`signed_log_meta_gradient` then has the number.

        Args:
            step_size: Step sizes, ``[...]``.
            steps: Number of inner steps ``t``.
            objective: Which meta-objective.

        Raises:
            TypeError: As :meth:`meta_objective`.
            ValueError: As :meth:`meta_objective`.
        """
        return self.signed_log_meta_gradient(step_size, steps, objective).value().to(self.dtype)

    @torch.no_grad()
    def signed_log_meta_gradient(
        self, step_size: float | Tensor, steps: int, objective: Objective = "log"
    ) -> SignedLog:
        """Return :meth:`meta_gradient` as float64 ``(sign, log_magnitude)``, which nothing overflows.

        Example:
            >>> task = Quadratic(torch.eye(2) + torch.ones(2, 2), torch.tensor([1.0, 0.0]))
            >>> sign, log_magnitude = task.signed_log_meta_gradient(10.0, steps=5000, objective="naive")
            >>> float(sign), round(float(log_magnitude), 3)
            (1.0, 33679.612)
        """
        eta = self._checked(step_size, steps)
        return closed_form.meta_gradient(self._spectrum, eta, steps, objective)

    @torch.no_grad()
    def optimal_step_size(self, steps: int) -> Tensor:
        """Return the minimiser of ``f(w_t)``, and so of both last-step objectives, a scalar.

        It is unique (the naive objective is strictly convex), depends on ``t`` and ``w_0``, and is exact to float64
        before it is rounded to the task's dtype.
        """
        _check_steps(steps)
        return closed_form.optimal_step_size(self._spectrum, steps).to(self.dtype)

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``{"point": w_0}``; the start is fixed, ``generator`` is not used."""
        return {"point": self.initial_point.clone()}

    def loss(self, parameters: Mapping[str, Tensor], batch: Any = None) -> Tensor:
        """Return ``1/2 w'Hw`` at ``parameters["point"]``; there are no batches."""
        point = parameters["point"]
        return 0.5 * (point @ (self.hessian @ point))

    def sample_batch(self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None) -> None:
        """Return ``None``: the loss is deterministic."""

    def _checked(self, step_size: float | Tensor, steps: int) -> Tensor:
        """The step size as a float64 tensor on the task's device."""
        _check_steps(steps)
        if isinstance(step_size, bool) or not isinstance(step_size, (int, float, Tensor)):
            raise TypeError(f"step_size must be a number or a torch.Tensor, got {type(step_size).__name__}.")
        if isinstance(step_size, Tensor) and (step_size.is_complex() or step_size.dtype == torch.bool):
            raise TypeError(f"step_size must be real, got {step_size.dtype}.")
        # dtype given here: as_tensor would round a Python number to the default dtype, float32, first
        eta = torch.as_tensor(step_size, dtype=torch.float64, device=self.hessian.device).detach()
        if not (eta * self._spectrum.eigenvalues[-1]).isfinite().all():
            raise ValueError(
                "step_size is NaN, infinite, or so large that step_size * curvature is; do not apply the meta-update "
                "that produced it. Gradient descent is stable below 2 / largest curvature."
            )
        if (eta < 0).any():
            raise ValueError(
                f"step_size must not be negative, got {float(eta.min()):.3g}: that would be ascent. Clamp at zero, or "
                "learn the logarithm."
            )
        return eta


def _with_condition_number(dim: int, condition_number: float, generator: torch.Generator) -> Tensor:
    if not (math.isfinite(condition_number) and condition_number >= 1):
        raise ValueError(f"condition_number={condition_number!r} must be finite and at least 1.")
    if dim == 1 and condition_number != 1:
        raise ValueError("In one dimension the condition number is 1.")
    # Both ends exactly, the rest log-uniform between them.
    position = torch.rand(dim, generator=generator, dtype=torch.float64)
    position[0], position[-1] = 0.0, 1.0
    eigenvalues = torch.exp((position - 1) * math.log(condition_number))
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    hessian: Tensor = (rotation * eigenvalues) @ rotation.mT
    return (hessian + hessian.mT) / 2


def _check_hessian(hessian: Tensor) -> None:
    _check_floating("hessian", hessian)
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or len(hessian) == 0:
        raise ValueError(f"hessian must be square, [d, d], d >= 1, got shape {tuple(hessian.shape)}.")
    if not hessian.isfinite().all():
        raise ValueError("hessian contains NaN or infinity, so the quadratic has no value anywhere.")
    matrix = hessian.double()
    asymmetry = float((matrix - matrix.mT).abs().max())
    if asymmetry > 100 * torch.finfo(hessian.dtype).eps * float(matrix.abs().max()):
        raise ValueError(
            f"hessian must be symmetric: it differs from its transpose by {asymmetry:.3g}. The gradient of 1/2 w'Hw is "
            "only Hw for a symmetric H; pass (H + H.mT) / 2 if that is what you mean."
        )


def _check_eigenvalues(eigenvalues: Tensor) -> None:
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if not smallest > len(eigenvalues) * torch.finfo(torch.float64).eps * largest:
        raise ValueError(
            f"hessian must be positive definite, but its smallest eigenvalue is {smallest:.3g}. Without a positive "
            "smallest curvature the loss has no single minimum and the optimal step size no bound; add a small "
            "multiple of the identity, or drop the flat directions."
        )


def _check_initial_point(initial_point: Tensor, hessian: Tensor) -> None:
    _check_floating("initial_point", initial_point)
    if initial_point.shape != hessian.shape[:1]:
        raise ValueError(
            f"initial_point must be [d] with d = {len(hessian)} as in the hessian, got {tuple(initial_point.shape)}."
        )
    if not initial_point.isfinite().all():
        raise ValueError("initial_point contains NaN or infinity.")
    if not initial_point.any():
        raise ValueError(
            "initial_point is zero, which is the minimum: no step size changes anything there and the log objective is "
            "minus infinity everywhere. Start anywhere else."
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}.")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__} {steps!r}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: with no step the step size has no effect.")
