"""Tables and figures of the finished runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
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

    def grid(self, method: str = "plain") -> dict[float, Seeds]:
        """All constant rates of a method, on the seeds that all of them have had; nothing before a grid has been run.

        The careless rate is none of them.
        """
        rates = {
            factor: seeds
            for (name, factor, schedule), seeds in sorted(self.runs.items())
            if name == method and not schedule and factor != CARELESS
        }
        if len(rates) < (5 if method == "plain" else 2):
            return {}
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        return {factor: {seed: seeds[seed] for seed in sorted(common)} for factor, seeds in rates.items()}

    def best(self, method: str = "plain") -> tuple[float, Seeds]:
        """Of the grid, by the mean test measure."""

        def loss(item: tuple[float, Seeds]) -> float:
            measured = value(item[1])
            return self.task.sign * measured if math.isfinite(measured) else math.inf

        return min(self.grid(method).items(), key=loss, default=(math.nan, {}))

    def show_best(self) -> str:
        """Of the constant rates without a callback; says where a wider grid might have found a better one."""
        factor, seeds = self.best()
        edge = ", edge" if factor in (min(self.grid(), default=0), max(self.grid(), default=0)) else ""
        return f"{self.show(seeds)} (x{factor:g}{edge})" if seeds else ""

    def show(self, seeds: Seeds, of: str = "test") -> str:
        """Mean and standard deviation over the seeds, in per cent if it is an accuracy."""
        if not seeds:
            return ""
        if not math.isfinite(value(seeds, of)):
            return "diverged"
        scale = 100 if self.task.measure == "accuracy" else 1
        numbers = [scale * getattr(outcome, of) for outcome in seeds.values()]
        number = mean(numbers)
        digits = 1 if scale == 100 else max(0, 3 - math.floor(math.log10(abs(number))))
        if len(numbers) == 1:
            return f"{number:.{digits}f}"
        return f"{number:.{digits}f} ± {stdev(numbers):.{digits}f}"

    def worse(self, seeds: Seeds, than: Seeds) -> list[float]:
        """Seed by seed: by how many points of accuracy, or by how many per cent of the loss or score."""
        common = sorted(seeds.keys() & than.keys())
        differences = [100 * self.task.sign * (seeds[seed].test - than[seed].test) for seed in common]
        if self.task.measure == "accuracy":
            return differences
        scale = abs(value({seed: than[seed] for seed in common}))
        return [difference / scale for difference in differences]

    @property
    def tolerance(self) -> float:
        return 0.5 if self.task.measure == "accuracy" else 2.0


def value(seeds: Seeds, of: str = "test") -> float:
    """The mean; not finite where one seed has failed."""
    found = [getattr(outcome, of) for outcome in seeds.values()]
    return mean(found) if found and all(map(math.isfinite, found)) else math.inf


def rows(header: str, lines: list[list[str]]) -> str:
    columns = header.split("|")
    ruled = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [[c.strip() for c in columns], ruled, *lines])


def table(found: list[Found], columns: dict[str, Callable[[Found], str]], required: int = 0) -> str:
    """A line for each task of which more than the first cells are known."""
    lines = []
    for one in found:
        cells = [cell(one) for cell in columns.values()]
        if any(cells[required:]):
            unit = " %" if one.task.measure == "accuracy" else ""
            lines.append([f"{one.task.title} ({one.task.measure}{unit})", *cells])
    return rows(" | ".join(["task", *columns]), lines)


def results_table(found: list[Found], of: str = "test") -> str:
    """What the rates give, without and with the callback."""
    return table(
        found,
        {
            "careless": lambda one: one.show(one.at("plain", CARELESS), of),
            "careless + L2L": lambda one: one.show(one.at("LearnToLearn", CARELESS), of),
            "usual": lambda one: one.show(one.at("plain", USUAL), of),
            "usual + L2L": lambda one: one.show(one.at("LearnToLearn", USUAL), of),
            "usual + L2L, averaged": lambda one: one.show(one.at("averaged", USUAL), of),
            "schedule": lambda one: one.show(one.at("plain", USUAL, True), of),
            "schedule + L2L": lambda one: one.show(one.at("LearnToLearn", USUAL, True), of),
            "best of grid": lambda one: one.show_best() if of == "test" else one.show(one.best()[1], of),
        },
    )


def opponents_table(found: list[Found]) -> str:
    """What one might take instead, after the two columns of the default."""
    return table(
        found,
        {
            "careless + L2L": lambda one: one.show(one.at("LearnToLearn", CARELESS)),
            "usual + L2L": lambda one: one.show(one.at("LearnToLearn", USUAL)),
            "GreedyLR, careless": lambda one: one.show(one.at("GreedyLR", CARELESS)),
            "GreedyLR, usual": lambda one: one.show(one.at("GreedyLR", USUAL)),
            "schedule-free": lambda one: one.show(one.best("schedule-free")[1]),
            "pretrained rule, lr=1": lambda one: one.show(one.at("pretrained", USUAL)),
            "Prodigy": lambda one: one.show(one.at("Prodigy", USUAL)),
            "Unroll, careless": lambda one: one.show(one.at("Unroll", CARELESS)),
            "Unroll, usual": lambda one: one.show(one.at("Unroll", USUAL)),
        },
        required=2,
    )


def goals_table(found: list[Found]) -> str:
    """What was to be reached: differences within the seeds, their mean and standard deviation.

    A goal is met or missed by the mean. "Noise" says that a mean beyond the goal is less than two of its standard
    errors beyond it.
    """
    lines, counts, known = [], [0, 0, 0], [0, 0, 0]
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
            by, spread = mean(worse), stdev(worse) if len(worse) > 1 else None
            known[number] += 1
            counts[number] += by < 0 if number == 2 else by <= tolerance
            unit = "points" if one.task.measure == "accuracy" else "%"
            cell = f"{by:+.1f}" if spread is None else f"{by:+.1f} ± {spread:.1f}"
            noise = spread is not None and by - tolerance <= 2 * spread / math.sqrt(len(worse))
            missed = "" if by <= tolerance else " missed (noise)" if noise else " **missed**"
            cells.append(f"{cell} {unit}{missed}" if math.isfinite(by) else "diverged **missed**")
        lines.append([one.task.title, *cells])
    verbs = ("met on", "met on", "better on")
    lines.append(["", *(f"{verb} {good} of {count}" for verb, good, count in zip(verbs, counts, known, strict=True))])
    return rows(
        "task | careless + L2L, worse than best of grid by | schedule + L2L, worse than schedule by "
        "| usual + L2L, worse than usual by",
        lines,
    )


def times_table(found: list[Found], times: Results) -> str:
    """The price, from runs in alternation."""
    lines = []
    for one in found:
        timed = Found(times, one.name)
        plain, ours = timed.at("plain", USUAL), timed.at("LearnToLearn", USUAL)
        common = plain.keys() & ours.keys()
        if common:
            seconds, with_ours = (sum(seeds[seed].seconds for seed in common) for seeds in (plain, ours))
            memory = mean(ours[seed].megabytes - plain[seed].megabytes for seed in common)
            cells = [f"{with_ours / seconds:.2f}", f"{memory:+.0f} MB", f"{seconds / len(common):.0f} s"]
            lines.append([one.task.title, *cells])
    return rows("task | time with L2L, of that without | memory | a run without", lines)


def notes(results: Results) -> str:
    """What the library said."""
    said: dict[str, set[str]] = {}
    for run, outcome in results.items():
        if outcome.note:
            schedule = ", schedule" if run.schedule else ""
            said.setdefault(outcome.note, set()).add(f"{run.task} ({run.method}, x{run.factor:g}{schedule})")
    lines = [
        textwrap.fill(
            f"- {', '.join(sorted(runs))}: {textwrap.shorten(note, 250, placeholder=' ...')}",
            120,
            subsequent_indent="  ",
            break_long_words=False,
        )
        for note, runs in sorted(said.items())
    ]
    return "\n".join(lines) or "Nothing."


def seeds_of(found: list[Found], *methods: str) -> str:
    """How many seeds the rows of these methods have."""
    counts = sorted({len(seeds) for one in found for key, seeds in one.runs.items() if key[0] in methods})
    if not counts:
        return "no seed"
    few, most = counts[0], counts[-1]
    return f"{few} to {most} seeds" if few < most else "one seed" if most == 1 else f"{most} seeds"


def write_page(results: Results, times: Results, page: Path | None) -> str:
    """Between its markers; returns what is written."""
    found = [Found(results, task) for task in TASKS if any(run.task == task for run in results)]
    parts = [
        "Test data after the last step: means and standard deviations over "
        f"{seeds_of(found, 'plain', 'LearnToLearn', 'averaged')}; where there is no ±, it is one seed. Of losses less "
        "is better, of the others more. *Edge*: the best rate of the grid was its smallest or largest.",
        results_table(found),
        "Beside opponents, and beside the exact meta-gradient, over "
        f"{seeds_of(found, 'GreedyLR', 'schedule-free', 'pretrained', 'Prodigy', 'Unroll')}:",
        opponents_table(found),
        "The runs of the first table where their validation was best, which is what a `ModelCheckpoint` keeps:",
        results_table(found, "test_at_best"),
        "What was to be reached: from the careless rate within half a point of accuracy, or 2 %, of the best of the "
        "grid; on top of the schedule no worse than the schedule; from the usual rate better than that on two thirds "
        "of the tasks. Differences are within the seeds: mean and standard deviation. A goal is met or missed by the "
        "mean; *noise* is a mean less than two of its standard errors beyond the goal.",
        goals_table(found),
        *(["What it costs:", times_table(found, times)] if times else []),
        "What was said during the runs:",
        notes(results),
    ]
    text = "\n\n".join(part if part[0] in "|-" else textwrap.fill(part, 120) for part in parts)
    if page is not None:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text


def draw(results: Results, folder: Path) -> None:
    """Test measure against steps, for a light and for a dark page: a colour is a method, dots are the careless rate."""
    found = [Found(results, task) for task in DRAWN]
    for name, ink, paper in (("evidence.png", "#1f2328", "#ffffff"), ("evidence-dark.png", "#e6edf3", "#0d1117")):
        blue, orange = ("#0969da", "#bc4c00") if paper == "#ffffff" else ("#58a6ff", "#f0883e")
        figure = Figure(figsize=(11, 4), layout="constrained", dpi=150, facecolor=paper)
        for axes, one in zip(figure.subplots(1, len(DRAWN)), found, strict=True):
            factor, at_best = one.best()
            lines = [
                ("careless rate alone", one.at("plain", CARELESS), {"color": orange, "lw": 2, "ls": ":"}),
                ("best rate of a grid", {} if factor == USUAL else at_best, {"color": ink, "lw": 1.5, "alpha": 0.6}),
                (
                    "usual rate alone, best of a grid" if factor == USUAL else "usual rate alone",
                    one.at("plain", USUAL),
                    {"color": orange, "lw": 2},
                ),
                ("careless rate + LearnToLearn", one.at("LearnToLearn", CARELESS), {"color": blue, "lw": 3, "ls": ":"}),
                ("usual rate + LearnToLearn", one.at("LearnToLearn", USUAL), {"color": blue, "lw": 3}),
            ]
            ends = []
            for label, seeds, style in lines:
                if seeds:
                    steps, means = curve(seeds, 100 if one.task.measure == "accuracy" else 1)
                    axes.plot(steps, means, **style)
                    ends.append((means[-1], label, style["color"], steps[-1]))
            if one.task.measure == "accuracy":
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter("{x:.0f} %")
            label_ends(axes, ends, "{:.0f} %" if one.task.measure == "accuracy" else "{:.2f}")
            axes.set_facecolor(paper)
            axes.set_title(f"{one.task.title}: test {one.task.measure}", color=ink, loc="left", fontsize=12)
            axes.set_xlabel("training step", color=ink)
            axes.tick_params(colors=ink)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(ink)
        figure.savefig(folder / name)


def label_ends(axes: Axes, ends: list[tuple[float, str, str, int]], form: str) -> None:
    """The name and last value of every line beside its end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, at = 0.07 * (high - low), -math.inf
    for last, label, color, step in sorted(ends):
        at = max(last, at + gap)
        axes.annotate(
            f"{form.format(last)}  {label}", (step, at), (6, 0), textcoords="offset points", color=color, va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(low, max(high, at + gap / 2))


def curve(seeds: Seeds, scale: float) -> tuple[list[int], list[float]]:
    """Means over the seeds; the last point is what the tables have."""
    points = [
        dict(point.split(":") for point in outcome.curve.split()) | {str(outcome.steps): str(outcome.test)}
        for outcome in seeds.values()
    ]
    steps = [step for step in points[0] if all(step in one for one in points)]
    return [int(step) for step in steps], [scale * mean(float(one[step]) for one in points) for step in steps]
