"""Evolution strategies and the mix: unbiased, batched or not, honest about their noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lightning_l2l import LearnedStepSize, meta_gradient
from lightning_l2l.exact.clip import clip_gradient_norm
from lightning_l2l.exact.estimators import Particles
from lightning_l2l.exact.tally import NegativeLossError
from lightning_l2l.exact.windows import WindowEstimator
from lightning_l2l.functional import inner_optimizer


def step_size(rate=0.1, optimizer=torch.optim.SGD, **options):
    return LearnedStepSize().attach(inner_optimizer(optimizer, lr=rate, **options))


def bowl(params, batch):
    return 0.5 * (params["w"] * params["w"] * params["w"].new_tensor([1.0, 3.0])).sum()


START = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}


def on_bowl(estimator, particles=None, steps=5, objective="naive", rate=0.1):
    return meta_gradient(
        bowl, START, step_size(rate), [None] * steps, None, objective=objective, estimator=estimator,
        particles=particles,
    )  # fmt: skip


def smoothed_gradient(width, steps=5, rate=0.1):
    """The gradient of the meta-objective smoothed over log(rate), by quadrature of the closed form."""
    # Twelve nodes integrate this smooth function to 1e-12.
    nodes, weights = torch.linalg.eigh(torch.diag(torch.arange(1, 12).double().sqrt(), 1) * 1.0, UPLO="U")
    total = 0.0
    for node, weight in zip(nodes.tolist(), (weights[0] ** 2).tolist(), strict=True):
        eta = rate * math.exp(width * node)
        for curvature, place in ((1.0, 1.0), (3.0, -2.0)):
            rest = 1 - eta * curvature
            total += weight * 0.5 * curvature * place**2 * 2 * steps * rest ** (2 * steps - 1) * -curvature * eta
    return total


@pytest.mark.parametrize("estimator", ["es", "mixed"])
def test_mean_over_seeds_is_the_exact_gradient_within_its_standard_error(estimator):
    width = 0.3
    expected = smoothed_gradient(width)
    # The scatter of one estimate falls with the root of the number of particles: 100 000 in all.
    found = torch.tensor(
        [on_bowl(estimator, Particles(2000, width, seed=seed)).gradients["learning_rate"].item() for seed in range(50)],
        dtype=torch.float64,
    )
    error = found.std().item() / math.sqrt(len(found))
    # Four standard errors: one run in 16 000 fails by chance, and the seeds are fixed.
    assert abs(found.mean().item() - expected) < 4 * error
    # The promise is sharp enough to tell a smoothed gradient from another one.
    assert error < 0.01 * abs(expected)
    assert abs(smoothed_gradient(0.0) - expected) > 4 * error


def test_quadrature_of_the_tests_is_right():
    exact = on_bowl("forward").gradients["learning_rate"].item()
    assert smoothed_gradient(0.0) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("estimator", ["es", "mixed"])
def test_reported_standard_error_is_the_scatter_over_seeds(estimator):
    runs = [on_bowl(estimator, Particles(64, 0.3, seed=seed)) for seed in range(40)]
    scatter = torch.stack([run.gradients["learning_rate"] for run in runs]).std().item()
    reported = sum(run.diagnostics.standard_error["learning_rate"].item() for run in runs) / len(runs)
    # The scatter of 40 numbers is itself known to 11 %.
    assert reported == pytest.approx(scatter, rel=0.35)


def test_value_is_that_of_unperturbed_meta_parameters():
    exact = on_bowl("forward", objective="log_mean")
    for estimator in ("es", "mixed"):
        found = on_bowl(estimator, Particles(8, 0.5, seed=0), objective="log_mean")
        assert found.value == pytest.approx(exact.value, rel=1e-12)
        torch.testing.assert_close(found.diagnostics.losses, exact.diagnostics.losses)


def test_seeds_decide():
    def gradient(seed):
        return on_bowl("es", Particles(8, 0.1, seed=seed)).gradients["learning_rate"].item()

    assert gradient(1) == gradient(1)
    assert gradient(1) != gradient(2)
    torch.manual_seed(0)
    first = gradient(None), gradient(None)
    torch.manual_seed(0)
    assert (gradient(None), gradient(None)) == first
    assert first[0] != first[1]


def test_mix_takes_back_propagation_where_it_is_smooth():
    result = on_bowl("mixed", Particles(16, 0.01, seed=0))
    exact = on_bowl("forward").gradients["learning_rate"].item()
    # The scatter of the exact slopes over a width of 0.01 is about a per cent.
    assert result.gradients["learning_rate"].item() == pytest.approx(exact, rel=0.02)
    assert float(result.diagnostics.notes[1].split()[-1]) > 0.95


def cliffs(params, batch):
    """A gentle slope with ripples that are ten thousand times steeper than it."""
    w = params["w"]
    return (1 + w.square() + 1e-5 * (1e9 * w).sin()).sum()


def test_mix_takes_evolution_strategies_where_back_propagation_explodes():
    start = {"w": torch.ones(1, dtype=torch.float64)}
    results = {
        name: meta_gradient(
            cliffs, start, step_size(1e-9), [None], None, objective="naive", estimator=name,
            particles=Particles(16, 0.1, seed=0),
        )
        for name in ("es", "mixed")
    }  # fmt: skip
    assert float(results["mixed"].diagnostics.notes[1].split()[-1]) < 0.01
    torch.testing.assert_close(results["mixed"].gradients, results["es"].gradients, rtol=0.05, atol=0)


class Recurrent(nn.Module):
    """vmap has no rule for an LSTM."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.cell(inputs.reshape(-1, 2, 3))[0][:, -1])


def networks():
    torch.manual_seed(0)
    return {
        "BatchNorm and dropout": nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)
        ),
        "convolution": nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
        ),
        "transformer": nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True),
            nn.Flatten(), nn.Linear(6, 2),
        ),
        "LSTM": Recurrent(),
    }  # fmt: skip


def on_network(net, estimator, batching, optimizer=torch.optim.SGD, **options):
    net = net.double()
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1] * 3)) for _ in range(4)
    ]

    def loss(tensors, batch):
        return functional.cross_entropy(functional_call(net, dict(tensors), (batch[0],)), batch[1])

    torch.manual_seed(1)
    result = meta_gradient(
        loss,
        dict(net.named_parameters()),
        step_size(**{"rate": 0.1, "optimizer": optimizer, **options}),
        batches[:3],
        batches[3],
        buffers=dict(net.named_buffers()),
        objective="naive_mean",
        estimator=estimator,
        gradient_transformation=clip_gradient_norm(1.0),
        particles=Particles(4, 0.1, seed=0, batching=batching),
    )
    return result, torch.rand(1)


@pytest.mark.parametrize("estimator", ["es", "mixed"])
@pytest.mark.parametrize("name", ["BatchNorm and dropout", "convolution", "transformer"])
def test_batched_particles_are_the_same_as_one_after_the_other(name, estimator):
    net = networks()[name]
    batched, after_batched = on_network(net, estimator, "vmap", momentum=0.9)
    looped, after_looped = on_network(net, estimator, "loop", momentum=0.9)
    # Batched matrix products add up in another order; a difference of values divided by 2 sigma carries it.
    torch.testing.assert_close(batched.gradients, looped.gradients, rtol=1e-8, atol=1e-12)
    assert batched.value == pytest.approx(looped.value, rel=1e-12)
    assert torch.equal(after_batched, after_looped)
    assert batched.diagnostics.notes[0] == "all particles at once"


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_states_with_tensors_and_counts_are_batched(optimizer):
    net = networks()["convolution"]
    batched, _ = on_network(net, "es", "vmap", optimizer, rate=0.01)
    looped, _ = on_network(net, "es", "loop", optimizer, rate=0.01)
    torch.testing.assert_close(batched.gradients, looped.gradients, rtol=1e-8, atol=1e-12)


def test_a_loss_that_cannot_be_batched_falls_back_and_says_so():
    net = networks()["LSTM"]
    automatic, after = on_network(net, "es", "auto")
    looped, expected = on_network(net, "es", "loop")
    assert torch.equal(automatic.gradients["learning_rate"], looped.gradients["learning_rate"])
    assert torch.equal(after, expected)
    assert "vmap cannot batch" in automatic.diagnostics.notes[0]
    assert "lstm" in automatic.diagnostics.notes[0]
    with pytest.raises(RuntimeError, match="lstm"):
        on_network(net, "es", "vmap")


def test_a_loss_that_differentiates_something_itself_is_judged_too():
    """A physics-informed one: the derivative of the network in its inputs is in the loss."""

    def residual(params, batch):
        inputs = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad((params["w"] * inputs.square()).sum(), inputs, create_graph=True)
        return (slope - 1).square().mean()

    start = {"w": torch.zeros(1, dtype=torch.float64)}
    exact = meta_gradient(residual, start, step_size(), [None] * 3, None, objective="naive")
    found = meta_gradient(
        residual, start, step_size(), [None] * 3, None, objective="naive", estimator="es",
        particles=Particles(200, 0.01, seed=0),
    )  # fmt: skip
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    # The noise of 100 pairs in one dimension: 14 %.
    assert found.gradients["learning_rate"].item() == pytest.approx(exact.gradients["learning_rate"].item(), rel=0.5)


def test_an_error_of_the_loss_itself_is_raised():
    def broken(params, batch):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        meta_gradient(broken, START, step_size(), [None], None, estimator="es")


def not_twice(params, batch):
    return 1 + nn.functional.embedding_bag(torch.tensor([[0, 1]]), params["w"][:, None]).square().sum()


def test_auto_takes_evolution_strategies_for_operations_without_a_second_derivative():
    result = meta_gradient(not_twice, START, step_size(0.01), [None] * 3, None, objective="naive")
    assert result.usable
    assert result.diagnostics.estimator == "es"
    assert "_embedding_bag_backward has no second derivative" in result.diagnostics.reason


@pytest.mark.parametrize("estimator", ["forward", "reverse", "segmented"])
def test_an_exact_estimator_that_was_asked_for_says_what_is_missing(estimator):
    with pytest.raises(RuntimeError, match="_embedding_bag_backward cannot be. Use estimator='es'"):
        meta_gradient(not_twice, START, step_size(0.01), [None] * 3, None, estimator=estimator)


@pytest.mark.parametrize("estimator", ["truncated", "pes", "es_single"])
def test_estimators_over_windows_are_refused_for_a_single_unroll(estimator):
    with pytest.raises(ValueError, match="carries state from one window"):
        on_bowl(estimator)


def test_particles_over_ranks_are_the_particles_of_one_process():
    """The mean over processes, each with half of the particles, is an estimate from all of them."""
    parts = {}
    for rank in range(2):
        half = Particles(16, 0.2, seed=0, rank=rank, ranks=2, mean_over_ranks=lambda tensor: tensor)
        parts[rank] = on_bowl("es", half)
    assert parts[0].gradients["learning_rate"] != parts[1].gradients["learning_rate"]

    # The second pass exchanges: every mean is over what both ranks computed at the same point of the program.
    def exchange(rank, log, other):
        def mean(tensor):
            log.append(tensor)
            return tensor if other is None else (tensor + other[len(log) - 1]) / 2

        return Particles(16, 0.2, seed=0, rank=rank, ranks=2, mean_over_ranks=mean)

    logs = ([], [])
    on_bowl("es", exchange(0, logs[0], None)), on_bowl("es", exchange(1, logs[1], None))
    both = on_bowl("es", exchange(0, [], logs[1]))
    expected = (parts[0].gradients["learning_rate"] + parts[1].gradients["learning_rate"]) / 2
    torch.testing.assert_close(both.gradients["learning_rate"], expected)
    assert len(logs[0]) == len(logs[1])


def test_a_diverged_particle_is_nan_or_counts_as_the_limit():
    wild = Particles(4, 400.0, seed=0)
    result = on_bowl("es", wild, steps=3)
    assert not result.usable and result.gradients["learning_rate"].isnan().all()
    limited = Particles(4, 400.0, seed=0, loss_limit=100.0)
    assert on_bowl("es", limited, steps=3).usable


@pytest.mark.parametrize("batching", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("estimator", ["es", "mixed"])
def test_log_of_a_negative_loss_is_refused_in_the_same_words_as_by_exact_estimators(estimator, batching):
    def refusal(estimator):
        with pytest.raises(NegativeLossError, match="logarithm does not exist") as caught:
            # Every particle is at the same point when the only meta-loss is taken with a rate of nearly zero.
            meta_gradient(
                lambda p, b: -bowl(p, b), START, step_size(1e-9), [None], None, estimator=estimator,
                particles=Particles(4, seed=0, batching=batching),
            )  # fmt: skip
        return str(caught.value)

    assert refusal(estimator) == refusal("reverse")


@pytest.mark.parametrize("estimator", ["pes", "es_single", "es", "mixed", "truncated"])
def test_log_of_a_negative_loss_is_the_same_error_over_windows(estimator):
    windows = WindowEstimator(estimator, Particles(4, seed=0))
    learned = step_size()
    with pytest.raises(NegativeLossError, match="logarithm does not exist"):
        windows.meta_gradient(lambda p, b: -bowl(p, b), learned, windows.begin(learned, START), [None], None)
    # No logarithm, no error.
    result, _ = windows.meta_gradient(
        lambda p, b: -bowl(p, b), learned, windows.begin(learned, START), [None], None, objective="naive"
    )
    assert result.usable and result.value < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3}, "antithetic pairs"),
        ({"count": 6, "ranks": 2, "mean_over_ranks": abs}, "multiple of 4"),
        ({"standard_deviation": 0.0}, "above 0"),
        ({"standard_deviation": math.inf}, "finite"),
        ({"loss_limit": math.nan}, "loss_limit is NaN"),
        ({"seed": "7"}, "whole number"),
        ({"batching": "gpu"}, "is not known"),
        ({"ranks": 2}, "need mean_over_ranks"),
        ({"rank": 1}, "rank must lie"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Particles(**options)


def test_a_mix_of_one_pair_is_refused():
    with pytest.raises(ValueError, match="two pairs at least"):
        on_bowl("mixed", Particles(2))
