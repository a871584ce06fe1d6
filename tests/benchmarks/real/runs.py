"""One run: a task, trained by a method from a rate, and what came out of it."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from learner import Learner, Optimizer, Task, size
from tasks import TASKS
from torch.utils.data import DataLoader

from lightning_l2l import LearnedOptimizer, LearnToLearn, Unroll

LOOKS = 10  # validations of a run


@dataclass(frozen=True)
class Run:
    """``factor`` times the task's usual rate, with the user's schedule or at a constant rate."""

    task: str
    seed: int
    method: str
    factor: float
    schedule: bool


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    ``test`` is the test measure after the fit; ``best_validation`` the best measure of all validations, and
    ``test_at_best`` the test measure at that moment, which a ModelCheckpoint would have kept. ``seconds`` of processor
    time are the fit's, without the looks at test data; ``megabytes`` is by how much memory grew during the fit at most.
    ``curve`` has the test measure after so many batches.
    """

    test: float
    best_validation: float
    test_at_best: float
    last_rate: float
    steps: int
    seconds: float
    megabytes: float
    curve: str
    note: str


class Looks(L.Callback):
    """Measures test data whenever the Trainer has validated, on the time of the benchmark."""

    def __init__(self, test: DataLoader) -> None:
        self.test = test
        self.seen: list[tuple[int, float, float]] = []  # batches, validation, test
        self.seconds = 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Learner) -> None:
        began = time.process_time()
        measured = evaluate(pl_module, self.test)
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.seen.append((batches, trainer.callback_metrics["val_measure"].item(), measured))
        self.seconds += time.process_time() - began


@torch.no_grad()
def evaluate(module: Learner, loader: DataLoader) -> float:
    """The mean measure; modes of layers and random numbers are left as they are."""
    modes = [(layer, layer.training) for layer in module.modules()]
    state = torch.get_rng_state()
    module.eval()
    sum_, count = 0.0, 0
    for batch in loader:
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        sum_ += size(batch) * module.measure(batch).item()
        count += size(batch)
    for layer, training in modes:
        layer.training = training
    torch.set_rng_state(state)
    return sum_ / count


class Greedy(L.Callback):
    """GreedyLR as transformers has it, its loss averaged over 50 steps; bounds a thousandth and a thousand times."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from transformers.optimization import GreedyLR

        optimizer = trainer.optimizers[0]
        rates = [group["lr"] for group in optimizer.param_groups]
        self.scheduler = GreedyLR(
            optimizer,
            smooth=True,
            min_lr=[rate / 1e3 for rate in rates],
            max_lr=[rate * 1e3 for rate in rates],
            eps=0.0,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.scheduler.step(outputs["loss"].item())


class ScheduleFreeModes(L.Callback):
    """Averaged weights for validation and at the end, with statistics of BatchNorm for them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].train()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].eval()
        self.statistics(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].train()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    @staticmethod
    @torch.no_grad()
    def statistics(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = [layer for layer in pl_module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
        if layers:
            state = torch.get_rng_state()
            for layer in layers:
                layer.train()
            for batch, _ in zip(trainer.train_dataloader, range(30), strict=False):
                pl_module.training_step(pl_module.transfer_batch_to_device(batch, pl_module.device, 0), 0)
            for layer in layers:
                layer.eval()
            torch.set_rng_state(state)


def schedule_free(given: Optimizer, steps: int) -> Optimizer:
    """In the given one's groups, at their rates; a twentieth of the training is warm-up."""
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    if isinstance(given, torch.optim.SGD):
        return SGDScheduleFree(groups_of(given), momentum=0.9, warmup_steps=steps // 20)
    return AdamWScheduleFree(groups_of(given), warmup_steps=steps // 20)


def prodigy(given: Optimizer, steps: int) -> Optimizer:
    """Finds one rate; those of the groups are kept in proportion, the first is 1."""
    from prodigyopt import Prodigy

    groups = groups_of(given)
    first = groups[0]["lr"]
    return Prodigy([group | {"lr": group["lr"] / first} for group in groups])


def pretrained(given: Optimizer, steps: int) -> Any:
    """The rule that comes with the package, on a line from 1 to zero; the groups' rates are kept in proportion."""
    groups = groups_of(given)
    first = groups[0]["lr"]
    rule = LearnedOptimizer.pretrained("tensorwise")
    optimizer = rule.as_torch_optimizer([group | {"lr": group["lr"] / first} for group in groups])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]


@dataclass(frozen=True)
class Method:
    """Callbacks beside the module, and what takes the place of its optimizer."""

    callbacks: Callable[[], list[L.Callback]] = list
    optimizer: Callable[[Optimizer, int], Any] | None = None
    unsuited: tuple[str, ...] = ()


METHODS = {
    "plain": Method(),
    "LearnToLearn": Method(lambda: [LearnToLearn()]),
    "averaged": Method(lambda: [LearnToLearn(average_weights=True)]),
    "Unroll": Method(lambda: [LearnToLearn(Unroll(steps=5))], unsuited=("gan", "sparse", "minilm")),
    "GreedyLR": Method(lambda: [Greedy()], unsuited=("gan",)),
    "schedule-free": Method(lambda: [ScheduleFreeModes()], schedule_free, unsuited=("gan", "sparse")),
    "pretrained": Method(optimizer=pretrained, unsuited=("gan", "sparse")),
    "Prodigy": Method(optimizer=prodigy, unsuited=("gan", "sparse", "resnet")),
}


def execute(run: Run, steps: int | None = None, accelerator: str = "cpu") -> Outcome:
    """Train, in a process of its own if memory is to be measured; what goes wrong becomes the note."""
    task, method = TASKS[run.task], METHODS[run.method]
    looked_at = LOOKS if steps is None else 2
    steps = steps or task.steps
    L.seed_everything(run.seed, verbose=False)
    train, held_out, test = task.data()
    module = task.module(learning_rate=run.factor * task.usual, schedule=run.schedule)
    if method.optimizer is not None:
        configured, replacement = module.configure_optimizers, method.optimizer
        module.configure_optimizers = lambda: replacement(configured(), steps)
    callbacks = method.callbacks()
    looks = Looks(test)
    trainer = L.Trainer(
        max_steps=task.optimizers * steps,
        val_check_interval=max(1, steps // looked_at),
        check_val_every_n_epoch=None,
        callbacks=[looks, *callbacks],  # the looks first, so that they see the weights that were validated
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **task.trainer,
    )
    said: list[str] = []
    before = memory(reset=True)
    began = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, train, held_out)
        except Exception as error:  # a row of the table, too
            said.append(f"{type(error).__name__}: {error}")
    seconds = time.process_time() - began - looks.seconds
    grown = memory() - before
    said += [str(one.message) for one in caught if "lightning_l2l" in one.filename or "l2l" in str(one.message)]
    tested = evaluate(module, test) if not said or trainer.state.finished else float("nan")
    looked = min(looks.seen, key=lambda look: task.sign * look[1], default=(0, float("nan"), float("nan")))
    return Outcome(
        test=tested,
        best_validation=looked[1],
        test_at_best=looked[2],
        last_rate=last_rate(trainer, callbacks),
        steps=trainer.global_step // task.optimizers,
        seconds=round(seconds, 2),
        megabytes=round(grown, 1),
        curve=" ".join(f"{batches}:{measured:.4g}" for batches, _, measured in looks.seen),
        note=" | ".join(" ".join(line.split())[:300] for line in dict.fromkeys(said)),
    )


def last_rate(trainer: L.Trainer, callbacks: list[L.Callback]) -> float:
    """Of the first group, as it was applied."""
    for callback in callbacks:
        if isinstance(callback, LearnToLearn) and callback.history:
            return float(callback.history[-1]["learning_rates"][0])
    return float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else float("nan")


def memory(reset: bool = False) -> float:
    """The most megabytes that this process, or the GPU, has held since the last reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is held now
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def tasks_of(method: str) -> list[str]:
    """Those that a method is suited for."""
    return [name for name in TASKS if name not in METHODS[method].unsuited]


__all__ = ["METHODS", "Outcome", "Run", "Task", "execute", "tasks_of"]
