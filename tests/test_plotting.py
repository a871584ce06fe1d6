"""Figures: what is on them, that the eye can tell it apart, and that errors come before work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import Plain, loaders

from lightning_l2l import LearnToLearn, plotting

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb


def record(step: int, rates: list[float], cosine: float = -0.5, trouble: str = "", **more: Any) -> dict[str, Any]:
    evidence = {"cosine": [cosine], "cosine_error": [0.1], "training_loss": 2.0}
    return {"step": step, "learning_rates": rates, **evidence, **more, "diagnostics": {"trouble": trouble}}


def test_rates_are_on_a_logarithmic_axis_above_the_evidence_and_the_losses() -> None:
    figure = plotting.plot_history([record(10, [0.1]), record(12, [0.2], held_out_loss=2.5)])
    rates, evidence, losses = figure.axes
    assert rates.get_yscale() == "log" and losses.get_xlabel() == "training step"
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.2]
    assert list(evidence.lines[0].get_ydata()) == [-0.5, -0.5]
    assert [line.get_label() for line in losses.lines] == ["training", "held-out"]
    assert rates.get_legend() is None  # one rate needs no legend


def test_an_exact_estimator_shows_its_meta_objective() -> None:
    figure = plotting.plot_history([record(10, [0.1], meta_objective=-0.4)])
    assert figure.axes[1].get_ylabel() == "meta-objective"


def test_a_rollback_is_marked_where_it_happened() -> None:
    rolled_back = {"step": 40, "learning_rates": [0.05], "diagnostics": {"trouble": "rolled_back"}}  # has no evidence
    figure = plotting.plot_history([record(20, [0.1]), rolled_back, record(60, [0.05], math.inf)])
    marks = [line for line in figure.axes[0].lines if line.get_label() == "see diagnostics"]
    assert [list(line.get_xdata()) for line in marks] == [[40]]
    cosines = list(figure.axes[1].lines[0].get_ydata())
    assert cosines[0] == -0.5 and math.isnan(cosines[1]) and math.isnan(cosines[2])  # what is infinite is left out


def test_the_figure_of_a_run_has_its_records(trainer: Any) -> None:
    callback = LearnToLearn()
    trainer(callback).fit(Plain(), **loaders())
    figure = callback.plot()
    assert list(figure.axes[0].lines[0].get_xdata()) == [entry["step"] for entry in callback.history]
    assert "see diagnostics" not in [line.get_label() for line in figure.axes[0].lines]


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
    with pytest.raises(ValueError, match="no update has happened"):
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
