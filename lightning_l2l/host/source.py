"""Where the run's meta-gradients come from: its own steps, or a look ahead, and the batches that these need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_l2l.exact.plan import scalars
from lightning_l2l.exact.processes import Processes
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.cadence import Cadence
from lightning_l2l.host.displacement import DisplacementSteps, displacement_obstacle
from lightning_l2l.host.guarded import HELD_OUT_DATA, is_only_held_out, with_note
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.live import LiveSteps, live_obstacle, prefers_live
from lightning_l2l.host.look_ahead import LookAhead
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.training_step import Window, joined
from lightning_l2l.host.windows import RememberedWindows
from lightning_l2l.learned import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class MetaGradientSource:
    """Sees every batch, loss and step of the run; gives a meta-gradient when it is time.

    Args:
        trainer: The Trainer, in ``on_train_start``.
        module: The user's LightningModule.
        learned: The learned optimizer, attached to the live one.
        applied: What it makes of the live optimizer's values.
        settings: What the user asked for.
        cadence: When a meta-gradient is wanted.
        processes: The other processes of the run.

    Raises:
        MisconfigurationException: There is no held-out data, or the estimator ``"displacement"`` or ``"live"`` was
            asked for and cannot be used.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        learned: LearnedOptimizer,
        applied: AppliedValues | LearnedInPlace,
        settings: Settings,
        cadence: Cadence,
        processes: Processes | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._settings = settings
        self._cadence = cadence
        self._processes = processes
        self._windows = RememberedWindows(settings.unrolled + (settings.meta_data == "train"), trainer.world_size)
        self._drawn = 0
        self._rehearsed = self._wanted = self._tried = False
        self.look_ahead = LookAhead(trainer, module, learned, applied, settings, processes)
        self._along = self._along_training(learned, applied)

    def _along_training(
        self, learned: LearnedOptimizer, applied: AppliedValues | LearnedInPlace
    ) -> DisplacementSteps | LiveSteps | None:
        """What follows the run's own steps; ``None`` to look ahead.

        By itself: the displacement, where it can say what is asked; else live steps, where there are one or two numbers
        to learn and the graph can be differentiated twice.
        """
        asked, by_itself = self._settings.estimator, self._settings.estimator == "auto"
        if asked == "displacement" or by_itself:
            obstacle = displacement_obstacle(learned, applied, self._settings)
            if not obstacle:
                reason = "only learning rates are learned" if by_itself else "asked for"
                return DisplacementSteps(
                    self._trainer, self._module, self.look_ahead, learned, self._settings, reason, self._processes
                )
            if not by_itself:
                raise _cannot(asked, obstacle, "chooses another one")
        if asked == "live" or (by_itself and prefers_live(learned)):
            obstacle = live_obstacle(self._trainer, self._module, learned, applied)
            if obstacle and not by_itself:
                raise _cannot(asked, obstacle, "looks ahead on a copy instead")
            if obstacle or isinstance(applied, LearnedInPlace):
                return None
            reason = f"{scalars(learned)} scalar meta-parameter(s): no step is thrown away"
            steps = min(self._settings.unrolled, self._cadence.interval)
            return LiveSteps(
                self._trainer,
                self._module,
                self.look_ahead,
                self._settings,
                steps,
                reason if by_itself else "asked for",
                self._processes,
            )
        return None

    def rehearse(self) -> None:
        """What a meta-update does, on the first batch, before the first real step, so that what fails fails now.

        With the displacement a judgement of the start; else a look-ahead of two steps, since only the second one needs
        the second derivative.
        """
        if not self._rehearsed:
            window = self._windows.unfinished()
            judge = window if self._settings.meta_data == "train" else self.look_ahead.held_out(self._drawn)
            if isinstance(self._along, DisplacementSteps):
                self._along.rehearse(judge)
            else:
                self.look_ahead.meta_gradient([window, window], judge)
            self._rehearsed = True
            if not self._wanted:
                self._windows.skip()

    def see_batch(self, batch: Any, batch_index: int) -> None:
        """A training batch begins; keep it, if the next meta-gradient will need it."""
        step = self._trainer.global_step
        to_go = self._cadence.steps_to_go(step)
        first = batch_index % self._trainer.accumulate_grad_batches == 0
        if self._along is None:
            wanted = to_go <= self._windows.length
        else:
            self._along.before_batch(to_go, first=first)
            # What is trained on just before the window is what the window is judged by.
            opens_next = self._cadence.steps_to_go(step + 1) == self._along.steps
            wanted = self._settings.meta_data == "train" and opens_next
        self._wanted = wanted
        if wanted or not self._rehearsed:
            self._windows.see(batch, batch_index, first=first)

    def skip_batch(self) -> None:
        """The step returned ``None`` for the batch that was seen last."""
        self._windows.skip()

    def see_loss(self, loss: Tensor) -> None:
        """Lightning is about to go backward from this loss.

        Raises:
            RuntimeError: The estimator ``"live"`` was asked for, and an operation has no second derivative.
        """
        if self._along is None:
            return
        if not self._tried:
            self._tried = True
            missing = self._along.trial(loss)
            if missing is not None and self._settings.estimator == "live":
                raise RuntimeError(
                    f"LearnToLearn(estimator='live') differentiates the training's own graph twice, and {missing} "
                    "cannot be. Use estimator='auto', which looks ahead on a copy, with other kernels."
                )
            if missing is not None:
                self._along = None  # look ahead instead
                return
        self._along.see_loss(loss)

    def before_step(self) -> None:
        """The optimizer is about to step; its gradients are not clipped yet."""
        if self._along is not None:
            self._along.before_step()

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if self._along is not None:
            self._along.after_step()

    @property
    def is_due(self) -> bool:
        """Whether the optimizer steps that have been taken end with a meta-update."""
        return self._cadence.is_due(self._trainer.global_step)

    def judges(self) -> list[Window]:
        """A few batches to compare two states by; none where a stream of training batches is all there is."""
        return self.look_ahead.judges(self._drawn)

    def abandon(self) -> None:
        """The training goes on from somewhere else than where its last step led."""
        self._windows.close(self._trainer.accumulate_grad_batches)
        if self._along is not None:
            self._along.drop(tangents=True)

    def finish_step(self) -> MetaGradient | None:
        """A training step is over, schedulers included.

        Returns:
            The meta-gradient, when it is time and there is one.

        Raises:
            StepSkippedError: ``training_step`` returned ``None`` for a batch that it was asked about.
            WindowIncompleteError: A live window misses a step.
            NegativeLossError: The objective takes the logarithm of a negative loss.
        """
        self._windows.close(self._trainer.accumulate_grad_batches)
        if self._along is not None:
            return self._along_meta_gradient(self._along, self.is_due)
        if not self.is_due:
            return None
        # Not every process may have as many, for example after a resume.
        known = len(self._windows) if self._processes is None else min(self._processes.gather(len(self._windows)))
        if not known:
            return None
        windows = self._windows.last()[-known:]
        if self._settings.meta_data == "train":
            *windows, last = windows if len(windows) > 1 else windows * 2
            judge = joined([last])
        else:
            judge = self.look_ahead.held_out(self._drawn)
            self._drawn += 1
        return self.look_ahead.meta_gradient(windows, judge)

    def _along_meta_gradient(self, along: DisplacementSteps | LiveSteps, is_time: bool) -> MetaGradient | None:
        if along.needs_judge(is_time=is_time):
            if self._settings.meta_data != "train":
                along.judge(self.look_ahead.held_out(self._drawn))
            else:
                seen = self._windows.last()
                # Then the last one seen was kept for the next window.
                if self._cadence.steps_to_go(self._trainer.global_step) == along.steps:
                    seen = seen[:-1]
                # The first window of a fit may have no step before it; a resumed process may have lost it.
                missing = not seen
                if missing if self._processes is None else self._processes.any(missing):
                    along.drop()
                else:
                    along.judge(joined(seen[-1:]))
        if not is_time:
            return None
        self._drawn += 1
        result = along.result()
        # The run itself was judged, and its training losses are finite.
        return self.look_ahead.agreed(with_note(result, HELD_OUT_DATA) if is_only_held_out(result) else result)

    def state_dict(self, *, from_all: bool = True) -> dict[str, Any]:
        """What a resumed run goes on from: plain tensors, numbers, strings and containers.

        Args:
            from_all: With what the other processes remember, which asks all of them; else only this one's.
        """
        own = self._windows.state_dict()
        windows: list[dict[str, Any] | None] = [None] * self._trainer.world_size
        windows[self._trainer.global_rank] = own
        if from_all and self._processes is not None:
            windows = self._processes.gather(apply_to_collection(own, Tensor, lambda tensor: tensor.cpu()))
        # What follows the training is the same on all of them.
        along = {} if self._along is None else self._along.state_dict()
        return {"windows": windows, "drawn": self._drawn, "along": along}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        # Every process remembers its own; with another number of them, they begin anew.
        alike = len(state["windows"]) == self._trainer.world_size
        own = state["windows"][self._trainer.global_rank] if alike else None
        self._windows.load_state_dict(own or {}, self._module.device)
        self._drawn = state["drawn"]
        if self._along is not None:
            self._along.load_state_dict(state["along"])


def _cannot(estimator: str, obstacle: str, instead: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"LearnToLearn(estimator={estimator!r}) cannot be used here: {obstacle}. Use estimator='auto', which {instead}."
    )
