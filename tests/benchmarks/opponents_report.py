"""Tables and figure of the comparison with opponents, from finished runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median

from opponents_methods import METHODS, OPTIMIZERS, Outcome, Run
from opponents_tasks import CHOSEN_ON, CONFIRMED_ON, task

NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
# A run at the end of which the test loss is above this part of the best constant prediction's has learned nothing.
LOST = 0.95
BEYOND = 10.0  # where the figure ends

Key = tuple[str, str, float]  # task, optimizer, start


def lost(run: Run, outcome: Outcome) -> bool:
    """Not finite, or at chance level."""
    return not outcome.test_loss < LOST * task(run.task).chance


@dataclass
class Cell:
    """The seeds of one method, task, optimizer and start."""

    runs: dict[int, Outcome]
    lost: int

    @cached_property
    def loss(self) -> float:
        """Mean over the seeds; infinite if one is not finite."""
        losses = [outcome.test_loss for outcome in self.runs.values()]
        return mean(losses) if all(map(math.isfinite, losses)) else math.inf

    def mean(self, name: str, seeds: Iterable[int] | None = None) -> float:
        """Of a column."""
        return mean(getattr(self.runs[seed], name) for seed in (self.runs if seeds is None else seeds))


class Comparison:
    """All cells, and what they are compared with."""

    def __init__(self, found: Mapping[Run, Outcome]) -> None:
        self.cells: dict[str, dict[Key, Cell]] = defaultdict(dict)
        for run, outcome in found.items():
            cell = self.cells[run.method].setdefault((run.task, run.optimizer, run.start), Cell({}, 0))
            cell.runs[run.seed] = outcome
            cell.lost += lost(run, outcome)
        self.methods = [name for name in METHODS if name in self.cells]

    def best(self, method: str, name: str, optimizer: str) -> tuple[float, Cell]:
        """The rate of the grid with the least mean test loss, among those that all seeds have had."""
        given = {key[2]: cell for key, cell in self.cells[method].items() if key[:2] == (name, optimizer)}
        seeds = max(len(cell.runs) for cell in given.values())
        rate = min(given, key=lambda start: (len(given[start].runs) < seeds, given[start].loss))
        return rate, given[rate]

    def inside(self, method: str, name: str, optimizer: str) -> bool:
        """Whether the best rate is not at an end of the grid."""
        rates = [key[2] for key in self.cells[method] if key[:2] == (name, optimizer)]
        return self.best(method, name, optimizer)[0] not in (min(rates), max(rates))

    def ratio(self, method: str, key: Key) -> float:
        """Mean test loss over that of the best constant rate, by the seeds that both have."""
        if key not in self.cells[method]:
            return math.nan
        ours, theirs = self.cells[method][key], self.best("constant", *key[:2])[1]
        seeds = ours.runs.keys() & theirs.runs.keys()
        losses = [cell.mean("test_loss", seeds) if seeds else math.nan for cell in (ours, theirs)]
        return losses[0] / losses[1] if math.isfinite(losses[0]) else math.inf

    def ratios(self, method: str, optimizer: str) -> dict[Key, float]:
        """By task and start; of the cosine, the best of the grid."""
        if method in ("constant", "cosine"):
            pairs = {key[:2] for key in self.cells[method] if key[1] == optimizer}
            return {(*pair, 0.0): self.ratio(method, (*pair, self.best(method, *pair)[0])) for pair in sorted(pairs)}
        return {key: self.ratio(method, key) for key in self.cells[method] if key[1] == optimizer}

    def dependence(self, method: str, optimizer: str) -> dict[str, float]:
        """By task: test loss from the worst start over that from the best, by the seeds that all starts have had."""
        cells: dict[str, list[Cell]] = defaultdict(list)
        for (name, of, start), cell in self.cells[method].items():
            if of == optimizer and start:
                cells[name].append(cell)
        found = {}
        for name, given in cells.items():
            seeds = set.intersection(*(set(cell.runs) for cell in given))
            if len(given) > 1 and seeds:
                losses = [cell.mean("test_loss", seeds) for cell in given]
                losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
                found[name] = max(losses) / min(losses) if math.isfinite(max(losses)) else math.inf
        return found

    def cost(self, method: str, optimizer: str, column: str) -> float:
        """Median over tasks and starts of the ratio to a plain training in the same kind of loop."""
        runs = 11 if method in ("constant", "cosine") else 1
        found = []
        for key, cell in self.cells[method].items():
            if key[1] == optimizer:
                plain = self.cells["Trainer"].get((*key[:2], 1e-3)) if METHODS[method].trainer else None
                plain = plain or self.best("constant", *key[:2])[1]
                if column == "steps" or not METHODS[method].trainer or (*key[:2], 1e-3) in self.cells["Trainer"]:
                    found.append(cell.mean(column) / plain.mean(column))
        return runs * median(found) if found else math.nan

    def differences(self) -> list[float]:
        """Of the plain loop from the Trainer, where both have trained at the same rate."""
        pairs = [
            (cell.runs[seed].test_loss, self.cells["constant"][key].runs[seed].test_loss)
            for key, cell in self.cells["Trainer"].items()
            if key in self.cells["constant"]
            for seed in cell.runs.keys() & self.cells["constant"][key].runs.keys()
        ]
        return [abs(one - other) / other for one, other in pairs]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "" if math.isnan(value) else "lost"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_method(of: Comparison) -> str:
    """One line for each method and optimizer."""
    rows = []
    for optimizer in OPTIMIZERS:
        for method in of.methods:
            ratios = of.ratios(method, optimizer)
            if method == "Trainer" or not ratios:
                continue
            worst = max(ratios, key=lambda key, ratios=ratios: ratios[key])
            dependence = of.dependence(method, optimizer).values() if method not in ("constant", "cosine") else ()
            mine = [cell for key, cell in of.cells[method].items() if key[1] == optimizer]
            failed = f"{sum(cell.lost for cell in mine)} of {sum(len(cell.runs) for cell in mine)}"
            rows.append([
                NAMES[optimizer], f"best {method}" if method in ("constant", "cosine") else method,
                _number(median(ratios.values())), _number(ratios[worst]), worst[0],
                _number(max(dependence)) if dependence else "", "" if method in ("constant", "cosine") else failed,
                _number(of.cost(method, optimizer, "steps")), _number(of.cost(method, optimizer, "seconds")),
            ])  # fmt: skip
    header = ["optimizer", "method", "median", "worst", "worst task", "start dependence", "lost", "steps", "time"]
    return _table(header, rows)


def by_task(of: Comparison, method: str = "LearnToLearn") -> str:
    """One line for each task and optimizer, one column for each start; then medians, and the two halves."""
    starts = sorted({key[2] for key in of.cells[method]})
    rows = []
    for name in (*CHOSEN_ON, *CONFIRMED_ON):
        for optimizer in OPTIMIZERS:
            if not any((name, optimizer, start) in of.cells[method] for start in starts):
                continue
            rate, constant = of.best("constant", name, optimizer)
            edge = "" if of.inside("constant", name, optimizer) else " (end)"
            ratios = [of.ratio(method, (name, optimizer, start)) for start in starts]
            cosine = [value for key, value in of.ratios("cosine", optimizer).items() if key[0] == name]
            rows.append([
                name, NAMES[optimizer], f"{constant.loss:.4g}", f"{rate:.2g}{edge}",
                *map(_number, (*(cosine or [math.nan]), *ratios)),
            ])  # fmt: skip
    header = ["task", "optimizer", "best constant", "its rate", "cosine", *(f"from {start:g}" for start in starts)]
    lines = [_table(header, rows), ""]
    halves = {"chosen on": CHOSEN_ON, "confirmed on": CONFIRMED_ON, "all": (*CHOSEN_ON, *CONFIRMED_ON)}
    for half, names in halves.items():
        lines.append(f"{half}: " + _summary(of, method, lambda key, names=names: key[0] in names))
    for optimizer in OPTIMIZERS:
        lines.append(f"{NAMES[optimizer]}: " + _summary(of, method, lambda key, own=optimizer: key[1] == own))
    return "\n".join(lines)


def _summary(of: Comparison, method: str, chosen: Callable[[Key], bool]) -> str:
    ratios = [of.ratio(method, key) for key in of.cells[method] if chosen(key)]
    mine = [cell for key, cell in of.cells[method].items() if chosen(key)]
    if not ratios:
        return "nothing yet"
    failed, runs = sum(cell.lost for cell in mine), sum(len(cell.runs) for cell in mine)
    return f"median {_number(median(ratios))}, worst {_number(max(ratios))}, {failed} of {runs} runs lost"


def report(found: Mapping[Run, Outcome]) -> str:
    """All tables, as Markdown."""
    of = Comparison(found)
    if "constant" not in of.cells:
        return "Nothing to compare with yet: run --methods constant."
    parts = [by_method(of)]
    if "LearnToLearn" in of.cells:
        parts.append(by_task(of))
    differences = of.differences()
    if differences:
        most = max(differences)
        parts.append(f"Plain loop against Trainer: {len(differences)} pairs, differing by {most:.1e} at most.")
        if most > 1e-4:
            raise AssertionError("the opponents train on other batches than the Trainer")
    return "\n\n".join(parts)


def draw(found: Mapping[Run, Outcome], path: Path) -> None:
    """Left every method, right every task with LearnToLearn: one mark for each task, optimizer and start."""
    import matplotlib.pyplot as plt

    from lightning_l2l.plotting import STYLES

    of = Comparison(found)
    methods = [name for name in of.methods if name not in ("constant", "Trainer")][::-1]
    names = (*CHOSEN_ON, *CONFIRMED_ON)[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for place, (optimizer, marker) in enumerate(zip(OPTIMIZERS, "os^", strict=True)):
        style = {"marker": marker, "linestyle": "", "markersize": 4.5, "color": STYLES[place]["color"], "alpha": 0.6}
        shift = 0.25 * (1 - place)
        for row, method in enumerate(methods):
            values = [min(value, BEYOND) for value in of.ratios(method, optimizer).values()]
            left.plot(values, [row + shift] * len(values), **style)
            if values:
                left.plot([median(values)] * 2, [row + shift - 0.12, row + shift + 0.12], color="black", linewidth=2)
        ratios = of.ratios("LearnToLearn", optimizer)
        for row, name in enumerate(names):
            values = [min(value, BEYOND) for key, value in ratios.items() if key[0] == name]
            label = NAMES[optimizer] if row == 0 else None
            right.plot(values, [row + shift] * len(values), label=label, **style)
    left.set_yticks(range(len(methods)), [f"best {name}" if name == "cosine" else name for name in methods])
    right.set_yticks(range(len(names)), names)
    left.set(xscale="log", xlim=(0.5, BEYOND * 1.1), title="All methods, tasks and starts; the bar is the median")
    right.set(title="LearnToLearn, from all starts")
    left.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10 or more"])
    for axes in (left, right):
        axes.axvline(1.0, color="0.4", linewidth=0.8)
        axes.set_xlabel("test loss / that of the best of 11 constant rates")
        axes.grid(alpha=0.3, axis="x")
    right.axhline(len(CONFIRMED_ON) - 0.5, color="0.4", linewidth=0.8, linestyle=":")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
