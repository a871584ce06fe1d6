"""The data of many least-squares tasks: the model they are drawn from, their split, one of them as an ordinary task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_l2l.tasks._least_squares_checks import (
    check_data,
    check_sizes,
    truncation_radius_or_default,
    validation_count,
)
from lightning_l2l.tasks.task import Task


class LeastSquaresData(Task):
    """Samples ``(x, y)`` of many tasks with their solutions; the arguments are those of ``LeastSquares``."""

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
        check_data(inputs, targets, solution, validation_samples)
        self.inputs = inputs
        self.targets = targets
        self.solution = solution
        self.noise = float(noise)
        self.validation_samples = validation_samples
        self.truncation_radius = truncation_radius_or_default(truncation_radius, self.noise, solution)
        # Where truncated runs are put, up to the radius; drawn in float64 so that every dtype has the same.
        directions = torch.randn(solution.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        directions /= torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
        self._directions = directions.to(solution)

    @classmethod
    def sample(
        cls,
        tasks: int,
        dimension: int,
        samples: int,
        noise: float = 1.0,
        *,
        seed: int | torch.Generator = 0,
        validation_fraction: float | None = None,
        validation_samples: int | None = None,
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
            validation_fraction: Share of the samples to hold out (rounded down); or use
                ``validation_samples``.
            validation_samples: Number of samples to hold out; the default is none.
            truncation_radius: As for the class.
            dtype: ``torch.float32`` or ``torch.float64``.

        Raises:
            ValueError: A size below one, a negative noise, or a split that leaves one side empty.
        """
        check_sizes(tasks, dimension, samples, noise)
        held_out = validation_count(samples, validation_fraction, validation_samples)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        solution = torch.randn(tasks, dimension, generator=generator, dtype=dtype)
        solution /= torch.linalg.vector_norm(solution, dim=-1, keepdim=True)
        inputs = torch.randn(tasks, samples, dimension, generator=generator, dtype=dtype)
        targets = noise * torch.randn(tasks, samples, generator=generator, dtype=dtype)
        targets += (inputs @ solution[..., None])[..., 0]
        return cls(
            inputs,
            targets,
            solution,
            noise=noise,
            validation_samples=held_out,
            truncation_radius=truncation_radius,
        )

    def split(self, *, validation_fraction: float | None = None, validation_samples: int | None = None) -> Self:
        """The same tasks and samples with another number of them held out (the last ones); no data is copied.

        Args:
            validation_fraction: Share of the samples to hold out, rounded down.
            validation_samples: Number of samples to hold out.

        Raises:
            ValueError: Both are given, or one side is left empty.
        """
        held_out = validation_count(self.inputs.shape[1], validation_fraction, validation_samples)
        return self._with(slice(None), held_out)

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.inputs)

    def __getitem__(self, index: int | slice) -> Self:
        """One task, or some of them, as an object of their own; no data is copied."""
        if isinstance(index, int):
            position = range(len(self))[index]
            index = slice(position, position + 1)
        return self._with(index, self.validation_samples)

    def random_order(self, steps: int, batch_size: int = 1, *, seed: int = 0) -> Tensor:
        """Training samples for SGD, with replacement, for each task its own: ``[tasks, steps, batch_size]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.training_samples, (len(self), steps, batch_size), generator=generator)

    @property
    def training_samples(self) -> int:
        """How many samples of each task are trained on."""
        return self.inputs.shape[1] - self.validation_samples

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
        count, dimension = self.training_samples, self.inputs.shape[2]
        dtype, device = self.inputs.dtype, self.inputs.device
        fresh = torch.randn(count, dimension, generator=generator, dtype=dtype, device=device)
        noise = self.noise * torch.randn(count, generator=generator, dtype=dtype, device=device)
        return fresh, fresh @ self.solution[0] + noise

    def _samples(self, split: Literal["train", "val"]) -> tuple[Tensor, Tensor]:
        count = self.training_samples
        if split == "train":
            return self.inputs[:, :count], self.targets[:, :count]
        if split != "val":
            raise ValueError(f"{split!r} is not a split of the samples; choose 'train' or 'val'.")
        if self.validation_samples == 0:
            raise ValueError(
                "No samples are held out, so there is nothing to validate on. Use "
                "split(validation_fraction=0.5), or judge on the training samples with meta_data='train'."
            )
        return self.inputs[:, count:], self.targets[:, count:]

    def _with(self, index: slice, held_out: int) -> Self:
        chosen = type(self)(
            self.inputs[index],
            self.targets[index],
            self.solution[index],
            noise=self.noise,
            validation_samples=held_out,
            truncation_radius=self.truncation_radius,
        )
        chosen._directions = self._directions[index]
        return chosen

    def _require_one_task(self) -> None:
        if len(self) != 1:
            raise ValueError(
                f"This LeastSquares holds {len(self)} tasks, but parameters and batches belong to one. "
                "Choose it with tasks[k]."
            )
