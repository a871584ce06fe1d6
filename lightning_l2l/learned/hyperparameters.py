"""Hyperparameters of the optimizer that trains, as meta-parameters: rates, momenta, decays.

A meta-parameter is an offset from the value that the live optimizer has now; at offset 0 the value is that
one, to the last bit. So the scheduler keeps its say, and a learned optimizer that has learned nothing changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.functional import InnerOptimizer
from lightning_l2l.learned.attached import Per, described, rearranged, rebuilt, slots_of, sources_of
from lightning_l2l.learned.base import LearnedOptimizer
from lightning_l2l.learned.parametrisation import PARAMETRISATIONS, parametrisations

if TYPE_CHECKING:
    from typing_extensions import Self


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
        """See the class."""
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
        slots = slots_of(inner, self.per)
        for name, how in self._learned.items():
            if how.key not in inner.rule.learnable:
                there = [n for n, p in PARAMETRISATIONS.items() if p.key in inner.rule.learnable]
                raise ValueError(
                    f"{name!r} cannot be learned, the optimizer has no such hyperparameter. "
                    f"Those that it has: {', '.join(there)}."
                )
            # Only at first: later a schedule may well pass through 0, or learning end at a bound.
            if self._inner is None:
                how.refuse(name, [group.hyperparameters for group in inner.groups])
        try:
            sources = {name: sources_of(slots, self._parameters[name], self._slots) for name in self._learned}
        except ValueError as error:
            raise ValueError(f"{type(self).__name__} {error}") from None
        for name, source in sources.items():
            self._parameters[name] = rearranged(self._parameters[name], source)
        self._inner, self._slots = inner, slots
        return self

    def transformation(self) -> GradientTransformation:
        """The attached optimizer with the learned values in place; differentiable in the meta-parameters."""
        return self._attached().transformation(self._group_values([self._cells(n).unbind() for n in self._learned]))

    def _group_values(self, cells: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """For each group the learned values by ``torch.optim``'s keys, from all values of each hyperparameter."""
        groups = self._attached().groups
        values: list[dict[str, Any]] = [{} for _ in groups]
        for how, of_all in zip(self._learned.values(), cells, strict=True):
            rest = iter(of_all)
            for group, found in zip(groups, values, strict=True):
                found[how.key] = self._of_group(group.names, rest)
        return values

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
        inner = self._attached()
        # Rounding may leave a value one bit outside [0, 1).
        values = self._group_values(
            [[how.nearest(value) for value in self._cells(name).tolist()] for name, how in self._learned.items()]
        )
        for group, found in zip(inner.groups, values, strict=True):
            if "beta1" in found or "beta2" in found:
                betas = [found.pop(key, group.hyperparameters[key]) for key in ("beta1", "beta2")]
                found["betas"] = _paired(*betas)
        return values

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
        return {"learn": list(self._learned), "per": self.per, "bounds": bounds, "inner": described(self._inner)}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """An optimizer with these arguments, attached to ``"inner"``."""
        inner = configuration.get("inner")
        learned = cls(**{name: value for name, value in configuration.items() if name != "inner"})
        return learned if inner is None else learned.attach(rebuilt(inner))

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

    def _cells(self, name: str) -> Tensor:
        """The values of one hyperparameter: one for each group, or for each tensor with ``per="tensor"``."""
        # getattr, not a stored reference: functional_call puts other tensors in this place.
        cells: Tensor = self._values_at(name, getattr(self, name).double())
        return cells

    def _values_at(self, name: str, offset: Any) -> Any:
        how = self._learned[name]
        counts = [len(group.names or ()) if self.per == "tensor" else 1 for group in self._attached().groups]
        bases = [
            float(group.hyperparameters[how.key])
            for group, count in zip(self._attached().groups, counts, strict=True)
            for _ in range(count)
        ]
        return how.value(torch.tensor(bases, dtype=torch.float64, device=offset.device), offset)

    def _of_group(self, names: tuple[str, ...] | None, cells: Iterator[Any]) -> Any:
        if self.per != "tensor":
            return next(cells)
        return {name: next(cells) for name in names or ()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Before the first attach there are no parameters to load into: make them in the saved shape.
        for name in self._learned:
            saved = state_dict.get(prefix + name)
            if saved is not None and self._parameters[name] is None:
                self._parameters[name] = torch.nn.Parameter(torch.zeros_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _paired(beta1: Any, beta2: Any) -> Any:
    """``(beta1, beta2)``, for each name where one of them is given by name."""
    names = next((betas for betas in (beta1, beta2) if isinstance(betas, dict)), None)
    if names is None:
        return beta1, beta2
    pick = [betas if isinstance(betas, dict) else dict.fromkeys(names, betas) for betas in (beta1, beta2)]
    return {name: (pick[0][name], pick[1][name]) for name in names}
