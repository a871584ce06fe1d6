"""Rules of the learning rate on a population of tasks, in lockstep on one core.

    python tests/benchmarks/population/run.py --half choosing --lengths 100,300,1000 --rules none,held [--seeds 2]
        [--results population.csv] [--report] [--column chosen --against cosine] [--table starts]

Baselines (eleven constant rates, cosines and lines to zero) are run where they are missing, then every rule from every
start. In longer trainings than the shortest these are six rates around the best of a shorter one, and more where the
best is at an end of them.
Finished blocks are rows of the results and are not run again. Everything is judged by test loss, the mean over seeds,
against the best of the eleven constant rates by the same test loss; a difference of a thousandth of the initial loss
counts as none, and losses that cross zero are compared by exp(difference). Rules are those of ``rule.py`` and the other
methods of ``opponents.py``. With ``--column`` all return the average of the weights, or that average at the lowest of
20 held-out losses; ``--against cosine`` compares with the best of eleven cosines whatever the start.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from engine import CONSTANT, COSINE, LINE, Runs, Task, train
from families import halves
from opponents import OPPONENTS, Opponent
from rule import RULES, LeaveAlone

FINEST = {"sgd": -3.5, "adam": -4.5, "adamw": -4.5, "muon": -4.0}  # log10 of the first of eleven rates
TEXTBOOK = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3, "muon": 0.02}
FAMILIES = {family.name: family for part in ("both", "unseen") for family in halves(part)}
STARTS = ("x1", "x0.1", "x0.3", "x3", "textbook", "1e-6", "10", "cosine")
COLUMNS = ("family", "optimizer", "steps", "rule", "start", "seed", "last", "averaged", "chosen", "factor")
SHAPES = {"constant": CONSTANT, "cosine": COSINE, "linear": LINE}  # of the baselines' schedules
LABELS = {
    "none": "left alone",
    "held": "held-out data",
    "few": "training only",
    "unroll": "`Unroll(steps=5)`",
    "linear": "line to zero",
    "finder": "range test",
    "schedule-free-default": "schedule-free, its default rate",
    "momo": "MoMo",
    "greedy": "GreedyLR",
    "metaoptimize": "MetaOptimize",
    "prodigy": "Prodigy",
    "d-adaptation": "D-Adaptation",
}
Key = tuple[str, str, int, str]


def defined(rule: str, optimizer: str) -> bool:
    """Whether the rule or opponent is defined for the optimizer."""
    kind: type[LeaveAlone] = (RULES | OPPONENTS)[rule]
    return not issubclass(kind, Opponent) or optimizer in kind.optimizers


def load(path: Path) -> dict[Key, list[dict[str, str]]]:
    """Finished blocks."""
    found: dict[Key, list[dict[str, str]]] = defaultdict(list)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                found[row["family"], row["optimizer"], int(row["steps"]), row["rule"]].append(row)
    return found


def rows(key: Key, starts: list[str], found: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    return [
        dict(
            zip(
                COLUMNS,
                [*map(str, key), start, str(seed), *(f"{found[c][seed, i]:.6g}" for c in COLUMNS[6:])],
                strict=True,
            )
        )
        for i, start in enumerate(starts)
        for seed in range(len(found["last"]))
    ]


def mean(block: list[dict[str, str]], start: str, column: str = "last") -> float:
    return statistics.fmean(float(row[column]) for row in block if row["start"] == start)


def best(block: list[dict[str, str]], kind: str, column: str = "last") -> tuple[float, float]:
    """Rate and mean test loss of the best constant or cosine."""
    names = {row["start"] for row in block if row["start"].startswith(kind)}
    return min(((float(n.split(":")[1]), mean(block, n, column)) for n in names), key=lambda pair: pair[1])


def baseline(task: Task, key: Key, shorter: list[dict[str, str]] | None) -> list[dict[str, str]]:
    """Eleven constant rates, cosines and lines to zero; of these only some around the best of a shorter training.

    More of them where the best is the first or the last, so that none of the others can be expected to be better.
    """
    rates = 10 ** (FINEST[key[1]] + 0.5 * torch.arange(11))
    found: list[dict[str, str]] = []
    tried: dict[str, list[int]] = {kind: [] for kind in SHAPES}
    wanted = {kind: list(range(11)) for kind in SHAPES}
    if shorter:
        for kind in SHAPES:
            nearest = int((rates.log() - math.log(best(shorter, kind)[0])).abs().argmin())
            wanted[kind] = list(range(max(0, nearest - 3), min(11, nearest + 3)))
    while any(wanted.values()):
        pairs = [(kind, i) for kind, which in wanted.items() for i in which]
        runs = Runs(rates[[i for _, i in pairs]], torch.tensor([SHAPES[kind] for kind, _ in pairs]))
        found += rows(key, [f"{k}:{rates[i].item():.9g}" for k, i in pairs], train(task, key[1], key[2], runs))
        for kind, i in pairs:
            tried[kind].append(i)
        for kind, which in tried.items():
            at = int((rates.log() - math.log(best(found, kind)[0])).abs().argmin())
            more = [i for i in (at - 1, at + 1) if 0 <= i < 11 and i not in which]
            wanted[kind] = more
    initial = task.losses(task.initial, task.test)[:, None]
    return found + rows(key, ["initial"], dict.fromkeys(COLUMNS[6:], initial))


def start_rates(block: list[dict[str, str]], optimizer: str) -> torch.Tensor:
    good, peak = best(block, "constant")[0], best(block, "cosine")[0]
    return torch.tensor([good, good * 0.1, good * 0.3, good * 3, TEXTBOOK[optimizer], 1e-6, 10.0, peak])


def same_seeds(block: list[dict[str, str]], other: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those rows of a block whose seeds the other has, too."""
    seeds = {row["seed"] for row in other}
    return [row for row in block if row["seed"] in seeds]


def ratio(nats: bool, loss: float, reference: float, initial: float) -> float:
    if not math.isfinite(loss):
        return 100.0
    slack = 1e-3 * abs(initial)
    return min(100.0, math.exp(min(5.0, loss - reference)) if nats else (loss + slack) / (reference + slack))


def line(name: str, ratios: list[float]) -> str:
    ordered = sorted(ratios)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    share = sum(r <= 1.03 for r in ratios) / len(ratios)
    mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
    lost = sum(r >= 10 for r in ratios)
    middle = f"{statistics.median(ratios):6.3f} {mean:6.3f} {at(0.9):7.3f} {ordered[-1]:8.3f}"
    return f"{name:34s} {len(ratios):4d} {middle} {share:6.0%} {lost:4d}"


def collect(
    done: dict[Key, list[dict[str, str]]], wanted: list[tuple[str, str, int]], rule: str, column: str, against: str
) -> list[tuple[dict[str, str], float]]:
    """Every pair of task and start with its ratio; ``against`` "" takes the cosines where the start is one."""
    pairs = []
    for family, optimizer, steps in wanted:
        base, block = done.get((family, optimizer, steps, "grid")), done.get((family, optimizer, steps, rule))
        if base and block:
            base, block = same_seeds(base, block), same_seeds(block, base)
            for start in STARTS:
                reference = best(base, against or ("cosine" if start == "cosine" else "constant"), column)[1]
                value = ratio(FAMILIES[family].nats, mean(block, start, column), reference, mean(base, "initial"))
                pairs.append(({"family": family, "optimizer": optimizer, "steps": str(steps), "start": start}, value))
    return pairs


def report(
    done: dict[Key, list[dict[str, str]]],
    wanted: list[tuple[str, str, int]],
    rules: list[str],
    column: str,
    against: str,
    worst: int,
) -> None:
    print(f"{'':34s} {'n':>4s} {'median':>6s} {'mean':>6s} {'90 %':>7s} {'worst':>8s} {'<=1.03':>6s} lost")
    for rule in rules:
        pairs = collect(done, wanted, rule, column, against)
        if not pairs:
            continue
        groups = {
            "no harm: x1": ("x1",),
            "no harm: cosine": ("cosine",),
            "plausible": ("x0.1", "x0.3", "x1", "x3", "textbook"),
            "absurd": ("1e-6", "10"),
        }
        groups |= {start: (start,) for start in STARTS}
        for name, starts in groups.items():
            print(line(f"{rule} {name}", [v for p, v in pairs if p["start"] in starts]))
        for field in ("steps", "optimizer"):
            for value in sorted({p[field] for p, _ in pairs}, key=lambda v: (len(v), v)):
                print(
                    line(
                        f"{rule} plausible {value}",
                        [v for p, v in pairs if p["start"] in groups["plausible"] and p[field] == value],
                    )
                )
                print(
                    line(
                        f"{rule} good {value}",
                        [v for p, v in pairs if p["start"] in ("x1", "cosine") and p[field] == value],
                    )
                )
        for p, v in sorted(
            (x for x in pairs if x[0]["start"] in (*groups["plausible"], "cosine")), key=lambda x: -x[1]
        )[:worst]:
            print(f"    {v:7.3f} {p['family']} {p['optimizer']} {p['steps']} {p['start']}")


def short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def cell(ratios: list[float], last: str) -> str:
    """Median / 90 % / the worst, or how many are lost."""
    ordered = sorted(ratios)
    end = str(sum(v >= 10 for v in ordered)) if last == "lost" else short(ordered[-1])
    return f"{short(statistics.median(ordered))} / {short(ordered[int(0.9 * len(ordered))])} / {end}"


def by_method(
    done: dict[Key, list[dict[str, str]]],
    wanted: list[tuple[str, str, int]],
    rules: list[str],
    column: str,
    against: str,
) -> None:
    """Median / 90 % / lost, a table for each length, a row for each method, a column for each start."""
    for steps in dict.fromkeys(n for *_, n in wanted):
        print(f"\n| {steps} steps | pairs | {' | '.join(STARTS)} |\n|{'---|' * (len(STARTS) + 2)}")
        here = [w for w in wanted if w[2] == steps]
        for rule in rules:
            pairs = collect(done, here, rule, column, against)
            found = [[v for p, v in pairs if p["start"] == start] for start in STARTS]
            if pairs:
                cells = " | ".join(cell(ratios, "lost") for ratios in found)
                print(f"| {LABELS.get(rule, rule)} | {len(pairs) // len(STARTS)} | {cells} |")
        for kind in SHAPES:
            ratios = references(done, here, kind, column, against or "constant")
            if ratios and kind != (against or "constant"):
                print(f"| best of eleven, {kind} | {len(ratios)} | {cell(ratios, 'lost')} |{' |' * (len(STARTS) - 1)}")


def references(
    done: dict[Key, list[dict[str, str]]], wanted: list[tuple[str, str, int]], kind: str, column: str, against: str
) -> list[float]:
    """The best of eleven of a kind over the best of eleven of another."""
    blocks = [(FAMILIES[w[0]].nats, done[(*w, "grid")]) for w in wanted if (*w, "grid") in done]
    return [
        ratio(nats, best(b, kind, column)[1], best(b, against, column)[1], mean(b, "initial")) for nats, b in blocks
    ]


def by_start(
    done: dict[Key, list[dict[str, str]]],
    wanted: list[tuple[str, str, int]],
    rules: list[str],
    column: str,
    against: str,
) -> None:
    """Median / 90 % / worst, a row for each start and rule, a column for each length, and how many are lost."""
    lengths = list(dict.fromkeys(n for *_, n in wanted))
    print(f"| start | | {' | '.join(f'{n} steps' for n in lengths)} | lost |\n|{'---|' * (len(lengths) + 3)}")
    for start in ("x1", "cosine", *STARTS[1:-1]):
        for rule in rules:
            pairs = [(p, v) for p, v in collect(done, wanted, rule, column, against) if p["start"] == start]
            found = [[v for p, v in pairs if p["steps"] == str(n)] for n in lengths]
            cells = " | ".join(cell(ratios, "worst") if ratios else "" for ratios in found)
            lost = sum(v >= 10 for _, v in pairs)
            if pairs:
                print(f"| {start} | {LABELS.get(rule, rule)} | {cells} | {lost} of {len(pairs)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", default="choosing", choices=("choosing", "judging", "both", "unseen"))
    parser.add_argument("--families", default="", help="only these, by name")
    parser.add_argument("--optimizers", default="sgd,adam,adamw,muon", help="only these")
    parser.add_argument("--lengths", default="100,300,1000")
    parser.add_argument("--rules", default="none")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("population.csv"))
    parser.add_argument("--report", action="store_true", help="print only")
    parser.add_argument("--column", default="last", choices=COLUMNS[6:9], help="which weights are returned by all")
    parser.add_argument("--against", default="", choices=("", "constant", "cosine"), help="the best of these, only")
    parser.add_argument("--table", choices=("methods", "starts"), help="as Markdown, with rows for these")
    parser.add_argument("--worst", type=int, default=12, help="how many of the worst pairs are named")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rules = [name for name in arguments.rules.split(",") if name]
    done = load(arguments.results)
    only = arguments.families.split(",") if arguments.families else None
    families = [f for f in halves(arguments.half) if only is None or f.name in only]
    lengths, optimizers = map(int, arguments.lengths.split(",")), arguments.optimizers.split(",")
    wanted = [(f.name, o, n) for n in lengths for f in families for o in f.optimizers if o in optimizers]
    for family, optimizer, steps in wanted if not arguments.report else ():
        grid = (family, optimizer, steps, "grid")
        missing = [r for r in rules if defined(r, optimizer) and (family, optimizer, steps, r) not in done]
        if grid in done and not missing:
            continue
        task = Task(FAMILIES[family], arguments.seeds)
        fresh: list[dict[str, str]] = []
        if grid not in done:
            before = [n for f, o, n, rule in done if (f, o, rule) == (family, optimizer, "grid") and n < steps]
            done[grid] = baseline(task, grid, done[family, optimizer, max(before), "grid"] if before else None)
            fresh += done[grid]
        if missing:
            rates, each = start_rates(done[grid], optimizer), len(STARTS)
            parts = [((RULES | OPPONENTS)[rule](), slice(i * each, (i + 1) * each)) for i, rule in enumerate(missing)]
            shapes = torch.tensor([COSINE if start == "cosine" else CONSTANT for start in STARTS])
            runs = Runs(rates.repeat(len(missing)), shapes.repeat(len(missing)), parts)
            found = train(task, optimizer, steps, runs)
            for i, rule in enumerate(missing):
                key = (family, optimizer, steps, rule)
                done[key] = rows(key, list(STARTS), {k: v[:, i * each : (i + 1) * each] for k, v in found.items()})
                fresh += done[key]
        header = not arguments.results.exists()
        with arguments.results.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if header:
                writer.writeheader()
            writer.writerows(fresh)
    if arguments.table:
        table = by_method if arguments.table == "methods" else by_start
        table(done, wanted, rules, arguments.column, arguments.against)
    else:
        report(done, wanted, rules, arguments.column, arguments.against, arguments.worst)


if __name__ == "__main__":
    main()
