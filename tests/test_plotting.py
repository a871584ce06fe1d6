"""Figures of the run: what is on them, that the eye can tell it apart, and never at the price of the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import MemoryLogger, Plain, learner, loaders, observer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_l2l import LearnToLearn, plotting

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb


def record(step: int, rates: list[float], cosine: float = -0.5, trouble: str = "") -> dict[str, Any]:
    return {"step": step, "learning_rates": rates, "cosine": [cosine], "diagnostics": {"trouble": trouble}}


def test_rates_are_on_a_logarithmic_axis_and_the_evidence_below(trainer: Any) -> None:
    figure = plotting.plot_history([record(20, [0.1]), record(40, [0.2])])
    rates, cosine = figure.axes
    assert rates.get_yscale() == "log" and cosine.get_xlabel() == "training step" and cosine.get_ylabel() == "cosine"
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.2] and rates.get_legend() is None
    callback = learner(meta_data="val")
    trainer(callback).fit(Plain(), **loaders())
    rates, cosine, losses = callback.plot().axes
    drawn = [list(line.get_ydata()) for line in (*cosine.lines[:2], *losses.lines)]
    keys = ("cosine", "held_out_cosine", "training_loss", "held_out_loss")
    first = lambda value: value[0] if isinstance(value, list) else value  # noqa: E731
    assert drawn == [[first(record[key]) for record in callback.history] for key in keys]


def test_an_exact_estimator_s_objective_is_drawn_and_what_is_infinite_is_left_out() -> None:
    def exact(step: int, objective: float) -> dict[str, Any]:
        trouble = "" if math.isfinite(objective) else "diverged"
        return {"step": step, "learning_rates": [0.1], "meta_objective": objective, "diagnostics": {"trouble": trouble}}

    figure = plotting.plot_history([exact(20, 1.0), exact(40, math.inf)])
    assert [axis.get_ylabel() for axis in figure.axes] == ["learning rate", "meta-objective"]
    assert math.isnan(figure.axes[1].lines[0].get_ydata()[1])


def test_where_a_run_was_taken_back_is_marked_and_observing_is_no_trouble(trainer: Any) -> None:
    figure = plotting.plot_history([record(20, [0.1]), record(40, [0.05], -0.1, "rolled_back"), record(60, [0.05])])
    marks = [line for line in figure.axes[0].lines if "taken back" in str(line.get_label())]
    assert [list(line.get_xdata()) for line in marks] == [[40]]
    callback = observer()
    trainer(callback).fit(Plain(), **loaders())
    assert not any("taken back" in str(line.get_label()) for line in callback.plot().axes[0].lines)


def test_each_group_has_a_line_and_many_become_a_median_and_a_range() -> None:
    first, second = plotting.plot_history([record(20, [0.1]), record(40, [0.1, 0.3])]).axes[0].lines
    assert first.get_label() == "group 0" and math.isnan(second.get_ydata()[0]) and second.get_ydata()[1] == 0.3
    figure = plotting.plot_history([record(20, [10.0**-k for k in range(9)]), record(40, [10.0**-k for k in range(9)])])
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [1e-4, 1e-4] and "9 groups" in line.get_label()


def test_figures_are_written_and_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = LearnToLearn()
    with pytest.raises(ValueError, match="no update yet"):
        callback.plot()
    callback.history = [record(20, [0.1]), record(40, [0.2])]
    callback.plot(str(tmp_path / "run.svg"))
    assert (tmp_path / "run.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lightning-l2l\[plots\]"'):
        callback.plot()


def test_lines_differ_without_colour_and_in_greyscale() -> None:
    def grey(color: str) -> float:
        red, green, blue = to_rgb(color)
        return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601 luma, as printers do

    assert len({str(style["linestyle"]) for style in plotting.STYLES}) == len(plotting.STYLES)
    first, second, *_ = (grey(style["color"]) for style in plotting.STYLES)
    assert abs(first - second) > 0.05


# -- in loggers -------------------------------------------------------------------------------------------------------


class FigureLogger(MemoryLogger):
    """A logger whose experiment takes figures, as TensorBoard's does."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.figures: list[tuple[str, Any, int]] = []
        self.error = error

    @property
    def experiment(self) -> FigureLogger:
        return self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        if self.error is not None:
            raise self.error
        self.figures.append((tag, figure, global_step))


@pytest.mark.feature("loggers", "works", "values, and the figure of the run where the logger takes figures")
def test_every_logger_that_takes_figures_gets_one_at_the_end_of_the_fit(trainer: Any) -> None:
    first, second, callback = FigureLogger(), FigureLogger(), learner()
    fitted = trainer(callback, logger=[first, MemoryLogger(), second])
    fitted.fit(Plain(), **loaders())
    for logger in (first, second):
        ((tag, figure, step),) = logger.figures
        assert tag == "l2l/run" and step == fitted.global_step
        rates = [record["learning_rates"][0] for record in callback.history]
        assert list(figure.axes[0].lines[0].get_ydata()) == rates


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_shows_the_figure(trainer: Any, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    fitted = trainer(learner(), logger=logger)
    fitted.fit(Plain(), **loaders())
    found = events.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    found.Reload()
    (image,) = found.Images("l2l/run")
    assert image.step == fitted.global_step and image.encoded_image_string.startswith(b"\x89PNG")


def test_an_error_of_the_logger_is_one_warning_and_the_fit_ends_well(trainer: Any) -> None:
    loggers_ = [FigureLogger(OSError("the disk is full.")), FigureLogger(OSError("the disk is full."))]
    callback = learner()
    fitted = trainer(callback, logger=loggers_)
    with pytest.warns(UserWarning, match=r"l2l/run.*OSError: the disk is full\.") as caught:
        fitted.fit(Plain(), **loaders())
    assert len([entry for entry in caught if "l2l/run" in str(entry.message)]) == 1
    assert fitted.state.finished and callback.history


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_without_matplotlib_updates_or_figures_nothing_is_drawn(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv, idle = CSVLogger(tmp_path), FigureLogger()
    trainer(learner(), logger=csv).fit(Plain(), **loaders())
    assert not list(Path(csv.log_dir).rglob("*.png"))
    trainer(LearnToLearn(), max_epochs=-1, max_time={"seconds": 0}, logger=idle).fit(Plain(), **loaders())
    monkeypatch.setattr("lightning_l2l.host.reporting.find_spec", lambda name: None)
    trainer(learner(), logger=idle).fit(Plain(), **loaders())
    assert idle.figures == []
