"""The modules and data modules that Lightning ships, as they are: trained with the callback, and unchanged by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import difference, learner, observer, outcome, sgd
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    IterableBoringDataModule,
    ManualOptimBoringModel,
    Net,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDatasetWithLen,
)
from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from lightning.pytorch.demos.mnist_datamodule import MNISTDataModule
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer, WikiText2
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_l2l import LearnToLearn

WORDS = 40


@dataclass
class Demo:
    """How a demo is trained.

    Attributes:
        module: Makes the module.
        data: What `fit` gets besides it; may depend on the folder that we are in.
        ours: Arguments of LearnToLearn.
        options: Arguments of the Trainer.
        steps: The steps that it takes; three epochs of 12 batches by default.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], dict[str, Any]] = dict
    ours: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 36


class FromDict(BoringModel):
    """The boring model on one entry of dictionaries, as `RandomDictDataset` has them."""

    def step(self, batch: Any) -> Any:
        return super().step(batch["a"])


class FromSeveral(BoringModel):
    """On the batches of several loaders at once, with four features, as `IterableBoringDataModule` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(torch.cat(batch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().validation_step(batch, batch_idx)


class Digits(pl.LightningModule):
    """The network of the MNIST examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, targets = batch
        return functional.nll_loss(self.net(images), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return sgd(0.01, momentum=0.9)(self.parameters())


def text() -> WikiText2:
    """What the demos download, but generated: lines of random words in which each word follows from the last two."""
    path = Path("data") / "wikitext-2.txt"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(WORDS, (3000,), generator=generator).tolist()
        for place in range(2, len(words), 2):
            words[place] = (words[place - 1] + words[place - 2]) % WORDS
        path.parent.mkdir()
        lines = [" ".join(f"w{word}" for word in words[start : start + 20]) for start in range(0, len(words), 20)]
        path.write_text("\n".join(lines), encoding="utf8")
    return WikiText2()


def transformer() -> pl.LightningModule:
    module = LightningTransformer(vocab_size=text().vocab_size)
    module.model = Transformer(
        vocab_size=text().vocab_size, ninp=16, nhead=2, nhid=16, nlayers=1
    )  # of usual size: slow
    return module


def lstm() -> pl.LightningModule:
    module = LightningLSTM(vocab_size=text().vocab_size)
    module.model = SimpleLSTM(vocab_size=text().vocab_size, ninp=16, nhid=16, nlayers=2)
    return module


def sequences() -> DataLoader:
    return DataLoader(text(), batch_sampler=SequenceSampler(text(), batch_size=20))


def mnist() -> dict[str, Any]:
    """Files like those that the data module downloads, with random images."""
    folder = Path("mnist") / "MNIST" / "complete"
    if not folder.exists():
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        for name in ("training.pt", "test.pt"):
            images = torch.randint(2, (64, 28, 28), generator=generator, dtype=torch.uint8)
            torch.save((images, images[:, :14].float().mean((1, 2)).gt(0.5).long()), folder / name)
    return {"datamodule": MNISTDataModule("mnist", val_split=16, num_workers=0, normalize=True, batch_size=4)}


def loaders(dataset: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"train_dataloaders": DataLoader(dataset(64)), "val_dataloaders": DataLoader(dataset(16))}


DEMOS: dict[str, Demo] = {
    "BoringModel": Demo(BoringModel),
    "BoringDataModule": Demo(BoringModel, lambda: {"datamodule": BoringDataModule()}),
    "BoringDataModuleNoLen": Demo(BoringModel, lambda: {"datamodule": BoringDataModuleNoLen()}),
    "IterableBoringDataModule": Demo(
        FromSeveral, lambda: {"datamodule": IterableBoringDataModule()}, {"meta_data": "train"}
    ),  # its validation loaders come one after the other, and their batches are no training batches
    "RandomDictDataset": Demo(FromDict, loaders(lambda size: RandomDictDataset(32, size))),
    "RandomIterableDatasetWithLen": Demo(BoringModel, loaders(lambda size: RandomIterableDatasetWithLen(32, size))),
    "DemoModel": Demo(
        DemoModel,
        lambda: {"train_dataloaders": DataLoader(RandomDataset(32, 64), batch_size=4)},
        {"meta_data": "train"},
    ),
    "LightningTransformer": Demo(transformer, ours={"meta_data": "train"}),
    "LightningTransformer, a loader of its own": Demo(transformer, ours={"meta_data": lambda: DataLoader(text())}),
    "LightningLSTM": Demo(lstm, ours={"meta_data": "train"}, options={"max_epochs": 9}),
    "LightningLSTM, a loader of its own": Demo(
        lstm, ours={"meta_data": sequences}, options={"max_epochs": 9, "gradient_clip_val": 0.25}
    ),
    "Net, MNISTDataModule": Demo(Digits, mnist, options={"limit_train_batches": 8}, steps=24),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*weights_only.*", "ignore:.*nested tensor.*"),
    pytest.mark.filterwarnings("ignore:LearnToLearn. .*goes on with the training gradients"),
    # With one example of 32 features in a batch, the rate of 0.1 is an unstable one.
    pytest.mark.filterwarnings("ignore:LearnToLearn. after step .* The training had diverged"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demos read and write in the folder that they are run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_USE_MOCKED_MNIST", "1")
    monkeypatch.setattr(WikiText2, "download", staticmethod(lambda destination: None))


def fit(trainer: Any, demo: Demo, make: Callable[..., LearnToLearn] | None, **ours: Any) -> Any:
    callbacks = []
    if make is not None:
        ours = {**demo.ours, **ours}
        if callable(ours.get("meta_data")):
            ours["meta_data"] = ours["meta_data"]()
        callbacks = [make(**ours)]
    torch.manual_seed(0)
    module = demo.module()
    options = {"max_epochs": 3, "limit_train_batches": 12, "limit_val_batches": 4, **demo.options}
    fitted = trainer(*callbacks, **options)
    fitted.fit(module, **demo.data())
    return fitted, module, *callbacks


@pytest.mark.feature("the modules of `lightning.pytorch.demos`")
@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_of_lightning_is_learned_on(trainer: Any, name: str) -> None:
    demo = DEMOS[name]
    fitted, module, callback = fit(trainer, demo, learner, initial_search=True)
    assert fitted.global_step == demo.steps and len(callback.history) >= demo.steps // 3
    assert all(record["learning_rates"][0] >= 0 for record in callback.history)
    assert any(map(math.isfinite, [record["cosine"][0] for record in callback.history if "cosine" in record]))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_of_lightning_is_unchanged_by_watching(trainer: Any, name: str) -> None:
    found = outcome(*fit(trainer, DEMOS[name], observer)[:2])
    assert difference(outcome(*fit(trainer, DEMOS[name], None)[:2]), found) == ""


def test_the_manual_boring_model_is_learned_on(trainer: Any) -> None:
    callback = learner()
    trainer(callback, max_epochs=1).fit(ManualOptimBoringModel())
    assert callback.history
