"""One fit as LearnToLearn sees it: what is set up when training starts, and undone when it ends.

Everything here is dropped at the end of the fit; what outlives it is in the callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchopt.base import GradientTransformation

from lightning_l2l.core.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.core.initial_search import SearchResult, search_learning_rate
from lightning_l2l.core.inner import read_state
from lightning_l2l.core.inner_step import InnerStep, Iterate
from lightning_l2l.core.meta_gradient import Estimator, meta_gradient
from lightning_l2l.core.objectives import Objective
from lightning_l2l.core.plain_training import loss_after_training
from lightning_l2l.core.result import MetaGradient
from lightning_l2l.host.applied import AppliedValues
from lightning_l2l.host.data import IndexedBatches, StreamedBatches, first_loader, is_indexable
from lightning_l2l.host.isolation import hidden_attribute, invisible
from lightning_l2l.host.trainer import live_optimizer, moved_batch, validation_loaders
from lightning_l2l.host.training_step import TrainingStep, Window, joined, owned_tensors
from lightning_l2l.optimizers import LearnedOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# A range test of this many steps per candidate, on as many held-out batches (docs, "initial search").
_SEARCH_STEPS = 20
_SEARCH_BATCHES = 4


class Session:
    """The running fit.

    Args:
        trainer: The Trainer, in ``on_train_start`` or later.
        module: The user's LightningModule.
        learned: The learned optimizer; it is attached to the live optimizer here.
        meta_data: ``"val"``, ``"train"`` or a loader.
        seed: Seed of everything that is drawn here.
        saved: What :meth:`AppliedValues.state_dict` returned in the run that is resumed.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        learned: LearnedOptimizer,
        meta_data: Any,
        seed: int,
        saved: dict[str, Any] | None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._learned = learned
        self._seed = seed
        self._loss = TrainingStep(trainer, module)
        self._cleanup = ExitStack()
        self._held_out = None if meta_data == "train" else self._source(_held_out_loader(trainer, meta_data))
        self.optimizer = live_optimizer(trainer)
        self.applied = AppliedValues(self.optimizer, module, learned, saved)
        self._install()

    def _install(self) -> None:
        """The two places where the run has to know of the applied values: schedulers, and steps per tensor."""
        step_scheduler = self._module.lr_scheduler_step

        def lr_scheduler_step(*arguments: Any) -> None:
            with self.applied.scheduled():
                step_scheduler(*arguments)

        self._cleanup.enter_context(hidden_attribute(self._module, "lr_scheduler_step", lr_scheduler_step))
        joining = self.optimizer.register_step_post_hook(lambda *_: self.applied.join())
        self._cleanup.callback(joining.remove)
        self._cleanup.callback(self.applied.join)

    def close(self) -> None:
        """Remove everything of ours from the module and the optimizer; the learned values stay applied."""
        self._cleanup.close()

    def held_out(self, number: int) -> Window:
        """The held-out batch with this number, as the user's step takes it."""
        assert self._held_out is not None
        return self._moved(self._held_out.batch(number), held_out=True)

    def meta_gradient(
        self,
        windows: Sequence[Window],
        meta_window: Window,
        objective: Objective,
        estimator: Estimator,
    ) -> MetaGradient:
        """The meta-gradient of an unroll from the run's present state; the run does not notice."""
        parameters, buffers = owned_tensors(self._module, self.optimizer)
        with invisible(self._trainer, self._module, self._seed + self._trainer.global_step):
            return meta_gradient(
                self._loss,
                parameters,
                self._learned,
                windows,
                meta_window,
                objective=objective,
                estimator=estimator,
                state=self._state(),
                buffers=buffers,
                gradient_transformation=self._clipping(),
            )

    def search(self, progress: Callable[[int], None] | None = None) -> SearchResult | str:
        """The initial search from the run's present state; the run does not notice.

        Returns:
            The result, or a sentence on why there was none.
        """
        loader = first_loader(self._trainer.train_dataloader)
        if not is_indexable(loader):
            return "the training loader can only be iterated, and reading ahead would change the run's data"
        if self._learned.scaled_rate(1.0) is None:
            return f"{type(self._learned).__name__} has no learning rate to search"
        rate = self._base_rate()
        if rate <= 0:
            return "the optimizer's learning rate is zero, so there is nothing to multiply"
        source = self._source(loader)
        windows = [self._moved(source.batch(number), held_out=False) for number in range(_SEARCH_STEPS)]
        if self._held_out is None:
            judges = [
                self._moved(source.batch(_SEARCH_STEPS + number), held_out=False) for number in range(_SEARCH_BATCHES)
            ]
        else:
            judges = [self.held_out(number) for number in range(_SEARCH_BATCHES)]
        step, start = self._inner_step()

        def loss_at(candidate: float) -> tuple[float, int]:
            with invisible(self._trainer, self._module, self._seed):
                meta = self._learned.scaled_rate(candidate / rate)
                return loss_after_training(step, start, windows, judges, meta)

        return search_learning_rate(loss_at)

    def start_from(self, learning_rate: float) -> None:
        """Make this the learning rate of the first group, the others in proportion."""
        values = self._learned.scaled_rate(learning_rate / self._base_rate())
        assert values is not None
        self._learned.set_(values)
        self._learned.project_()
        self.applied.refresh(force=True)

    def _base_rate(self) -> float:
        """The learning rate that factors are relative to: the first group's, before a warm-up scales it down."""
        group = self.applied.inner().groups[0]
        return float(group.hyperparameters.get("initial_lr", group.hyperparameters["lr"]))

    def _inner_step(self) -> tuple[InnerStep, Iterate]:
        parameters, buffers = owned_tensors(self._module, self.optimizer)
        step = InnerStep(self._loss, self._learned, self._clipping())
        return step, step.start(parameters, self._state(), buffers)

    def _state(self) -> Any:
        return read_state(self.optimizer, self._module.named_parameters())

    def _clipping(self) -> GradientTransformation | None:
        value = self._trainer.gradient_clip_val
        if not value:
            return None
        by_value = self._trainer.gradient_clip_algorithm == "value"
        return clip_gradient_value(float(value)) if by_value else clip_gradient_norm(float(value))

    def _source(self, loader: Any) -> IndexedBatches | StreamedBatches:
        if is_indexable(loader):
            return IndexedBatches(loader, self._seed, self._trainer.global_rank, self._trainer.world_size)
        return StreamedBatches(loader, self._seed)

    def _moved(self, batch: Any, *, held_out: bool) -> Window:
        with invisible(self._trainer, self._module, self._seed):
            return joined([Window(((moved_batch(self._trainer, self._module, batch, held_out=held_out), 0),), 1)])


def _held_out_loader(trainer: pl.Trainer, meta_data: Any) -> Any:
    if meta_data != "val":
        return first_loader(meta_data)
    loader = first_loader(validation_loaders(trainer))
    if loader is None:
        raise MisconfigurationException(
            "LearnToLearn(meta_data='val') needs validation data to judge the learning rate by, but this Trainer has "
            "none (no val_dataloader, no validation_step, or limit_val_batches=0). Pass a loader of held-out "
            "batches, LearnToLearn(meta_data=my_loader), or judge on training batches with "
            "LearnToLearn(meta_data='train')."
        )
    return loader
