"""The quadratic of arXiv 2006.16495, section 3: a task whose every meta-gradient is known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_l2l.tasks import _quadratic_backpropagation as backpropagation
from lightning_l2l.tasks import _quadratic_checks as checks
from lightning_l2l.tasks._quadratic_closed_form import ClosedForm
from lightning_l2l.tasks._quadratic_families import Family, random_quadratic
from lightning_l2l.tasks._quadratic_objectives import Objective
from lightning_l2l.tasks.task import Task


class Quadratic(ClosedForm, Task):
    r"""Gradient descent on ``1/2 w'Hw`` from a fixed start, with exact meta-objectives and meta-gradients.

    The meta-parameter is the constant step size of ``t`` steps of gradient descent. With ``H = sum_i lambda_i
    u_i u_i'`` and ``b_i = 1 - step_size * lambda_i`` everything is a sum over eigenvalues, evaluated in log
    space in float64: results are right from step size zero to far beyond the stability limit and for any
    number of steps, where back-propagation returns NaN or a silent zero. Use it to see what the log objective
    does, and as an oracle for estimators.

    The objectives, for ``t`` steps:

    ================  ======================================================================
    ``log``           ``(1/t) log f(w_t)``: bounded, with a bounded gradient
    ``naive``         ``f(w_t)``: strictly convex, but explodes or vanishes exponentially
    ``naive_mean``    ``(1/t) sum_k f(w_k)``
    ``log_mean``      ``(1/t) sum_k (1/k) log f(w_k)``, the mean of the log objective
    ``log_of_mean``   ``(1/t) log((1/t) sum_k f(w_k))``
    ================  ======================================================================

    Sums run over ``k = 1 .. t`` with ``iterates="1..t"`` and over ``k = 0 .. t-1`` with
    ``iterates="0..t-1"``, always divided by ``t``. In ``log_mean`` the term ``k = 0``, which would be ``log
    f(w_0) / 0``, does not depend on the step size and counts as zero. The reference code of the paper is
    reproduced by ``steps - 1`` for its "last" loss ``f(w_{t-1})``, by ``iterates="0..t-1"`` for its
    "average", by multiplying a log objective by its number of steps where it omits ``1/t``, and by
    ``first_order=True`` where it stops the gradient of the inner gradients.

    Step sizes are numbers or tensors of any shape. They broadcast with the batch of tasks, ``batch_shape``,
    and results have the broadcast shape: for one task that of ``step_size``; for ``[n]`` tasks, ``step_size``
    of shape ``[n]`` gives one each and ``[m, 1]`` gives ``[m, n]``. Results have the task's dtype and carry
    no autograd graph. Python numbers are taken as float64, so a float32 task loses nothing to the rounding of
    the step size.

    ``method="spectral"`` costs one cached eigendecomposition, O(d^3), then O(d) per step size for the
    last-step objectives and O(t d) for the others. ``method="recursion"`` needs no eigendecomposition and
    costs O(t d^2); its vectors have the task's dtype (half types: float32). It is there to check the first
    and to be measured: in float32 it is accurate to about 1e-7 in the median but 2e-4 next to the optimum,
    where spectral is exact up to the final rounding.

    Where the loss is exactly zero (all ``b_i = 0``: a multiple of the identity, or one dimension, with the
    perfect step size) the log objective is minus infinity and its gradient, which does not exist, is returned
    as 0: it is the optimum.

    Args:
        hessian: ``H``, symmetric positive definite, ``[..., d, d]``, floating point.
        initial_point: ``w_0``, not zero, ``[..., d]``. Batch dimensions broadcast; dtypes are promoted.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the Hessian is not square, finite, symmetric and positive definite, or the point is
            zero, not finite or of another dimension.

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

    @classmethod
    def random(
        cls,
        dim: int,
        *,
        seed: int,
        kind: Family = "square",
        condition_number: float | None = None,
        start: Literal["gaussian", "sphere"] = "gaussian",
        tasks: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Quadratic:
        """Draw a quadratic, or a batch of them, from one of the paper's families.

        Args:
            dim: Dimension ``d``.
            seed: Seed of the generator; the start is drawn before the matrix, as in the reference code.
            kind: ``"square"``: ``H = X'X`` with Gaussian ``X`` of shape d x d (the reference code; the
                smallest curvature is near zero). ``"wide"``: ``H = XX'`` with ``X`` of shape d x 2d (the
                paper's theorem). ``"condition"``: largest curvature 1, smallest ``1 / condition_number``, the
                others log-uniform between, random eigenvectors.
            condition_number: Required for, and only for, ``kind="condition"``.
            start: ``"gaussian"`` (the reference code) or ``"sphere"``, of length one (the paper).
            tasks: Number of tasks in a batch; ``None`` for a single task without batch dimension.
            dtype: Floating dtype of the result; drawn in float64.

        Example:
            >>> Quadratic.random(20, seed=0, kind="wide", tasks=3).hessian.shape
            torch.Size([3, 20, 20])
        """
        hessian, point = random_quadratic(dim, seed, kind, condition_number, start, tasks)
        return cls(hessian.to(dtype), point.to(dtype))

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``{"point": w_0}``; the start is fixed, ``generator`` is not used."""
        return {"point": self.initial_point.clone()}

    def loss(self, parameters: Mapping[str, Tensor], batch: Any = None) -> Tensor:
        """Return ``1/2 w'Hw`` at ``parameters["point"]``; there are no batches.

        Raises:
            ValueError: For a batch of quadratics, whose loss would not be a scalar.
        """
        if self.batch_shape:
            raise ValueError(
                f"This is a batch of {tuple(self.batch_shape)} quadratics, which has no single loss to train "
                "on. Build one Quadratic per task from hessian[i] and initial_point[i]."
            )
        point = parameters["point"]
        return 0.5 * (point @ (self.hessian @ point))

    def sample_batch(self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None) -> None:
        """Return ``None``: the loss is deterministic."""

    def backprop_failure(
        self, step_size: float, dtype: torch.dtype | None = None, *, max_steps: int = 20_000
    ) -> backpropagation.BackpropagationFailure:
        """Predict the first ``t`` at which plain back-propagation of the log objective returns zero or NaN.

        Example:
            >>> task = Quadratic(torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([0.6, 0.8]))
            >>> task.backprop_failure(4.0, torch.float32).zero_gradient
            41
        """
        self._require_single("backprop_failure")
        eta = checks.as_step_size(step_size, self.hessian, self.batch_shape)
        return backpropagation.predict_failure(
            self.hessian.double(), self._spectrum, eta, dtype or self.dtype, max_steps
        )

    def backprop_meta_gradient(
        self,
        step_size: float,
        steps: int,
        dtype: torch.dtype | None = None,
        objective: Objective = "log",
    ) -> backpropagation.BackpropagationResult:
        """Return what plain reverse-mode differentiation gives in ``dtype``, with a verdict."""
        self._require_single("backprop_meta_gradient")
        checks.check_steps(steps)
        checks.as_step_size(step_size, self.hessian, self.batch_shape)
        return backpropagation.backpropagate(
            self.hessian, self.initial_point, step_size, steps, objective, dtype or self.dtype
        )

    def _require_single(self, name: str) -> None:
        if self.batch_shape:
            raise ValueError(f"{name} looks at one task, not a batch of {tuple(self.batch_shape)}.")
