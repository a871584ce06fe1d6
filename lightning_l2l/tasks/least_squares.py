"""Linear regression with label noise: when does a step size need a held-out set? Many tasks at once, exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_l2l.tasks import _least_squares_closed_form as closed_form
from lightning_l2l.tasks.task import Task

# The paper truncates at a norm of 40 sigma.
_RADIUS_IN_NOISE = 40.0


@dataclass(frozen=True)
class LeastSquaresMetaGradient:
    """A meta-objective and its derivative in the step size; each ``[tasks]`` or ``[tasks, step_sizes]``, float64.

    Attributes:
        value: The meta-objective. Of a truncated run: of a random point on the surface of the ball, as in the paper.
        gradient: Derivative in the step size; NaN where there is none to trust: the run was truncated, or the loss of
            SGD is so small that its logarithm is nothing but rounding.
        truncated_step: First step whose iterate left the ball, ``-1`` for never; int64.
        population_error: ``|w_t - w*|^2``; of a truncated run: of the point on the surface.
    """

    value: Tensor
    gradient: Tensor
    truncated_step: Tensor
    population_error: Tensor

    @property
    def truncated(self) -> Tensor:
        """Which runs left the ball; bool."""
        return self.truncated_step >= 0


class LeastSquares(Task):
    """Least-squares tasks ``1/2 (y - <w, x>)^2`` with noisy labels, trained by gradient descent or SGD from zero.

    A task has a solution w*, and samples with ``y = <w*, x> + xi``. With fewer samples than dimensions training can fit
    the noise: tuned on its training data (*train-by-train*) the best step size does that; tuned on held-out data
    (*train-by-validation*) the best step size stops early. One object holds many tasks, and every result has the task
    as its first dimension. Gradient descent has a closed form, SGD is followed step by step; both give the derivative
    in the step size.

    Runs that leave the ball of ``truncation_radius`` are *truncated*, as in the paper: their loss is that of a random
    point on its surface, their gradient is NaN, and ``truncated_step`` says when. They are never reported as a zero
    gradient.

    An object of one task (``tasks[k]``) is an ordinary :class:`~lightning_l2l.tasks.Task` with batches.

    Args:
        inputs: x, ``[tasks, samples, dimension]``, float32 or float64.
        targets: y, ``[tasks, samples]``.
        solution: w*, ``[tasks, dimension]``.
        noise: sigma, the standard deviation of the labels' noise; sets the default radius and is used for fresh
            samples.
        validation_samples: How many samples, the last of each task, are held out.
        truncation_radius: ``None`` for 40 sigma; ``math.inf`` truncates only what leaves the number range.

    Raises:
        TypeError: Not floating point, or different dtypes.
        ValueError: Shapes that do not fit, nothing to train on, non-finite numbers, a negative noise, a radius that
            would truncate the solution itself.

    Source: Wang, Yuan, Wu, Ge, "Guarantees for Tuning the Step Size using a Learning-to-Learn Approach" (ICML 2021),
    section 4.

    Example:
        >>> tasks = LeastSquares.sample(tasks=8, dimension=40, samples=20, noise=2.0, seed=0)
        >>> by_train = tasks.meta_gradient(0.1, steps=30, meta_data="train")
        >>> by_train.value.shape, by_train.truncated.any().item()
        (torch.Size([8]), False)
        >>> halves = tasks.split(validation_fraction=0.5)
        >>> grid = torch.logspace(-4, 0, 17)
        >>> tasks.best_step_size(30, grid=grid, meta_data="train") > 10 * halves.best_step_size(30, grid=grid)
        True
    """

    homogeneity = None

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        solution: Tensor,
        *,
        noise: float = 1.0,
        validation_samples: int = 0,
        truncation_radius: float | None = None,
    ) -> None:
        """See the class."""
        _check_data(inputs, targets, solution)
        if not 0 <= validation_samples < inputs.shape[1]:
            raise ValueError(
                f"validation_samples={validation_samples} of {inputs.shape[1]} samples leaves nothing to train on; "
                f"hold out between 0 and {inputs.shape[1] - 1}."
            )
        self.inputs, self.targets, self.solution = inputs, targets, solution
        self.noise = float(noise)
        self.validation_samples = validation_samples
        self.truncation_radius = _radius(truncation_radius, self.noise, solution)

    @classmethod
    def sample(
        cls,
        tasks: int,
        dimension: int,
        samples: int,
        noise: float = 1.0,
        *,
        seed: int | torch.Generator = 0,
        validation_fraction: float = 0.0,
        truncation_radius: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Draw tasks: w* uniform on the unit sphere, x ~ N(0, I), xi ~ N(0, noise^2).

        Memory: ``tasks * samples * dimension`` numbers. Draw a long list of tasks in portions, from one generator.

        Args:
            tasks: How many tasks.
            dimension: d.
            samples: n, training and validation together.
            noise: sigma.
            seed: A number, or a CPU generator to draw from.
            validation_fraction: Share of the samples to hold out, rounded down.
            truncation_radius: As for the class.
            dtype: ``torch.float32`` or ``torch.float64``.

        Raises:
            ValueError: A size below one, a negative noise, or a split that leaves one side empty.
        """
        for name, number in (("tasks", tasks), ("dimension", dimension), ("samples", samples)):
            if number < 1:
                raise ValueError(f"{name}={number}, but a least-squares task needs at least 1.")
        held_out = _validation_count(samples, validation_fraction)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        solution = torch.randn(tasks, dimension, generator=generator, dtype=dtype)
        solution /= torch.linalg.vector_norm(solution, dim=-1, keepdim=True)
        inputs = torch.randn(tasks, samples, dimension, generator=generator, dtype=dtype)
        targets = noise * torch.randn(tasks, samples, generator=generator, dtype=dtype)
        targets += (inputs @ solution[..., None])[..., 0]
        return cls(
            inputs, targets, solution, noise=noise, validation_samples=held_out, truncation_radius=truncation_radius
        )

    def split(self, *, validation_fraction: float) -> Self:
        """The same tasks and samples with another share of them held out (the last ones); no data is copied.

        Args:
            validation_fraction: Share of the samples to hold out, rounded down; 0 for none.

        Raises:
            ValueError: One side is left empty.
        """
        return self._with(slice(None), _validation_count(self.inputs.shape[1], validation_fraction))

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.inputs)

    def __getitem__(self, index: int | slice) -> Self:
        """One task, or some of them, as an object of their own; no data is copied."""
        if isinstance(index, int):
            position = range(len(self))[index]
            index = slice(position, position + 1)
        return self._with(index, self.validation_samples)

    @property
    def training_samples(self) -> int:
        """How many samples of each task are trained on."""
        return self.inputs.shape[1] - self.validation_samples

    def random_order(self, steps: int, batch_size: int = 1, *, seed: int = 0) -> Tensor:
        """Training samples for SGD, with replacement, for each task its own: ``[tasks, steps, batch_size]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.training_samples, (len(self), steps, batch_size), generator=generator)

    def meta_gradient(
        self,
        step_size: float | Tensor,
        steps: int,
        objective: Literal["naive", "log"] = "log",
        *,
        meta_data: Literal["train", "val"] = "val",
        order: Tensor | None = None,
    ) -> LeastSquaresMetaGradient:
        """Meta-objective after ``steps`` and its derivative in the step size, for each task and step size.

        Gradient descent costs one eigendecomposition per task (kept for later calls), then O(r) per step size
        (O(n_validation r) for ``"val"``) with r = min(samples, dimension), whatever the number of steps; SGD costs
        O(t b d).

        Args:
            step_size: eta, a number or a tensor ``[g]``; non-negative.
            steps: t.
            objective: ``"naive"`` is the loss L, ``"log"`` is ``(1/t) log L``, per task.
            meta_data: ``"train"`` evaluates on the training samples, ``"val"`` on the held-out ones.
            order: For SGD, the samples used by each step: indices ``[tasks, t, b]``; see :meth:`random_order`. ``None``
                is gradient descent on all training samples.

        Raises:
            ValueError: A negative or non-finite step size, ``steps < 1``, no held-out samples, an order that does not
                fit, or an option that is not known.
        """
        eta = torch.as_tensor(step_size, dtype=torch.float64, device=self.inputs.device).detach()
        if eta.ndim > 1 or eta.numel() == 0 or not bool((eta.isfinite() & (eta >= 0)).all()):
            raise ValueError(
                f"step_size={step_size} must be a finite number, 0 or more, or a non-empty vector of such."
            )
        if steps < 1:
            raise ValueError(f"steps={steps}, but a meta-objective looks at a run of at least 1 step.")
        if objective not in ("naive", "log"):
            raise ValueError(f"objective={objective!r} is not known; choose 'naive' or 'log'.")
        evaluation = self._samples(meta_data)
        if order is None:
            final = closed_form.descend(
                self._spectrum, eta.reshape(-1), steps, on_validation=meta_data == "val", radius=self.truncation_radius
            )
        else:
            self._check_order(order, steps)
            training, radius = self._samples("train"), self.truncation_radius
            final = closed_form.sgd(
                training, evaluation, self.solution, eta.reshape(-1), order[:, :steps], radius=radius
            )
        truncated = final.truncated_step >= 0
        surface_loss, surface_error = self._on_surface(evaluation)
        value, gradient = final.loss, final.gradient
        if objective == "log":
            value, gradient, surface_loss = (
                final.log_loss / steps,
                final.log_gradient / steps,
                surface_loss.log() / steps,
            )
            if order is not None:
                # Rounding leaves residuals of eps times the labels; below ten times that the derivative is lost.
                labels = 0.5 * evaluation[1].square().mean(-1, keepdim=True)
                resolution = (10 * torch.finfo(self.inputs.dtype).eps) ** 2
                gradient = torch.where(final.loss <= resolution * labels, torch.nan, gradient)
        form = (len(self), *eta.shape)
        return LeastSquaresMetaGradient(
            value=torch.where(truncated, surface_loss, value).double().reshape(form),
            gradient=torch.where(truncated, torch.nan, gradient).double().reshape(form),
            truncated_step=final.truncated_step.reshape(form),
            population_error=torch.where(truncated, surface_error, final.population_error).double().reshape(form),
        )

    def best_step_size(
        self,
        steps: int,
        *,
        grid: Tensor,
        objective: Literal["naive", "log"] = "naive",
        meta_data: Literal["train", "val"] = "val",
        order: Tensor | None = None,
    ) -> float:
        """The step size of a grid ``[g]`` with the least mean meta-objective over the tasks (the paper's experiment 2).

        Every step size sees the same tasks and samples. Arguments and errors as :meth:`meta_gradient`.
        """
        result = self.meta_gradient(grid, steps, objective, meta_data=meta_data, order=order)
        return float(grid[result.value.mean(0).argmin()])

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Zero, ``[dimension]``, for an object of one task."""
        self._require_one_task()
        return {"weight": self.inputs.new_zeros(self.inputs.shape[2])}

    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """``1/2 (y - <w, x>)^2``, mean over a batch ``(x [b, d], y [b])``."""
        inputs, targets = batch
        residual: Tensor = inputs @ parameters["weight"] - targets
        return 0.5 * residual.square().mean()

    def sample_batch(
        self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """All training samples, all held-out ones, or as many fresh ones as there are for training, of one task."""
        self._require_one_task()
        if split != "test":
            inputs, targets = self._samples(split)
            return inputs[0], targets[0]
        shape = (self.training_samples, self.inputs.shape[2])
        options: dict[str, Any] = {"dtype": self.inputs.dtype, "device": self.inputs.device}
        fresh = torch.randn(shape, generator=generator, **options)
        noise = self.noise * torch.randn(shape[0], generator=generator, **options)
        return fresh, fresh @ self.solution[0] + noise

    @cached_property
    def _spectrum(self) -> closed_form.Spectrum:
        count = self.training_samples
        validation = self.inputs[:, count:], self.targets[:, count:]
        return closed_form.decompose(*self._samples("train"), self.solution, *validation)

    def _samples(self, split: Literal["train", "val"]) -> tuple[Tensor, Tensor]:
        count = self.training_samples
        if split == "train":
            return self.inputs[:, :count], self.targets[:, :count]
        if split != "val":
            raise ValueError(f"{split!r} is not a split of the samples; choose 'train' or 'val'.")
        if self.validation_samples == 0:
            raise ValueError(
                "No samples are held out, so there is nothing to validate on. Use split(validation_fraction=0.5), or "
                "evaluate on the training samples with meta_data='train'."
            )
        return self.inputs[:, count:], self.targets[:, count:]

    def _on_surface(self, evaluation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Each task's loss and population error at a random point of norm ``truncation_radius``, ``[m, 1]``."""
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self.solution.shape[1], generator=generator, dtype=torch.float64)
        # With an infinite radius the point is finite all the same, far out.
        radius = min(self.truncation_radius, torch.finfo(self.solution.dtype).max ** 0.25)
        point = (radius * direction / torch.linalg.vector_norm(direction)).to(self.solution)
        residual = evaluation[0] @ point - evaluation[1]
        loss = 0.5 * residual.square().mean(-1, keepdim=True)
        return loss, (point - self.solution).square().sum(-1, keepdim=True)

    def _with(self, index: slice, held_out: int) -> Self:
        return type(self)(
            self.inputs[index],
            self.targets[index],
            self.solution[index],
            noise=self.noise,
            validation_samples=held_out,
            truncation_radius=self.truncation_radius,
        )

    def _require_one_task(self) -> None:
        if len(self) != 1:
            raise ValueError(
                f"This LeastSquares holds {len(self)} tasks, but parameters and batches belong to one. Choose it with "
                "tasks[k]."
            )

    def _check_order(self, order: Tensor, steps: int) -> None:
        if order.dtype != torch.int64 or order.ndim != 3 or len(order) != len(self) or order.shape[1] < steps:
            raise ValueError(
                f"order is {order.dtype} of shape {tuple(order.shape)}; it must hold int64 sample indices, "
                f"[{len(self)}, {steps}, batch]."
            )
        if order.numel() == 0 or int(order.min()) < 0 or int(order.max()) >= self.training_samples:
            raise ValueError(
                f"order must name training samples, 0 to {self.training_samples - 1}; held-out samples are not for "
                "training."
            )


def _check_data(inputs: Tensor, targets: Tensor, solution: Tensor) -> None:
    if inputs.dtype not in (torch.float32, torch.float64) or {targets.dtype, solution.dtype} != {inputs.dtype}:
        raise TypeError(
            f"inputs, targets and solution have dtypes {inputs.dtype}, {targets.dtype} and {solution.dtype}; all must "
            "be torch.float32 or all torch.float64 (the eigendecomposition knows no others)."
        )
    if (
        inputs.ndim != 3
        or targets.shape != inputs.shape[:2]
        or solution.shape != inputs.shape[::2]
        or 0 in inputs.shape
    ):
        raise ValueError(
            f"inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)} and solution {tuple(solution.shape)} do not "
            "fit: they must be [tasks, samples, dimension], [tasks, samples] and [tasks, dimension], none empty."
        )
    for name, tensor in (("inputs", inputs), ("targets", targets), ("solution", solution)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; clean the data before making tasks of it.")


def _radius(radius: float | None, noise: float, solution: Tensor) -> float:
    """The radius asked for, or 40 sigma."""
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise} must be the standard deviation of the labels' noise: finite, 0 or more.")
    chosen = _RADIUS_IN_NOISE * noise if radius is None else float(radius)
    longest = float(torch.linalg.vector_norm(solution, dim=-1).max())
    if not chosen > longest:  # refuses NaN as well
        origin = "40 * noise, the default" if radius is None else "given"
        raise ValueError(
            f"The truncation radius {chosen:g} ({origin}) is not larger than the norm {longest:.3g} of a solution w*, "
            "so runs that find it would be truncated. Pass a larger truncation_radius, e.g. truncation_radius=40."
        )
    return chosen


def _validation_count(samples: int, fraction: float) -> int:
    """The number of held-out samples, rounded down; the margin keeps 0.3 * 10 at 3."""
    if fraction == 0:
        return 0
    count = math.floor(fraction * samples + 1e-9) if math.isfinite(fraction) else -1
    if not 0 < count < samples:
        raise ValueError(
            f"validation_fraction={fraction} of {samples} samples leaves the "
            f"{'validation' if count <= 0 else 'training'} side empty; hold out between 1 and {samples - 1} samples, "
            "or none with 0."
        )
    return count
