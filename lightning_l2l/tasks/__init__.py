"""Tasks to learn an optimizer on, each of which knows its own truth where there is one."""

from lightning_l2l.tasks.family import RandomQuadratics, TaskFamily
from lightning_l2l.tasks.image_classification import ImageClassification
from lightning_l2l.tasks.least_squares import LeastSquares
from lightning_l2l.tasks.quadratic import Quadratic
from lightning_l2l.tasks.task import Task

__all__ = ["ImageClassification", "LeastSquares", "Quadratic", "RandomQuadratics", "Task", "TaskFamily"]
