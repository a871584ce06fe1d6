"""On a GPU: what is kept lies where the run has it, and the promises of the other tests hold there.

Skipped without a CUDA device: `python -m pytest -m gpu` on a machine that has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Deterministic, Plain, Resumable, Rich, Saves, difference, learner, loaders, observer, outcome
from torch import nn
from torch.nn import functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*", "ignore:.*TensorFloat32.*"),
]

GPU: dict[str, Any] = {"accelerator": "cuda", "devices": 1}


class Recurrent(Plain):
    """A cuDNN LSTM."""

    def make_net(self) -> nn.Module:
        return nn.ModuleDict({"lstm": nn.LSTM(2, 4, batch_first=True), "head": nn.Linear(4, 3)})

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        states, _ = self.net["lstm"](inputs.view(-1, 3, 2))
        return functional.cross_entropy(self.net["head"](states[:, -1]), targets)


OPTIMIZERS: dict[str, Any] = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW, capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "Adam, tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), fused=True),
}
# Their arithmetic on the CPU, which does not capture.
ON_THE_CPU = {**OPTIMIZERS, "AdamW, capturable": lambda p: torch.optim.AdamW(p, lr=0.01)}


def devices(value: Any) -> set[str]:
    return {item.device.type for item in torch.utils._pytree.tree_leaves(value) if isinstance(item, torch.Tensor)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [Plain, Recurrent])
def test_it_measures_about_what_it_measures_on_the_cpu(trainer: Any, make: Any, optimizer: str) -> None:
    def cosines(make_optimizer: Any, options: dict[str, Any]) -> list[float]:
        torch.manual_seed(0)
        callback = observer(meta_data="val")
        trainer(callback, **options, max_epochs=1).fit(make(make_optimizer), **loaders())
        return [value for record in callback.history[:1] for value in record["cosine"] + record["held_out_cosine"]]

    # Matrix products are summed in another order there, at worst in TensorFloat32, which is good to 1e-3.
    expected = cosines(ON_THE_CPU[optimizer], {"accelerator": "cpu"})
    assert cosines(OPTIMIZERS[optimizer], GPU) == pytest.approx(expected, abs=1e-2) and expected


def test_the_average_lies_on_the_device_and_checkpoints_load_anywhere(trainer: Any, tmp_path: Path) -> None:
    callback = learner()
    fitted = trainer(callback, **GPU)
    fitted.fit(Rich(OPTIMIZERS["Adam, fused"]), **loaders())
    assert "cuda" in devices(callback.state_dict())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", map_location="cpu", weights_only=True)["callbacks"]["LearnToLearn"]
    assert devices(state) == {"cpu"}
    trainer(learner(), max_epochs=3, accelerator="cpu").fit(
        Rich(OPTIMIZERS["Adam, fused"]), **loaders(), ckpt_path=tmp_path / "x.ckpt"
    )


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [Rich, Recurrent])
def test_every_precision_trains_with_its_own_scaler(trainer: Any, precision: str, make: Any) -> None:
    callback = learner(initial_search=True, meta_data="val")
    trainer(callback, precision=precision, gradient_clip_val=1.0, **GPU).fit(make(), **loaders())
    assert callback.history and all(record["learning_rates"][0] > 0 for record in callback.history)


@pytest.mark.parametrize("make", [Rich, Recurrent])
def test_watching_changes_nothing_on_a_gpu(trainer: Any, make: Any) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        pl.seed_everything(0, verbose=False)
        module, fitted = make(), trainer(*callbacks, deterministic="warn", **GPU)
        fitted.fit(module, **loaders())
        return {**outcome(fitted, module), "cuda": torch.cuda.get_rng_state()}

    callback = observer(meta_data="val")
    assert difference(run(), run(callback)) == "" and callback.history


def test_resumed_on_a_gpu_equals_uninterrupted(trainer: Any, tmp_path: Path) -> None:
    found = []
    for path in (None, tmp_path / "8.ckpt"):
        callback = learner()
        data = {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}
        saves = [Saves(tmp_path / "8.ckpt", 8)] if path is None else []
        fitted = trainer(callback, *saves, max_epochs=3, **GPU)
        fitted.fit(Deterministic(OPTIMIZERS["Adam, fused"]), **data, ckpt_path=path)
        found.append(callback)
    # Sums on a GPU may come in another order.
    assert found[1].learning_rates == pytest.approx(found[0].learning_rates, rel=1e-4)
    assert [record["step"] for record in found[1].history] == [record["step"] for record in found[0].history]
