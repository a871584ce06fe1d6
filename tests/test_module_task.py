"""A LightningModule as a task: what is refused, and how batches are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FEATURES, Plain, examples, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l.host.module_task import ModuleTask


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from examples()


def test_a_stream_is_refused_since_batches_are_drawn_at_random() -> None:
    with pytest.raises(TypeError, match="val dataset has no length"):
        ModuleTask(Plain, loader(), DataLoader(Stream()))


def test_what_is_made_has_to_be_a_lightning_module() -> None:
    with pytest.raises(TypeError, match="made a Linear"):
        ModuleTask(lambda: nn.Linear(2, 1), loader()).initial_parameters(torch.Generator().manual_seed(0))  # type: ignore


def test_a_split_without_data_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no 'test' data: pass test=DataLoader"):
        ModuleTask(Plain, loader()).sample_batch("test")


def test_a_data_set_of_whole_batches_is_drawn_from_as_it_is() -> None:
    batches = [(torch.full((4, FEATURES), float(number)), torch.zeros(4, dtype=torch.long)) for number in range(5)]
    task = ModuleTask(Plain, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    inputs, targets = task.sample_batch("train", torch.Generator().manual_seed(0))
    assert any(inputs is batch[0] and targets is batch[1] for batch in batches)
