"""Learn the learning rate in a training loop of your own: two lines in it are new.

    python examples/plain_pytorch.py

Writes plain_pytorch.png: the rate and the held-out loss, constant and learned.
"""

from __future__ import annotations

import argparse

import torch
from digits_task import Digits, mlp
from torch import nn

from lightning_l2l import Displacement
from lightning_l2l.plotting import STYLES, new_figure


def train(learn: bool, epochs: int, learning_rate: float = 1e-4) -> list[tuple[int, float, float]]:
    """Train the small classifier; returns step, learning rate and held-out loss, after each epoch."""
    torch.manual_seed(0)
    data, model, loss_of = Digits(), mlp(), nn.CrossEntropyLoss()
    batches = data.train_dataloader()
    inputs, targets = data.held_out[:]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    # Attach to any optimizer ...
    tuner = Displacement().attach(optimizer, planned_steps=epochs * len(batches), modules=[model]) if learn else None
    # ... and, if you like to see the cosine with held-out gradients too, say how a held-out loss is computed.
    held_out = tuner.held_out_gradient(lambda: loss_of(model(inputs), targets)) if tuner else None

    seen, step = [], 0
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            if tuner is not None:
                tuner.step(loss, held_out=held_out)
            step += 1
        with torch.no_grad():
            seen.append((step, float(optimizer.param_groups[0]["lr"]), loss_of(model(inputs), targets).item()))
    if tuner is not None:
        tuner.close()  # the optimizer is an ordinary one again, at its last rate
    return seen


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[int, float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five epochs only")
    parser.add_argument("--plot", default="plain_pytorch.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    runs = {name: train(name == "learned", 5 if options.quick else 25) for name in ("constant", "learned")}
    figure, axes = new_figure(1, 2)
    for (name, run), style in zip(runs.items(), STYLES[1::-1], strict=True):
        steps, rates, losses = zip(*run, strict=True)
        axes[0, 0].plot(steps, rates, label=name, **style)
        axes[0, 1].plot(steps, losses, **style)
        print(f"{name:9} rate at the end: {rates[-1]:.3g}   held-out loss: {losses[-1]:.4f}")
    axes[0, 0].set(ylabel="learning rate", xlabel="training step", yscale="log")
    axes[0, 1].set(ylabel="held-out loss", xlabel="training step", yscale="log")
    axes[0, 0].legend(frameon=False)
    figure.savefig(options.plot)
    return runs


if __name__ == "__main__":
    main()
