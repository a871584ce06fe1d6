"""The LSTM optimizer against torch's own LSTM cells."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_l2l import LSTMOptimizer, meta_gradient


def cells_of(learned):
    cells = []
    for weight, bias in zip(learned.gate_weights, learned.gate_biases, strict=True):
        inputs = weight.shape[1] - learned.hidden_size
        cell = torch.nn.LSTMCell(inputs, learned.hidden_size).double()
        with torch.no_grad():
            # torch's order of the gates is input, forget, cell, output; ours input, cell, forget, output.
            enter, candidate, forget, leave = weight.chunk(4)
            rows = torch.cat([enter, forget, candidate, leave])
            cell.weight_ih.copy_(rows[:, :inputs])
            cell.weight_hh.copy_(rows[:, inputs:])
            enter, candidate, forget, leave = bias.chunk(4)
            cell.bias_ih.copy_(torch.cat([enter, forget + 1.0, candidate, leave]))
            cell.bias_hh.zero_()
        cells.append(cell)
    return cells


@torch.no_grad()
@pytest.mark.parametrize("preprocessing", ["log_and_sign", "raw"])
def test_equals_two_torch_lstm_cells_for_each_coordinate(preprocessing):
    torch.manual_seed(0)
    learned = LSTMOptimizer(preprocessing=preprocessing).double()
    for bias in learned.gate_biases:
        bias.normal_()
    cells = cells_of(learned)
    parameters = {"w": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    optimizer = learned.transformation()
    state = optimizer.init(parameters)
    memory = [(torch.zeros(10, 20, dtype=torch.float64),) * 2 for _ in cells]
    for scale in (1.0, 1e-3, 0.1):
        gradients = {name: scale * torch.randn_like(tensor) for name, tensor in parameters.items()}
        flat = torch.cat([gradients["w"].flatten(), gradients["b"]])
        values = flat[:, None]
        if preprocessing == "log_and_sign":
            logarithm = (torch.log(flat.abs() + torch.finfo(torch.float64).eps) / 5.0).clamp(min=-1.0)
            values = torch.stack([logarithm, (flat * math.exp(5.0)).clamp(-1.0, 1.0)], dim=1)
        for index, cell in enumerate(cells):
            memory[index] = cell(values, memory[index])
            values = memory[index][0]
        step = values @ learned.output.weights[0].T + learned.output.biases[0]
        updates, state = optimizer.update(gradients, state, params=parameters)
        found = torch.cat([updates["w"].flatten(), updates["b"]])
        torch.testing.assert_close(found, -0.01 * step[:, 0], rtol=1e-12, atol=1e-15)


def test_preprocessing_is_continuous_where_it_changes():
    learned = LSTMOptimizer().double()
    edge = math.exp(-5.0)
    around = torch.tensor([edge * (1 - 1e-9), edge * (1 + 1e-9), -edge, 0.0], dtype=torch.float64)
    logarithm, sign = learned.inputs(around)
    assert logarithm.tolist() == pytest.approx([-1.0, -1.0, -1.0, -1.0], abs=1e-8)
    assert sign.tolist() == pytest.approx([1.0, 1.0, -1.0, 0.0], abs=1e-8)


def test_state_is_carried_from_one_unroll_to_the_next():
    torch.manual_seed(0)
    learned = LSTMOptimizer(hidden_size=3)

    def loss(parameters, batch):
        return (parameters["w"] - batch).square().sum()

    start = {"w": torch.ones(3)}
    optimizer = learned.transformation()
    _, state = optimizer.update({"w": torch.ones(3)}, optimizer.init(start), params=start)
    fresh = meta_gradient(loss, start, learned, [0.0, 0.5], 1.5)
    carried = meta_gradient(loss, start, learned, [0.0, 0.5], 1.5, state=state)
    assert fresh.value != carried.value


def test_zero_output_starts_at_rest():
    optimizer = LSTMOptimizer(initial_output="zero").transformation()
    parameters = {"w": torch.randn(3)}
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
    assert updates["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": 0}, {"preprocessing": "log"}, {"preprocessing_range": 0.0}, {"initial_output": "ones"}],
)
def test_refuses_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LSTMOptimizer(**wrong)
