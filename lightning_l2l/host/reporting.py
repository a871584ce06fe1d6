"""What a user of Lightning sees of the run: logged values, the figure of the run, the line at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2l.host.lightning_api import log_on_step

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_l2l.tuner import Tuner


def log(
    trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, float], *, prog_bar: bool = False
) -> None:
    """Log values of this step as the module would; nothing in a barebones Trainer."""
    if getattr(trainer, "barebones", False):
        return
    # float32 is what Lightning logs in; the double keeps the rate that was applied to the last bit.
    dtype = torch.float32 if module.device.type == "mps" else torch.float64
    for name, value in values.items():
        if math.isfinite(value):
            log_on_step(trainer, module, name, torch.tensor(value, dtype=dtype), prog_bar)


def names_of(name: str, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Names to log a value of each parameter group under.

    ``l2l/<name>`` for a single group; else followed by the optimizer's number, if there are several, and the group's
    own name or number.
    """
    several = len(optimizers) > 1
    found: list[str] = []
    for number, optimizer in enumerate(optimizers):
        groups = optimizer.param_groups
        labels = [str(group.get("name", index)) for index, group in enumerate(groups)]
        if len(set(labels)) < len(labels):
            labels = [str(index) for index in range(len(groups))]
        parts = [f"l2l/{name}", *([f"optimizer_{number}"] if several else [])]
        found += ["/".join([*parts, *([label] if len(groups) > 1 else [])]) for label in labels]
    return found


def summary(tuners: Sequence[Tuner], history: Sequence[Mapping[str, Any]]) -> str:
    """One line for the end of the fit: what was changed, and what the evidence was at the end."""
    factors = [f"{math.exp(value):.3g}" for tuner in tuners for value in tuner.log_factors]
    rolled_back = sum(record["diagnostics"]["trouble"] == "rolled_back" for record in history)
    unchanged = all(value == 0 for tuner in tuners for value in tuner.log_factors)
    said = "your learning rate stayed" if unchanged else f"your learning rate was multiplied by {', '.join(factors)}"
    cosines = [record["cosine"] for record in history if record.get("cosine")]
    if cosines:
        last = ", ".join(f"{value:+.2f}" for value in cosines[-1])
        said += f" (last cosine of gradient and displacement {last}: negative is progress, positive overshoots)"
    return said + (f"; the run was rolled back {rolled_back} times." if rolled_back else ".")


def log_figure(trainer: pl.Trainer, history: Sequence[Mapping[str, Any]]) -> None:
    """Add the figure of the run as ``l2l/run`` to every logger whose experiment has ``add_figure``.

    A picture is a convenience: without matplotlib there is none, and an error while it is drawn or written becomes a
    warning, since it must not cost the user a training that has just been finished.
    """
    if not history or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    from lightning_l2l.plotting import plot_history

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
