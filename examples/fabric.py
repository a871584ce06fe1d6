"""LearnToLearn with Lightning Fabric, without a Trainer: `meta_gradient` and the callback's own meta-optimizer.

Fabric keeps device, precision and backward pass; what is added is the block under `if learn`. Writes fabric.png, the
rate and the held-out loss, constant and learned:

    python examples/fabric.py
"""

from __future__ import annotations

import argparse
from collections import deque

import torch
from digits_task import Digits, mlp, prepare
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.functional import mirror, read_state
from lightning_l2l.plotting import STYLES, new_figure

UNROLL_STEPS, EVERY_N_STEPS, META_LEARNING_RATE = 3, 20, 0.4


def train(fabric: Fabric, learn: bool, epochs: int, learning_rate: float = 1e-3) -> list[tuple[int, float, float]]:
    """Train the small classifier; returns step, learning rate and held-out loss, at the start and every 20 steps."""
    fabric.seed_everything(0, verbose=False)
    data, network = Digits(), mlp()
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9))
    batches, held_out = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())
    judges = list(held_out)

    def loss(parameters: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(network, parameters, (batch[0],)), batch[1])

    def held_out_loss() -> float:
        with torch.no_grad():
            return sum(loss(dict(network.named_parameters()), batch).item() for batch in judges) / len(judges)

    # The network and the optimizer that Fabric has wrapped are still the live ones: they are what is looked at.
    learned = LearnedStepSize().attach(mirror(optimizer.optimizer, network.named_parameters()))
    meta_optimizer = MetaOptimizer(learned.parameters(), META_LEARNING_RATE)
    remembered: deque[list[Tensor]] = deque(maxlen=UNROLL_STEPS)
    seen, step = [(0, learning_rate, held_out_loss())], 0
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
            optimizer.step()
            remembered.append(batch)
            step += 1
            if step % EVERY_N_STEPS:
                continue
            if learn:
                state = read_state(optimizer.optimizer, network.named_parameters())
                judge = judges[step // EVERY_N_STEPS % len(judges)]
                parameters = dict(network.named_parameters())
                result = meta_gradient(loss, parameters, learned, list(remembered), judge, state=state)
                if result.usable:  # never apply what is not a gradient
                    meta_optimizer.apply(learned, result.gradients)
                    learned.project_()  # back into the bounds
                    for group, values in zip(optimizer.param_groups, learned.values(), strict=True):
                        group.update(values)
                else:
                    fabric.print(result.explain())
            seen.append((step, optimizer.param_groups[0]["lr"], held_out_loss()))
    return seen


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[int, float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five epochs only")
    parser.add_argument("--plot", default="fabric.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    epochs = 5 if options.quick else 40
    prepare()
    fabric = Fabric(accelerator="cpu", devices=1)
    runs = {name: train(fabric, name == "learned", epochs) for name in ("constant", "learned")}
    figure, axes = new_figure(1, 2)
    for (name, run), style in zip(runs.items(), STYLES[1::-1], strict=True):
        steps, rates, losses = zip(*run, strict=True)
        for axis, values in zip(axes[0], (rates, losses), strict=True):
            axis.plot(steps, values, label=name, **style)
        fabric.print(f"{name:9} rate: {rates[0]:g} to {rates[-1]:.3g}   held-out loss: {losses[-1]:.4f}")
    axes[0, 0].set(ylabel="learning rate", xlabel="training step", yscale="log")
    axes[0, 1].set(ylabel="held-out loss", xlabel="training step", yscale="log")
    axes[0, 0].legend(frameon=False)
    figure.savefig(options.plot)
    return runs


if __name__ == "__main__":
    main()
