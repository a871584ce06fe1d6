"""The figures of ``docs/which-estimator.md`` from the runs of ``anchors.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

TITLES = {
    "a1": ("Influence balancing", "loss after 500 steps", "log"),
    "a2": ("Toy regression", "sum of the losses of 100 steps", "log"),
    "a7": ("Schedule of a digits classifier", "mean training loss of 500 steps", "linear"),
}
COLOURS = {"truncated": "#D55E00", "es": "#E69F00", "pes": "#0072B2", "es_single": "#009E73"}
OPTIMA = {"a2": 555.5}


def draw(runs: list[dict], folder: Path) -> None:
    """One figure for each problem that there are runs of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, quantity, scale) in TITLES.items():
        mine = [run for run in runs if run["problem"] == name]
        if not mine:
            continue
        figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
        labelled = set()
        for run in mine:
            estimator = run["estimator"]
            if estimator == "grid":
                axes.axhline(run["loss"], color="black", linestyle=":", label="best of a grid of 147")
                continue
            steps, losses = zip(*run["curve"], strict=True)
            label = None if estimator in labelled else estimator
            labelled.add(estimator)
            # Above the others and dashed: truncated and es lie on each other.
            style = {"linestyle": "--", "zorder": 3} if estimator == "truncated" else {}
            axes.plot(steps, losses, color=COLOURS[estimator], alpha=0.8, linewidth=1.3, label=label, **style)
            if name == "a7":  # the curve is judged on three trainings, the end on forty
                axes.plot(
                    steps[-1] + 20, run["loss"], marker="o", color=COLOURS[estimator], markersize=5, clip_on=False
                )
        if name in OPTIMA:
            axes.axhline(OPTIMA[name], color="black", linestyle=":", label="best of a grid")
        axes.set(xlabel="meta-updates", ylabel=quantity, title=title, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"estimators-{name}.png", dpi=120)
        plt.close(figure)
