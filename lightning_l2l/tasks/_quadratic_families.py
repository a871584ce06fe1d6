"""Random quadratics: the families of arXiv 2006.16495 and of its code."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Family = Literal["square", "wide", "condition"]


def random_quadratic(
    dim: int,
    seed: int,
    kind: Family,
    condition_number: float | None,
    start: Literal["gaussian", "sphere"],
    tasks: int | None,
) -> tuple[Tensor, Tensor]:
    """Return ``(hessian, initial_point)`` in float64; see :meth:`lightning_l2l.tasks.Quadratic.random`."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be an int of at least 1, got {dim!r}.")
    if tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
        raise ValueError(f"tasks must be an int of at least 1, or None for a single task, got {tasks!r}.")
    if kind not in get_args(Family):
        raise ValueError(f"Unknown kind {kind!r}. Choose one of {', '.join(map(repr, get_args(Family)))}.")
    if start not in ("gaussian", "sphere"):
        raise ValueError(f"Unknown start {start!r}. Choose 'gaussian' or 'sphere'.")
    if (kind == "condition") != (condition_number is not None):
        raise ValueError("condition_number belongs to kind='condition': give both or neither.")
    if condition_number is not None and not (math.isfinite(condition_number) and condition_number >= 1):
        raise ValueError(f"condition_number must be finite and at least 1, got {condition_number!r}.")
    generator = torch.Generator().manual_seed(seed)
    batch = () if tasks is None else (tasks,)
    point = torch.randn(*batch, dim, generator=generator, dtype=torch.float64)
    if start == "sphere":
        point = point / torch.linalg.vector_norm(point, dim=-1, keepdim=True)
    if kind == "square":
        factor = torch.randn(*batch, dim, dim, generator=generator, dtype=torch.float64)
        return factor.mT @ factor, point
    if kind == "wide":
        factor = torch.randn(*batch, dim, 2 * dim, generator=generator, dtype=torch.float64)
        return factor @ factor.mT, point
    assert condition_number is not None
    return _with_condition_number(dim, condition_number, batch, generator), point


def _with_condition_number(
    dim: int, condition_number: float, batch: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    if dim == 1 and condition_number != 1:
        raise ValueError("In one dimension the condition number is 1.")
    # Both ends exactly, the rest log-uniform between them.
    position = torch.rand(*batch, dim, generator=generator, dtype=torch.float64)
    position[..., 0] = 0.0
    position[..., -1] = 1.0
    eigenvalues = torch.exp((position - 1) * math.log(condition_number))
    gaussian = torch.randn(*batch, dim, dim, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(gaussian)
    hessian: Tensor = (rotation * eigenvalues.unsqueeze(-2)) @ rotation.mT
    return (hessian + hessian.mT) / 2
