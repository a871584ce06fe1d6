"""On a GPU: everything that we keep lies where the run has it, and the promises of the other tests hold there.

Skipped without a CUDA device: `python -m pytest -m gpu` on a machine that has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import ALONG, Deterministic, Plain, Resumable, Rich, difference, learner, loaders, observer, outcome
from torch import nn
from torch.nn import functional

from lightning_l2l import LearnedStepSize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*", "ignore:.*TensorFloat32.*"),
]

GPU: dict[str, Any] = {"accelerator": "cuda", "devices": 1}


class Recurrent(Plain):
    """A cuDNN LSTM, which has no second derivative there."""

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
    """Of every tensor in plain containers."""
    return {item.device.type for item in torch.utils._pytree.tree_leaves(value) if isinstance(item, torch.Tensor)}


def learned_rates(callback: Any, count: int = 4) -> list[float]:
    rates = [record["learning_rates"][0] for record in callback.history]
    assert len(set(rates)) == count and all(rate > 0 for rate in rates)
    return rates


@pytest.mark.parametrize("estimator", ["forward", "reverse", "displacement"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [Plain, Rich, Recurrent])
def test_learns_on_a_gpu_about_what_it_learns_on_the_cpu(
    trainer: Any, make: Any, optimizer: str, estimator: Any
) -> None:
    def first_gradient(make_optimizer: Any, options: dict[str, Any]) -> float:
        torch.manual_seed(0)
        callback = observer(estimator=estimator)
        module = make(make_optimizer)
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0  # the devices draw other numbers
        trainer(callback, **options, max_epochs=1).fit(module, **loaders())
        return float(callback.history[0]["meta_gradient"]["learning_rate"][0])

    found = first_gradient(OPTIMIZERS[optimizer], GPU)
    # Matrix products are summed in another order there, at worst in TensorFloat32, which is good to 1e-3.
    assert (
        found == pytest.approx(first_gradient(ON_THE_CPU[optimizer], {"accelerator": "cpu"}), rel=1e-2) and found != 0
    )


@pytest.mark.parametrize(
    ("per", "estimator"), [("group", "displacement"), ("tensor", "displacement"), ("tensor", "reverse")]
)
def test_what_is_kept_lies_where_the_run_has_it_and_checkpoints_load_anywhere(
    trainer: Any, tmp_path: Path, per: Any, estimator: Any
) -> None:
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            source = callback._session.source
            windows.append(devices([list(window.batches) for window in source._windows.last()]))
            windows.append(devices(source.state_dict()["along"].get("average")))

    windows: list[set[str]] = []
    callback = learner(learned=LearnedStepSize(per=per), estimator=estimator)
    fitted = trainer(callback, Looks(), **GPU)
    fitted.fit(Rich(OPTIMIZERS["Adam, fused"]), **loaders())
    learned_rates(callback)
    assert {"cuda"} in windows and all(kinds <= {"cuda"} for kinds in windows)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", map_location="cpu", weights_only=True)["callbacks"]["LearnToLearn"]
    assert devices(state) == {"cpu"}


# The live estimator refuses cuDNN's recurrent networks.
WATCHED = [(Rich, "displacement"), (Rich, "live"), (Recurrent, "displacement"), (Recurrent, "forward")]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(("make", "estimator"), WATCHED)
def test_every_precision_trains_with_its_own_scaler(trainer: Any, precision: str, make: Any, estimator: Any) -> None:
    callback = learner(initial_search=True, estimator=estimator)
    trainer(callback, precision=precision, gradient_clip_val=1.0, **GPU).fit(make(), **loaders())
    assert len(callback.history) == 4 and callback.search_result is not None
    assert all(record["learning_rates"][0] > 0 for record in callback.history)


@pytest.mark.parametrize(("make", "estimator"), WATCHED)
def test_watching_changes_nothing_on_a_gpu(trainer: Any, make: Any, estimator: Any) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        pl.seed_everything(0, verbose=False)
        module, fitted = make(), trainer(*callbacks, deterministic="warn", **GPU)
        fitted.fit(module, **loaders())
        return {**outcome(fitted, module), "cuda": torch.cuda.get_rng_state()}

    callback = observer(estimator=estimator)
    assert difference(run(), run(callback)) == "" and len(callback.history) == 4


@pytest.mark.parametrize("estimator", ALONG)
def test_resumed_on_a_gpu_equals_uninterrupted(trainer: Any, tmp_path: Path, estimator: Any) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "8.ckpt")

    def data() -> dict[str, Any]:
        return {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}

    whole, again = learner(estimator=estimator), learner(estimator=estimator)
    trainer(whole, Saves(), max_epochs=3, **GPU).fit(Deterministic(OPTIMIZERS["Adam, fused"]), **data())
    resumed = trainer(again, max_epochs=3, **GPU)
    resumed.fit(Deterministic(OPTIMIZERS["Adam, fused"]), **data(), ckpt_path=tmp_path / "8.ckpt")
    # Sums on a GPU may come in another order.
    assert again.learning_rates == pytest.approx(whole.learning_rates, rel=1e-4)
    assert [record["step"] for record in again.history] == [record["step"] for record in whole.history]
