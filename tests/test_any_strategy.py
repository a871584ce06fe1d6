"""Any strategy: sharded parameters (FSDP2) and DDP with communication hooks, in two processes over gloo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_runs import learn, watch, without
from launch import launch
from lightning.pytorch import strategies

sharding = pytest.mark.skipif(not hasattr(strategies, "ModelParallelStrategy"), reason="came with Lightning 2.4")


def rates(run: Any) -> list[float]:
    assert isinstance(run, dict), run
    return [rate for record in run["history"] for rate in record["learning_rates"]]


@sharding
@pytest.mark.feature("FSDP2 by `ModelParallelStrategy`", "works", topic="strategy")
def test_sharded_parameters_learn_the_rates_of_ddp(tmp_path: Path) -> None:
    sharded, ddp = launch(tmp_path, learn, "sharded", 2), launch(tmp_path, learn, "ddp", 2)
    assert rates(sharded[0]) == rates(sharded[1]) and rates(ddp[0]) == rates(ddp[1])
    assert rates(sharded[0]) == pytest.approx(rates(ddp[0]), rel=1e-4)
    assert sharded[0]["rates"] != [1e-6] and max(rates(ddp[0])) > 2e-6
    for ours, theirs in zip(sharded[0]["history"], ddp[0]["history"], strict=True):
        assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)
        assert ours["held_out_cosine"] == pytest.approx(theirs["held_out_cosine"], rel=1e-3, abs=1e-5)
        assert math.isfinite(ours["held_out_loss"])


@pytest.mark.feature("DDP", "works", "the rates of one process with all the batches", topic="strategy")
def test_two_processes_learn_the_rates_of_one(tmp_path: Path) -> None:
    (one,), two = launch(tmp_path, learn, "plain", 1, count=1), launch(tmp_path, learn, "ddp", 2)
    # The gradient of attention's key bias is rounding noise, of which Adam makes whole steps: the runs drift apart.
    assert rates(two[0])[:5] == pytest.approx(rates(one)[:5], rel=0.02)
    assert rates(two[0]) == pytest.approx(rates(one), rel=0.5)


@pytest.mark.parametrize("kind", [pytest.param("sharded", marks=sharding), "ddp"])
def test_watching_leaves_a_run_of_several_processes_as_it_is(tmp_path: Path, kind: str) -> None:
    for ours, theirs in zip(launch(tmp_path, watch, kind, 2), launch(tmp_path, without, kind, 2), strict=True):
        assert isinstance(ours, list) and isinstance(theirs, list), (ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.feature("DDP communication hooks", "works", topic="strategy")
def test_with_compressed_gradients_all_processes_learn_the_same_rates(tmp_path: Path) -> None:
    compressed, ddp = launch(tmp_path, learn, "compressed", 2), launch(tmp_path, learn, "ddp", 2)
    assert rates(compressed[0]) == rates(compressed[1])
    assert rates(compressed[0]) == pytest.approx(rates(ddp[0]), rel=0.1)  # gradients in half precision
