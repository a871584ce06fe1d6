"""One fit as LearnToLearn sees it: what is set up when training starts, and undone when it ends.

Everything here is dropped at the end of the fit; what outlives it is in the callback.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_l2l.exact.initial_search import SearchResult
from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.exact.processes import StepSkippedError
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.applied_record import AppliedRecord
from lightning_l2l.host.cadence import Cadence
from lightning_l2l.host.guard import DivergenceGuard
from lightning_l2l.host.guarded import HELD_OUT_DATA
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.isolation import hidden_attribute
from lightning_l2l.host.live import WindowIncompleteError
from lightning_l2l.host.ranks import processes_of
from lightning_l2l.host.report import MetaUpdate
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.source import MetaGradientSource
from lightning_l2l.host.trainer import live_optimizer, overrides, planned_steps
from lightning_l2l.learned import LearnedOptimizer, LearnedTorchOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

_HOOKS_BEFORE_A_STEP = ("on_train_start", "on_train_epoch_start", "on_train_batch_start")


class Session:
    """The running fit.

    Args:
        trainer: The Trainer, in ``on_train_start``.
        module: The user's LightningModule.
        learned: The learned optimizer; it is attached to the live optimizer here.
        settings: What the user asked for.
        saved: What :meth:`state_dict` returned in the run that is resumed.

    Raises:
        MisconfigurationException: The learned optimizer does not fit the live one or the saved state, or there is
            no held-out data.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        learned: LearnedOptimizer,
        settings: Settings,
        saved: dict[str, Any] | None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._learned = learned
        self._settings = settings
        saved = saved or {}
        self._processes = processes_of(trainer)
        self._steps_seen: int = saved.get("steps_seen", trainer.global_step)
        self._searched = bool(saved) or trainer.global_step > 0 or not settings.initial_search
        # What the user's hooks set up is there at the end of the first training step, and not before.
        self.opens_late = any(overrides(module, hook) for hook in _HOOKS_BEFORE_A_STEP)
        optimizer = live_optimizer(trainer)
        try:
            if saved:
                learned.load_state_dict(saved["learned"])
            self.applied = _applied(optimizer, module, learned, saved.get("applied"))
            if self._processes is not None:  # whatever it was initialised with
                self._processes.copy_first_(list(learned.parameters()))
                self.applied.refresh(force=True)
            self._meta_optimizer = MetaOptimizer(learned.parameters(), settings.meta_learning_rate)
            if saved:
                self._refuse_other_shapes(saved, len(optimizer.param_groups))
                self._meta_optimizer.load_state_dict(copy.deepcopy(saved["meta_optimizer"]))
            self._cadence = Cadence(settings.every_n_steps, settings.interval_growth, planned_steps(trainer))
            self.source = MetaGradientSource(
                trainer, module, learned, self.applied, settings, self._cadence, self._processes
            )
            if saved:
                self.source.load_state_dict(saved["source"])
        except (RuntimeError, ValueError, KeyError) as error:
            if not saved:
                raise
            raise MisconfigurationException(
                "The checkpoint's state of LearnToLearn was saved with another `learned`, or for an optimizer with "
                f"other parameter groups ({error}). Resume with the configuration that wrote it."
            ) from error
        for group in self._meta_optimizer.param_groups:
            group["lr"] = settings.meta_learning_rate
        self._record = AppliedRecord(saved.get("schedule"))
        self.guard = DivergenceGuard(
            trainer, module, learned, self.applied, settings, self._processes, saved.get("guard")
        )
        self._cleanup = ExitStack()
        self._install(optimizer)

    def _refuse_other_shapes(self, saved: dict[str, Any], groups: int) -> None:
        # With more groups than there were, what is learned has grown. Otherwise it must be what it was.
        shapes = {name: tensor.shape for name, tensor in self._learned.state_dict().items()}
        before = {name: tensor.shape for name, tensor in saved["learned"].items()}
        if groups == len(saved["applied"]["written"]) and shapes != before:
            raise ValueError(f"meta-parameters {before} became {shapes}")

    def _install(self, optimizer: torch.optim.Optimizer) -> None:
        """The two places where the run has to know of the applied values: schedulers, and steps per tensor."""
        stepping = _StepsSchedulers(self._module.lr_scheduler_step, self.applied)
        self._cleanup.enter_context(hidden_attribute(self._module, "lr_scheduler_step", stepping))
        joining = optimizer.register_step_post_hook(lambda *_: self._after_step())
        self._cleanup.callback(joining.remove)
        self._cleanup.callback(self.applied.join)

    def close(self) -> None:
        """Remove everything of ours from the module and the optimizer; the learned values stay applied."""
        self._cleanup.close()

    def search(self) -> SearchResult | str | None:
        """Find a rate to start from and apply it, once, and only at the beginning of a training.

        Returns:
            What was found, a sentence on why there was no search, or ``None`` if it is not wanted (any more).
        """
        if self._searched or isinstance(self.applied, LearnedInPlace):
            return None
        self._searched = True
        result = self.source.look_ahead.search()
        if isinstance(result, SearchResult) and result.learning_rate is not None:
            self.start_from(result.learning_rate)
        return result

    def start_from(self, learning_rate: float) -> None:
        """Make this the rate of the first group before its schedule, the others in proportion."""
        values = self._learned.scaled_rate(self.source.look_ahead.factor_to(learning_rate))
        assert values is not None
        self._learned.set_(values)
        self._learned.project_()
        self.applied.refresh(force=True)

    def schedule(self) -> dict[str, Any]:
        """What has been applied so far, as in :meth:`state_dict`."""
        return {"schedule": self._record.state_dict()}

    def _after_step(self) -> None:
        if isinstance(self.applied, AppliedValues):
            self._record.note(self._trainer.global_step, self.applied)
        self.applied.join()
        self.source.after_step()

    def see_batch(self, batch: Any, batch_index: int) -> None:
        """A training batch begins."""
        self.guard.keep_first()
        self.source.see_batch(batch, batch_index)

    def see_outputs(self, outputs: Any) -> None:
        """``training_step`` returned this for it; nothing if it was skipped."""
        self.guard.see(outputs)
        if not outputs:
            self.source.skip_batch()

    def finish_step(self) -> MetaUpdate | None:
        """The optimizer has stepped: when it is time, ask for the meta-gradient and apply it.

        Returns:
            What was done; ``None`` if it was not time.
        """
        self._steps_seen = self._trainer.global_step
        rescue = self.guard.check(self.source.judges, due=self._cadence.looks(self._steps_seen))
        if rescue:
            self.source.abandon()
            self._meta_optimizer.state.clear()  # what it remembers was seen elsewhere
            return MetaUpdate(self._steps_seen, None, "rolled_back", rescue)
        try:
            result = self.source.finish_step()
        except StepSkippedError:
            note = "training_step returned None on a remembered or held-out batch: no meta-gradient, the rate was kept."
            return MetaUpdate(self._steps_seen, None, "skipped", note)
        except WindowIncompleteError as error:
            return MetaUpdate(self._steps_seen, None, "", str(error))
        except NegativeLossError as error:  # in the rehearsal it is refused; later it must not end the run
            return MetaUpdate(self._steps_seen, None, "negative", f"{error} No meta-gradient, the rate was kept.")
        if result is None:
            return None
        return self._apply(result)

    @property
    def has_unfinished_step(self) -> bool:
        """Whether the optimizer has stepped since :meth:`finish_step`."""
        return self._trainer.global_step != self._steps_seen

    def _apply(self, result: MetaGradient) -> MetaUpdate:
        trouble, note = "", ""
        if not result.usable:
            trouble, note = ("underflow" if result.diagnostics.underflow else "diverged"), result.explain()
            if HELD_OUT_DATA in result.diagnostics.notes:
                trouble, note = "data", HELD_OUT_DATA
        if self._settings.meta_learning_rate == 0:
            return MetaUpdate(self._steps_seen, result, trouble, f"{note} Observed only.".strip())
        if result.usable:
            self.guard.all_is_well(self.source.judges)
            self._meta_optimizer.apply(self._learned, result.relative())
        else:
            # Never apply what is not a gradient. Diverging means that the rate is too large, and that much is known.
            halved = self._learned.scaled_rate(0.5) if trouble == "diverged" else None
            note += f" The rate was {'kept' if halved is None else 'halved'} instead."
            self._learned.set_(halved or {})
        self._learned.project_()
        self.applied.refresh(force=True)
        return MetaUpdate(self._steps_seen, result, trouble, note)

    def state_dict(self, *, from_all: bool = True) -> dict[str, Any]:
        """What a resumed run goes on from: plain tensors, numbers, strings and containers.

        Args:
            from_all: With what the other processes remember, which asks all of them; else only this one's.
        """
        return {
            "learned": {name: tensor.detach().clone() for name, tensor in self._learned.state_dict().items()},
            "meta_optimizer": copy.deepcopy(self._meta_optimizer.state_dict()),
            "applied": self.applied.state_dict(),
            "source": self.source.state_dict(from_all=from_all),
            "steps_seen": self._steps_seen,
            "guard": self.guard.state_dict(),
            **self.schedule(),
        }


def _applied(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module, learned: LearnedOptimizer, saved: dict[str, Any] | None
) -> AppliedValues | LearnedInPlace:
    if isinstance(optimizer, LearnedTorchOptimizer):
        return LearnedInPlace(optimizer, module)
    return AppliedValues(optimizer, module, learned, saved)


class _StepsSchedulers:
    """The module's ``lr_scheduler_step``, with the scheduled values in the groups while it runs.

    It hides the method on the instance for the time of the fit. A copy or a pickle of the module made meanwhile has the
    original method in this place.
    """

    def __init__(self, original: Any, applied: AppliedValues | LearnedInPlace) -> None:
        self._original = original
        self._applied = applied

    def __call__(self, *arguments: Any) -> None:
        with self._applied.scheduled():
            self._original(*arguments)

    def __reduce__(self) -> Any:
        return _itself, (self._original,)


def _itself(value: Any) -> Any:
    return value
