"""What a user sees of the run: the values to log, and the records of the history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_l2l.core.initial_search import SearchResult
from lightning_l2l.core.result import MetaGradient

if TYPE_CHECKING:
    import lightning.pytorch as pl

# A record keeps a meta-gradient entry by entry up to this many, else only its norm.
_MOST_ENTRIES = 100


@dataclass(frozen=True)
class MetaUpdate:
    """One meta-update.

    Attributes:
        step: Optimizer steps taken before it.
        result: The meta-gradient; ``None`` if there was none, since the step skipped a batch.
        trouble: The kind of trouble, ``""`` for none.
        note: What was done where that is not the ordinary thing, in words.
    """

    step: int
    result: MetaGradient | None
    trouble: str = ""
    note: str = ""


def search_message(result: SearchResult | str) -> tuple[str, bool]:
    """What to say about the initial search, and whether as a warning."""
    if isinstance(result, str):
        return f"LearnToLearn: no initial search, since {result}. Training starts from your own rate.", True
    if result.learning_rate is None:
        return (
            "LearnToLearn: the initial search found no learning rate at which the loss stays finite. Training starts "
            "from your own rate.",
            True,
        )
    return (
        f"LearnToLearn: the initial search chose learning rate {result.learning_rate:.3g} after {result.steps} "
        "training steps on a copy.",
        False,
    )


def no_update_message(steps: int, every_n_steps: int) -> str:
    """What to say at the end of a training that learned nothing: its length cannot always be known in advance."""
    return (
        f"LearnToLearn made no meta-update: training ended after {steps} steps, and every_n_steps is {every_n_steps}. "
        "Make it smaller."
    )


def log(trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, float], *, prog_bar: bool = False) -> None:
    """Log values of this step as the module would."""
    if trainer.barebones:
        return
    # float32 is what Lightning logs in; the double keeps the rate that was applied to the last bit.
    dtype = torch.float32 if module.device.type == "mps" else torch.float64
    for name, value in values.items():
        module.log(name, torch.tensor(value, dtype=dtype), prog_bar=prog_bar, on_step=True)


def by_group(name: str, values: Sequence[float], groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Names to log under: ``l2l/<name>`` for one group, else with the group's own name or its number."""
    if len(values) == 1:
        return {f"l2l/{name}": values[0]}
    labels = [str(group.get("name", index)) for index, group in enumerate(groups)]
    if len(set(labels)) < len(labels):
        labels = [str(index) for index in range(len(groups))]
    return {f"l2l/{name}/{label}": value for label, value in zip(labels, values, strict=True)}


def logged_values(update: MetaUpdate) -> dict[str, float]:
    """What is logged of a meta-update; nothing of one that gave no number."""
    if update.result is None:
        return {}
    found = {"l2l/meta_objective": update.result.value}
    gradients = update.result.gradients
    for name, gradient in gradients.items():
        label = "l2l/meta_gradient" if len(gradients) == 1 else f"l2l/meta_gradient/{name}"
        found[label] = gradient.double().mean().item()
    return found


def as_record(update: MetaUpdate, learning_rates: Sequence[float], values: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry of the history: plain numbers, strings and containers, since it travels in checkpoints.

    Args:
        update: The meta-update.
        learning_rates: The rates in force after it, one for each parameter group.
        values: The learned values in force after it, by group and key of ``torch.optim``.
    """
    result = update.result
    diagnostics: dict[str, Any] = {"trouble": update.trouble, "note": update.note}
    if result is not None:
        found = result.diagnostics
        diagnostics |= {
            "estimator": found.estimator,
            "reason": found.reason,
            "losses": found.losses.tolist(),
            "growth_rate": float(found.growth_rate),
            "overflow": bool(found.overflow),
            "underflow": bool(found.underflow),
            "truncated_step": found.truncated_step,
        }
    return {
        "step": update.step,
        "learning_rates": list(learning_rates),
        "hyperparameters": values,
        "meta_objective": float("nan") if result is None else float(result.value),
        "meta_gradient": {} if result is None else {n: _entries(g) for n, g in result.gradients.items()},
        "diagnostics": diagnostics,
    }


def _entries(gradient: Tensor) -> list[float]:
    if gradient.numel() > _MOST_ENTRIES:
        return [torch.linalg.vector_norm(gradient.double()).item()]
    values: list[float] = gradient.flatten().tolist()
    return values
