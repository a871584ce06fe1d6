"""The live optimizer as a pure function: what LearnToLearn needs to go on meta-training it in the user's run."""

from __future__ import annotations

import pytest
import torch
from test_as_torch_optimizer import KINDS, made, network, train

from lightning_l2l import meta_gradient


def functional_loss(model):
    def loss(parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        return (torch.func.functional_call(model, parameters, (inputs,)) - targets).square().mean()

    return loss


@KINDS
@pytest.mark.parametrize("fresh", [False, True])
def test_the_mirror_does_what_the_next_steps_do(kind, fresh):
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1}, {"params": model[2].parameters()}]
    optimizer = made(kind).as_torch_optimizer(groups)
    if not fresh:
        train(model, optimizer, range(2))
    mirror = optimizer.mirror(model.named_parameters())
    state = optimizer.read_state()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    transformation = mirror.transformation()
    for seed in range(5, 8):
        with torch.enable_grad():
            leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
            gradients = torch.autograd.grad(functional_loss(model)(leaves, seed), list(leaves.values()))
        given = dict(zip(leaves, gradients, strict=True))
        with torch.no_grad():
            updates, state = transformation.update(given, state, params=parameters, inplace=False)
            parameters = {name: tensor.detach() + updates[name] for name, tensor in parameters.items()}
    train(model, optimizer, range(5, 8))
    for name, parameter in model.named_parameters():
        # The live step multiplies in place, the mirror adds: two roundings of 6e-8 in each of three steps.
        torch.testing.assert_close(parameter, parameters[name], rtol=2e-6, atol=1e-7)


def test_a_meta_step_through_the_mirror_changes_the_live_optimizer():
    model = network()
    optimizer = made("mlp").as_torch_optimizer(model.parameters(), weight_decay=0.01)
    train(model, optimizer, range(3))
    mirror = optimizer.mirror(model.named_parameters())
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    loss = functional_loss(model)

    def look_ahead():
        return meta_gradient(loss, parameters, mirror, [5, 6, 7], 8, state=optimizer.read_state(), objective="naive")

    result = look_ahead()
    assert result.gradients.keys() == {name for name, _ in mirror.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    length = sum(gradient.square().sum() for gradient in result.gradients.values())
    change = 1e-3 * result.value / length.item()
    mirror.set_({name: p.detach() - change * result.gradients[name] for name, p in mirror.named_parameters()})
    after = look_ahead().value
    # To first order the meta-loss falls by 1e-3 of itself.
    assert result.value - after == pytest.approx(1e-3 * result.value, rel=0.05)
    train(model, optimizer, range(5, 8))
    assert loss(parameters, 8).item() == pytest.approx(after, rel=1e-5)


def test_the_mirror_refuses_parameters_that_it_cannot_name():
    model = network()
    optimizer = made("tiny").as_torch_optimizer(model.parameters())
    with pytest.raises(ValueError, match="not among the named parameters"):
        optimizer.mirror(model[0].named_parameters())
