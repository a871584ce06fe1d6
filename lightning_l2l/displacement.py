r"""Displacement: a horizon of many steps for the price of an inner product.

Nearly all optimizers move the parameters by the learning rate times something else, so what a step adds to
``d w / d log(rate)`` is the step itself. Leave out how that changes later gradients, let the past fade, and what a larger
rate would have changed is the *displacement* of the weights from their running average. The loss changes with the rate by

.. math:: \frac{\partial F}{\partial \log\alpha} \approx \left\langle \nabla F(w),\, w - \bar w \right\rangle

Divided by the lengths of gradient and displacement it is a cosine: negative while the training makes progress, positive
where the last steps have overshot. (Without curvature the tangent is that of Hessian-free step-size adaptation: IDBD,
Sutton, AAAI 1992; MetaOptimize, Sharifnassab et al., ICML 2025; CLARA, arXiv 2508.05408, compares the length of a path.)

The gradient is the one that the optimizer is about to step with, which costs nothing more, or that of a held-out batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_l2l.preserve import local

# All constants were chosen on one half of the population of tests/benchmarks/population, and judged on the other half.
_FIRST_UPDATE, _RATIO = 10, 1.2  # updates follow 10, 12, 14.4, ... steps
_SAMPLES = 128  # measurements in each doubling of the steps, about
_SPEED, _MARGIN, _FULL = 2.0, 0.05, 0.2  # a mean cosine of -(_MARGIN + _FULL) or less is full speed upwards
_EARLY_MARGIN, _EARLY_PART = 0.15, 0.2  # early on, progress alone is no evidence: a larger margin
_HELD = 0.9
_DECAY_AT, _NOISY = 0.8, -0.05
_STILL, _RAMP, _RAMP_STEPS = 3e-4, 1.5, 60
_AT_ONCE, _BELOW = 6, 0.7

_STATE = (
    "log_factors", "ramp_steps", "_floor", "_ceilings", "_peaks", "_sums", "_decay_from", "_last", "_next", "_origin",
)  # fmt: skip


class RunningAverage:
    """The average of the weights over the last eighth of the steps, and where the weights are seen from there.

    After step ``t`` it moves to the weights by ``9 / (t + 9)`` of the way. **Memory**: one copy of the trained
    parameters (of the local shards, where they are sharded), in float32 at least. **Cost**: reading them once in
    ``stride`` steps.

    Args:
        optimizer: The optimizer whose parameters are followed.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> average = RunningAverage(torch.optim.SGD([weight], lr=0.1))
        >>> with torch.no_grad():
        ...     _ = weight.add_(1.0)
        >>> average.fold(1)
        >>> average.move_weights()
        >>> round(weight.item(), 3)
        0.9
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._average: dict[Tensor, Tensor] = {}
        self._last = 0
        self.follow()

    @property
    def is_sharded(self) -> bool:
        """Whether sums over the parameters are sums over all processes (FSDP2)."""
        return any(hasattr(parameter, "to_local") for parameter in self._average)

    def follow(self) -> None:
        """Parameters that are new, or newly trained, are followed from where they are; frozen ones no longer."""
        trained = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and not is_lazy(parameter)
        ]
        if len(trained) != len(self._average) or any(p not in self._average for p in trained):
            self._average = {p: self._average[p] if p in self._average else _copied(p) for p in trained}

    def parameters(self, group: int) -> list[Tensor]:
        """The followed parameters of a group."""
        return [p for p in self.optimizer.param_groups[group]["params"] if p in self._average]

    @torch.no_grad()
    def fold(self, step: int) -> None:
        """Let the average know of the present weights.

        Args:
            step: Steps made so far. Where some are left out, the weights count as if they had been the same all along.
        """
        stays = math.prod(t / (t + 9) for t in range(self._last + 1, step + 1))
        averages = list(self._average.values())
        torch._foreach_lerp_(averages, [local(p).to(a.dtype) for p, a in self._average.items()], 1 - stays)
        self._last = step

    @torch.no_grad()
    def measure(self, group: int) -> Tensor:
        """Where a group stands: ``[<g, d>, <g, g>, <d, d>, <w, w>]`` for gradient g, displacement d and weights w.

        Sums over this process's shards; parameters without a gradient do not count. One float64 tensor (float32 on
        Apple's GPUs) on the device, so nothing waits for it.
        """
        parameters = [
            p for p in self.optimizer.param_groups[group]["params"] if p in self._average and p.grad is not None
        ]
        if not parameters:
            return torch.zeros(4)
        averages = [self._average[p] for p in parameters]
        weights = [local(p).to(a.dtype) for p, a in zip(parameters, averages, strict=True)]
        gradients = [_dense(local(p.grad)).to(a.dtype) for p, a in zip(parameters, averages, strict=True)]
        moved = torch._foreach_sub(weights, averages)
        double = torch.float32 if weights[0].device.type == "mps" else torch.float64
        squares = [
            torch.stack(torch._foreach_norm(tensors)).to(double).square() for tensors in (gradients, moved, weights)
        ]
        along = torch.stack([part.sum() for part in torch._foreach_mul(gradients, moved)]).to(double)
        if self.optimizer.param_groups[group].get("maximize"):
            along = -along
        sums = torch.stack([along, *squares])
        if not self.is_sharded:
            return sums.sum(1)
        total = (sums * torch.tensor([_share(p) for p in parameters], dtype=double, device=sums.device)).sum(1)
        torch.distributed.all_reduce(total)
        return total

    @torch.no_grad()
    def move_weights(self) -> None:
        """Move the weights to their average. Whoever calls this puts them back."""
        for parameter, average in self._average.items():
            local(parameter).copy_(average)

    def restart(self) -> None:
        """Begin anew from the present weights."""
        self._average, self._last = {}, 0
        self.follow()

    def state_dict(self) -> dict[str, Any]:
        """The averages, in the order of the groups' parameters, and the step of the last fold."""
        return {"average": list(self._average.values()), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an average whose shapes are others begins anew."""
        averages = list(self._average.values())
        if [a.shape for a in averages] == [a.shape for a in state["average"]]:
            torch._foreach_copy_(averages, [a.to(b) for a, b in zip(state["average"], averages, strict=True)])
            self._last = state["last"]


def _copied(parameter: Tensor) -> Tensor:
    weights = local(parameter)
    return weights.to(torch.promote_types(weights.dtype, torch.float32), copy=True)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _share(parameter: Tensor) -> float:
    """By how much a parameter's local sum counts in a sum over all processes: it may be replicated on some of them."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 1.0 / torch.distributed.get_world_size()
    placements = parameter.placements  # type: ignore[attr-defined]
    copies = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())
    return float(mesh.size() / (copies * torch.distributed.get_world_size()))


class Rule:
    """When and by how much learning rates move. Its state is plain numbers, its inputs are too.

    Args:
        groups: The number of parameter groups.
        planned_steps: The length of the training; ``inf`` where nobody knows.
        every_n_steps: Steps from one update to the next; ``None``: in proportion to the steps so far.
        speed: A multiple of the usual speed; 0 only observes.
        ramps: Whether a rate that is far too small rises in the first steps already.
        decays: Whether the rate may fall to zero at the end.
        plays: Whether this is one player of a game, whose steps count against those of others. It may go on for ever in
            one direction without progress, so there only a rate that is far too small rises.
    """

    def __init__(
        self,
        groups: int,
        *,
        planned_steps: float,
        every_n_steps: int | None,
        speed: float,
        ramps: bool,
        decays: bool,
        plays: bool = False,
    ) -> None:
        self.only_observes = speed == 0
        self.log_factors = [0.0] * groups
        self.ramp_steps = 0
        self.planned_steps = planned_steps
        self._every = every_n_steps
        self._speed = speed * _SPEED
        self.ramps = ramps and speed > 0
        self._decays = decays and speed > 0
        self._plays = plays
        self._floor = 0.0
        self._ceilings = [math.inf] * groups
        self._peaks = [0.0] * groups
        self._sums = [[0.0, 0.0, 0.0] for _ in range(groups)]
        self._decay_from = math.inf
        self._last, self._next = 0, float(every_n_steps or _FIRST_UPDATE)
        self._origin = 0

    def resize(self, groups: int) -> None:
        """The optimizer has another number of groups now; new ones begin at the rate that they were given."""
        for values, new in ((self.log_factors, 0.0), (self._ceilings, math.inf), (self._peaks, 0.0)):
            values[groups:] = [new] * (groups - len(values))
        self._sums[groups:] = [[0.0, 0.0, 0.0] for _ in range(groups - len(self._sums))]

    def samples(self, step: int) -> bool:
        """Whether to measure the cosine before the step after so many, and to fold the weights into the average."""
        return step % max(1, step // _SAMPLES) == 0

    def is_due(self, step: int) -> bool:
        """Whether an update follows so many steps."""
        return step >= self._next

    def is_ramping(self, step: int) -> bool:
        """Whether the rate has risen at once since the last update, and may go on."""
        return self.ramp_steps > self._last and step < _RAMP_STEPS

    def see(self, step: int, measured: Iterable[Sequence[Sequence[float]]]) -> None:
        """Measurements since the last call, each ``[<g, d>, <g, g>, <d, d>, <w, w>]`` for every group."""
        for sums in measured:
            for index, (along, gradient, moved, weights) in enumerate(sums):
                found = cosine(along, gradient, moved)
                if not math.isfinite(found):
                    continue
                mine = self._sums[index]
                for power in range(3):
                    mine[power] += found**power
                if self.ramps and step - self._origin > 2 and step < _RAMP_STEPS:
                    if moved < _STILL**2 * weights and mine[1] < -0.1 * mine[0]:
                        self.log_factors[index] += math.log(_RAMP)
                        self.ramp_steps = step

    def update(self, step: int, base_rates: Sequence[float]) -> dict[str, Any]:
        """Move the rates by what was seen since the last update.

        Args:
            step: Steps made so far.
            base_rates: The present base rates: while a schedule is below nine tenths of its peak, nothing moves.

        Returns:
            The evidence, for the record: the mean cosine of each group, and its standard error.
        """
        means, errors = zip(*(_mean_and_error(*sums) for sums in self._sums), strict=True)
        span = math.log(step / self._last) if self._last else math.log(_RATIO)
        left = 1 - step / (_EARLY_PART * self.planned_steps) if self.planned_steps < math.inf else 0.0
        margin = _MARGIN + _EARLY_MARGIN * max(0.0, left)
        for index, (mean, error, rate) in enumerate(zip(means, errors, base_rates, strict=True)):
            self._peaks[index] = max(self._peaks[index], rate)
            if not self._decay_from == math.inf or rate < _HELD * self._peaks[index] or math.isnan(mean):
                continue
            rise = min(1.0, max(0.0, (-margin - mean - error) / _FULL))
            fall = min(1.0, max(0.0, (mean - error) / _FULL))
            if self._plays:
                rise = 0.0
            before = self.log_factors[index]
            moved = before + self._speed * span * (rise - fall)
            # Never below what the user gave: noise is what the end of the training takes away.
            self.log_factors[index] = max(min(moved, self._ceilings[index]), min(self._floor, before))
        if self._decays and step >= _DECAY_AT * self.planned_steps - 1 and self._decay_from == math.inf:
            if max((mean for mean in means if not math.isnan(mean)), default=-1.0) > _NOISY:
                self._decay_from = step
        self._sums = [[0.0, 0.0, 0.0] for _ in means]
        self._last = step
        self._next = step + self._every if self._every else self._next * _RATIO
        if self._next > _DECAY_AT * self.planned_steps > step:
            self._next = _DECAY_AT * self.planned_steps
        return {"cosine": list(means), "cosine_error": list(errors)}

    def factors(self, step: int) -> list[float]:
        """What the base rate of each group is multiplied by in the step after so many."""
        decay = 1.0
        if self._decay_from < math.inf:
            decay = max(0.0, (self.planned_steps - step) / (self.planned_steps - self._decay_from))
        return [math.exp(value) * decay for value in self.log_factors]

    def is_stuck(self, means: Sequence[float], errors: Sequence[float]) -> bool:
        """Whether all steps clearly overshoot."""
        return all(mean - 2 * error > 0 for mean, error in zip(means, errors, strict=True))

    def cut(self, step: int) -> float:
        """The run was taken back: cut the rates, by ten if it was lost at once, else by three.

        Returns:
            What they were multiplied by.
        """
        by = math.log(10.0 if step - self._origin < _AT_ONCE else 3.0)
        for index, value in enumerate(self.log_factors):
            self._ceilings[index] = value - _BELOW
            self.log_factors[index] = value - by
            self._floor = min(self._floor, value - by)
        self._sums = [[0.0, 0.0, 0.0] for _ in self.log_factors]
        self._origin = step
        return math.exp(-by)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists of them."""
        return copy.deepcopy({name: value for name, value in vars(self).items() if name in _STATE})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        vars(self).update(copy.deepcopy(state))


def cosine(along: float, gradient: float, moved: float) -> float:
    """The cosine of gradient and displacement from their inner product and squared lengths; NaN where there is none."""
    size = math.sqrt(gradient) * math.sqrt(moved) if gradient > 0 and moved > 0 else math.nan
    return max(-1.0, min(1.0, along / size)) if math.isfinite(size) and math.isfinite(along) else math.nan


def _mean_and_error(count: float, total: float, squares: float) -> tuple[float, float]:
    if count < 1:
        return math.nan, math.nan
    mean = total / count
    error = math.sqrt(max(0.0, squares / count - mean**2) / max(count, 2)) if count >= 3 else 1.0
    return mean, error
