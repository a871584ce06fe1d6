"""How the core reaches the other processes of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from lightning_l2l.host.ranks import from_all_ranks, processes_of


def trainer(world_size: int, **model: Any) -> Any:
    strategy = SimpleNamespace(
        reduce=lambda tensor, reduce_op: {"sum": tensor * world_size}[reduce_op],
        root_device=torch.device("cpu"),
        model=SimpleNamespace(**model),
    )
    return SimpleNamespace(strategy=strategy, world_size=world_size, global_rank=1)


def test_a_single_process_has_no_others() -> None:
    assert processes_of(trainer(1)) is None


@pytest.mark.parametrize(("model", "expected"), [({}, True), ({"broadcast_buffers": False}, False)])
def test_processes_are_those_of_the_strategy_with_its_rule_for_buffers(model: dict[str, Any], expected: bool) -> None:
    found = processes_of(trainer(3, **model))
    assert found is not None
    assert (found.rank, found.count, found.buffers_of_first) == (1, 3, expected)
    # A sum, whatever Lightning's default is (a mean): the core divides by itself.
    assert found.total(torch.tensor(2.0)).item() == 6.0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_values_are_gathered_from_the_process_group_once_there_is_one(tmp_path: Path) -> None:
    value = {"steps": 3, "tensor": torch.ones(2)}
    assert from_all_ranks(value) == [value]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{(tmp_path / 'meeting').as_posix()}", rank=0, world_size=1
    )
    try:
        (found,) = from_all_ranks(value)
    finally:
        torch.distributed.destroy_process_group()
    assert found["steps"] == 3 and torch.equal(found["tensor"], value["tensor"])
    assert found is not value  # it has been on its way, unlike that of a run without a group
