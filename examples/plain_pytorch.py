"""LearnToLearn without Lightning: `meta_gradient` in a training loop of your own.

The loop is an ordinary one; what is new is the block after `step % EVERY_N_STEPS`:

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
from lightning_l2l.core.inner import mirror, read_state

UNROLL_STEPS, EVERY_N_STEPS, META_LEARNING_RATE = 5, 20, 0.3


def train(learn: bool, epochs: int, learning_rate: float = 0.01) -> tuple[list[float], float]:
    """Train the small classifier; returns the learning rates, one per meta-update, and the final test loss."""
    torch.manual_seed(0)
    data, model = Digits(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)

    def loss(parameters: dict[str, torch.Tensor], batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (batch[0],)), batch[1])

    # What is learned sits on a mirror of the live optimizer: same rule, same hyperparameters, differentiable.
    learned = LearnedStepSize().attach(mirror(optimizer, model.named_parameters()))
    meta_optimizer = torch.optim.Adam(learned.parameters(), lr=META_LEARNING_RATE, betas=(0.9, 0.99))
    remembered: deque[list[torch.Tensor]] = deque(maxlen=UNROLL_STEPS)
    held_out = list(data.val_dataloader())
    rates, step = [learning_rate], 0
    for _ in range(epochs):
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            loss(dict(model.named_parameters()), batch).backward()
            optimizer.step()
            remembered.append(batch)
            step += 1
            if not learn or step % EVERY_N_STEPS:
                continue
            # If the last five steps were taken again from here, how would the held-out loss depend on the rate?
            result = meta_gradient(
                loss,
                dict(model.named_parameters()),
                learned,
                list(remembered),
                held_out[step // EVERY_N_STEPS % len(held_out)],
                state=read_state(optimizer, model.named_parameters()),
            )
            if not result.usable:  # never apply what is not a gradient
                print(result.explain())
                continue
            for name, parameter in learned.named_parameters():
                parameter.grad = result.gradients[name]
            meta_optimizer.step()
            learned.project_()  # back into the bounds
            for group, values in zip(optimizer.param_groups, learned.values(), strict=True):
                group.update(values)
            rates.append(optimizer.param_groups[0]["lr"])
    with torch.no_grad():
        return rates, loss(dict(model.named_parameters()), next(iter(data.test_dataloader()))).item()


def main(arguments: list[str] | None = None) -> tuple[list[float], float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three epochs only")
    epochs = 3 if parser.parse_args(arguments).quick else 25
    _, without = train(learn=False, epochs=epochs)
    rates, with_learning = train(learn=True, epochs=epochs)
    print("learning rates:", " ".join(f"{rate:.3g}" for rate in rates))
    print(f"test loss: {without:.4f} at the constant rate {rates[0]:g}, {with_learning:.4f} learned")
    return rates, without, with_learning


if __name__ == "__main__":
    main()
