"""Learn the learning rate while you train: meta-gradients for PyTorch Lightning."""

from lightning_l2l.__about__ import __version__
from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.result import Diagnostics, MetaGradient
from lightning_l2l.learned import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    UnitStepOptimizer,
)
from lightning_l2l.meta_training import MetaTraining

__all__ = [
    "Diagnostics",
    "EvolutionStrategies",
    "LSTMOptimizer",
    "LearnedHyperparameters",
    "LearnedOptimizer",
    "LearnedStepSize",
    "MLPOptimizer",
    "MetaGradient",
    "MetaTraining",
    "SmallFCOptimizer",
    "UnitStepOptimizer",
    "Unroll",
    "__version__",
    "meta_gradient",
]
