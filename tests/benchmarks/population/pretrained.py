"""The rule that comes with the package against AdamW, tuned for each task, on the population.

    python tests/benchmarks/population/pretrained.py --half judging [--lengths 100,300,1000] [--seeds 2] [--rule FILE]

Both follow a line to zero. AdamW has the best of eleven rates, half a decade apart, by the mean *test* loss, which
favours it; the rule has ``lr=1`` everywhere. Ratios of test losses, and of both to AdamW at 1e-3; a difference of a
thousandth of the initial loss counts as none. Matrices are given to the rule as torch has them, outputs first.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from engine import LINE, Runs, Task, train
from families import halves
from torch import Tensor

from lightning_l2l import LearnedOptimizer

RATES = [10 ** (exponent / 2) for exponent in range(-9, 2)]
USUAL = RATES.index(1e-3)


@torch.no_grad()
def by_rule(task: Task, learned: LearnedOptimizer, steps: int) -> Tensor:
    """Test losses of all seeds, trained side by side."""
    family, weights = task.family, task.initial.clone()
    optimizer, order = learned.transformation(), task.batches(steps)
    noise, rows = torch.Generator().manual_seed(5), torch.arange(task.seeds)

    def named(flat: Tensor) -> dict[str, Tensor]:
        pieces = enumerate(zip(flat.split(task.sizes), family.shapes, strict=True))
        return {str(i): p.view(shape).T if len(shape) == 2 else p.view(shape) for i, (p, shape) in pieces}

    def update(flat: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        moves, state = optimizer.update(named(gradient), state, params=named(flat), inplace=False)
        parts = [(move.T if move.dim() == 2 else move).reshape(-1) for move in moves.values()]
        return torch.cat(parts), state

    state = torch.func.vmap(lambda flat: optimizer.init(named(flat)))(weights)
    for step in range(steps):
        batch = [part[rows[:, None], order[:, step]] for part in task.train]
        if family.noise:
            batch.append(torch.stack([family.noise(noise, order.shape[2])] * task.seeds))
        with torch.enable_grad():
            gradient = task.gradient(weights, batch)[1]
        moved, state = torch.func.vmap(update)(weights, gradient, state)
        weights = weights + (1 - step / steps) * moved
    return task.losses(weights, task.test).nan_to_num(math.inf, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=["choosing", "judging", "unseen"], default="judging")
    parser.add_argument("--lengths", default="100,300,1000")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rule", type=Path, help="a file; the one that comes with the package if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learned = LearnedOptimizer.load(options.rule) if options.rule else LearnedOptimizer.pretrained("tensorwise")
    lines = Runs(torch.tensor(RATES), torch.full((len(RATES),), LINE))
    for steps in map(int, options.lengths.split(",")):
        ratios = {"tuned": [], "1e-3": []}  # type: dict[str, list[float]]
        for family in halves(options.half):
            task = Task(family, options.seeds)
            some = task.losses(task.initial, task.test).abs().mean() / 1000
            adamw = train(task, "adamw", steps, lines)["last"].mean(0)
            rule = by_rule(task, learned, steps).mean()
            for name, loss in (("tuned", adamw.min()), ("1e-3", adamw[USUAL])):
                ratio = (rule - loss).exp() if family.nats else (rule + some) / (loss + some)
                ratios[name].append(ratio.nan_to_num(math.inf, math.inf).item())
            best = RATES[int(adamw.argmin())]
            print(
                f"{steps:5} {family.name:22} {ratios['tuned'][-1]:6.2f} of AdamW at {best:.2g}, "
                f"{ratios['1e-3'][-1]:.2f} of AdamW at 1e-3", flush=True,
            )  # fmt: skip
        tuned = torch.tensor(ratios["tuned"])
        better = sum(ratio < 1 for ratio in ratios["1e-3"])
        print(
            f"{steps} steps, {len(tuned)} tasks: median {tuned.median():.2f}, 90 % {tuned.quantile(0.9):.2f}, worst "
            f"{tuned.max():.2f} of AdamW tuned; better than AdamW at 1e-3 on {better}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
