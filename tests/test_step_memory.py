"""Counting the memory of a step: what is not known is said to be so, and what fails is not taken for it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_l2l import LearnedStepSize
from lightning_l2l.exact import step_memory
from lightning_l2l.exact.inner_step import InnerStep
from lightning_l2l.exact.step_memory import StepMemory, free_memory, measure_step
from lightning_l2l.functional import inner_optimizer

PARAMETERS = {"w": torch.ones(3)}


def measured(loss: Any) -> StepMemory | None:
    step = InnerStep(loss, LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=0.1)))
    return measure_step(step, step.start(PARAMETERS, None, {}), None)


def test_an_unknown_estimator_has_no_memory_to_predict() -> None:
    found = measured(lambda parameters, _: parameters["w"].square().sum())
    assert found is not None
    with pytest.raises(ValueError, match="no estimator 'backward'"):
        found.need("backward", steps=10, meta_parameters=1)


def test_an_error_of_the_loss_is_not_taken_for_memory_that_cannot_be_counted() -> None:
    def broken(parameters: dict[str, Tensor], _: Any) -> Tensor:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        measured(broken)


def test_an_error_of_the_second_derivative_is_not_taken_for_a_missing_one() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor) -> Tensor:
            context.save_for_backward(value)
            return value.square()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            (value,) = context.saved_tensors
            return FailsTwice.apply(value) * gradient

    class FailsTwice(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor) -> Tensor:
            return 2 * value

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("broken in the second derivative")

    with pytest.raises(RuntimeError, match="broken in the second derivative"):
        measured(lambda parameters, _: Fails.apply(parameters["w"]).sum())


def test_a_loss_without_curvature_misses_no_second_derivative() -> None:
    found = measured(lambda parameters, _: parameters["w"].sum())
    assert found is not None and found.missing is None


def test_free_memory_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(step_memory, "open", nowhere, raising=False)
    assert free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(step_memory, "open", lambda path: io.StringIO("MemTotal: 8 kB\n"), raising=False)
    assert free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(step_memory, "open", lambda path: io.StringIO("MemAvailable: 8 kB\n"), raising=False)
    assert free_memory(torch.device("cpu")) == 8192


def test_free_memory_of_a_gpu_is_the_devices_not_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda")) == 123
