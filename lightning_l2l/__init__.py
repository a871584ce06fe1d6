"""Learn the learning rate while you train: meta-gradients for PyTorch Lightning."""

from lightning_l2l.__about__ import __version__
from lightning_l2l.callback import LearnToLearn
from lightning_l2l.exact.check import check
from lightning_l2l.exact.meta_gradient import meta_gradient
from lightning_l2l.exact.plan import plan
from lightning_l2l.exact.result import Diagnostics, MetaGradient
from lightning_l2l.host.task_module import TaskModule
from lightning_l2l.learned import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TinyOptimizer,
)
from lightning_l2l.meta_training import MetaTraining
from lightning_l2l.schedule import LearnedSchedule

__all__ = [
    "Diagnostics",
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
    "TinyOptimizer",
    "TaskModule",
    "__version__",
    "check",
    "meta_gradient",
    "plan",
]
