"""``MetaTraining``: a LightningModule that trains a learned optimizer over tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.learned import LearnedOptimizer, TF1RMSProp
from lightning_l2l.tasks.family import TaskFamily, as_family
from lightning_l2l.tasks.length import Length, as_length
from lightning_l2l.tasks.population import MetaLoss, Population
from lightning_l2l.tasks.stacked import BatchedTasks
from lightning_l2l.tasks.task import Task

MetaOptimizerName = Literal["adam", "sgd", "rmsprop_tf1"]
_CHECKPOINT_KEY = "lightning_l2l"


class MetaTraining(pl.LightningModule):
    """Trains a learned optimizer over a distribution of tasks: ``L.Trainer(max_steps=1000).fit(MetaTraining(...))``.

    One training step of the Trainer is one meta-gradient: an unroll of the inner training of ``tasks_at_once`` tasks
    side by side. Clipping, accumulation, precision, checkpoints, loggers and DDP (other tasks on each process) are the
    Trainer's. An interrupted meta-training that is resumed from a checkpoint goes on as if it had not been interrupted.

    Inner trainings that diverge are frozen before anything leaves the number range, count with a fixed bad loss
    (``l2l/diverged`` says how many), and begin anew at the next unroll, or with the rest of their population where they
    share a step count with it (learned hyperparameters) or a perturbation (``pes``, ``es_single``). A meta-gradient
    that is not usable all the same counts as zero (``l2l/unusable``).

    Args:
        learned: The learned optimizer. Trained in place; :meth:`LearnedOptimizer.save` it afterwards.
        tasks: A task, several of the same parameter shapes, or a family to draw from (a
            :class:`~lightning_l2l.tasks.family.Mixture` of families for several architectures).
        unroll_steps: Inner steps of a meta-gradient; a number, or a random or growing :class:`Length`.
        episode_steps: Inner steps of a whole inner training, which is cut into unrolls, carrying the inner state.
            ``None``: every unroll is a training from its start.
        tasks_at_once: Tasks side by side on each process.
        populations: Groups of ``tasks_at_once`` tasks that are at different steps of their training (staggered), taking
            turns. Only with ``episode_steps``.
        estimator: How the meta-gradient is computed, and of which meta-objective: over tasks that is the mean.
            ``Unroll()`` by default, truncated where ``episode_steps`` is given;
            ``EvolutionStrategies(method="es_single")`` is free of that bias, and affordable for a few hundred
            meta-parameters. Its ``steps`` are ``None``: ``unroll_steps`` says how many.
        meta_data: ``"val"``: train-by-validation; ``"train"``: train-by-train, on fresh training batches.
        meta_batch: ``"sample"``: one batch of each task for each unroll; ``"full"``: all of the split.
        iterates: ``"before"``: the paper's code's mean over ``w_0 ... w_(K-1)``; needs ``objective="naive_mean"``.
        schedule: ``"linear"``: the inner steps are multiplied by ``1 - t / T``, so that what is learned suits a
            learning rate that falls to zero; T is ``episode_steps``, or the length of the unroll.
        meta_optimizer: ``"adam"``, ``"sgd"``, or the paper's code's ``"rmsprop_tf1"``.
        meta_learning_rate: Its learning rate.
        warm_down: The learning rate falls to zero over the Trainer's ``max_steps``, as half a cosine.
        divergence: A task has diverged once its loss is above its start's by this many times the start's.
        seed: Of tasks, starts and batches.
        updates_per_epoch: Meta-gradients in one "epoch" of the Trainer.

    Raises:
        TypeError: ``learned`` is no learned optimizer, or ``tasks`` no tasks.
        ValueError: Settings that do not go together.

    Example:
        >>> from lightning_l2l import LearnedStepSize, MetaTraining
        >>> from lightning_l2l.functional import inner_optimizer
        >>> from lightning_l2l.tasks import Quadratic
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.01))
        >>> task = Quadratic(torch.eye(2), torch.ones(2))
        >>> meta_training = MetaTraining(learned, task, unroll_steps=5, tasks_at_once=2)
        >>> meta_training.training_step(0).shape
        torch.Size([])
    """

    def __init__(
        self,
        learned: LearnedOptimizer,
        tasks: Task | TaskFamily | Sequence[Task],
        *,
        unroll_steps: int | Length = 20,
        episode_steps: int | Length | None = None,
        tasks_at_once: int = 8,
        populations: int = 1,
        estimator: Unroll | EvolutionStrategies | None = None,
        meta_data: Literal["train", "val"] = "val",
        meta_batch: Literal["sample", "full"] = "sample",
        iterates: Literal["after", "before"] = "after",
        schedule: Literal["constant", "linear"] = "constant",
        meta_optimizer: MetaOptimizerName = "adam",
        meta_learning_rate: float = 1e-3,
        warm_down: bool = False,
        divergence: float = 10.0,
        seed: int = 0,
        updates_per_epoch: int = 100,
    ) -> None:
        super().__init__()
        if not isinstance(learned, LearnedOptimizer):
            raise TypeError(f"learned must be a LearnedOptimizer, got {type(learned).__name__}.")
        if not any(parameter.requires_grad for parameter in learned.parameters()):
            raise ValueError(
                f"{type(learned).__name__} has no meta-parameters to train. Learned step sizes and hyperparameters get "
                "theirs from attach(inner_optimizer(torch.optim.Adam, lr=1e-3))."
            )
        estimator = Unroll() if estimator is None else estimator
        if estimator.steps is not None:
            raise ValueError(
                f"The estimator has steps={estimator.steps}, but here the length of an unroll may change: leave it "
                "out, and set unroll_steps."
            )
        for name, value in (("tasks_at_once", tasks_at_once), ("populations", populations)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if populations > 1 and episode_steps is None:
            raise ValueError(
                "populations are groups of tasks at different steps of their training; with episode_steps=None each "
                "unroll is a whole training. Set episode_steps, or raise tasks_at_once instead."
            )
        if iterates == "before" and estimator.objective != "naive_mean":
            raise ValueError("iterates='before' shifts a mean over the steps: it needs Unroll(objective='naive_mean').")
        if schedule not in ("constant", "linear"):
            raise ValueError(f"schedule={schedule!r} must be 'constant' or 'linear'.")
        if meta_optimizer not in get_args(MetaOptimizerName):
            raise ValueError(f"meta_optimizer={meta_optimizer!r} must be one of {list(get_args(MetaOptimizerName))}.")
        if not divergence > 0:
            raise ValueError(
                f"divergence={divergence} must be above 0: a task's loss may rise a little before it falls."
            )
        self.learned = learned
        self.family = as_family(tasks)
        self.unroll_length = as_length(unroll_steps)
        self.episode_length = None if episode_steps is None else as_length(episode_steps)
        self.tasks_at_once, self.seed, self.divergence = tasks_at_once, seed, float(divergence)
        self.meta_optimizer, self.meta_learning_rate, self.warm_down = meta_optimizer, meta_learning_rate, warm_down
        self.updates_per_epoch = updates_per_epoch
        self.estimator = estimator
        self.annealed = schedule == "linear"
        self.meta_loss = MetaLoss(meta_data, meta_batch == "full", iterates)
        # In a tuple, so that the learned optimizer is registered once.
        self._batched = (BatchedTasks(learned),)
        self._populations: list[Population | None] = [None] * populations
        self.meta_gradients = 0
        self.diverged = 0
        self.unusable = 0

    def train_dataloader(self) -> DataLoader[int]:
        """A stream of numbers: the tasks' own data are drawn in the training step."""
        return DataLoader(_Stream(self.updates_per_epoch), batch_size=None)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """One meta-gradient, as a loss whose gradient it is.

        Returns:
            The meta-objective; its derivative for each meta-parameter is the meta-gradient.
        """
        which = self.meta_gradients % len(self._populations)
        generator = self._generator()
        population = self._ready(which, generator)
        steps = self.unroll_length.draw(generator, self.meta_gradients) if self.episode_length else population.length
        with torch.enable_grad():
            result, after = population.unroll(self._batched[0], steps, self.meta_loss, generator, self.device)
        self.diverged += int(after.diverged.sum() - population.diverged.sum())
        self.meta_gradients += 1
        self.unusable += not result.usable
        self._populations[which] = None if after.finished or not result.usable else after
        gradients = {name.removeprefix("learned."): gradient for name, gradient in result.gradients.items()}
        if not result.usable:
            gradients = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
        self._log(result.value, gradients, after.steps - population.steps)
        return self._surrogate(result.value, gradients)

    def configure_optimizers(self) -> Any:
        """The meta-optimizer."""
        parameters = [parameter for parameter in self.learned.parameters() if parameter.requires_grad]
        makers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop_tf1": TF1RMSProp}
        optimizer: torch.optim.Optimizer = makers[self.meta_optimizer](parameters, lr=self.meta_learning_rate)
        if not self.warm_down:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 1:
            raise ValueError("warm_down needs the length of the meta-training: give the Trainer max_steps.")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *_: Any) -> None:
        """Puts the meta-parameters back into their bounds."""
        self.learned.project_()

    def on_train_end(self) -> None:
        """Notes in the learned optimizer how long the inner trainings were, for a warning where it is used beyond."""
        self.learned.horizon = (self.episode_length or self.unroll_length).longest
        self.learned.tasks = self.learned.tasks or type(self.family).__name__

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the inner trainings of all processes, and the counters."""
        states = [None if population is None else population.state_dict() for population in self._populations]
        own = {"populations": states, "diverged": self.diverged, "unusable": self.unusable}
        checkpoint[_CHECKPOINT_KEY] = {"meta_gradients": self.meta_gradients, "ranks": _from_all_ranks(own)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the inner trainings that were saved.

        Raises:
            ValueError: The checkpoint has another number of processes or populations.
        """
        saved = checkpoint.get(_CHECKPOINT_KEY)
        if saved is None:
            return
        ranks, world = saved["ranks"], _world_size()
        if len(ranks) != world or len(ranks[0]["populations"]) != len(self._populations):
            raise ValueError(
                f"The checkpoint holds {len(ranks[0]['populations'])} population(s) on each of {len(ranks)} "
                f"process(es), now there are {len(self._populations)} on {world}. Resume with the same settings, or "
                "load only the meta-parameters."
            )
        own = ranks[self.global_rank]
        self.meta_gradients, self.diverged, self.unusable = saved["meta_gradients"], own["diverged"], own["unusable"]
        self._populations = [
            None
            if state is None
            else Population.from_state_dict(
                state,
                self.family,
                self._batched[0],
                self.estimator,
                divergence=self.divergence,
                device=self.device,
            )
            for state in own["populations"]
        ]

    def _ready(self, which: int, generator: torch.Generator) -> Population:
        """The population whose turn it is, with fresh tasks where it needs them."""
        population = self._populations[which]
        batched, device = self._batched[0], self.device
        if population is None:
            length = (self.episode_length or self.unroll_length).draw(generator, self.meta_gradients)
            if self.meta_gradients < len(self._populations):
                # The first training of each population is shorter by a different amount: from then on they are
                # staggered.
                length = max(1, math.ceil(length * (which + 1) / len(self._populations)))
            return Population.begin(
                self.family,
                batched,
                self.estimator,
                tasks=self.tasks_at_once,
                length=length,
                divergence=self.divergence,
                annealed=self.annealed,
                generator=generator,
                device=device,
            )
        if bool(population.diverged.any()) and population.restartable:
            return population.restarted(self.family, batched, generator, device)
        return population

    def _generator(self) -> torch.Generator:
        """A function of seed, process and the number of meta-gradients, so there is no state to keep."""
        mixed = random.Random(f"{self.seed}/{self.global_rank}/{self.meta_gradients}").getrandbits(62)
        return torch.Generator().manual_seed(mixed)

    def _surrogate(self, value: float, gradients: dict[str, Tensor]) -> Tensor:
        parameters = dict(self.learned.named_parameters())
        products = [(parameters[name] * gradient.detach()).sum().float() for name, gradient in gradients.items()]
        slope = torch.stack(products).sum()
        # Lightning refuses losses that are not finite (detect_anomaly), and there is nothing better to show.
        shown = torch.tensor(value if math.isfinite(value) else 0.0, device=slope.device)
        return shown + slope - slope.detach()

    def _log(self, value: float, gradients: dict[str, Tensor], steps: int) -> None:
        try:
            _ = self.trainer
        except RuntimeError:  # none: training_step() is then a function that gives meta-gradients
            return
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        values = {"meta_objective": value, "meta_gradient_norm": norm, "unroll_steps": steps}
        values |= {"diverged": self.diverged, "unusable": self.unusable}
        self.log_dict({f"l2l/{name}": float(number) for name, number in values.items()}, batch_size=1)


class _Stream(IterableDataset[int]):
    """Not a list of numbers: a sampler for several processes would split it. Lightning warns of a ``__len__``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def _world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _from_all_ranks(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks; all of them have to call this at the same point."""
    found: list[Any] = [value] * _world_size()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, value)
    return found
