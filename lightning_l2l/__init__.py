"""Learn the learning rate while you train: meta-gradients for PyTorch Lightning."""

from lightning_l2l.__about__ import __version__
from lightning_l2l.callback import LearnToLearn
from lightning_l2l.schedule import LearnedSchedule
from lightning_l2l.tuner import Displacement

__all__ = ["Displacement", "LearnToLearn", "LearnedSchedule", "__version__"]
