"""The figure of the run, for loggers that take figures (TensorBoard's does)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2l.plotting import plot_history

if TYPE_CHECKING:
    import lightning.pytorch as pl


def log_figure(trainer: pl.Trainer, history: Sequence[Mapping[str, Any]]) -> None:
    """Add the figure of the run as ``l2l/run`` to every logger whose experiment has ``add_figure``.

    A picture is a convenience: without matplotlib there is none, and an error while it is drawn or written becomes a
    warning, since it must not cost the user a training that has just been finished.

    Args:
        trainer: The Trainer at the end of its training.
        history: One record for each meta-update; nothing is drawn if there is none.
    """
    if not history or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    try:
        # Lightning itself has asked for every experiment by now: asking again starts nothing.
        experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        for add in [getattr(experiment, "add_figure", None) for experiment in experiments]:
            if add is not None:
                add("l2l/run", plot_history(history), global_step=trainer.global_step)
    except Exception as error:  # whatever a logger or a drawing library may raise; said, not swallowed
        rank_zero_warn(
            f"LearnToLearn could not log the figure of the run (l2l/run): {type(error).__name__}: {error} The training "
            "is not affected; LearnToLearn.plot() draws the same."
        )
