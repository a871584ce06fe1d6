"""Estimators over windows: what is carried, what is biased, and that an interruption changes nothing."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torchopt
from anchor_problems import InfluenceBalancing
from torch import nn
from torch.func import functional_call

from lightning_l2l import LearnedOptimizer, LearnedStepSize
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.windows import Episode, WindowEstimator
from lightning_l2l.functional import inner_optimizer

NAMES = ("forward", "reverse", "segmented", "truncated", "es", "mixed", "pes", "es_single")
WINDOWS = 6


def exact_total(problem):
    """The gradient of the sum of the losses after each step, by back-propagation through all of them."""
    theta = problem.theta.detach().clone().requires_grad_()
    s, total = problem.start()["s"], 0.0
    for _ in range(WINDOWS):
        s = problem.matrix @ s + theta * problem.signs
        total = total + problem.loss({"s": s}, None)
    return torch.autograd.grad(total, theta)[0].item()


def windowed_total(problem, name, particles):
    windows = WindowEstimator(name, particles)
    episode = windows.begin(problem, problem.start())
    total = 0.0
    for _ in range(WINDOWS):
        result, episode = windows.meta_gradient(problem.loss, problem, episode, [None], None, objective="naive")
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
        [windowed_total(problem, name, Particles(1000, 0.1, seed=seed)) for seed in range(40)], dtype=torch.float64
    )
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - expected) < 4 * error
    assert error < 0.03 * abs(expected)
    # What truncation gives is far outside.
    assert abs(windowed_total(problem, "truncated", Particles()) - expected) > 20 * error


def test_variance_grows_with_the_windows_for_pes_and_not_for_es_single(problem):
    def scatter(name):
        windows = WindowEstimator(name, Particles(2000, 0.1, seed=0))
        episode = windows.begin(problem, problem.start())
        for _ in range(40):
            result, episode = windows.meta_gradient(problem.loss, problem, episode, [None], None, objective="naive")
        return result.diagnostics.standard_error["theta"].item()

    # The dynamics forget within some ten steps, so of 40 perturbations most are noise: a factor of sqrt(40 / 10) or
    # more.
    assert scatter("pes") > 1.5 * scatter("es_single")


def test_every_truncated_estimator_computes_its_window_and_carries_the_training_on(problem):
    particles = Particles(4000, 0.01, seed=0)
    expected = windowed_total(problem, "truncated", particles)
    for name in ("forward", "reverse", "segmented"):
        assert windowed_total(problem, name, particles) == pytest.approx(expected, rel=1e-10)
    for name in ("es", "mixed"):
        # Noise of 4000 particles: 2 %; a factor of three of it.
        assert windowed_total(problem, name, particles) == pytest.approx(expected, rel=0.06)


class Network:
    """A small network with BatchNorm and dropout, as a loss with windows of batches."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(0)
        self.windows = [
            [(torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(4)]
            for _ in range(4)
        ]

    def loss(self, tensors, batch):
        return (functional_call(self.net, dict(tensors), (batch[0],)) - batch[1]).square().mean()

    def begin(self, windows, learned):
        return windows.begin(learned, dict(self.net.named_parameters()), buffers=dict(self.net.named_buffers()))

    def gradients(self, windows, learned, episode, numbers):
        found = []
        for number in numbers:
            *batches, meta_batch = self.windows[number]
            torch.manual_seed(number)
            result, episode = windows.meta_gradient(self.loss, learned, episode, batches, meta_batch)
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
    windows = WindowEstimator(name, Particles(4, 0.1, seed=0))
    expected, end = problem.gradients(windows, learned, problem.begin(windows, learned), range(4))
    _, half_way = problem.gradients(windows, learned, problem.begin(windows, learned), range(2))

    file = io.BytesIO()
    torch.save(half_way.state_dict(), file)
    file.seek(0)
    loaded = Episode.from_state_dict(torch.load(file, weights_only=True), learned)
    found, loaded_end = problem.gradients(windows, learned, loaded, range(2, 4))
    torch.testing.assert_close(found, expected[2:], rtol=0, atol=0)
    torch.testing.assert_close(loaded_end.iterate.parameters, end.iterate.parameters, rtol=0, atol=0)
    torch.testing.assert_close(loaded_end.iterate.buffers, end.iterate.buffers, rtol=0, atol=0)
    assert loaded_end.window == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_is_a_value(name):
    """The same window twice from the same episode: nothing in it, or in what was passed in, has changed."""
    problem, learned = Network(), LEARNED["momentum"]()
    before = {key: tensor.clone() for key, tensor in problem.net.state_dict().items()}
    windows = WindowEstimator(name, Particles(4, 0.1, seed=0))
    _, episode = problem.gradients(windows, learned, problem.begin(windows, learned), [0])
    first, _ = problem.gradients(windows, learned, episode, [1])
    second, _ = problem.gradients(windows, learned, episode, [1])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(dict(problem.net.state_dict()), before, rtol=0, atol=0)


def test_the_training_that_is_carried_on_is_the_plain_one():
    problem, learned = Network(), LEARNED["momentum"]()
    ends = []
    for name in ("truncated", "forward", "segmented", "es", "mixed"):
        windows = WindowEstimator(name, Particles(4, 0.1, seed=0))
        _, episode = problem.gradients(windows, learned, problem.begin(windows, learned), range(3))
        ends.append(episode.iterate)
    for end in ends[1:]:
        torch.testing.assert_close(end.parameters, ends[0].parameters, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(end.buffers, ends[0].buffers, rtol=1e-5, atol=1e-6)


def test_particles_go_separate_ways(problem):
    windows = WindowEstimator("pes", Particles(4, 0.1, seed=0))
    episode = windows.begin(problem, problem.start())
    for _ in range(2):
        _, episode = windows.meta_gradient(problem.loss, problem, episode, [None], None, objective="naive")
    assert episode.iterate.parameters["s"].unique(dim=0).shape == (4, 5)
    # Antithetic still, after two windows of new perturbations.
    total = episode.directions["theta"]
    assert torch.equal(total[:2], -total[2:])


def test_es_single_keeps_its_perturbation_and_pes_adds_new_ones(problem):
    for name, kept in (("es_single", True), ("pes", False)):
        windows = WindowEstimator(name, Particles(4, 0.1, seed=0))
        start = windows.begin(problem, problem.start())
        _, first = windows.meta_gradient(problem.loss, problem, start, [None], None, objective="naive")
        _, second = windows.meta_gradient(problem.loss, problem, first, [None], None, objective="naive")
        assert torch.equal(first.directions["theta"], second.directions["theta"]) == kept


@pytest.mark.parametrize("name", ["es", "pes"])
def test_every_window_draws_new_perturbations(name):
    """Particles that would not move anything but themselves: their values are their perturbations."""

    class Still(LearnedOptimizer):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def transformation(self):
            def update(updates, state, *, params=None, inplace=True):
                return {"w": self.theta - params["w"]}, state

            return torchopt.base.GradientTransformation(lambda params: (), update)

    learned, windows = Still(), WindowEstimator(name, Particles(2, 0.1, seed=0))
    episode = windows.begin(learned, {"w": torch.zeros(1, dtype=torch.float64)})
    found = []
    for _ in range(3):
        loss = lambda params, batch: (params["w"] + 1).square().sum()  # noqa: E731
        result, episode = windows.meta_gradient(loss, learned, episode, [None], None, objective="naive")
        found.append(result.gradients["theta"].item())
    assert len(set(found)) == 3


def test_auto_says_which_and_why(problem):
    windows = WindowEstimator(particles=Particles(4, seed=0))
    episode = windows.begin(problem, problem.start())
    result, _ = windows.meta_gradient(problem.loss, problem, episode, [None], None, objective="naive")
    assert result.diagnostics.estimator == episode.estimator == "es_single"
    assert "1 scalar meta-parameter" in result.diagnostics.reason


def test_an_episode_without_anything_to_train_or_to_learn_is_refused(problem):
    windows = WindowEstimator("pes", Particles(4, seed=0))
    with pytest.raises(ValueError, match="params is empty"):
        windows.begin(problem, {})
    with pytest.raises(ValueError, match="nothing to learn"):
        windows.begin(InfluenceBalancing(size=5, positive=2).requires_grad_(False), problem.start())


@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_an_episode_of_other_meta_parameters_is_refused(problem, name):
    windows = WindowEstimator(name, Particles(4, seed=0))
    episode = windows.begin(problem, problem.start())
    with pytest.raises(ValueError, match=r"carries perturbations of \['theta'\], but .* \['learning_rate'\]"):
        windows.meta_gradient(problem.loss, TorchoptAdam(), episode, [None], None)


def test_an_episode_of_another_estimator_or_size_is_refused(problem):
    episode = WindowEstimator("pes", Particles(4, seed=0)).begin(problem, problem.start())
    with pytest.raises(ValueError, match="begun with estimator='pes'"):
        WindowEstimator("truncated").meta_gradient(problem.loss, problem, episode, [None], None)
    with pytest.raises(ValueError, match="carries 4 particles"):
        WindowEstimator("pes", Particles(8)).meta_gradient(problem.loss, problem, episode, [None], None)
    with pytest.raises(ValueError, match="is not known"):
        WindowEstimator("evolution")
    with pytest.raises(ValueError, match="batches is empty"):
        WindowEstimator("pes", Particles(4)).meta_gradient(problem.loss, problem, episode, [], None)
