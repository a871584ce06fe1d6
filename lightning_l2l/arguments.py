"""What the arguments of LearnToLearn may be: refused where they are given, with what to write instead."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch.utils.data import Dataset

from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.learned import LearnedHyperparameters
from lightning_l2l.tuner import Displacement

MetaData = Literal["auto", "val", "train"]
Estimator = Displacement | Unroll | EvolutionStrategies


def check_arguments(
    estimator: Any, every_n_steps: int | None, meta_data: Any, held_out_loss: Any, meta_learning_rate: float
) -> None:
    """Refuse arguments that mean nothing.

    Raises:
        TypeError: One of the wrong type.
        ValueError: One out of range, or two that contradict each other.
    """
    if not isinstance(estimator, (Displacement, Unroll, EvolutionStrategies)):
        raise TypeError(
            f"LearnToLearn(estimator={estimator!r}): an estimator is an object that holds its own options, such as "
            "Displacement(), Unroll(steps=5) or EvolutionStrategies(particles=8)."
        )
    if every_n_steps is not None and (isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int)):
        raise TypeError(f"LearnToLearn(every_n_steps={every_n_steps!r}) must be a whole number of steps, or None.")
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(f"LearnToLearn(every_n_steps={every_n_steps}) must be at least 1.")
    if isinstance(meta_data, str) and meta_data not in get_args(MetaData):
        raise ValueError(
            f"LearnToLearn(meta_data={meta_data!r}) is not known; choose one of {list(get_args(MetaData))}, or pass a "
            "loader of batches."
        )
    if isinstance(meta_data, Dataset):
        raise TypeError(
            "LearnToLearn(meta_data=...) was given a Dataset. Wrap it: DataLoader(dataset, batch_size=...)."
        )
    if not isinstance(meta_data, str) and not hasattr(meta_data, "__iter__"):
        raise TypeError(
            f"LearnToLearn(meta_data={meta_data!r}) must be 'auto', 'val', 'train', or a loader of batches."
        )
    if held_out_loss is not None and not callable(held_out_loss):
        raise TypeError("LearnToLearn(held_out_loss=...) must be a function of the module and a batch.")
    if held_out_loss is not None and meta_data == "train":
        raise ValueError(
            "LearnToLearn(held_out_loss=..., meta_data='train') contradict each other: with meta_data='train' there "
            "are no held-out batches to take that loss of. Leave one of them out."
        )
    if isinstance(meta_learning_rate, bool) or not isinstance(meta_learning_rate, (int, float)):
        raise TypeError(f"LearnToLearn(meta_learning_rate={meta_learning_rate!r}) must be a number.")
    if not 0 <= meta_learning_rate < math.inf:
        raise ValueError(f"LearnToLearn(meta_learning_rate={meta_learning_rate}) must be finite, and not negative.")


def check_types(*, initial_search: Any, divergence_guard: Any, average_weights: Any, seed: Any) -> None:
    """Refuse switches and seeds of another type.

    Raises:
        TypeError: One of them is.
    """
    switches = {
        "initial_search": initial_search,
        "divergence_guard": divergence_guard,
        "average_weights": average_weights,
    }
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"LearnToLearn({name}={value!r}) must be True or False.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"LearnToLearn(seed={seed!r}) must be a whole number.")


def check_learned(estimator: Estimator, learned: Any) -> None:
    """Refuse what an estimator cannot learn.

    Raises:
        TypeError: ``learned`` is of another type.
        ValueError: It does not go together with the estimator.
    """
    if isinstance(estimator, Displacement):
        if learned is not None:
            raise ValueError(
                f"LearnToLearn(learned={type(learned).__name__}(...)) needs an exact estimator. The displacement knows "
                "what a larger learning rate would have changed, and nothing of momentum, decay or a neural optimizer. "
                "Pass one, LearnToLearn(Unroll(steps=20), learned=...), or leave `learned` out."
            )
        return
    name = type(estimator).__name__
    if estimator.steps is None:
        raise ValueError(f"LearnToLearn({name}()) has to know how many steps to unroll: {name}(steps=5), for example.")
    if isinstance(estimator, EvolutionStrategies) and estimator.method != "es":
        raise ValueError(
            f"LearnToLearn(EvolutionStrategies(method={estimator.method!r})) carries particles from one unroll to the "
            "next, but the unrolls of a running training do not follow each other. Use method='es'; the other methods "
            "serve meta-training (lightning_l2l.MetaTraining)."
        )
    if learned is not None and not isinstance(learned, LearnedHyperparameters):
        raise TypeError(
            f"LearnToLearn(learned={learned!r}) must be LearnedHyperparameters(...) or LearnedStepSize(...): values of "
            "your optimizer. To train on a neural optimizer, return learned.as_torch_optimizer(self.parameters()) from "
            "configure_optimizers, and leave `learned` out."
        )
    if learned is not None and learned.per == "tensor":
        raise ValueError(
            "LearnToLearn(learned=...(per='tensor')): an optimizer has one value for each parameter group. Make each "
            "tensor a group of its own in configure_optimizers, and use per='group'."
        )
