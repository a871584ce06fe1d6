"""From a live ``torch.optim`` optimizer, its parameter groups and its state, to an inner optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.functional.optimizers import ADAGRAD, ADAM, ADAMW, NADAM, RADAM, RMSPROP, SGD
from lightning_l2l.functional.rule import Rule
from lightning_l2l.functional.transformation import InnerOptimizer, ParameterGroup

__all__ = ["InnerOptimizer", "ParameterGroup", "inner_optimizer", "mirror", "read_state", "register_mirror"]

_RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAMW,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.Adagrad: ADAGRAD,
}
# What torch.optim keeps in 0-dim tensors and the rules in Python numbers.
_COUNTERS: dict[str, type[int] | type[float]] = {"step": int, "mu_product": float}
# The methods that decide what a step does; a subclass that changes one of them is another optimizer.
_DECISIVE = ("step", "_init_group")


def register_mirror(cls: type[torch.optim.Optimizer], rule: Rule) -> None:
    """Makes :func:`mirror` know another optimizer class.

    Args:
        cls: The class. Its subclasses are covered too, unless they override ``step``.
        rule: Its arithmetic, with state keys and hyperparameter keys as in the optimizer.

    Raises:
        TypeError: ``cls`` is no optimizer class or ``rule`` no :class:`Rule`.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional.rule import Rule, times
        >>> class SignDescent(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, {"lr": lr})
        >>> def sign_descent(parameter, gradient, state, hyperparameters):
        ...     return times(gradient.sign(), -hyperparameters["lr"]), dict(state)
        >>> register_mirror(SignDescent, Rule(sign_descent, defaults={"lr": 0.1}))
        >>> inner_optimizer(SignDescent, lr=0.5).groups[0].hyperparameters
        {'lr': 0.5}
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"register_mirror needs a torch.optim.Optimizer class, got {cls!r}.")
    if not isinstance(rule, Rule):
        raise TypeError(f"register_mirror needs a Rule, got {type(rule).__name__}.")
    _RULES[cls] = rule


def mirror(optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> InnerOptimizer:
    """The inner optimizer that does what a live optimizer would do now, as pure functions.

    Hyperparameters are read once, here: mirror again after a scheduler has moved them. Parameters are matched
    by identity, so tied weights appear once, under their first name; frozen ones (``requires_grad=False``)
    are left out.

    Args:
        optimizer: The live optimizer. It is only read.
        named_parameters: The module's ``named_parameters()``.

    Returns:
        One group for each of the optimizer's groups, in order.

    Raises:
        TypeError: The optimizer has no mirror, or a parameter is complex.
        ValueError: A trainable parameter of the optimizer is not among ``named_parameters``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> mirror(torch.optim.Adam(model.parameters()), model.named_parameters()).groups[0].names
        ('weight', 'bias')
    """
    rule = _rule_of(type(optimizer))
    groups = []
    for names, group in zip(_group_names(optimizer, named_parameters), optimizer.param_groups, strict=True):
        groups.append(ParameterGroup(names, _hyperparameters(rule, group)))
    return InnerOptimizer(rule, tuple(groups))


def inner_optimizer(cls: type[torch.optim.Optimizer], **hyperparameters: Any) -> InnerOptimizer:
    """An inner optimizer for all parameters, by class and arguments instead of from a live optimizer.

    Args:
        cls: A ``torch.optim`` class that has a mirror.
        **hyperparameters: Its own arguments; it checks them itself.

    Returns:
        One group for all parameters.

    Raises:
        TypeError: The class has no mirror.

    Example:
        >>> import torch
        >>> inner_optimizer(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9)).groups[0].hyperparameters["beta2"]
        0.9
    """
    rule = _rule_of(cls)
    (group,) = cls([torch.nn.Parameter(torch.zeros(1))], **hyperparameters).param_groups
    return InnerOptimizer(rule, (ParameterGroup(None, _hyperparameters(rule, group)),))


def read_state(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """The live optimizer's state, in the form that the mirror's ``update`` takes and returns.

    Args:
        optimizer: The live optimizer. It is only read.
        named_parameters: The module's ``named_parameters()``.

    Returns:
        By parameter name ``torch.optim``'s own keys. Tensors are detached clones; ``step`` is an int,
        wherever it lives (for ``capturable`` and ``fused`` that is on the device, and reading it waits for
        the device once). A parameter that has not been stepped yet has an empty state.

    Raises:
        ValueError: A trainable parameter of the optimizer is not among ``named_parameters``.
    """
    state: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[str, str, Tensor]] = []
    for names, group in zip(_group_names(optimizer, named_parameters), optimizer.param_groups, strict=True):
        for name, parameter in zip(names, _trainable(group), strict=True):
            entries = state[name] = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD's momentum_buffer before the first step
                    continue
                if key not in _COUNTERS:
                    entries[key] = value.detach().clone() if isinstance(value, Tensor) else value
                elif isinstance(value, Tensor) and value.device.type != "cpu":
                    entries[key] = 0  # its place in the order of the keys
                    waiting.append((name, key, value.detach().reshape(())))
                else:
                    entries[key] = _COUNTERS[key](value)
    # All counters of a device at once, as each reading of a single one would wait for it.
    for device in {value.device for _, _, value in waiting}:
        here = [item for item in waiting if item[2].device == device]
        numbers = torch.stack([value.double() for _, _, value in here]).tolist()
        for (name, key, _), number in zip(here, numbers, strict=True):
            state[name][key] = _COUNTERS[key](number)
    return state


def _rule_of(cls: type[torch.optim.Optimizer]) -> Rule:
    for ancestor in cls.__mro__:
        rule = _RULES.get(ancestor)
        if rule is None:
            continue
        changed = [name for name in _DECISIVE if _innermost(cls, name) is not _innermost(ancestor, name)]
        if not changed:
            return rule
        raise TypeError(
            f"{cls.__name__} inherits from {ancestor.__name__} but overrides {' and '.join(changed)}, so the mirror of "
            f"{ancestor.__name__} may do something else. {_how_to_register(cls)}"
        )
    raise TypeError(f"There is no differentiable mirror of {cls.__name__}. {_how_to_register(cls)}")


def _innermost(cls: type, name: str) -> Any:
    # torch.optim wraps `step` of a class when an instance is first made, in the class that is instantiated.
    method = getattr(cls, name, None)
    return method if method is None else inspect.unwrap(method)


def _how_to_register(cls: type) -> str:
    known = ", ".join(sorted(known.__name__ for known in _RULES))
    return (
        f"These have one: {known}. To add yours, write its step for one tensor and register it: "
        f"lightning_l2l.functional.register_mirror({cls.__name__}, Rule(update, defaults={{'lr': ...}})), where "
        "update(parameter, gradient, state, hyperparameters) returns (delta, new_state) without modifying anything "
        "in place (see lightning_l2l/functional/optimizers.py)."
    )


def _hyperparameters(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's hyperparameters in a live parameter group, as plain numbers."""
    available = dict(group)
    if "betas" in group:
        available["beta1"], available["beta2"] = group["betas"]
    found = {key: available.get(key, default) for key, default in rule.defaults.items()}
    if "initial_lr" in group:  # set by schedulers: what the rate is a multiple of
        found["initial_lr"] = group["initial_lr"]
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in found.items()}


def _trainable(group: Mapping[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.requires_grad]


def _group_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> list[tuple[str, ...]]:
    """For each group the names of its trainable parameters, found by identity."""
    names: dict[Tensor, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)  # tensors hash by identity
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(_trainable(group)):
            if parameter not in names:
                raise ValueError(
                    f"Trainable parameter {position} of group {index} of the optimizer, shape "
                    f"{tuple(parameter.shape)}, is not among the named parameters, so the unroll could not reach "
                    "it. Pass the named_parameters() of the module that holds all parameters of the optimizer, "
                    "and make the optimizer after the module's parameters have been replaced for the last time."
                )
            if parameter.is_complex():
                raise TypeError(
                    f"Parameter {names[parameter]!r} is complex, which the mirrors do not support: hold its real "
                    "and imaginary part (torch.view_as_real) as the parameter."
                )
    return [tuple([names[parameter] for parameter in _trainable(group)]) for group in optimizer.param_groups]
