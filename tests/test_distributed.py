"""Several processes learn what a single one would learn from all their batches, and never wait for each other forever.

Processes that hang fail a test after a time that no run takes.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import distributed_runs as runs
import pytest
import torch
from helpers import difference, learner
from launch import launch

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no process can be forked from a server")


def equal_on_all(results: list[Any]) -> dict[str, Any]:
    """The result, if every process came back with the same one to the last bit."""
    assert not any(isinstance(result, str) for result in results), results
    for result in results[1:]:
        assert difference(results[0], result) == ""
    return results[0]


CASES: dict[str, Any] = {
    "momentum": ("momentum", {}, {"meta_data": "train"}),
    "adam, clipped": ("adam", {"gradient_clip_val": 0.1}, {"meta_data": "train"}),
    "accumulated": ("adam", {"accumulate_grad_batches": 2}, {"meta_data": "train"}),
    "in the search": ("tiny", {}, {"meta_data": "train", "initial_search": True}),
    "lost": ("far too large", {"max_epochs": 6}, {"meta_data": "train"}),
    "unused parameters are looked for": (
        "momentum",
        {"strategy": "ddp_find_unused_parameters_true"},
        {"meta_data": "train"},
    ),
}


@pytest.mark.feature("several devices and nodes by DDP", "works", "the rates are those of one process with all batches")
@pytest.mark.filterwarnings("ignore:LearnToLearn. after step")
@pytest.mark.parametrize("case", CASES)
def test_rates_are_equal_on_all_processes_and_those_of_the_joined_batch(tmp_path: Path, case: str) -> None:
    optimizer, options, ours = CASES[case]
    found = equal_on_all(launch(tmp_path, runs.fit, 2, optimizer, options, ours))
    single = runs.fit(1, optimizer, {key: value for key, value in options.items() if key != "strategy"}, ours)
    assert [record["step"] for record in found["history"]] == [record["step"] for record in single["history"]]
    for record, expected in zip(found["history"], single["history"], strict=True):
        assert record["diagnostics"] == expected["diagnostics"]
        for key in ("learning_rates", "base_rates"):
            assert record[key] == pytest.approx(expected[key], rel=1e-6)
        for key in ("training_loss", "cosine", "cosine_error"):
            if key in expected:  # a record of a rollback has no evidence
                assert record[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6, nan_ok=True)
    for name, value in single["state"].items():
        assert torch.allclose(found["state"][name], value, rtol=1e-6, atol=1e-9)
    assert any(record["diagnostics"]["trouble"] for record in found["history"]) is (case == "lost")


@pytest.mark.feature("several devices and nodes by DDP", "works", "the rates are those of one process with all batches")
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_watching_changes_nothing(tmp_path: Path, strategy: str) -> None:
    expected, found = (launch(tmp_path, runs.unchanged, ours, strategy) for ours in (False, True))
    for plain, watched in zip(expected, found, strict=True):
        assert not isinstance(plain, str) and not isinstance(watched, str), (plain, watched)
        assert difference(plain["outcome"], watched["outcome"]) == "" and watched["updates"] >= 4


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = equal_on_all(launch(tmp_path, runs.fit_and_save, tmp_path, None))
    again = equal_on_all(launch(tmp_path, runs.fit_and_save, tmp_path, tmp_path / "step=6.ckpt"))
    assert difference(whole, again) == "" and len(whole["history"]) >= 4


def test_every_process_looks_at_other_held_out_examples(tmp_path: Path) -> None:
    first, second = launch(tmp_path, runs.looked_at)
    assert len(first) == len(second) >= 8 and not set(first) & set(second)


@pytest.mark.parametrize("meta_data", ["val", "auto"])
def test_held_out_gradients_that_fail_on_one_process_fail_on_all(tmp_path: Path, meta_data: str) -> None:
    results = launch(tmp_path, runs.fit_that_fails, False, meta_data)
    if meta_data == "val":
        assert all(result.startswith("HeldOutError: LearnToLearn called Fails.training_step") for result in results)
        assert "on one process only" in results[1] and "on another process" in results[0]
    else:
        assert not any(isinstance(result, str) for result in results)
        assert difference(*results) == ""


def test_an_exception_in_the_training_of_one_process_ends_the_run_on_all(tmp_path: Path) -> None:
    results = launch(tmp_path, runs.fit_that_fails, True, "train")
    assert all(isinstance(result, str) for result in results) and "on one process only" in results[1]


def test_a_batch_that_is_no_number_on_one_process_is_taken_back_on_all(tmp_path: Path) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_broken))
    assert [r["step"] for r in found["history"] if r["diagnostics"]["trouble"] == "rolled_back"] == [14]
    assert all(torch.isfinite(value).all() for value in found["state"].values())


def test_processes_that_lightning_starts_return_what_was_logged(tmp_path: Path) -> None:
    (result,) = launch(tmp_path, runs.spawned, "ddp_fork", count=1)
    assert not isinstance(result, str), result
    # Learned in the children: the weights and the logged values come back, the callback's own state does not.
    assert result["metrics"]["l2l/learning_rate"] > 1e-6 and result["history"] == []
    pickle.loads(pickle.dumps(learner()))  # what ddp_spawn sends to them
