"""The self-check: passes what is right, and names what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_l2l import LearnedHyperparameters
from lightning_l2l.exact.check import check
from lightning_l2l.functional import inner_optimizer


def regression(module, batch):
    return functional.mse_loss(module(batch[0]), batch[1])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)


WEIGHTS = {"w": torch.linspace(-1, 1, 15).reshape(5, 3)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, inputs):
        return self.head(self.cell(inputs.reshape(-1, 2, 2))[0][:, -1])


MODULES = {
    "BatchNorm, ReLU, dropout": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), nn.Flatten(), nn.Linear(4, 1)
    ),
    "LSTM": Recurrent,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_right_module_passes(name, batch):
    torch.manual_seed(0)
    report = check(MODULES[name](), batch, regression)
    assert report.passed, report
    # Central differences in float64: 1e-10 of the loss, the meta-gradient being some per cent of it.
    assert report.meta_gradient_error < 1e-6 and report.curvature_error < 1e-6
    assert "passed" in str(report)


def test_float32_passes_too(batch):
    torch.manual_seed(0)
    report = check(MODULES["LSTM"](), batch, regression, dtype=None)
    assert report.passed and report.dtype == torch.float32


def test_weight_norm_is_named_and_its_error_found(batch):
    torch.manual_seed(0)
    report = check(nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1)), batch, regression)
    assert not report.passed
    assert report.curvature_error > 0.01
    assert "weight_norm: its second derivative is wrong" in str(report)


def test_an_embedding_with_max_norm_is_named():
    module = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 1))
    report = check(module, (torch.tensor([0, 3]), torch.ones(2, 1)), regression)
    assert not report.passed and "Embedding with max_norm (module.0)" in str(report).replace("(0)", "(module.0)")


def test_every_operation_without_a_second_derivative_is_named():
    def loss(params, batch):
        margins = functional.multi_margin_loss(params["w"], torch.zeros(len(params["w"]), dtype=torch.long))
        return margins + functional.embedding_bag(torch.tensor([[1, 2]]), params["w"]).square().sum()

    report = check(loss, None, params=WEIGHTS)
    assert set(report.without_second_derivative) == {"multi_margin_loss_backward", "_embedding_bag_backward"}
    assert not report.passed and "only estimator='es'" in str(report)


class Square(torch.autograd.Function):
    """The square, with a backward that forgets where its input came from."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().clone()
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.x


class OnceSquare(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.x


@pytest.mark.parametrize("function", [Square, OnceSquare])
def test_a_custom_function_with_a_wrong_second_derivative_is_named(function):
    report = check(lambda params, batch: function.apply(params["w"]).square().sum(), None, params=WEIGHTS)
    assert not report.passed
    assert report.curvature_error > 0.1
    assert function.__name__ in str(report)


def test_a_detached_part_is_suspected():
    report = check(lambda p, _: (p["w"] * p["w"].detach()).square().sum(), None, params=WEIGHTS)
    assert not report.passed and ".detach()" in str(report)


def test_a_loss_with_randomness_of_its_own_is_told():
    own = torch.Generator().manual_seed(0)
    report = check(lambda p, _: (p["w"] * torch.rand((), generator=own)).square().sum(), None, params=WEIGHTS)
    assert not report.passed and "generator of its own" in str(report)


def test_a_linear_loss_passes():
    assert check(lambda params, _: params["w"].sum(), None, params=WEIGHTS).passed


def test_parameters_without_influence_are_told():
    report = check(lambda p, _: p["w"].square().sum(), None, params={**WEIGHTS, "unused": torch.ones(2)})
    assert report.passed and report.without_gradient == ("unused",)


def test_any_learned_optimizer_is_checked(batch):
    inner = inner_optimizer(torch.optim.Adam, lr=0.01)
    learned = LearnedHyperparameters(("learning_rate", "beta1", "eps")).attach(inner)
    torch.manual_seed(0)
    assert check(MODULES["LSTM"](), batch, regression, learned=learned).passed


def test_a_module_with_a_training_step_needs_no_loss_function(batch):
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def log(self, *_):
            raise RuntimeError("there is no trainer")

        def training_step(self, batch, batch_idx):
            loss = regression(self.net, batch)
            self.log("loss", loss)
            return {"loss": loss}

    assert check(Stepping(), batch).passed
    with pytest.raises(TypeError, match="has no training_step"):
        check(nn.Linear(4, 1), batch)
    with pytest.raises(TypeError, match="needs params"):
        check(lambda params, batch: params["w"].sum(), batch)


def test_a_check_changes_nothing(batch):
    module = MODULES["BatchNorm, ReLU, dropout"]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check(module, batch, regression)
    assert torch.equal(torch.rand(1), expected)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"params": {}}, "no parameter that requires a gradient"),
        ({"params": {"w": torch.tensor([torch.nan])}}, "The loss is nan at the start"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        check(lambda params, _: params["w"].square().sum(), None, **{"params": WEIGHTS, **options})


def test_a_frozen_module_has_nothing_to_check(batch):
    with pytest.raises(ValueError, match="Unfreeze"):
        check(nn.Linear(4, 1).requires_grad_(False), batch, regression)
