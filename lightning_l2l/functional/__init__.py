"""Inner optimizers: exact, differentiable mirrors of ``torch.optim`` as torchopt transformations."""

from lightning_l2l.functional.mirror import inner_optimizer, mirror, read_state, register_mirror
from lightning_l2l.functional.rule import Rule
from lightning_l2l.functional.transformation import InnerOptimizer, ParameterGroup

__all__ = [
    "InnerOptimizer",
    "ParameterGroup",
    "Rule",
    "inner_optimizer",
    "mirror",
    "read_state",
    "register_mirror",
]
