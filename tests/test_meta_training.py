"""MetaTraining: the Trainer applies exact meta-gradients, survives divergence, and resumes to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_task_family import Cliff
from torch import Tensor

from lightning_l2l import (
    EvolutionStrategies,
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LSTMOptimizer,
    MetaTraining,
    MLPOptimizer,
    SmallFCOptimizer,
    Unroll,
)
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic, RandomQuadratics, Task
from lightning_l2l.tasks.family import Mixture
from lightning_l2l.tasks.length import Length
from lightning_l2l.tasks.population import MetaLoss, Population
from lightning_l2l.tasks.stacked import BatchedTasks

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


def quadratic() -> Quadratic:
    return Quadratic(torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), torch.ones(3).double())


@pytest.mark.parametrize("mode", ["forward", "reverse", "segmented", "auto"])
def test_one_step_of_sgd_moves_along_the_exact_meta_gradient(trainer: Make, mode: Any) -> None:
    task, learned = quadratic(), step_size()
    meta_training = MetaTraining(
        learned, task, unroll_steps=7, tasks_at_once=2, estimator=Unroll(mode=mode), meta_optimizer="sgd",
        meta_learning_rate=0.5,
    )  # fmt: skip
    trainer(max_steps=1).fit(meta_training)
    expected = -0.5 * task.meta_gradient(0.05, 7) * 0.05  # chain rule for the logarithm of the step size
    assert learned.learning_rate.item() == pytest.approx(float(expected), rel=1e-6)


def test_the_step_size_of_a_quadratic_becomes_the_optimal_one(trainer: Make) -> None:
    task, learned = quadratic(), step_size(0.01)
    meta_training = MetaTraining(learned, task, unroll_steps=5, tasks_at_once=1, meta_learning_rate=0.3, warm_down=True)
    trainer(max_steps=60, max_epochs=-1).fit(meta_training)
    # The optimum is a kink only for long unrolls; 60 steps of Adam come within 2 %.
    assert learned.values()[0]["lr"] == pytest.approx(float(task.optimal_step_size(5)), rel=0.02)


@pytest.mark.parametrize(
    ("make", "estimator", "populations"),
    [
        (mlp, Unroll(objective="log_mean"), 2),
        (adam, Unroll(objective="log_mean"), 1),
        (step_size, EvolutionStrategies(method="pes", particles=4), 1),
        (adam, EvolutionStrategies(method="es_single", particles=4), 2),
        (step_size, EvolutionStrategies(method="es", particles=4), 1),
        (mlp, Unroll(mode="segmented"), 1),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    trainer: Make, tmp_path: Path, make: Any, estimator: Any, populations: int
) -> None:
    def meta_training() -> MetaTraining:
        return MetaTraining(
            make(), Mixture([RandomQuadratics(3), RandomQuadratics(2)]), unroll_steps=Length(2, 4, "uniform"),
            episode_steps=Length(7, 5, "exponential"), tasks_at_once=2, populations=populations, estimator=estimator,
            warm_down=True, meta_learning_rate=0.05, updates_per_epoch=6,
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


@pytest.mark.parametrize("make", [step_size, adam, mlp, SmallFCOptimizer, LSTMOptimizer])
def test_every_learned_optimizer_can_be_trained(trainer: Make, make: Any) -> None:
    torch.manual_seed(0)
    learned = make()
    before = values(learned)
    meta_training = MetaTraining(
        learned, RandomQuadratics(3, start_deviation=1.0), unroll_steps=4, episode_steps=8, tasks_at_once=2,
        estimator=Unroll(objective="naive_mean"),
    )  # fmt: skip
    trainer(max_steps=3).fit(meta_training)
    assert any(bool((before[name] != value).any()) for name, value in values(learned).items())
    assert all(bool(value.isfinite().all()) for value in values(learned).values())
    assert meta_training.unusable == 0


@pytest.mark.parametrize("make", [mlp, step_size])
@pytest.mark.parametrize("estimator", [Unroll(), EvolutionStrategies(method="pes", particles=4)])
def test_diverging_tasks_are_counted_and_never_reach_the_meta_parameters(
    trainer: Make, make: Any, estimator: Any
) -> None:
    learned = make()
    if make is mlp:
        learned.step_multiplier = 50.0
    tasks: list[Task] = [Cliff(1.0), Cliff(1e6), Cliff(3e37)]
    meta_training = MetaTraining(learned, tasks, unroll_steps=4, episode_steps=12, tasks_at_once=6, estimator=estimator)
    trainer(max_steps=6).fit(meta_training)
    assert meta_training.diverged > 0
    assert all(bool(value.isfinite().all()) for value in values(learned).values())


def test_a_task_that_diverged_begins_anew_and_the_others_go_on() -> None:
    learned, generator, cpu = BatchedTasks(mlp()), torch.Generator().manual_seed(0), torch.device("cpu")
    family = RandomQuadratics(3)
    population = Population.begin(
        family, learned, Unroll(), tasks=3, length=30, divergence=10.0, annealed=False, generator=generator, device=cpu
    )
    _, population = population.unroll(learned, 3, MetaLoss(), generator, cpu)
    population.episode.iterate.state["alive"][1] = False
    assert population.restartable and population.diverged.tolist() == [False, True, False]
    again = population.restarted(family, learned, generator, cpu)
    assert again.diverged.tolist() == [False] * 3
    assert again.episode.iterate.state["optimizer"]["step"].tolist() == [3, 0, 3]
    same = [a == b for a, b in zip(population.seeds, again.seeds, strict=True)]
    assert same == [True, False, True]
    before, after = (p.episode.iterate.parameters["point"] for p in (population, again))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == same


class Broken(Cliff):
    """Its loss is fine, its derivative is not a number from the second step on."""

    def loss(self, parameters: Any, batch: Any) -> Tensor:
        w = parameters["w"]
        nothing = (w - w.detach()) * torch.where(w.detach() < 1, torch.nan, 0.0)
        return w.square().sum() + nothing.nan_to_num(0.0).sum()


def test_a_meta_gradient_that_is_not_usable_leaves_the_meta_parameters_alone(trainer: Make) -> None:
    learned = step_size(0.1)
    meta_training = MetaTraining(
        learned, Broken(1.0), unroll_steps=3, estimator=Unroll(objective="naive"), meta_optimizer="sgd"
    )
    trainer(max_steps=2).fit(meta_training)
    assert meta_training.unusable == 2
    assert learned.learning_rate.item() == 0.0


def test_the_papers_average_runs_over_the_iterates_before_each_step() -> None:
    rate, steps = 0.1, 4
    learned = step_size(rate)
    meta_training = MetaTraining(
        learned, Cliff(0.5), unroll_steps=steps, tasks_at_once=1, estimator=Unroll(objective="naive_mean"),
        iterates="before",
    )  # fmt: skip
    loss = meta_training.training_step(None)
    loss.backward()
    # w_k = (1 - rate)**k, two coordinates, f = w**2: mean of f(w_0 ... w_(K-1)).
    expected = sum((1 - rate) ** (2 * k) for k in range(steps)) / steps
    slope = -rate * sum(2 * k * (1 - rate) ** (2 * k - 1) for k in range(steps)) / steps
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert learned.learning_rate.grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("episode_steps", [None, 8])
def test_a_linear_schedule_multiplies_the_inner_steps(episode_steps: int | None) -> None:
    rate, steps, length = 0.1, 4, episode_steps or 4
    learned = step_size(rate)
    meta_training = MetaTraining(
        learned, Cliff(0.5), unroll_steps=steps, episode_steps=episode_steps, tasks_at_once=1, schedule="linear",
        estimator=Unroll(objective="naive"),
    )  # fmt: skip
    first = 1.0
    for unroll in range(length // steps):
        loss = meta_training.training_step(None)
        loss.backward()
        # f = w**2 / 2 per coordinate: w_(t+1) = (1 - rate (1 - t / length)) w_t.
        shares = [1 - t / length for t in range(unroll * steps, (unroll + 1) * steps)]
        factors = [1 - rate * share for share in shares]
        last = first * math.prod(factors)
        assert loss.item() == pytest.approx(last**2, rel=1e-6)
        slope = 2 * last**2 * sum(-rate * share / factor for share, factor in zip(shares, factors, strict=True))
        assert learned.learning_rate.grad.item() == pytest.approx(slope, rel=1e-5)
        learned.learning_rate.grad, first = None, last


def test_populations_are_at_different_steps_of_their_training() -> None:
    meta_training = MetaTraining(
        mlp(), RandomQuadratics(2), unroll_steps=2, episode_steps=12, populations=3, tasks_at_once=1
    )
    for _ in range(12):
        meta_training.training_step(None)
    checkpoint: dict[str, Any] = {}
    meta_training.on_save_checkpoint(checkpoint)
    (saved,) = checkpoint["lightning_l2l"]["ranks"]
    steps = [0 if population is None else population["steps"] for population in saved["populations"]]
    assert len(set(steps)) == 3, steps


def test_a_mixture_trains_on_tasks_of_all_its_architectures() -> None:
    seen: list[int] = []

    class Seen(RandomQuadratics):
        def sample(self, generator: torch.Generator) -> Any:
            seen.append(self.dim)
            return super().sample(generator)

    meta_training = MetaTraining(mlp(), Mixture([Seen(2), Seen(3)]), unroll_steps=2, tasks_at_once=2)
    for _ in range(8):
        meta_training.training_step(None)
    assert set(seen) == {2, 3}
    assert all(a == b for a, b in zip(seen[::2], seen[1::2], strict=True))  # side by side, one architecture


def test_accumulated_gradients_are_the_mean_of_the_single_ones(trainer: Make) -> None:
    def options() -> dict[str, Any]:
        return {
            "unroll_steps": 3,
            "tasks_at_once": 1,
            "meta_optimizer": "sgd",
            "meta_learning_rate": 1.0,
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
        learned, Cliff(5.0), unroll_steps=3, meta_optimizer="sgd", meta_learning_rate=1.0,
        estimator=Unroll(objective="naive"),
    )  # fmt: skip
    trainer(max_steps=1, gradient_clip_val=1e-3).fit(meta_training)
    assert abs(learned.learning_rate.item()) == pytest.approx(1e-3, rel=1e-3)


def test_what_was_learned_about_is_written_into_the_file(trainer: Make, tmp_path: Path) -> None:
    learned = mlp()
    trainer(max_steps=1).fit(MetaTraining(learned, RandomQuadratics(2), unroll_steps=2, episode_steps=8))
    learned.save(tmp_path / "learned.safetensors")
    loaded = LearnedOptimizer.load(tmp_path / "learned.safetensors")
    assert (loaded.horizon, loaded.tasks) == (8, "RandomQuadratics")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"populations": 2}, "episode_steps"),
        ({"iterates": "before"}, "naive_mean"),
        ({"tasks_at_once": 0}, "at least 1"),
        ({"estimator": Unroll(steps=5)}, "unroll_steps"),
        ({"meta_optimizer": "lion"}, "meta_optimizer"),
        ({"divergence": 0.0}, "divergence"),
        ({"schedule": "cosine"}, "schedule"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTraining(step_size(), RandomQuadratics(2), **options)


def test_hyperparameters_that_are_not_attached_are_refused() -> None:
    with pytest.raises(ValueError, match="attach"):
        MetaTraining(LearnedStepSize(), RandomQuadratics(2))


def test_a_checkpoint_of_other_populations_is_refused() -> None:
    options: dict[str, Any] = {"unroll_steps": 2, "episode_steps": 4}
    first = MetaTraining(step_size(), RandomQuadratics(2), populations=2, **options)
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="same settings"):
        MetaTraining(step_size(), RandomQuadratics(2), **options).on_load_checkpoint(checkpoint)
