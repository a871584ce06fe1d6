"""Episodes: what is carried from unroll to unroll, what is biased, and that an interruption changes nothing."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torchopt
from anchor_problems import InfluenceBalancing
from torch import nn
from torch.func import functional_call

from lightning_l2l import EvolutionStrategies, LearnedOptimizer, LearnedStepSize, Unroll
from lightning_l2l.exact.episodes import Episode
from lightning_l2l.exact.objectives import NegativeLossError
from lightning_l2l.functional import inner_optimizer

UNROLLS = 6


def by_name(name, particles=8, standard_deviation=0.1, objective="naive", seed=0):
    if name in ("auto", "forward", "reverse", "segmented"):
        return Unroll(mode=name, objective=objective)
    return EvolutionStrategies(
        method=name, objective=objective, particles=particles, standard_deviation=standard_deviation, seed=seed
    )


NAMES = ("forward", "reverse", "segmented", "es", "pes", "es_single")


def exact_total(problem):
    """The gradient of the sum of the losses after each step, by back-propagation through all of them."""
    theta = problem.theta.detach().clone().requires_grad_()
    s, total = problem.start()["s"], 0.0
    for _ in range(UNROLLS):
        s = problem.matrix @ s + theta * problem.signs
        total = total + problem.loss({"s": s}, None)
    return torch.autograd.grad(total, theta)[0].item()


def total_over_unrolls(problem, estimator):
    episode = Episode.begin(problem, problem.start(), estimator=estimator)
    total = 0.0
    for _ in range(UNROLLS):
        result, episode = episode.unroll(problem.loss, problem, [None], None)
        total += result.gradients["theta"].item()
    return total


@pytest.fixture
def problem():
    return InfluenceBalancing(size=5, positive=2)


# One loss is quadratic in theta, so smoothing changes no gradient and the exact one is what must come out.
@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_mean_over_seeds_of_an_episode_is_the_exact_gradient_within_its_standard_error(problem, name):
    expected = exact_total(problem)
    found = torch.tensor(
        [total_over_unrolls(problem, by_name(name, 1000, seed=seed)) for seed in range(40)], dtype=torch.float64
    )
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - expected) < 4 * error
    assert error < 0.03 * abs(expected)
    # What truncation gives is far outside.
    assert abs(total_over_unrolls(problem, by_name("reverse")) - expected) > 20 * error


def test_variance_grows_with_the_unrolls_for_pes_and_not_for_es_single(problem):
    def scatter(name):
        episode = Episode.begin(problem, problem.start(), estimator=by_name(name, 2000))
        for _ in range(40):
            result, episode = episode.unroll(problem.loss, problem, [None], None)
        return result.diagnostics.standard_error["theta"].item()

    # The dynamics forget within some ten steps, so of 40 perturbations most are noise: a factor of sqrt(40 / 10) or
    # more.
    assert scatter("pes") > 1.5 * scatter("es_single")


def test_every_truncated_estimator_computes_its_unroll_and_carries_the_training_on(problem):
    expected = total_over_unrolls(problem, by_name("reverse"))
    for name in ("forward", "segmented", "auto"):
        assert total_over_unrolls(problem, by_name(name)) == pytest.approx(expected, rel=1e-10)
    # Noise of 4000 particles: 2 %; a factor of three of it.
    assert total_over_unrolls(problem, by_name("es", 4000, 0.01)) == pytest.approx(expected, rel=0.06)


class Network:
    """A small network with BatchNorm and dropout, as a loss with batches for four unrolls."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(0)
        self.unrolls = [
            [(torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(4)]
            for _ in range(4)
        ]

    def loss(self, tensors, batch):
        return (functional_call(self.net, dict(tensors), (batch[0],)) - batch[1]).square().mean()

    def begin(self, learned, name):
        estimator = by_name(name, 4, objective="log")
        own, buffers = dict(self.net.named_parameters()), dict(self.net.named_buffers())
        return Episode.begin(learned, own, estimator=estimator, buffers=buffers)

    def gradients(self, learned, episode, numbers):
        found = []
        for number in numbers:
            *batches, meta_batch = self.unrolls[number]
            torch.manual_seed(number)
            result, episode = episode.unroll(self.loss, learned, batches, meta_batch)
            found.append({name: gradient.clone() for name, gradient in result.gradients.items()})
        return found, episode


class TorchoptAdam(LearnedOptimizer):
    """Its state is made of named tuples."""

    def __init__(self):
        super().__init__()
        self.learning_rate = nn.Parameter(torch.tensor([-3.0]))

    def transformation(self):
        return torchopt.adam(lr=lambda count: self.learning_rate.exp().squeeze())


LEARNED = {
    "momentum": lambda: LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "Adam": lambda: LearnedStepSize().attach(inner_optimizer(torch.optim.Adam, lr=0.1)),
    "torchopt": TorchoptAdam,
}


@pytest.mark.parametrize("optimizer", LEARNED)
@pytest.mark.parametrize("name", NAMES)
def test_an_episode_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name, optimizer):
    problem, learned = Network(), LEARNED[optimizer]()
    expected, end = problem.gradients(learned, problem.begin(learned, name), range(4))
    _, half_way = problem.gradients(learned, problem.begin(learned, name), range(2))

    file = io.BytesIO()
    torch.save(half_way.state_dict(), file)
    file.seek(0)
    loaded = Episode.from_state_dict(torch.load(file, weights_only=True), learned, half_way.estimator)
    found, loaded_end = problem.gradients(learned, loaded, range(2, 4))
    torch.testing.assert_close(found, expected[2:], rtol=0, atol=0)
    torch.testing.assert_close(loaded_end.state_dict(), end.state_dict(), rtol=0, atol=0)
    assert loaded_end.unrolls == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_is_a_value(name):
    """The same unroll twice from the same episode: nothing in it, or in what was passed in, has changed."""
    problem, learned = Network(), LEARNED["momentum"]()
    before = {key: tensor.clone() for key, tensor in problem.net.state_dict().items()}
    _, episode = problem.gradients(learned, problem.begin(learned, name), [0])
    first, _ = problem.gradients(learned, episode, [1])
    second, _ = problem.gradients(learned, episode, [1])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(dict(problem.net.state_dict()), before, rtol=0, atol=0)


def test_the_training_that_is_carried_on_is_the_plain_one():
    problem, learned = Network(), LEARNED["momentum"]()
    ends = [
        problem.gradients(learned, problem.begin(learned, name), range(3))[1].iterate
        for name in ("reverse", "forward", "segmented", "es")
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end.parameters, ends[0].parameters, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(end.buffers, ends[0].buffers, rtol=1e-5, atol=1e-6)


def test_particles_go_separate_ways(problem):
    episode = Episode.begin(problem, problem.start(), estimator=by_name("pes", 4))
    for _ in range(2):
        _, episode = episode.unroll(problem.loss, problem, [None], None)
    assert episode.iterate.parameters["s"].unique(dim=0).shape == (4, 5)
    # Antithetic still, after two unrolls of new perturbations.
    total = episode.directions["theta"]
    assert torch.equal(total[:2], -total[2:])


def test_es_single_keeps_its_perturbation_and_pes_adds_new_ones(problem):
    for name, kept in (("es_single", True), ("pes", False)):
        start = Episode.begin(problem, problem.start(), estimator=by_name(name, 4))
        _, first = start.unroll(problem.loss, problem, [None], None)
        _, second = first.unroll(problem.loss, problem, [None], None)
        assert torch.equal(first.directions["theta"], second.directions["theta"]) == kept


@pytest.mark.parametrize("name", ["es", "pes"])
def test_every_unroll_draws_new_perturbations(name):
    """Particles that would not move anything but themselves: their values are their perturbations."""

    class Still(LearnedOptimizer):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def transformation(self):
            def update(updates, state, *, params=None, inplace=True):
                return {"w": self.theta - params["w"]}, state

            return torchopt.base.GradientTransformation(lambda params: (), update)

    learned = Still()
    episode = Episode.begin(learned, {"w": torch.zeros(1, dtype=torch.float64)}, estimator=by_name(name, 2))
    found = []
    for _ in range(3):
        result, episode = episode.unroll(lambda p, _: (p["w"] + 1).square().sum(), learned, [None], None)
        found.append(result.gradients["theta"].item())
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_log_of_a_negative_loss_is_the_same_error_for_all(name):
    learned = LEARNED["momentum"]()

    def unroll(objective):
        episode = Episode.begin(learned, {"w": torch.ones(2)}, estimator=by_name(name, 4, objective=objective))
        return episode.unroll(lambda p, _: -p["w"].square().sum(), learned, [None], None)[0]

    with pytest.raises(NegativeLossError, match="logarithm does not exist"):
        unroll("log")
    result = unroll("naive")  # no logarithm, no error
    assert result.usable and result.value < 0


def test_an_episode_without_anything_to_train_or_to_learn_is_refused(problem):
    with pytest.raises(ValueError, match="parameters is empty"):
        Episode.begin(problem, {}, estimator=by_name("pes"))
    with pytest.raises(ValueError, match="nothing to learn"):
        frozen = InfluenceBalancing(size=5, positive=2).requires_grad_(False)
        Episode.begin(frozen, problem.start(), estimator=by_name("pes"))


@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_an_episode_of_other_meta_parameters_is_refused(problem, name):
    episode = Episode.begin(problem, problem.start(), estimator=by_name(name))
    with pytest.raises(ValueError, match=r"carries perturbations of \['theta'\], but .* \['learning_rate'\]"):
        episode.unroll(problem.loss, TorchoptAdam(), [None], None)


def test_a_saved_episode_of_another_estimator_and_a_wrong_number_of_batches_are_refused(problem):
    episode = Episode.begin(problem, problem.start(), estimator=by_name("pes", 4))
    for estimator in (by_name("reverse"), by_name("pes", 8)):
        with pytest.raises(ValueError, match="saved episode carries 4 particles"):
            Episode.from_state_dict(episode.state_dict(), problem, estimator)
    with pytest.raises(ValueError, match="batches is empty"):
        episode.unroll(problem.loss, problem, [], None)
    fixed = Episode.begin(problem, problem.start(), estimator=Unroll(steps=2))
    with pytest.raises(ValueError, match="one batch for each step"):
        fixed.unroll(problem.loss, problem, [None], None)
