"""Exact unrolls: exact to second order, in every mode, for every optimizer and kind of network."""

from __future__ import annotations

import math

import pytest
import torch
import torchopt
from torch import nn
from torch.func import functional_call

from lightning_l2l import (
    EvolutionStrategies,
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    Unroll,
    meta_gradient,
)
from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.exact.objectives import objective_weights
from lightning_l2l.functional import inner_optimizer, mirror, read_state

MODES = ("forward", "reverse")
OBJECTIVES = ("log", "naive", "log_mean", "naive_mean")
STEPS = 4


class Attention(nn.Module):
    """A small transformer block over sequences of 5 tokens."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x.reshape(len(x), 5, 8)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.gru(x.reshape(len(x), 5, 8))[0][:, -1])


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3)),
    "convnet with BatchNorm and dropout": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5, 8)),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(72, 3),
    ),
    "GRU": Recurrent,
    "transformer": Attention,
}

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.02}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


class Problem:
    """A network, a live optimizer that has already taken three steps, and batches."""

    def __init__(self, network="mlp", optimizer="SGD nesterov", dtype=torch.float64):
        torch.manual_seed(0)
        self.net = NETWORKS[network]().to(dtype)
        cls, options = OPTIMIZERS[optimizer]
        self.optimizer = cls(self.net.parameters(), **options)
        self.batches = [(torch.randn(12, 40, dtype=dtype), torch.randint(0, 3, (12,))) for _ in range(STEPS + 4)]
        for batch in self.batches[:3]:
            self.optimizer.zero_grad()
            self.loss(dict(self.net.named_parameters()), batch).backward()
            self.optimizer.step()

    def loss(self, tensors, batch):
        return nn.functional.cross_entropy(functional_call(self.net, tensors, (batch[0],)), batch[1])

    def learned(self, *learn):
        learned = LearnedHyperparameters(learn or ("learning_rate",))
        return learned.attach(mirror(self.optimizer, self.net.named_parameters()))

    def gradient(self, learned, mode="forward", **options):
        torch.manual_seed(7)  # the same dropout masks every time
        options.setdefault("state", read_state(self.optimizer, self.net.named_parameters()))
        return meta_gradient(
            options.pop("loss", self.loss),
            dict(self.net.named_parameters()),
            learned,
            self.batches[3 : 3 + STEPS],
            self.batches[3 + STEPS],
            estimator=Unroll(mode=mode, objective=options.pop("objective", "log")),
            buffers=dict(self.net.named_buffers()),
            **options,
        )

    def central_difference(self, learned, name="learning_rate", **options):
        # Step 1e-5: truncation error ~1e-10, rounding ~1e-16 / 1e-5 = 1e-11, relative to a value of order one.
        parameter = learned.get_parameter(name)
        values = []
        for offset in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.fill_(offset)
            values.append(self.gradient(learned, **options).value)
        with torch.no_grad():
            parameter.zero_()
        return (values[0] - values[1]) / 2e-5


def relative_error(found, expected):
    return abs(found - expected) / max(abs(expected), 1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_mirrored_optimizer_has_the_exact_meta_gradient(optimizer):
    problem = Problem(optimizer=optimizer)
    learned = problem.learned()
    expected = problem.central_difference(learned)
    for mode in MODES:
        result = problem.gradient(learned, mode)
        assert result.usable
        assert relative_error(result.gradients["learning_rate"].item(), expected) < 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_every_kind_of_network_has_the_exact_meta_gradient(network):
    problem = Problem(network)
    learned = problem.learned()
    expected = problem.central_difference(learned)
    for mode in MODES:
        found = problem.gradient(learned, mode).gradients["learning_rate"].item()
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_the_exact_meta_gradient(objective):
    problem = Problem(optimizer="Adam")
    learned = problem.learned()
    expected = problem.central_difference(learned, objective=objective)
    for mode in MODES:
        found = problem.gradient(learned, mode, objective=objective).gradients["learning_rate"].item()
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_other_hyperparameters_have_the_exact_meta_gradient(name):
    problem = Problem()
    learned = problem.learned("learning_rate", name)
    expected = problem.central_difference(learned, name)
    for mode in MODES:
        found = problem.gradient(learned, mode).gradients[name].item()
        assert relative_error(found, expected) < 1e-6


def test_the_modes_agree_with_each_other_to_rounding():
    problem = Problem(optimizer="AdamW")
    learned = problem.learned("learning_rate", "betas", "weight_decay")
    forward, reverse = (problem.gradient(learned, mode) for mode in MODES)
    assert forward.value == pytest.approx(reverse.value, rel=1e-14)
    for name in forward.gradients:
        # float64 with a few thousand operations on either side
        torch.testing.assert_close(forward.gradients[name], reverse.gradients[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "clipping", [clip_gradient_norm(0.3), clip_gradient_norm(1.0, norm_type=1.0), clip_gradient_value(0.02)]
)
def test_clipping_is_part_of_the_differentiated_step(clipping):
    problem = Problem()
    learned = problem.learned()
    expected = problem.central_difference(learned, gradient_transformation=clipping)
    unclipped = problem.gradient(learned).gradients["learning_rate"].item()
    assert relative_error(unclipped, expected) > 1e-2  # the clipping does something here
    for mode in MODES:
        result = problem.gradient(learned, mode, gradient_transformation=clipping)
        assert relative_error(result.gradients["learning_rate"].item(), expected) < 1e-6


class LearnedTorchopt(LearnedOptimizer):
    """Any torchopt transformation with a learned rate."""

    def __init__(self, factory, **options):
        super().__init__()
        self.learning_rate = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.factory, self.options = factory, options

    def transformation(self):
        return self.factory(lr=lambda _: 0.02 * self.learning_rate.exp(), **self.options)


@pytest.mark.parametrize("mode", MODES)
def test_any_torchopt_transformation_works(mode):
    problem = Problem()
    learned = LearnedTorchopt(torchopt.adam)
    expected = problem.central_difference(learned, state=None)
    result = problem.gradient(learned, mode, state=None)
    # torchopt 0.7.3 corrects Adam's bias in float32, which limits central differences too
    assert relative_error(result.gradients["learning_rate"].item(), expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_first_order_treats_inner_gradients_as_constants(mode):
    # One parameter, f(w) = w**4 / 4, two steps of SGD: w2 = w1 - eta g1 with g1 held constant.
    def loss(tensors, batch):
        return tensors["w"].pow(4).sum() / 4

    eta, start = 0.1, 1.0
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=eta))
    w = torch.tensor([start], dtype=torch.float64)
    result = meta_gradient(
        loss, {"w": w}, learned, [None] * 2, None, estimator=Unroll(objective="naive", mode=mode, second_order=False)
    )
    g0 = start**3
    g1 = (start - eta * g0) ** 3
    final = start - eta * (g0 + g1)
    assert result.gradients["learning_rate"].item() == pytest.approx(-(final**3) * (g0 + g1) * eta, rel=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_is_passed_in_is_changed(mode):
    problem = Problem("convnet with BatchNorm and dropout")
    tensors = {**dict(problem.net.named_parameters()), **dict(problem.net.named_buffers())}
    state = read_state(problem.optimizer, problem.net.named_parameters())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    momentum = {name: entry["momentum_buffer"].clone() for name, entry in state.items()}
    gradients = {name: p.grad.clone() for name, p in problem.net.named_parameters()}
    learned = problem.learned()
    problem.gradient(learned, mode, state=state)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
    for name, entry in state.items():
        assert torch.equal(entry["momentum_buffer"], momentum[name])
    for name, parameter in problem.net.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
    assert all(parameter.grad is None for parameter in learned.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_follow_the_unroll_and_not_the_meta_batch(mode):
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    seen = []

    def loss(tensors, batch):
        seen.append(tensors["0.running_mean"].clone())
        return functional_call(net, tensors, (batch,)).square().mean()

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
    batches = [torch.full((4, 2), float(k), dtype=torch.float64) + torch.randn(4, 2).double() for k in range(3)]
    meta_gradient(
        loss,
        dict(net.named_parameters()),
        learned,
        batches,
        torch.full((4, 2), 100.0, dtype=torch.float64) + torch.randn(4, 2).double(),
        estimator=Unroll(objective="naive_mean", mode=mode),
        buffers=dict(net.named_buffers()),
    )
    expected = torch.zeros(2, dtype=torch.float64)
    for step, batch in enumerate(batches):  # calls alternate: training batch, meta-batch
        torch.testing.assert_close(seen[2 * step], expected)
        expected = 0.9 * expected + 0.1 * batch.mean(0)
        torch.testing.assert_close(seen[2 * step + 1], expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_without_gradient_is_left_alone_as_in_torch(mode):
    def loss(tensors, batch):
        return (tensors["used"] - 1).square().sum()

    params = {"used": torch.zeros(2).double(), "unused": torch.ones(3).double()}
    for learned in (
        LearnedStepSize().attach(inner_optimizer(torch.optim.Adam, lr=0.1, weight_decay=0.1)),
        LearnedTorchopt(torchopt.sgd, momentum=0.9),
    ):
        result = meta_gradient(loss, params, learned, [None] * 3, None, estimator=Unroll(mode=mode))
        assert result.usable
        assert result.gradients["learning_rate"].item() < 0


def test_the_nan_of_torchopts_adam_at_a_zero_gradient_is_reported_and_not_returned():
    # torchopt 0.7.3 differentiates sqrt at 0 (metaopt/torchopt#26). Our own mirrors do not; when this test fails,
    # torchopt does not either.
    def loss(tensors, batch):
        return (tensors["w"][0] - 1).square()

    learned = LearnedTorchopt(torchopt.adam)
    result = meta_gradient(
        loss, {"w": torch.zeros(2).double()}, learned, [None] * 3, None, estimator=Unroll(mode="forward")
    )
    assert not result.usable
    assert result.diagnostics.overflow
    ours = LearnedStepSize().attach(inner_optimizer(torch.optim.Adam, lr=0.02))
    assert meta_gradient(
        loss, {"w": torch.zeros(2).double()}, ours, [None] * 3, None, estimator=Unroll(mode="forward")
    ).usable


def overshooting(tensors, batch):
    return tensors["w"].pow(4).sum() + 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_diverging_unroll_is_reported_as_truncated_and_its_gradient_is_nan(mode, objective):
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=10.0))
    result = meta_gradient(
        overshooting, {"w": torch.ones(1)}, learned, [None] * 30, None, estimator=Unroll(objective=objective, mode=mode)
    )
    assert not result.usable
    assert result.diagnostics.truncated_step is not None
    assert 3 <= result.diagnostics.truncated_step <= 8
    assert math.isnan(result.gradients["learning_rate"].item())
    assert "diverged" in result.explain()


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_loss_that_overflows_is_reported(mode):
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=10.0))
    result = meta_gradient(
        overshooting, {"w": torch.full((1,), 1000.0)}, learned, [None], None, estimator=Unroll(mode=mode)
    )
    assert result.diagnostics.overflow
    assert not result.usable
    assert math.isnan(result.gradients["learning_rate"].item())


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_loss_of_zero_is_reported_as_underflow(mode):
    def loss(tensors, batch):
        return tensors["w"].square().sum()

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.5))  # arrives exactly
    result = meta_gradient(loss, {"w": torch.ones(2)}, learned, [None], None, estimator=Unroll(mode=mode))
    assert result.diagnostics.underflow
    assert not result.usable
    assert "zero" in result.explain()


@pytest.mark.parametrize("mode", MODES)
def test_the_growth_rate_is_the_lyapunov_exponent_of_a_linear_problem(mode):
    # f(w) = w**2 / 2 + const, so dw/deta and the adjoint grow by |1 - eta| = 1.5 per step (and slowly by the number
    # of steps for dw/deta: t b**(t-1)).
    def loss(tensors, batch):
        return 0.5 * tensors["w"].square().sum() + 1.0

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=2.5))
    result = meta_gradient(
        loss, {"w": torch.ones(1).double()}, learned, [None] * 200, None, estimator=Unroll(mode=mode)
    )
    expected = math.log(1.5)
    slack = math.log(200) / 199 + 1e-12 if mode == "forward" else 1e-12
    assert expected - 1e-12 <= result.diagnostics.growth_rate <= expected + slack


@pytest.mark.parametrize("mode", MODES)
def test_a_meta_gradient_below_the_parameters_number_range_is_still_right(mode):
    # w_t = 1000 * (-0.2)**t: after 40 steps tangent times gradient is 1e-48, which is no float32 number.
    def loss(tensors, batch):
        return 0.5 * tensors["w"].square().sum() + 1.0

    eta, steps = 1.2, 40
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=eta))
    result = meta_gradient(
        loss,
        {"w": torch.full((1,), 1e3)},
        learned,
        [None] * steps,
        None,
        estimator=Unroll(objective="naive", mode=mode),
    )
    # d/deta of w_t**2 / 2, times eta since the meta-parameter is log(eta)
    expected = -1e6 * steps * (1 - eta) ** (2 * steps - 1) * eta
    # float32 rounding of 1 - eta, amplified by the 80th power
    assert result.gradients["learning_rate"].item() == pytest.approx(expected, rel=1e-4)


def test_logarithm_of_a_negative_loss_is_refused_with_a_way_out():
    def loss(tensors, batch):
        return tensors["w"].square().sum() - 5.0

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="objective='naive'"):
        meta_gradient(loss, {"w": torch.ones(1)}, learned, [None], None)
    assert meta_gradient(loss, {"w": torch.ones(1)}, learned, [None], None, estimator=Unroll(objective="naive")).usable


def test_auto_is_forward_for_one_number_reverse_for_many_and_segmented_for_many_steps():
    problem = Problem()
    assert problem.gradient(problem.learned(), "auto").diagnostics.estimator == "forward"
    per_tensor = LearnedStepSize(per="tensor").attach(mirror(problem.optimizer, problem.net.named_parameters()))
    result = problem.gradient(per_tensor, "auto")
    assert result.diagnostics.estimator == "reverse"
    assert "4 scalar" in result.diagnostics.reason
    problem.batches = [problem.batches[0]] * 100
    parameters, batches = dict(problem.net.named_parameters()), problem.batches
    assert meta_gradient(problem.loss, parameters, per_tensor, batches, batches[0]).diagnostics.estimator == "segmented"


def test_meta_gradients_keep_shape_and_dtype_of_their_parameters():
    problem = Problem(dtype=torch.float32)
    result = problem.gradient(problem.learned())
    assert result.gradients["learning_rate"].shape == (1,)
    assert result.gradients["learning_rate"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"parameters": {}}, ValueError, "parameters is empty"),
        ({"estimator": Unroll(steps=2)}, ValueError, r"Unroll\(steps=2\) needs one batch for each step, but 1"),
        ({"estimator": EvolutionStrategies(method="pes")}, ValueError, "Use method='es'"),
        ({"learned": LearnedStepSize()}, ValueError, "nothing to learn"),
        ({"loss": lambda p, b: p["w"]}, TypeError, "shape \\(2,\\)"),
        ({"loss": lambda p, b: 1.0}, TypeError, "float"),
        ({"loss": lambda p, b: p["w"].sum().long()}, TypeError, "int64"),
        ({"loss": lambda p, b: torch.ones(())}, ValueError, "does not depend"),
        ({"loss": lambda p, b: p["w"].detach().sum()}, ValueError, "does not depend"),
    ],
)
def test_bad_input_gets_a_clear_error(change, error, message):
    call = {
        "loss": lambda p, b: p["w"].square().sum(),
        "parameters": {"w": torch.ones(2)},
        "learned": LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1)),
        "batches": [None],
        "meta_batch": None,
        **change,
    }
    with pytest.raises(error, match=message):
        meta_gradient(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "exp"}, "objective='exp'"),
        ({"mode": "magic"}, "mode='magic'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_an_unroll_of_unknown_options_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Unroll(**options)


def test_a_loss_may_cross_zero_under_the_naive_objective():
    # As the negative log-likelihood of a density does: positive at the start, negative at the end.
    def loss(tensors, batch):
        return 0.5 * tensors["w"].square().sum() - 0.3

    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1))
    start = {"w": torch.ones(1, dtype=torch.float64)}
    for mode in MODES:
        result = meta_gradient(loss, start, learned, [None] * 5, None, estimator=Unroll(objective="naive", mode=mode))
        assert result.diagnostics.losses[0] > 0 > result.value and result.usable
        # d/d log(eta) of (1 - eta)**10 / 2 at 0.1
        assert result.gradients["learning_rate"].item() == pytest.approx(-0.1 * 5 * 0.9**9, rel=1e-13)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_weights_add_up(objective):
    weights = objective_weights(objective, 5)
    expected = {
        "naive": 1.0,
        "log": 1 / 5,
        "naive_mean": 1.0,
        "log_mean": sum(1 / k for k in range(1, 6)) / 5,
    }[objective]
    assert sum(weights.values()) == pytest.approx(expected)
