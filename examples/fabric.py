"""Learn the learning rate with Lightning Fabric: the same two lines as in a plain loop.

    python examples/fabric.py

Prints the rate and the held-out loss after each epoch, constant and learned.
"""

from __future__ import annotations

import argparse

import torch
from digits_task import Digits, mlp, prepare
from lightning.fabric import Fabric
from torch import nn

from lightning_l2l import Displacement


def train(fabric: Fabric, learn: bool, epochs: int, learning_rate: float = 1e-4) -> list[tuple[float, float]]:
    """Train the small classifier; returns learning rate and held-out loss after each epoch."""
    fabric.seed_everything(0, verbose=False)
    data, network, loss_of = Digits(), mlp(), nn.CrossEntropyLoss()
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9))
    batches = fabric.setup_dataloaders(data.train_dataloader())
    inputs, targets = fabric.to_device(data.held_out[:])
    tuner = Displacement().attach(optimizer, planned_steps=epochs * len(batches), modules=[network]) if learn else None

    seen = []
    for epoch in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model(batch[0]), batch[1])
            fabric.backward(loss)
            optimizer.step()
            if tuner is not None:
                tuner.step(loss)
        with torch.no_grad():
            seen.append((float(optimizer.param_groups[0]["lr"]), loss_of(model(inputs), targets).item()))
        if epoch % 5 == 4:
            fabric.print(f"epoch {epoch + 1:3}   rate {seen[-1][0]:.3g}   held-out loss {seen[-1][1]:.4f}")
    return seen


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five epochs only")
    epochs = 5 if parser.parse_args(arguments).quick else 25
    prepare()
    fabric = Fabric(accelerator="cpu", devices=1)
    runs = {}
    for name in ("constant", "learned"):
        fabric.print(f"{name}:")
        runs[name] = train(fabric, name == "learned", epochs)
    return runs


if __name__ == "__main__":
    main()
