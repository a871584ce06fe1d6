"""What the tests of sharded and hooked runs run in each process. Everything here has to be found by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from any_module import Regression, examples
from conftest import QUIET
from lightning.pytorch import strategies
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_l2l import LearnToLearn


class Transformer(Regression):
    """An encoder layer over eight tokens; sharded where the strategy has a mesh."""

    def __init__(self, rate: float = 1e-6) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=rate))

    def make_net(self) -> nn.Module:
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Linear(1, 8), layer, nn.Flatten(), nn.Linear(64, 1))

    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None and not hasattr(self.net[-1].weight, "to_local"):
            fully_shard(self.net[2], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])


def own_part(count: int, examples_in_all: int, seed: int, size: int = 32) -> DataLoader:
    """This process's part of the batches that one process would have."""
    own, rank = size // count, int(os.environ.get("LOCAL_RANK", 0))
    starts = range(rank * own, examples_in_all, size)
    return DataLoader(examples(examples_in_all, seed), batch_sampler=[list(range(s, s + own)) for s in starts])


def trainer_for(kind: str, count: int, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    def sharded(distributed: bool = True) -> Any:
        return strategies.ModelParallelStrategy(
            data_parallel_size=count,
            tensor_parallel_size=1,
            save_distributed_checkpoint=distributed,
            process_group_backend="gloo",
        )

    kinds: dict[str, Any] = {
        "plain": lambda: "auto",
        "ddp": lambda: "ddp",
        "compressed": lambda: strategies.DDPStrategy(ddp_comm_hook=fp16_compress_hook),
        "sharded": sharded,
        "sharded, saved whole": lambda: sharded(False),
    }
    options = {**QUIET, "devices": count, "max_epochs": epochs, "use_distributed_sampler": False}
    return pl.Trainer(**options, strategy=kinds[kind](), callbacks=list(callbacks))


def whole_weights(module: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in module.parameters()]


def learn(
    kind: str, count: int, callback: LearnToLearn | None = None, epochs: int = 8, rate: float = 1e-6
) -> dict[str, Any]:
    """A fit: its history, and the whole weights and the held-out loss at the end."""
    callback = callback or LearnToLearn()
    trainer, module = trainer_for(kind, count, epochs, callback), Transformer(rate)
    trainer.fit(module, own_part(count, 256, 0), own_part(count, 64, 5))
    return {
        "history": callback.history,
        "rates": callback.learning_rates,
        "weights": whole_weights(module),
        "end": float(trainer.callback_metrics["val_loss"]),
    }


def watch(kind: str, count: int) -> list[torch.Tensor]:
    """The weights at the end of a fit with a callback that observes, with held-out gradients."""
    callback = LearnToLearn(meta_learning_rate=0, initial_search=False, every_n_steps=3)
    return list(learn(kind, count, callback, epochs=2)["weights"])


def without(kind: str, count: int) -> list[torch.Tensor]:
    """The weights at the end of the same fit without a callback."""
    trainer, module = trainer_for(kind, count, 2), Transformer()
    trainer.fit(module, own_part(count, 256, 0), own_part(count, 64, 5))
    return whole_weights(module)


class Normalised(Transformer):
    """With batch normalisation before the last layer."""

    def make_net(self) -> nn.Module:
        *body, head = super().make_net()
        return nn.Sequential(*body, nn.BatchNorm1d(64), head)


class Follows(pl.Callback):
    """Whole weights after each step and in each validation, and their average in double precision."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.trained: list[list[torch.Tensor]] = []
        self.validated: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self.average: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = [weights.double() for weights in whole_weights(pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        self.trained.append(whole_weights(pl_module))
        for average, weights in zip(self.average, self.trained[-1], strict=True):
            average += 9 / (step + 9) * (weights.double() - average)
        if self.path is not None and step == 8:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append((whole_weights(pl_module), [average.clone() for average in self.average]))


def average(kind: str, average_weights: bool, path: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """A fit on two processes, with a checkpoint after eight of sixteen steps, or from one."""
    callback = LearnToLearn(average_weights=average_weights, every_n_steps=3, initial_search=False)
    follows = Follows(path)
    trainer, module = trainer_for(kind, 2, 2, callback, follows), Normalised(0.01)
    trainer.fit(module, own_part(2, 256, 0), own_part(2, 64, 5), ckpt_path=resume)
    return {
        "trained": follows.trained,
        "validated": follows.validated,
        "average": follows.average,
        "end": whole_weights(module),
        "statistics": [buffer.clone() for buffer in module.buffers()],
        "history": callback.history,
    }


def averages(kind: str, path: Path) -> list[dict[str, Any]]:
    """Without averages, with them, and resumed."""
    return [average(kind, False), average(kind, True, path), average(kind, True, None, path)]
