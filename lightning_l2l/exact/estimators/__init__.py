"""Estimators of a meta-gradient, one per file.

Those that look at one unroll have the same signature,
``estimate(step, start, batches, meta_batch, objective, reason) -> (MetaGradient, Iterate)``, the iterate being the one
that the unroll arrived at; ``es`` and ``mixed`` take their particles as one more argument. ``pes`` and ``es_single``
look at one window of a longer training and carry particles to the next; they are driven by
:class:`~lightning_l2l.exact.windows.WindowEstimator`, which swaps all of them by name. ``Displacement`` and
``LiveUnroll`` unroll nothing: the steps are the training's own, and the training drives them.
"""

from __future__ import annotations

from lightning_l2l.exact.estimators.displacement import Displacement, Slope, displacement, slope
from lightning_l2l.exact.estimators.es import es
from lightning_l2l.exact.estimators.es_single import es_single
from lightning_l2l.exact.estimators.forward import forward
from lightning_l2l.exact.estimators.live import LiveUnroll
from lightning_l2l.exact.estimators.mixed import mixed
from lightning_l2l.exact.estimators.particles import Particles
from lightning_l2l.exact.estimators.pes import pes
from lightning_l2l.exact.estimators.reverse import reverse
from lightning_l2l.exact.estimators.segmented import segmented
from lightning_l2l.exact.estimators.truncated import truncated

__all__ = [
    "Displacement",
    "LiveUnroll",
    "Particles",
    "Slope",
    "displacement",
    "es",
    "es_single",
    "forward",
    "mixed",
    "pes",
    "reverse",
    "segmented",
    "slope",
    "truncated",
]
