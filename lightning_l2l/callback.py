"""LearnToLearn: learn the learning rate of a LightningModule while it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_l2l.core.initial_search import SearchResult
from lightning_l2l.core.meta_gradient import Estimator, check_estimator
from lightning_l2l.core.meta_optimizer import MetaOptimizer
from lightning_l2l.core.objectives import Objective, check_objective
from lightning_l2l.core.result import MetaGradient
from lightning_l2l.host.data import RememberedWindows
from lightning_l2l.host.refusals import refuse_module, refuse_optimizer, refuse_strategy
from lightning_l2l.host.session import Session
from lightning_l2l.host.trainer import planned_steps
from lightning_l2l.optimizers import LearnedOptimizer, LearnedStepSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATE_VERSION = 1


class LearnToLearn(pl.Callback):
    r"""Learns the learning rate (or other hyperparameters) of any LightningModule during its own training.

    Every ``every_n_steps`` optimizer steps, the last ``unroll_steps`` training batches are trained on once more, on a
    copy and differentiably, from the current weights and optimizer state. The loss on a held-out batch afterwards is
    the meta-objective; its exact derivative with respect to the logarithm of the learning rate moves the rate. Before
    training, a short range test finds a rate to start from. Module, optimizer, schedulers and data stay yours.

    **When it helps.** You do not know a good learning rate, or one constant rate is not good all the way. **What it
    costs**: about three training steps for each unrolled step, so with the defaults 0.75 of the training again,
    plus the range test, some 200 steps. **What it does not do**: it needs automatic optimization, a single device, and an optimizer with a
    mirror (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad); everything that is refused is refused before
    training, with the reason.

    Nothing else of the run changes: parameters, buffers, random numbers, metrics and the order of the data are those of the run
    without the callback (bit for bit, with ``meta_learning_rate=0, initial_search=False``). Attributes that your
    ``training_step`` sets on the module itself (a list that it appends to) cannot be protected.

    Args:
        learned: What is learned. ``None``: ``LearnedStepSize(per="group")``, one factor on the scheduled
            rate of each parameter group. It is a template: each fit learns on a copy, :attr:`learned`.
        unroll_steps: Training steps K that are looked ahead.
        every_n_steps: Optimizer steps from one meta-update to the next. A run that is known to be shorter than two of
            these makes its updates correspondingly more often, at least one.
        objective: The meta-objective: ``"log"`` (of the loss after K steps, divided by K), ``"naive"`` (that
            loss), or their means over the K steps, ``"log_mean"`` and ``"naive_mean"``. The logarithm needs a positive loss.
        meta_data: What the meta-objective is evaluated on: the Trainer's validation data (``"val"``), training
            batches (``"train"``), or a loader of batches that your ``training_step`` can take. Data that you report
            results on should be none of these.
        estimator: How the meta-gradient is computed; see :func:`lightning_l2l.meta_gradient`.
        meta_learning_rate: Step of the meta-optimizer, Adam, on the logarithm of the rate; 0 only observes.
        initial_search: Start from a rate found by a range test, whatever the optimizer was given.
        seed: Seed of everything that the callback draws; it never touches the global random numbers.

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
        unroll_steps: int = 5,
        every_n_steps: int = 20,
        objective: Objective = "log",
        meta_data: Literal["val", "train"] | Iterable[Any] = "val",
        estimator: Estimator = "auto",
        meta_learning_rate: float = 0.3,
        initial_search: bool = True,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        if learned is not None and not isinstance(learned, LearnedOptimizer):
            raise TypeError(
                f"LearnToLearn(learned=...) must be a LearnedOptimizer such as LearnedStepSize(), not "
                f"{type(learned).__name__}."
            )
        _check_count("unroll_steps", unroll_steps)
        _check_count("every_n_steps", every_n_steps)
        check_objective(objective)
        check_estimator(estimator)
        if isinstance(meta_data, str) and meta_data not in ("val", "train"):
            raise ValueError(f"LearnToLearn(meta_data={meta_data!r}) must be 'val', 'train' or a loader.")
        if not isinstance(meta_data, Iterable):
            raise TypeError(
                f"LearnToLearn(meta_data=...) must be 'val', 'train' or a loader, not {type(meta_data).__name__}."
            )
        if isinstance(meta_learning_rate, bool) or not isinstance(meta_learning_rate, (int, float)):
            raise TypeError(
                f"LearnToLearn(meta_learning_rate=...) must be a number, not {type(meta_learning_rate).__name__}."
            )
        if not (math.isfinite(meta_learning_rate) and meta_learning_rate >= 0):
            raise ValueError(
                f"LearnToLearn(meta_learning_rate={meta_learning_rate}) must be finite and not negative; 0 only observes."
            )
        if not isinstance(initial_search, bool):
            raise TypeError(
                f"LearnToLearn(initial_search=...) must be True or False, not {type(initial_search).__name__}."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"LearnToLearn(seed=...) must be a whole number, not {type(seed).__name__}.")
        self.unroll_steps = unroll_steps
        self.every_n_steps = every_n_steps
        self.objective: Objective = objective
        self.meta_data = meta_data
        self.estimator: Estimator = estimator
        self.meta_learning_rate = float(meta_learning_rate)
        self.initial_search = initial_search
        self.seed = seed
        self.history: list[dict[str, Any]] = []
        self.learning_rates: list[float] = []
        self.search_result: SearchResult | None = None
        self._template = learned if learned is not None else LearnedStepSize(per="group")
        self._reset()

    def _reset(self) -> None:
        self.learned = copy.deepcopy(self._template)
        self.history = []
        self.learning_rates = []
        self.search_result = None
        self._meta_optimizer: MetaOptimizer | None = None
        self._session: Session | None = None
        self._loaded: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None  # of the fit that has ended
        self._drawn = 0
        self._warned: set[str] = set()

    # -- the fit begins -------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can be refused before there is a model on a device."""
        if stage == "fit":
            self._reset()
            refuse_strategy(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can be refused once there is an optimizer."""
        refuse_module(trainer, pl_module)
        refuse_optimizer(trainer.optimizers[0], pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer, restored or fresh, and find a rate to start from."""
        loaded = self._loaded or {}
        self._session = Session(trainer, pl_module, self.learned, self.meta_data, self.seed, loaded.get("applied"))
        self._meta_optimizer = MetaOptimizer(self.learned.parameters(), self.meta_learning_rate)
        planned = planned_steps(trainer)
        self._every = self.every_n_steps if planned >= 2 * self.every_n_steps else max(1, int(planned) // 4)
        self._windows = RememberedWindows(self.unroll_steps + (self.meta_data == "train"))
        self._rehearsed = False
        self._step_seen = trainer.global_step
        if loaded:
            self._restore(loaded)
        elif self.initial_search and trainer.global_step == 0:
            self._search()
        self.learning_rates = self._session.applied.learning_rates

    def _search(self) -> None:
        assert self._session is not None
        result = self._session.search()
        if isinstance(result, str):
            rank_zero_warn(
                f"LearnToLearn: no initial search, since {result}. Training starts from the optimizer's rate."
            )
            return
        self.search_result = result
        if result.learning_rate is None:
            rank_zero_warn(
                "LearnToLearn: the initial search found no learning rate at which the loss stays finite; training "
                "starts from the optimizer's own."
            )
            return
        self._session.start_from(result.learning_rate)
        rank_zero_info(
            f"LearnToLearn: the initial search chose learning rate {self._session.applied.learning_rates[0]:.3g} "
            f"after {result.steps} training steps on a copy."
        )

    # -- every batch ----------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, if the next meta-update will need it."""
        assert self._session is not None
        self._session.applied.refresh()
        to_go = self._every - trainer.global_step % self._every
        if to_go <= self._windows.length or not self._rehearsed:
            self._windows.see(batch, batch_idx)
        if not self._rehearsed:
            self._rehearse()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Have the learned values in the groups, whoever wrote there since."""
        assert self._session is not None
        self._session.applied.refresh()
        self.learning_rates = self._session.applied.learning_rates
        self._session.applied.split()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate that was applied; when it is time, ask for the meta-gradient and apply it."""
        if trainer.global_step == self._step_seen:
            return
        self._step_seen = trainer.global_step
        self._windows.close(trainer.accumulate_grad_batches)
        self._log(trainer, pl_module, self._rates_by_name(trainer), prog_bar=True)
        if trainer.global_step % self._every == 0 and len(self._windows):
            result = self._meta_gradient()
            note = self._apply(result)
            self._record(trainer, result, note)
            self._log(trainer, pl_module, _summary(result))

    def _meta_gradient(self) -> MetaGradient:
        assert self._session is not None
        windows = self._windows.last()
        if self.meta_data == "train":
            *windows, judge = windows if len(windows) > 1 else windows * 2
        else:
            judge = self._session.held_out(self._drawn)
            self._drawn += 1
        return self._session.meta_gradient(windows, judge, self.objective, self.estimator)

    def _rehearse(self) -> None:
        """A look-ahead of one step on the first batch, before the first real one, so that what fails fails now."""
        assert self._session is not None
        window = self._windows.unfinished()
        judge = window if self.meta_data == "train" else self._session.held_out(self._drawn)
        self._session.meta_gradient([window], judge, self.objective, self.estimator)
        self._rehearsed = True

    def _apply(self, result: MetaGradient) -> str:
        """Move the meta-parameters; what was done where that is not the ordinary thing, in words."""
        assert self._session is not None and self._meta_optimizer is not None
        if self.meta_learning_rate == 0:
            return "observed only"
        note = ""
        if result.usable:
            self._meta_optimizer.apply(self.learned, result.gradients)
        else:
            # Never apply what is not a gradient. Diverging means that the rate is too large, and that much is known.
            halved = self.learned.scaled_rate(0.5) if not result.diagnostics.underflow else None
            note = f"{result.explain()} The rate was {'kept' if halved is None else 'halved'} instead."
            self._warn_once(note)
            self.learned.set_(halved or {})
        self.learned.project_()
        self._session.applied.refresh(force=True)
        return note

    def _record(self, trainer: pl.Trainer, result: MetaGradient, note: str) -> None:
        assert self._session is not None
        self.learning_rates = self._session.applied.learning_rates
        diagnostics = result.diagnostics
        self.history.append(
            {
                "step": trainer.global_step,
                "learning_rates": list(self.learning_rates),
                "meta_objective": result.value,
                "meta_gradient": {name: value.flatten().tolist() for name, value in result.gradients.items()},
                "diagnostics": {
                    "estimator": diagnostics.estimator,
                    "losses": diagnostics.losses.tolist(),
                    "growth_rate": diagnostics.growth_rate,
                    "overflow": diagnostics.overflow,
                    "underflow": diagnostics.underflow,
                    "truncated_step": diagnostics.truncated_step,
                    "note": note,
                },
            }
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"LearnToLearn: {message}")

    def _rates_by_name(self, trainer: pl.Trainer) -> dict[str, float]:
        groups = trainer.optimizers[0].param_groups
        if len(groups) == 1:
            return {"l2l/learning_rate": self.learning_rates[0]}
        names = [str(group.get("name", index)) for index, group in enumerate(groups)]
        return {f"l2l/learning_rate/{name}": rate for name, rate in zip(names, self.learning_rates, strict=True)}

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float], *, prog_bar: bool = False
    ) -> None:
        if not trainer.barebones:
            for name, value in values.items():
                # float32 is what Lightning logs in; the double keeps the rate that was applied to the last bit.
                pl_module.log(name, torch.tensor(value, dtype=torch.float64), prog_bar=prog_bar, on_step=True)

    # -- the fit ends ---------------------------------------------------------------------------------------

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove what the session installed."""
        self._close()
        if stage != "fit":
            self._loaded = None  # `validate(ckpt_path=...)` loads our state, but trains nothing

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove what the session installed: after an exception Lightning does not call ``teardown``."""
        self._close()

    def _close(self) -> None:
        if self._session is not None:
            self._state = self._current_state()
            self._session.close()
            self._session = None

    def plot(self, path: str | None = None) -> Figure:
        """The learning rates and the meta-objective over the training, as a matplotlib figure.

        Args:
            path: Where to write it as well; the suffix decides the format.

        Raises:
            ImportError: matplotlib is not installed (``pip install "lightning-l2l[plots]"``).
        """
        from lightning_l2l.plotting import plot_history

        return plot_history(self.history, path=path)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and containers: torch loads checkpoints with ``weights_only``."""
        if self._session is None:
            return self._state or self._loaded or {}
        return self._current_state()

    def _current_state(self) -> dict[str, Any]:
        assert self._session is not None and self._meta_optimizer is not None
        return {
            "version": _STATE_VERSION,
            "learned": {name: tensor.detach().clone() for name, tensor in self.learned.state_dict().items()},
            "meta_optimizer": copy.deepcopy(self._meta_optimizer.state_dict()),
            "applied": self._session.applied.state_dict(),
            "windows": self._windows.state_dict(),
            "drawn": self._drawn,
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state for ``on_train_start``: there is no optimizer yet.

        Raises:
            ValueError: The state is of another version, or none of ours.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(
                f"The checkpoint's LearnToLearn state has version {version!r}, but this lightning_l2l reads version "
                f"{_STATE_VERSION}. Load the checkpoint with the lightning_l2l that wrote it, or remove 'LearnToLearn' "
                "from its 'callbacks' to start with the optimizer's present rate."
            )
        self._loaded = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._session is not None and self._meta_optimizer is not None
        try:
            self.learned.load_state_dict(state["learned"])
        except RuntimeError as error:
            raise MisconfigurationException(
                "The checkpoint's LearnToLearn state was saved with another `learned`, or for an optimizer with other "
                f"parameter groups: {error}. Resume with the configuration that wrote it."
            ) from error
        self._meta_optimizer.load_state_dict(state["meta_optimizer"])
        for group in self._meta_optimizer.param_groups:
            group["lr"] = self.meta_learning_rate
        self._windows.load_state_dict(state["windows"])
        self._drawn = state["drawn"]
        self.history = copy.deepcopy(state["history"])
        self._session.applied.refresh(force=True)
        self._rehearsed = True


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"LearnToLearn({name}=...) must be a whole number, not {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"LearnToLearn({name}={value}) must be at least 1.")


def _summary(result: MetaGradient) -> dict[str, float]:
    """What is logged of a meta-update."""
    found = {"l2l/meta_objective": result.value}
    for name, gradient in result.gradients.items():
        label = "l2l/meta_gradient" if len(result.gradients) == 1 else f"l2l/meta_gradient/{name}"
        found[label] = gradient.double().mean().item()
    return found
