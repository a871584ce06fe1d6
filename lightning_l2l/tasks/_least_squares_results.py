"""What the least-squares tasks return: numbers per task, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_l2l.tasks._least_squares_closed_form import FinalLoss
from lightning_l2l.tasks._least_squares_unroll import Iterate, half_squared_error

LeastSquaresObjective = Literal["naive", "log"]


@dataclass(frozen=True)
class LeastSquaresMetaGradient:
    """A meta-objective and its derivative in the step size; each ``[tasks]`` or ``[tasks, step_sizes]``, float64.

    Attributes:
        value: The meta-objective. Of a truncated run: of a random point on the surface of the ball, as in the
            paper.
        gradient: Derivative in the step size; NaN where there is none to trust (truncated, or unresolved
            logarithm).
        truncated_step: First step whose iterate left the ball, ``-1`` for never; int64.
        unresolved: The step-by-step loss is nothing but rounding; bool. Never set by the closed form of the
            training loss, which works with logarithms.
        population_error: ``|w_t - w*|^2``; of a truncated run: of the point on the surface.
    """

    value: Tensor
    gradient: Tensor
    truncated_step: Tensor
    unresolved: Tensor
    population_error: Tensor

    @property
    def truncated(self) -> Tensor:
        """Which runs left the ball; bool."""
        return self.truncated_step >= 0

    @classmethod
    def assemble(
        cls,
        final: FinalLoss,
        objective: LeastSquaresObjective,
        steps: int,
        *,
        truncated_loss: Tensor,
        truncated_error: Tensor,
        initial_loss: Tensor,
        exact_logarithm: bool,
        shape: tuple[int, ...],
    ) -> LeastSquaresMetaGradient:
        """Apply the truncation and the choice of the objective.

        Args:
            final: Losses of all runs, ``[tasks, g]``.
            objective: ``"naive"`` or ``"log"``.
            steps: t.
            truncated_loss: Loss on the surface, ``[tasks, 1]``; read for truncated runs only.
            truncated_error: Population error on the surface, ``[tasks, 1]``; read for truncated runs only.
            initial_loss: Loss at zero, ``[tasks, 1]``: the scale of rounding.
            exact_logarithm: The logarithm was computed directly and is right however small the loss.
            shape: Shape of the step sizes as they were given.

        Raises:
            ValueError: Unknown objective.
        """
        if objective not in get_args(LeastSquaresObjective):
            raise ValueError(
                f"objective={objective!r} is not known here; choose one of {list(get_args(LeastSquaresObjective))}."
            )
        truncated = final.truncated_step >= 0
        # Rounding leaves residuals of eps times the labels; below ten times that the logarithm's derivative is lost.
        smallest = (10 * torch.finfo(initial_loss.dtype).eps) ** 2 * initial_loss
        unresolved = ~truncated & (final.loss <= smallest)
        if exact_logarithm:
            unresolved = torch.zeros_like(truncated)
        value, gradient, surface = final.loss, final.gradient, truncated_loss
        if objective == "log":
            value, gradient, surface = (part / steps for part in (final.log_loss, final.log_gradient, surface.log()))
            gradient = torch.where(unresolved, torch.nan, gradient)
        error = torch.where(truncated, truncated_error, final.population_error)
        form = (len(truncated), *shape)
        return cls(
            value=torch.where(truncated, surface, value).double().reshape(form),
            gradient=torch.where(truncated, torch.nan, gradient).double().reshape(form),
            truncated_step=final.truncated_step.reshape(form),
            unresolved=unresolved.reshape(form),
            population_error=error.double().reshape(form),
        )


@dataclass(frozen=True)
class LeastSquaresTrajectory:
    """Errors along the run; ``[tasks, steps + 1]`` or ``[tasks, step_sizes, steps + 1]``, NaN from a truncation on.

    Attributes:
        train_rmse: Root mean squared error on the training samples, labels with noise.
        validation_rmse: The same on the held-out samples; NaN if there are none.
        population_error: ``|w_k - w*|^2``.
        truncated_step: First step whose iterate left the ball, ``-1`` for never; without the last dimension.
    """

    train_rmse: Tensor
    validation_rmse: Tensor
    population_error: Tensor
    truncated_step: Tensor

    @classmethod
    def record(
        cls,
        iterates: Iterable[Iterate],
        training: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
        solution: Tensor,
        shape: tuple[int, ...],
    ) -> LeastSquaresTrajectory:
        """Judge every iterate.

        Args:
            iterates: All of them, the starting point first.
            training: Inputs ``[m, n, d]`` and targets ``[m, n]``.
            validation: The held-out samples, or ``None``.
            solution: w*, ``[m, d]``.
            shape: ``[tasks, (step_sizes,) steps + 1]``.
        """
        train, held_out, errors = [], [], []
        for iterate in iterates:
            truncated_step = iterate.truncated_step
            weights = torch.where((truncated_step >= 0)[..., None], torch.nan, iterate.weights)
            train.append(half_squared_error(*training, weights))
            errors.append((weights - solution[:, None]).square().sum(-1))
            held_out.append(
                torch.full_like(errors[-1], torch.nan)
                if validation is None
                else half_squared_error(*validation, weights)
            )
        return cls(
            train_rmse=(2 * torch.stack(train, -1)).sqrt().reshape(shape),
            validation_rmse=(2 * torch.stack(held_out, -1)).sqrt().reshape(shape),
            population_error=torch.stack(errors, -1).reshape(shape),
            truncated_step=truncated_step.reshape(shape[:-1]),
        )


@dataclass(frozen=True)
class StepSizeCurve:
    """A mean meta-objective over a grid of step sizes.

    Attributes:
        best: The step size with the least value.
        step_sizes: The grid, ``[g]``.
        value: Mean over the tasks, truncated runs included at their value on the surface, ``[g]``.
        population_error: Mean of ``|w_t - w*|^2``, ``[g]``.
        truncated: How many tasks were truncated, ``[g]``.
    """

    best: float
    step_sizes: Tensor
    value: Tensor
    population_error: Tensor
    truncated: Tensor

    @classmethod
    def from_results(cls, step_sizes: Tensor, results: list[LeastSquaresMetaGradient]) -> StepSizeCurve:
        """Average over the tasks of one or several results ``[tasks, g]`` on the same grid.

        Raises:
            ValueError: The grid is not a vector.
        """
        if step_sizes.ndim != 1:
            raise ValueError(f"The grid has shape {tuple(step_sizes.shape)}; it must be a vector of step sizes.")
        value = torch.cat([result.value for result in results]).mean(0)
        return cls(
            best=float(step_sizes[value.argmin()]),
            step_sizes=step_sizes,
            value=value,
            population_error=torch.cat([result.population_error for result in results]).mean(0),
            truncated=torch.cat([result.truncated for result in results]).sum(0),
        )
