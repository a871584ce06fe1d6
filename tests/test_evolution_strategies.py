"""Evolution strategies: unbiased, batched or not, honest about their noise; and losses without second derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_l2l import EvolutionStrategies, LearnedStepSize, Unroll, meta_gradient
from lightning_l2l.exact.clip import clip_gradient_norm
from lightning_l2l.exact.objectives import NegativeLossError
from lightning_l2l.functional import inner_optimizer


def step_size(rate=0.1, optimizer=torch.optim.SGD, **options):
    return LearnedStepSize().attach(inner_optimizer(optimizer, lr=rate, **options))


def bowl(params, batch):
    return 0.5 * (params["w"] * params["w"] * params["w"].new_tensor([1.0, 3.0])).sum()


START = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}


def on_bowl(estimator=None, rate=0.1, steps=5):
    estimator = Unroll(mode="forward", objective="naive") if estimator is None else estimator
    return meta_gradient(bowl, START, step_size(rate), [None] * steps, None, estimator=estimator)


def strategy(particles=8, standard_deviation=0.1, *, objective="naive", **options):
    return EvolutionStrategies(
        particles=particles, standard_deviation=standard_deviation, objective=objective, **options
    )


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


def test_mean_over_seeds_is_the_exact_gradient_within_its_standard_error():
    width = 0.3
    expected = smoothed_gradient(width)
    # The scatter of one estimate falls with the root of the number of particles: 100 000 in all.
    found = torch.tensor(
        [on_bowl(strategy(2000, width, seed=seed)).gradients["learning_rate"].item() for seed in range(50)],
        dtype=torch.float64,
    )
    error = found.std().item() / math.sqrt(len(found))
    # Four standard errors: one run in 16 000 fails by chance, and the seeds are fixed.
    assert abs(found.mean().item() - expected) < 4 * error
    # The promise is sharp enough to tell a smoothed gradient from another one.
    assert error < 0.01 * abs(expected)
    assert abs(smoothed_gradient(0.0) - expected) > 4 * error


def test_quadrature_of_the_tests_is_right():
    exact = on_bowl().gradients["learning_rate"].item()
    assert smoothed_gradient(0.0) == pytest.approx(exact, rel=1e-12)


def test_reported_standard_error_is_the_scatter_over_seeds():
    runs = [on_bowl(strategy(64, 0.3, seed=seed)) for seed in range(40)]
    scatter = torch.stack([run.gradients["learning_rate"] for run in runs]).std().item()
    reported = sum(run.diagnostics.standard_error["learning_rate"].item() for run in runs) / len(runs)
    # The scatter of 40 numbers is itself known to 11 %.
    assert reported == pytest.approx(scatter, rel=0.35)


def test_value_is_that_of_unperturbed_meta_parameters():
    exact = on_bowl(Unroll(mode="forward", objective="log_mean"))
    found = on_bowl(strategy(8, 0.5, objective="log_mean"))
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    torch.testing.assert_close(found.diagnostics.losses, exact.diagnostics.losses)


def test_seeds_decide():
    def gradient(seed):
        return on_bowl(strategy(seed=seed)).gradients["learning_rate"].item()

    assert gradient(1) == gradient(1)
    assert gradient(1) != gradient(2)


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


def on_network(net, batching, optimizer=torch.optim.SGD, **options):
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
        estimator=strategy(4, objective="naive_mean", batching=batching),
        gradient_transformation=clip_gradient_norm(1.0),
    )
    return result, torch.rand(1)


@pytest.mark.parametrize("name", ["BatchNorm and dropout", "convolution", "transformer"])
def test_batched_particles_are_the_same_as_one_after_the_other(name):
    net = networks()[name]
    batched, after_batched = on_network(net, "vmap", momentum=0.9)
    looped, after_looped = on_network(net, "loop", momentum=0.9)
    # Batched matrix products add up in another order; a difference of values divided by 2 sigma carries it.
    torch.testing.assert_close(batched.gradients, looped.gradients, rtol=1e-8, atol=1e-12)
    assert batched.value == pytest.approx(looped.value, rel=1e-12)
    assert torch.equal(after_batched, after_looped)
    assert batched.diagnostics.notes[0] == "all particles at once"


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_states_with_tensors_and_counts_are_batched(optimizer):
    net = networks()["convolution"]
    batched, _ = on_network(net, "vmap", optimizer, rate=0.01)
    looped, _ = on_network(net, "loop", optimizer, rate=0.01)
    torch.testing.assert_close(batched.gradients, looped.gradients, rtol=1e-8, atol=1e-12)


def test_a_loss_that_cannot_be_batched_falls_back_and_says_so():
    net = networks()["LSTM"]
    automatic, after = on_network(net, "auto")
    looped, expected = on_network(net, "loop")
    assert torch.equal(automatic.gradients["learning_rate"], looped.gradients["learning_rate"])
    assert torch.equal(after, expected)
    assert "vmap cannot batch" in automatic.diagnostics.notes[0]
    assert "lstm" in automatic.diagnostics.notes[0]
    with pytest.raises(RuntimeError, match="lstm"):
        on_network(net, "vmap")


def test_a_loss_that_differentiates_something_itself_is_differentiated_too():
    """A physics-informed one: the derivative of the network in its inputs is in the loss."""

    def residual(params, batch):
        inputs = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad((params["w"] * inputs.square()).sum(), inputs, create_graph=True)
        return (slope - 1).square().mean()

    start = {"w": torch.zeros(1, dtype=torch.float64)}
    exact, found = (
        meta_gradient(residual, start, step_size(), [None] * 3, None, estimator=estimator)
        for estimator in (Unroll(objective="naive"), strategy(200, 0.01))
    )
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    # The noise of 100 pairs in one dimension: 14 %.
    assert found.gradients["learning_rate"].item() == pytest.approx(exact.gradients["learning_rate"].item(), rel=0.5)


def test_an_error_of_the_loss_itself_is_raised():
    def broken(params, batch):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        meta_gradient(broken, START, step_size(), [None], None, estimator=strategy())


def not_twice(params, batch):
    return 1 + nn.functional.embedding_bag(torch.tensor([[0, 1]]), params["w"][:, None]).square().sum()


def test_auto_takes_evolution_strategies_for_operations_without_a_second_derivative():
    result = meta_gradient(not_twice, START, step_size(0.01), [None] * 3, None, estimator=Unroll(objective="naive"))
    assert result.usable
    assert result.diagnostics.estimator == "es"
    assert "_embedding_bag_backward has no second derivative" in result.diagnostics.reason


@pytest.mark.parametrize("mode", ["forward", "reverse", "segmented"])
def test_a_mode_that_was_asked_for_says_what_is_missing(mode):
    with pytest.raises(RuntimeError, match="_embedding_bag_backward cannot be. Use EvolutionStrategies"):
        meta_gradient(not_twice, START, step_size(0.01), [None] * 3, None, estimator=Unroll(mode=mode))


class OnceSquare(torch.autograd.Function):
    """A user's own function that forbids a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("mode", ["forward", "reverse", "segmented"])
def test_a_function_that_is_once_differentiable_is_never_differentiated_twice_in_silence(mode):
    def loss(tensors, batch):
        return OnceSquare.apply(tensors["w"]).sum() + 1

    with pytest.raises(RuntimeError, match="once_differentiable cannot be"):
        meta_gradient(loss, START, step_size(), [None] * 3, None, estimator=Unroll(mode=mode))
    # Without the second derivative, and without any, it can be used.
    first_order = Unroll(mode=mode, second_order=False)
    for estimator in (first_order, strategy(batching="loop")):
        assert meta_gradient(loss, START, step_size(), [None] * 3, None, estimator=estimator).usable


@pytest.mark.parametrize("mode", ["forward", "reverse", "segmented", "auto"])
def test_weight_norm_whose_second_derivative_is_wrong_is_refused(mode):
    net = nn.Sequential(weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = torch.ones(3, 2, dtype=torch.float64)

    def loss(tensors, batch):
        return functional_call(net, dict(tensors), (inputs,)).square().mean() + 1

    tensors = dict(net.named_parameters())
    with pytest.raises(RuntimeError, match="weight_norm, whose second derivative"):
        meta_gradient(loss, tensors, step_size(), [None] * 2, None, estimator=Unroll(mode=mode))
    assert meta_gradient(loss, tensors, step_size(), [None] * 2, None, estimator=Unroll(second_order=False)).usable


def test_a_diverged_particle_is_nan_or_counts_as_the_limit():
    result = on_bowl(strategy(4, 400.0), steps=3)
    assert not result.usable and result.gradients["learning_rate"].isnan().all()
    assert on_bowl(strategy(4, 400.0, loss_limit=100.0), steps=3).usable


@pytest.mark.parametrize("batching", ["auto", "vmap", "loop"])
def test_log_of_a_negative_loss_is_refused_in_the_same_words_as_by_an_unroll(batching):
    def refusal(estimator):
        with pytest.raises(NegativeLossError, match="logarithm does not exist") as caught:
            # Every particle is at the same point when the only meta-loss is taken with a rate of nearly zero.
            meta_gradient(lambda p, b: -bowl(p, b), START, step_size(1e-9), [None], None, estimator=estimator)
        return str(caught.value)

    assert refusal(strategy(4, objective="log", batching=batching)) == refusal(Unroll(mode="reverse"))


def test_a_loss_may_cross_zero_under_the_naive_objective():
    found = meta_gradient(lambda p, b: bowl(p, b) - 3, START, step_size(), [None] * 5, None, estimator=strategy())
    assert found.diagnostics.losses[0] > 0 > found.value and found.usable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 3}, "antithetic pairs"),
        ({"particles": 0}, "antithetic pairs"),
        ({"standard_deviation": 0.0}, "above 0"),
        ({"standard_deviation": math.inf}, "finite"),
        ({"loss_limit": math.nan}, "loss_limit is NaN"),
        ({"seed": "7"}, "whole number"),
        ({"batching": "gpu"}, "batching='gpu' is not known"),
        ({"method": "mixed"}, "method='mixed' is not known"),
        ({"objective": "exp"}, "objective='exp'"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvolutionStrategies(**options)
