"""Figures: what is on them, that the eye can tell it apart, and that errors come before work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import Plain, loaders, observer

from lightning_l2l import LearnToLearn, plotting

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb


def record(step: int, rates: list[float], objective: float = -0.5, trouble: str = "") -> dict[str, Any]:
    return {"step": step, "learning_rates": rates, "meta_objective": objective, "diagnostics": {"trouble": trouble}}


def test_rates_are_on_a_logarithmic_axis_and_the_objective_below() -> None:
    figure = plotting.plot_history([record(20, [0.1]), record(40, [0.2])])
    rates, objective = figure.axes
    assert rates.get_yscale() == "log" and objective.get_xlabel() == "training step"
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.2]
    assert list(objective.lines[0].get_xdata()) == [20, 40]
    assert rates.get_legend() is None  # one rate needs no legend


def test_refused_updates_are_marked_where_they_happened() -> None:
    history = [record(20, [0.1]), record(40, [0.05], math.inf, "diverged"), record(60, [0.05])]
    figure = plotting.plot_history(history)
    marks = [line for line in figure.axes[0].lines if line.get_label() == "no gradient applied"]
    assert [list(line.get_xdata()) for line in marks] == [[40]]
    assert math.isnan(figure.axes[1].lines[0].get_ydata()[1])  # an infinite objective is left out


def test_observing_only_is_not_a_refusal(trainer: Any) -> None:
    callback = observer()
    trainer(callback).fit(Plain(), **loaders())
    assert callback.history[0]["diagnostics"]["note"]  # it does say that it only observed
    figure = plotting.plot_history(callback.history)
    assert "no gradient applied" not in [line.get_label() for line in figure.axes[0].lines]


def test_each_group_has_a_line_and_a_late_one_starts_late() -> None:
    figure = plotting.plot_history([record(20, [0.1]), record(40, [0.1, 0.3])])
    first, second = figure.axes[0].lines
    assert first.get_label() == "group 0" and math.isnan(second.get_ydata()[0]) and second.get_ydata()[1] == 0.3


def test_many_groups_become_a_median_and_a_range() -> None:
    figure = plotting.plot_history([record(20, [10.0**-k for k in range(9)]), record(40, [10.0**-k for k in range(9)])])
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [1e-4, 1e-4] and "9 groups" in line.get_label()


def test_figure_is_written_and_the_callback_uses_it(tmp_path: Path) -> None:
    callback = LearnToLearn()
    callback.history = [record(20, [0.1]), record(40, [0.2])]
    callback.plot(str(tmp_path / "run.svg"))
    assert (tmp_path / "run.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_nothing_to_plot_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="no meta-update has happened"):
        plotting.plot_history([])


def test_missing_matplotlib_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lightning-l2l\[plots\]"'):
        plotting.plot_history([record(20, [0.1])])


def test_lines_differ_without_colour() -> None:
    assert len({str(style["linestyle"]) for style in plotting.STYLES}) == len(plotting.STYLES)


def test_first_lines_differ_in_greyscale() -> None:
    def grey(color: str) -> float:
        red, green, blue = to_rgb(color)
        return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601 luma, as printers do

    first, second, *_ = (grey(style["color"]) for style in plotting.STYLES)
    assert abs(first - second) > 0.05
