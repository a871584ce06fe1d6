"""The figure of the run in the user's logger: there once, at the end, and never at the price of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MemoryLogger, Plain, learner, loaders
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_l2l import LearnToLearn, SmallFCOptimizer

pytest.importorskip("matplotlib")


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


def test_every_logger_that_takes_figures_gets_one_at_the_end_of_the_fit(trainer: Any) -> None:
    first, second, callback = FigureLogger(), FigureLogger(), learner()
    fitted = trainer(callback, logger=[first, MemoryLogger(), second])
    fitted.fit(Plain(), **loaders())
    for logger in (first, second):
        ((tag, figure, step),) = logger.figures
        assert tag == "l2l/run" and step == fitted.global_step
        drawn = figure.axes[0].lines[0].get_ydata()
        assert list(drawn) == [record["learning_rates"][0] for record in callback.history]


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
    loggers = [FigureLogger(OSError("the disk is full.")), FigureLogger(OSError("the disk is full."))]
    callback = learner()
    fitted = trainer(callback, logger=loggers)
    with pytest.warns(UserWarning, match=r"l2l/run.*OSError: the disk is full\.") as caught:
        fitted.fit(Plain(), **loaders())
    assert len([entry for entry in caught if "l2l/run" in str(entry.message)]) == 1
    assert fitted.state.finished and callback.history


def test_without_matplotlib_there_is_no_figure_and_no_word(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_l2l.host.figures.find_spec", lambda name: None)
    logger = FigureLogger()
    trainer(learner(), logger=logger).fit(Plain(), **loaders())  # in this suite a warning is an error
    assert logger.figures == []


@pytest.mark.filterwarnings("ignore:LearnToLearn made no meta-update")
def test_a_fit_without_meta_updates_draws_nothing(trainer: Any) -> None:
    logger = FigureLogger()
    trainer(LearnToLearn(initial_search=False), max_epochs=-1, max_time={"seconds": 0}, logger=logger).fit(
        Plain(), **loaders()
    )
    assert logger.figures == []


@pytest.mark.filterwarnings("ignore:.*", category=UserWarning)
def test_loggers_without_figures_and_their_files_stay_as_they_are(trainer: Any, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(learner(), logger=logger).fit(Plain(), **loaders())
    assert not list(Path(logger.log_dir).rglob("*.png"))


def test_a_learned_optimizer_without_rates_of_its_own_is_drawn_too(trainer: Any) -> None:
    torch.manual_seed(0)
    tiny = SmallFCOptimizer()
    logger = FigureLogger()
    trainer(learner(initial_search=False, meta_learning_rate=1e-3), logger=logger).fit(
        Plain(lambda parameters: tiny.as_torch_optimizer(parameters)), **loaders()
    )
    assert len(logger.figures) == 1
