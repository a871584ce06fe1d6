"""Families of tasks, and many tasks stacked as one inner problem."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from lightning_l2l import LearnedHyperparameters, LearnedOptimizer, LearnedStepSize, MLPOptimizer, Unroll
from lightning_l2l.exact.episodes import Episode
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic, RandomQuadratics, Task
from lightning_l2l.tasks.family import ChoiceOfTasks, Mixture, as_family
from lightning_l2l.tasks.length import Length
from lightning_l2l.tasks.stacked import LOSS_CHANNEL, START_LOSS, BatchedTasks, StackedTasks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adam(rate: float = 0.05) -> LearnedOptimizer:
    return LearnedHyperparameters(("learning_rate", "betas")).attach(inner_optimizer(torch.optim.Adam, lr=rate))


def sgd(rate: float = 0.05) -> LearnedOptimizer:
    return LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=rate))


def mlp() -> LearnedOptimizer:
    torch.manual_seed(3)
    return MLPOptimizer(hidden_size=4, initialisation="scaled", step_multiplier=0.05)


def stacked(tasks: list[Task], start: dict[str, Tensor], learned: LearnedOptimizer, objective: Any, steps: int) -> Any:
    """Meta-gradient of a stack, as the populations compute it."""
    stack, batched = StackedTasks(tasks), BatchedTasks(learned)
    losses = stack.losses(start, stack.batch("train", generator()).data).detach()
    start = {**start, LOSS_CHANNEL: torch.zeros_like(losses)}
    episode = Episode.begin(batched, start, estimator=Unroll(objective=objective), buffers={START_LOSS: losses})
    batches = [stack.batch("train", generator()) for _ in range(steps)]
    mean: Any = "geometric_mean" if objective.startswith("log") else "mean"
    return episode.unroll(stack, batched, batches, stack.batch("val", generator(), mean))


@pytest.mark.parametrize("make", [adam, sgd, mlp])
@pytest.mark.parametrize("objective", ["naive", "log", "naive_mean", "log_mean"])
def test_a_stack_has_the_mean_of_its_tasks_meta_objectives_and_gradients(make: Any, objective: Any) -> None:
    family = RandomQuadratics(dim=3, start_deviation=1.0)
    tasks = [family.sample(generator(seed)) for seed in range(3)]
    for task in tasks:
        task.matrix, task.target = task.matrix.double(), task.target.double()
    learned = make()
    starts = [task.initial_parameters(generator(seed)) for seed, task in enumerate(tasks)]
    together, _ = stacked(tasks, {"point": torch.stack([s["point"] for s in starts])}, learned, objective, 4)
    alone = []
    for task, start in zip(tasks, starts, strict=True):
        batch = task.sample_batch("train")
        episode = Episode.begin(learned, start, estimator=Unroll(objective=objective))
        alone.append(episode.unroll(task, learned, [batch] * 4, batch)[0])
    assert together.usable
    assert together.value == pytest.approx(sum(result.value for result in alone) / 3, rel=1e-10)
    for name, gradient in together.gradients.items():
        expected = sum(result.gradients[name.removeprefix("learned.")] for result in alone) / 3
        # Meta-parameters of the MLP, hence sums over steps and tasks, are float32: 20 roundings of the largest entry.
        rounding = 20 * torch.finfo(gradient.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=max(rounding, 1e-14))


def test_tasks_that_cannot_be_stacked_give_the_same_numbers_one_after_the_other() -> None:
    hessians = [torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([1.0, 2.0, 5.0], [0.5, 3.0, 4.0])]
    tasks: list[Any] = [Quadratic(hessian, torch.ones(3, dtype=torch.float64)) for hessian in hessians]
    learned = sgd()
    start = {"point": torch.stack([task.initial_point for task in tasks])}
    result, _ = stacked(tasks, start, learned, "log", 5)
    expected = sum(task.meta_objective(0.05, 5) for task in tasks) / 2
    assert result.value == pytest.approx(float(expected), rel=1e-12)


class Cliff(Task):
    """``scale * w**2``: plain gradient descent at rate 0.05 diverges for a scale above 20."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"w": torch.ones(2)}

    def loss(self, parameters: Any, batch: Any) -> Tensor:
        return self.scale * parameters["w"].square().sum()

    def sample_batch(self, split: Any, generator: torch.Generator | None = None) -> None:
        return None


@pytest.mark.parametrize("steep", [100.0, 1e12, 1e25])
@pytest.mark.parametrize("objective", ["naive", "log", "naive_mean"])
def test_a_diverging_task_is_frozen_and_leaves_the_others_gradients_as_they_are(steep: float, objective: Any) -> None:
    learned = sgd()
    both, episode = stacked([Cliff(1.0), Cliff(steep)], {"w": torch.ones(2, 2)}, learned, objective, 60)
    alone, _ = stacked([Cliff(1.0)], {"w": torch.ones(1, 2)}, learned, objective, 60)
    assert both.usable
    assert episode.iterate.state["alive"].tolist() == [True, False]
    assert bool(episode.iterate.parameters["w"].isfinite().all())
    gradient, expected = both.gradients["learned.learning_rate"], alone.gradients["learned.learning_rate"] / 2
    if objective != "naive_mean":
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0.0)
    else:  # the iterates before it was frozen count
        assert bool(gradient.isfinite().all())


def test_a_task_whose_limit_is_no_float32_number_is_contained_too() -> None:
    result, episode = stacked([Cliff(1.0), Cliff(1e38)], {"w": torch.ones(2, 2)}, sgd(), "log", 5)
    assert result.usable
    assert episode.iterate.state["alive"].tolist() == [True, False]


@pytest.mark.parametrize("make", [adam, mlp])
def test_a_frozen_task_does_not_move_though_its_optimizer_would(make: Any) -> None:
    """Momentum, and networks, move a parameter whose gradient is zero."""
    optimizer = BatchedTasks(make()).transformation()
    parameters = {"w": torch.ones(2, 3), LOSS_CHANNEL: torch.zeros(2)}
    gradients = {"w": torch.ones(2, 3), LOSS_CHANNEL: torch.zeros(2)}
    _, state = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    gradients[LOSS_CHANNEL] = torch.tensor([0.0, 1.0])
    gradients["w"][1] = torch.nan
    for _ in range(2):
        moves, state = optimizer.update(gradients, state, params=parameters)
        assert bool((moves["w"][0] != 0).all())
        assert moves["w"][1].tolist() == [0.0] * 3
        gradients[LOSS_CHANNEL] = torch.zeros(2)  # once frozen, always frozen
    assert state["alive"].tolist() == [True, False]
    assert all(bool(t.isfinite().all()) for t in optree.tree_leaves(state) if isinstance(t, Tensor))


def test_a_task_that_grows_a_little_is_not_frozen() -> None:
    _, episode = stacked([Cliff(20.5)], {"w": torch.ones(1, 2)}, sgd(), "naive", 10)
    assert episode.iterate.state["alive"].tolist() == [True]
    assert episode.iterate.parameters["w"].abs().min() > 1.0


def test_tasks_of_different_shapes_are_refused() -> None:
    family = [RandomQuadratics(2).sample(generator()), RandomQuadratics(3).sample(generator())]
    with pytest.raises(ValueError, match="same names and shapes"):
        StackedTasks(family).initial_parameters(generator())


def test_what_is_no_task_is_refused_and_the_rest_becomes_a_family() -> None:
    task = RandomQuadratics(2).sample(generator())
    assert as_family(task).sample(generator()) is task
    assert isinstance(as_family([task, task]), ChoiceOfTasks)
    assert as_family(RandomQuadratics()).__class__ is RandomQuadratics
    with pytest.raises(TypeError, match="functional_call"):
        as_family(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task"):
        ChoiceOfTasks([])
    with pytest.raises(ValueError, match="no family"):
        Mixture([])


def test_a_task_is_a_function_of_the_generator_alone() -> None:
    first, second = (RandomQuadratics().sample(generator(5)) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert not torch.equal(first.matrix, RandomQuadratics().sample(generator(6)).matrix)


@pytest.mark.parametrize(
    ("length", "low", "high"),
    [
        (Length(5), 5, 5),
        (Length(5, 9, "uniform"), 5, 9),
        (Length(5, 500, "log_uniform"), 5, 500),
        (Length(5, 30, "exponential"), 5, 600),
    ],
)
def test_lengths_stay_in_their_range_and_reach_its_ends(length: Length, low: int, high: int) -> None:
    source = generator()
    drawn = [length.draw(source, 0) for _ in range(2000)]
    assert low <= min(drawn) <= low + 1
    assert max(drawn) <= high
    if length.kind == "exponential":  # standard error of the mean: 30 / sqrt(2000) = 0.7
        assert sum(drawn) / len(drawn) == pytest.approx(35, abs=3)
    else:
        assert max(drawn) >= high * 0.98


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"steps": 3, "largest": 2, "kind": "uniform"}, {"steps": 3, "largest": 5},
                 {"steps": 3, "kind": "uniform"}, {"steps": 3, "kind": "sometimes"}]
)  # fmt: skip
def test_lengths_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Length(**settings)
