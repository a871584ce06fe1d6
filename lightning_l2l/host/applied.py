"""The learned values in the live optimizer, on top of whatever schedule the user has.

A parameter group's hyperparameters have two values: the *scheduled* one, which the user's optimizer, scheduler or hook
wrote, and the *applied* one, which the learned optimizer makes of it. The group always shows the applied one, so every
monitor and checkpoint sees what is used. While a scheduler steps it sees the scheduled ones, so that closed-form
schedulers do not erase the learned factor and recursive ones do not compound it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_l2l.functional import InnerOptimizer, mirror, read_state
from lightning_l2l.learned import LearnedOptimizer

# By key of a parameter group: a number, a tuple (betas), or one number for each parameter name.
Values = dict[str, Any]


class AppliedValues:
    """Keeps scheduled and applied values apart in one optimizer.

    What somebody else writes into a group is taken for the new scheduled value. So writing a rate is fine at any time,
    as a warm-up in ``optimizer_step`` does; multiplying the rate that is there multiplies the learned factor in.

    Args:
        optimizer: The user's live optimizer.
        module: The module that owns the parameters.
        learned: The learned optimizer; it is attached here, to the scheduled values.
        saved: What :meth:`state_dict` returned in the run that is resumed.

    Raises:
        MisconfigurationException: The learned optimizer sets no values, so there is nothing to apply.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        learned: LearnedOptimizer,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._module = module
        self._learned = learned
        self._scheduled: list[Values] = []
        self._written: list[Values] = []
        self._whole_groups: list[dict[str, Any]] | None = None
        self._has_own = False  # some tensor has a value that others of its group do not have
        if saved is not None and len(saved["written"]) <= len(optimizer.param_groups):
            self._scheduled = [dict(values) for values in saved["scheduled"]]
            self._written = [dict(values) for values in saved["written"]]
        self._read()
        learned.attach(self.inner())
        if not any(learned.values()):
            raise MisconfigurationException(
                f"LearnToLearn(learned={type(learned).__name__}()) would learn something that is never applied: it "
                "sets no hyperparameter of your optimizer. Use LearnedStepSize or LearnedHyperparameters here. To go "
                "on training a neural optimizer, return learned.as_torch_optimizer(self.parameters()) from "
                "configure_optimizers and leave `learned` out."
            )
        self._write()

    def refresh(self, *, force: bool = False) -> None:
        """Take over what somebody else has written into the groups since, and apply the learned values again.

        Args:
            force: Also when nobody has: after the learned values have changed.
        """
        self.join()
        if self._read() or force:
            self._learned.attach(self.inner())
            self._write()

    @property
    def scheduled_rates(self) -> list[float]:
        """The learning rate of each group without what is learned."""
        groups = zip(self._optimizer.param_groups, self._scheduled, strict=True)
        return [float(values.get("lr", group["lr"])) for group, values in groups]

    def learned_rate(self) -> float:
        """The learning rate that the learned optimizer gives the first group where it is attached now."""
        return float(_shown(self.values()[0]["lr"]))

    @contextmanager
    def attached_to(self, rates: Sequence[float]) -> Iterator[None]:
        """Inside, the learned optimizer sits on these rates; the groups do not change."""
        inner = self.inner()
        groups = [
            replace(group, hyperparameters={**group.hyperparameters, "lr": rate})
            for group, rate in zip(inner.groups, rates, strict=True)
        ]
        self._learned.attach(replace(inner, groups=tuple(groups)))
        try:
            yield
        finally:
            self._learned.attach(inner)

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate in force in each group (the geometric mean where every tensor has its own)."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def unrolled(self) -> tuple[LearnedOptimizer, Any]:
        """The learned optimizer, and the live one's state as the unroll takes it."""
        return self._learned, read_state(self._optimizer, self._module.named_parameters())

    def values(self) -> list[Values]:
        """What the learned optimizer makes of the scheduled values, for each group."""
        return self._learned.values()

    @contextmanager
    def scheduled(self) -> Iterator[None]:
        """Inside, the groups show the scheduled values; whatever they show at the end is the new schedule."""
        self.refresh()
        for group, values, written in zip(self._optimizer.param_groups, self._scheduled, self._written, strict=True):
            for key, value in values.items():
                written[key] = _set(group, key, value)
        try:
            yield
        finally:
            self.refresh(force=True)

    def split(self) -> None:
        """Give every tensor that has its own value a parameter group of its own, until :meth:`join`."""
        if not self._has_own:
            return
        everything = self.values()
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        groups = self._optimizer.param_groups
        split: list[dict[str, Any]] = []
        for group, values in zip(groups, everything, strict=True):
            own = {key: value for key, value in values.items() if isinstance(value, dict)}
            rest = [p for p in group["params"] if not any(names.get(id(p)) in value for value in own.values())]
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                mine = {key: value[name] for key, value in own.items() if name in value}
                if mine:
                    split.append({**group, "params": [parameter], **mine})
            if rest:
                split.append({**group, "params": rest})
        self._whole_groups = list(groups)
        groups[:] = split  # in place: schedulers and wrappers hold this very list

    def join(self) -> None:
        """Undo :meth:`split`."""
        if self._whole_groups is not None:
            self._optimizer.param_groups[:] = self._whole_groups
            self._whole_groups = None

    def shown(self) -> list[Any]:
        """The numbers behind :meth:`in_force`, unnamed: equal lists mean that nothing has changed."""
        groups = self._optimizer.param_groups
        keys = dict.fromkeys(["lr", *(key for written in self._written for key in written)])
        return [len(groups), *(_get(group, key) for group in groups for key in keys if key in group)]

    def in_force(self) -> dict[str, Values]:
        """What the groups show now, by the group's name or number; between split and join by the tensor's name."""
        groups = self._optimizer.param_groups
        keys = dict.fromkeys(["lr", *(key for written in self._written for key in written)])
        labels = [str(group.get("name", index)) for index, group in enumerate(groups)]
        if self._whole_groups is not None:
            names = {id(parameter): name for name, parameter in self._module.named_parameters()}
            labels = [names.get(id(group["params"][0]), str(index)) for index, group in enumerate(groups)]
        elif len(set(labels)) < len(labels):
            labels = [str(index) for index in range(len(groups))]
        return {
            label: {key: _get(group, key) for key in keys if key in group}
            for label, group in zip(labels, groups, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Scheduled and applied values, as plain numbers."""
        return {
            "scheduled": [dict(values) for values in self._scheduled],
            "written": [dict(values) for values in self._written],
        }

    def _read(self) -> bool:
        """Whether some group shows something that we did not write; then that is the new scheduled value."""
        changed = False
        for index, group in enumerate(self._optimizer.param_groups):
            if index == len(self._scheduled):
                self._scheduled.append({})
                self._written.append({})
                changed = True
            for key, written in self._written[index].items():
                if _get(group, key) != written:
                    self._scheduled[index][key] = _get(group, key)
                    changed = True
        return changed

    def inner(self) -> InnerOptimizer:
        """The mirror of the live optimizer with the scheduled values in place of the applied ones."""
        inner = mirror(self._optimizer, self._module.named_parameters())
        groups = [
            replace(group, hyperparameters={**group.hyperparameters, **_split_betas(values)})
            for group, values in zip(inner.groups, self._scheduled, strict=True)
        ]
        return replace(inner, groups=tuple(groups))

    def _write(self) -> None:
        everything = self.values()
        self._has_own = any(isinstance(value, dict) for values in everything for value in values.values())
        for index, (group, values) in enumerate(zip(self._optimizer.param_groups, everything, strict=True)):
            for key, value in values.items():
                self._scheduled[index].setdefault(key, _get(group, key))
                self._written[index][key] = _set(group, key, _shown(value))


def _split_betas(values: Values) -> Values:
    plain = {key: value for key, value in values.items() if key != "betas"}
    if "betas" in values:
        plain["beta1"], plain["beta2"] = values["betas"]
    return plain


def _get(group: dict[str, Any], key: str) -> Any:
    value = group[key]
    if isinstance(value, (tuple, list)):
        return tuple(float(item) for item in value)
    return float(value)


def _set(group: dict[str, Any], key: str, value: Any) -> Any:
    """Writes a value, and returns it as it will be read: a tensor rate may round it."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # a tensor rate (capturable, compiled steps) is read by reference
    else:
        group[key] = value
    return _get(group, key)


def _shown(value: Any) -> Any:
    """What a group shows where every tensor has its own value: the geometric mean."""
    if not isinstance(value, dict):
        return value
    values = list(value.values())
    if not values or len(set(values)) == 1:
        return values[0] if values else math.nan
    if isinstance(values[0], tuple):
        return tuple(_shown(dict(enumerate(column))) for column in zip(*values, strict=True))
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(math.log(item) for item in values) / len(values))
