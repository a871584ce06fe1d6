"""LearnToLearn without Lightning: `meta_gradient` in a training loop of your own.

The loop is an ordinary one; what is new is the block under `if learn`. Writes plain_pytorch.png, the rate and the
held-out loss, constant and learned:

    python examples/plain_pytorch.py
"""

from __future__ import annotations

import argparse
from collections import deque

import torch
from digits_task import Digits, mlp
from torch import nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.functional import mirror, read_state
from lightning_l2l.plotting import STYLES, new_figure

UNROLL_STEPS, EVERY_N_STEPS, META_LEARNING_RATE = 5, 20, 0.3


def train(learn: bool, epochs: int, learning_rate: float = 0.01) -> tuple[list[tuple[int, float, float]], float]:
    """Train the small classifier; returns step, rate and held-out loss every 20 steps, and the test loss at the end."""
    torch.manual_seed(0)
    data, model = Digits(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)

    def loss(parameters: dict[str, torch.Tensor], batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (batch[0],)), batch[1])

    def present_loss(batch: tuple[torch.Tensor, ...]) -> float:
        with torch.no_grad():
            return loss(dict(model.named_parameters()), batch).item()

    # What is learned sits on a mirror of the live optimizer: same rule, same hyperparameters, differentiable.
    learned = LearnedStepSize().attach(mirror(optimizer, model.named_parameters()))
    meta_optimizer = torch.optim.Adam(learned.parameters(), lr=META_LEARNING_RATE, betas=(0.9, 0.99))
    remembered: deque[list[torch.Tensor]] = deque(maxlen=UNROLL_STEPS)
    held_out = list(data.val_dataloader())
    seen, step = [(0, learning_rate, present_loss(data.held_out[:]))], 0
    for batch in (batch for _ in range(epochs) for batch in data.train_dataloader()):
        optimizer.zero_grad()
        loss(dict(model.named_parameters()), batch).backward()
        optimizer.step()
        remembered.append(batch)
        step += 1
        if step % EVERY_N_STEPS:
            continue
        if learn:
            # If the last five steps were taken again from here, how would the held-out loss depend on the rate?
            result = meta_gradient(
                loss,
                dict(model.named_parameters()),
                learned,
                list(remembered),
                held_out[step // EVERY_N_STEPS % len(held_out)],
                state=read_state(optimizer, model.named_parameters()),
            )
            if result.usable:  # never apply what is not a gradient
                for name, parameter in learned.named_parameters():
                    parameter.grad = result.gradients[name]
                meta_optimizer.step()
                learned.project_()  # back into the bounds
                for group, values in zip(optimizer.param_groups, learned.values(), strict=True):
                    group.update(values)
            else:
                print(result.explain())
        seen.append((step, optimizer.param_groups[0]["lr"], present_loss(data.held_out[:])))
    return seen, present_loss(data.test[:])


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[tuple[int, float, float]], float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three epochs only")
    parser.add_argument("--plot", default="plain_pytorch.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    runs = {name: train(name == "learned", 3 if options.quick else 25) for name in ("constant", "learned")}
    figure, axes = new_figure(1, 2)
    for (name, (seen, test_loss)), style in zip(runs.items(), STYLES[1::-1], strict=True):
        steps, rates, losses = zip(*seen, strict=True)
        axes[0, 0].plot(steps, rates, label=name, **style)
        axes[0, 1].plot(steps, losses, **style)
        print(f"{name:9} rate: {rates[0]:g} to {rates[-1]:.3g}   test loss: {test_loss:.4f}")
    axes[0, 0].set(ylabel="learning rate", xlabel="training step", yscale="log")
    axes[0, 1].set(ylabel="held-out loss", xlabel="training step", yscale="log")
    axes[0, 0].legend(frameon=False)
    figure.savefig(options.plot)
    return runs


if __name__ == "__main__":
    main()
