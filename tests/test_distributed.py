"""Several processes learn what a single one would learn from all their batches, and never wait for each other forever.

Processes that hang fail a test after a time that no run takes.
"""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_runs as runs
import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from helpers import ALONG, difference, learner
from launch import launch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_l2l.host.refusals import refuse_strategy

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no process can be forked from a server")


def equal_on_all(results: list[Any]) -> dict[str, Any]:
    """The result, if every process came back with the same one to the last bit."""
    assert not any(isinstance(result, str) for result in results), results
    for result in results[1:]:
        assert not difference(results[0], result)
    return results[0]


def agrees_with_joined(results: list[Any], single: dict[str, Any]) -> None:
    """Within 1e-6: the promise. The runs are in double precision, so that what is measured is not rounding."""
    found = equal_on_all(results)
    assert len(found["history"]) == len(single["history"]) > 2
    for record, expected in zip(found["history"], single["history"], strict=True):
        assert record["diagnostics"]["estimator"] == expected["diagnostics"]["estimator"]
        assert record["meta_objective"] == pytest.approx(expected["meta_objective"], rel=1e-6)
        assert record["learning_rates"] == pytest.approx(expected["learning_rates"], rel=1e-6)
        assert record["diagnostics"]["losses"] == pytest.approx(expected["diagnostics"]["losses"], rel=1e-6)
        for name, gradient in expected["meta_gradient"].items():
            assert record["meta_gradient"][name] == pytest.approx(gradient, rel=1e-6)
    for name, value in single["state"].items():
        assert torch.allclose(found["state"][name], value, rtol=1e-6, atol=1e-9)


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("sgd", {}),
    "adam": ("adam", {}),
    "accumulation": ("sgd", {"accumulate_grad_batches": 2, "max_epochs": 3}),
    "clipping": ("adam", {"gradient_clip_val": 0.1}),
}
SLOW = {
    ("adam", "forward"), ("adam", "live"), ("accumulation", "reverse"), ("clipping", "forward"),
    ("momentum", "displacement"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "estimator"),
    [
        pytest.param(setting, estimator, marks=[pytest.mark.slow] if (setting, estimator) in SLOW else [])
        for setting in SETTINGS
        for estimator in ("forward", "reverse", *ALONG)
    ],
)
def test_the_meta_gradient_is_that_of_the_joined_batch(tmp_path: Path, setting: str, estimator: str) -> None:
    optimizer, options = SETTINGS[setting]
    several = launch(tmp_path, runs.fit, 2, optimizer, options, estimator)
    agrees_with_joined(several, runs.fit(1, optimizer, options, estimator))


@pytest.mark.feature("several devices and nodes by DDP", "works", "gradients are means over the processes", topic="strategy")
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["forward", "reverse", *ALONG])
def test_the_meta_gradient_of_four_processes_is_that_of_the_joined_batch(tmp_path: Path, estimator: str) -> None:
    several = launch(tmp_path, runs.fit, 4, "adam", {}, estimator, count=4)
    agrees_with_joined(several, runs.fit(1, "adam", {}, estimator))


def test_the_displacement_is_judged_by_the_mean_of_the_held_out_gradients(tmp_path: Path) -> None:
    first, second = results = launch(tmp_path, runs.fit_with_places)
    judged = [result.pop("judged") for result in results]
    equal_on_all([first, second])
    assert len(first["history"]) == 4 and first["rates"] != [0.1]
    for record, (loss, along), (other_loss, other_along) in zip(first["history"], *judged, strict=True):
        assert loss != other_loss
        # The same sums in double precision, in another order.
        expected = (along + other_along) / (loss + other_loss) / 20
        assert record["meta_gradient"]["learning_rate"] == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize("estimator", ["auto", "segmented"])
def test_long_unrolls_of_many_meta_parameters_choose_the_same_estimator(tmp_path: Path, estimator: str) -> None:
    several = launch(tmp_path, runs.fit_per_tensor, 2, 16, estimator)
    agrees_with_joined(several, runs.fit_per_tensor(1, 16, estimator))


@pytest.mark.parametrize("estimator", ["es", "mixed"])
def test_particles_that_are_spread_over_processes_are_those_of_a_single_one(tmp_path: Path, estimator: str) -> None:
    several = launch(tmp_path, runs.fit_with_notes, 2, estimator)
    assert all("32 particles over 2 processes" in result.pop("notes") for result in several)
    agrees_with_joined(several, runs.fit(1, "sgd", {}, estimator))


@pytest.mark.parametrize("estimator", ["forward", "reverse", *ALONG])
def test_parameters_that_some_processes_do_not_use_move_as_in_the_run(tmp_path: Path, estimator: str) -> None:
    single = runs.fit_partly_used(1, estimator)
    several = launch(tmp_path, runs.fit_partly_used, 2, estimator)
    agrees_with_joined(several, single)
    # Without a gradient, torch's SGD leaves a parameter alone; with a gradient of zero, it decays.
    used = ["extra.weight" in names for names in several[0]["gradients"]]
    assert used == [True, False] * (len(used) // 2) and not any("never.weight" in n for n in several[0]["gradients"])


@pytest.mark.parametrize("estimator", ["reverse", *ALONG, "es"])
def test_a_step_that_gathers_from_other_processes_is_looked_ahead_too(tmp_path: Path, estimator: str) -> None:
    several = launch(tmp_path, runs.fit_gathering, 2, estimator)
    agrees_with_joined(several, runs.fit_gathering(1, estimator))


def test_a_look_ahead_that_diverges_on_one_process_halves_the_rate_on_all(tmp_path: Path) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_with_trouble, "nan", "unroll", "forward"))
    rates = [record["learning_rates"][0] for record in found["history"]]
    assert rates == pytest.approx([0.1 * 0.5 ** (n + 1) for n in range(len(rates))])
    assert all("halved" in record["diagnostics"]["note"] for record in found["history"])


@pytest.mark.parametrize("estimator", ["reverse", *ALONG])
def test_held_out_data_that_is_spoilt_on_one_process_keeps_the_rate_on_all(tmp_path: Path, estimator: str) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_with_trouble, "nan", "held out", estimator))
    assert found["history"] and all(record["learning_rates"] == [0.1] for record in found["history"])
    assert all("its data has numbers that are not" in record["diagnostics"]["note"] for record in found["history"])


@pytest.mark.parametrize("estimator", ["forward", *ALONG])
def test_a_batch_that_is_not_finite_on_one_process_ends_no_run(tmp_path: Path, estimator: str) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_with_trouble, "nan", "always", estimator))
    assert found["history"] and math.isnan(found["history"][-1]["meta_objective"])


@pytest.mark.parametrize("estimator", ["forward", *ALONG])
def test_a_held_out_batch_that_one_process_skips_is_skipped_by_all(tmp_path: Path, estimator: str) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_with_trouble, "none", "held out", estimator))
    assert found["rates"] == [0.1]
    assert all("the rate was kept" in record["diagnostics"]["note"] for record in found["history"])


def test_what_counts_is_whether_the_mean_of_the_losses_is_negative(tmp_path: Path) -> None:
    # Losses are about 1: minus 1.5 on one process leaves a mean of about 0.3, minus 50 does not.
    for shift, note in (("1.5", ""), ("50", "the rate was kept")):
        found = equal_on_all(launch(tmp_path, runs.fit_with_trouble, shift, "held out"))
        assert found["history"] and all(note in record["diagnostics"]["note"] for record in found["history"])
        assert (note == "") == all(record["diagnostics"]["note"] == "" for record in found["history"])


@pytest.mark.parametrize(
    ("what", "when", "estimator", "message"),
    [
        ("raise", "unroll", "forward", "ValueError: a bad batch"),
        ("raise", "held out", "reverse", "ValueError: a bad batch"),
        ("raise", "unroll", "es", "ValueError: a bad batch"),
        ("raise", "held out", "es", "ValueError: a bad batch"),
        ("raise", "held out", "live", "ValueError: a bad batch"),
        ("raise", "held out", "displacement", "ValueError: a bad batch"),
        ("curvature", "unroll", "forward", "ValueError: no second derivative today"),
        ("curvature", "unroll", "reverse", "ValueError: no second derivative today"),
    ],
)
def test_an_exception_on_one_process_ends_the_run_on_all(
    tmp_path: Path, what: str, when: str, estimator: str, message: str
) -> None:
    first, second = launch(tmp_path, runs.fit_with_trouble, what, when, estimator)
    assert second == message
    assert first == f"ElsewhereError: Process 1 failed, so process 0 cannot go on. {message}"


def test_an_exception_in_the_training_itself_ends_the_run_as_without_the_callback(tmp_path: Path) -> None:
    first, second = launch(tmp_path, runs.fit_with_trouble, "raise", "training")
    assert second == "ValueError: a bad batch"
    assert first.startswith("RuntimeError") and "ElsewhereError" not in first  # gloo's: the other side is gone


def test_held_out_data_that_dies_on_one_process_ends_the_run_on_all(tmp_path: Path) -> None:
    first, second = launch(tmp_path, runs.fit_with_dying_data)
    assert second == "OSError: the disk is gone"
    assert first.startswith("ElsewhereError: Process 1 failed") and first.endswith(second)


@pytest.mark.parametrize("kind", ["plain", "sharded", "iterable"])
def test_every_process_judges_by_other_held_out_examples(tmp_path: Path, kind: str) -> None:
    first, second = launch(tmp_path, runs.judged_by, kind)
    assert not isinstance(first, str) and not isinstance(second, str), (first, second)
    # Four updates with four examples each; the rehearsal looks at the first of these batches as well.
    assert len(set(first)) == len(set(second)) == 16
    assert not set(first) & set(second)


def test_the_initial_search_finds_the_same_rate_on_all_processes(tmp_path: Path) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_with_search, 2))
    alone = runs.fit_with_search(1)
    assert found["search"].learning_rate is not None and len(found["search"].losses) > 4
    # The same examples in another order, so nearly the same losses: within a half-decade of the grid.
    ratio = found["search"].learning_rate / alone["search"].learning_rate
    assert 10**-0.6 < ratio < 10**0.6


@pytest.mark.parametrize(
    ("estimator", "strategy"),
    [
        ("forward", "ddp"),
        ("reverse", "ddp_find_unused_parameters_true"),
        ("live", "ddp_find_unused_parameters_true"),
        ("displacement", "ddp"),
        ("es", "ddp"),
    ],
)
def test_a_distributed_run_without_learning_is_unchanged_bit_for_bit(
    tmp_path: Path, estimator: str, strategy: str
) -> None:
    without = launch(tmp_path, runs.unchanged, False, estimator, strategy)
    observed = launch(tmp_path, runs.unchanged, True, estimator, strategy)
    for expected, found in zip(without, observed, strict=True):
        assert not isinstance(found, str), found
        assert found["updates"] > 2
        assert not difference(expected["outcome"], found["outcome"])
    # The processes' generators differed, so the test would see if ours replaced one by another's.
    assert difference(without[0]["outcome"]["torch"], without[1]["outcome"]["torch"])


@pytest.mark.parametrize(
    ("meta_data", "estimator"),
    [("val", "forward"), ("train", "forward"), ("train", "live"), ("val", "displacement")],
)
def test_a_resumed_distributed_run_equals_the_uninterrupted_one(tmp_path: Path, meta_data: str, estimator: str) -> None:
    whole = equal_on_all(launch(tmp_path, runs.fit_and_save, 2, tmp_path, meta_data, estimator))
    # Step 6 lies in the middle of a window, with batches remembered that differ by process.
    resumed = equal_on_all(launch(tmp_path, runs.resume, 2, tmp_path / "step=6.ckpt", meta_data, estimator))
    assert len(whole["history"]) > 2
    assert not difference(whole, resumed)


def test_a_run_that_is_resumed_with_another_number_of_processes_remembers_anew(tmp_path: Path) -> None:
    whole = equal_on_all(launch(tmp_path, runs.fit_and_save, 2, tmp_path))
    (alone,) = launch(tmp_path, runs.resume, 1, tmp_path / "step=6.ckpt", count=1)
    assert not difference(alone["history"][0], whole["history"][0]) and len(alone["history"]) > 2
    more = equal_on_all(launch(tmp_path, runs.resume, 3, tmp_path / "step=6.ckpt", "val", "forward", count=3))
    assert not difference(more["history"][0], whole["history"][0]) and len(more["history"]) > 1


@pytest.mark.parametrize(
    ("estimator", "meta_data", "steps"),
    [("forward", "val", [3, 2, 3, 3]), ("live", "train", [3, 0, 3, 3])],
)
def test_processes_that_remember_unequally_do_the_same(
    tmp_path: Path, estimator: str, meta_data: str, steps: list[int]
) -> None:
    equal_on_all(launch(tmp_path, runs.fit_and_save, 2, tmp_path, meta_data, estimator))
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    checkpoint["callbacks"]["LearnToLearn"]["source"]["windows"][1] = {}
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    resumed = equal_on_all(launch(tmp_path, runs.resume, 2, tmp_path / "forgetful.ckpt", meta_data, estimator))
    # Where a live window has nothing to be judged by, there is no meta-gradient.
    lengths = [len(record["diagnostics"].get("losses", [])) for record in resumed["history"]]
    assert lengths == steps


@pytest.mark.parametrize(("estimator", "length"), [("live", 3), ("displacement", 1)])
def test_a_fit_that_goes_on_in_the_same_processes_goes_on_learning(tmp_path: Path, estimator: str, length: int) -> None:
    found = equal_on_all(launch(tmp_path, runs.fit_twice, estimator))
    assert [record["step"] for record in found["history"]] == [4, 8, 12, 16]
    assert len(found["history"][1]["diagnostics"]["losses"]) == length


def test_a_neural_optimizer_starts_from_the_same_weights_on_all_processes(tmp_path: Path) -> None:
    results = launch(tmp_path, runs.fit_neural)
    assert difference(results[0].pop("before"), results[1].pop("before"))
    found = equal_on_all(results)
    assert found["history"] and math.isfinite(found["history"][-1]["meta_objective"])


def test_processes_that_lightning_starts_return_what_was_logged(tmp_path: Path) -> None:
    (result,) = launch(tmp_path, runs.spawned, "ddp_fork", count=1)
    assert not isinstance(result, str), result
    # Learned in the children: the weights and the logged values come back, the callback's own state does not.
    assert result["metrics"]["l2l/learning_rate"] != 0.1 and result["history"] == []
    pickle.loads(pickle.dumps(learner()))  # what ddp_spawn sends to them


def test_tasks_differ_by_process_and_the_learned_optimizer_does_not(tmp_path: Path) -> None:
    results = launch(tmp_path, runs.meta_train, 2)
    assert not any(isinstance(result, str) for result in results), results
    first, second = results
    assert not difference(first["learned"], second["learned"]) and not difference(
        first["gradients"], second["gradients"]
    )
    assert all(left != right for left, right in zip(first["objectives"], second["objectives"], strict=True))
    # Process 0 alone draws the same tasks as the only process of a run on one device.
    alone = runs.meta_train(1)
    assert alone["objectives"][0] == first["objectives"][0]
    assert difference(alone["gradients"][0], first["gradients"][0])


@pytest.mark.parametrize("namespace", [pl, pytorch_lightning])
@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAStrategy"])
def test_strategies_without_whole_parameters_are_refused_by_name(namespace: Any, name: str) -> None:
    real = getattr(namespace.strategies, name)
    strategy = object.__new__(type("TheUsersOwn", (real,), {}))
    with pytest.raises(MisconfigurationException, match="TheUsersOwn: .*strategy='ddp'"):
        refuse_strategy(SimpleNamespace(strategy=strategy))


@pytest.mark.parametrize("namespace", [pl, pytorch_lightning])
def test_a_device_without_double_precision_is_refused_before_anything_is_moved_there(namespace: Any) -> None:
    strategy = namespace.strategies.SingleDeviceStrategy
    refuse_strategy(SimpleNamespace(strategy=strategy("cpu")))
    with pytest.raises(MisconfigurationException, match=r"no.*have.*accelerator='cpu'"):
        refuse_strategy(SimpleNamespace(strategy=strategy("mps")))


@pytest.mark.parametrize("namespace", [pl, pytorch_lightning])
def test_data_parallel_strategies_are_accepted(namespace: Any) -> None:
    for start_method in ("popen", "spawn", "fork"):
        refuse_strategy(SimpleNamespace(strategy=namespace.strategies.DDPStrategy(start_method=start_method)))
    own = type("RayDDPStrategy", (DDPStrategy,), {})
    refuse_strategy(SimpleNamespace(strategy=own()))


@pytest.mark.parametrize("option", [{"ddp_comm_hook": print}, {"model_averaging_period": 2}])
def test_what_replaces_the_mean_of_the_gradients_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="communication hook"):
        refuse_strategy(SimpleNamespace(strategy=DDPStrategy(**option)))
