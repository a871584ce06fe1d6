"""An inner optimizer: one rule, its parameter groups, and the torchopt transformation that it makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.core.inner.rule import Rule, State

# In elements. Larger tensors gain nothing from being concatenated, they only pay the copy; a larger concatenation
# leaves the cache. Measured on one CPU core, 100 to 500 tensors, with and without a graph.
_LARGEST_CONCATENATED = 16_384
_LARGEST_CONCATENATION = 262_144

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

    Made by :func:`~lightning_l2l.core.inner.mirror.mirror` from a live optimizer, or by
    :func:`~lightning_l2l.core.inner.mirror.inner_optimizer` from a class.

    Attributes:
        rule: The arithmetic.
        groups: One entry for each parameter group, in the optimizer's order.

    Example:
        >>> import torch, torchopt
        >>> from lightning_l2l.core.inner import inner_optimizer
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
        return all(self.rule.scale_equivariant(group.hyperparameters) for group in self.groups)

    def with_names(self, names: Iterable[str]) -> InnerOptimizer:
        """The same optimizer with its one all-parameters group spelled out; a named one is returned as it is."""
        if self.groups[0].names is not None:
            return self
        return replace(self, groups=(ParameterGroup(tuple(names), self.groups[0].hyperparameters),))

    def transformation(self, values: Sequence[GroupValues] | None = None) -> GradientTransformation:
        """The optimizer in torchopt's protocol: ``init(params)`` and ``update(updates, state, *, params)``.

        ``params`` and ``updates`` are dictionaries by name. A parameter without a gradient (``None``, or
        missing from ``updates``) or in no group gets the update ``None``, which ``torchopt.apply_updates``
        leaves alone; its state is kept and its step not counted. The state is a dictionary by name of
        ``torch.optim``'s state for one parameter. Nothing is ever modified in place, whatever ``inplace``
        says (torchopt's default is ``True``): every result is differentiable in parameters, gradients, state
        and ``values``, twice and in forward mode.

        Args:
            values: Tensors that take the place of hyperparameters: for each group a mapping from their names
                to a 0-dim tensor, or to a mapping from parameter names to 0-dim tensors. Read at update time.
                float64 is best: it costs nothing and does not promote the parameters.

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
            deltas: dict[str, Tensor | None] = dict.fromkeys(params)
            new_state = dict(state)
            for group, replacement in zip(self.groups, replacements, strict=True):
                settings = {**self.rule.defaults, **group.hyperparameters, **replacement}
                for names in _buckets(self.rule, _members(group, params), params, updates, state):
                    moved = _updated(
                        self.rule,
                        settings,
                        names,
                        [params[name] for name in names],
                        [updates[name] for name in names],
                        [state.get(name, {}) for name in names],
                    )
                    for name, (delta, entries) in zip(names, moved, strict=True):
                        deltas[name], new_state[name] = delta, entries
            return deltas, new_state

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


def _buckets(
    rule: Rule,
    names: Iterable[str],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    state: Mapping[str, Mapping[str, Any]],
) -> list[list[str]]:
    """Parameters with a gradient, those together that can be updated as one vector."""
    found: dict[Hashable, list[str]] = {}
    for name in names:
        gradient = gradients.get(name)
        if gradient is None:
            continue
        parameter = parameters[name]
        key: Hashable = name
        if rule.elementwise and parameter.numel() <= _LARGEST_CONCATENATED:
            entries = state.get(name, {}).items()
            # Python numbers (the step) must agree, tensors only in dtype.
            kinds = tuple([(k, v.dtype if isinstance(v, Tensor) else v) for k, v in entries])
            key = (parameter.dtype, gradient.dtype, gradient.layout, parameter.device, kinds)
        found.setdefault(key, []).append(name)
    for first, *_ in found.values():
        _refuse_unsupported(first, parameters[first], gradients[first])
    return [part for bucket in found.values() for part in _portions(bucket, parameters)]


def _portions(names: list[str], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The bucket in pieces that stay in the cache, and small enough for the allocator to reuse their memory."""
    portion: list[str] = []
    elements = 0
    for name in names:
        size = parameters[name].numel()
        if portion and elements + size > _LARGEST_CONCATENATION:
            yield portion
            portion, elements = [], 0
        portion.append(name)
        elements += size
    yield portion


def _refuse_unsupported(name: str, parameter: Tensor, gradient: Tensor | None) -> None:
    if parameter.is_complex():
        raise TypeError(
            f"Parameter {name!r} is complex. The meta-gradient of a complex parameter is not defined here: "
            "hold its real and imaginary part (torch.view_as_real) as the parameter."
        )
    if gradient is not None and gradient.layout != torch.strided:
        raise TypeError(
            f"The gradient of {name!r} is sparse, and sparse updates have no derivative in torch. Build the "
            "embedding with sparse=False."
        )


def _updated(
    rule: Rule,
    settings: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
) -> list[tuple[Tensor, State]]:
    """One update of tensors of a kind, as one vector: the cost of the arithmetic is that of a single tensor."""
    if len(names) == 1:
        return [rule.update(parameters[0], gradients[0], states[0], _of_tensor(settings, names[0]))]
    sizes = [parameter.numel() for parameter in parameters]
    flat = _concatenated(parameters)
    joint: dict[str, Any] = {}
    for key, value in states[0].items():
        entries = [state[key] for state in states]
        joint[key] = _concatenated(_expanded(entries, parameters)) if isinstance(value, Tensor) else value
    delta, joint = rule.update(flat, _concatenated(gradients), joint, _of_elements(settings, names, sizes, flat))

    separated: list[State] = [{} for _ in names]
    for key, value in joint.items():
        split = isinstance(value, Tensor) and value.shape == flat.shape
        parts = _separated(value, sizes, parameters) if split else [value] * len(names)
        for own, part in zip(separated, parts, strict=True):
            own[key] = part
    return list(zip(_separated(delta, sizes, parameters), separated, strict=True))


def _of_tensor(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Hyperparameters for one tensor."""
    return {key: value[name] if isinstance(value, Mapping) else value for key, value in settings.items()}


def _of_elements(
    settings: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int], flat: Tensor
) -> dict[str, Any]:
    """Hyperparameters for a concatenation: those that differ between tensors as one value for each element."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            counts = torch.tensor(sizes, device=flat.device)
            values = torch.stack([value[name] for name in names]).to(flat.device)
            found[key] = values.repeat_interleave(counts, output_size=flat.numel())
    return found


def _expanded(entries: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    # A 0-dim entry of a larger parameter (NAdam's product of learned momenta, which lives where they do) holds
    # for all its elements.
    pairs = zip(entries, like, strict=True)
    return [e if e.shape == tensor.shape else e.to(tensor.device).expand(tensor.shape) for e, tensor in pairs]


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _separated(flat: Tensor, sizes: list[int], like: Sequence[Tensor]) -> list[Tensor]:
    # One split is one node in the graph; slices would each make a zero tensor of full size going backward.
    parts = torch.split(flat, sizes)
    # view_as, since view(shape) spends three times as long on parsing the shape.
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
