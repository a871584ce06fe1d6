"""Hyperparameters of the optimizer that trains, as meta-parameters: rates, momenta, decays.

A meta-parameter is an offset from the value that the live optimizer has now; at offset 0 the value is that one, to the
last bit. So the scheduler goes on underneath, and a learned optimizer that has learned nothing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.functional import InnerOptimizer, ParameterGroup, Rule, inner_optimizer
from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.parametrisation import PARAMETRISATIONS, parametrisations

if TYPE_CHECKING:
    from typing_extensions import Self

Per = Literal["optimizer", "group", "tensor"]

# Those that a file can name.
_CLASSES = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)


class LearnedHyperparameters(LearnedOptimizer):
    """Learns hyperparameters of the optimizer that trains.

    Helps where the step size alone is not the problem: a momentum that is too long for the step size, a
    weight decay chosen by habit. Each further number costs one tangent in forward mode, and next to nothing
    in reverse.

    The meta-parameters come into being in :meth:`attach`: for each hyperparameter one float64 vector ``d``,
    named like it and zero at first, with an entry for the optimizer, for each group, or for each tensor.
    Positive quantities (learning rate, weight decay, eps) are ``base * exp(d)``; those in [0, 1) (momentum,
    betas, alpha, dampening) are ``1 - (1 - base) * exp(d)``. ``base`` is the live value. Scalars cost nothing
    and ``1 - beta2`` needs the digits, hence float64; the parameters and the arithmetic on them keep their
    own dtype.

    Nothing is clamped in the graph: a value at its bound would have derivative zero and never come back.
    :meth:`project_` clamps the offsets after each meta-update instead.

    Args:
        learn: Any of ``"learning_rate"``, ``"momentum"``, ``"dampening"``, ``"betas"`` (or ``"beta1"``,
            ``"beta2"`` alone), ``"alpha"``, ``"weight_decay"``, ``"eps"`` that the optimizer has.
        per: One offset for the whole optimizer, for each parameter group, or for each tensor.
        bounds: Smallest and largest value, by the names of ``learn``. Those of the learning rate are about
            the rate before the schedule (``initial_lr``): a schedule that goes to zero must not push the
            offset up.

    Raises:
        ValueError: An unknown name, nothing to learn, or bounds that are none.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedHyperparameters(learn=("learning_rate", "momentum"))
        >>> learned = learned.attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
        >>> learned.values()
        [{'lr': 0.1, 'momentum': 0.9}]
        >>> with torch.no_grad():
        ...     _ = learned.momentum.fill_(-0.6931471805599453)
        >>> round(learned.values()[0]["momentum"], 12)
        0.95
    """

    def __init__(
        self,
        learn: Sequence[str] = ("learning_rate", "momentum"),
        per: Per = "group",
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        if per not in ("optimizer", "group", "tensor"):
            raise ValueError(f"per must be 'optimizer', 'group' or 'tensor', got {per!r}.")
        self.per: Per = per
        self._learned = parametrisations(learn, bounds or {})
        self._inner: InnerOptimizer | None = None
        self._slots: tuple[str, ...] | None = None
        for name in self._learned:
            self.register_parameter(name, None)

    def attach(self, inner: InnerOptimizer) -> Self:
        """Sits on an optimizer, or takes over the values that it has now.

        Offsets are kept: the schedule may have moved what they are relative to. Groups or tensors that were
        added (by ``BaseFinetuning``, say) start at offset 0. The parameter object stays the same then, but
        its shape grows, its ``grad`` is dropped, and a meta-optimizer's state for it no longer fits.

        Args:
            inner: ``mirror(optimizer, model.named_parameters())`` or
                ``inner_optimizer(torch.optim.SGD, lr=0.1)``. Its values are the bases, so it must show the
                user's own values, without what was learned.

        Raises:
            ValueError: The optimizer lacks a hyperparameter; at the first time, a value cannot be learned (a
                weight decay of 0 stays 0 as a factor) or is out of bounds; later, groups or tensors have
                gone.
        """
        slots = self._slots_of(inner)
        for name, how in self._learned.items():
            if how.key not in inner.rule.learnable:
                there = [n for n, p in PARAMETRISATIONS.items() if p.key in inner.rule.learnable]
                raise ValueError(
                    f"{name!r} cannot be learned, the optimizer has no such hyperparameter. "
                    f"Those that it has: {', '.join(there)}."
                )
            # Only at first: later a schedule may well pass through 0, or learning end at a bound.
            if self._inner is None:
                how.validate(name, [group.hyperparameters for group in inner.groups])
        offsets = {name: self._parameters[name] for name in self._learned}
        moved = {name: self._rearranged(offset, slots) for name, offset in offsets.items()}
        for name, values in moved.items():
            offset = offsets[name]
            if offset is None:
                self._parameters[name] = torch.nn.Parameter(values)
            elif not torch.equal(values, offset):
                offset.data, offset.grad = values, None
        self._inner, self._slots = inner, slots
        return self

    def transformation(self) -> GradientTransformation:
        """The attached optimizer with the learned values in place; differentiable in the meta-parameters."""
        return self._attached().transformation(self._by_group([self._values_of(n).unbind() for n in self._learned]))

    @property
    def scale_equivariant(self) -> bool:
        """Whether the attached optimizer is (SGD)."""
        return self._attached().scale_equivariant

    def scaled_rate(self, factor: float) -> dict[str, Tensor] | None:
        """The offset of ``"learning_rate"``, moved by ``log(factor)``; ``None`` if that is not learned."""
        if "learning_rate" not in self._learned:
            return None
        return {"learning_rate": self.get_parameter("learning_rate").detach() + math.log(factor)}

    @property
    def accepts_missing_gradients(self) -> bool:
        """Yes, since such a parameter keeps its state and its step is not counted, as in ``torch.optim``."""
        return True

    @property
    def independent_tensors(self) -> bool:
        """Yes, as in ``torch.optim``."""
        return True

    def treated_alike(self, names: Sequence[str]) -> list[list[str]]:
        """The attached optimizer's groups, unless each tensor has values of its own."""
        return super().treated_alike(names) if self.per == "tensor" else self._attached().treated_alike(names)

    @torch.no_grad()
    def values(self) -> list[dict[str, Any]]:
        """The values in force, ready to be written into the live optimizer's groups.

        Returns:
            For each group a dictionary from ``torch.optim``'s keys to a float, to a pair of floats
            (``betas``), or, with ``per="tensor"``, to a dictionary from parameter names to those.
        """
        # Rounding may leave a value one bit outside [0, 1).
        numbers = [[how.nearest(v) for v in self._values_of(name).tolist()] for name, how in self._learned.items()]
        groups = self._by_group(numbers)
        for group, found in zip(self._attached().groups, groups, strict=True):
            if "beta1" in found or "beta2" in found:
                betas = [found.pop(key, group.hyperparameters[key]) for key in ("beta1", "beta2")]
                found["betas"] = _paired(*betas)
        return groups

    @torch.no_grad()
    def project_(self) -> None:
        """Clamps the offsets in place so that the values are within their bounds."""
        groups = self._attached().groups
        for name, how in self._learned.items():
            limits = [how.offset_limits(group.hyperparameters) for group in groups]
            if self.per == "optimizer":
                limits = [(max(low for low, _ in limits), min(high for _, high in limits))]
            elif self.per == "tensor":
                limits = [pair for pair, group in zip(limits, groups, strict=True) for _ in group.names or ()]
            offset = self.get_parameter(name)
            low, high = (offset.new_tensor(side) for side in zip(*limits, strict=True))
            offset.copy_(offset.clamp(low, high))

    def configuration(self) -> dict[str, Any]:
        """The arguments, and the optimizer that this one sits on (``"inner"``, ``None`` before :meth:`attach`)."""
        bounds = {name: [how.minimum, how.maximum] for name, how in self._learned.items()}
        return {"learn": list(self._learned), "per": self.per, "bounds": bounds, "inner": self._described()}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """An optimizer with these arguments, attached to ``"inner"``."""
        inner = configuration.get("inner")
        learned = cls(**{name: value for name, value in configuration.items() if name != "inner"})
        if inner is None:
            return learned
        rules = _rules()
        if inner["optimizer"] not in rules:
            raise ValueError(f"There is no optimizer {inner['optimizer']!r}; these are known: {', '.join(rules)}.")
        groups = [
            ParameterGroup(None if group["names"] is None else tuple(group["names"]), dict(group["hyperparameters"]))
            for group in inner["groups"]
        ]
        return learned.attach(InnerOptimizer(rules[inner["optimizer"]], tuple(groups)))

    def _described(self) -> dict[str, Any] | None:
        """The attached optimizer as strings, numbers, lists and dictionaries."""
        inner, rules = self._inner, _rules()
        if inner is None:
            return None
        names = [name for name, rule in rules.items() if rule is inner.rule]
        if not names:
            raise TypeError(
                f"The optimizer that these hyperparameters belong to is not one of torch.optim's ({', '.join(rules)}), "
                "so a file cannot name it. Save its values() instead."
            )
        groups = [
            {"names": None if g.names is None else list(g.names), "hyperparameters": dict(g.hyperparameters)}
            for g in inner.groups
        ]
        return {"optimizer": names[-1], "groups": groups}

    def extra_repr(self) -> str:
        """What is learned, and for what."""
        return f"learn={tuple(self._learned)}, per={self.per!r}"

    def _attached(self) -> InnerOptimizer:
        if self._inner is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know yet which optimizer it sits on. Call "
                "attach(mirror(optimizer, model.named_parameters())) for a live optimizer, or "
                "attach(inner_optimizer(torch.optim.SGD, lr=0.1)), both from lightning_l2l.functional."
            )
        return self._inner

    def _slots_of(self, inner: InnerOptimizer) -> tuple[str, ...]:
        """A name for each value that is learned: the optimizer's, the groups', or the tensors' own."""
        if self.per == "optimizer":
            return ("optimizer",)
        if self.per == "group":
            return tuple(f"group {index}" for index in range(len(inner.groups)))
        if any(group.names is None for group in inner.groups):
            raise ValueError(
                "per='tensor' needs to know the tensors: attach mirror(optimizer, model.named_parameters()), or "
                "inner_optimizer(...).with_names([...]) with their names."
            )
        return tuple(name for group in inner.groups for name in group.names or ())

    def _rearranged(self, offset: Tensor | None, slots: tuple[str, ...]) -> Tensor:
        """The offsets for a changed list of slots: those of old slots, and zeros for new ones."""
        values = torch.zeros(len(slots), dtype=torch.float64)
        if offset is None:
            return values
        # Offsets that were loaded from a file before the first attach are in the order of the slots.
        before = slots[: len(offset)] if self._slots is None else self._slots
        gone = [slot for slot in before if slot not in slots]
        if gone or len(before) != len(offset):
            raise ValueError(
                f"{type(self).__name__} was attached to an optimizer with {len(offset)} value(s) to learn and now "
                f"meets one with {len(slots)}{f' that lacks {gone[0]}' if gone else ''}. Its offsets have nowhere to "
                "go: make a new one for another optimizer."
            )
        values = values.to(offset)
        values[[slots.index(slot) for slot in before]] = offset.detach()
        return values

    def _values_of(self, name: str) -> Tensor:
        """The values of one hyperparameter: one for each group, or for each tensor with ``per="tensor"``."""
        how = self._learned[name]
        # getattr, not a stored reference: functional_call puts other tensors in this place.
        offset = getattr(self, name).double()
        bases = [
            float(group.hyperparameters[how.key])
            for group in self._attached().groups
            for _ in (group.names or () if self.per == "tensor" else ("the group",))
        ]
        return how.value(torch.tensor(bases, dtype=torch.float64, device=offset.device), offset)

    def _by_group(self, values: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """For each group the learned values by ``torch.optim``'s keys, from all values of each hyperparameter."""
        groups = self._attached().groups
        found: list[dict[str, Any]] = [{} for _ in groups]
        for how, of_all in zip(self._learned.values(), values, strict=True):
            rest = iter(of_all)
            for group, own in zip(groups, found, strict=True):
                own[how.key] = {n: next(rest) for n in group.names or ()} if self.per == "tensor" else next(rest)
        return found

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Before the first attach there are no parameters to load into: make them in the saved shape.
        for name in self._learned:
            saved = state_dict.get(prefix + name)
            if saved is not None and self._parameters[name] is None:
                self._parameters[name] = torch.nn.Parameter(torch.zeros_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LearnedStepSize(LearnedHyperparameters):
    """Learns the learning rate of the optimizer that trains, as a positive factor on what the scheduler says.

    The meta-parameter ``learning_rate`` is the logarithm of that factor (float64, zero at first): meta-steps
    are relative, the rate cannot become negative, and the schedule goes on underneath. The paper learns a
    scalar step size by gradient descent on a meta-objective (arXiv 2006.16495, section 2); the logarithm is
    ours.

    Args:
        per: One factor for the whole optimizer, for each parameter group, or for each tensor.
        minimum: Smallest rate that may be learned (before the schedule).
        maximum: Largest rate that may be learned (before the schedule).

    Raises:
        ValueError: Unknown ``per``, or bounds that are no interval above 0.

    Example:
        >>> import torch
        >>> from lightning_l2l.functional import inner_optimizer
        >>> learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
        >>> learned.learning_rate.tolist(), learned.values()
        ([0.0], [{'lr': 0.1}])
        >>> parameters = {"w": torch.tensor([1.0])}
        >>> optimizer = learned.transformation()
        >>> updates, _ = optimizer.update({"w": torch.tensor([3.0])}, optimizer.init(parameters), params=parameters)
        >>> updates["w"].sum().backward()  # d(-lr * 3) / d log lr
        >>> round(learned.learning_rate.grad.item(), 6)
        -0.3
    """

    def __init__(self, per: Per = "group", minimum: float = 1e-10, maximum: float = 1e4) -> None:
        super().__init__(("learning_rate",), per, {"learning_rate": (minimum, maximum)})

    def configuration(self) -> dict[str, Any]:
        """The arguments, and the optimizer that this one sits on."""
        found = super().configuration()
        minimum, maximum = found["bounds"]["learning_rate"]
        return {"per": self.per, "minimum": minimum, "maximum": maximum, "inner": found["inner"]}


def _rules() -> dict[str, Rule]:
    return {cls.__name__: inner_optimizer(cls).rule for cls in _CLASSES}


def _paired(beta1: Any, beta2: Any) -> Any:
    """``(beta1, beta2)``, for each name where one of them is given by name."""
    names = next((betas for betas in (beta1, beta2) if isinstance(betas, dict)), None)
    if names is None:
        return beta1, beta2
    pick = [betas if isinstance(betas, dict) else dict.fromkeys(names, betas) for betas in (beta1, beta2)]
    return {name: (pick[0][name], pick[1][name]) for name in names}
