"""What the run's own training would do from here: asked on copies, so that the run does not notice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchopt.base import GradientTransformation

from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.initial_search import SearchResult, search_budget, search_learning_rate, search_steps
from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.objectives import is_logarithmic
from lightning_l2l.exact.plain_training import loss_after_training
from lightning_l2l.exact.processes import Processes, together
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.data import IndexedBatches, StreamedBatches, first_loader, is_indexable, is_sharded
from lightning_l2l.host.guarded import (
    HELD_OUT_DATA,
    StepRefusedError,
    is_only_held_out,
    refused,
    unless_diverged,
    with_note,
)
from lightning_l2l.host.in_place import LearnedInPlace
from lightning_l2l.host.isolation import invisible
from lightning_l2l.host.progress import progress
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.trainer import (
    live_optimizer,
    moved_batch,
    overfitted_batches,
    peak_rates,
    planned_steps,
    validation_loaders,
)
from lightning_l2l.host.training_step import TrainingStep, Window, joined, owned_tensors
from lightning_l2l.learned import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Held-out batches that a candidate of the initial search is judged by (docs, "initial search").
_SEARCH_BATCHES = 4
# Between the seeds of two processes, so that their dropout masks differ; a prime, larger than most runs are long.
_SEED_STRIDE = 15_485_863


class LookAhead:
    """Unrolls the run's training from its present state.

    Args:
        trainer: The Trainer, in ``on_train_start`` or later.
        module: The user's LightningModule.
        learned: The learned optimizer, attached to the live one.
        applied: What it makes of the live optimizer's values.
        settings: What the user asked for.
        processes: The other processes of the run.

    Attributes:
        seed: Seed of what a look-ahead draws; another one on each process.

    Raises:
        MisconfigurationException: There is no held-out data.
        EmptyLoaderError: There is a loader of held-out data, without batches.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        learned: LearnedOptimizer,
        applied: AppliedValues | LearnedInPlace,
        settings: Settings,
        processes: Processes | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._learned = learned
        self._applied = applied
        self._settings = settings
        self._processes = processes
        rank, self._stride = (0, 1) if processes is None else (processes.rank, processes.count)
        self.seed = settings.seed + rank * _SEED_STRIDE
        self._optimizer = live_optimizer(trainer)
        self._loss = TrainingStep(trainer, module)
        self._held_out_loader = self._find_held_out_loader()
        with together(processes):
            loader = self._held_out_loader
            self._held_out = None if loader is None else self._source(loader, held_out=True)

    def held_out(self, number: int) -> Window:
        """The held-out batch with this number, as the user's step takes it; another one on each process."""
        with together(self._processes):
            if self._settings.meta_data == "val":
                # reload_dataloaders_every_n_epochs replaces the loaders while the run goes on.
                present = first_loader(self._trainer.val_dataloaders)
                if present is not None and present is not self._held_out_loader:
                    self._held_out_loader, self._held_out = present, self._source(present, held_out=True)
            elif not is_sharded(self._held_out_loader):
                number = number * self._stride + self._trainer.global_rank
            assert self._held_out is not None
            return self._moved(self._held_out.batch(number), held_out=True)

    def judges(self, first: int) -> list[Window]:
        """A few batches to compare two states by, from this number on, held out if there are such; none of a stream."""
        if self._held_out is not None:
            # A stream is not read ahead: the meta-updates to come shall see the batches that they would have seen.
            count = _SEARCH_BATCHES if isinstance(self._held_out, IndexedBatches) else 1
            return [self.held_out(number) for number in range(first, first + count)]
        loader = first_loader(self._trainer.train_dataloader)
        if not is_indexable(loader):
            return []
        source = self._source(loader, held_out=False)
        numbers = range(first, first + _SEARCH_BATCHES)
        return [self._moved(source.batch(number), held_out=False) for number in numbers]

    def meta_gradient(self, windows: Sequence[Window], judge: Window) -> MetaGradient:
        """The meta-gradient of an unroll over these windows from the run's present state.

        Args:
            windows: The training batches, one window for each step.
            judge: What the meta-objective is evaluated on.

        Returns:
            The meta-gradient; one that is not usable where the step itself raised because the look-ahead diverged.
        """
        parameters, buffers = owned_tensors(self._module, self._optimizer)
        learned, state = self._applied.unrolled()
        step = self._trainer.global_step
        estimator = self._settings.estimator
        assert estimator != "displacement"

        def unroll() -> MetaGradient:
            with invisible(self._trainer, self._module, self.seed + step):
                return meta_gradient(
                    self._loss,
                    parameters,
                    learned,
                    windows,
                    judge,
                    objective=self._settings.objective,
                    # Live steps are rehearsed, and stood in for, by the one that gives the same numbers.
                    estimator="forward" if estimator == "live" else estimator,
                    state=state,
                    buffers=buffers,
                    gradient_transformation=self._clipping(),
                    particles=Particles(seed=self._settings.seed + step),  # of all processes together
                    processes=self._processes,
                )

        try:
            result = unless_diverged(unroll, self._processes)
        except StepRefusedError as error:
            result = refused(learned, self._settings.estimator, error)
        if is_only_held_out(result) and not self.is_finite(judge):
            result = with_note(result, HELD_OUT_DATA)
        return self.agreed(result)

    def is_finite(self, batch: Window) -> bool:
        """Whether the loss on this batch, in the run's present state, is finite on every process."""
        parameters, buffers = owned_tensors(self._module, self._optimizer)
        # The step may write buffers: in place, so that it is given copies.
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        tensors.update({name: buffer.clone() for name, buffer in buffers.items()})

        def evaluate() -> float:
            with invisible(self._trainer, self._module, self.seed + self._trainer.global_step), torch.no_grad():
                return self._loss(tensors, batch).item()

        with together(self._processes):
            try:
                finite = math.isfinite(unless_diverged(evaluate))
            except StepRefusedError:
                finite = False
        return finite if self._processes is None else not self._processes.any(not finite)

    def agreed(self, result: MetaGradient) -> MetaGradient:
        """The result of the first process; they are equal up to the last bits where the hardware differs."""
        if self._processes is None:
            return result
        result = replace(result, gradients={name: gradient.cpu() for name, gradient in result.gradients.items()})
        return self._trainer.strategy.broadcast(result)

    def inner_step(self, *, second_order: bool = True) -> InnerStep:
        """A step of the run's training as the core takes it; for first derivatives alone, with the user's kernels."""
        return InnerStep(self._loss, self._learned, self._clipping(), second_order, processes=self._processes)

    def factor_to(self, learning_rate: float) -> float:
        """What the learned rate of the first group has to be multiplied by so that it peaks at this rate."""
        applied = self._applied_rates
        with applied.attached_to(peak_rates(self._trainer, applied.scheduled_rates)):
            return learning_rate / applied.learned_rate()

    @property
    def _applied_rates(self) -> AppliedValues:
        assert isinstance(self._applied, AppliedValues), "only a learned rate is searched"
        return self._applied

    def search(self) -> SearchResult | str:
        """The initial search: a range test of constant rates from the run's present state.

        The rate of the first group is searched, before its schedule (a warm-up would test rates near zero); the others
        follow in proportion.

        Returns:
            The result, or a sentence on why there was none.

        Raises:
            NegativeLossError: The objective takes the logarithm of a loss that is negative before any training.
        """
        loader = self._trainer.train_dataloader
        if isinstance(loader, (Mapping, list, tuple)) or type(loader).__name__ == "CombinedLoader":
            return "the training data comes from several loaders, and no batch of one of them is a training batch"
        if not is_indexable(loader):
            return "the training loader can only be iterated, and reading ahead would change the run's data"
        applied = self._applied_rates
        peaks = peak_rates(self._trainer, applied.scheduled_rates)
        if peaks[0] <= 0:
            return "the optimizer's learning rate is zero, so there is nothing to multiply"
        if self._learned.scaled_rate(1.0) is None:
            return f"{type(self._learned).__name__} has no learning rate to search"
        budget = search_budget(planned_steps(self._trainer), self._settings.search_budget)
        steps = search_steps(budget)
        with together(self._processes):
            source = self._source(loader, held_out=False)
            numbers = range(steps + (_SEARCH_BATCHES if self._held_out is None else 0))
            windows = [self._moved(source.batch(number), held_out=False) for number in numbers]
        windows, judges = windows[:steps], windows[steps:]
        if self._held_out is not None:
            judges = [self.held_out(number) for number in range(_SEARCH_BATCHES)]
        # A spoilt batch would make every candidate look as if it diverged.
        judges = [judge for judge in judges if self.is_finite(judge)] or judges
        parameters, buffers = owned_tensors(self._module, self._optimizer)

        def loss_after(windows: Sequence[Window], candidate: float) -> tuple[float, int]:
            step = self.inner_step(second_order=False)
            start = step.start(parameters, applied.unrolled()[1], buffers)
            meta = self._learned.scaled_rate(candidate / present)
            with invisible(self._trainer, self._module, self.seed):
                return loss_after_training(step, start, windows, judges, meta)

        with applied.attached_to(peaks), progress(self._trainer, "LearnToLearn, initial search", budget) as done:

            def candidate_loss(candidate: float) -> tuple[float, int]:
                try:
                    loss, taken = unless_diverged(lambda: loss_after(windows, candidate), self._processes)
                except StepRefusedError:
                    loss, taken = math.inf, steps
                done(taken)
                return loss, taken

            present = applied.learned_rate()
            start_loss, _ = loss_after([], present)
            if is_logarithmic(self._settings.objective) and start_loss < 0:
                raise NegativeLossError(start_loss)  # as the rehearsal would, but before the search's time is spent
            return search_learning_rate(candidate_loss, steps=steps, budget=budget, start_loss=start_loss)

    def _find_held_out_loader(self) -> Any:
        meta_data = self._settings.meta_data
        if meta_data == "train":
            return None
        if meta_data != "val":
            return meta_data
        loader = first_loader(validation_loaders(self._trainer))
        if loader is None:
            raise MisconfigurationException(
                "LearnToLearn(meta_data='val') needs validation data to judge the learning rate by, but this Trainer "
                "has none (no val_dataloader, no validation_step, or limit_val_batches=0). Pass a loader of held-out "
                "batches, LearnToLearn(meta_data=my_loader), or judge on training batches with "
                "LearnToLearn(meta_data='train')."
            )
        return loader

    def _source(self, loader: Any, *, held_out: bool) -> IndexedBatches | StreamedBatches:
        if not is_indexable(loader):
            return StreamedBatches(loader, self._settings.seed)
        own = held_out and self._settings.meta_data != "val"
        limit = None if own else overfitted_batches(self._trainer, held_out=held_out)
        return IndexedBatches(loader, self._settings.seed, limit)

    def _moved(self, batch: Any, *, held_out: bool) -> Window:
        with invisible(self._trainer, self._module, self.seed):
            return joined([Window(((moved_batch(self._trainer, self._module, batch, held_out=held_out), 0),), 1)])

    def _clipping(self) -> GradientTransformation | None:
        value = self._trainer.gradient_clip_val
        if value is None or value <= 0:
            return None
        by_value = self._trainer.gradient_clip_algorithm == "value"
        return clip_gradient_value(float(value)) if by_value else clip_gradient_norm(float(value))
