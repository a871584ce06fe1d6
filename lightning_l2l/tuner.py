"""Tuner: learns the rates of one optimizer while it trains. The same in Lightning, in Fabric and in a plain loop."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_l2l.displacement import Rule, RunningAverage, cosine
from lightning_l2l.guard import LossWatch, Snapshot, is_worse
from lightning_l2l.preserve import PreservedTensors, preserved_module, preserved_random_state
from lightning_l2l.rates import AppliedRates, AppliedRecord

# ``gradient(number, before)`` opens a context in which the trained parameters hold a held-out gradient, and yields the
# loss; ``before`` is called once everything is saved, and may move the weights. See lightning_l2l.host.held_out.
HeldOutGradient = Callable[[int, Callable[[], None] | None], AbstractContextManager[Tensor]]

# An average that is larger than this is not written into checkpoints: it starts afresh in a run that is resumed.
LARGEST_SAVED = 64 * 2**20
# A run that is lost more often than this has another problem than its learning rate.
_MOST_ROLLBACKS = 10
# Held-out batches by which the snapshot and the present weights are compared.
_COMPARED = 2


# What shares a learned factor.
Per = Literal["optimizer", "group"]


class HeldOutError(RuntimeError):
    """A held-out gradient could not be taken; the message says of what, why, and the way out."""


@dataclass(frozen=True)
class SearchResult:
    """What the search for a rate to start from found.

    Attributes:
        learning_rate: The rate of the first parameter group that the training started from, before its schedule.
        steps: Optimizer steps that the search lasted.
        reason: What was seen, in words.
    """

    learning_rate: float
    steps: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """The default estimator: learning rates from the cosine of gradient and displacement. Nothing to choose.

    Attributes:
        per: ``"optimizer"``: one factor for all parameter groups, whose ratios stay as you chose them; ``"group"``: a
            factor for each, from its own cosine.
        final_decay: Where the length of the training is known, you have no schedule, and noise is what limits the loss
            (the cosine is not negative any more), let the rate fall to zero over the last 15 % of the steps.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((1,), 5.0))
        >>> optimizer = torch.optim.SGD([weight], lr=1e-4)  # far too small
        >>> tuner = Displacement().attach(optimizer, planned_steps=100)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * weight.square().sum()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     _ = tuner.step(loss)
        >>> tuner.rates.applied[0] > 0.01, abs(weight.item()) < 0.5
        (True, True)
    """

    per: Per = "optimizer"
    final_decay: bool = True

    def __post_init__(self) -> None:
        """Refuses what means nothing."""
        if self.per not in get_args(Per):
            raise ValueError(f"Displacement(per={self.per!r}) is not known; choose one of {list(get_args(Per))}.")

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        planned_steps: float = math.inf,
        every_n_steps: int | None = None,
        meta_learning_rate: float = 1.0,
        initial_search: bool = True,
        divergence_guard: bool = True,
        has_schedule: bool = False,
        is_player: bool = False,
        modules: Iterable[nn.Module] = (),
        seed: int = 0,
    ) -> Tuner:
        """Learn the rates of an optimizer from its next step on.

        Where its steps are not in proportion to its rate (:func:`why_not_in_proportion`), a warning says so, and the
        rate is only observed.

        Args:
            optimizer: Any optimizer whose steps are in proportion to ``group["lr"]``; Fabric's wrapper of one as well.
            planned_steps: Its steps in the whole training; infinite where nobody knows.
            every_n_steps: Steps from one update to the next; ``None``: in proportion to the steps so far.
            meta_learning_rate: A multiple of the usual speed; 0 only observes.
            initial_search: Whether a rate that hardly moves the weights rises fast in the first fifth of the training.
            divergence_guard: Whether a diverged run is rolled back.
            has_schedule: Whether a scheduler moves the rate, too.
            is_player: Whether it is one of several whose losses work against each other (GANs): then a rate rises only
                where the weights do not move at all, since progress against another player is no progress by itself.
            modules: The modules that are trained, for the guard's snapshot.
            seed: Of what is drawn.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A parameter group has no learning rate, or an argument means nothing.
        """
        _check_attach(planned_steps, every_n_steps, meta_learning_rate, modules)
        optimizer = _unwrapped(optimizer)
        reason = why_not_in_proportion(optimizer)
        if reason and meta_learning_rate > 0 and not (_is_distributed() and torch.distributed.get_rank()):
            warnings.warn(f"{reason} Its learning rate is left alone, and only observed.", stacklevel=2)
        rule = Rule(
            len(optimizer.param_groups) if self.per == "group" else 1,
            base_rate=max([float(group.get("lr") or 0.0) for group in optimizer.param_groups], default=0.0),
            planned_steps=planned_steps,
            every_n_steps=every_n_steps,
            speed=0.0 if reason else meta_learning_rate,
            ramps=initial_search and not _warms_up(optimizer),
            decays=self.final_decay,
            has_schedule=has_schedule,
            plays=is_player,
        )
        return Tuner(optimizer, rule, modules=modules, search=initial_search, guard=divergence_guard, seed=seed)


class Tuner:
    """Watches an optimizer's steps, and moves its learning rates. Made by :meth:`Displacement.attach`.

    It lives in the optimizer's step hooks: before a step it measures the gradient along the displacement, after it the
    running average takes note of the weights. Call :meth:`step` after each ``optimizer.step()``.

    Args:
        optimizer: Any optimizer that moves its parameters in proportion to ``group["lr"]``.
        rule: When and how rates move.
        modules: Modules whose buffers are taken along by the guard, and put back after a held-out gradient.
        search: Whether to say what the first steps made of the rate.
        guard: Whether to roll a diverged run back.
        seed: Of what a held-out loss draws.

    Attributes:
        history: One record for each update.
        rates: The base and applied rates.
        steps: Optimizer steps so far.
        search_result: What the first steps, or a search after a divergence, made of the given rate; ``None`` before.
        seen: Optimizer steps when :meth:`step` was last called.
        held_out_error: What the last held-out gradient failed with: the update went on with the training gradients.
        rollbacks: How often the run was rolled back.
        estimator: What the evidence is, in the records.
    """

    estimator = "displacement"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        *,
        modules: Iterable[nn.Module] = (),
        search: bool = True,
        guard: bool = True,
        seed: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.rates = AppliedRates(optimizer)
        self._first_base = self.rates.base
        self.average = RunningAverage(optimizer)
        self.history: list[dict[str, Any]] = []
        self.held_out_error: HeldOutError | None = None
        self.search_result: SearchResult | None = None
        self.steps = 0
        self.rollbacks = 0
        self._modules = list(modules)
        self._seed = seed
        self._searches = search and not rule.only_observes
        self._guards = guard and not rule.only_observes
        self.applied = AppliedRecord()
        self._watch = LossWatch(rule.planned_steps)
        self._tensors = PreservedTensors([*self._modules], optimizer)
        self._snapshot: Snapshot | None = None
        self._measured: list[Tensor] = []
        self._losses: list[Tensor] = []
        self.seen = 0
        self._depth = 0
        self._leave = _on_each_step(optimizer, self._about_to_step, self._has_stepped)

    # What every step of the optimizer does.

    def _about_to_step(self, _: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._depth += 1
        if self._depth > 1:  # a subclass whose step calls that of its base class: torch runs the hooks of both
            return None
        # With a closure, the gradients are there once it has run.
        if options.get("closure") is not None:
            return arguments, {**options, "closure": self._after(options["closure"])}
        if len(arguments) > 1 and callable(arguments[1]):
            return (arguments[0], self._after(arguments[1]), *arguments[2:]), options
        self._before_step()
        return None

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            result = closure()
            calls += 1
            if calls == 1:  # later ones (LBFGS, SAM) evaluate other weights within the same step
                self._before_step()
            return result

        return wrapped

    def _before_step(self) -> None:
        if 1 < len(self.rule.log_factors) != len(self.optimizer.param_groups):
            self.rule.resize(len(self.optimizer.param_groups))
        self.rates.before_step()
        self.applied.note(self.steps, self.values_in_force())
        if self._guards and self._snapshot is None:
            self._snapshot = Snapshot(self._modules, self.optimizer)
        if self.rule.ramps:
            # A rate that somebody moves is a plan, and one of zero too.
            base = self.rates.base[: len(self._first_base)]
            self.rule.ramps = base == self._first_base and all(base)
        if self.rule.samples(self.steps):
            self.average.follow()
            sums = self._measure()
            if self._measured and self._measured[-1].shape != sums.shape:
                self._measured.clear()  # a group was added
            self._measured.append(sums)

    def _has_stepped(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self.rates.after_step()
        self.steps += 1
        if self.rule.samples(self.steps - 1):
            self.average.fold(self.steps)

    def values_in_force(self) -> dict[str, float]:
        """What the next step uses, by the name of the column in an exported schedule."""
        return dict(zip(self.columns("lr"), self.rates.applied, strict=True))

    def columns(self, key: str) -> list[str]:
        """The name of each group's hyperparameter in an exported schedule.

        Args:
            key: The hyperparameter's key in the groups.
        """
        groups = self.optimizer.param_groups
        if len(groups) == 1:
            return [key]
        labels = [str(group.get("name", index)) for index, group in enumerate(groups)]
        return [f"{key}/{label if len(set(labels)) == len(labels) else index}" for index, label in enumerate(labels)]

    def _measure(self) -> Tensor:
        sums = [self.average.measure(group) for group in range(len(self.optimizer.param_groups))]
        return torch.stack([row.to(sums[0]) for row in sums])

    # What the loop calls.

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        held_out: HeldOutGradient | None = None,
        compare: HeldOutGradient | None = None,
        passes: float = 0.0,
    ) -> dict[str, Any] | None:
        """To be called after each optimizer step; returns the record of an update, if there was one.

        Calls without a step in between (accumulated batches, a step that mixed precision left out) do nothing.

        Args:
            loss: The training loss of the step. Without it, a lost run is not noticed, so a rate rises fast only where
                the weights do not move at all.
            held_out: Where held-out gradients come from: :meth:`held_out_gradient` makes one of a function. Without it,
                the rate is learned from the training gradients alone.
            compare: The same for the guard, which compares two states on the same batch; ``None``: ``held_out``.
            passes: How often the training has seen its data, where they are finite: without held-out gradients, no rate
                rises after three passes.
        """
        self._depth = 0  # if the step raised
        if self.steps == self.seen:
            return None
        self.seen = self.steps
        self.rule.is_guarded = self._guards and loss is not None
        if loss is not None:
            value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
            if value.numel() != 1:
                raise ValueError(
                    f"Tuner.step(loss) was given {value.numel()} numbers, of shape {tuple(value.shape)}. Pass the one "
                    "that was differentiated: loss.mean(), for example."
                )
            self._losses.append(self._sign * value.reshape(()))
        self._warn_of_the_end()
        due = self.is_due()
        if not (due or self._reads_now()):
            return None
        losses, measured = self._read()
        for number in losses:
            self._watch.see(number)
        for unit in self._units:
            self.rule.see(self.steps, [self._of_unit(sums, unit) for sums in measured], unit)
        if self._guards and self._watch.is_suspicious and self.rollbacks < _MOST_ROLLBACKS:
            record = self._go_back_if_lost(compare or held_out)
            if record is not None:
                return record
        if self.steps >= self.rule.trial_ends:
            if self.rule.tried(self.steps, self._watch.mean, self._watch.first):
                return self._go_back(
                    "The rate that was given diverged before anything was learned. So a third of the present one is "
                    "tried from the same snapshot, as long as that learns more in as many steps."
                )
            self._apply()
            self.search_result = self._end_of_trials()
        record = self._update(held_out, passes) if due else None
        if self.rule.is_decaying or self.rule.is_ramping(self.steps):
            self._apply()
        return record

    def _warn_of_the_end(self) -> None:
        # Said at the step after the last one that was planned, unless the rate has not fallen.
        if self.steps != self.rule.planned_steps + 1 or not self.rule.is_decaying:
            return
        if not (_is_distributed() and torch.distributed.get_rank()):
            warnings.warn(
                f"The training goes on after the {self.rule.planned_steps:.0f} steps that were planned, at the end of "
                "which the learning rate has fallen to zero: nothing is learned any more. Pass the planned_steps of "
                "the whole training, or leave them out where nobody knows.",
                stacklevel=3,
            )

    def is_due(self) -> bool:
        """Whether an update follows the last step."""
        return self.rule.is_due(self.steps)

    @property
    def log_factors(self) -> list[float]:
        """The logarithms of the learned factors: one for the optimizer, or one for each parameter group."""
        return self.rule.log_factors

    def factors(self) -> list[float]:
        """What the base rate of each group is multiplied by in the next step."""
        groups = range(len(self.optimizer.param_groups))
        return [self.rule.factor(self.steps, min(group, len(self._units) - 1)) for group in groups]

    @property
    def _units(self) -> range:
        return range(len(self.rule.log_factors))

    def _of_unit(self, sums: list[list[float]], unit: int) -> list[float]:
        """What was measured of a parameter group that has a factor of its own, or of all that share one."""
        return sums[unit] if len(self._units) > 1 else [sum(column) for column in zip(*sums, strict=True)]

    def _apply(self) -> None:
        self.rates.apply(self.factors())

    @property
    def _sign(self) -> float:
        """Where the optimizer maximizes, what it maximizes is a negative loss."""
        return -1.0 if all(group.get("maximize") for group in self.optimizer.param_groups) else 1.0

    def _reads_now(self) -> bool:
        """Whether to look at the numbers of the last steps, which makes an accelerator or other processes wait."""
        waits = _is_distributed() or any(value.device.type != "cpu" for value in self._losses[:1])
        return (
            not waits or self.steps <= 32 or self.steps % (self.steps // 32) == 0 or self.steps >= self.rule.trial_ends
        )

    def _read(self) -> tuple[list[float], list[list[list[float]]]]:
        """Losses and measurements since the last time, with one transfer; losses are means over the processes."""
        losses, measured = self._losses, self._measured
        self._losses, self._measured = [], []
        if not losses and not measured:
            return [], []
        like = (measured or losses)[0]
        stacked = torch.stack([value.to(like) for value in losses]) if losses else torch.zeros(0).to(like)
        if losses and _is_distributed():
            torch.distributed.all_reduce(stacked)
            stacked /= torch.distributed.get_world_size()
        numbers = torch.cat([stacked, *[sums.flatten() for sums in measured]]).tolist()
        groups = len(self.optimizer.param_groups)
        rows = [numbers[at : at + 5] for at in range(len(losses), len(numbers), 5)]
        return numbers[: len(losses)], [rows[at : at + groups] for at in range(0, len(rows), groups)]

    def _update(self, held_out: HeldOutGradient | None, passes: float) -> dict[str, Any]:
        is_open = self.rule.is_early(self.steps) or self.rule.is_searching
        if self._searches and self.search_result is None and not is_open:
            self.search_result = self._end_of_search()
        found = self.learn(held_out, passes)
        if self._snapshot is not None and not self.rule.is_searching and self._watch.has_improved():
            self._snapshot.take()
        self._apply()
        return self._record({"training_loss": self._watch.mean, **found})

    def learn(self, held_out: HeldOutGradient | None, passes: float) -> dict[str, Any]:
        """What an update learns: gather the evidence, and move the learned factors by it.

        Args:
            held_out: Where held-out gradients come from.
            passes: How often the training has seen its data.

        Returns:
            The evidence, for the record.
        """
        held_out_loss, held_out_cosines = math.nan, []
        if held_out is not None:
            try:
                with held_out(len(self.history), None) as loss:
                    sums = self._measure()
                    *numbers, held_out_loss = torch.cat([sums.flatten(), loss.detach().reshape(1).to(sums)]).tolist()
                rows = [numbers[at : at + 5] for at in range(0, len(numbers), 5)]
                held_out_cosines = [cosine(*self._of_unit(rows, unit)[:3]) for unit in self._units]
            except HeldOutError as error:
                self.held_out_error = error
        evidence = [self.rule.evidence(unit) for unit in self._units]
        self.rule.update(self.steps, max(self.rates.base, default=0.0), held_out_cosines, passes)
        self.rule.see_held_out(self._sign * held_out_loss, self._watch.mean, self._watch.first)
        return {
            "held_out_loss": held_out_loss,
            "cosine": [mean for mean, _ in evidence],
            "cosine_error": [error for _, error in evidence],
            "held_out_cosine": held_out_cosines,
        }

    def _end_of_search(self) -> SearchResult:
        steps, factor = self.rule.ramp_steps, math.exp(self.rule.log_factors[0])
        rate = self.rates.base[0] * factor
        if steps > 0:
            reason = f"the given rate hardly moved the weights: it was multiplied by {factor:.3g}"
        elif self.rollbacks > 0:
            reason = "the run was lost, and the rate cut"
        elif self.rule.has_schedule:
            reason = "a schedule is a plan, so the rate is where it says"
        elif not all(self._first_base):
            reason = "a learning rate of zero is a plan, so every rate is where you set it"
        elif not self.rule.ramps:
            reason = "the optimizer, or somebody else, moves the rate, so it stays where they say"
        else:
            reason = "the given rate moves the weights, so it stays"
        return SearchResult(rate, steps, reason)

    def _end_of_trials(self) -> SearchResult:
        log_factor = self.rule.log_factors[0]
        learned = self.rule.best_loss < self._watch.first - 0.05 * abs(self._watch.first)
        found = "the best of those tried" if learned else "though none of those tried learned anything so soon"
        reason = f"the given rate diverged: it was divided by {math.exp(-log_factor):.3g}, {found}"
        return SearchResult(self.rates.base[0] * math.exp(log_factor), self.steps, reason)

    def _record(self, found: dict[str, Any], trouble: str = "", note: str = "") -> dict[str, Any]:
        diagnostics = found.pop("diagnostics", {})
        record: dict[str, Any] = {
            "step": self.steps,
            "learning_rates": self.rates.applied,
            "base_rates": self.rates.base,
            **found,
            "diagnostics": {"trouble": trouble, "note": note, "estimator": self.estimator, **diagnostics},
        }
        self.history.append(record)
        return record

    def _go_back_if_lost(self, compare: HeldOutGradient | None) -> dict[str, Any] | None:
        snapshot = self._snapshot
        if snapshot is None:
            return None
        if compare is not None:
            before, now = ([self._loss(compare, n, move) for n in range(_COMPARED)] for move in (snapshot.load, None))
            if not is_worse(before, now):
                self._watch.unfounded()
                return None
        cut = self.rule.cut(self.steps, searches=self._watch.never_learned())
        self.rollbacks += 1
        note = (
            "The training had diverged. Weights and buffers were restored from the last good snapshot, the optimizer's "
            f"state starts afresh, and the learning rate was divided by {cut:g}."
        )
        if self.rollbacks == _MOST_ROLLBACKS:
            note += (
                f" That was the {_MOST_ROLLBACKS}th time, and the last one: the learning rate is not what is wrong. "
                "Look for broken batches or a loss that is not a number."
            )
        return self._go_back(note)

    def _go_back(self, note: str) -> dict[str, Any]:
        assert self._snapshot is not None
        self._snapshot.restore()
        self._measured, self._losses = [], []
        self.average.restart(self.steps)
        self._watch.forget()
        self._apply()
        return self._record({}, "rolled_back", note)

    def _loss(self, compare: HeldOutGradient, number: int, before: Callable[[], None] | None) -> float:
        try:
            with compare(len(self.history) + number, before) as loss:
                return self._sign * float(loss)
        except HeldOutError:  # a step may refuse weights that have diverged
            return math.nan

    def held_out_gradient(self, loss: Callable[[], Tensor]) -> HeldOutGradient:
        """Held-out gradients of a function, for loops of plain PyTorch.

        Weights, buffers, gradients, attributes and random numbers are put back after each call. On several processes
        the gradient is the mean over them.

        Args:
            loss: Returns the loss of a held-out batch, another one in each call, with its graph.
        """

        @contextmanager
        def gradient(number: int, before: Callable[[], None] | None) -> Iterator[Tensor]:
            with ExitStack() as stack:
                stack.enter_context(self._tensors())
                stack.enter_context(preserved_random_state(self._seed + number))
                for module in self._modules:
                    stack.enter_context(preserved_module(module))
                if before is not None:
                    before()
                with torch.enable_grad():
                    value = loss()
                    value.backward()
                trained = [p for group in self.optimizer.param_groups for p in group["params"]]
                yield mean_over_processes(value.detach(), trained)

        return gradient

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and containers: torch loads checkpoints with ``weights_only``."""
        average = self.average.state_dict()
        size = sum(tensor.numel() * tensor.element_size() for tensor in average["average"])
        if size > LARGEST_SAVED or self.average.is_sharded:  # one process saves for all, and knows its own shards only
            average["average"] = []
        return {
            "steps": self.steps,
            "seen": self.seen,
            "rollbacks": self.rollbacks,
            "base_rates": self.rates.base,
            "rule": self.rule.state_dict(),
            "watch": self._watch.state_dict(),
            "losses": [value.item() for value in self._losses],
            "measured": [sums.tolist() for sums in self._measured],
            "average": average,
            "applied": self.applied.state_dict(),
            "history": copy.deepcopy(self.history),
            "search_result": None if self.search_result is None else asdict(self.search_result),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It was saved for another number of parameter groups.
        """
        if len(state["base_rates"]) > len(self.optimizer.param_groups):
            raise ValueError(
                f"The saved state is of an optimizer with {len(state['base_rates'])} parameter groups; this one has "
                f"{len(self.optimizer.param_groups)}. Resume with the optimizer that was saved."
            )
        self.steps, self.seen, self.rollbacks = state["steps"], state["seen"], state["rollbacks"]
        self.rule.load_state_dict(state["rule"])
        self._watch.load_state_dict(state["watch"])
        device = next((p.device for group in self.optimizer.param_groups for p in group["params"]), None)
        self._losses = [torch.tensor(value, device=device) for value in state["losses"]]
        self._measured = [torch.tensor(sums, dtype=torch.float64, device=device) for sums in state["measured"]]
        if not self.average.load_state_dict(state["average"]):
            self.average.restart(self.steps)
            self.rule.begin_anew(self.steps)
        self.applied.load_state_dict(state["applied"])
        self.history = copy.deepcopy(state["history"])
        self.search_result = SearchResult(**state["search_result"]) if state["search_result"] else None
        # The optimizer's saved groups show the applied rates.
        self.rates.rebase(state["base_rates"])
        # The snapshot that trials go back to is not saved.
        was_searching = self.rule.is_searching
        self.rule.end_search()
        self._apply()
        self._first_base = self.rates.base
        if was_searching:
            self.search_result = self._end_of_trials()

    def close(self) -> None:
        """Leave the optimizer: no hooks, plain numbers in the groups, at the applied rates."""
        self._leave()
        self.rates.close()


def why_not_in_proportion(optimizer: torch.optim.Optimizer) -> str:
    """Why the steps of an optimizer are not in proportion to its learning rate; empty where they are.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> why_not_in_proportion(torch.optim.Rprop([weight]))
        'Rprop has a step size of its own for each weight, and uses the learning rate in its first step only.'
        >>> why_not_in_proportion(torch.optim.Adam([weight]))
        ''
    """
    name = type(optimizer).__name__
    bases = {base.__name__ for base in type(optimizer).__mro__}
    if "Rprop" in bases:
        return f"{name} has a step size of its own for each weight, and uses the learning rate in its first step only."
    if "LBFGS" in bases:
        return f"{name} takes several steps in one, whose lengths are those of a line search or of the curvature."
    if any(group.get("relative_step") for group in optimizer.param_groups):
        return f"{name} takes its step size from the number of steps (relative_step=True)."
    # Prodigy and D-Adaptation keep an estimate of the distance to the solution, and how it may grow, in each group.
    if any("d" in group and "growth_rate" in group for group in optimizer.param_groups):
        return f"{name} estimates its own step size (the 'd' of its parameter groups)."
    return ""


def _check_attach(planned_steps: Any, every_n_steps: Any, meta_learning_rate: Any, modules: Any) -> None:
    for name, value in {"planned_steps": planned_steps, "meta_learning_rate": meta_learning_rate}.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"attach({name}={value!r}) must be a number.")
    if not planned_steps > 0:
        raise ValueError(
            f"attach(planned_steps={planned_steps}) must be the steps of the whole training, at least one. Leave it "
            "out where nobody knows."
        )
    if not 0 <= meta_learning_rate < math.inf:
        raise ValueError(f"attach(meta_learning_rate={meta_learning_rate}) must be finite, and not negative.")
    if every_n_steps is not None and (isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int)):
        raise TypeError(f"attach(every_n_steps={every_n_steps!r}) must be a whole number of steps, or None.")
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(f"attach(every_n_steps={every_n_steps}) must be at least 1.")
    if not isinstance(modules, Iterable):
        raise TypeError("attach(modules=...) takes several modules: pass modules=[module] for one.")


def _warms_up(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the first steps are short by design, and say nothing about the rate: RAdam, schedule-free optimizers."""
    is_rectified = any(base.__name__ == "RAdam" for base in type(optimizer).__mro__)
    return is_rectified or any(group.get("warmup_steps") for group in optimizer.param_groups)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Fabric's or the Trainer's wrapper: what really steps, or does not (mixed precision)."""
    wrapped = any(base.__name__ in ("_FabricOptimizer", "LightningOptimizer") for base in type(optimizer).__mro__)
    return optimizer.optimizer if wrapped else optimizer  # type: ignore[no-any-return]


def _on_each_step(optimizer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Call hooks as torch does; returns what ends that.

    Objects that merely behave like an optimizer have no hooks: there ``step`` is replaced on the instance.
    """
    leave = ExitStack()
    if isinstance(optimizer, torch.optim.Optimizer) and getattr(type(optimizer).step, "hooked", False):
        leave.callback(optimizer.register_step_pre_hook(before).remove)
        leave.callback(optimizer.register_step_post_hook(after).remove)
        return leave.close
    step = optimizer.step
    ended = False

    def hooked(*arguments: Any, **options: Any) -> Any:
        if ended:
            return step(*arguments, **options)
        (_, *given), options = before(optimizer, (optimizer, *arguments), options) or ((optimizer, *arguments), options)
        result = step(*given, **options)
        after(optimizer, arguments, options)
        return result

    def end() -> None:
        nonlocal ended
        ended = True  # a scheduler may have wrapped it meanwhile, so it stays where it is

    optimizer.step = hooked
    return end


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mean_over_processes(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Average the gradients of whole parameters, in place, and the loss; those of sharded ones are means already."""
    if not _is_distributed() or torch.distributed.get_world_size() == 1:
        return loss
    count = torch.distributed.get_world_size()
    for parameter in parameters:
        if hasattr(parameter, "to_local"):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(count)
    total = loss.float().clone()
    torch.distributed.all_reduce(total)
    return total / count
