"""A learned optimizer in a Lightning fit: clipping, accumulation, precision, schedules, resuming, a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnedOptimizer, MLPOptimizer, SmallFCOptimizer


class Regression(pl.LightningModule):
    def __init__(self, learned, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
        self.make = lambda parameters: learned.as_torch_optimizer(parameters, **arguments)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.layers(inputs) - targets).square().mean()

    def configure_optimizers(self):
        optimizer = self.make(self.layers.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader():
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(32, 4, generator=generator)
    targets = inputs[:, :1].sin() + 0.1 * torch.randn(32, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def fit(learned, root, ckpt_path=None, weight_decay=0.01, **options):
    settings = {"max_epochs": 2, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2} | options
    model = Regression(learned, weight_decay=weight_decay)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=root, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **settings,
    )  # fmt: skip
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return model, trainer


def learned_mlp():
    torch.manual_seed(1)
    return MLPOptimizer(initialisation="scaled", step_multiplier=0.01)


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.layers.parameters()])


def test_a_resumed_fit_is_the_uninterrupted_one_to_the_last_bit(tmp_path):
    whole, _ = fit(learned_mlp(), tmp_path)
    _, trainer = fit(learned_mlp(), tmp_path, max_epochs=1)
    checkpoint = tmp_path / "half.ckpt"
    trainer.save_checkpoint(checkpoint)
    resumed, _ = fit(learned_mlp(), tmp_path, ckpt_path=checkpoint)
    assert torch.equal(vector(whole), vector(resumed))
    # The state matters: from the weights alone the run is another one.
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_algorithm": "value"},
    ],
)
def test_trains_with_every_precision_and_clipping(options, tmp_path):
    torch.manual_seed(1)
    learned = SmallFCOptimizer(normalise_output=True)
    model, trainer = fit(learned, tmp_path, max_epochs=1, **options)
    assert vector(model).isfinite().all()
    start = vector(Regression(learned)).to(vector(model).dtype)
    assert not torch.equal(vector(model), start)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.9**4)
    assert {p.dtype for p in learned.parameters()} == {torch.float32}


_SCRIPT = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_learned_in_lightning import fit, vector
from lightning_l2l import LearnedOptimizer
torch.set_num_threads({threads})
model, _ = fit(LearnedOptimizer.load({path!r}), {root!r})
torch.save(vector(model), {result!r})
"""


def test_a_saved_optimizer_gives_the_same_fit_in_a_fresh_process(tmp_path):
    learned = learned_mlp()
    learned.horizon, learned.tasks = 100, "none"
    path, result = str(tmp_path / "learned.safetensors"), str(tmp_path / "result.pt")
    learned.save(path)
    here, _ = fit(learned, tmp_path)
    script = _SCRIPT.format(
        folder=str(Path(__file__).parent), threads=torch.get_num_threads(), path=path, root=str(tmp_path), result=result
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    assert torch.equal(torch.load(result, weights_only=True), vector(here))
    again, _ = fit(LearnedOptimizer.load(path), tmp_path)
    assert torch.equal(vector(again), vector(here))
