"""When meta-updates happen, under every option of the Trainer, and what happens when one goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Plain, Rich, difference, learner, loaders, observer

from lightning_l2l import LearnToLearn


def learned_rates(callback: LearnToLearn) -> list[float]:
    rates = [record["learning_rates"][0] for record in callback.history]
    assert rates and all(rate > 0 for rate in rates) and len(set(rates)) == len(rates)
    return rates


@pytest.mark.feature(
    "`limit_*_batches`, `val_check_interval`, `max_steps`, `detect_anomaly`, `deterministic`, `profiler`, `barebones`"
)
@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"limit_train_batches": 0.5},
        {"max_steps": 5},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
        {"check_val_every_n_epoch": 5},
        {"check_val_every_n_epoch": None, "val_check_interval": 4},
        {"val_check_interval": 0.5},
        {"num_sanity_val_steps": 2},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"inference_mode": False},
        {"profiler": "simple"},
        {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_model_summary": None,
         "enable_progress_bar": None, "log_every_n_steps": None, "num_sanity_val_steps": None},
    ],
    ids=lambda options: ",".join(options),
)  # fmt: skip
@pytest.mark.usefixtures("short_search")
@pytest.mark.filterwarnings("ignore:.*trainer is running with overfit_batches.*", "ignore:You requested to overfit")
@pytest.mark.filterwarnings("ignore:You are running with `Trainer.barebones.*", "ignore:`self.log.*barebones.*")
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*", "ignore:.*barebones.*", "ignore:.*nomaly.*")
def test_trainer_options_are_learned_with(trainer: Any, options: Any) -> None:
    callback = learner(initial_search=True)
    fitted = trainer(callback, **options)
    fitted.fit(Plain(), **loaders())
    assert callback.search_result is not None and len(learned_rates(callback)) >= 1
    assert callback.history[-1]["step"] <= fitted.global_step


@pytest.mark.parametrize("steps", [1, 2, 5, 39, 40, 60])
def test_short_runs_have_meta_updates(trainer: Any, steps: int) -> None:
    callback = LearnToLearn(initial_search=False)  # every 20 steps
    trainer(callback, max_epochs=-1, max_steps=steps).fit(Plain(), **loaders())
    every = 20 if steps >= 40 else max(1, steps // 4)
    assert [record["step"] for record in callback.history] == list(range(every, steps + 1, every))


@pytest.mark.feature("`fast_dev_run`, short runs", "works", "at least one meta-update")
@pytest.mark.filterwarnings("ignore:Running in `fast_dev_run`")
@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_tests_everything(trainer: Any, batches: int) -> None:
    callback = LearnToLearn()
    trainer(callback, fast_dev_run=batches).fit(Rich(), **loaders())
    assert callback.search_result is not None and len(callback.history) == batches


def test_a_diverging_look_ahead_halves_the_rate_notes_it_and_warns_once(trainer: Any) -> None:
    class Explodes(Plain):
        def loss(self, batch: Any) -> Any:
            value = super().loss(batch)
            unrolled = "log" in vars(self)
            weight = self.net.weight
            return value + (weight - weight.detach() + 1e30).pow(3).sum() if unrolled and self.global_step else value

    callback = learner(every_n_steps=4, estimator="forward")
    with pytest.warns(UserWarning, match="not finite") as caught:
        fitted = trainer(callback)
        fitted.fit(Explodes(), **loaders())
    assert len([w for w in caught if "LearnToLearn" in str(w.message)]) == 1
    assert [record["learning_rates"][0] for record in callback.history] == pytest.approx([0.05, 0.025, 0.0125])
    assert all("halved" in record["diagnostics"]["note"] for record in callback.history)
    assert all(torch.isfinite(p).all() for p in fitted.lightning_module.parameters())
    assert difference(callback._state["meta_optimizer"]["state"], {}) == ""  # nothing was ever applied


def test_observing_halves_nothing(trainer: Any) -> None:
    class Explodes(Plain):
        def loss(self, batch: Any) -> Any:
            return super().loss(batch) * (float("inf") if "log" in vars(self) and self.global_step else 1)

    callback = observer()
    with pytest.warns(UserWarning, match="Observed only"):
        trainer(callback).fit(Explodes(), **loaders())
    assert callback.learning_rates == [0.1]
