"""Plain training for the opponents of ``LearnToLearn``: the Trainer's weights and batches, several times faster.

Self-contained. The benchmarks check that both give the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler, TensorDataset

# For `Trainer(**QUIET)`.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def batches(data: TensorDataset, order: Sampler[int], batch_size: int, epochs: int) -> list[tuple[Tensor, ...]]:
    """The batches of all epochs, as a ``DataLoader`` with this sampler gives them."""
    sampler = BatchSampler(order, batch_size, drop_last=False)
    # No further than the last batch: a RandomSampler that is asked for more draws random numbers once again.
    indices = [batch for _ in range(epochs) for batch in islice(sampler, len(sampler))]
    return [tuple(tensor[batch] for tensor in data.tensors) for batch in indices]


def train(
    loss_of: Callable[[tuple[Tensor, ...]], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, ...]],
    rates: Iterable[float] | None = None,
) -> bool:
    """One step for each batch, with the next of ``rates`` if there are any; False if a loss is not finite."""
    given = None if rates is None else iter(rates)
    for batch in batches:
        if given is not None:
            optimizer.param_groups[0]["lr"] = next(given)
        loss = loss_of(batch)
        if not math.isfinite(loss.item()):
            return False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return True


def cosine(peak: float, steps: int) -> list[float]:
    """Half a period of a cosine, from the peak towards zero."""
    return [peak * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
