"""Tables and figures of the finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from runs import Outcome, Run
from tasks import TASKS

Results = Mapping[Run, Outcome]
Seeds = dict[int, Outcome]
BEGIN, END = "<!-- table: written by tests/benchmarks/real -->", "<!-- end of the table -->"
CARELESS, USUAL = 1e-5, 1.0
DRAWN = ("minilm", "language")


class Found:
    """The runs of one task."""

    def __init__(self, results: Results, task: str) -> None:
        self.name = task
        self.task = TASKS[task]
        self.runs: dict[tuple[str, float, bool], Seeds] = {}
        for run, outcome in results.items():
            if run.task == task:
                self.runs.setdefault((run.method, run.factor, run.schedule), {})[run.seed] = outcome

    def at(self, method: str, factor: float, schedule: bool = False) -> Seeds:
        return self.runs.get((method, factor, schedule), {})

    def best(self, method: str = "plain") -> tuple[float, Seeds]:
        """Of all constant rates of a method, by the mean test measure over the seeds that all of them have had.

        Nothing while the grid has not been run.
        """
        rates = {key[1]: seeds for key, seeds in self.runs.items() if key[0] == method and not key[2]}
        if not rates or method == "plain" and len(rates) < 4:
            return math.nan, {}
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        full = {factor: {seed: seeds[seed] for seed in common} for factor, seeds in rates.items()}
        return min(full.items(), key=lambda item: self.task.sign * value(item[1]))

    def show(self, seeds: Seeds, factor: float | None = None) -> str:
        """The mean test measure, in per cent if it is an accuracy."""
        if not seeds:
            return ""
        number = value(seeds)
        shown = f"{100 * number:.1f}" if self.task.measure == "accuracy" else f"{number:.4g}"
        return shown if factor is None else f"{shown} (x{factor:g})"

    def worse(self, seeds: Seeds, than: Seeds) -> list[float]:
        """Seed by seed: by how many points of accuracy, or by what part of the loss or score."""
        common = sorted(seeds.keys() & than.keys())
        differences = [self.task.sign * (seeds[seed].test - than[seed].test) for seed in common]
        if self.task.measure == "accuracy":
            return [100 * difference for difference in differences]
        return [difference / abs(value(than)) for difference in differences]

    @property
    def tolerance(self) -> float:
        return 0.5 if self.task.measure == "accuracy" else 0.02


def value(seeds: Seeds, of: str = "test") -> float:
    """The mean; not finite where one seed has failed."""
    found = [getattr(outcome, of) for outcome in seeds.values()]
    return mean(found) if found and all(map(math.isfinite, found)) else math.inf


def rows(header: str, lines: list[list[str]]) -> str:
    columns = header.split("|")
    ruled = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [[c.strip() for c in columns], ruled, *lines])


def results_table(found: list[Found]) -> str:
    """Test measures after the last step."""
    lines = []
    for one in found:
        best, at_best = one.best()
        lines.append(
            [
                f"{one.task.title} ({one.task.measure}{' %' if one.task.measure == 'accuracy' else ''})",
                one.show(one.at("plain", CARELESS)),
                one.show(one.at("LearnToLearn", CARELESS)),
                one.show(one.at("plain", USUAL)),
                one.show(one.at("LearnToLearn", USUAL)),
                one.show(one.at("plain", USUAL, True)),
                one.show(one.at("LearnToLearn", USUAL, True)),
                one.show(at_best, best),
                one.show(one.at("GreedyLR", CARELESS)),
                one.show(one.at("GreedyLR", USUAL)),
                one.show(one.best("schedule-free")[1]),
                one.show(one.at("Prodigy", USUAL)),
                one.show(one.at("Unroll", CARELESS)),
                one.show(one.at("Unroll", USUAL)),
            ]
        )
    return rows(
        "task | careless | + L2L | usual | + L2L | schedule | + L2L | best of grid | GreedyLR, careless "
        "| GreedyLR, usual | schedule-free | Prodigy | Unroll, careless | Unroll, usual",
        lines,
    )


def choice_table(found: list[Found]) -> str:
    """Test measures where validation was best: what ModelCheckpoint keeps."""
    lines = []
    for one in found:
        chosen = [
            one.at("plain", USUAL), one.at("LearnToLearn", USUAL), one.at("plain", USUAL, True),
            one.at("LearnToLearn", USUAL, True), one.best()[1], one.at("LearnToLearn", CARELESS),
        ]  # fmt: skip
        scale = 100 if one.task.measure == "accuracy" else 1
        lines.append(
            [one.task.title, *(f"{scale * value(seeds, 'test_at_best'):.4g}" if seeds else "" for seeds in chosen)]
        )
    return rows("task | usual | + L2L | schedule | + L2L | best of grid | L2L from careless", lines)


def goals_table(found: list[Found], times: Results) -> str:
    """What was to be reached, and what it costs; differences are means and standard errors over the seeds."""
    lines, met, known = [], [0, 0, 0], [0, 0, 0]
    for one in found:
        pairs = [
            (one.at("LearnToLearn", CARELESS), one.best()[1], one.tolerance),
            (one.at("LearnToLearn", USUAL, True), one.at("plain", USUAL, True), 0.0),
            (one.at("LearnToLearn", USUAL), one.at("plain", USUAL), 0.0),
        ]
        cells = []
        for number, (ours, other, tolerance) in enumerate(pairs):
            worse = one.worse(ours, other)
            if not worse:
                cells.append("")
                continue
            error = stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
            good = mean(worse) <= (tolerance + 2 * error if number == 1 else tolerance)
            met[number] += good
            known[number] += 1
            unit, scale = (" points", 1) if one.task.measure == "accuracy" else (" %", 100)
            cells.append(f"{scale * mean(worse):+.1f} ± {scale * error:.1f}{unit}{'' if good else ' **missed**'}")
        timed = Found(times, one.name)
        plain, ours = timed.at("plain", USUAL), timed.at("LearnToLearn", USUAL)
        common = plain.keys() & ours.keys()
        if common:
            seconds, with_ours = (sum(seeds[seed].seconds for seed in common) for seeds in (plain, ours))
            memory = mean(ours[seed].megabytes - plain[seed].megabytes for seed in common)
            cells += [f"{with_ours / seconds:.2f}", f"{memory:+.0f} MB", f"{seconds / len(common):.0f} s"]
        lines.append([one.task.title, *cells, *[""] * (6 - len(cells))])
    lines.append(["met", *(f"{good} of {count}" for good, count in zip(met, known, strict=True)), "", "", ""])
    return rows(
        "task | careless + L2L, worse than best of grid by | schedule + L2L, worse than schedule by "
        "| usual + L2L, worse than usual by | time | memory | a run",
        lines,
    )


def notes(results: Results) -> str:
    """What the library said."""
    lines = []
    for note in sorted({outcome.note for outcome in results.values() if outcome.note}):
        runs = [run for run, outcome in results.items() if outcome.note == note]
        named = ", ".join(sorted({f"{run.task} ({run.method}, x{run.factor:g})" for run in runs}))
        lines.append(f"- {named}: {note}")
    return "\n".join(lines) or "Nothing."


def write_page(results: Results, times: Results, page: Path | None) -> str:
    """Between its markers; returns what is written."""
    found = [Found(results, task) for task in TASKS if any(run.task == task for run in results)]
    seeds = len({run.seed for run in results if run.method in ("plain", "LearnToLearn")})
    few = len({run.seed for run in results if run.method not in ("plain", "LearnToLearn")})
    text = "\n\n".join(
        [
            f"Test data after the last step. Means over up to {seeds} seeds for the usual rate, the schedule and "
            f"LearnToLearn, over up to {few} for the opponents. Of losses less is better, of the others more.",
            results_table(found),
            "The same runs at their best validation, which is what a `ModelCheckpoint` keeps:",
            choice_table(found),
            "What was to be reached, and the price:",
            goals_table(found, times),
            "What was said during the runs:",
            notes(results),
        ]
    )
    if page is not None:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text


def draw(results: Results, folder: Path) -> None:
    """Test measure against steps, for a light and for a dark page."""
    found = [Found(results, task) for task in DRAWN]
    for name, ink, paper in (("evidence.png", "#1f2328", "#ffffff"), ("evidence-dark.png", "#e6edf3", "#0d1117")):
        blue, orange = ("#0969da", "#bc4c00") if paper == "#ffffff" else ("#58a6ff", "#f0883e")
        figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150, facecolor=paper)
        for axes, one in zip(figure.subplots(1, len(DRAWN)), found, strict=True):
            best, at_best = one.best()
            lines = [
                ("careless rate", one.at("plain", CARELESS), {"color": ink, "linestyle": ":", "alpha": 0.7}),
                ("usual rate", one.at("plain", USUAL), {"color": orange, "linestyle": "--"}),
                ("best rate of a grid", at_best, {"color": ink, "linestyle": "-", "alpha": 0.7}),
                ("LearnToLearn, careless", one.at("LearnToLearn", CARELESS), {"color": blue, "lw": 3, "ls": ":"}),
                ("LearnToLearn, usual", one.at("LearnToLearn", USUAL), {"color": blue, "lw": 3}),
            ]
            for label, seeds, style in lines:
                if seeds:
                    axes.plot(*curve(seeds, 100 if one.task.measure == "accuracy" else 1), label=label, **style)
            axes.set_facecolor(paper)
            axes.set_title(f"{one.task.title}: test {one.task.measure}", color=ink, loc="left", fontsize=11)
            axes.set_xlabel("training step", color=ink)
            axes.tick_params(colors=ink)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(ink)
            if one.task.measure == "accuracy":
                axes.yaxis.set_major_formatter("{x:.0f} %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, labelcolor=ink)
        figure.savefig(folder / name)


def curve(seeds: Seeds, scale: float) -> tuple[list[int], list[float]]:
    """Means over the seeds."""
    points = [dict(point.split(":") for point in outcome.curve.split()) for outcome in seeds.values()]
    steps = [step for step in points[0] if all(step in one for one in points)]
    return [int(step) for step in steps], [scale * mean(float(one[step]) for one in points) for step in steps]
