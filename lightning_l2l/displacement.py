r"""Displacement: a horizon of many steps for the price of an inner product.

Nearly all optimizers move the parameters by the learning rate times something else, so what a step adds to
``d w / d log(rate)`` is the step itself. Leave out how that changes later gradients, let the past fade, and what a
larger rate would have changed is the *displacement* of the weights from their running average. The loss changes by

.. math:: \frac{\partial F}{\partial \log\alpha} \approx \left\langle \nabla F(w),\, w - \bar w \right\rangle

Divided by the lengths of gradient and displacement it is a cosine: negative while the training makes progress, positive
where the last steps have overshot. The gradient is the one that the optimizer is about to step with, which costs
nothing more, or that of a held-out batch.

(Without curvature the tangent is that of Hessian-free step-size adaptation: IDBD, Sutton, AAAI 1992; MetaOptimize,
Sharifnassab et al., ICML 2025. CLARA, arXiv 2508.05408, compares the length of a path with that of a random walk.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_l2l.preserve import local

# The constants of the rule were chosen on one half of the task families of tests/benchmarks/population; docs/no-harm.md
# has their results on the other half.
_SMALL = 2**14  # entries: tensors up to this size are measured together
_AVERAGE = 9  # the average moves by 9 / (t + 9) of the way: a mean age of a tenth of the steps
_SAMPLES = 64  # measurements each time that the number of steps doubles, about
_FIRST_UPDATE, _RATIO = 10, 1.2  # updates follow 10, 12, 15, ... steps
_SPEED = 2.0  # the most that the log of the rate moves for each unit of the log of time
_MARGIN, _FULL = 0.05, 0.2  # a cosine down to -_MARGIN is no reason to rise; _FULL beyond it is full speed
_EARLY_MARGIN, _EARLY = 0.3, 0.2  # early on every rate makes progress, so the margin is larger
_PEAK = 0.9  # of its largest value: a schedule below it is coming down, which is no reason to rise against it
_DECAY_AT, _PROGRESS = 0.85, -0.02  # a cosine below _PROGRESS: the training gets on, and the rate does not decay
_UNKNOWN = 1000  # steps that are assumed where something is in proportion to a length that nobody knows
# Early on, a rate at which the weights would move by less than _STILL of their norm until the end is doubled at once
# while the cosine is below _UNANIMOUS; one at which they have moved by less than _NOWHERE is multiplied by ten.
_STILL, _RAMP, _UNANIMOUS = 0.3, 2.0, -0.1
_NOWHERE, _RAMP_FROM_NOWHERE, _SETTLED = 1e-5, 10.0, 3
# Where that would be less than _CARELESS, nobody has chosen the rate. It is doubled once it can be seen that gradients
# agree, and beyond _STILL, up to _BOLD, while they agree nearly as much as before (_NEARLY), or clearly (_CLEARLY).
_CARELESS, _BOLD, _NEARLY, _CLEARLY = 0.003, 1.0, 0.7, -0.2
_AT_ONCE, _CUT_AT_ONCE, _CUT, _BELOW = 6, 10.0, 3.0, 2.0
# The search for a rate, where the one that was given diverges: steps of each trial, as a part of the training and at
# least, and by how much a third of the rate must do better, as a part of the first loss.
_TRIAL, _SHORTEST_TRIAL, _WORTH = 0.02, 10, 0.05
_HELD_OUT_MEMORY, _FEW_PASSES = 0.6, 3
# Held-out losses whose running mean is by _RISEN of the progress above its lowest: the data are learned by heart. That
# has to be _RISEN of the first loss at least: on a plateau it is noise.
_RISEN, _FEWEST = 0.1, 3

_STATE = (
    "log_factors", "ramps", "ramp_steps", "trial_ends", "best_loss", "_chosen", "_floor", "_peak", "_scheduled",
    "_decay_from", "_last", "_next", "_origin", "_held_out_loss", "_lowest_held_out", "_held_out_count",
)  # fmt: skip


class RunningAverage:
    """The running average of the weights, a tenth of the steps old in the mean, and where the weights are from there.

    After step ``t`` it moves to the weights by ``9 / (t + 9)`` of the way. **Memory**: one copy of the trained
    parameters (of the local shards, where they are sharded), in float32 at least. **Cost**: reading them once in
    ``stride`` steps.

    Args:
        optimizer: The optimizer whose parameters are followed.

    Attributes:
        is_sharded: Whether parameters are sharded over processes (FSDP2): their averages are those of the local shards.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> average = RunningAverage(torch.optim.SGD([weight], lr=0.1))
        >>> with torch.no_grad():
        ...     _ = weight.add_(1.0)
        >>> average.fold(1)
        >>> weight.grad = torch.ones(1)
        >>> average.measure(0)[:2].round(decimals=3).tolist()  # the average is at 0.9, so the displacement is 0.1
        [0.1, 1.0]
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.is_sharded = False
        self._average: dict[Tensor, Tensor] = {}
        self._aside: dict[Tensor, Tensor] = {}  # weights of a coarser dtype than their average's
        self._is_exchanged = False
        self._followed: list[int] = []
        self._last = 0
        self._has_matrices = False
        self._has_complex = False
        self.follow()

    def follow(self) -> None:
        """Parameters that are new, or newly trained, are followed from where they are; frozen ones no longer."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        followed = [id(parameter) for parameter in parameters]
        if followed == self._followed:
            return
        parameters = [parameter for parameter in parameters if not is_lazy(parameter)]
        self._average = {p: self._average[p] if p in self._average else _copied(p) for p in parameters}
        self._followed = followed if len(parameters) == len(followed) else []
        self._has_matrices = any(parameter.dim() > 1 for parameter in parameters)
        self._has_complex = any(parameter.is_complex() for parameter in parameters)
        # Then sums over the parameters are sums over all processes (FSDP2).
        self.is_sharded = any(hasattr(parameter, "to_local") for parameter in parameters)

    @property
    def parameters(self) -> list[Tensor]:
        """What is followed, in the order of the saved averages."""
        return list(self._average)

    @torch.no_grad()
    def fold(self, step: int) -> None:
        """Let the average know of the present weights.

        Args:
            step: Steps made so far. Where some are left out, the weights count as if they had been the same all along.
        """
        stays = math.prod([t / (t + _AVERAGE) for t in range(self._last + 1, step + 1)])
        averages = list(self._average.values())
        torch._foreach_lerp_(averages, self._seen_as(list(self._average), averages), 1 - stays)
        self._last = step

    def _seen_as(self, tensors: list[Tensor], averages: list[Tensor]) -> list[Tensor]:
        """Local shards of weights or gradients, in the dtypes of the averages; complex ones as pairs of numbers."""
        if self.is_sharded:
            tensors = [local(tensor) for tensor in tensors]
        if self._has_complex:
            tensors = [_real(tensor) for tensor in tensors]
        return [t if t.dtype == a.dtype else t.to(a.dtype) for t, a in zip(tensors, averages, strict=True)]

    @torch.no_grad()
    def measure(self, group: int) -> Tensor:
        """Where a group stands: ``[<g, d>, <g, g>, <d, d>, <D, D>, <W, W>]`` for gradient g and displacement d.

        D and W are displacement and weights of its matrices, and of all parameters where the optimizer has none: a
        single number may be large by nature, a bias is zero at first, and neither says whether the weights move.
        Sums over all shards; parameters without a gradient do not count. Where the optimizer maximizes, the sign of g
        is turned. One float64 tensor (float32 on Apple's GPUs) on the device, so nothing waits for it.
        """
        options = self.optimizer.param_groups[group]
        parameters = [p for p in options["params"] if p.grad is not None and p in self._average]
        if not parameters:  # what the other groups and the other steps have is on the device, too
            device = next((p.device for p in [*options["params"], *self._average]), torch.device("cpu"))
            return torch.zeros(5, dtype=_double(device), device=device)
        averages = [self._average[p] for p in parameters]
        gradients = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in parameters]
        parts = list(
            zip(self._seen_as(parameters, averages), averages, self._seen_as(gradients, averages), strict=True)
        )
        counts = [parameter.dim() > 1 or not self._has_matrices for parameter in parameters]
        if not self.is_sharded:
            parts, counts = _joined(parts, counts)  # one call each for many small tensors
        rows = []
        for (weights, average, gradient), is_counted in zip(parts, counts, strict=True):
            moved = (weights - average).view(-1)
            weights, gradient = weights.reshape(-1), gradient.reshape(-1)
            rows += [gradient.dot(moved), gradient.dot(gradient), moved.dot(moved)]
            rows += [rows[-1], weights.dot(weights)] if is_counted else [rows[-1].new_zeros(())] * 2
        device = rows[0].device
        double = _double(device)
        sums = torch.stack([row.to(device) for row in rows]).to(double).view(-1, 5)
        if self.is_sharded:
            sums = sums * torch.tensor([[_share(p)] for p in parameters], dtype=double, device=device)
        total = sums.sum(0)
        if self.is_sharded:
            torch.distributed.all_reduce(total)
        if options.get("maximize"):
            total[0].neg_()
        return total

    def restart(self, step: int) -> None:
        """Begin anew from the weights after so many steps."""
        self._average, self._followed, self._last = {}, [], step
        self.follow()

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the parameters and their averages trade places, until the next call; nothing is to be folded meanwhile.

        Where two averages follow the same parameter, they are to come back in the reverse order.

        **Memory**: a copy of one parameter at a time; and one of those that are coarser than their averages
        (``bf16-true``, ``16-true``), so that these keep their precision.

        Example:
            >>> weight = torch.nn.Parameter(torch.zeros(1))
            >>> average = RunningAverage(torch.optim.SGD([weight], lr=0.1))
            >>> with torch.no_grad():
            ...     _ = weight.add_(1.0)
            >>> average.exchange()
            >>> weight.item()
            0.0
            >>> average.exchange()
            >>> weight.item()
            1.0
        """
        for parameter, average in self._average.items():
            weights = _real(local(parameter))
            if parameter in self._aside:
                weights.copy_(self._aside.pop(parameter))
                continue
            kept = weights.clone()
            weights.copy_(average)
            if weights.dtype == average.dtype:
                average.copy_(kept)
            else:
                self._aside[parameter] = kept
        self._is_exchanged = not self._is_exchanged

    def state_dict(self) -> dict[str, Any]:
        """The averages, wherever they are, in the order of the groups' parameters, and the step of the last fold."""
        pairs = self._average.items()
        away = self._is_exchanged
        return {
            "average": [_real(local(p)) if away and p not in self._aside else average for p, average in pairs],
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a saved state; False, and nothing happens, where it is of other shapes or was not saved."""
        averages, saved = list(self._average.values()), [_real(average) for average in state["average"]]
        if [a.shape for a in averages] != [a.shape for a in saved]:
            return False
        torch._foreach_copy_(averages, [a.to(b) for a, b in zip(saved, averages, strict=True)])
        self._last = state["last"]
        return True


def _joined(
    parts: list[tuple[Tensor, Tensor, Tensor]], counts: list[bool]
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[bool]]:
    """The same with the small tensors of one device and dtype end to end, those that count and those that do not."""
    if len({tensor.device for tensor, _, _ in parts}) > 1:
        return parts, counts
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    kinds: list[bool] = []
    for kind in (True, False):
        mine = [part for part, is_counted in zip(parts, counts, strict=True) if is_counted is kind]
        small = [part for part in mine if part[0].numel() <= _SMALL and part[0].dtype == mine[0][0].dtype]
        if len(small) > 2:
            chosen = {id(part) for part in small}
            joined = [torch.cat([tensor.reshape(-1) for tensor in column]) for column in zip(*small, strict=True)]
            mine = [part for part in mine if id(part) not in chosen] + [(joined[0], joined[1], joined[2])]
        found += mine
        kinds += [kind] * len(mine)
    return found, kinds


def _copied(parameter: Tensor) -> Tensor:
    weights = _real(local(parameter))
    return weights.to(torch.promote_types(weights.dtype, torch.float32), copy=True)


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, whose inner product is the one that a gradient is made for."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _share(parameter: Tensor) -> float:
    """By how much a parameter's local sum counts in a sum over all processes: it may be replicated on some of them."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 1.0 / torch.distributed.get_world_size()
    placements = parameter.placements  # type: ignore[attr-defined]
    copies = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())
    return float(mesh.size() / (copies * torch.distributed.get_world_size()))


@dataclass
class _Cosines:
    """How many there were, their sum, and that of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value**2

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def shows(self, asked: float) -> bool:
        """Whether they are as negative as asked; the less that is, the more cosines it takes to see it."""
        return self.mean <= asked < 0 and self.count * asked**2 >= _CLEARLY**2

    @property
    def error(self) -> float:
        """The standard error of the mean; 1 where nobody knows."""
        if self.count < 3:
            return 1.0
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2) / self.count)


@dataclass
class _Unit:
    """What was seen of that which shares a learned factor.

    Attributes:
        recent: The cosines since the last update.
        at_rate: Those since the last fast rise.
        still: Those while the weights hardly moved.
        held_out: The running mean of the held-out cosines.
        ceiling: The most that the logarithm of its factor may be.
        begun: The step before its first gradient.
        was_chosen: Whether somebody can have chosen its rate; ``None`` while nobody knows.
        has_moved: Whether its weights have ever moved by more than next to nothing.
        raised_at: The step of the last fast rise.
        raised_by: What it multiplied the rate by.
    """

    recent: _Cosines = field(default_factory=_Cosines)
    at_rate: _Cosines = field(default_factory=_Cosines)
    still: _Cosines = field(default_factory=_Cosines)
    held_out: float = 0.0
    ceiling: float = math.inf
    begun: int | None = None
    was_chosen: bool | None = None
    has_moved: bool = False
    raised_at: int = 0
    raised_by: float = 1.0

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Unit:
        """From plain numbers."""
        cosines = {name: _Cosines(**state[name]) for name in ("recent", "at_rate", "still")}
        return cls(**{**state, **cosines})


class Rule:
    """When and by how much learning rates move: plain numbers in, plain numbers out.

    The evidence is the mean cosine of gradient and displacement since the last update, and its standard error. Far
    below the best constant rate it is clearly negative, at the best rate about zero, above it positive, whatever the
    task, the optimizer and the length. The rate rises while it is clearly negative, and falls back while it is
    positive, but not below the rate that the user gave: what noise costs there, a decay at the end takes away. All of
    it is in proportion to the steps so far, so that 100 and 100,000 steps are the same problem.

    Args:
        units: How many learned factors there are: one for the optimizer, or one for each parameter group.
        base_rate: The largest base rate at the start.
        planned_steps: The length of the training; ``inf`` where nobody knows.
        every_n_steps: Steps from one update to the next; ``None``: in proportion to the steps so far.
        speed: A multiple of the usual speed; 0 only observes.
        ramps: Whether a rate that hardly moves the weights rises fast in the first fifth of the training.
        decays: Whether the rate may fall to zero at the end.
        has_schedule: Whether a scheduler moves the rate, too. It is a plan: nothing rises fast, nothing rises after a
            few passes over the data, nothing falls to zero.
        plays: Whether this is one player of a game, whose steps count against those of others. It may go on for ever in
            one direction without progress, so there only a rate that is far too small rises.

    Attributes:
        is_guarded: Whether a run that is lost is taken back. Else a rate rises at once only where the weights do not
            move at all, or nearly.
    """

    def __init__(
        self,
        units: int,
        *,
        base_rate: float,
        planned_steps: float,
        every_n_steps: int | None,
        speed: float,
        ramps: bool,
        decays: bool,
        has_schedule: bool = False,
        plays: bool = False,
    ) -> None:
        self.only_observes = speed == 0
        self.has_schedule = has_schedule
        self.is_guarded = False
        self.ramps = ramps and speed > 0 and not has_schedule
        self.log_factors = [0.0] * units
        self.ramp_steps = 0
        self.trial_ends = math.inf
        self.best_loss = math.inf  # of all trials
        self._chosen: list[float] = []
        self._every = every_n_steps
        self._speed = speed * _SPEED
        self._decays = decays and speed > 0 and not has_schedule
        self._plays = plays
        self._floor = 0.0
        self._units = [_Unit() for _ in range(units)]
        self._peak = self._scheduled = base_rate
        self._decay_from = math.inf
        self._last = 0
        self._next = float(every_n_steps or _FIRST_UPDATE)
        self._origin = 0
        self._held_out_loss = self._lowest_held_out = math.inf
        self._held_out_count = 0
        self.plan(planned_steps)

    def plan(self, planned_steps: float) -> None:
        """The training has this length, whatever was planned before: a decay that has begun too early ends.

        Args:
            planned_steps: The length of the whole training; ``inf`` where nobody knows.
        """
        self.planned_steps = planned_steps
        self._length = planned_steps if planned_steps < math.inf else _UNKNOWN
        decays = self._decays and planned_steps < math.inf
        self._decay_at = math.ceil(_DECAY_AT * planned_steps) if decays else math.inf
        if self._decay_from < self._decay_at:
            self._decay_from = math.inf

    def resize(self, units: int) -> None:
        """The optimizer has another number of groups now; new ones begin at the rate that they were given."""
        self.end_search()
        self.log_factors[units:] = [0.0] * (units - len(self.log_factors))
        self._units[units:] = [_Unit() for _ in range(units - len(self._units))]

    def samples(self, step: int) -> bool:
        """Whether the step after so many is measured, and folded into the average."""
        return step % max(1, step // _SAMPLES) == 0

    def is_due(self, step: int) -> bool:
        """Whether an update follows so many steps."""
        return step >= round(self._next) or self._last < self._decay_at <= step

    def is_ramping(self, step: int) -> bool:
        """Whether the rate may go on rising at once: it has since the last update, or it is too early to tell."""
        return step < _FIRST_UPDATE or self.ramp_steps > self._last and self.is_early(step)

    def is_early(self, step: int) -> bool:
        """Whether the first part of the training, in which a rate may rise at once, is not over."""
        return step <= _EARLY * self._length

    def see(self, step: int, measured: Iterable[Sequence[float]], unit: int = 0) -> None:
        """Measurements of a unit since the last call, each as :meth:`RunningAverage.measure` has them."""
        seen = self._units[unit]
        last: Sequence[float] = (0.0,) * 5
        found = math.nan
        for last in measured:
            found = cosine(*last[:3])
            if not math.isnan(found):
                seen.recent.add(found)
                seen.at_rate.add(found)
        _, gradient, _, moved, weights = last
        if gradient > 0 and weights > 0:
            if seen.begun is None:
                seen.begun = step - 1
            steps = step - max(seen.begun, self._origin)
            if self.ramps and steps > _SETTLED and self.is_early(step):
                self._ramp(step, math.sqrt(moved / weights), steps, found, unit)

    def _ramp(self, step: int, moved: float, steps: int, last: float, unit: int) -> None:
        """Raise a rate at which nothing would ever happen; where the dtype is too coarse, no weight moves at all."""
        seen = self._units[unit]
        if step - seen.raised_at < 2:  # the weights have not moved at the present rate yet
            moved *= seen.raised_by
        reach = moved / min(steps, (step + 8) / 9) * self._length
        if seen.was_chosen is None:
            seen.was_chosen = reach >= _CARELESS
        nowhere = moved < _NOWHERE and not seen.recent.mean >= 0
        rises = False
        if reach < _STILL and not seen.has_moved:
            agree = seen.recent.mean < _UNANIMOUS if seen.was_chosen else seen.at_rate.shows(seen.at_rate.mean)
            rises = nowhere or agree
            if not math.isnan(last):
                seen.still.add(last)
        elif reach >= _STILL:
            seen.has_moved = True  # where it hardly moves from now on, it has converged
            asked = max(_CLEARLY, _NEARLY * seen.still.mean)
            rises = not seen.was_chosen and reach < _BOLD and seen.at_rate.shows(asked)
        if rises and (nowhere or self.is_guarded):
            seen.raised_by = _RAMP_FROM_NOWHERE if nowhere and self.is_guarded else _RAMP
            self.log_factors[unit] += math.log(seen.raised_by)
            self.ramp_steps = seen.raised_at = step
            seen.at_rate = _Cosines()

    def evidence(self, unit: int = 0) -> tuple[float, float]:
        """The mean cosine since the last update and its standard error; NaN and 1 where nothing was measured."""
        recent = self._units[unit].recent
        return recent.mean, recent.error

    def update(self, step: int, scheduled: float, held_out: Sequence[float] = (), passes: float = 0.0) -> None:
        """Move the factors by what was seen since the last update.

        Args:
            step: Steps made so far.
            scheduled: The present base rate, in any unit.
            held_out: The cosine of each unit's held-out gradient, where there is one. Where that is larger than the
                training gradients', it is what counts: the network is learning its training data by heart.
            passes: How often the training has seen its data. Without held-out gradients nothing rises after a few
                passes, since a network that learns its data by heart has unanimous training gradients, too.
        """
        # A warm-up is a plan, and a schedule that comes down makes the gradients unanimous again.
        is_level = self._scheduled >= scheduled >= _PEAK * self._peak
        self._peak, self._scheduled = max(self._peak, scheduled), scheduled
        span = math.log(step / self._last) if self._every and self._last else math.log(_RATIO)
        early = max(0.0, 1 - step / (_EARLY * self.planned_steps))
        means = []
        for unit, value in enumerate(self.log_factors):
            seen = self._units[unit]
            mean, error = seen.recent.mean, seen.recent.error
            if held_out and not math.isnan(held_out[unit]):
                seen.held_out += (1 - _HELD_OUT_MEMORY) * (held_out[unit] - seen.held_out)
                mean = max(mean, seen.held_out)
            elif passes >= _FEW_PASSES:
                mean = max(mean, -_MARGIN)
            means.append(mean)
            if math.isnan(mean) or not is_level or self._decay_from < math.inf or self.is_searching:
                continue
            rise = min(1.0, max(0.0, (-mean - error - _MARGIN - _EARLY_MARGIN * early) / _FULL))
            fall = min(1.0, max(0.0, (mean - error) / _FULL))
            if self._plays or self.has_schedule and passes >= _FEW_PASSES:
                rise = 0.0
            moved = min(value + self._speed * span * (rise - fall), seen.ceiling)
            self.log_factors[unit] = max(moved, min(self._floor, value))
        is_late = self._decay_at <= step < self.planned_steps
        if is_late and self._decay_from == math.inf and any(mean > _PROGRESS for mean in means):
            self._decay_from = step
        self._forget_cosines()
        self._last = step
        while round(self._next) <= step:
            self._next = self._next + self._every if self._every else self._next * _RATIO

    def see_held_out(self, loss: float, training: float, first: float) -> None:
        """Where the held-out loss has risen, a rate that somebody chose is that one again, at most, and stays there.

        The training learns its data by heart then, and the faster, the higher the rate. Where the training loss has
        risen, too, the rate is too high instead, which other evidence shows.

        Args:
            loss: Of a held-out batch, after an update.
            training: The mean training loss of the last steps; NaN where nobody knows.
            first: The first training loss.
        """
        if math.isfinite(loss):
            mean = self._held_out_loss if self._held_out_count else loss
            self._held_out_loss = mean + (1 - _HELD_OUT_MEMORY) * (loss - mean)
            self._lowest_held_out = min(self._lowest_held_out, self._held_out_loss)
            self._held_out_count += 1
        progress = first - self._lowest_held_out
        has_risen = self._held_out_loss - self._lowest_held_out > _RISEN * progress > _RISEN**2 * abs(first)
        by_heart = has_risen and training < self._lowest_held_out
        if by_heart and self._held_out_count >= _FEWEST and not self.is_searching:
            for unit, seen in enumerate(self._units):
                if seen.was_chosen is not False:
                    self.log_factors[unit] = min(self.log_factors[unit], 0.0)
                    seen.ceiling = min(seen.ceiling, 0.0)

    @property
    def is_decaying(self) -> bool:
        """Whether the factors change at every step."""
        return self._decay_from < math.inf

    def factor(self, step: int, unit: int = 0) -> float:
        """What the base rate is multiplied by in the step after so many."""
        if self._decay_from == math.inf:
            return math.exp(self.log_factors[unit])
        left = max(0.0, (self.planned_steps - step) / (self.planned_steps - self._decay_from))
        return math.exp(self.log_factors[unit]) * left

    def cut(self, step: int, searches: bool = False) -> float:
        """The run was rolled back: cut the rates, by ten if it was lost at once, else by three.

        A rate that had been raised comes back to the one that the user gave, at most. Where it is that one that failed,
        it is the floor no longer.

        Args:
            step: Steps made so far.
            searches: Whether nothing was ever learned, so that nothing is known of the right rate: then :meth:`tried`
                goes on to a third of it as long as that does better.

        Returns:
            What they were divided by.
        """
        before = list(self.log_factors)
        by = _CUT_AT_ONCE if step - self._origin <= _AT_ONCE else _CUT
        was_given = all(value <= 0 for value in before)
        for unit, value in enumerate(before):
            self._units[unit].ceiling = value - math.log(_BELOW)
            lower = value - math.log(by)
            self.log_factors[unit] = lower if was_given else max(lower, min(value, 0.0))
        self._floor = min(self._floor, *self.log_factors)
        self.ramps = False  # the weights have moved
        if not self.is_searching and searches and was_given and self._fits(step):
            self.best_loss, self._chosen, self.trial_ends = math.inf, [], step
        if self.is_searching:
            self._floor = -math.inf
            self.trial_ends = step + self._trial
        self.begin_anew(step)
        return math.exp(max(b - a for b, a in zip(before, self.log_factors, strict=True)))

    @property
    def is_searching(self) -> bool:
        """Whether rates are being tried, after the one that was given diverged."""
        return self.trial_ends < math.inf

    @property
    def _trial(self) -> int:
        return max(_SHORTEST_TRIAL, math.ceil(_TRIAL * self._length))

    def _fits(self, step: int) -> bool:
        """Whether a trial would be over before the rate may decay."""
        return step + self._trial < _DECAY_AT * self.planned_steps

    def tried(self, step: int, loss: float, first: float) -> bool:
        """A trial is over.

        Args:
            step: Steps made so far.
            loss: The mean loss at its end.
            first: The first loss of the training.

        Returns:
            Whether to go back to the snapshot and try a third of the rate; otherwise the best one is in force.
        """
        is_better = loss < self.best_loss - _WORTH * abs(first)
        if is_better:
            self.best_loss, self._chosen = loss, list(self.log_factors)
        if not is_better or not self._fits(step):
            self.end_search()
            return False
        self.log_factors = [value - math.log(_CUT) for value in self.log_factors]
        self.trial_ends = step + self._trial
        self.begin_anew(step)
        return True

    def end_search(self) -> None:
        """Go on with the best rate so far, if one is being searched."""
        if self.is_searching:
            self.log_factors, self.trial_ends = self._chosen or self.log_factors, math.inf

    def begin_anew(self, step: int) -> None:
        """What was measured before this step counts no longer."""
        self._forget_cosines()
        self._origin = step
        self._held_out_loss = self._lowest_held_out = math.inf
        self._held_out_count = 0

    def _forget_cosines(self) -> None:
        for seen in self._units:
            seen.recent = _Cosines()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists of them."""
        state = {name: copy.deepcopy(getattr(self, name)) for name in _STATE}
        return state | {"units": [asdict(unit) for unit in self._units]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with the options of this run."""
        ramps = self.ramps
        vars(self).update({name: copy.deepcopy(state[name]) for name in _STATE})
        self._units = [_Unit.of(unit) for unit in state["units"]]
        self.ramps &= ramps
        self.plan(self.planned_steps)


def cosine(along: float, gradient: float, moved: float) -> float:
    """The cosine of gradient and displacement from their inner product and squared lengths; NaN where there is none."""
    size = math.sqrt(gradient) * math.sqrt(moved) if gradient > 0 and moved > 0 else math.nan
    return max(-1.0, min(1.0, along / size)) if math.isfinite(size) and math.isfinite(along) else math.nan
