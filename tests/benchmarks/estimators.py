"""Time and peak memory of every estimator over the number of inner steps, each in a fresh process.

    python tests/benchmarks/estimators.py --results docs/figures/estimators.json --figure docs/figures/estimators.png

Per row: processor seconds of one meta-gradient (the median of three, one thread), the peak of the process above its
start in megabytes, and what ``plan`` had predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.plan import plan
from lightning_l2l.functional import inner_optimizer

ESTIMATORS = ("forward", "reverse", "segmented", "es", "mixed")
STEPS = (10, 30, 100, 300, 1000)
PARTICLES = 8
# glibc gives freed blocks back at once; otherwise its fragmentation is measured as well (30 MB at K = 1000), and it
# costs time, so memory and time are measured in two runs.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def problem(width: int) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A network of four layers (200 000 parameters at width 256), its loss and a batch of 64."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)]
    net = nn.Sequential(*layers, nn.Linear(width, 10))

    def loss(tensors, batch):
        return nn.functional.cross_entropy(functional_call(net, dict(tensors), (batch[0],)), batch[1])

    return loss, dict(net.named_parameters()), (torch.randn(64, width), torch.randint(10, (64,)))


def measure(estimator: str, steps: int, repeats: int) -> dict[str, float]:
    """One row: SGD with momentum, one learned step size."""
    torch.set_num_threads(1)
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.01, momentum=0.9))
    particles = Particles(PARTICLES, 0.1, seed=0)
    options = {"estimator": estimator, "particles": particles}

    loss, params, batch = problem(8)
    meta_gradient(loss, params, learned, [batch] * 3, batch, **options)  # loads code
    loss, params, batch = problem(256)
    predicted = plan(loss, params, learned, [batch] * steps, particles=particles)
    memory = next(choice.memory for choice in predicted.choices if choice.estimator == estimator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        meta_gradient(loss, params, learned, [batch] * steps, batch, **options)
        seconds.append(time.process_time() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": median(seconds), "megabytes": peak, "predicted_megabytes": (memory or 0) / 2**20}


def main() -> None:
    """Run all rows, print a table, save and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("ESTIMATOR", "STEPS"), help="one row, as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=4000.0, help="megabytes above which a row is left out")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.repeats)))
        return
    rows = []
    print(f"{'estimator':<10}{'K':>6}{'seconds':>10}{'MB':>10}{'predicted MB':>14}")
    for estimator in ESTIMATORS:
        for steps in STEPS:
            known = [row for row in rows if row["estimator"] == estimator]
            if (
                known
                and known[-1]["predicted_megabytes"] * steps / known[-1]["steps"] > arguments.limit
                and (estimator in ("reverse", "mixed"))
            ):
                print(f"{estimator:<10}{steps:>6}   (more than {arguments.limit:.0f} MB)")
                continue
            command = [sys.executable, __file__, "--one", estimator, str(steps), "--repeats", str(arguments.repeats)]
            timed, counted = (
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
                for environment in (dict(os.environ), {**os.environ, **EXACT_MEMORY})
            )
            row = {"estimator": estimator, "steps": steps, **counted, "seconds": timed["seconds"]}
            rows.append(row)
            print(
                f"{estimator:<10}{steps:>6}{row['seconds']:>10.2f}{row['megabytes']:>10.1f}"
                f"{row['predicted_megabytes']:>14.1f}",
                flush=True,
            )
    if arguments.results:
        arguments.results.write_text(json.dumps(rows, indent=1))
    if arguments.figure:
        draw(rows, arguments.figure)


def draw(rows: list[dict], path: Path) -> None:
    """Time and memory over K."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for index, estimator in enumerate(ESTIMATORS):
        mine = [row for row in rows if row["estimator"] == estimator]
        steps = [row["steps"] for row in mine]
        left.loglog(steps, [row["seconds"] for row in mine], "o-", color=f"C{index}", label=estimator)
        right.loglog(steps, [max(row["megabytes"], 0.1) for row in mine], "o-", color=f"C{index}", label=estimator)
        right.loglog(steps, [row["predicted_megabytes"] for row in mine], ":", color=f"C{index}")
    left.set(xlabel="inner steps K", ylabel="processor seconds", title="One meta-gradient")
    right.set(xlabel="inner steps K", ylabel="MB", title="Peak memory above the start (dotted: predicted)")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
