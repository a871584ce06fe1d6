"""Linear regression with label noise: when does a step size need a held-out set? Many tasks at once, exact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_l2l.exact.scalar_search import MetaSignal, SearchResult, bisect_log_step_size
from lightning_l2l.tasks import _least_squares_closed_form as closed_form
from lightning_l2l.tasks import _least_squares_unroll as unroll
from lightning_l2l.tasks._least_squares_checks import check_step_sizes, check_steps_and_order
from lightning_l2l.tasks._least_squares_data import LeastSquaresData
from lightning_l2l.tasks._least_squares_results import (
    LeastSquaresMetaGradient,
    LeastSquaresObjective,
    LeastSquaresTrajectory,
    StepSizeCurve,
)


class LeastSquares(LeastSquaresData):
    """Least-squares tasks ``1/2 (y - <w, x>)^2`` with noisy labels, trained by gradient descent or SGD from zero.

    A task has a solution w*, and samples with ``y = <w*, x> + xi``. With fewer samples than dimensions
    training can fit the noise: judged on its training data (*train-by-train*) the best step size does that;
    judged on held-out data (*train-by-validation*) the best step size stops early. One object holds many
    tasks, and every result has the task as its first dimension. Results are exact (closed form) or step by
    step, both with the derivative in the step size.

    Runs that leave the ball of ``truncation_radius`` are *truncated*, as in the paper: their loss is that of
    a random point on its surface, their gradient is NaN, and ``truncated_step`` says when. They are never
    reported as a zero gradient.

    Args:
        inputs: x, ``[tasks, samples, dimension]``, floating point.
        targets: y, ``[tasks, samples]``.
        solution: w*, ``[tasks, dimension]``.
        noise: sigma, the standard deviation of the labels' noise; sets the default radius and is used for
            fresh samples.
        validation_samples: How many samples, the last of each task, are held out.
        truncation_radius: ``None`` for 40 sigma; ``math.inf`` truncates only what leaves the number range.

    Raises:
        TypeError: Not floating point, or different dtypes.
        ValueError: Shapes that do not fit, nothing to train on, non-finite numbers, a negative noise, a
            radius that would truncate the solution itself.

    Source: Wang, Yuan, Wu, Ge, "Guarantees for Tuning the Step Size using a Learning-to-Learn Approach"
    (ICML 2021), section 4.

    Example:
        >>> tasks = LeastSquares.sample(tasks=8, dimension=40, samples=20, noise=2.0, seed=0)
        >>> by_train = tasks.meta_gradient(0.1, steps=30, meta_data="train")
        >>> by_train.value.shape, by_train.truncated.any().item()
        (torch.Size([8]), False)
        >>> halves = tasks.split(validation_fraction=0.5)
        >>> grid = torch.logspace(-4, 0, 17)
        >>> large = tasks.best_step_size(30, grid=grid, meta_data="train").best
        >>> small = halves.best_step_size(30, grid=grid, meta_data="val").best
        >>> large > 10 * small
        True
    """

    def meta_gradient(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: LeastSquaresObjective = "log",
        *,
        meta_data: Literal["train", "val"] = "val",
        method: Literal["auto", "closed_form", "unroll"] = "auto",
        order: Tensor | None = None,
    ) -> LeastSquaresMetaGradient:
        """Meta-objective after ``steps`` and its derivative in the step size, for each task and step size.

        Args:
            step_size: eta, a number or a tensor ``[g]``; non-negative.
            steps: t.
            objective: ``"naive"`` is the loss L, ``"log"`` is ``(1/t) log L``, per task.
            meta_data: ``"train"`` judges on the training samples, ``"val"`` on the held-out ones.
            method: ``"closed_form"`` costs one eigendecomposition per task (kept for later calls), then O(r)
                per step size (O(n_validation r) for ``"val"``) with r = min(samples, dimension); ``"unroll"``
                follows the steps at O(t n d). ``"auto"`` is the closed form for gradient descent and the
                unroll for SGD.
            order: For SGD, the samples used by each step: indices ``[t, b]``, the same for every task, or
                ``[tasks, t, b]``; see :meth:`random_order`. ``None`` is gradient descent on all training
                samples.

        Returns:
            Value, gradient, truncated step and population error, ``[tasks]`` or ``[tasks, g]``. Where a
            step-by-step loss is too small for the dtype to resolve, ``unresolved`` is set and the log
            gradient is NaN.

        Raises:
            ValueError: A negative or non-finite step size, ``steps < 1``, no held-out samples, or an order
                that does not fit.
        """
        return self._evaluate(step_size, steps, objective, meta_data, method, order, with_gradient=True)

    def trajectory(
        self, step_size: float | Tensor, steps: int, *, order: Tensor | None = None
    ) -> LeastSquaresTrajectory:
        """Train and held-out error along the run, step by step; arguments and errors as :meth:`meta_gradient`.

        Without held-out samples their error is NaN. A truncated run is NaN from its truncation on.
        """
        eta, shape = check_step_sizes(step_size, self.inputs)
        check_steps_and_order(steps, order, len(self), self.training_samples, "unroll")
        return LeastSquaresTrajectory.record(
            self._iterates(eta, steps, order, with_tangents=False),
            self._samples("train"),
            self._samples("val") if self.validation_samples else None,
            self.solution,
            (len(self), *shape, steps + 1),
        )

    def best_step_size(
        self,
        steps: int,
        *,
        grid: Tensor,
        objective: LeastSquaresObjective = "naive",
        meta_data: Literal["train", "val"] = "val",
        order: Tensor | None = None,
    ) -> StepSizeCurve:
        """The step size of a grid with the least mean meta-objective over the tasks (the paper's experiment 2).

        Every step size sees the same tasks and samples. For a search by meta-gradients, without a grid, see
        :meth:`optimal_step_size`. Arguments and errors as :meth:`meta_gradient`.
        """
        # Without the gradient SGD costs half.
        result = self._evaluate(grid, steps, objective, meta_data, "auto", order, with_gradient=False)
        return StepSizeCurve.from_results(grid, [result])

    def optimal_step_size(
        self,
        steps: int,
        *,
        start: float = 1e-3,
        objective: LeastSquaresObjective = "log",
        meta_data: Literal["train", "val"] = "val",
        order: Tensor | None = None,
        relative_tolerance: float = 1e-6,
        max_evaluations: int = 60,
    ) -> SearchResult:
        """The minimum of the mean meta-objective over the tasks, by bisection on the sign of the meta-gradient.

        Works from any start. Meta-gradient descent does not on held-out data: between the optimum and
        divergence the objective is a plateau, with a meta-gradient of 1e-3 and less and a second, spurious
        stationary point. The bisection uses signs and values only; a step size that truncates any task counts
        as too large.

        Args:
            steps: t.
            start: Where to begin.
            objective: As for :meth:`meta_gradient`.
            meta_data: As for :meth:`meta_gradient`.
            order: As for :meth:`meta_gradient`.
            relative_tolerance: Accuracy of the step size.
            max_evaluations: The most meta-gradients to compute.

        Returns:
            ``step_size``, ``converged``, ``reason``, and the ``history`` of evaluations.

        Raises:
            ValueError: As for :meth:`meta_gradient`.
            FloatingPointError: A loss of SGD is too small for the dtype, so that the sign of its logarithm's
                derivative is unknown.

        Example:
            >>> tasks = LeastSquares.sample(8, 40, 20, noise=2.0, validation_fraction=0.5)
            >>> found = [tasks.optimal_step_size(30, start=start).step_size for start in (1e-6, 0.1)]
            >>> abs(found[0] / found[1] - 1) < 1e-5
            True
        """

        def look(step_size: float) -> MetaSignal:
            result = self.meta_gradient(step_size, steps, objective, meta_data=meta_data, order=order)
            if objective == "log" and bool(result.unresolved.any()):
                raise FloatingPointError(
                    f"At step size {step_size:.4g} the loss after {steps} steps is nothing but rounding, and the "
                    "derivative of its logarithm is lost. Use dtype=torch.float64, fewer steps, objective='naive', or "
                    "a grid with best_step_size."
                )
            return MetaSignal(
                gradient=float(result.gradient.mean()),
                value=float(result.value.mean()),
                diverged=bool(result.truncated.any()),
            )

        return bisect_log_step_size(look, start, relative_tolerance=relative_tolerance, max_evaluations=max_evaluations)

    def _evaluate(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: LeastSquaresObjective,
        meta_data: Literal["train", "val"],
        method: Literal["auto", "closed_form", "unroll"],
        order: Tensor | None,
        *,
        with_gradient: bool,
    ) -> LeastSquaresMetaGradient:
        eta, shape = check_step_sizes(step_size, self.inputs)
        inputs, targets = self._samples(meta_data)
        check_steps_and_order(steps, order, len(self), self.training_samples, method)
        by_steps = order is not None or method == "unroll"
        if by_steps:
            *_, last = self._iterates(eta, steps, order, with_tangents=with_gradient)
            final = unroll.evaluate(last, inputs, targets, self.solution)
        else:
            final = closed_form.evaluate(
                self._spectrum, eta, steps, on_validation=meta_data == "val", radius=self.truncation_radius
            )
        on_surface = torch.full((len(self), 1), torch.nan, dtype=inputs.dtype, device=inputs.device)
        truncated_loss, truncated_error = on_surface, on_surface
        if bool((final.truncated_step >= 0).any()):
            surface = self._surface()
            truncated_loss = unroll.half_squared_error(inputs, targets, surface)
            truncated_error = (surface - self.solution[:, None]).square().sum(-1)
        return LeastSquaresMetaGradient.assemble(
            final,
            objective,
            steps,
            truncated_loss=truncated_loss,
            truncated_error=truncated_error,
            initial_loss=0.5 * targets.square().mean(-1, keepdim=True),
            exact_logarithm=not by_steps and meta_data == "train",
            shape=shape,
        )

    def _iterates(
        self, eta: Tensor, steps: int, order: Tensor | None, *, with_tangents: bool
    ) -> Iterator[unroll.Iterate]:
        inputs, targets = self._samples("train")
        return unroll.iterates(
            inputs,
            targets,
            eta,
            steps,
            order=order,
            radius=self.truncation_radius,
            with_tangents=with_tangents,
        )

    @cached_property
    def _spectrum(self) -> closed_form.Spectrum:
        validation = self._samples("val") if self.validation_samples else (None, None)
        return closed_form.decompose(*self._samples("train"), self.solution, *validation)

    def _surface(self) -> Tensor:
        """Where truncated runs are put: a random point of norm ``truncation_radius`` for each task, ``[m, 1, d]``."""
        # With an infinite radius the point is finite all the same, far out.
        radius: float = min(self.truncation_radius, torch.finfo(self._directions.dtype).max ** 0.25)
        return radius * self._directions[:, None, :]
