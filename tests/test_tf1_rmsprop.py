"""TensorFlow 1's RMSProp against numbers that TensorFlow printed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l.learned import TF1RMSProp

FIXTURE = np.load(Path(__file__).parent / "data" / "tf1_rmsprop.npz")


def test_reproduces_tensorflow():
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = TF1RMSProp([w], lr=0.01, decay=0.9, eps=1e-10)
    for gradient, value in zip(FIXTURE["grads"], FIXTURE["values"], strict=True):
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        # The fixture is TensorFlow's float32 result.
        assert w.item() == pytest.approx(value, rel=1e-6)


def test_momentum_follows_the_formula():
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = TF1RMSProp([w], lr=0.1, decay=0.5, momentum=0.9, eps=1e-3)
    square, buffer, expected = 1.0, 0.0, 1.0
    for gradient in (2.0, -1.0, 0.5):
        square = 0.5 * square + 0.5 * gradient**2
        buffer = 0.9 * buffer + 0.1 * gradient / (square + 1e-3) ** 0.5
        expected -= buffer
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert w.item() == pytest.approx(expected, rel=1e-14)


def test_resumes_to_the_last_bit():
    def steps(w, optimizer, count):
        for number in range(count):
            optimizer.zero_grad()
            (w.sin().sum() * (number + 1)).backward()
            optimizer.step()

    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = TF1RMSProp([w], momentum=0.5)
    steps(w, optimizer, 3)
    again = torch.nn.Parameter(w.detach().clone())
    resumed = TF1RMSProp([again], momentum=0.5)
    # torch's own load_state_dict shares tensors, and this optimizer changes them in place.
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(w, optimizer, 3)
    steps(again, resumed, 3)
    assert torch.equal(w, again)


def test_closure_and_missing_gradients():
    w, idle = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = TF1RMSProp([w, idle])

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert w.item() < 1.0
    assert idle.item() == 1.0


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"decay": 1.0}, {"momentum": -0.1}, {"eps": -1e-3}])
def test_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TF1RMSProp([torch.nn.Parameter(torch.ones(1))], **wrong)
