"""Particles: perturbed copies of the meta-parameters, and what their meta-objectives say about the gradient.

All evolution strategies here are antithetic: particles come in pairs ``theta + sigma * epsilon`` and
``theta - sigma * epsilon``, and a gradient is the mean over the pairs of

    (value of the first - value of the second) / (2 sigma**2) * direction

with the direction ``sigma * epsilon``, or for persistent evolution strategies the sum of the directions since the
episode began. It estimates the gradient of the meta-objective smoothed by a Gaussian of width sigma, without bias, and
needs no derivative of anything with respect to the meta-parameters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Batching = Literal["auto", "vmap", "loop"]


@dataclass(frozen=True)
class Particles:
    """How many particles, how far apart, and how they are computed.

    Attributes:
        count: Particles in all, an even number. The standard error of a gradient falls with its square root; the time
            hardly rises until the batched tensors outgrow the cache.
        standard_deviation: sigma, the width of the perturbation of every meta-parameter, in its own units. The
            smoothing removes wiggles of the meta-objective that are narrower; for a log step size, 0.1 is 10 %.
        seed: Where the perturbations come from; ``None`` draws a seed from torch's global generator.
        batching: ``"vmap"``: all particles at once by ``torch.func.vmap``; ``"loop"``: one after the other;
            ``"auto"``: vmap, or the loop if the loss cannot be batched (the diagnostics say so).
        loss_limit: Meta-losses above it, and those that are not finite, count as this number, so that a particle
            that diverged says "bad" instead of making the whole estimate NaN. ``None`` for no limit.
        rank: Number of this process among those that share the particles.
        ranks: How many processes share them; each computes ``count / ranks``.
        mean_over_ranks: Averages a tensor over the processes (an all-reduce), when there are several. It is called
            the same number of times on each.

    Example:
        >>> Particles(count=100, standard_deviation=0.3).count
        100
    """

    count: int = 32
    standard_deviation: float = 0.1
    seed: int | None = None
    batching: Batching = "auto"
    loss_limit: float | None = None
    rank: int = 0
    ranks: int = 1
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuses settings that mean nothing."""
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must lie in 0 ... ranks - 1, got rank={self.rank} of ranks={self.ranks}.")
        if self.count < 2 * self.ranks or self.count % (2 * self.ranks):
            raise ValueError(
                f"count must be a positive multiple of {2 * self.ranks} (a pair on each of {self.ranks} process(es)), "
                f"got {self.count}: particles come in antithetic pairs."
            )
        if not 0 < self.standard_deviation < math.inf:
            raise ValueError(f"standard_deviation must be finite and above 0, got {self.standard_deviation!r}.")
        if self.loss_limit is not None and math.isnan(self.loss_limit):
            raise ValueError("loss_limit is NaN, so every loss would be; leave it out for no limit.")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, or None for a new one, got {self.seed!r}.")
        if self.batching not in get_args(Batching):
            raise ValueError(f"batching={self.batching!r} is not known; choose one of {list(get_args(Batching))}.")
        if self.ranks > 1 and self.mean_over_ranks is None:
            raise ValueError(
                "Particles that are shared by several processes need mean_over_ranks, a function that averages a "
                "tensor over them (for example an all-reduce)."
            )

    def seeded(self) -> Particles:
        """The same with a seed that is a number."""
        if self.seed is not None:
            return self
        return replace(self, seed=int(torch.randint(2**62, ()).item()))

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return tensor if self.mean_over_ranks is None else self.mean_over_ranks(tensor)

    def directions(self, meta: Mapping[str, Tensor], seed: int, window: int) -> dict[str, Tensor]:
        """The perturbations ``sigma * epsilon`` of this process's particles in one window.

        A pure function of its arguments, so that an interrupted run continues with the same numbers.

        Args:
            meta: The meta-parameters by name.
            seed: The seed of the episode.
            window: The number of the window.

        Returns:
            For each meta-parameter a tensor with the particle as its first dimension; the second half is the
            negative of the first. All processes together have the perturbations that a single one would have.

        Example:
            >>> found = Particles(count=4).directions({"theta": torch.zeros(3)}, seed=0, window=0)["theta"]
            >>> found.shape, bool((found[:2] == -found[2:]).all())
            (torch.Size([4, 3]), True)
        """
        # Strings are hashed by Python's random, so neighbouring seeds and windows have nothing in common.
        mixed = random.Random(f"{seed}/{window}/0").getrandbits(62)
        generator = torch.Generator().manual_seed(mixed)
        found = {}
        for name, tensor in meta.items():
            # Drawn for all processes, which is cheap against a single inner step.
            half = torch.randn((self.count // 2, *tensor.shape), dtype=torch.float64, generator=generator)
            half = half.chunk(self.ranks)[self.rank]
            half = (half * self.standard_deviation).to(tensor.device, tensor.dtype)
            found[name] = torch.cat([half, -half])
        return found

    def gradient(self, values: Tensor, directions: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The estimate from the particles' meta-objectives.

        Args:
            values: One meta-objective for each particle, ``[particles]``, float64.
            directions: By meta-parameter, the particle as the first dimension, antithetic.

        Returns:
            The gradient and its standard error, by meta-parameter, averaged over the processes.
        """
        pairs = len(values) // 2
        slopes = (values[:pairs] - values[pairs:]) / (2 * self.standard_deviation**2)
        samples = {
            name: slopes.reshape(-1, *[1] * (tensor.dim() - 1)) * tensor[:pairs].double()
            for name, tensor in directions.items()
        }
        found = {name: self.mean_and_error(sample) for name, sample in samples.items()}
        gradients = {name: mean.to(directions[name].dtype) for name, (mean, _) in found.items()}
        return gradients, {name: error.to(directions[name].dtype) for name, (_, error) in found.items()}

    def mean_and_error(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard error (NaN for a single sample) over the first dimension and over the processes."""
        mean = self.over_ranks(samples.mean(0))
        squares = self.over_ranks((samples - mean).square().mean(0))
        count = len(samples) * self.ranks
        error = (squares / (count - 1)).sqrt() if count > 1 else torch.full_like(squares, torch.nan)
        return mean, error
