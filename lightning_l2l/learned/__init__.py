"""Learned optimizers: functions from meta-parameters to ordinary optimizers."""

from lightning_l2l.learned.base import LearnedOptimizer, register_learned_optimizer
from lightning_l2l.learned.hyperparameters import LearnedHyperparameters, LearnedStepSize
from lightning_l2l.learned.in_use import OptimizerInUse
from lightning_l2l.learned.lstm import LSTMOptimizer
from lightning_l2l.learned.mlp import MLPOptimizer
from lightning_l2l.learned.small_fc import SmallFCOptimizer
from lightning_l2l.learned.tensorwise import TensorwiseOptimizer
from lightning_l2l.learned.tf1_rmsprop import TF1RMSProp
from lightning_l2l.learned.torch_optimizer import LearnedTorchOptimizer

for _cls in (
    LearnedHyperparameters,
    LearnedStepSize,
    LSTMOptimizer,
    MLPOptimizer,
    SmallFCOptimizer,
    TensorwiseOptimizer,
):
    register_learned_optimizer(_cls)

__all__ = [
    "LSTMOptimizer",
    "LearnedHyperparameters",
    "LearnedOptimizer",
    "LearnedStepSize",
    "LearnedTorchOptimizer",
    "MLPOptimizer",
    "OptimizerInUse",
    "SmallFCOptimizer",
    "TF1RMSProp",
    "TensorwiseOptimizer",
    "register_learned_optimizer",
]
