"""Signals of runs that generalise and of runs that learn by heart: agreement, signal-to-noise, and who was warned.

    python tests/benchmarks/signals.py

About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings

import lightning.pytorch as pl
import torch
from digits_tasks import Classifier, digits, test_loss
from plain_loop import QUIET
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnToLearn

# Name, images to train on, share of random labels, epochs.
TASKS = (
    ("healthy", 1000, 0.0, 25),
    ("healthy, long", 1000, 0.0, 100),
    ("20 % random labels", 1000, 0.2, 60),
    ("few, long", 128, 0.0, 600),
    ("few, 30 % random labels", 128, 0.3, 600),
)


def run(kind: str, optimizer: str, images: int, noise: float, epochs: int, seed: int) -> str:
    data = digits()
    inputs, labels = data.train.tensors
    inputs, labels = inputs[:images], labels[:images].clone()
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(images, generator=generator) < noise
    labels[noisy] = torch.randint(0, 10, (int(noisy.sum()),), generator=generator)
    torch.manual_seed(seed)
    module, callback = Classifier(kind, optimizer, 1e-3), LearnToLearn()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pl.Trainer(max_epochs=epochs, callbacks=[callback], **QUIET).fit(
            module, DataLoader(TensorDataset(inputs, labels), 64, shuffle=True), DataLoader(data.held_out, 64)
        )
    warned = any("overfits" in str(warning.message) for warning in seen)
    signals = [record["signals"] for record in callback.history]
    lowest = min((s["agreement"] for s in signals if math.isfinite(s["agreement"])), default=math.nan)
    noise_now, growth = signals[-1]["signal_to_noise"], signals[-1]["excess_growth"]
    loss = test_loss(module.net, data)
    return f"{loss:8.3f}{lowest:11.2f}{noise_now:8.1f}{growth:8.2f}  {'warned' if warned else ''}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    seeds = parser.parse_args(arguments).seeds
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"{'task':40}{'test':>8}{'agreement':>11}{'signal':>8}{'growth':>8}   (lowest; last; last)")
    for name, images, noise, epochs in TASKS:
        for kind, optimizer in (("mlp", "sgd"), ("mlp", "adam"), ("convnet", "sgd"), ("convnet", "adam")):
            for seed in range(seeds):
                title = f"{name}, {kind}, {optimizer}"
                print(f"{title:40}{run(kind, optimizer, images, noise, epochs, seed)}", flush=True)


if __name__ == "__main__":
    main()
