"""The arguments of LearnToLearn, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_l2l.exact.meta_gradient import Estimator, check_estimator
from lightning_l2l.exact.objectives import Objective, check_objective
from lightning_l2l.learned import LearnedOptimizer

# The estimators of one unroll, and those that unroll nothing.
HostEstimator = Estimator | Literal["displacement", "live"]
# What unroll_steps=None is for all estimators but "displacement", whose memory is longer.
USUAL_UNROLL = 3


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see :class:`lightning_l2l.LearnToLearn` for what each means.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.
    """

    unroll_steps: int | None
    every_n_steps: int
    objective: Objective
    meta_data: Any
    estimator: HostEstimator
    meta_learning_rate: float
    initial_search: bool
    search_budget: float
    divergence_guard: bool
    seed: int
    carry: float
    interval_growth: float

    def __post_init__(self) -> None:
        """Check every argument, and make plain Python numbers of numpy's."""
        for name in ("unroll_steps", "every_n_steps"):
            if (name, getattr(self, name)) != ("unroll_steps", None) and _whole_number(self, name) < 1:
                raise ValueError(f"LearnToLearn({name}={getattr(self, name)}) must be at least 1.")
        if not 0 <= _whole_number(self, "seed") < 2**32:
            raise ValueError(f"LearnToLearn(seed={self.seed}) must be in [0, 2**32), as numpy wants it.")
        for name in ("objective", "estimator"):
            if not isinstance(getattr(self, name), str):
                raise _wrong_type(self, name, "a name (a string)")
        check_objective(self.objective)
        if self.estimator not in ("displacement", "live"):
            check_estimator(self.estimator)
        if isinstance(self.meta_data, str) and self.meta_data not in ("val", "train"):
            raise ValueError(f"LearnToLearn(meta_data={self.meta_data!r}) must be 'val', 'train' or a loader.")
        if _is_unbatched(self.meta_data):
            raise TypeError(
                f"LearnToLearn(meta_data=...) must be 'val', 'train' or a loader, not {type(self.meta_data).__name__}"
                f"{' of tensors' if isinstance(self.meta_data, (list, tuple)) else ''}: without batches, each example "
                "would be taken for one. Wrap it in a DataLoader (batch_size=None where each item is a batch already)."
            )
        if not _is_loader(self.meta_data):
            raise _wrong_type(self, "meta_data", "'val', 'train' or one loader that can be read more than once")
        rate = _number(self, "meta_learning_rate")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"LearnToLearn(meta_learning_rate={rate}) must be finite and not negative; 0 only observes."
            )
        if not 0 < _number(self, "search_budget") <= 1:
            raise ValueError(
                f"LearnToLearn(search_budget={self.search_budget}) must be a fraction of the training in (0, 1]; "
                "initial_search=False switches the search off."
            )
        if not 0 <= _number(self, "carry") <= 1:
            raise ValueError(
                f"LearnToLearn(carry={self.carry}) must be in [0, 1]: the part of a window's tangent that the next one "
                "starts with; 0 for windows that know nothing of each other."
            )
        growth = _number(self, "interval_growth")
        if not (math.isfinite(growth) and growth >= 0):
            raise ValueError(
                f"LearnToLearn(interval_growth={growth}) must be finite and not negative; 0 for a meta-update every "
                "every_n_steps steps to the end."
            )
        for name in ("initial_search", "divergence_guard"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong_type(self, name, "True or False")

    @property
    def unrolled(self) -> int:
        """How many steps an unroll has."""
        return self.unroll_steps or USUAL_UNROLL


def check_learned(learned: object) -> None:
    """Refuse what is no learned optimizer.

    Raises:
        TypeError: It is none, or the class of one.
    """
    if learned is not None and not isinstance(learned, LearnedOptimizer):
        found = f"the class {learned.__name__}" if isinstance(learned, type) else type(learned).__name__
        raise TypeError(f"LearnToLearn(learned=...) must be a LearnedOptimizer such as LearnedStepSize(), not {found}.")


def _is_unbatched(data: Any) -> bool:
    # Of a list of tensors nobody can say whether these are batches, or the inputs and targets of one.
    if isinstance(data, (list, tuple)):
        return any(isinstance(item, Tensor) for item in data)
    return isinstance(data, (Dataset, Tensor))


def _is_loader(data: Any) -> bool:
    # An iterator (a generator, say) is empty after one pass. A dictionary or a CombinedLoader is several loaders; so
    # is a list of them, unlike one of batches.
    several = isinstance(data, Mapping) or type(data).__name__ == "CombinedLoader"
    several = several or (isinstance(data, (list, tuple)) and any(isinstance(item, DataLoader) for item in data))
    return isinstance(data, Iterable) and not hasattr(data, "__next__") and not several


def _whole_number(settings: Settings, name: str) -> int:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong_type(settings, name, "a whole number")
    object.__setattr__(settings, name, int(value))
    return int(value)


def _number(settings: Settings, name: str) -> float:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(settings, name, "a number")
    object.__setattr__(settings, name, float(value))
    return float(value)


def _wrong_type(settings: Settings, name: str, wanted: str) -> TypeError:
    return TypeError(f"LearnToLearn({name}=...) must be {wanted}, not {type(getattr(settings, name)).__name__}.")
