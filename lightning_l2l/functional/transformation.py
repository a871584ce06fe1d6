"""An inner optimizer: one rule, its parameter groups, and the torchopt transformation that it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.functional.rule import Rule

GroupValues = Mapping[str, "Tensor | Mapping[str, Tensor]"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share hyperparameters.

    Attributes:
        names: The parameters, by name; ``None`` for all of them.
        hyperparameters: Plain numbers and flags by ``torch.optim``'s keys, with ``betas`` as ``beta1`` and
            ``beta2``. Keys that the rule does not know (``initial_lr`` of a scheduler) are ignored.
    """

    names: tuple[str, ...] | None
    hyperparameters: dict[str, Any]


@dataclass(frozen=True)
class InnerOptimizer:
    """A rule and the groups that it is applied to: an optimizer as a value, without state.

    Made by :func:`~lightning_l2l.functional.mirror` from a live optimizer, or by
    :func:`~lightning_l2l.functional.inner_optimizer` from a class.

    Attributes:
        rule: The arithmetic.
        groups: One entry for each parameter group, in the optimizer's order.

    Example:
        >>> import torch, torchopt
        >>> from lightning_l2l.functional import inner_optimizer
        >>> inner = inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> optimizer = inner.transformation([{"lr": rate}])
        >>> parameters = {"w": torch.ones(2)}
        >>> updates, state = optimizer.update({"w": torch.ones(2)}, optimizer.init(parameters), params=parameters)
        >>> torchopt.apply_updates(parameters, updates, inplace=False)["w"].sum().backward()
        >>> rate.grad
        tensor(-2., dtype=torch.float64)
    """

    rule: Rule
    groups: tuple[ParameterGroup, ...]

    def __post_init__(self) -> None:
        """Refuses groups that overlap."""
        if len(self.groups) > 1 and any(group.names is None for group in self.groups):
            raise ValueError("A group with names=None stands for all parameters, so it must be the only group.")

    @property
    def scale_equivariant(self) -> bool:
        """Whether multiplying parameters, gradients and state by c multiplies update and new state by c."""
        return self.rule.homogeneous

    def with_names(self, names: Iterable[str]) -> InnerOptimizer:
        """The same optimizer with its one all-parameters group spelled out; a named one is returned as it is."""
        if self.groups[0].names is not None:
            return self
        return replace(self, groups=(ParameterGroup(tuple(names), self.groups[0].hyperparameters),))

    def treated_alike(self, names: Sequence[str]) -> list[list[str]]:
        """Those of the parameters together that one vector may stand for: a group's, if the rule is elementwise."""
        members = [set(group.names or names) for group in self.groups] if self.rule.elementwise else []
        groups = [[name for name in names if name in group] for group in members]
        return [*groups, *([name] for name in names if not any(name in group for group in members))]

    def transformation(self, values: Sequence[GroupValues] | None = None) -> GradientTransformation:
        """The optimizer in torchopt's protocol: ``init(params)`` and ``update(updates, state, *, params)``.

        ``params`` and ``updates`` are dictionaries by name. A parameter without a gradient (``None``, or missing from
        ``updates``) or in no group gets the update ``None``, which ``torchopt.apply_updates`` leaves alone; its state
        is kept and its step not counted. The state is a dictionary by name of ``torch.optim``'s state for one
        parameter. Nothing is ever modified in place, whatever ``inplace`` says (torchopt's default is ``True``): every
        result is differentiable in parameters, gradients, state and ``values``, twice and in forward mode.

        Args:
            values: Tensors that take the place of hyperparameters: for each group a mapping from their names to a
                0-dim tensor, or to a mapping from parameter names to 0-dim tensors. float64 is best: it costs nothing
                and does not promote the parameters.

        Returns:
            A ``torchopt.base.GradientTransformation``; it may be chained with torchopt's own.

        Raises:
            ValueError: ``values`` has another number of groups, or names something that cannot be a tensor.
        """
        replacements = self._checked(values)

        def init(params: Any) -> dict[str, dict[str, Any]]:
            # An empty state is a state: the rules start from nothing, as torch.optim does.
            return {name: {} for group in self.groups for name in _members(group, params)}

        def update(
            updates: Any, state: Any, *, params: Any = None, inplace: bool = True
        ) -> tuple[dict[str, Tensor | None], dict[str, dict[str, Any]]]:
            if params is None:
                raise ValueError("The update needs the parameters themselves: pass params=... to update().")
            moves: dict[str, Tensor | None] = dict.fromkeys(params)
            new_state = dict(state)
            for group, replacement in zip(self.groups, replacements, strict=True):
                settings = {**self.rule.defaults, **group.hyperparameters, **replacement}
                by_name = {key: value for key, value in replacement.items() if isinstance(value, Mapping)}
                for name in _members(group, params):
                    gradient = updates.get(name)
                    if gradient is None:
                        continue
                    _check_supported(name, params[name], gradient)
                    own = {**settings, **{key: value[name] for key, value in by_name.items()}} if by_name else settings
                    moves[name], new_state[name] = self.rule.update(params[name], gradient, state.get(name, {}), own)
            return moves, new_state

        return GradientTransformation(init, update)

    def _checked(self, values: Sequence[GroupValues] | None) -> Sequence[GroupValues]:
        if values is None:
            return [{} for _ in self.groups]
        if len(values) != len(self.groups):
            raise ValueError(
                f"The optimizer has {len(self.groups)} parameter group(s), but values were given for {len(values)}."
            )
        for name in {name for group in values for name in group}:
            if name not in self.rule.learnable:
                raise ValueError(
                    f"{name!r} cannot be a tensor in this optimizer; these can: {', '.join(self.rule.learnable)}."
                )
        return values


def _members(group: ParameterGroup, parameters: Mapping[str, Tensor]) -> Iterable[str]:
    if group.names is None:
        return parameters
    return [name for name in group.names if name in parameters]


def _check_supported(name: str, parameter: Tensor, gradient: Tensor) -> None:
    if parameter.is_complex():
        raise TypeError(
            f"Parameter {name!r} is complex. The meta-gradient of a complex parameter is not defined here: hold its "
            "real and imaginary part (torch.view_as_real) as the parameter."
        )
    if gradient.layout != torch.strided:
        raise TypeError(
            f"The gradient of {name!r} is sparse, and sparse updates have no derivative in torch. Build the embedding "
            "with sparse=False."
        )
