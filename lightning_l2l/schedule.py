"""The learned schedule as a plain table, and what replays it in any training, without this package if need be."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class LearnedSchedule:
    """What a run applied: the learning rate, and whatever else was learned, of each parameter group.

    Made by :meth:`LearnToLearn.export_schedule <lightning_l2l.LearnToLearn.export_schedule>`. The values are those that
    the optimizer stepped with, your own schedule included, to the last bit. There is one row for each change, so a rate
    that only the callback moves takes one row for each meta-update.

    **When it helps.** The rate of a run is wanted for the next one: for a repetition without the cost of learning, for
    other seeds, for a colleague who has not installed this package. A run that is repeated with its own schedule, on
    the same data with the same seed, arrives at the same weights bit for bit, unless it was rolled back on the way.

    Attributes:
        columns: What each value is: a key of the optimizer's parameter groups (``lr``, ``momentum``, ``weight_decay``;
            of ``betas``, ``beta1`` and ``beta2``), with several groups followed by ``/`` and the group's name or
            number. Where every tensor has its own rate, it is a group of its own, by its name.
        steps: Optimizer steps taken before each row came into force; increasing.
        values: One row of values for each of these; NaN for a group that did not exist yet.

    Raises:
        ValueError: The table is not one: no row, or rows and columns that do not match.

    Example:
        >>> schedule = LearnedSchedule(("lr",), (0, 20, 40), ((0.1,), (0.13,), (0.11,)))
        >>> schedule.rows[1]
        {'step': 20, 'lr': 0.13}
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scheduler = schedule.scheduler(optimizer)
        >>> for _ in range(25):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.13
    """

    columns: tuple[str, ...]
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check the table."""
        matching = len(self.steps) == len(self.values) and all(len(row) == len(self.columns) for row in self.values)
        if not self.steps or not matching or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                "A schedule is a table with at least one row, increasing steps, and in each row one value for each of "
                f"its columns {self.columns}; this is none."
            )

    @property
    def groups(self) -> tuple[str, ...]:
        """The names, or numbers, of the parameter groups, in the order of the optimizer's."""
        return tuple(dict.fromkeys(_split(column)[1] for column in self.columns))

    @property
    def rows(self) -> list[dict[str, float]]:
        """One dictionary for each change, ``step`` first, as a data frame is made of."""
        return [
            {"step": step, **dict(zip(self.columns, row, strict=True))}
            for step, row in zip(self.steps, self.values, strict=True)
        ]

    def at(self, step: int) -> dict[str, float]:
        """The values that were in force for the optimizer step with this number (from 0).

        Before the first row they are those of the first row, and after the last row those of the last.
        """
        place = max(bisect_right(self.steps, step) - 1, 0)
        return dict(zip(self.columns, self.values[place], strict=True))

    def to_csv(self, path: str | Path) -> None:
        """Write the table as text, every number in full: what is read back is the same to the last bit.

        Args:
            path: The file to write.
        """
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *self.columns])
            for step, row in zip(self.steps, self.values, strict=True):
                writer.writerow([step, *("" if math.isnan(value) else repr(value) for value in row)])

    @classmethod
    def from_csv(cls, path: str | Path) -> LearnedSchedule:
        """Read what :meth:`to_csv` wrote.

        Args:
            path: The file to read.

        Raises:
            ValueError: It is no such table.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if header[:1] != ["step"]:
            raise ValueError(f"{path} is no exported schedule: its first column is not 'step'. to_csv writes them.")
        values = tuple(tuple(float(cell) if cell else math.nan for cell in row[1:]) for row in rows)
        return cls(tuple(header[1:]), tuple(int(row[0]) for row in rows), values)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """A scheduler that replays the table; it is to be stepped after every optimizer step.

        The values are absolute: whatever rate the optimizer was given is overwritten, and no other scheduler should
        write it. In Lightning, return ``{"scheduler": schedule.scheduler(optimizer), "interval": "step"}`` next to the
        optimizer. After the last row its values stay.

        Args:
            optimizer: The optimizer, with the parameter groups of :attr:`groups`, in that order.

        Returns:
            An ordinary ``LambdaLR``. Checkpoints of it hold numbers only, so they load without this package.

        Raises:
            ValueError: The optimizer has another number of parameter groups.
        """
        names = self.groups
        if len(optimizer.param_groups) != len(names):
            raise ValueError(
                f"The schedule has {len(names)} parameter groups ({', '.join(names[:5])}), and the optimizer has "
                f"{len(optimizer.param_groups)}. Give it the same groups in the same order; where every tensor has its "
                "own rate, that is one group for each tensor."
            )
        for group in optimizer.param_groups:
            group["initial_lr"] = 1.0  # a LambdaLR multiplies by this: the rates come out to the last bit
        return LambdaLR(optimizer, [self._replay(optimizer, which, name) for which, name in enumerate(names)])

    def _replay(self, optimizer: torch.optim.Optimizer, which: int, name: str) -> Callable[[int], float]:
        table = self._columns_of(name)

        # A function, not an object: a scheduler's state holds the attributes of objects.
        def rate(step: int) -> float:
            place = max(bisect_right(self.steps, step) - 1, 0)
            group = optimizer.param_groups[which]
            for key, column in table.items():
                if key in ("beta1", "beta2"):
                    betas = list(group["betas"])
                    betas[key == "beta2"] = column[place]
                    group["betas"] = tuple(betas)
                elif key != "lr":
                    group[key] = column[place]
            return table["lr"][place]

        return rate

    def _columns_of(self, name: str) -> dict[str, Sequence[float]]:
        """By key, the values of one group; before it existed, its first ones."""
        found: dict[str, Sequence[float]] = {}
        for place, column in enumerate(self.columns):
            key, group = _split(column)
            if group == name:
                values = [row[place] for row in self.values]
                first = next((value for value in values if not math.isnan(value)), math.nan)
                found[key] = [first if math.isnan(value) else value for value in values]
        if "lr" not in found:
            raise ValueError(f"The schedule has no learning rate 'lr' for group {name!r}, so nothing can replay it.")
        return found


def _split(column: str) -> tuple[str, str]:
    key, _, group = column.partition("/")
    return key, group or "0"
