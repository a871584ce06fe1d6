"""Which ``torch.optim`` optimizer learned hyperparameters sit on, as plain data and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lightning_l2l.functional import InnerOptimizer, ParameterGroup, Rule, inner_optimizer

Per = Literal["optimizer", "group", "tensor"]

_CLASSES: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)


def described(inner: InnerOptimizer | None) -> dict[str, Any] | None:
    """An inner optimizer as strings, numbers, lists and dictionaries; ``None`` for none.

    Raises:
        TypeError: It is none of ``torch.optim``'s, so a file could not name it.

    Example:
        >>> described(inner_optimizer(torch.optim.SGD, lr=0.1))["optimizer"]
        'SGD'
    """
    if inner is None:
        return None
    names = {name for name, rule in _rules().items() if rule is inner.rule}
    if not names:
        raise TypeError(
            "The optimizer that these hyperparameters belong to is not one of torch.optim's "
            f"({', '.join(_rules())}), so a file cannot name it. Save its values() instead."
        )
    groups = [
        {"names": None if group.names is None else list(group.names), "hyperparameters": dict(group.hyperparameters)}
        for group in inner.groups
    ]
    return {"optimizer": names.pop(), "groups": groups}


def rebuilt(description: Mapping[str, Any]) -> InnerOptimizer:
    """The inner optimizer that :func:`described` described.

    Raises:
        ValueError: It names an optimizer that there is not.
    """
    rule = _rules().get(description["optimizer"])
    if rule is None:
        raise ValueError(f"There is no optimizer {description['optimizer']!r}; these are known: {', '.join(_rules())}.")
    groups = []
    for group in description["groups"]:
        names = group["names"]
        groups.append(ParameterGroup(None if names is None else tuple(names), dict(group["hyperparameters"])))
    return InnerOptimizer(rule, tuple(groups))


def slots_of(inner: InnerOptimizer, per: Per) -> tuple[str, ...]:
    """A name for each value that is learned: the optimizer's, the groups', or the tensors' own.

    Raises:
        ValueError: One for each tensor, and the tensors are not known.
    """
    if per == "optimizer":
        return ("optimizer",)
    if per == "group":
        return tuple(f"group {index}" for index in range(len(inner.groups)))
    if any(group.names is None for group in inner.groups):
        raise ValueError(
            "per='tensor' needs to know the tensors: attach mirror(optimizer, model.named_parameters()), or "
            "inner_optimizer(...).with_names([...]) with their names."
        )
    return tuple(name for group in inner.groups for name in group.names or ())


def sources_of(
    slots: tuple[str, ...], offset: torch.nn.Parameter | None, before: tuple[str, ...] | None
) -> list[int | None]:
    """For each slot the position where its offset was until now, ``None`` if it is new.

    Args:
        slots: The slots that there are now.
        offset: The offsets until now.
        before: Their slots; ``None`` if they were loaded from a file, whose order is that of ``slots``.

    Raises:
        ValueError: A slot has gone.
    """
    if offset is None:
        return [None] * len(slots)
    before = slots[: len(offset)] if before is None else before
    gone = [slot for slot in before if slot not in slots]
    if gone or len(before) != len(offset):
        raise ValueError(
            f"was attached to an optimizer with {len(offset)} value(s) to learn and now meets one with {len(slots)}"
            f"{f' that lacks {gone[0]}' if gone else ''}. What was learned has no place to go: make a new one for "
            "another optimizer."
        )
    position = {slot: index for index, slot in enumerate(before)}
    return [position.get(slot) for slot in slots]


def _rules() -> dict[str, Rule]:
    return {cls.__name__: inner_optimizer(cls).rule for cls in _CLASSES}


def rearranged(offset: torch.nn.Parameter | None, source: list[int | None]) -> torch.nn.Parameter:
    """The offsets of a changed list of slots, in place where there were some.

    Args:
        offset: The offsets until now.
        source: For each slot the position of its offset until now; ``None`` for a new slot.
    """
    if offset is None:
        return torch.nn.Parameter(torch.zeros(len(source), dtype=torch.float64))
    if source != list(range(len(offset))):
        old = offset.detach()
        new = old.new_zeros(len(source))
        for index, position in enumerate(source):
            if position is not None:
                new[index] = old[position]
        offset.data, offset.grad = new, None
    return offset
