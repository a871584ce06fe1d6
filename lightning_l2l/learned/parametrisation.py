"""How a learned hyperparameter depends on its offset: legal for every offset, and the live value at offset 0."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parametrisation(abc.ABC):
    """A hyperparameter as a function of its live value (the base) and a learned offset.

    Attributes:
        key: Its key in an inner optimizer's groups, e.g. ``"lr"``.
        minimum: Smallest value that may be learned.
        maximum: Largest value that may be learned.
    """

    key: str
    minimum: float
    maximum: float

    @abc.abstractmethod
    def value(self, base: Tensor, offset: Tensor) -> Tensor:
        """The hyperparameter; exactly ``base`` at offset 0."""

    @abc.abstractmethod
    def offset(self, base: float, value: float) -> float:
        """The offset that gives a value."""

    @abc.abstractmethod
    def legal(self, value: float) -> bool:
        """Whether a value can be reached from another by an offset."""

    @abc.abstractmethod
    def validate(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises a ValueError if the live values of the groups cannot be learned."""

    def nearest(self, value: float) -> float:
        """The nearest value that ``torch.optim`` accepts: rounding may put one a bit outside."""
        return value

    def reference(self, group: Mapping[str, Any]) -> float:
        """The value that the bounds are about: a learning rate's before the schedule, else the live one."""
        scheduled: float | None = group.get("initial_lr") if self.key == "lr" else None
        return float(group[self.key] if scheduled is None else scheduled)

    def offset_limits(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Smallest and largest offset in a group. Zero, which is the user's own value, is always allowed."""
        base = self.reference(group)
        if base == 0 and not self.legal(0.0):  # a factor moves it nowhere
            return -math.inf, math.inf
        ends = self.offset(base, self.minimum), self.offset(base, self.maximum)
        return min(0.0, *ends), max(0.0, *ends)

    def within(self, name: str, minimum: float, maximum: float) -> Parametrisation:
        """The same with other bounds.

        Raises:
            ValueError: They are no interval in which the parametrisation works.
        """
        if not self.legal(minimum) or not self.legal(maximum) or minimum >= maximum:
            domain = "in [0, 1)" if self.legal(0.0) else "above 0"
            raise ValueError(
                f"The bounds of {name!r} must be an increasing pair of numbers {domain}, "
                f"got ({minimum!r}, {maximum!r})."
            )
        return replace(self, minimum=float(minimum), maximum=float(maximum))

    def validate_bounds(self, name: str, group: Mapping[str, Any]) -> None:
        """Raises a ValueError if the live value is outside the bounds, where the first projection would move it."""
        value = self.reference(group)
        if not self.minimum <= value <= self.maximum:
            raise ValueError(
                f"{name!r} is {value:g} in the optimizer, outside its bounds [{self.minimum:g}, {self.maximum:g}]. "
                "Widen the bounds or start from a value inside them."
            )


class Positive(Parametrisation):
    """``base * exp(offset)``: relative steps. A base of 0 stays 0: a frozen group, no weight decay on biases."""

    def value(self, base: Tensor, offset: Tensor) -> Tensor:
        """See the class."""
        return base * offset.exp()

    def offset(self, base: float, value: float) -> float:
        """``log(value / base)``."""
        return math.log(value) - math.log(base)

    def legal(self, value: float) -> bool:
        """Whether it is finite and above 0."""
        return 0.0 < value < math.inf

    def validate(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses if every group has 0; a single group with 0 keeps its 0."""
        moving = [group for group in groups if self.reference(group) != 0]
        if not moving:
            raise ValueError(
                f"{name!r} is 0 in the optimizer. It is learned as a factor, and a factor times 0 stays 0: start from "
                f"a small positive value, or leave {name!r} out of what is learned."
            )
        for group in moving:
            self.validate_bounds(name, group)


class UnitInterval(Parametrisation):
    """``1 - (1 - base) * exp(offset)``: relative steps of the distance from 1, i.e. of the averaging time."""

    def value(self, base: Tensor, offset: Tensor) -> Tensor:
        """See the class; in the form that is exact at offset 0."""
        return base - (1 - base) * torch.expm1(offset)

    def offset(self, base: float, value: float) -> float:
        """``log((1 - value) / (1 - base))``."""
        return math.log1p(-value) - math.log1p(-base)

    def legal(self, value: float) -> bool:
        """Whether it is in [0, 1)."""
        return 0.0 <= value < 1.0

    def nearest(self, value: float) -> float:
        """The value in [0, 1)."""
        return min(max(value, 0.0), math.nextafter(1.0, 0.0))

    def validate(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses values outside the bounds, and momentum that is switched off."""
        for group in groups:
            if self.key in ("momentum", "dampening") and group["momentum"] == 0:
                raise ValueError(
                    f"{name!r} cannot be learned while the momentum is 0: torch.optim then keeps no momentum buffer. "
                    "Start from a small momentum, for example momentum=0.1."
                )
            self.validate_bounds(name, group)


# The names that users write, and what they are in torch.optim. The upper ends leave an averaging time of 1e4
# (1e6 for second moments, whose default is already 1e3 to 1e4).
PARAMETRISATIONS: dict[str, Parametrisation] = {
    "learning_rate": Positive("lr", 1e-10, 1e4),
    "momentum": UnitInterval("momentum", 0.0, 1 - 1e-4),
    "dampening": UnitInterval("dampening", 0.0, 1 - 1e-4),
    "beta1": UnitInterval("beta1", 0.0, 1 - 1e-4),
    "beta2": UnitInterval("beta2", 0.0, 1 - 1e-6),
    "alpha": UnitInterval("alpha", 0.0, 1 - 1e-6),
    "weight_decay": Positive("weight_decay", 1e-12, 1e4),
    "eps": Positive("eps", 1e-20, 1e2),
}


def parametrisations(learn: Sequence[str], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Parametrisation]:
    """What the user named, with the user's bounds.

    Raises:
        ValueError: An unknown name, nothing to learn, or bounds of something else.
    """
    if isinstance(learn, str):
        learn = (learn,)
    names = [name for given in learn for name in (("beta1", "beta2") if given == "betas" else (given,))]
    limits = dict(bounds)
    if "betas" in limits:
        limits["beta1"] = limits["beta2"] = limits.pop("betas")
    if not names:
        raise ValueError("learn is empty: name at least one hyperparameter, for example 'learning_rate'.")
    for name in names:
        if name not in PARAMETRISATIONS:
            raise ValueError(
                f"There is no hyperparameter {name!r} to learn. Choose from {', '.join(PARAMETRISATIONS)} and betas."
            )
    for name in limits:
        if name not in names:
            raise ValueError(f"Bounds are given for {name!r}, which is not among what is learned: {names}.")
    found = {name: PARAMETRISATIONS[name] for name in names}
    return {name: how.within(name, *limits[name]) if name in limits else how for name, how in found.items()}
