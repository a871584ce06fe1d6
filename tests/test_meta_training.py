"""MetaTraining: the Trainer applies exact meta-gradients, survives divergence, and resumes to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import (
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MetaTraining,
    MLPOptimizer,
    SmallFCOptimizer,
    TinyOptimizer,
)
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.host.module_task import ModuleTask
from lightning_l2l.tasks import Quadratic, RandomQuadratics, Task
from lightning_l2l.tasks.length import Length
from tests.test_task_family import Cliff

Make = Callable[..., pl.Trainer]


def step_size(rate: float = 0.05) -> LearnedOptimizer:
    return LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=rate))


def adam(rate: float = 0.01) -> LearnedOptimizer:
    return LearnedHyperparameters(("learning_rate",)).attach(inner_optimizer(torch.optim.Adam, lr=rate))


def mlp() -> LearnedOptimizer:
    torch.manual_seed(3)
    return MLPOptimizer(hidden_size=4, initialisation="scaled", step_multiplier=0.05)


def values(learned: LearnedOptimizer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learned.named_parameters()}


@pytest.mark.parametrize("estimator", ["forward", "reverse", "segmented", "auto"])
def test_one_step_of_sgd_moves_along_the_exact_meta_gradient(trainer: Make, estimator: Any) -> None:
    task, learned = Quadratic.random(3, seed=0, kind="condition", condition_number=5.0), step_size()
    meta_training = MetaTraining(
        learned,
        task,
        unroll_steps=7,
        tasks_at_once=2,
        estimator=estimator,
        meta_optimizer="sgd",
        meta_learning_rate=0.5,
    )
    trainer(max_steps=1).fit(meta_training)
    expected = -0.5 * task.meta_gradient(0.05, 7) * 0.05  # chain rule for the logarithm of the step size
    assert learned.learning_rate.item() == pytest.approx(float(expected), rel=1e-6)


def test_the_step_size_of_a_quadratic_becomes_the_optimal_one(trainer: Make) -> None:
    task, learned = Quadratic.random(3, seed=0, kind="condition", condition_number=5.0), step_size(0.01)
    meta_training = MetaTraining(learned, task, unroll_steps=5, tasks_at_once=1, meta_learning_rate=0.3, warm_down=True)
    trainer(max_steps=60, max_epochs=-1).fit(meta_training)
    # The optimum is a kink only for long unrolls; 60 steps of Adam come within 2 %.
    assert learned.values()[0]["lr"] == pytest.approx(float(task.optimal_step_size(5)), rel=0.02)


@pytest.mark.parametrize(
    ("make", "estimator", "populations"),
    [
        (mlp, "truncated", 2),
        (adam, "truncated", 1),
        (step_size, "pes", 1),
        (adam, "es_single", 2),
        (mlp, "segmented", 1),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    trainer: Make, tmp_path: Path, make: Any, estimator: Any, populations: int
) -> None:
    def meta_training() -> MetaTraining:
        return MetaTraining(
            make(), RandomQuadratics(3), unroll_steps=Length(2, 4, "uniform"), episode_steps=Length(7, 5,
            "exponential"),
            tasks_at_once=2, populations=populations, estimator=estimator, objective="log_mean", warm_down=True,
            meta_learning_rate=0.05, particles=Particles(count=4), updates_per_epoch=6,
        )  # fmt: skip

    whole = meta_training()
    trainer(max_steps=14, max_epochs=-1).fit(whole)
    first, path = meta_training(), tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(path)

    trainer(Save(), max_steps=14, max_epochs=-1).fit(first)
    second = meta_training()
    trainer(max_steps=14, max_epochs=-1).fit(second, ckpt_path=path, weights_only=True)
    untrained = values(make())
    assert any(bool((value != untrained[name]).any()) for name, value in values(whole.learned).items())
    for name, value in values(whole.learned).items():
        assert torch.equal(value, values(second.learned)[name]), name
    assert second.meta_gradients == whole.meta_gradients == 14


@pytest.mark.parametrize("make", [step_size, adam, mlp, TinyOptimizer, SmallFCOptimizer, LSTMOptimizer])
def test_every_learned_optimizer_can_be_trained(trainer: Make, make: Any) -> None:
    torch.manual_seed(0)
    learned = make()
    before = values(learned)
    meta_training = MetaTraining(
        learned, RandomQuadratics(3, start_deviation=1.0), unroll_steps=4, episode_steps=8, tasks_at_once=2,
        estimator="truncated", objective="naive_mean",
    )  # fmt: skip
    trainer(max_steps=3).fit(meta_training)
    assert any(bool((before[name] != value).any()) for name, value in values(learned).items())
    assert all(bool(value.isfinite().all()) for value in values(learned).values())
    assert meta_training.unusable == 0


def test_diverging_tasks_are_counted_and_never_reach_the_meta_parameters(trainer: Make) -> None:
    for make, estimator in ((mlp, "truncated"), (step_size, "truncated"), (step_size, "pes")):
        learned = make()
        tasks: list[Task] = [Cliff(1.0), Cliff(1e6), Cliff(3e37)]
        if make is mlp:
            learned.step_multiplier = 50.0
        meta_training = MetaTraining(
            learned, tasks, unroll_steps=4, episode_steps=12, tasks_at_once=6, estimator=estimator,
            particles=Particles(count=4),
        )  # fmt: skip
        trainer(max_steps=6).fit(meta_training)
        assert meta_training.diverged > 0
        assert all(bool(value.isfinite().all()) for value in values(learned).values())


def test_a_task_that_diverged_begins_anew_at_the_next_window_and_the_others_go_on() -> None:
    learned = mlp()
    learned.step_multiplier = 0.01
    meta_training = MetaTraining(
        learned, [Cliff(1.0)], unroll_steps=3, episode_steps=30, tasks_at_once=3, estimator="truncated"
    )
    meta_training.training_step(None)
    population = meta_training._populations[0]
    assert population is not None
    state = population.episode.iterate.state
    state["alive"][1] = False
    steps = state["optimizer"]["step"].clone()
    meta_training.training_step(None)
    after = meta_training._populations[0]
    assert after is not None
    assert steps.tolist() == [3, 3, 3]
    assert after.episode.iterate.state["optimizer"]["step"].tolist() == [6, 3, 6]
    assert after.episode.iterate.state["alive"].tolist() == [True] * 3


class Broken(Cliff):
    """Its loss is fine, its derivative is not a number from the second step on."""

    def loss(self, parameters: Any, batch: Any) -> Tensor:
        w = parameters["w"]
        nothing = (w - w.detach()) * torch.where(w.detach() < 1, torch.nan, 0.0)
        return w.square().sum() + nothing.nan_to_num(0.0).sum()


def test_a_meta_gradient_that_is_not_usable_leaves_the_meta_parameters_alone(trainer: Make) -> None:
    learned = step_size(0.1)
    meta_training = MetaTraining(learned, Broken(1.0), unroll_steps=3, objective="naive", meta_optimizer="sgd")
    trainer(max_steps=2).fit(meta_training)
    assert meta_training.unusable == 2
    assert learned.learning_rate.item() == 0.0


def test_the_papers_average_runs_over_the_iterates_before_each_step() -> None:
    rate, steps = 0.1, 4
    learned = step_size(rate)
    meta_training = MetaTraining(
        learned, Cliff(0.5), unroll_steps=steps, tasks_at_once=1, objective="naive_mean", iterates="before"
    )
    loss = meta_training.training_step(None)
    loss.backward()
    # w_k = (1 - rate)**k, two coordinates, f = w**2: mean of f(w_0 ... w_(K-1)).
    expected = sum((1 - rate) ** (2 * k) for k in range(steps)) / steps
    slope = -rate * sum(2 * k * (1 - rate) ** (2 * k - 1) for k in range(steps)) / steps
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert learned.learning_rate.grad.item() == pytest.approx(slope, rel=1e-5)


def test_populations_are_at_different_steps_of_their_training() -> None:
    meta_training = MetaTraining(
        mlp(), RandomQuadratics(2), unroll_steps=2, episode_steps=12, populations=3, tasks_at_once=1, objective="naive"
    )
    for _ in range(12):
        meta_training.training_step(None)
    steps = [0 if population is None else population.steps for population in meta_training._populations]
    assert len(set(steps)) == 3, steps


def test_accumulated_gradients_are_the_mean_of_the_single_ones(trainer: Make) -> None:
    def options() -> dict[str, Any]:
        return {
            "unroll_steps": 3,
            "tasks_at_once": 1,
            "meta_optimizer": "sgd",
            "meta_learning_rate": 1.0,
            "objective": "log",
        }

    learned = step_size()
    trainer(max_steps=1, accumulate_grad_batches=2).fit(MetaTraining(learned, RandomQuadratics(2), **options()))
    single = MetaTraining(step_size(), RandomQuadratics(2), **options())
    for _ in range(2):
        (single.training_step(None) / 2).backward()
    assert learned.learning_rate.item() == pytest.approx(-single.learned.learning_rate.grad.item(), rel=1e-6)


def test_the_trainers_clipping_acts_on_the_meta_gradient(trainer: Make) -> None:
    learned = step_size()
    meta_training = MetaTraining(
        learned, Cliff(5.0), unroll_steps=3, meta_optimizer="sgd", meta_learning_rate=1.0, objective="naive"
    )
    trainer(max_steps=1, gradient_clip_val=1e-3).fit(meta_training)
    assert abs(learned.learning_rate.item()) == pytest.approx(1e-3, rel=1e-3)


def test_what_was_learned_about_is_written_into_the_file(trainer: Make, tmp_path: Path) -> None:
    learned = mlp()
    trainer(max_steps=1).fit(MetaTraining(learned, RandomQuadratics(2), unroll_steps=2, episode_steps=8))
    learned.save(tmp_path / "learned.safetensors")
    loaded = LearnedOptimizer.load(tmp_path / "learned.safetensors")
    assert (loaded.horizon, loaded.tasks) == (8, "RandomQuadratics")


def test_a_lightning_module_is_a_task(trainer: Make) -> None:
    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

    inputs = torch.randn(64, 3)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    task = ModuleTask(Regression, DataLoader(data, batch_size=8), val=DataLoader(data, batch_size=32))
    learned = step_size(0.001)
    meta_training = MetaTraining(learned, task, unroll_steps=5, tasks_at_once=2, meta_learning_rate=0.1)
    trainer(max_steps=10).fit(meta_training)
    assert learned.values()[0]["lr"] > 0.002
    assert len(task.sample_batch("val", torch.Generator())[0]) == 32
    with pytest.raises(ValueError, match="no 'test' data"):
        task.sample_batch("test")


def test_a_module_task_computes_what_the_module_computes() -> None:
    module = BoringModel()
    task = ModuleTask(lambda: module, DataLoader(RandomDataset(32, 8), batch_size=4))
    batch = task.sample_batch("train")
    parameters = dict(module.named_parameters())
    assert task.loss(parameters, batch).item() == pytest.approx(module.training_step(batch, 0)["loss"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"populations": 2}, "episode_steps"),
        ({"iterates": "before"}, "naive_mean"),
        ({"tasks_at_once": 0}, "at least 1"),
        ({"objective": "final"}, "objective"),
        ({"estimator": "magic"}, "estimator"),
        ({"meta_optimizer": "lion"}, "meta_optimizer"),
        ({"divergence": 0.0}, "divergence"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTraining(step_size(), RandomQuadratics(2), **options)


def test_hyperparameters_that_are_not_attached_are_refused() -> None:
    with pytest.raises(ValueError, match="attach"):
        MetaTraining(LearnedStepSize(), RandomQuadratics(2))


def test_a_checkpoint_of_other_populations_is_refused(trainer: Make) -> None:
    options: dict[str, Any] = {"unroll_steps": 2, "episode_steps": 4}
    first = MetaTraining(step_size(), RandomQuadratics(2), populations=2, **options)
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    second = MetaTraining(step_size(), RandomQuadratics(2), **options)
    with pytest.raises(ValueError, match="same settings"):
        second.on_load_checkpoint(copy.deepcopy(checkpoint))
