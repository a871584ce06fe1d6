"""Base and applied learning rates of an optimizer, kept apart while everybody reads and writes ``group["lr"]``.

The *base rate* of a parameter group is what the user's optimizer, scheduler or hook wrote; the *applied rate* is that
times the learned factor. Groups show the applied rate, so monitors, progress bars and checkpoints see what is used;
what others write is taken for the new base rate. A rate that is computed from the one shown (``group["lr"] *= 0.7``, or
by a schedule that multiplies) would carry the learned factor into the base; :class:`AppliedRate` prevents that.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.schedule import LearnedSchedule

# Pickled applied rates are plain floats; torch.load(weights_only=True) has to be told that `float` is harmless (2.13).
torch.serialization.add_safe_globals([float])


def _both(operation: Callable[[Any, Any], Any], *, reflected: bool = False) -> Callable[[Any, Any], Any]:
    def apply(self: AppliedRate, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        theirs = other.base if isinstance(other, AppliedRate) else float(other)
        pairs = ((float(self), float(other)), (self.base, theirs))
        applied, base = (operation(b, a) if reflected else operation(a, b) for a, b in pairs)
        return AppliedRate(applied, base)

    return apply


class AppliedRate(float):
    """An applied learning rate that knows its base rate; arithmetic with numbers acts on both.

    A hook or schedule that computes a new rate from the one it finds thereby says what the new *base* rate is.

    Args:
        applied: The rate that the optimizer steps with.
        base: The rate without the learned factor.

    Example:
        >>> rate = AppliedRate(0.2, base=0.1)
        >>> rate *= 0.5
        >>> float(rate), rate.base
        (0.1, 0.05)
    """

    base: float

    def __new__(cls, applied: float, base: float) -> AppliedRate:
        """See the class."""
        rate = super().__new__(cls, applied)
        rate.base = base
        return rate

    def __reduce__(self) -> Any:
        return float, (float(self),)

    def __deepcopy__(self, memo: Any) -> AppliedRate:
        return self

    __mul__ = _both(operator.mul)
    __rmul__ = _both(operator.mul, reflected=True)
    __add__ = _both(operator.add)
    __radd__ = _both(operator.add, reflected=True)
    __sub__ = _both(operator.sub)
    __rsub__ = _both(operator.sub, reflected=True)
    __truediv__ = _both(operator.truediv)


class AppliedRates:
    """The learned factors in the groups of one optimizer.

    A learning rate that is a tensor (``capturable=True``, compiled steps) is written in place. It shows the base rate
    except while the optimizer steps, and a tensor that several groups share is replaced by one for each of them.

    Args:
        optimizer: Any optimizer whose groups have an ``"lr"``.

    Raises:
        ValueError: A parameter group has no learning rate.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> rates = AppliedRates(optimizer)
        >>> rates.apply([2.0])
        >>> optimizer.param_groups[0]["lr"], rates.base
        (0.2, [0.1])
        >>> optimizer.param_groups[0]["lr"] *= 0.5  # the user's own decay
        >>> rates.refresh()
        >>> rates.base, rates.applied
        ([0.05], [0.1])
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.factors: list[float] = []
        self._shown: list[Any] = []
        self._base: list[float] = []
        # Checkpoints hold plain numbers: they load without this package.
        self._hook: Any = None
        with suppress(AttributeError):  # an object that merely behaves like an optimizer
            self._hook = optimizer.register_state_dict_post_hook(_plain)
        self.refresh()

    @property
    def base(self) -> list[float]:
        """The base rate of each group."""
        return list(self._base)

    @property
    def applied(self) -> list[float]:
        """The applied rate of each group."""
        return [base * factor for base, factor in zip(self._base, self.factors, strict=True)]

    def refresh(self) -> None:
        """Take over what others have written, and show the applied rates again. Costs a comparison where nobody has."""
        groups = self.optimizer.param_groups
        if len(groups) == len(self._shown) and all(map(operator.is_, [group["lr"] for group in groups], self._shown)):
            return
        seen: set[int] = set()
        for index, group in enumerate(groups):
            if group.get("lr") is None:
                raise ValueError(
                    f"Parameter group {index} of {type(self.optimizer).__name__} has no learning rate 'lr', so there "
                    "is nothing to learn. Leave this optimizer out."
                )
            if index == len(self.factors):  # a group that was added during the training
                self.factors.append(1.0)
                self._base.append(0.0)
                self._shown.append(None)
            rate = group["lr"]
            if isinstance(rate, Tensor):
                if id(rate) in seen:
                    rate = group["lr"] = rate.clone()
                seen.add(id(rate))
                self._base[index], self._shown[index] = float(rate), None  # read anew each time
            elif rate is not self._shown[index]:
                if isinstance(rate, AppliedRate):
                    self._base[index] = rate.base
                elif rate != self._shown[index]:  # else a step that raised has left the plain number there
                    self._base[index] = float(rate)
                self._show(index)
        del self.factors[len(groups) :], self._base[len(groups) :], self._shown[len(groups) :]

    def apply(self, factors: Sequence[float]) -> None:
        """Set the learned factor of each group.

        Args:
            factors: One positive number for each group.
        """
        self.refresh()
        self.factors[:] = factors
        for index in range(len(self.factors)):
            self._show(index)

    def rebase(self, base: Sequence[float]) -> None:
        """Set the base rates: groups that a checkpoint has restored show applied rates.

        Args:
            base: One rate for each group, or for the first so many.
        """
        for group, rate in zip(self.optimizer.param_groups, base, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _show(self, index: int) -> None:
        group, base, factor = self.optimizer.param_groups[index], self._base[index], self.factors[index]
        if isinstance(group["lr"], Tensor):
            return
        # Untouched where nothing is learned: the very number that the user wrote, to the last bit.
        group["lr"] = self._shown[index] = AppliedRate(base * factor if factor != 1 else base, base)

    def before_step(self) -> None:
        """The optimizer is about to step: tensors show the applied rate, and numbers are plain ones (faster)."""
        self.refresh()
        for group, base, factor in zip(self.optimizer.param_groups, self._base, self.factors, strict=True):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = float(group["lr"])
            elif factor != 1:
                group["lr"].fill_(base * factor)

    def after_step(self) -> None:
        """The optimizer has stepped: tensors show the base rate again, and numbers know theirs."""
        groups = zip(self.optimizer.param_groups, self._shown, self._base, self.factors, strict=True)
        for group, shown, base, factor in groups:
            if shown is not None and group["lr"] == shown:
                group["lr"] = shown
            elif isinstance(group["lr"], Tensor) and factor != 1:
                group["lr"].fill_(base)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, groups hold plain base rates; what they hold at the end is the new base. For schedulers.

        ``ReduceLROnPlateau`` reads ``float(group["lr"])``, which has lost its base rate.
        """
        self.refresh()
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = base
        try:
            yield
        finally:
            self.refresh()

    def close(self) -> None:
        """Leave plain numbers in the groups: the applied rates."""
        if self._hook is not None:
            self._hook.remove()
        for group, rate in zip(self.optimizer.param_groups, self.applied, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def plain(value: Any) -> Any:
    """The same tree of dictionaries and lists with plain floats in place of applied rates."""
    if isinstance(value, AppliedRate):
        return float(value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def _plain(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": plain(state["param_groups"])}


class AppliedRecord:
    """The values of every optimizer step: eight bytes for each value and each step at which any of them changed."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}
        self._last: list[float] = []

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """What the optimizer step after so many uses, by column.

        Args:
            step: Optimizer steps taken before it.
            values: By the name of the column.
        """
        if list(values.values()) == self._last and values.keys() == self._columns.keys():
            return
        self._last = list(values.values())
        if self._steps and self._steps[-1] == step:  # a step that was begun before, and not made
            self._steps.pop()
            for column in self._columns.values():
                column.pop()
        for name in values:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan] * len(self._steps))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(values.get(name, math.nan))

    def schedule(self) -> LearnedSchedule:
        """The table.

        Raises:
            ValueError: No step has been made.
        """
        if not self._steps:
            raise ValueError("There is no schedule to export: no optimizer step has been made with LearnToLearn.")
        rows = tuple(zip(*self._columns.values(), strict=True))
        return LearnedSchedule(tuple(self._columns), tuple(self._steps), rows)

    def state_dict(self) -> dict[str, Any]:
        """Names, and tensors of numbers."""
        columns = [torch.tensor(column, dtype=torch.float64) for column in self._columns.values()]
        return {
            "columns": list(self._columns),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "values": torch.stack(columns, dim=1) if columns else torch.zeros(0, 0, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._steps = array("q", state["steps"].tolist())
        columns = zip(state["columns"], state["values"].T.tolist(), strict=True)
        self._columns = {name: array("d", column) for name, column in columns}
        self._last = [column[-1] for column in self._columns.values() if column]
