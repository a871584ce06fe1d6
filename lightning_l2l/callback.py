"""LearnToLearn: learn the learning rate of a LightningModule while it trains."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_l2l.arguments import Estimator, MetaData, check_arguments, check_learned, check_types
from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.host import lightning_api, reporting
from lightning_l2l.host.averaged_weights import AveragedWeights
from lightning_l2l.host.held_out import HeldOut, ValidationBatches
from lightning_l2l.host.isolation import hidden_attribute
from lightning_l2l.host.refusals import prepare
from lightning_l2l.host.unroll import UnrollTuner, unrolled_values
from lightning_l2l.learned import LearnedHyperparameters, LearnedOptimizer
from lightning_l2l.rates import AppliedRecord, plain
from lightning_l2l.schedule import LearnedSchedule
from lightning_l2l.tuner import Displacement, HeldOutGradient, SearchResult, Tuner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LearnToLearn(pl.Callback):
    """Learns the learning rate of any LightningModule during its own training.

    Every so often it computes the cosine between the gradient and the displacement of the weights from their running
    average. While the training makes progress that cosine is negative, and the rate may rise; where recent steps
    overshot it is positive, and the rate falls. A run that diverges is rolled back. Your rate and your schedule stay
    unless the evidence is larger than its noise; what is learned is a factor on top of them.

    **When it helps.** You do not know a good learning rate, or one constant rate is not good all the way. **What it
    costs**: a few inner products, one held-out gradient for each update (some thirty in 1000 steps), a copy of the
    trained parameters for the average, and another one for the guard. **Where it works**: any optimizer whose steps are
    in proportion to its rate, automatic and manual optimization, one device, DDP and FSDP2.

    Nothing else of the run changes: parameters, buffers, random numbers, metrics, logs, attributes and the order of the
    data are those of the run without the callback (bit for bit, with ``meta_learning_rate=0, initial_search=False``).

    Args:
        estimator: How the meta-gradient is estimated: :class:`~lightning_l2l.Displacement` (default), or exactly by
            :class:`~lightning_l2l.Unroll` or :class:`~lightning_l2l.EvolutionStrategies`, which also serve other
            hyperparameters than learning rates.
        learned: What is learned, with an exact estimator: a template, which is copied for each fit. ``None``: a factor
            on the rate of each parameter group; or the meta-parameters of an optimizer that was made by
            :meth:`LearnedOptimizer.as_torch_optimizer <lightning_l2l.LearnedOptimizer.as_torch_optimizer>`.
        every_n_steps: Optimizer steps from one update to the next. ``None``: in proportion to the steps so far, so that
            100 and 100,000 steps are the same problem.
        meta_data: What gradients the rate is learned from, besides those of the training. ``"auto"``: from the second
            pass over the data on (in the first one, every training batch is new), batches of the (first) validation
            loader, where there is one and ``training_step`` can take them. ``"val"``: from the start, and an error
            where it cannot. ``"train"``: none. Or a loader of batches. Report results on none of these data. (An exact
            estimator asks held-out data from the start; without, a training batch that is older than its steps.)
        held_out_loss: ``held_out_loss(module, batch)`` returns the loss that counts, where ``training_step`` is not the
            measure (self-supervised training, detection, sequence to sequence).
        meta_learning_rate: How fast the logarithm of a rate moves, as a multiple of the default; 0 only observes.
        initial_search: Let a rate that hardly moves the weights rise fast in the first fifth of the training.
        divergence_guard: When the training itself is lost, take weights and buffers back to the last good snapshot and
            cut the rate; where it diverged from the start, look for one below it.
        average_weights: Return the running average of the weights, whose mean age is a tenth of the steps so far, on
            the convention of Lightning's ``WeightAveraging``: it is what validation sees, what checkpoints have as
            ``state_dict`` (beside the training's own weights, ``current_model_state``, from which a run is resumed),
            and what the module holds after the fit. The training is the same as without. The average is the one that
            the callback keeps anyway. Statistics of batch normalisation are taken anew for it, by ``training_step`` on
            the last eight training batches.
        seed: Seed of everything that the callback draws; it never touches the global random numbers.

    Attributes:
        learning_rates: The applied rates, one for each parameter group over all optimizers.
        history: One record for each update: ``"step"``, ``"learning_rates"``, ``"cosine"``, ..., ``"diagnostics"``;
            with an exact estimator also ``"meta_objective"``, ``"meta_gradient"`` (numbers by meta-parameter; the norm
            of one with more than 100) and ``"hyperparameters"`` (the learned values of each group).
        search_result: What the start made of the given rate, and why; ``None`` while that is open.
        learned: What this fit learns, or has learned, with an exact estimator; else ``None``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range, or arguments that contradict each other.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[LearnToLearn()])
        trainer.fit(model, datamodule)

    Momentum too, by the exact gradient through the last twenty steps::

        learner = LearnToLearn(Unroll(steps=20), learned=LearnedHyperparameters(("learning_rate", "momentum")))

    Source: Wang, Yuan, Wu, Ge, "Guarantees for Tuning the Step Size using a Learning-to-Learn Approach" (ICML 2021).
    """

    def __init__(
        self,
        estimator: Displacement | Unroll | EvolutionStrategies | None = None,
        *,
        learned: LearnedHyperparameters | None = None,
        every_n_steps: int | None = None,
        meta_data: MetaData | Iterable[Any] = "auto",
        held_out_loss: Callable[[pl.LightningModule, Any], torch.Tensor] | None = None,
        meta_learning_rate: float = 1.0,
        initial_search: bool = True,
        divergence_guard: bool = True,
        average_weights: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        estimator = Displacement() if estimator is None else estimator
        check_arguments(estimator, every_n_steps, meta_data, held_out_loss, meta_learning_rate)
        check_types(
            initial_search=initial_search,
            divergence_guard=divergence_guard,
            average_weights=average_weights,
            seed=seed,
        )
        check_learned(estimator, learned)
        self.estimator: Estimator = estimator
        self.every_n_steps = every_n_steps
        self.meta_data = meta_data
        self.held_out_loss = held_out_loss
        self.meta_learning_rate = meta_learning_rate
        self.initial_search = initial_search
        self.divergence_guard = divergence_guard
        self.average_weights = average_weights
        self.seed = seed
        self.learned: LearnedOptimizer | None = None
        self._template = learned
        self._tuners: list[Tuner] = []
        self._averaged = AveragedWeights(average_weights)
        self._held_out: HeldOut | None = None
        self._compare: HeldOutGradient | None = None
        self._batch: Any = None
        self._waits_for_data = False
        self._cleanup = ExitStack()
        self._stage = ""
        self._reset()

    def _reset(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.learning_rates: list[float] = []
        self.search_result: SearchResult | None = None
        self._saved: dict[str, Any] = {}  # what the next fit goes on from
        self._is_loaded = False
        self._model: Callable[[], Any] = _nobody
        self._said: set[str] = set()
        self._logged: tuple[int, list[float]] | None = None
        self._epoch_steps = math.inf
        self._losses: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles (of ``ddp_spawn``) know of no model, and are of no run."""
        alone = {"_model": _nobody, "_tuners": [], "_held_out": None, "_compare": None, "_cleanup": ExitStack()}
        of_lightning = ("log", "log_dict")  # bound to the module
        kept = {name: value for name, value in vars(self).items() if name not in of_lightning}
        return {**kept, **alone, "_batch": None, "_losses": [], "_saved": self.state_dict()}

    # Hooks of the Trainer, in the order in which they are called.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, unless the same model goes on (after Ctrl-C, for more epochs, or from a checkpoint)."""
        self._stage = stage
        self._averaged.release()
        if stage != "fit":
            return
        goes_on = trainer.global_step > 0 and self._model() is pl_module
        if not goes_on and not self._is_loaded:
            self._reset()
        lightning_api.refuse_several(trainer, LearnToLearn)
        if self.average_weights:
            lightning_api.refuse_averages(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what would be wrong, once there are optimizers."""
        lightning_api.refuse(trainer)
        if not isinstance(self.estimator, Displacement):
            self.learned = prepare(trainer, pl_module, self.estimator, self._template)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizers, restored or fresh."""
        saved, self._is_loaded = self._saved, False
        self._model = weakref.ref(pl_module)
        self.history = copy.deepcopy(saved.get("history", []))
        # By default held-out data are asked from the second pass on, and looked for then.
        is_default = self.meta_data == "auto" and self.held_out_loss is None
        self._waits_for_data = is_default and isinstance(self.estimator, Displacement)
        self._held_out = None if self._waits_for_data else self._find_held_out(trainer, pl_module)
        self._compare = None
        if not lightning_api.is_manual(pl_module) and not lightning_api.takes_iterator(pl_module):
            same = HeldOut(trainer, pl_module, lambda _: self._batch, source="the last training batch", seed=self.seed)
            self._compare = same.gradient
        for number, optimizer in enumerate(lightning_api.real_optimizers(trainer)):
            tuner = self._attach(trainer, pl_module, optimizer)
            self._tuners.append(tuner)
            if number < len(saved.get("tuners", [])):
                self._averaged.go_on(tuner, pl_module, saved["tuners"][number])
        self._cleanup.enter_context(self._averaged.returned(trainer, pl_module, self._tuners, self.seed))
        steps = _StepsSchedulers(pl_module.lr_scheduler_step, self._tuners, trainer)
        self._cleanup.enter_context(hidden_attribute(pl_module, "lr_scheduler_step", steps))
        hands_out = _HandsOutSchedulers(pl_module.lr_schedulers, steps)
        self._cleanup.enter_context(hidden_attribute(pl_module, "lr_schedulers", hands_out))
        self._epoch_steps = lightning_api.steps_of_an_epoch(trainer)
        self._show_rates()

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tuner:
        manual = lightning_api.is_manual(module)
        is_player = manual and len(lightning_api.real_optimizers(trainer)) > 1
        if is_player:
            self._say(
                "players",
                "several optimizers are stepped by hand, so each is taken for a player of a game: its rate is raised "
                "only where the weights do not move at all, or nearly.",
            )
        # How often training_step steps by hand is not known, and what its losses say of each optimizer neither.
        planned_steps = math.inf if manual else lightning_api.planned_steps(trainer)
        if isinstance(self.estimator, Displacement):
            return self.estimator.attach(
                optimizer,
                planned_steps=planned_steps,
                every_n_steps=self.every_n_steps,
                meta_learning_rate=self.meta_learning_rate,
                initial_search=self.initial_search,
                divergence_guard=self.divergence_guard and not manual,
                has_schedule=lightning_api.has_schedule(trainer),
                is_player=is_player,
                modules=[module],
                seed=self.seed,
            )
        assert self.learned is not None
        return UnrollTuner(
            optimizer,
            trainer=trainer,
            module=module,
            estimator=self.estimator,
            learned=self.learned,
            held_out=self._held_out,
            held_out_loss=self.held_out_loss,
            planned_steps=planned_steps,
            every_n_steps=self.every_n_steps,
            meta_learning_rate=self.meta_learning_rate,
            initial_search=self.initial_search,
            divergence_guard=self.divergence_guard,
            has_schedule=lightning_api.has_schedule(trainer),
            seed=self.seed,
        )

    def _find_held_out(self, trainer: pl.Trainer, module: pl.LightningModule) -> HeldOut | None:
        if self.meta_data == "train":
            return None
        own = isinstance(self.meta_data, str)
        if lightning_api.is_manual(module) and self.held_out_loss is None:
            if self.meta_data != "auto":
                raise MisconfigurationException(
                    f"LearnToLearn(meta_data={self.meta_data!r}) cannot call a training_step that steps its optimizers "
                    "by hand: it would train. Pass held_out_loss=fn, where fn(module, batch) returns the loss that "
                    "counts, or leave meta_data out: then the rates are learned from the training gradients."
                )
            return None
        loader, count = self.meta_data, 1  # a list is one of batches
        if own:
            loader, count = lightning_api.first_loader(lightning_api.validation_loaders(trainer))
        if loader is None:
            if self.meta_data == "val" or self.held_out_loss is not None:
                raise MisconfigurationException(
                    "LearnToLearn was asked for held-out gradients, but this Trainer has no validation data (no "
                    "val_dataloader, no validation_step, or limit_val_batches=0). Pass a loader of held-out batches, "
                    "LearnToLearn(meta_data=loader), or leave meta_data out to learn from the training gradients."
                )
            self._say("no data", "there is no validation data, so rates are learned from the training gradients.")
            return None
        if count > 1:
            self._say("several", f"of {count} validation loaders the first is used; pass meta_data=loader for another.")
        return HeldOut(
            trainer,
            module,
            ValidationBatches(trainer, module, loader, is_own=own, seed=self.seed),
            source="a validation batch" if own else "a batch of the loader given as meta_data",
            loss=self.held_out_loss,
            seed=self.seed,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan anew where an epoch is of another length: reloaded data, another accumulation."""
        steps = lightning_api.steps_of_an_epoch(trainer)
        if steps != self._epoch_steps and not lightning_api.is_manual(pl_module):
            self._epoch_steps = steps
            for tuner in self._tuners:
                tuner.rule.plan(lightning_api.planned_steps(trainer, tuner.steps, trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the applied rates in the groups, whoever wrote there since; follow optimizers that were made anew."""
        optimizers = lightning_api.real_optimizers(trainer)
        for number, (tuner, optimizer) in enumerate(zip(self._tuners, optimizers, strict=False)):
            if tuner.optimizer is not optimizer:
                state = tuner.state_dict()
                tuner.close()
                self._tuners[number] = self._attach(trainer, pl_module, optimizer)
                self._tuners[number].rule.plan(tuner.rule.planned_steps)
                self._tuners[number].load_state_dict(state)
        self._show_rates()
        self._averaged.see_batch(batch, batch_idx)
        for tuner in self._tuners:
            if isinstance(tuner, UnrollTuner):
                tuner.see_batch(batch, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the applied rates; when it is time, update them."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())  # divided by the number of accumulated batches, by Lightning
        for tuner in self._tuners:
            if isinstance(tuner, UnrollTuner) and loss is None:
                tuner.skip_batch()
        if all(tuner.steps == tuner.seen for tuner in self._tuners):
            return  # gradients are accumulated, or mixed precision left the step out
        total, records = self._total_loss(trainer), {}
        for number, tuner in enumerate(self._tuners):
            before = tuner.rates.applied
            record = self._step(trainer, pl_module, tuner, total, batch)
            if record is not None:
                self._add(number, record)
                records[number] = record
            if tuner.rates.applied != before:
                lightning_api.show_last_rates(trainer)
        self._show_rates()
        self._log(trainer, pl_module, records)
        found = self._tuners[0].search_result
        if found is not None and found != self.search_result:
            self.search_result = found
            self._say(found.reason, f"{found.reason} (learning rate {found.learning_rate:.3g}).")

    def _show_rates(self) -> None:
        for tuner in self._tuners:
            tuner.rates.refresh()
        self.learning_rates = [rate for tuner in self._tuners for rate in tuner.rates.applied]

    def _total_loss(self, trainer: pl.Trainer) -> torch.Tensor | None:
        losses, self._losses = self._losses, []
        if not losses:
            return None
        # An accumulation that ended with the epoch has fewer batches.
        return sum(losses[1:], losses[0]) * (trainer.accumulate_grad_batches / len(losses))

    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, tuner: Tuner, loss: torch.Tensor | None, batch: Any
    ) -> dict[str, Any] | None:
        self._batch = batch
        # In the first pass over the data every training gradient is a held-out gradient.
        passes = lightning_api.passes(trainer)
        if self._waits_for_data and passes > 0:
            self._waits_for_data = False
            self._held_out = self._find_held_out(trainer, module)
        held_out = None if self._held_out is None else self._held_out.gradient
        record = tuner.step(loss, held_out=held_out, compare=self._compare, passes=passes)
        error, tuner.held_out_error = tuner.held_out_error, None
        if record is not None and record["diagnostics"]["trouble"] == "rolled_back":
            for count in lightning_api.averages(trainer):
                count.zero_()  # an average with weights of the lost run is lost, too: begin it anew
        if error is not None:
            if self.meta_data != "auto" or self.held_out_loss is not None:
                raise error
            self._held_out = None
            self._say("held-out", f"{error} This run goes on with the training gradients.", warn=True)
        return record

    def _add(self, number: int, record: dict[str, Any]) -> None:
        several = len(self._tuners) > 1
        self.history.append({**record, "optimizer": number} if several else record)
        if record["diagnostics"]["trouble"]:
            note = f"after step {record['step']}: {record['diagnostics']['note']}"
            self._say(record["diagnostics"]["trouble"], note, warn=True)

    def _say(self, kind: str, words: str, *, warn: bool = False) -> None:
        if kind not in self._said:
            (rank_zero_warn if warn else rank_zero_info)(f"LearnToLearn: {words}")
        self._said.add(kind)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, records: dict[int, dict[str, Any]]) -> None:
        optimizers = [tuner.optimizer for tuner in self._tuners]
        # Lightning keeps a logged value until the epoch ends; logging it again costs as much as a small layer.
        if (trainer.current_epoch, self.learning_rates) != self._logged:
            self._logged = (trainer.current_epoch, self.learning_rates)
            names = reporting.names_of("learning_rate", optimizers)
            reporting.log(trainer, module, dict(zip(names, self.learning_rates, strict=True)), prog_bar=True)
        for number, record in records.items():
            values = {
                name: value
                for name, value in record.items()
                if isinstance(value, float) and name in ("training_loss", "held_out_loss", "meta_objective")
            }
            suffix = f"/optimizer_{number}" if len(optimizers) > 1 else ""
            found = {f"l2l/{name}{suffix}": value for name, value in values.items()}
            for kind in ("cosine", "held_out_cosine"):
                names = reporting.names_of(kind, optimizers)[sum(len(o.param_groups) for o in optimizers[:number]) :]
                found |= dict(zip(names, record.get(kind, []), strict=False))
            if "meta_gradient" in record:
                found |= unrolled_values(record, optimizers[number])
            reporting.log(trainer, module, found)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the averages, if they are what is returned."""
        self._averaged.show(True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on training the weights."""
        self._averaged.show(False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was learned, and log the figure."""
        self._averaged.show(True)
        reporting.log_figure(trainer, self.history)
        if self._tuners and any(tuner.steps for tuner in self._tuners):
            rank_zero_info(f"LearnToLearn: {reporting.summary(self._tuners, self.history)}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Schedulers' states hold plain numbers."""
        if "lr_schedulers" in checkpoint:
            checkpoint["lr_schedulers"] = plain(checkpoint["lr_schedulers"])
        self._averaged.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Of averages and weights of the training, the fit goes on from the latter."""
        if self._stage == "fit":
            self._averaged.load(trainer, pl_module, checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers and the module."""
        self._stage = ""
        if stage == "fit":
            self._close()
            self._averaged.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same: after an exception Lightning does not call ``teardown``."""
        self._stage = ""
        self._averaged.end_early(exception)
        self._close()

    def _close(self) -> None:
        if self._tuners:
            self._saved = self.state_dict()
            self._averaged.end(self._saved)
        self._cleanup.close()
        for tuner in self._tuners:
            tuner.close()
        self._tuners, self._held_out, self._compare, self._losses, self._batch = [], None, None, [], None

    # Results.

    def plot(self, path: str | None = None) -> Figure:
        """The learning rates, and the evidence that moved them, over the training, as a matplotlib figure.

        Args:
            path: Where to write it as well; the suffix decides the format.

        Raises:
            ImportError: matplotlib is not installed (``pip install "lightning-l2l[plots]"``).
        """
        from lightning_l2l.plotting import plot_history

        return plot_history(self.history, path=path)

    def export_schedule(self, optimizer: int = 0) -> LearnedSchedule:
        """The rates that were applied, as a table and a ``torch.optim.lr_scheduler`` that replay them without learning.

        Args:
            optimizer: The number of the optimizer, where the module has several.

        Raises:
            ValueError: No step has been made yet, or there is no optimizer of this number.
        """
        saved = self._saved.get("tuners", [])
        count = len(self._tuners or saved)
        if count and not 0 <= optimizer < count:
            raise ValueError(f"export_schedule(optimizer={optimizer}): there are {count}, counted from 0.")
        if self._tuners:
            return self._tuners[optimizer].applied.schedule()
        record = AppliedRecord()
        if saved:
            record.load_state_dict(saved[optimizer]["applied"])
        return record.schedule()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and containers: torch loads checkpoints with ``weights_only``."""
        if not self._tuners:
            return self._saved
        return {
            "tuners": [tuner.state_dict() for tuner in self._tuners],
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, in the fit that begins."""
        if self._stage in ("validate", "test", "predict"):
            return  # of a checkpoint's weights; what was learned in the last fit stays
        self._reset()
        self._saved, self._is_loaded = state_dict, True


class _StepsSchedulers:
    """The module's ``lr_scheduler_step``, with the base rates in the groups while it runs.

    It hides the method on the instance for the time of the fit. A copy or a pickle of the module made meanwhile has the
    original method in this place.
    """

    def __init__(self, original: Any, tuners: list[Tuner], trainer: pl.Trainer) -> None:
        self._original = original
        self._tuners = tuners
        self._trainer = trainer

    def __call__(self, *arguments: Any) -> None:
        self.around(self._original, *arguments)

    def around(self, step: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Call whatever steps a scheduler.

        Args:
            step: What.
            arguments: Its arguments.
            options: Its named arguments.
        """
        with ExitStack() as stack:
            for tuner in self._tuners:
                stack.enter_context(tuner.rates.hidden())
            step(*arguments, **options)
        lightning_api.show_last_rates(self._trainer)

    def __reduce__(self) -> Any:
        return _itself, (self._original,)


class _HandsOutSchedulers:
    """The module's ``lr_schedulers``, for those that are stepped by hand: each with the base rates in the groups."""

    def __init__(self, original: Any, steps: _StepsSchedulers) -> None:
        self._original = original
        self._steps = steps

    def __call__(self) -> Any:
        found = self._original()
        return [self._wrapped(each) for each in found] if isinstance(found, list) else self._wrapped(found)

    def _wrapped(self, scheduler: Any) -> Any:
        """An object of the scheduler's class, with its very attributes, that steps as the Trainer would."""
        if not hasattr(scheduler, "__dict__"):
            return scheduler
        kind, around = type(scheduler), self._steps.around

        def step(_: Any, *arguments: Any, **options: Any) -> None:
            around(scheduler.step, *arguments, **options)

        own = {"step": step, "__module__": kind.__module__, "__reduce__": lambda _: (_itself, (scheduler,))}
        wrapped: Any = object.__new__(type(kind.__name__, (kind,), own))
        wrapped.__dict__ = vars(scheduler)
        return wrapped

    def __reduce__(self) -> Any:
        return _itself, (self._original,)


def _nobody() -> None:
    return None


def _itself(value: Any) -> Any:
    return value
