"""What the optimizer stepped with, noted at every step and kept where it changes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_l2l.schedule import LearnedSchedule

if TYPE_CHECKING:
    from lightning_l2l.host.applied import AppliedValues

# Name of a group, key of torch.optim (of betas: beta1, beta2).
_Column = tuple[str, str]


class AppliedRecord:
    """The values of every optimizer step: eight bytes for each value and each step at which any of them changed.

    Args:
        saved: What :meth:`state_dict` returned in the run that is resumed.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._steps = array("q")
        self._columns: dict[_Column, array[float]] = {}
        self._shown: list[Any] | None = None
        if saved:
            self._steps = array("q", saved["steps"].tolist())
            for (group, key), column in zip(saved["columns"], saved["values"].T.tolist(), strict=True):
                self._columns[group, key] = array("d", column)

    def note(self, step: int, applied: AppliedValues) -> None:
        """An optimizer step was just made.

        Args:
            step: Optimizer steps taken before it.
            applied: Where the groups are as the optimizer saw them.
        """
        # What every step costs is this comparison.
        shown = applied.shown()
        if shown == self._shown:
            return
        self._shown = shown
        found = {
            (group, key): value for group, values in applied.in_force().items() for key, value in _flat(values).items()
        }
        same = self._steps and found.keys() == self._columns.keys()
        if same and all(column[-1] == found[name] for name, column in self._columns.items()):
            return
        if self._steps and self._steps[-1] >= step:  # stepped twice in one step of the Trainer: the last one counts
            self._steps.pop()
            for column in self._columns.values():
                column.pop()
        for name in found:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan] * len(self._steps))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(found.get(name, math.nan))

    def state_dict(self) -> dict[str, Any]:
        """Names, and tensors of numbers."""
        columns = [torch.tensor(column, dtype=torch.float64) for column in self._columns.values()]
        return {
            "columns": [list(name) for name in self._columns],
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "values": torch.stack(columns, dim=1) if columns else torch.zeros(0, 0, dtype=torch.float64),
        }


def exported(state: dict[str, Any]) -> LearnedSchedule:
    """The table of a saved record.

    Args:
        state: The callback's state.

    Raises:
        ValueError: There is nothing in it.
    """
    saved = state.get("schedule") or {}
    if not saved.get("columns"):
        raise ValueError(
            "There is no schedule to export: no optimizer step has been made with LearnToLearn, or the optimizer is "
            "itself a learned one. A learned optimizer is kept with its own save(path)."
        )
    names = {group for group, _ in saved["columns"]}
    columns = [key if len(names) == 1 else f"{key}/{group}" for group, key in saved["columns"]]
    rows = tuple(tuple(row) for row in saved["values"].tolist())
    return LearnedSchedule(tuple(columns), tuple(saved["steps"].tolist()), rows)


def _flat(values: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Sequence):
            found.update(beta1=value[0], beta2=value[1])
        else:
            found[key] = value
    return found
