"""What a meta-gradient costs, beside the same training without one and beside every peer that is installed.

    python tests/benchmarks/cost.py [--part a b c memory mirror] [--rounds 5] [--results cost.json] [--figure cost.png]

(a) One exact meta-gradient of the step size (SGD with momentum) of a 128-wide and a 1024-wide MLP, over the time of the
    same number of plain training steps. higher and JAX take part where they are installed; JAX is compared with its own
    training, after compiling.
(b) A whole Lightning fit with the callback at default settings and held-out batches of the training's size, after the
    initial search, over the same fit without.
(c) Throughput of meta-training (``meta_training.py``, which also measures its memory).
(memory) Peak of a fresh process above its start, 256-wide MLP; on Linux.
(mirror) One step of the mirror, new parameters and new state, over one step of torch.optim in place (``foreach``), for
    500 tensors of 48 elements on average.

Contestants take turns (A B C A B C ...) in one process and one thread; quoted is the median of the ratios to the plain
training of the same round, with the smallest and the largest. Processor time, so that a busy machine says something,
too.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).parent))
import meta_training
from fits import MODELS, examples, seconds
from peers import JAX, PEERS, Problem, plain

from lightning_l2l import LearnToLearn
from lightning_l2l.functional import mirror, read_state

# (width, batch size, numbers of steps)
SIZES = ((128, 128, (5, 20, 100, 400)), (1024, 512, (20,)))
FITS: dict[str, dict[str, Any]] = {"default": {}, "exact, three live steps": {"estimator": "live"}}
PARTS = ("a", "b", "c", "memory", "mirror")
MEMORY_STEPS = {"ours, forward": (10, 100, 400, 5000), "torchopt.MetaSGD": (10, 100, 400), "higher": (10, 100, 400)}


def processor_time(function: Callable[[Problem, int], float], problem: Problem, steps: int) -> float:
    """Seconds of this process."""
    begun = time.process_time()
    function(problem, steps)
    return time.process_time() - begun


def ratios(baseline: Callable[[], float], contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Median, smallest and largest ratio of each contestant's seconds to the baseline's, round by round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in (baseline, *contestants.values()):
        contestant()  # loads code, compiles
    for _ in range(rounds):
        base = baseline()
        for name, contestant in contestants.items():
            found[name].append(contestant() / base)
    return {name: [median(values), min(values), max(values)] for name, values in found.items()}


def part_a(rounds: int) -> list[dict[str, Any]]:
    """One meta-gradient."""
    rows = []
    for width, batch, all_steps in SIZES:
        problem = Problem(width, batch)
        for steps in all_steps:
            bind = partial(partial, processor_time, problem=problem, steps=steps)
            found = ratios(bind(plain), {name: bind(f) for name, f in PEERS.items()}, rounds)
            if JAX:
                others = {f"JAX, {name}": bind(f) for name, f in JAX.items() if name != "plain"}
                found |= ratios(bind(JAX["plain"]), others, rounds)
            for name, values in found.items():
                rows.append({"width": width, "steps": steps, "contestant": name, "ratio": values})
                print(f"{width:>5} wide  K = {steps:<4} {name:<22} {_range(values)}", flush=True)
    return rows


def part_b(rounds: int) -> list[dict[str, Any]]:
    """Whole fits."""
    rows = []
    for model in MODELS:
        with_callback = {
            name: lambda options=options, model=model: seconds(
                model, LearnToLearn(meta_data=examples(model, seed=1), initial_search=False, **options)
            )
            for name, options in FITS.items()
        }
        found = ratios(lambda model=model: seconds(model), with_callback, rounds)
        for name, values in found.items():
            rows.append({"model": model, "contestant": name, "ratio": values})
            print(f"{model:<18} {name:<16} {_range(values)}", flush=True)
    return rows


def part_c(rounds: int) -> list[dict[str, Any]]:
    """Meta-training over tasks, milliseconds per task and inner step."""
    rows = []
    for tasks in (1, 8, 32):
        found = {"ours": meta_training.ours(tasks, rounds)}
        if JAX:
            found["JAX"] = meta_training.in_jax(tasks, rounds)[0]
        rows += [{"tasks": tasks, "contestant": name, "milliseconds": value} for name, value in found.items()]
        print(f"{tasks:>3} tasks  " + ", ".join(f"{name} {value:.2f} ms" for name, value in found.items()), flush=True)
    return rows


def part_memory() -> list[dict[str, Any]]:
    """Peak memory, each in a process of its own."""
    rows = []
    # glibc gives freed blocks back at once; otherwise its fragmentation is measured as well.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, all_steps in MEMORY_STEPS.items():
        for steps in all_steps if name in PEERS else ():
            command = [sys.executable, __file__, "--peak", name, str(steps)]
            run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **exact})
            rows.append({"contestant": name, "steps": steps, "megabytes": float(run.stdout.split()[-1])})
            print(f"{name:<22} K = {steps:<5} {rows[-1]['megabytes']:8.1f} MB", flush=True)
    return rows


def part_mirror(rounds: int) -> list[dict[str, Any]]:
    """Many small tensors."""
    rows = []
    for name, options in {"SGD": {"momentum": 0.9}, "AdamW": {}}.items():
        parameters = {str(index): torch.nn.Parameter(torch.randn(32, 2 if index % 2 else 1)) for index in range(500)}
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer = getattr(torch.optim, name)(parameters.values(), lr=1e-3, foreach=True, **options)
        optimizer.step()
        inner = mirror(optimizer, parameters.items())
        state = read_state(optimizer, parameters.items())
        given = {key: parameter.grad for key, parameter in parameters.items()}

        def stepping(optimizer: Any = optimizer) -> float:
            begun = time.process_time()
            for _ in range(20):
                optimizer.step()
            return time.process_time() - begun

        def mirroring(inner: Any = inner, given: Any = given, state: Any = state, own: Any = parameters) -> float:
            begun = time.process_time()
            with torch.no_grad():
                moved: Any = own
                for _ in range(20):
                    moved, state = inner.step([{}], moved, given, state)
            return time.process_time() - begun

        values = ratios(stepping, {"mirror": mirroring}, rounds)["mirror"]
        rows.append({"contestant": name, "ratio": values})
        print(f"500 tensors, {name:<8} {_range(values)}", flush=True)
    return rows


def peak(name: str, steps: int) -> float:
    """Megabytes that one meta-gradient adds to this process, on Linux."""
    PEERS[name](Problem(8, 8), 3)  # loads code
    problem = Problem(256, 128)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    PEERS[name](problem, steps)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """Kilobytes, from the kernel's account of this process."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def _range(values: list[float]) -> str:
    return f"{values[0]:5.2f}  ({values[1]:.2f} to {values[2]:.2f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """The ratios over K, the memory over K, and the fits."""
    import matplotlib.pyplot as plt

    from lightning_l2l.plotting import STYLES

    figure, (left, middle, right) = plt.subplots(3, 1, figsize=(6.5, 9.5), constrained_layout=True)
    small = [row for row in results["a"] if row["width"] == SIZES[0][0]]
    for style, name in zip(STYLES, dict.fromkeys(row["contestant"] for row in small), strict=False):
        mine = [row for row in small if row["contestant"] == name]
        left.plot([r["steps"] for r in mine], [r["ratio"][0] for r in mine], marker="o", label=name, **style)
    left.axhline(3.0, color="0.6", linewidth=0.8)
    left.set(xscale="log", xlabel="steps K", ylabel="time / K plain steps", title="One meta-gradient, MLP of width 128")
    left.set_ylim(2.0, 5.8)
    left.legend(fontsize=8, loc="upper left", ncol=2)
    for style, name in zip(STYLES, dict.fromkeys(row["contestant"] for row in results["memory"]), strict=False):
        mine = [row for row in results["memory"] if row["contestant"] == name]
        middle.plot([r["steps"] for r in mine], [r["megabytes"] for r in mine], marker="o", label=name, **style)
    middle.set(xscale="log", yscale="log", xlabel="steps K", ylabel="MB", title="Peak memory, MLP of width 256")
    middle.legend(fontsize=8)
    names = list(FITS)
    for place, (style, name) in enumerate(zip(STYLES, names, strict=False)):
        mine = [row for row in results["b"] if row["contestant"] == name]
        positions = [index + (place - 0.5) * 0.35 for index in range(len(mine))]
        right.bar(positions, [r["ratio"][0] for r in mine], 0.33, label=name, color=style["color"])
    right.set_xticks(range(len(MODELS)), [name.replace(" small", "\nsmall") for name in MODELS])
    right.axhline(1.0, color="0.6", linewidth=0.8)
    right.set(ylabel="fit / plain fit", title="A fit, after the search", ylim=(0.0, 1.9))
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="read, and written with the parts that ran replaced")
    parser.add_argument("--figure", type=Path)
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
    rounds = arguments.rounds
    parts = {
        "a": lambda: part_a(rounds),
        "b": lambda: part_b(rounds),
        "c": lambda: part_c(rounds),
        "memory": part_memory,
        "mirror": lambda: part_mirror(rounds),
    }
    for part in arguments.part:
        results[part] = parts[part]()
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.figure:
        draw(results, arguments.figure)


if __name__ == "__main__":
    main()
