"""Learn the learning rate while you train: meta-gradients for PyTorch Lightning."""

from lightning_l2l.__about__ import __version__
from lightning_l2l.callback import LearnToLearn
from lightning_l2l.exact.estimators import EvolutionStrategies, Unroll
from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.result import Diagnostics, MetaGradient
from lightning_l2l.host.task_module import TaskModule
from lightning_l2l.learned import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TensorwiseOptimizer,
)
from lightning_l2l.meta_training import MetaTraining
from lightning_l2l.schedule import LearnedSchedule
from lightning_l2l.tuner import Displacement, Tuner

__all__ = [
    "Diagnostics",
    "Displacement",
    "EvolutionStrategies",
    "LSTMOptimizer",
    "LearnToLearn",
    "LearnedHyperparameters",
    "LearnedOptimizer",
    "LearnedSchedule",
    "LearnedStepSize",
    "MLPOptimizer",
    "MetaGradient",
    "MetaTraining",
    "SmallFCOptimizer",
    "TaskModule",
    "TensorwiseOptimizer",
    "Tuner",
    "Unroll",
    "__version__",
    "meta_gradient",
]
