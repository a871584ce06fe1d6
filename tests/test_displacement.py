"""The displacement estimator by itself: against the exact estimator, closed forms, and its own definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, meta_gradient
from lightning_l2l.exact.estimators import Displacement, displacement, slope
from lightning_l2l.exact.result import MetaGradient
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.functional import inner_optimizer, mirror
from lightning_l2l.learned import LearnedOptimizer


def asked(loss: Any, gradients: Any, way: Any, places: Any, like: Tensor, objective: Any, steps: int) -> MetaGradient:
    """Slope and meta-gradient in one."""
    return displacement(slope(loss, gradients, way, places, like), like, objective, steps)


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (torch.optim.Adam, {"lr": 0.02}),
    (torch.optim.AdamW, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.0}),
    (torch.optim.NAdam, {"lr": 0.02}),
    (torch.optim.RAdam, {"lr": 0.02}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
]


def linear(parameters: Any, batch: Tensor) -> Tensor:
    """A loss whose gradient, the batch, does not depend on the parameters."""
    return (parameters["a"] * batch[:3]).sum() + (parameters["b"] * batch[3:]).sum() + 50.0


@pytest.mark.parametrize(("kind", "arguments"), OPTIMIZERS)
@pytest.mark.parametrize("objective", ["log", "naive"])
def test_without_curvature_it_is_the_exact_meta_gradient(kind: Any, arguments: dict[str, Any], objective: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(8)]
    judge = torch.randn(5, generator=generator, dtype=torch.float64)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    weights = {"a": torch.nn.Parameter(ones), "b": torch.nn.Parameter(zeros)}
    groups = [{"params": [weights["a"]]}, {"params": [weights["b"]], "lr": 0.05}]
    optimizer = kind(groups, **arguments)
    learned = LearnedStepSize().attach(mirror(optimizer, weights.items()))
    exact = meta_gradient(linear, weights, learned, batches, judge, objective=objective, estimator="forward")
    # A memory so long that the average is still the start: nothing is forgotten.
    way = Displacement(weights, memory=10_000)
    for batch in batches:
        weights["a"].grad, weights["b"].grad = batch[:3].clone(), batch[3:].clone()
        optimizer.step()
        if way.step():
            way.look(weights)
    found = asked(
        linear(weights, judge),
        {"a": judge[:3], "b": judge[3:]},
        way.of(weights),
        learned.rate_places() or {},
        learned.learning_rate,
        objective,
        steps=len(batches),
    )
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    # Both in float64, the same sums in another order.
    torch.testing.assert_close(found.gradients["learning_rate"], exact.gradients["learning_rate"], rtol=1e-10, atol=0)


def test_steps_count_alike_at_first_and_are_forgotten_later() -> None:
    place = {"w": torch.zeros(1, dtype=torch.float64)}
    way = Displacement(place, memory=10)  # short enough to look after every step
    average = 0.0
    for step in range(1, 60):
        place["w"] += step % 7
        if way.step():
            way.look(place)
        average += max(1 / (step + 1), 1 / 10) * (place["w"].item() - average)
        # Rounding of the same recursion.
        assert way.of(place)["w"].item() == pytest.approx(place["w"].item() - average, rel=1e-12)


def test_a_long_memory_looks_seldom_and_forgets_at_the_same_rate() -> None:
    place = {"w": torch.zeros(1, dtype=torch.float64)}
    way = Displacement(place, memory=100)
    for _ in range(2000):
        place["w"] += 1
        if way.step():
            way.look(place)
    # Of equal steps: their number times the memory, less what falls between two looks (five steps).
    assert way.of(place)["w"].item() == pytest.approx(100, abs=5)


def test_rescaled_it_is_the_way_of_the_present_rate() -> None:
    def walked(rates: list[float], changes: dict[int, float]) -> float:
        place = {"w": torch.zeros(1, dtype=torch.float64)}
        way = Displacement(place, memory=20)
        for step, rate in enumerate(rates):
            if step in changes:
                way.rescale(place, {"w": changes[step]})
            place["w"] += rate
            if way.step():
                way.look(place)
        return way.of(place)["w"].item()

    assert walked([1.0] * 15 + [0.5] * 10, {15: 0.5}) == pytest.approx(walked([0.5] * 25, {}), rel=1e-12)
    assert walked([1.0] * 15 + [3.0] * 10, {15: 3.0}) == pytest.approx(walked([3.0] * 25, {}), rel=1e-12)


@pytest.mark.parametrize(
    ("per", "expected"), [("optimizer", [14.0]), ("group", [5.0, 9.0]), ("tensor", [2.0, 3.0, 9.0])]
)
def test_each_rate_has_the_slope_of_its_own_parameters(per: Any, expected: list[float]) -> None:
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in "abc"}
    optimizer = torch.optim.SGD([{"params": [weights["a"], weights["b"]]}, {"params": [weights["c"]]}], lr=0.1)
    learned = LearnedStepSize(per=per).attach(mirror(optimizer, weights.items()))
    gradients = {"a": torch.tensor([2.0]), "b": torch.tensor([3.0]), "c": torch.tensor([9.0])}
    way = {name: torch.ones(1) for name in "abc"}
    assert (
        slope(torch.ones(()), gradients, way, learned.rate_places() or {}, learned.learning_rate).along.tolist()
        == expected
    )
    without = slope(torch.ones(()), {**gradients, "c": None}, way, learned.rate_places() or {}, learned.learning_rate)
    assert without.along.sum().item() == 5.0


def test_relative_to_its_bound_it_is_a_cosine() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(4, generator=generator) for name in "ab"}
    way = {name: torch.randn(4, generator=generator) for name in "ab"}
    for like, places in ((torch.zeros(1), {"a": 0, "b": 0}), (torch.zeros(2), {"a": 0, "b": 1})):
        found = asked(torch.tensor(3.0), gradients, way, places, like, "log", steps=100)
        for index in range(len(like)):
            names = [name for name, place in places.items() if place == index]
            pair = [torch.cat([part[name] for name in names]) for part in (gradients, way)]
            cosine = torch.nn.functional.cosine_similarity(*pair, dim=0).item()
            assert found.relative()["learning_rate"][index].item() == pytest.approx(cosine, abs=1e-6)  # float32


def test_no_way_yet_is_no_vote_and_not_nan() -> None:
    still = {"w": torch.zeros(2)}
    found = asked(torch.tensor(1.0), {"w": torch.ones(2)}, still, {"w": 0}, torch.zeros(1), "log", steps=100)
    assert found.usable and found.gradients["learning_rate"].tolist() == found.relative()["learning_rate"].tolist() == [
        0.0
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_way_back_leads_from_the_present_parameters_to_their_average(dtype: torch.dtype) -> None:
    place = {"w": torch.zeros(2, dtype=dtype)}
    way = Displacement(place, memory=20)
    place["w"] += torch.tensor([4.0, -8.0], dtype=dtype)
    if way.step():
        way.look(place)  # the average is half of it
    for part, expected in ((0.0, [4.0, -8.0]), (0.5, [3.0, -6.0]), (1.0, [2.0, -4.0])):
        moved = way.towards_average(place, part)["w"]
        assert moved.tolist() == expected and moved.dtype == dtype
    assert place["w"].tolist() == [4.0, -8.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_average_is_finer_than_its_parameters(dtype: torch.dtype) -> None:
    place = {"w": torch.ones(1, dtype=dtype)}
    way = Displacement(place, memory=20)
    place["w"] += 2**-7  # one digit of bfloat16; a part of it is none
    if way.step():
        way.look(place)
    assert way.of(place)["w"].item() == pytest.approx(2**-8, rel=1e-6)  # the mean of two


@pytest.mark.parametrize(("rate", "sign"), [(0.9, 1.0), (0.003, -1.0)])
def test_it_asks_for_less_where_noise_rules_and_for_more_where_the_way_is_long(rate: float, sign: float) -> None:
    # f(w) = |w|**2 / 2 from |w| = 10, gradients with noise: with 0.9 the iterate jumps about its end within steps.
    generator = torch.Generator().manual_seed(2)
    weights = {"w": torch.full((100,), 1.0, dtype=torch.float64)}
    way = Displacement(weights, memory=100)
    votes = []
    for step in range(1, 201):
        weights["w"] -= rate * (weights["w"] + torch.randn(100, generator=generator, dtype=torch.float64))
        if way.step():
            way.look(weights)
        if step % 20 == 0:
            loss = 0.5 * weights["w"].square().sum()
            found = asked(loss, weights, way.of(weights), {"w": 0}, torch.zeros(1), "log", steps=100)
            votes.append(math.copysign(1.0, found.gradients["learning_rate"].item()))
    assert votes == [sign] * 10


@pytest.mark.parametrize("objective", ["log_mean", "naive_mean"])
def test_objectives_that_count_losses_on_the_way_are_refused(objective: Any) -> None:
    ones = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="knows only the last"):
        asked(torch.tensor(1.0), ones, ones, {"w": 0}, torch.zeros(1), objective, steps=3)


def test_a_negative_loss_has_no_logarithm_and_says_so() -> None:
    ones = {"w": torch.ones(1)}
    with pytest.raises(NegativeLossError):
        asked(torch.tensor(-1.0), ones, ones, {"w": 0}, torch.zeros(1), "log", steps=3)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_what_is_not_finite_is_not_usable(loss: float) -> None:
    ones = {"w": torch.ones(1)}
    found = asked(torch.tensor(loss), ones, ones, {"w": 0}, torch.zeros(1), "log", steps=3)
    assert not found.usable and found.gradients["learning_rate"].isnan().all()


def test_only_factors_on_rates_of_proportional_steps_can_be_asked_this_way() -> None:
    sgd = inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert LearnedHyperparameters(learn=("learning_rate", "momentum")).attach(sgd).rate_places() is None
    custom = copy.copy(sgd.rule)
    object.__setattr__(custom, "proportional_to_rate", False)
    other = copy.copy(sgd)
    object.__setattr__(other, "rule", custom)
    assert LearnedStepSize().attach(other).rate_places() is None
    assert LearnedOptimizer.rate_places(LearnedStepSize()) is None


@pytest.mark.parametrize(("kind", "arguments"), OPTIMIZERS)
def test_steps_of_every_mirrored_optimizer_are_proportional_to_the_rate(kind: Any, arguments: dict[str, Any]) -> None:
    def after(rate: float) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = kind([weight], **{**arguments, "lr": rate})
        generator = torch.Generator().manual_seed(3)
        moved = torch.zeros(4, dtype=torch.float64)
        for _ in range(5):
            before = weight.detach().clone()
            weight.grad = torch.randn(4, generator=generator, dtype=torch.float64)
            optimizer.step()
            moved += weight.detach() - before
            weight.data.copy_(torch.ones(4))  # decays see the same weights
        return moved

    torch.testing.assert_close(after(0.02), 2 * after(0.01), rtol=1e-12, atol=1e-14)  # rounding in float64
