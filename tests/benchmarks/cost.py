"""What a meta-gradient costs, beside torchopt's in the same process, and what a fit with the callback costs.

    python tests/benchmarks/cost.py [--part unroll memory fit meta-training step] [--rounds 7] [--results cost.json]

(unroll) One exact meta-gradient of the step size of a 128-wide and a 1024-wide MLP, in every mode, over that by
    torchopt's MetaSGD or MetaAdam; and over the same number of plain training steps by torch.optim.
(memory) Peak of a fresh process above its start, 256-wide MLP, batch 128; on Linux.
(fit) A whole Lightning fit with ``LearnToLearn()`` and held-out batches of the training's size, over the same fit
    without.
(meta-training) ``meta_training.py``: milliseconds per task and inner step.
(step) One step of the rule that comes with its weights, over one of AdamW (foreach), for about a million parameters.

Contestants take turns (A B C A B C ...) in one process and one thread; quoted is the median of the ratios to the base
of the same round, with the smallest and the largest. Processor time, so that a busy machine says something, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from lightning_l2l import LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.functional import inner_optimizer

sys.path.insert(0, str(Path(__file__).parent))

RATE = 0.01
# (width, batch size, numbers of steps)
SIZES = ((128, 128, (5, 20, 100)), (1024, 512, (5, 20)))
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float], str]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, "MetaSGD"),
    "Adam": (torch.optim.Adam, {}, "MetaAdam"),
}
MODES = ("reverse", "forward", "segmented")
MEMORY_STEPS = {"forward": (100, 5000), "segmented": (100, 1000), "reverse": (100,), "torchopt": (100,)}


class Problem:
    """A classifier with two hidden layers of one width, a training and a held-out batch."""

    def __init__(self, width: int, batch: int) -> None:
        torch.manual_seed(0)
        # Not ReLU: torchopt's Adam is NaN where a unit is dead.
        layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
        self.net = nn.Sequential(*layers)
        self.train, self.held_out = ((torch.randn(batch, width), torch.randint(10, (batch,))) for _ in range(2))

    def loss(self, tensors: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy at given parameters."""
        return nn.functional.cross_entropy(functional_call(self.net, dict(tensors), (batch[0],)), batch[1])


def ours(mode: Any, optimizer: str, problem: Problem, steps: int) -> float:
    """The derivative of the held-out loss by the logarithm of the learning rate."""
    cls, options, _ = OPTIMIZERS[optimizer]
    learned = LearnedStepSize().attach(inner_optimizer(cls, lr=RATE, **options))
    found = meta_gradient(
        problem.loss,
        dict(problem.net.named_parameters()),
        learned,
        [problem.train] * steps,
        problem.held_out,
        estimator=Unroll(objective="naive", mode=mode),
    )
    return found.gradients["learning_rate"].item()


def by_torchopt(optimizer: str, problem: Problem, steps: int) -> float:
    """The same; its learning rate is a tensor that the derivative reaches."""
    _, options, name = OPTIMIZERS[optimizer]
    net, rate = copy.deepcopy(problem.net), torch.tensor(RATE, requires_grad=True)
    differentiable = getattr(torchopt, name)(net, lr=rate, **options)
    for _ in range(steps):
        differentiable.step(nn.functional.cross_entropy(net(problem.train[0]), problem.train[1]))
    nn.functional.cross_entropy(net(problem.held_out[0]), problem.held_out[1]).backward()
    assert rate.grad is not None
    return RATE * rate.grad.item()


def plain(optimizer: str, problem: Problem, steps: int) -> float:
    """The training itself, by torch.optim."""
    cls, options, _ = OPTIMIZERS[optimizer]
    net = copy.deepcopy(problem.net)
    live = cls(net.parameters(), lr=RATE, **options)  # type: ignore[call-arg]
    for _ in range(steps):
        live.zero_grad()
        nn.functional.cross_entropy(net(problem.train[0]), problem.train[1]).backward()
        live.step()
    return 0.0


def ratios(base: Callable[[], float], contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Median, smallest and largest ratio of each contestant's seconds to the base's, round by round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in (base, *contestants.values()):
        contestant()  # loads code
    for _ in range(rounds):
        own = base()
        for name, contestant in contestants.items():
            found[name].append(contestant() / own)
    return {name: [median(values), min(values), max(values)] for name, values in found.items()}


def seconds(function: Callable[[], float]) -> float:
    """Of this process's time."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def part_unroll(rounds: int) -> list[dict[str, Any]]:
    """One meta-gradient."""
    rows = []
    for width, batch, all_steps in SIZES:
        problem = Problem(width, batch)
        for optimizer, (_, _, name) in OPTIMIZERS.items():
            for steps in all_steps:
                expected = by_torchopt(optimizer, problem, steps)
                calls: dict[str, Callable[[], float]] = {
                    mode: partial(ours, mode, optimizer, problem, steps) for mode in MODES
                }
                error = max(abs(call() / expected - 1) for call in calls.values())
                calls["plain training"] = partial(plain, optimizer, problem, steps)
                base = partial(seconds, partial(by_torchopt, optimizer, problem, steps))
                found = ratios(base, {key: partial(seconds, call) for key, call in calls.items()}, rounds)
                rows.append({"width": width, "optimizer": optimizer, "steps": steps, "difference": error, **found})
                shown = "  ".join(f"{key} {_range(values)}" for key, values in found.items())
                print(f"{width:>5} wide  K = {steps:<4} / {name:<9} {shown}  differ by {error:.0e}", flush=True)
    return rows


def part_memory(rounds: int) -> list[dict[str, Any]]:
    """Peak memory, each in a process of its own."""
    rows = []
    # glibc gives freed blocks back at once; otherwise its fragmentation is measured as well.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, all_steps in MEMORY_STEPS.items():
        for steps in all_steps:
            command = [sys.executable, __file__, "--peak", name, str(steps)]
            run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **exact})
            rows.append({"contestant": name, "steps": steps, "megabytes": float(run.stdout.split()[-1])})
            print(f"{name:<10} K = {steps:<5} {rows[-1]['megabytes']:8.1f} MB", flush=True)
    return rows


def part_fit(rounds: int) -> list[dict[str, Any]]:
    """Whole fits."""
    import fits

    from lightning_l2l import LearnToLearn

    rows = []
    for model in fits.MODELS:

        def learning(model: Any = model) -> float:
            return fits.seconds(model, LearnToLearn(meta_data=fits.examples(model, seed=1)))

        values = ratios(partial(fits.seconds, model), {"LearnToLearn()": learning}, rounds)["LearnToLearn()"]
        rows.append({"model": model, "ratio": values})
        print(f"{model:<18} {_range(values)}", flush=True)
    return rows


def part_meta_training(rounds: int) -> list[dict[str, Any]]:
    """Meta-training over tasks, milliseconds per task and inner step."""
    import meta_training

    rows = [{"tasks": tasks, "milliseconds": meta_training.ours(tasks, rounds)} for tasks in (1, 8, 32)]
    print("  ".join(f"{row['tasks']} tasks {row['milliseconds']:.2f} ms" for row in rows), flush=True)
    return rows


def part_step(rounds: int) -> list[dict[str, Any]]:
    """The pretrained rule as an optimizer."""
    from lightning_l2l import LearnedOptimizer

    layers = [(64, 32, 3, 3), (64,), (64,), (192, 64), (192,), (64, 64), (64,), (256, 64), (256,), (64, 256), (64,)]
    layouts = {"one matrix": [(1000, 1000)], "57 tensors": [*layers * 5, (10_000, 64), (1000, 64)]}
    rows = []
    for name, shapes in layouts.items():
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        adamw = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
        rule = LearnedOptimizer.pretrained("tensorwise").as_torch_optimizer(parameters)
        # The least of five: a busy machine makes steps slower, never faster.
        base, contestant = (
            partial(lambda step: min(seconds(step) for _ in range(5)), optimizer.step) for optimizer in (adamw, rule)
        )
        count = sum(parameter.numel() for parameter in parameters)
        rows.append(
            {"tensors": name, "parameters": count, "adamw": base(), **ratios(base, {"rule": contestant}, rounds)}
        )
        print(f"{name:<11} {count} parameters  AdamW {1e3 * rows[-1]['adamw']:.2f} ms  rule {_range(rows[-1]['rule'])}")
    return rows


def peak(name: str, steps: int) -> float:
    """Megabytes that one meta-gradient adds to this process, on Linux."""
    contestant = partial(by_torchopt, "SGD") if name == "torchopt" else partial(ours, name, "SGD")
    contestant(Problem(8, 8), 3)  # loads code
    problem = Problem(256, 128)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    contestant(problem, steps)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """Kilobytes, from the kernel's account of this process."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def _range(values: list[float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


PARTS = {
    "unroll": part_unroll,
    "memory": part_memory,
    "fit": part_fit,
    "meta-training": part_meta_training,
    "step": part_step,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="read, and written with the parts that ran replaced")
    parser.add_argument("--peak", nargs=2, metavar=("CONTESTANT", "STEPS"), help="one number, for the memory part")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
        return
    known = arguments.results is not None and arguments.results.exists()
    results = json.loads(arguments.results.read_text()) if known else {}
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    for part in arguments.part:
        results[part] = PARTS[part](arguments.rounds)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
