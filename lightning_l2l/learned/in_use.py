"""A learned optimizer as a live ``torch.optim`` optimizer applies it, as a pure function: what an unroll needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchopt.base import GradientTransformation

from lightning_l2l.learned.base import LearnedOptimizer


@dataclass(frozen=True)
class CohortInUse:
    """Parameters that are updated together.

    Attributes:
        keys: Their names in the live optimizer, from which the state was made.
        names: Their names in the module, in the same order.
        rates: What each one's step is multiplied by.
        decays: The fraction by which each one shrinks.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    rates: tuple[float, ...]
    decays: tuple[float, ...]


class OptimizerInUse(LearnedOptimizer):
    """What the next steps of a live optimizer would do, differentiable in the meta-parameters.

    Made by :meth:`~lightning_l2l.learned.torch_optimizer.LearnedTorchOptimizer.mirror`. Its meta-parameters *are*
    those of the learned optimizer in use (under the prefix ``learned.``), so a meta-step moves the live optimizer.
    Its state is that of ``read_state``: for each cohort, under its number, the state of the transformation.

    Args:
        learned: The learned optimizer in use.
        cohorts: The parameters, rates and decays as they are now.
    """

    def __init__(self, learned: LearnedOptimizer, cohorts: Sequence[CohortInUse]) -> None:
        """See the class."""
        super().__init__()
        self.learned = learned
        self._cohorts = tuple(cohorts)

    @property
    def accepts_missing_gradients(self) -> bool:
        """Whether the learned optimizer does."""
        return self.learned.accepts_missing_gradients

    @property
    def scale_equivariant(self) -> bool:
        """Whether the learned optimizer is: rates and decays multiply."""
        return self.learned.scale_equivariant

    def scaled_rate(self, factor: float) -> dict[str, Tensor] | None:
        """Those of the learned optimizer, under the prefix."""
        found = self.learned.scaled_rate(factor)
        return None if found is None else {f"learned.{name}": value for name, value in found.items()}

    def project_(self) -> None:
        """The learned optimizer's own."""
        self.learned.project_()

    def transformation(self) -> GradientTransformation:
        """The optimizer, in torchopt's protocol; parameters in no cohort are not moved."""
        transformation = self.learned.transformation()

        def init(params: Mapping[str, Tensor]) -> dict[str, Any]:
            return {
                str(number): transformation.init(_renamed(params, cohort.names, cohort.keys))
                for number, cohort in enumerate(self._cohorts)
            }

        def update(
            updates: Any, state: Any, *, params: Any = None, inplace: bool = True
        ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
            if params is None:
                raise ValueError("The update needs the parameters themselves: pass params=... to update().")
            moved: dict[str, Tensor | None] = dict.fromkeys(params)
            following = dict(state)
            for number, cohort in enumerate(self._cohorts):
                if all(updates.get(name) is None for name in cohort.names):
                    continue  # as the live optimizer does
                found, following[str(number)] = transformation.update(
                    {key: updates.get(name) for key, name in zip(cohort.keys, cohort.names, strict=True)},
                    state[str(number)],
                    params=_renamed(params, cohort.names, cohort.keys),
                    inplace=False,
                )
                for key, name, rate, decay in zip(cohort.keys, cohort.names, cohort.rates, cohort.decays, strict=True):
                    delta = found.get(key)
                    if delta is not None:
                        delta = delta if rate == 1 else rate * delta
                        moved[name] = delta if decay == 0 else delta - decay * params[name]
            return moved, following

        return GradientTransformation(init, update)


def _renamed(tensors: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]) -> dict[str, Tensor]:
    return {key: tensors[name] for key, name in zip(new, old, strict=True)}
