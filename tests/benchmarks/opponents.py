"""``LearnToLearn`` against what one would take instead: nine tasks, three optimizers, four starting rates, five seeds.

    PYTHONPATH=<where prodigyopt, dadaptation and schedulefree are> python tests/benchmarks/opponents.py
        [--results opponents.csv] [--figure opponents.png] [--tasks chosen | confirmed | NAMES] [--methods NAMES]
        [--optimizers NAMES] [--seeds 5] [--starts RATES] [--learn-to-learn '{"unroll_steps": 2}'] [--report]

Every finished run is a row of the results; rows that are there are not run again, so an interrupted run goes on, and
several processes may share a file where their filters do not overlap. Everything takes about three hours on one core.

Every method trains for the same number of steps from the same weights on the same batches, seed by seed. Held-out data
serve the meta-objective of ``LearnToLearn`` alone, the report is on test data. The best constant and the best cosine of
an 11-point half-decade grid are chosen by their mean *test* loss, which favours them: a user cannot do that. What has
no starting rate is run once per seed. Constants, cosines and the other optimizers run in a plain loop, which is checked
against the Trainer.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from opponents_methods import METHODS, OPTIMIZERS, Outcome, Run, installed
from opponents_report import draw, report
from opponents_tasks import CHOSEN_ON, CONFIRMED_ON, task

HALVES = {"chosen": CHOSEN_ON, "confirmed": CONFIRMED_ON}
GRID = ("constant", "cosine", "Trainer")  # run at rates of their own, and always in the report
COLUMNS = [field.name for kind in (Run, Outcome) for field in fields(kind)]
CONVERT = {"start": float, "seed": int, "epochs": int} | {field.name: float for field in fields(Outcome)}


def load(path: Path) -> dict[Run, Outcome]:
    """The runs that are finished."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [{key: CONVERT.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    return {
        Run(**{field.name: row[field.name] for field in fields(Run)}): Outcome(
            **{field.name: row[field.name] for field in fields(Outcome)}
        )
        for row in rows
    }


def save(path: Path, run: Run, outcome: Outcome) -> None:
    """One more row."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(run) | asdict(outcome))


def wanted(arguments: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that what is interrupted can be compared."""
    methods = [name for name in arguments.methods if installed(name)]
    for name in set(arguments.methods) - set(methods):
        print(f"{name} is left out: pip install {METHODS[name].package}")
    for seed in range(arguments.seeds):
        for of in arguments.tasks:
            for name in methods:
                method = METHODS[name]
                for optimizer in arguments.optimizers:
                    if optimizer not in method.optimizers:
                        continue
                    for start in method.starts(optimizer):
                        if name in GRID or start == 0 or start in arguments.starts:
                            epochs = arguments.epochs or task(of).epochs
                            options = arguments.learn_to_learn if name == "LearnToLearn" else ""
                            yield Run(name, of, optimizer, start, seed, epochs, options)


def execute(run: Run) -> Outcome:
    """Train."""
    method = METHODS[run.method]
    return method.run(run, json.loads(run.options or "{}")) if run.method == "LearnToLearn" else method.run(run)


def parse(given: list[str] | None) -> argparse.Namespace:
    """Names of halves become the tasks in them."""
    names = (*CHOSEN_ON, *CONFIRMED_ON)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("opponents.csv"), help="read, and written run by run")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=(*HALVES, *names), default=names)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", nargs="+", type=float, default=[1e-6, 1e-3, 1e-1, 10.0])
    parser.add_argument("--learn-to-learn", default="", metavar="JSON", help="keyword arguments of the callback")
    parser.add_argument("--epochs", type=int, help="shorter than the task's, to see that it works")
    parser.add_argument("--report", action="store_true", help="of what is there; nothing is run")
    arguments = parser.parse_args(given)
    if arguments.learn_to_learn:
        # Spelled one way, so that it is found again.
        arguments.learn_to_learn = json.dumps(json.loads(arguments.learn_to_learn), sort_keys=True)
    arguments.tasks = [name for given in arguments.tasks for name in HALVES.get(given, (given,))]
    return arguments


def main(given: list[str] | None = None) -> None:
    """Run what is missing, and report."""
    arguments = parse(given)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = load(arguments.results)
    runs = list(wanted(arguments))
    for place, run in enumerate(runs if not arguments.report else ()):
        if run not in results:
            results[run] = execute(run)
            save(arguments.results, run, results[run])
            print(f"{place + 1}/{len(runs)} {run} {results[run].test_loss:.4g}", flush=True)
    # The grid is what everything is compared with, whatever was asked for.
    asked = set(runs)
    compared = {(run.task, run.optimizer, run.seed, run.epochs) for run in runs}
    found = {
        run: outcome
        for run, outcome in results.items()
        if run in asked or (run.method in GRID and (run.task, run.optimizer, run.seed, run.epochs) in compared)
    }
    print(report(found))
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
