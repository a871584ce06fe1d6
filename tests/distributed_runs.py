"""What the tests of distributed runs run in each process. Everything here has to be found by name."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from conftest import QUIET
from helpers import Plain, Rich, Witness, examples, learner, loader, observer, outcome
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_l2l import LearnToLearn, MetaTraining, MLPOptimizer
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.host import look_ahead
from lightning_l2l.learned import LearnedStepSize
from lightning_l2l.tasks import Quadratic

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def trainer_for(count: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {**QUIET, "devices": count, "strategy": "ddp" if count > 1 else "auto"}
    return pl.Trainer(**{**defaults, "callbacks": list(callbacks), **options})


def halves(count: int, size: int = 16, **options: Any) -> dict[str, Any]:
    """Loaders whose batches on ``count`` processes are together the batch of ``size`` examples of a single one."""
    train = loader(96, batch_size=size // count, **options)
    return {"train_dataloaders": train, "val_dataloaders": loader(32, seed=1, batch_size=size // count)}


def parts(count: int, size: int = 16, total: int = 96) -> DataLoader:
    """Process by process the parts of the same batches: Lightning's own sampler shuffles training data."""
    own, rank = size // count, int(os.environ.get("LOCAL_RANK", 0))
    starts = range(rank * own, total, size)
    return DataLoader(examples(total), batch_sampler=[list(range(start, start + own)) for start in starts])


def held_out(count: int, size: int = 16) -> DataLoader:
    return loader(64, seed=2, batch_size=size // count)


class Deep(Plain):
    """Curvature everywhere, nothing random."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def result_of(callback: LearnToLearn, module: pl.LightningModule) -> dict[str, Any]:
    return {
        "history": callback.history,
        "rates": callback.learning_rates,
        "learned": callback.learned.state_dict(),
        "search": callback.search_result,
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
    }


def fit(count: int, optimizer: str, options: Any, estimator: Any, **learning: Any) -> dict[str, Any]:
    """A run in double precision, so that what differs is not rounding."""
    learning = {"unroll_steps": 20 if estimator == "displacement" else 2, **learning}
    callback = learner(meta_data=held_out(count), estimator=estimator, **learning)
    module = Deep(OPTIMIZERS[optimizer])
    defaults = {"precision": "64-true", "use_distributed_sampler": False}
    trainer_for(count, callback, **defaults, **options).fit(module, parts(count), loader(8, seed=1))
    return result_of(callback, module)


class Places(pl.Callback):
    """Where the parameters are, from the start on."""

    def __init__(self) -> None:
        self.places: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.places.append({name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


def fit_with_places() -> dict[str, Any]:
    """Each process judges by a single batch of its own; with all that is needed to say by hand what comes out."""
    own = examples(16, seed=10 + int(os.environ["LOCAL_RANK"])).tensors
    judge = (own[0].double(), own[1])
    sampler = DistributedSampler(range(1), num_replicas=2, rank=int(os.environ["LOCAL_RANK"]))  # so it is sharded
    meta_data = DataLoader([judge], batch_size=None, sampler=sampler)
    places, callback = Places(), learner(meta_data=meta_data, unroll_steps=20)
    module = Deep(OPTIMIZERS["sgd"])
    options = {"precision": "64-true", "use_distributed_sampler": False}
    trainer = trainer_for(2, callback, places, **options)
    trainer.fit(module, parts(2), loader(8, seed=1))
    found = result_of(callback, module)
    judged, step, rate, average = [], 0, 0.1, dict(places.places[0])
    for record in callback.history:
        while step < record["step"]:
            step += 1
            now = places.places[step]
            average = {name: average[name] + max(1 / (step + 1), 1 / 20) * (now[name] - average[name]) for name in now}
        part = 0.4 * min(1, 2 * (1 - step / trainer.estimated_stepping_batches)) * (1 - trainer.max_epochs / 20)
        module.load_state_dict({name: now[name] + part * (average[name] - now[name]) for name in now})
        module.zero_grad()
        loss = functional.cross_entropy(module.net(judge[0]), judge[1])
        loss.backward()
        along = sum((p.grad * (now[name] - average[name])).sum().item() for name, p in module.named_parameters())
        judged.append((loss.item(), along))
        factor, rate = record["learning_rates"][0] / rate, record["learning_rates"][0]
        average = {name: now[name] + factor * (average[name] - now[name]) for name in now}  # as with the present rate
    return {**found, "judged": judged}


def fit_with_notes(count: int, estimator: str) -> dict[str, Any]:
    """With what the estimator says about every meta-gradient."""
    notes: list[str] = []
    original = look_ahead.meta_gradient

    def noted(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        notes.extend(result.diagnostics.notes)
        return result

    look_ahead.meta_gradient = noted
    try:
        return {**fit(count, "sgd", {}, estimator), "notes": notes}
    finally:
        look_ahead.meta_gradient = original


def fit_per_tensor(count: int, steps: int, estimator: str) -> dict[str, Any]:
    """Several meta-parameters and a long unroll, so that the choice of the estimator needs a measurement."""
    learned = LearnedStepSize(per="tensor")
    return fit(count, "sgd", {"max_epochs": 12}, estimator, learned=learned, unroll_steps=steps, every_n_steps=16)


class Gathers(Deep):
    """A loss over the outputs of all processes, as contrastive ones are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.all_gather(self.net(batch[0]), sync_grads=True).reshape(-1, 3)
        return (outputs @ outputs.T).square().mean()


def fit_gathering(count: int, estimator: Any) -> dict[str, Any]:
    callback = learner(meta_data=held_out(count), estimator=estimator)
    module = Gathers(OPTIMIZERS["sgd"])
    options = {"precision": "64-true", "use_distributed_sampler": False}
    trainer_for(count, callback, **options).fit(module, parts(count), loader(8, seed=1))
    return result_of(callback, module)


class Somewhere(Deep):
    """Does something to the loss on one process, with some batches only."""

    def __init__(self, what: str, when: str) -> None:
        super().__init__()
        self.what, self.when = what, when

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        unrolled = "log" in vars(self)  # muted: not a step of the training
        held_out = unrolled and bool((batch[0][:, 0] > 50).any())
        due = (
            self.trainer.global_step >= 2
            and {
                "unroll": unrolled and not held_out,
                "held out": held_out,
                "training": not unrolled,
                "always": True,
            }[self.when]
        )
        if self.global_rank != 1 or not due:
            return loss
        if self.what == "none":
            return None
        if self.what == "raise":
            raise ValueError("a bad batch")
        if self.what == "curvature":
            return _NoCurvature.apply(self.net[0].weight) + loss
        return loss * math.nan if self.what == "nan" else loss - float(self.what)


class _NoCurvature(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.sum() * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (tensor,) = ctx.saved_tensors
        return _Fails.apply(tensor) * gradient


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ValueError("no second derivative today")


class Marked(torch.utils.data.Dataset):
    """Examples that the module can recognise as held-out ones."""

    def __init__(self) -> None:
        self.examples = examples(32, seed=2)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.examples[index]
        return torch.cat([torch.tensor([100.0]), inputs[1:]]), target


def fit_with_trouble(what: str, when: str, estimator: Any = "forward") -> dict[str, Any]:
    callback = learner(meta_data=DataLoader(Marked(), 8), estimator=estimator)
    module = Somewhere(what, when)
    trainer_for(2, callback).fit(module, **halves(2))
    return result_of(callback, module)


class DiesOnOne(torch.utils.data.Dataset):
    """Held-out data that cannot be read any more on one process."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if torch.distributed.get_rank() == 1 and self.reads > 20:
            raise OSError("the disk is gone")
        return examples(32)[index]


def fit_with_dying_data() -> Any:
    trainer_for(2, learner(meta_data=DataLoader(DiesOnOne(), 8))).fit(Deep(), **halves(2))


class Noted(torch.utils.data.Dataset):
    """Held-out examples that are marked with their number."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        inputs, target = examples(64, seed=2)[index]
        return torch.cat([torch.tensor([1000.0 + index]), inputs[1:]]), target


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return (Noted()[index] for index in range(64))


class Notes(Deep):
    seen: ClassVar[list[int]] = []  # not an attribute of the module: that would be put back

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.extend(round(float(mark)) - 1000 for mark in batch[0][:, 0] if mark > 500)
        return self.loss(batch)


def judged_by(kind: str) -> list[int]:
    """The numbers of the held-out examples that this process looked at."""
    sampler = None
    if kind == "sharded":
        sampler = DistributedSampler(Noted(), num_replicas=2, rank=int(os.environ["LOCAL_RANK"]), shuffle=False)
    meta_data = DataLoader(Stream() if kind == "iterable" else Noted(), 4, sampler=sampler)
    module = Notes()
    callback = learner(meta_data=meta_data, divergence_guard=False)  # which reads some, too
    trainer_for(2, callback).fit(module, **halves(2))
    return module.seen


def fit_with_search(count: int) -> dict[str, Any]:
    callback = LearnToLearn(unroll_steps=2, every_n_steps=3)
    module = Deep()
    trainer_for(count, callback).fit(module, **halves(count, shuffle=True))
    return result_of(callback, module)


class OnlyOnFirst(Deep):
    """Two more layers: one that no process uses, one that process 0 uses in every second step."""

    def __init__(self, count: int) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1))
        self.count = count
        self.extra, self.never = nn.Linear(6, 3), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.global_rank == 0 and batch_idx % 2 == 0:
            own = [part[: 16 // 2] for part in batch]  # of a single process, what would be that of process 0
            loss = loss + functional.cross_entropy(self.extra(own[0]), own[1]) * self.count / 2
        return loss


def fit_partly_used(count: int, estimator: Any) -> dict[str, Any]:
    witness, callback = Witness(), learner(meta_data="train", unroll_steps=4, every_n_steps=5, estimator=estimator)
    module = OnlyOnFirst(count)
    options: dict[str, Any] = {"max_epochs": 4, "precision": "64-true", "use_distributed_sampler": False}
    if count > 1:
        options["strategy"] = "ddp_find_unused_parameters_true"
    trainer_for(count, callback, witness, **options).fit(module, parts(count), loader(8, seed=1))
    return {**result_of(callback, module), "gradients": [sorted(found) for found in witness.gradients]}


def unchanged(with_callback: bool, estimator: str, strategy: str) -> dict[str, Any]:
    """A run of everything that can be disturbed."""
    module = Rich(OPTIMIZERS["sgd"])
    seed = int(os.environ["LOCAL_RANK"])  # other random numbers on each process
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    callbacks = [observer(estimator=estimator)] if with_callback else []
    trainer = trainer_for(2, *callbacks, strategy=strategy)
    trainer.fit(module, **halves(2, shuffle=True))
    return {"outcome": outcome(trainer, module), "updates": len(callbacks[0].history) if callbacks else 0}


def fit_and_save(count: int, folder: Path, meta_data: Any = "val", estimator: Any = "auto") -> dict[str, Any]:
    """Saves in the middle of a window, and goes on."""
    callback = learner(every_n_steps=4, unroll_steps=3, meta_data=meta_data, estimator=estimator)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    module = Deep(OPTIMIZERS["adam"])
    options = {"enable_checkpointing": True, "max_epochs": 3}
    trainer_for(count, callback, saving, **options).fit(module, **halves(2))
    return result_of(callback, module)


def resume(count: int, path: Path, meta_data: Any = "val", estimator: Any = "auto") -> dict[str, Any]:
    callback = learner(every_n_steps=4, unroll_steps=3, meta_data=meta_data, estimator=estimator)
    module = Deep(OPTIMIZERS["adam"])
    trainer_for(count, callback, max_epochs=3).fit(module, **halves(2), ckpt_path=path)
    return result_of(callback, module)


def fit_twice(estimator: Any) -> dict[str, Any]:
    """Stops in the middle of a window, and goes on in the same process."""
    callback = learner(every_n_steps=4, unroll_steps=3, estimator=estimator)
    module = Deep(OPTIMIZERS["adam"])
    trainer = trainer_for(2, callback, max_epochs=None, max_steps=10)
    trainer.fit(module, **halves(2))
    trainer.fit_loop.epoch_loop.max_steps = 18
    trainer.fit(module, **halves(2))
    return result_of(callback, module)


def fit_neural() -> dict[str, Any]:
    """A neural optimizer that every process initialises by itself."""
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    learned = MLPOptimizer()
    before = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    module = Deep(lambda parameters: learned.as_torch_optimizer(parameters))
    callback = learner(initial_search=True, meta_learning_rate=1e-3, meta_data="train")
    trainer_for(2, callback).fit(module, **halves(2))
    return {**result_of(callback, module), "before": before}


def spawned(strategy: str) -> dict[str, Any]:
    """What is left in the process that called ``fit``, when the training ran in others."""
    callback, module = learner(), Deep()
    trainer = trainer_for(2, callback, strategy=strategy)
    trainer.fit(module, **halves(2))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {**result_of(callback, module), "metrics": metrics}


class Gradients(pl.Callback):
    """Each meta-gradient as this process computed it, and as it was after the mean."""

    def __init__(self) -> None:
        self.shown: list[float] = []
        self.applied: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.applied.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.shown.append(float(trainer.callback_metrics["l2l/meta_objective"]))


def meta_train(count: int) -> dict[str, Any]:
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.05))
    family = [Quadratic.random(3, seed=number) for number in range(4)]
    module = MetaTraining(learned, family, unroll_steps=5, episode_steps=10, tasks_at_once=2, populations=2)
    recorder = Gradients()
    trainer = trainer_for(count, recorder, max_epochs=None, max_steps=8)
    trainer.fit(module)
    return {"objectives": recorder.shown, "gradients": recorder.applied, "learned": learned.state_dict()}
