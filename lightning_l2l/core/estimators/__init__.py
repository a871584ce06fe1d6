"""Estimators of a meta-gradient, one per file, all with the same signature.

``estimate(step, start, batches, meta_batch, objective, reason) -> (MetaGradient, Iterate)``, the iterate being the one that the unroll arrived at.
"""

from __future__ import annotations

from lightning_l2l.core.estimators.forward import forward
from lightning_l2l.core.estimators.reverse import reverse

__all__ = ["forward", "reverse"]
