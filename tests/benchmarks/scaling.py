"""What the default costs as the model grows: a measured step, an update, and a whole training.

    python tests/benchmarks/scaling.py [--sizes 1e5 1e6 1e7 1e8] [--device cpu] [--rounds 5]

A stack of square layers with AdamW and 256 examples in a batch is trained by a plain loop. Between its steps the parts
of the default are timed on the live weights: the measurement of gradient and displacement with the running average's
share (of every step at first, of 64 steps each time that their number doubles later), and the guard's snapshot (at some
of the updates). The last columns are what follows for trainings of 1000 and 100,000 steps: measurements, and a snapshot
and a held-out gradient, counted as a training step, for each update.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lightning_l2l import Displacement
from lightning_l2l.guard import Snapshot

WIDTHS = {1e5: (128, 6), 1e6: (408, 6), 1e7: (1290, 6), 1e8: (4082, 6)}


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, the accelerator's included."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def measurements(steps: int) -> int:
    """How many of the first steps are measured."""
    return sum(step % max(1, step // 64) == 0 for step in range(steps))


def updates(steps: int) -> int:
    """How many updates there are."""
    return math.floor(math.log(steps / 10) / math.log(1.2)) + 2


def row(size: float, device: torch.device, rounds: int) -> str:
    """One line of the table."""
    width, layers = WIDTHS[size]
    torch.manual_seed(0)
    modules = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*modules).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    batch, target = torch.randn(256, width, device=device), torch.randn(256, width, device=device)

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(batch), target).backward()
        optimizer.step()

    train()
    plain = [timed(train, device) for _ in range(rounds)]
    tuner = Displacement().attach(optimizer, planned_steps=10**6, modules=[net])
    train()
    snapshot = Snapshot([net], optimizer)
    average, found = tuner.average, []
    for number in range(rounds):
        measured = timed(lambda: average.measure(0), device)
        folded = timed(lambda number=number: average.fold(number + 2), device)
        found.append((timed(train, device), measured + folded, timed(snapshot.take, device)))
    step = median(plain)
    measured, taken = (median(column) for column in list(zip(*found, strict=True))[1:])
    surplus = []
    for steps in (1000, 100_000):
        surplus.append((measurements(steps) * measured + updates(steps) * (taken + step)) / (steps * step))
    count = sum(parameter.numel() for parameter in net.parameters())
    cells = [f"{count:,}", f"{1e3 * step:.3g} ms", f"{1e3 * measured:.2g} ms", f"{measured / step:.1%}"]
    return "| " + " | ".join([*cells, f"{1e3 * taken:.2g} ms", *(f"{share:.2%}" for share in surplus)]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| parameters | training step | measurement | of a step | snapshot | of 1000 steps | of 100,000 steps |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        print(row(size, arguments.device, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
