"""The state of a live learned optimizer: saved, loaded, copied; a run goes on from it to the last bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from test_as_torch_optimizer import KINDS, MAKERS, made, network, same, train


@KINDS
def test_resumes_to_the_last_bit_from_a_weights_only_checkpoint(kind):
    model = network()
    optimizer = made(kind).as_torch_optimizer(model.parameters())
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, range(3, 6))

    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    again = network()
    again.load_state_dict(loaded["model"])
    torch.manual_seed(99)
    resumed = MAKERS[kind]().as_torch_optimizer(again.parameters())  # with other meta-parameters, at first
    resumed.load_state_dict(loaded["optimizer"])
    train(again, resumed, range(3, 6))
    assert same(model, again)


def test_the_horizon_counts_the_steps_before_the_interruption():
    model, learned = network(), made("tiny")
    learned.horizon = 2
    optimizer = learned.as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    resumed = learned.as_torch_optimizer(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="now in step 3"):
        train(model, resumed, range(1))


@KINDS
def test_a_saved_state_is_a_snapshot(kind):
    model = network()
    optimizer = made(kind).as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()["learned"]
    before = copy.deepcopy(saved)
    train(model, optimizer, range(2))
    with torch.no_grad():
        for parameter in optimizer.learned.parameters():
            parameter.add_(1.0)

    def equal(left, right):
        if isinstance(left, torch.Tensor):
            return torch.equal(left, right)
        if isinstance(left, dict):
            return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
        if isinstance(left, (list, tuple)):
            return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
        return left == right

    assert equal(saved, before)


def test_foreign_and_unfitting_states_are_refused():
    model = network()
    optimizer = made("tiny").as_torch_optimizer(model.parameters())
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="other meta-parameters"):
        made("mlp").as_torch_optimizer(model.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="does not have"):
        named = made("tiny").as_torch_optimizer(model.named_parameters())
        named.load_state_dict(optimizer.state_dict())


@KINDS
def test_a_copy_goes_on_as_the_original(kind):
    model = network()
    optimizer = made(kind).as_torch_optimizer(model.parameters())
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2))
    train(twin, twin_optimizer, range(2))
    assert same(model, twin)
