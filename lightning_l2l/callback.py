"""LearnToLearn: learn the learning rate of a LightningModule while it trains."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_l2l.exact.initial_search import SearchResult
from lightning_l2l.exact.objectives import Objective
from lightning_l2l.host import refusals, report
from lightning_l2l.host.applied_record import exported
from lightning_l2l.host.figures import log_figure
from lightning_l2l.host.saved_state import VERSION, check_saved
from lightning_l2l.host.session import Session
from lightning_l2l.host.settings import HostEstimator, Settings, check_learned
from lightning_l2l.host.trainer import live_optimizer
from lightning_l2l.learned import LearnedOptimizer, LearnedStepSize, LearnedTorchOptimizer
from lightning_l2l.schedule import LearnedSchedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LearnToLearn(pl.Callback):
    """Learns the learning rate (or other hyperparameters) of any LightningModule during its own training.

    Every ``every_n_steps`` optimizer steps it asks a held-out batch whether the way of the last hundred steps came
    uphill: if it did, the steps were too long and the rate falls, otherwise it rises. Before training, a range test
    finds a rate to start from; a run that is lost is taken back. Module, optimizer, schedulers and data stay yours.

    **When it helps.** You do not know a good learning rate, or one constant rate is not good all the way. **What it
    costs**: one held-out gradient per meta-update, and 5 % of the steps for the range test (docs, "benchmarks"). With
    other hyperparameters to learn, exact derivatives over a few steps. **What it does not do**: it needs automatic
    optimization, a single device or DDP, and an optimizer with a mirror (SGD, Adam, AdamW, NAdam, RAdam, RMSprop,
    Adagrad); everything that is refused is refused before training, with the reason.

    Nothing else of the run changes: parameters, buffers, random numbers, metrics, attributes of the modules and the
    order of the data are those of the run without the callback (bit for bit, with ``meta_learning_rate=0,
    initial_search=False``). What your ``training_step`` changes *inside* other objects cannot be protected.

    Args:
        learned: What is learned. ``None``: ``LearnedStepSize(per="group")``, one factor on the scheduled
            rate of each parameter group. It is a template: each fit learns on a copy, :attr:`learned`. Leave it out
            where the optimizer is itself a learned one (``as_torch_optimizer``): that one is trained on, in place.
        unroll_steps: Training steps K that a meta-gradient covers; for ``"displacement"`` the memory, by which a step
            has faded to ``1 / e`` (at least 2). ``None``: 100 there, 3 for the others, whose cost grows with it.
        every_n_steps: Optimizer steps from one meta-update to the next, at first. A run that is known to be shorter
            than two of these makes its updates correspondingly more often, at least one.
        objective: The meta-objective: ``"log"`` (of the loss after K steps, divided by K), ``"naive"`` (that loss), or
            their means over the K steps, ``"log_mean"`` and ``"naive_mean"``. The logarithm needs a positive loss.
        meta_data: What the meta-objective is evaluated on: the Trainer's (first) validation loader (``"val"``),
            training batches (``"train"``), or a loader of batches that your ``training_step`` can take. Data that you
            report results on should be none of these.
        estimator: ``"displacement"``: the held-out gradient along the way of the last K steps; no curvature, a long
            horizon. ``"live"``: exact, along K training steps. The others look ahead on a copy
            (:func:`lightning_l2l.meta_gradient`). ``"auto"``: displacement for learning rates alone under ``"log"`` or
            ``"naive"``; else live for one or two numbers, where the graph can be differentiated twice; else ahead.
        meta_learning_rate: The most that the logarithm of a rate falls in one meta-update, roughly (a rise is a
            quarter as long; see :class:`~lightning_l2l.exact.meta_optimizer.MetaOptimizer`); 0 only observes.
        initial_search: Start from a rate found by a range test, whatever the optimizer was given.
        search_budget: The most that the range test may cost, as a fraction of the planned training steps (at least 16
            and at most 160 steps). About eight candidates share it; one that gets fewer than five steps sees little, so
            raise this for a training of fewer than 800 steps.
        divergence_guard: When the training itself is lost (losses that are not finite, or far above the first), take
            weights, buffers and optimizer state back to the last good snapshot and cut the rate. Keeps one copy of
            these. Not with ``meta_learning_rate=0``.
        seed: Seed of everything that the callback draws; it never touches the global random numbers.
        carry: With the live estimator alone, the part of a window's tangent that the next one starts with: a longer
            memory for one more Hessian-vector product per window.
        interval_growth: Later, the part of the steps so far that lies between two meta-updates; 0 for equal intervals.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[LearnToLearn()])
        trainer.fit(model, datamodule)

    Source: Wang, Yuan, Wu, Ge, "Guarantees for Tuning the Step Size using a Learning-to-Learn Approach" (ICML 2021).
    """

    def __init__(
        self,
        learned: LearnedOptimizer | None = None,
        unroll_steps: int | None = None,
        every_n_steps: int = 20,
        objective: Objective = "log",
        meta_data: Literal["val", "train"] | Iterable[Any] = "val",
        estimator: HostEstimator = "auto",
        meta_learning_rate: float = 0.4,
        initial_search: bool = True,
        search_budget: float = 0.05,
        divergence_guard: bool = True,
        seed: int = 0,
        carry: float = 0.0,
        interval_growth: float = 0.03,
    ) -> None:
        """See the class."""
        super().__init__()
        check_learned(learned)
        self.settings = Settings(
            unroll_steps,
            every_n_steps,
            objective,
            meta_data,
            estimator,
            meta_learning_rate,
            initial_search,
            search_budget,
            divergence_guard,
            seed,
            carry,
            interval_growth,
        )
        self._given = learned
        self._template = learned if learned is not None else LearnedStepSize(per="group")
        self._fitting = False
        self._logged: tuple[int, list[float]] | None = None
        self._reset()

    def _reset(self) -> None:
        self.learned = copy.deepcopy(self._template)
        self.history: list[dict[str, Any]] = []
        self.learning_rates: list[float] = []
        self.search_result: SearchResult | None = None
        self._session: Session | None = None
        self._state: dict[str, Any] = {}  # of the fit that has ended
        self._loaded: dict[str, Any] = {}  # what the next fit goes on from
        self._warned: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can be refused before there is a model on a device."""
        self._fitting = stage == "fit"
        if self._fitting:
            if trainer.global_step == 0:
                self._reset()
            # Else the same Trainer goes on with the same training (after Ctrl-C, or for more epochs), and so do we.
            self._loaded = self._state
            refusals.refuse_several(trainer, LearnToLearn)
            refusals.refuse_strategy(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can be refused once there is an optimizer."""
        refusals.refuse_module(trainer, pl_module)
        refusals.refuse_optimizer(live_optimizer(trainer), pl_module)
        refusals.refuse_second_learned(live_optimizer(trainer), self._given, self.settings)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer, restored or fresh, and find a rate to start from."""
        self.learned = copy.deepcopy(self._template)
        optimizer = live_optimizer(trainer)
        if isinstance(optimizer, LearnedTorchOptimizer):
            self.learned = optimizer.mirror(pl_module.named_parameters())
        self._logged = None
        self._session = Session(trainer, pl_module, self.learned, self.settings, self._loaded)
        self.history = copy.deepcopy(self._loaded.get("history", []))
        if not self._session.opens_late:
            self._search()
        self.learning_rates = self._session.applied.learning_rates

    def _search(self) -> None:
        result = self._running.search()
        if result is not None:
            self.search_result = result if isinstance(result, SearchResult) else None
            message, is_warning = report.search_message(result)
            (rank_zero_warn if is_warning else rank_zero_info)(message)

    @property
    def _running(self) -> Session:
        assert self._session is not None
        return self._session

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, if the next meta-update will need it."""
        session = self._running
        if session.has_unfinished_step:  # resumed from a checkpoint that was saved before our on_train_batch_end
            self._finish_step()
        session.applied.refresh()
        session.see_batch(batch, batch_idx)
        if not session.opens_late:
            session.source.rehearse()

    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Do what was put off until the module's own hooks have run."""
        if self._running.opens_late:
            self._search()
            self._running.source.rehearse()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Let an estimator that follows the training see the loss before its graph is used up."""
        self._running.source.see_loss(loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Have the learned values in the groups, whoever wrote there since."""
        applied = self._running.applied
        applied.refresh()
        self.learning_rates = applied.learning_rates
        self._running.source.before_step()
        applied.split()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate that was applied; when it is time, ask for the meta-gradient and apply it."""
        session = self._running
        session.see_outputs(outputs)
        if session.has_unfinished_step:
            # Lightning keeps a logged value until the epoch ends; logging it again costs as much as a small layer.
            if (trainer.current_epoch, self.learning_rates) != self._logged:
                self._logged = (trainer.current_epoch, self.learning_rates)
                rates = report.by_group("learning_rate", self.learning_rates, live_optimizer(trainer).param_groups)
                report.log(trainer, pl_module, rates, prog_bar=True)
            report.log(trainer, pl_module, self._finish_step())

    def _finish_step(self) -> dict[str, float]:
        session = self._running
        update = session.finish_step()
        if update is None:
            return {}
        self.learning_rates = session.applied.learning_rates
        record = report.as_record(update, self.learning_rates, session.applied.values(), self.history, self.settings)
        self.history.append(record)
        report.warn_once(report.remarks(update, self.history), self._warned, update.step)
        return report.logged_values(update, record)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the figure; say so if the training was too short to learn anything."""
        log_figure(trainer, self.history)
        if not self.history and trainer.global_step > 0:
            rank_zero_warn(report.no_update_message(trainer.global_step, self.settings.every_n_steps))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove what the session installed."""
        self._close()
        if stage != "fit":
            self._loaded = {}  # `validate(ckpt_path=...)` loads our state, but trains nothing

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove what the session installed: after an exception Lightning does not call ``teardown``."""
        self._close(alone=True)

    def _close(self, *, alone: bool = False) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
            self._state = self._state_of(session, from_all=not alone)

    def plot(self, path: str | None = None) -> Figure:
        """The learning rates and the meta-objective over the training, as a matplotlib figure.

        Args:
            path: Where to write it as well; the suffix decides the format.

        Raises:
            ImportError: matplotlib is not installed (``pip install "lightning-l2l[plots]"``).
        """
        from lightning_l2l.plotting import plot_history

        figure: Figure = plot_history(self.history, path=path)
        return figure

    def export_schedule(self) -> LearnedSchedule:
        """The rates that were applied, as a table and a ``torch.optim.lr_scheduler`` that replay them without learning.

        Raises:
            ValueError: No step has been made yet, or the optimizer is itself a learned one.
        """
        return exported(self.state_dict() if self._session is None else self._session.schedule())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and containers: torch loads checkpoints with ``weights_only``."""
        return self._state or self._loaded if self._session is None else self._state_of(self._session)

    def _state_of(self, session: Session, *, from_all: bool = True) -> dict[str, Any]:
        return {"version": VERSION, **session.state_dict(from_all=from_all), "history": copy.deepcopy(self.history)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The checkpoint decides, also if there is nothing of ours in it."""
        self._state, self._loaded = {}, {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state for ``on_train_start``; a ValueError if it is of another version, or damaged."""
        if self._fitting:  # a validation does not need it, and must not fail for it
            check_saved(state_dict)
        self._loaded = state_dict
