"""What one exact meta-gradient of a quadratic costs: ``python tests/benchmarks/quadratic_cost.py``.

The closed form is O(d) per meta-gradient after one eigendecomposition; plain back-propagation through the t steps, in
float64, stands beside it. Median and spread of the repetitions in milliseconds, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import torch

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic


def milliseconds(call: Callable[[], object], repetitions: int) -> str:
    call()
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return f"{statistics.median(found):10.3f} [{min(found):.3f} .. {max(found):.3f}]"


def back_propagation(task: Quadratic, step_size: float, steps: int) -> torch.Tensor:
    rate = torch.tensor(step_size, dtype=torch.float64, requires_grad=True)
    point = task.initial_point
    for _ in range(steps):
        point = point - rate * (task.hessian @ point)
    loss = (0.5 * point @ task.hessian @ point).log() / steps
    return torch.autograd.grad(loss, rate)[0]


def engine_peak(task: Quadratic, steps: int, estimator: str) -> float:
    """Peak of Python's own allocations in MB (tensors are not in it; their count is what grows)."""
    learned = LearnedStepSize(minimum=1e-12).attach(
        inner_optimizer(torch.optim.SGD, lr=0.5 * float(task.stability_limit))
    )
    tracemalloc.start()
    meta_gradient(task, task.initial_parameters(), learned, [None] * steps, None, estimator=estimator)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    print(f"{'d':>5} {'t':>6}  {'eigendecomposition':>30} {'closed form':>30} {'back-propagation':>30}")
    for dim, steps in ((20, 80), (100, 80), (500, 80), (500, 1000)):
        task = Quadratic.random(dim, seed=0)
        step_size = 0.5 * float(task.stability_limit)
        calls = (
            partial(torch.linalg.eigh, task.hessian),
            partial(task.meta_gradient, step_size, steps),
            partial(back_propagation, task, step_size, steps),
        )
        print(f"{dim:5} {steps:6}  " + " ".join(f"{milliseconds(call, repetitions):>30}" for call in calls))
    print("\nthe general engine, d = 20: peak of Python allocations in MB")
    task = Quadratic.random(20, seed=0)
    for estimator in ("forward", "reverse"):
        row = " ".join(f"t={steps}: {engine_peak(task, steps, estimator):.2f}" for steps in (100, 1000))
        print(f"  {estimator:8} {row}")


if __name__ == "__main__":
    main()
