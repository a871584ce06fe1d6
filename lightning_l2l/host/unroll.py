"""Exact meta-gradients in a Lightning run: the run's own last steps unrolled from the present weights, on copies."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_l2l.displacement import Rule
from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.exact.processes import StepSkippedError
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.functional import InnerOptimizer, mirror, read_state
from lightning_l2l.host.held_out import SEED_STRIDE, HeldOut
from lightning_l2l.host.isolation import unnoticed
from lightning_l2l.host.refusals import WAY_OUT
from lightning_l2l.host.reporting import names_of
from lightning_l2l.host.training_loss import StepBatches, TrainingLoss, clipping, copied_batch, processes_of
from lightning_l2l.learned import LearnedHyperparameters, LearnedOptimizer, LearnedTorchOptimizer, OptimizerInUse
from lightning_l2l.preserve import PreservedTensors
from lightning_l2l.tuner import LARGEST_SAVED, HeldOutGradient, Tuner

if TYPE_CHECKING:
    import lightning.pytorch as pl

# How far a meta-parameter moves in an update, with meta_learning_rate=1: the logarithm of a hyperparameter falls by a
# third at most and rises by a tenth; the weights of a neural optimizer are small numbers.
_STEP_OF_LOGARITHMS, _STEP_OF_WEIGHTS = 0.4, 1e-3
# A record has a meta-gradient entry by entry up to this many, else its norm.
_MOST_ENTRIES = 100


class UnrollTuner(Tuner):
    """A tuner that learns by exact meta-gradients; start, guard, update schedule and records are those of the default.

    It remembers the batches of the last K steps. An update takes these steps once more, as pure functions from the
    present weights and optimizer state, differentiates the loss of a held-out batch after them, and moves the
    meta-parameters with :class:`~lightning_l2l.exact.meta_optimizer.MetaOptimizer`. **Memory**: K + 1 training batches,
    and what the estimator needs. Checkpoints have the batches if they are plain tensors of at most 64 MiB and there is
    one process; else a resumed run waits until it has seen K steps.

    Args:
        optimizer: The optimizer.
        trainer: The Trainer.
        module: The user's module.
        estimator: How the meta-gradient is computed.
        learned: What :func:`prepare` returned.
        held_out: Held-out batches; ``None``: a training batch that is older than the K.
        held_out_loss: Their loss in place of ``training_step``.
        planned_steps: As for :meth:`Displacement.attach`.
        every_n_steps: The same.
        meta_learning_rate: The same.
        initial_search: The same.
        has_schedule: The same.
        divergence_guard: The same.
        seed: Of what the step draws in an unroll.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        estimator: Unroll | EvolutionStrategies,
        learned: LearnedOptimizer,
        held_out: HeldOut | None,
        held_out_loss: Callable[[pl.LightningModule, Any], Tensor] | None,
        planned_steps: float,
        every_n_steps: int | None,
        meta_learning_rate: float,
        initial_search: bool,
        has_schedule: bool,
        divergence_guard: bool,
        seed: int,
    ) -> None:
        rule = Rule(
            1,
            base_rate=max([float(group["lr"]) for group in optimizer.param_groups if "lr" in group], default=0.0),
            planned_steps=planned_steps,
            every_n_steps=every_n_steps,
            speed=meta_learning_rate,
            ramps=initial_search,
            decays=False,
            has_schedule=has_schedule,
        )
        super().__init__(optimizer, rule, modules=[module], search=initial_search, guard=divergence_guard, seed=seed)
        assert estimator.steps is not None
        self.estimator = type(estimator).__name__
        self._unroll = estimator
        self._count = estimator.steps
        self._trainer = trainer
        self._module = module
        self._learned = learned
        self._held_out = held_out
        self._training_loss = TrainingLoss(trainer, module, held_out_loss)
        self._unroll_seed = seed + trainer.global_rank * SEED_STRIDE
        self._live = PreservedTensors([module], optimizer)
        self._processes = processes_of(trainer)
        self._remembered: deque[StepBatches] = deque(maxlen=estimator.steps + 1)
        self._is_rehearsed = False
        # Hyperparameters other than the rate in each group: what the user wrote, and what is learned on top of it.
        self._given: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
        self._shown: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
        speed = _STEP_OF_LOGARITHMS if isinstance(learned, LearnedHyperparameters) else _STEP_OF_WEIGHTS
        self._meta_optimizer = MetaOptimizer(learned.parameters(), meta_learning_rate * speed)
        if self._processes is not None:
            self._processes.copy_first_(list(learned.parameters()))

    # What the callback tells it of.

    def see_batch(self, batch: Any, index: int) -> None:
        """A training batch begins."""
        self._show_values()
        divisor = self._trainer.accumulate_grad_batches
        last = self._remembered[-1] if self._remembered else None
        if last is not None and last.begun_at == self.steps and index % divisor == 0:
            self._remembered.pop()  # mixed precision left that step out
        if last is None or last.begun_at != self.steps or index % divisor == 0:
            self._remembered.append(StepBatches(self.steps, divisor=divisor))
        self._remembered[-1].batches.append((copied_batch(batch), index))

    def skip_batch(self) -> None:
        """``training_step`` returned nothing for it."""
        self._remembered[-1].batches.pop()
        if not self._remembered[-1].batches:
            self._remembered.pop()

    def is_due(self) -> bool:
        """Whether an update follows the last step; not before there are batches for it."""
        return super().is_due() and len(self._remembered) >= self._count + (self._held_out is None)

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        held_out: HeldOutGradient | None = None,
        compare: HeldOutGradient | None = None,
        passes: float = 0.0,
    ) -> dict[str, Any] | None:
        """As :meth:`Tuner.step`; the first one tries whether the user's step can be unrolled.

        Raises:
            MisconfigurationException: It cannot.
        """
        self._show_values()
        if not self._is_rehearsed and self._remembered:
            self._is_rehearsed = True
            self._rehearse()
        record = super().step(loss, held_out=held_out, compare=compare, passes=passes)
        if record is not None and record["diagnostics"]["trouble"] == "rolled_back":
            self._meta_optimizer.state.clear()  # what it remembers was seen elsewhere
        return record

    def learn(self, held_out: HeldOutGradient | None, passes: float) -> dict[str, Any]:
        """The meta-gradient of an unroll, applied if it is usable."""
        number, start = len(self.history), list(self.rule.log_factors)
        found = super().learn(held_out, passes)
        self.rule.log_factors[:] = start  # the displacement is evidence beside, and moves nothing here
        found |= {"meta_objective": math.nan, "meta_gradient": {}}
        if self.held_out_error is not None:
            self._held_out = None
            return found
        try:
            result = self._meta_gradient(number)
        except Exception as error:  # whatever the user's step raises from weights where the run has not been
            note = f"The unroll failed ({type(error).__name__}: {error}), so nothing was learned."
            return {**found, "diagnostics": {"trouble": "failed", "note": note}}
        trouble, note = self._move(result)
        state = result.diagnostics
        diagnostics = {
            "trouble": trouble,
            "note": note,
            "estimator": state.estimator,
            "reason": state.reason,
            "losses": state.losses.tolist(),
            "growth_rate": float(state.growth_rate),
            "standard_error": {name: _entries(error) for name, error in state.standard_error.items()},
        }
        gradients = {name: _entries(gradient) for name, gradient in result.gradients.items()}
        found |= {"meta_objective": float(result.value), "meta_gradient": gradients, "diagnostics": diagnostics}
        return {**found, "hyperparameters": self._learned_values()}

    @property
    def log_factors(self) -> list[float]:
        """What the start made of the rate, times what is learned of each group."""
        return [self.rule.log_factors[0] + offset for offset in self._offsets()]

    def factors(self) -> list[float]:
        """What the base rate of each group is multiplied by in the next step."""
        return [factor * math.exp(offset) for factor, offset in zip(super().factors(), self._offsets(), strict=True)]

    def values_in_force(self) -> dict[str, float]:
        """Rates, and the other hyperparameters that are learned."""
        values = super().values_in_force()
        for key in self._shown[0]:
            for column, group in zip(self.columns("@"), self.optimizer.param_groups, strict=True):
                for name, value in _numbers(key, group[key]).items():
                    values[column.replace("@", name)] = value
        return values

    # The unroll.

    def _rehearse(self) -> None:
        last = self._remembered[-1]
        try:
            if isinstance(self._unroll, EvolutionStrategies) and self._unroll.batching == "auto":
                # Decided once, each attempt by itself: a step that vmap fails in may leave its tensors in attributes.
                try:
                    self._unrolled([last], last, replace(self._unroll, steps=1, batching="vmap"))
                    return
                except RuntimeError:
                    self._unroll = replace(self._unroll, batching="loop")
            self._unrolled([last], last, replace(self._unroll, steps=1))
        except StepSkippedError:
            return
        except Exception as error:  # whatever the user's step raises; raised again, with the way out
            raise MisconfigurationException(
                f"LearnToLearn called {type(self._module).__name__}.training_step with other weights, to unroll "
                f"training steps, and that failed ({type(error).__name__}: {error}). {WAY_OUT}"
            ) from error

    def _meta_gradient(self, number: int) -> MetaGradient:
        batches = list(self._remembered)[-self._count :]
        if self._held_out is None:
            return self._unrolled(batches, self._remembered[0], self._unroll)
        with unnoticed(self._trainer, self._module, self._unroll_seed + number):
            batch = self._held_out.batches(number)
        return self._unrolled(batches, StepBatches(self.steps, [(batch, 0)], held_out=True), self._unroll)

    def _unrolled(
        self, batches: Sequence[StepBatches], held_out: StepBatches, estimator: Unroll | EvolutionStrategies
    ) -> MetaGradient:
        if isinstance(estimator, EvolutionStrategies):  # other particles in each update, the same on all processes
            estimator = replace(estimator, seed=estimator.seed + self.steps)
        named = dict(self._module.named_parameters())
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        learned, state = self._functional()
        with self._live(), unnoticed(self._trainer, self._module, self._unroll_seed + self.steps):
            result = meta_gradient(
                self._training_loss,
                {name: parameter for name, parameter in named.items() if id(parameter) in owned},
                learned,
                batches,
                held_out,
                estimator=estimator,
                state=state,
                buffers=dict(self._module.named_buffers()),
                gradient_transformation=clipping(self._trainer),
                processes=self._processes,
            )
        if self._processes is not None:  # equal up to the last bits where the hardware differs
            self._processes.copy_first_(list(result.gradients.values()))
        return result

    def _functional(self) -> tuple[LearnedOptimizer, Any]:
        """What the optimizer would do from here as a pure function of the meta-parameters, and its state."""
        if isinstance(self.optimizer, LearnedTorchOptimizer):
            in_use = OptimizerInUse(self.optimizer, self._module.named_parameters())
            return in_use, in_use.read_state()
        self._learned.attach(self._inner())
        return self._learned, read_state(self.optimizer, self._module.named_parameters())

    def _offsets(self) -> list[float]:
        """The logarithm of what each group's rate is multiplied by; 0 for a group that has just been added."""
        groups = len(self.optimizer.param_groups)
        found = dict(self._learned.named_parameters()).get("learning_rate")
        if found is None or isinstance(self.optimizer, LearnedTorchOptimizer):
            return [0.0] * groups
        offsets: list[float] = found.detach().tolist()
        is_shared = isinstance(self._learned, LearnedHyperparameters) and self._learned.per == "optimizer"
        return offsets * groups if is_shared else [*offsets, *([0.0] * (groups - len(offsets)))]

    def _inner(self) -> InnerOptimizer:
        """The optimizer as a pure function, with the user's own values; rates with what the start made of them."""
        inner, groups = mirror(self.optimizer, self._module.named_parameters()), []
        start = self.rule.factor(self.steps)
        for index, group in enumerate(inner.groups):
            given = {k: v for key, value in self._given[index].items() for k, v in _numbers(key, value).items()}
            rate = {"lr": self.rates.base[index] * start}
            groups.append(replace(group, hyperparameters={**group.hyperparameters, **given, **rate}))
        return replace(inner, groups=tuple(groups))

    def _move(self, result: MetaGradient) -> tuple[str, str]:
        """Move the meta-parameters by a usable meta-gradient; what was wrong with another one, and what was done."""
        trouble, note, moves = "", "", not self.rule.only_observes
        if result.usable and moves:
            in_use = self._functional()[0]  # by the names of the meta-gradient
            self._meta_optimizer.apply(in_use, result.gradients)
        elif not result.usable:
            trouble, note = ("underflow" if result.diagnostics.underflow else "diverged"), result.explain()
            # It is never applied; but a training that diverges in K steps has too large a rate, and that much is known.
            halved = self._learned.scaled_rate(0.5) if result.diagnostics.truncated_step is not None and moves else None
            self._learned.set_(halved or {})
            note += f" It was not applied; the learning rate was {'halved' if halved else 'kept'}."
        if moves:
            self._learned.project_()
            self._show_values(force=True)
        return trouble, note

    # The values in the groups.

    def _values(self) -> list[dict[str, Any]]:
        """What is learned of each group; nothing where the optimizer itself is a learned one."""
        return [] if isinstance(self.optimizer, LearnedTorchOptimizer) else self._learned.values()

    def _show_values(self, *, force: bool = False) -> None:
        """Take over what others have written (a schedule may move momentum), and show what is learned on top of it."""
        keys = [key for key in (self._values() or [{}])[0] if key != "lr"]
        changed = force
        for index, group in enumerate(self.optimizer.param_groups):
            if index == len(self._given):
                self._given.append({})
                self._shown.append({})
            for key in keys:
                if key not in self._shown[index] or group[key] != self._shown[index][key]:
                    self._given[index][key] = self._shown[index][key] = group[key]
                    changed = True
        if not keys or not changed:
            return
        self._learned.attach(self._inner())
        for group, shown, values in zip(self.optimizer.param_groups, self._shown, self._values(), strict=True):
            for key in keys:
                group[key] = shown[key] = values[key]

    def _learned_values(self) -> list[dict[str, float]]:
        return [
            {n: v for key, value in group.items() for n, v in _numbers(key, value).items()} for group in self._values()
        ]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and containers."""
        in_optimizer = isinstance(self.optimizer, LearnedTorchOptimizer)  # whose own state has the meta-parameters
        batches = [vars(step) for step in self._remembered]
        saves_batches = self._processes is None and _size(batches) <= LARGEST_SAVED
        return {
            **super().state_dict(),
            "unroll": {
                "learned": {}
                if in_optimizer
                else {n: t.detach().clone() for n, t in self._learned.state_dict().items()},
                "meta_optimizer": copy.deepcopy(self._meta_optimizer.state_dict()),
                "given": copy.deepcopy(self._given),
                "shown": copy.deepcopy(self._shown),
                "batches": copy.deepcopy(batches) if saves_batches else [],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It was saved for another number of parameter groups.
            MisconfigurationException: It was saved with another estimator, or something else was learned.
        """
        saved = state.get("unroll", {"learned": {}, "given": []})
        shapes = {name: tensor.shape for name, tensor in saved["learned"].items()}
        present = {} if isinstance(self.optimizer, LearnedTorchOptimizer) else self._learned.state_dict()
        if "unroll" not in state or shapes != {name: tensor.shape for name, tensor in present.items()}:
            raise MisconfigurationException(
                "The checkpoint's state of LearnToLearn was saved with another estimator, or something else was "
                f"learned ({', '.join(shapes) or 'nothing by an unroll'}). Resume with the configuration that wrote it."
            )
        if present:
            self._learned.load_state_dict(saved["learned"])
        super().load_state_dict(state)
        self._given, self._shown = copy.deepcopy(saved["given"]), copy.deepcopy(saved["shown"])
        speed = self._meta_optimizer.param_groups[0]["lr"]
        self._meta_optimizer.load_state_dict(copy.deepcopy(saved["meta_optimizer"]))
        self._meta_optimizer.param_groups[0]["lr"] = speed
        for step in saved["batches"]:
            kept = StepBatches(**step)
            kept.batches = [(move_data_to_device(batch, self._module.device), index) for batch, index in kept.batches]
            self._remembered.append(kept)


def _numbers(key: str, value: Any) -> dict[str, float]:
    """A hyperparameter of a group by the names that the learned optimizer has for it."""
    if key == "betas":
        return {"beta1": float(value[0]), "beta2": float(value[1])}
    return {key: float(value)}


def _entries(gradient: Tensor) -> list[float]:
    if gradient.numel() > _MOST_ENTRIES:
        return [torch.linalg.vector_norm(gradient.double()).item()]
    values: list[float] = gradient.flatten().tolist()
    return values


def _size(value: Any) -> float:
    """Bytes of the tensors in a tree; infinite if it has anything that would not load with ``weights_only``."""
    if type(value) is Tensor:
        return value.numel() * value.element_size()
    if type(value) in (list, tuple):
        return sum(map(_size, value))
    if type(value) is dict:
        return sum(map(_size, [*value.keys(), *value.values()]))
    return 0 if type(value) in (int, float, bool, str, type(None)) else math.inf


def unrolled_values(record: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What is logged of an update by an exact estimator: meta-gradients (means of their entries), learned values."""
    found = {
        f"l2l/meta_gradient/{name}": sum(entries) / len(entries)
        for name, entries in record.get("meta_gradient", {}).items()
    }
    groups = record.get("hyperparameters", [])
    for key in [key for key in (groups[0] if groups else {}) if key != "lr"]:
        found |= dict(zip(names_of(key, [optimizer]), [group[key] for group in groups], strict=True))
    return found
