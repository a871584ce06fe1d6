"""What a user sees of the run: the values to log, and the records of the history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_l2l.exact.initial_search import SearchResult
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.signals import RECENT, agreement, excess_growth, overfits, signal_to_noise
from lightning_l2l.host.settings import Settings
from lightning_l2l.host.trainer import log_on_step

if TYPE_CHECKING:
    import lightning.pytorch as pl

# A record keeps a meta-gradient entry by entry up to this many, else only its norm.
_MOST_ENTRIES = 100
# Records that are looked through for the last usable meta-gradients.
_LOOK_BACK = 4 * RECENT


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
        log_on_step(trainer, module, name, torch.tensor(value, dtype=dtype), prog_bar)


def by_group(name: str, values: Sequence[float], groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Names to log under: ``l2l/<name>`` for one group, else with the group's own name or its number."""
    if len(values) == 1:
        return {f"l2l/{name}": values[0]}
    labels = [str(group.get("name", index)) for index, group in enumerate(groups)]
    if len(set(labels)) < len(labels):
        labels = [str(index) for index in range(len(groups))]
    return {f"l2l/{name}/{label}": value for label, value in zip(labels, values, strict=True)}


def logged_values(update: MetaUpdate, record: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a meta-update; nothing of one that gave no number.

    Args:
        update: The meta-update.
        record: Its entry of the history.
    """
    if update.result is None:
        return {}
    found = {"l2l/meta_objective": update.result.value}
    gradients = update.result.gradients
    for name, gradient in gradients.items():
        label = "l2l/meta_gradient" if len(gradients) == 1 else f"l2l/meta_gradient/{name}"
        found[label] = gradient.double().mean().item()
    return found | {f"l2l/{name}": value for name, value in record["signals"].items() if math.isfinite(value)}


def as_record(
    update: MetaUpdate,
    learning_rates: Sequence[float],
    values: list[dict[str, Any]],
    history: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> dict[str, Any]:
    """An entry of the history: plain numbers, strings and containers, since it travels in checkpoints.

    Args:
        update: The meta-update.
        learning_rates: The rates in force after it, one for each parameter group.
        values: The learned values in force after it, by group and key of ``torch.optim``.
        history: The records before it.
        settings: What the user asked for.
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
    # A look-ahead has its training batches from the run, which has just been trained on them: they are partial.
    along = result is not None and result.diagnostics.estimator in ("displacement", "live")
    fair = along and settings.meta_data != "train"
    training = result.diagnostics.training_gradients if fair and result is not None else {}
    record = {
        "step": update.step,
        "learning_rates": list(learning_rates),
        "hyperparameters": values,
        "meta_objective": float("nan") if result is None else float(result.value),
        "meta_gradient": {} if result is None else {n: _entries(g) for n, g in result.gradients.items()},
        "training_gradient": {n: _entries(g) for n, g in training.items()},
        "diagnostics": diagnostics,
    }
    entry_by_entry = result is None or all(g.numel() <= _MOST_ENTRIES for g in result.gradients.values())
    return {**record, "signals": _signals([*history[-_LOOK_BACK:], record], entry_by_entry)}


def _signals(history: Sequence[Mapping[str, Any]], entry_by_entry: bool) -> dict[str, float]:
    gradients = [_row(record["meta_gradient"]) for record in history]
    last = history[-1]["diagnostics"]
    carries_tangents = last.get("estimator") in ("live", "forward")
    return {
        "signal_to_noise": signal_to_noise(gradients) if entry_by_entry else math.nan,
        "agreement": agreement(gradients, [_row(record["training_gradient"]) for record in history]),
        "excess_growth": excess_growth(last["growth_rate"], len(last["losses"])) if carries_tangents else math.nan,
    }


def _row(gradients: Mapping[str, Sequence[float]]) -> list[float]:
    return [value for entries in gradients.values() for value in entries]


def remarks(update: MetaUpdate, history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What a user should be told after a meta-update, once for each kind: the kind, and the words.

    Args:
        update: The meta-update.
        history: All records, its own included.
    """
    said = [(update.trouble, update.note)] if update.trouble else []
    learned = [_row(record["meta_gradient"]) for record in history[-_LOOK_BACK:]]
    if overfits(learned, [_row(record["training_gradient"]) for record in history[-_LOOK_BACK:]]):
        said.append(
            (
                "overfits",
                "for some time training batches have been asking for a larger learning rate and held-out batches for a "
                "smaller one: the network overfits. Held-out data is needed to judge this run (meta_data='train' would "
                "keep the rate up). Consider to stop early, more data, or regularisation.",
            )
        )
    return said


def warn_once(remarks: Sequence[tuple[str, str]], said: set[str], step: int) -> None:
    """Warn of what has not been said yet.

    Args:
        remarks: What :func:`remarks` found.
        said: The kinds that have been; it grows.
        step: Optimizer steps taken.
    """
    for kind, words in remarks:
        if kind not in said:
            rank_zero_warn(f"LearnToLearn, after step {step}: {words} (Said once; see .history.)")
        said.add(kind)


def _entries(gradient: Tensor) -> list[float]:
    if gradient.numel() > _MOST_ENTRIES:
        return [torch.linalg.vector_norm(gradient.double()).item()]
    values: list[float] = gradient.flatten().tolist()
    return values
