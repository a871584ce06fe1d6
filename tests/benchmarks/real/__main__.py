"""``LearnToLearn`` on tasks of real kind, beside what one would take instead.

    pip install -c constraints.txt '.[benchmarks]'
    python tests/benchmarks/real [--tasks NAMES] [--seeds 3] [--rows NAMES] [--report]
    python tests/benchmarks/real --times [--tasks NAMES] [--seeds 3]

Every finished run is a row of ``docs/figures/evidence.csv``; rows that are there are not run again, so an interrupted
run goes on. Runs are paired: for one seed and task all start from the same weights and see the same batches. Each has
a process of its own, with one thread. ``--times`` runs the usual rate without and with ``LearnToLearn`` in alternation
into ``evidence-times.csv``, from which time and memory are taken; nothing else should run on the machine meanwhile.
At the end the tables are printed and put into ``docs/evidence.md``, and the figures are drawn.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import torch
from report import draw, write_page
from runs import Outcome, Run, execute, tasks_of
from tasks import TASKS

DOCS = Path(__file__).resolve().parents[3] / "docs"
CARELESS = 1e-5
# Method, factors on the usual rate, with the user's schedule.
ROWS: dict[str, tuple[str, tuple[float, ...], bool]] = {
    "usual": ("plain", (1.0,), False),
    "l2l-usual": ("LearnToLearn", (1.0,), False),
    "l2l-average": ("averaged", (1.0,), False),
    "schedule": ("plain", (1.0,), True),
    "l2l-schedule": ("LearnToLearn", (1.0,), True),
    "careless": ("plain", (CARELESS,), False),
    "l2l-careless": ("LearnToLearn", (CARELESS,), False),
    "grid": ("plain", (0.1, 0.3, 3.0, 10.0), False),
    "greedy": ("GreedyLR", (1.0, CARELESS), False),
    "schedule-free": ("schedule-free", (1.0, 3.0), False),
    "pretrained": ("pretrained", (1.0,), False),
    "prodigy": ("Prodigy", (1.0,), False),
    "unroll": ("Unroll", (1.0, CARELESS), False),
}
WIDER = {"gan": 30.0, "vowels": 30.0}  # where the best of the grid was its largest rate
KINDS = {"int": int, "float": float, "str": str, "bool": lambda text: text == "True"}


def load(path: Path) -> dict[Run, Outcome]:
    """The runs that are finished."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))

    def read(kind: type, row: dict[str, str]) -> Run | Outcome:
        return kind(**{field.name: KINDS[str(field.type)](row[field.name]) for field in fields(kind)})

    return {read(Run, row): read(Outcome, row) for row in rows}


def save(path: Path, run: Run, outcome: Outcome) -> None:
    """One more row."""
    row = asdict(run) | asdict(outcome)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})


def wanted(arguments: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that what is interrupted can be compared."""
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for row in arguments.rows:
                method, factors, schedule = ROWS[row]
                if row == "grid" and task in WIDER:
                    factors += (WIDER[task],)
                if task in tasks_of(method):
                    yield from (Run(task, seed, method, factor, schedule) for factor in factors)


def alone(run: Run, steps: int | None, accelerator: str) -> Outcome:
    """In a process, silently."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return execute(run, steps, accelerator)


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DOCS / "figures" / "evidence.csv", help="read, and written")
    parser.add_argument("--times", action="store_true", help="run for time and memory, beside the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run, to see that it works")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--report", action="store_true", help="of what is there; nothing is run")
    arguments = parser.parse_args()
    for_docs = arguments.results.parent == DOCS / "figures"
    if arguments.steps is not None and for_docs:
        parser.error("--steps gives rows that are no evidence: --results must be somewhere else")
    results, timed_path = load(arguments.results), arguments.results.with_stem(arguments.results.stem + "-times")
    times = load(timed_path)
    path, found = (timed_path, times) if arguments.times else (arguments.results, results)
    if arguments.times:
        arguments.rows = ["usual", "l2l-usual"]
    runs = [] if arguments.report else [run for run in wanted(arguments) if run not in found]
    for number, run in enumerate(runs, 1):
        TASKS[run.task].data()  # what is cached of it, the forked process has: some files take ten seconds to read
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            outcome = pool.submit(alone, run, arguments.steps, arguments.accelerator).result()
        save(path, run, outcome)
        print(f"{number}/{len(runs)} {run}: {outcome.test:.4g} in {outcome.seconds:.0f} s {outcome.note}", flush=True)
    results, times = load(arguments.results), load(timed_path)  # all of them rounded, so that equal runs are equal
    print(write_page(results, times, DOCS / "evidence.md" if for_docs else None))
    if for_docs:
        draw(results, DOCS / "figures")


if __name__ == "__main__":
    main()
