"""Each neural optimizer against its source: numbers from the paper's code, published formulas, torch's LSTM cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l import LSTMOptimizer, MLPOptimizer, SmallFCOptimizer, TensorwiseOptimizer, Unroll, meta_gradient
from lightning_l2l.exact.episodes import Episode
from lightning_l2l.learned.layout import Layout

DATA = Path(__file__).parent / "data"
UPDATE = np.load(DATA / "mlp_optimizer_update.npz")
UNROLL = np.load(DATA / "mlp_optimizer_unroll_train_by_train.npz")
# Meta-parameter, the reference's name, and whether it holds the transpose.
NAMES = {
    "network.weights.0": ("W1", True),
    "network.biases.0": ("b1", False),
    "network.weights.1": ("W2", True),
    "network.biases.1": ("b2", False),
}


def reference_optimizer(fixture):
    learned = MLPOptimizer()
    arrays = {name: (torch.from_numpy(fixture[key]), transposed) for name, (key, transposed) in NAMES.items()}
    learned.set_({name: array.T if transposed else array for name, (array, transposed) in arrays.items()})
    return learned


def relative(found, expected):
    """Largest difference relative to the largest entry: an entry that cancels to zero has no digits of its own."""
    expected = torch.as_tensor(expected)
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def count(learned):
    return sum(parameter.numel() for parameter in learned.parameters())


def test_the_numbers_of_meta_parameters_are_the_published_ones():
    assert count(MLPOptimizer()) == 1090
    assert count(SmallFCOptimizer()) == 197
    assert count(SmallFCOptimizer(hidden_size=32)) == 2402 + 7
    assert count(LSTMOptimizer()) == 5141


@torch.no_grad()
def test_mlp_features_updates_and_averages_equal_the_reference_over_twelve_steps():
    learned = reference_optimizer(UPDATE)
    optimizer = learned.transformation()
    parameters = {"w": torch.from_numpy(UPDATE["param"][0])}
    state, layout = optimizer.init(parameters), Layout.of(parameters)
    for number in range(12):
        gradient = torch.from_numpy(UPDATE["grads"][number])
        features, time, _ = learned.features(gradient.flatten(), parameters["w"].flatten(), state, layout)
        found = torch.cat([features.T, time.expand(35, 9)], dim=1)
        for column in range(31):
            # float32: 1e-5 of the feature's size.
            assert relative(found[:, column], UPDATE["features"][number][:, column]) < 1e-5, (number, column)
        updates, state = optimizer.update({"w": gradient}, state, params=parameters)
        step = torch.from_numpy(UPDATE["param"][number + 1] - UPDATE["param"][number])
        # The fixture has rounded parameters of size one, whose difference has that rounding, 6e-8.
        torch.testing.assert_close(updates["w"], step, rtol=1e-5, atol=3e-7)
        parameters = {"w": parameters["w"] + updates["w"]}
        assert relative(parameters["w"], UPDATE["param"][number + 1]) < 1e-5
    for index in range(5):
        assert relative(state["momenta"][index], UPDATE[f"state_ms_{index}"].ravel()) < 1e-5
        assert relative(state["second_moments"][index], UPDATE[f"state_rms_{index}"].ravel()) < 1e-5
    assert state["step"].item() == UPDATE["state_step"].item()


def classifier(parameters, batch):
    inputs, labels = batch
    hidden = torch.relu(inputs @ parameters["0"] + parameters["1"])
    hidden = torch.relu(hidden @ parameters["2"] + parameters["3"])
    return torch.nn.functional.cross_entropy(hidden @ parameters["4"] + parameters["5"], labels)


@pytest.mark.parametrize("second_order", [False, True])
def test_mlp_meta_gradients_equal_the_reference_over_two_truncated_unrolls(second_order):
    """The reference's meta-objective is the mean of the losses at w_0 ... w_(K-1).

    ``naive_mean`` over K - 1 steps is the mean at w_1 ... w_(K-1), and the loss at w_0 does not depend on the
    meta-parameters; so value and gradient follow from it. The last step is taken by an unroll of its own.
    """
    learned = reference_optimizer(UNROLL)
    estimator = Unroll(objective="naive_mean", mode="reverse", second_order=second_order)
    inputs, labels = torch.from_numpy(UNROLL["data"]), torch.from_numpy(UNROLL["labels"]).long()
    start = {str(i): torch.from_numpy(UNROLL[f"init{i}"]) for i in range(6)}
    episode = Episode.begin(learned, start, estimator=estimator)
    for unroll in range(2):
        batches = [(inputs[chosen], labels[chosen]) for chosen in torch.from_numpy(UNROLL[f"batches{unroll}"])]
        prefix = f"second{int(second_order)}_val0_unroll{unroll}_"
        share = (len(batches) - 1) / len(batches)
        first = classifier(episode.iterate.parameters, (inputs, labels)).item()
        result, episode = episode.unroll(classifier, learned, batches[:-1], (inputs, labels))
        value = first / len(batches) + share * result.value
        assert value == pytest.approx(UNROLL[prefix + "metaobj"].item(), rel=1e-6)
        for name, (key, transposed) in NAMES.items():
            gradient = result.gradients[name] * share
            found = gradient.T if transposed else gradient
            assert relative(found, UNROLL[f"{prefix}d{key}"]) < 1e-5, (unroll, key)
        _, episode = episode.unroll(classifier, learned, batches[-1:], (inputs, labels))
    # Else the two orders could not be told apart.
    difference = UNROLL["second1_val0_unroll0_dW1"] - UNROLL["second0_val0_unroll0_dW1"]
    assert np.abs(difference).max() > 1e-3 * np.abs(UNROLL["second0_val0_unroll0_dW1"]).max()


def test_initialisations_are_what_they_say():
    torch.manual_seed(0)
    weight = MLPOptimizer(hidden_size=1000).network.weights[0]
    assert weight.std().item() == pytest.approx(1.0, abs=0.02)
    assert MLPOptimizer().network.biases[1].tolist() == pytest.approx([0.1, 0.1])
    scaled = MLPOptimizer(hidden_size=1000, initialisation="scaled").network.weights[0]
    # A normal distribution cut off at two deviations has 0.88 of the deviation.
    assert scaled.std().item() == pytest.approx(0.88 / 31**0.5, rel=0.03)


SHAPES = {"a": (4, 3), "b": (3,), "c": (), "d": (2, 3, 3, 5), "e": (3, 3), "f": (4, 3), "g": (1, 6), "h": (3, 4)}
DECAYS = (0.9, 0.99, 0.999)


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def safe_rsqrt(x):
    return x.clamp(min=1e-9).rsqrt()


class OneTensor:
    """adafac_mlp_lopt.py and common.py for one tensor, loops and all."""

    def __init__(self, shape):
        self.shape = shape
        order = sorted(range(len(shape)), key=lambda position: (shape[position], position))
        self.factored = len(shape) >= 2
        if self.factored:
            self.second, self.largest = order[-2], order[-1]
        self.m = [torch.zeros(shape, dtype=torch.float64) for _ in DECAYS]
        self.v = torch.zeros(shape, dtype=torch.float64)
        self.row, self.column, self.full = [0.0] * 3, [0.0] * 3, [0.0] * 3
        self.t = 0

    def features(self, p, g, momentum_decays=DECAYS, rms_decay=0.999, factored_decays=DECAYS):
        for i, decay in enumerate(momentum_decays):
            self.m[i] = decay * self.m[i] + (1 - decay) * g
        self.v = rms_decay * self.v + (1 - rms_decay) * g * g
        root = (self.v + 1e-6).rsqrt()
        groups = [[g], [p], self.m, [self.v], [m * root for m in self.m], [root]]
        fac_g, rows, columns, row_roots, column_roots, fac_m = [], [], [], [], [], []
        square = g * g + 1e-30
        for i, decay in enumerate(factored_decays):
            if self.factored:
                self.row[i] = decay * self.row[i] + (1 - decay) * square.mean(self.largest, keepdim=True)
                self.column[i] = decay * self.column[i] + (1 - decay) * square.mean(self.second, keepdim=True)
                row_factor = safe_rsqrt(self.row[i] / (self.row[i].mean(self.second, keepdim=True) + 1e-9))
                column_factor = safe_rsqrt(self.column[i])
                fac_g.append(g * row_factor * column_factor)
                rows.append(self.row[i].expand(self.shape))
                columns.append(self.column[i].expand(self.shape))
                row_roots.append((self.row[i] + 1e-8).rsqrt().expand(self.shape))
                column_roots.append((self.column[i] + 1e-8).rsqrt().expand(self.shape))
                fac_m.append(self.m[i] * row_factor * column_factor)
            else:
                self.full[i] = decay * self.full[i] + (1 - decay) * square
                fac_g.append(g * safe_rsqrt(self.full[i] + 1e-9))
                rows.append(self.full[i])
                columns.append(self.full[i])
                row_roots.append((self.full[i] + 1e-8).rsqrt())
                column_roots.append((self.full[i] + 1e-8).rsqrt())
                fac_m.append(self.m[i] * (self.full[i] + 1e-6) ** -0.5)
        groups += [fac_g, rows, columns, row_roots, column_roots, fac_m]
        stacked = torch.stack([feature.reshape(-1) for group in groups for feature in group])
        stacked = stacked * (1e-5 + stacked.square().mean(1, keepdim=True)).rsqrt()
        scales = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
        time = torch.tensor([math.tanh(self.t / scale - 1.0) for scale in scales], dtype=torch.float64)
        self.t += 1
        return torch.cat([stacked, time[:, None].expand(-1, stacked.shape[1])])


def network(learned, features, exponent=1e-3):
    values = features
    for index, (weight, bias) in enumerate(zip(learned.network.weights, learned.network.biases, strict=True)):
        values = weight @ (values.relu() if index else values) + bias[:, None]
    return learned.step_multiplier * values[0] * torch.exp(exponent * values[1])


@torch.no_grad()
@pytest.mark.parametrize("moved", [False, True])
def test_small_fc_features_and_updates_equal_the_formulas(moved):
    torch.manual_seed(0)
    learned = SmallFCOptimizer().double()
    decays = (DECAYS, 0.999, DECAYS)
    if moved:
        for kind in (learned.momentum_decays, learned.second_moment_decay, learned.factored_decays):
            kind.offset.copy_(0.05 * torch.randn_like(kind.offset))
        now = [
            [
                1 - math.exp(10 * (math.log(1 - decay) / 10 + offset))
                for decay, offset in zip(initial, kind.offset, strict=True)
            ]
            for initial, kind in (
                (DECAYS, learned.momentum_decays),
                ((0.999,), learned.second_moment_decay),
                (DECAYS, learned.factored_decays),
            )
        ]
        decays = (now[0], now[1][0], now[2])
    optimizer = learned.transformation()
    parameters = tensors(0)
    singles = {name: OneTensor(shape) for name, shape in SHAPES.items()}
    state = optimizer.init(parameters)
    layout = Layout.of(parameters)
    for number in range(4):
        gradients = tensors(number + 1)
        flat = (layout.flatten(gradients, torch.float64), layout.flatten(parameters, torch.float64))
        features, time, _ = learned.features(*flat, state, layout)
        parts = dict(zip(layout.names, features.split(layout.sizes, dim=1), strict=True))
        updates, state = optimizer.update(gradients, state, params=parameters)
        for name in SHAPES:
            expected = singles[name].features(parameters[name], gradients[name], *decays)
            found = torch.cat([parts[name], time[:, None].expand(-1, parts[name].shape[1])])
            assert found.shape[0] == 39
            # The same float64 formulas, summed in another order.
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            step = network(learned, expected).reshape(SHAPES[name])
            torch.testing.assert_close(updates[name], -step, rtol=1e-9, atol=1e-15)
        parameters = {name: tensor + updates[name] for name, tensor in parameters.items()}


def test_small_fc_projection_keeps_decays_between_zero_and_one():
    learned = SmallFCOptimizer()
    learned.set_({"momentum_decays.offset": torch.tensor([5.0, -5.0, 0.0])})
    learned.project_()
    decays = 1 - learned.momentum_decays.weights()
    assert decays[0].item() == pytest.approx(0.0, abs=1e-5)
    assert decays[1].item() == pytest.approx(1 - 1e-7, abs=1e-9)
    assert decays[2].item() == pytest.approx(0.999, rel=1e-12)


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
def test_lstm_equals_two_torch_lstm_cells_for_each_coordinate(preprocessing):
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


def test_lstm_preprocessing_is_continuous_where_it_changes():
    learned = LSTMOptimizer().double()
    edge = math.exp(-5.0)
    around = torch.tensor([edge * (1 - 1e-9), edge * (1 + 1e-9), -edge, 0.0], dtype=torch.float64)
    logarithm, sign = learned.inputs(around)
    assert logarithm.tolist() == pytest.approx([-1.0, -1.0, -1.0, -1.0], abs=1e-8)
    assert sign.tolist() == pytest.approx([1.0, 1.0, -1.0, 0.0], abs=1e-8)


def test_lstm_state_is_carried_from_one_unroll_to_the_next():
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


def tensorwise_step_of_one_tensor(learned, p, g, m, v, growth, t):
    """The step of one tensor, in the words of the docstring, and its next growth; ``m`` and ``v`` change in place."""
    (s1, s2), (e1, e2, e3), (b1, b2), (k, c) = (x.tolist() for x in learned.parameters())
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    if m[0].norm() > 0:
        cosine = ((g * m[0]).sum() / (g.norm() * m[0].norm())).item()
        growth = max(-4.0, min(4.0, growth + k * (cosine - c) * 10 / (t + 9)))
    for average, value, decay in ((m[0], g, 0.9), (m[1], g, 0.99), (v, g * g, 0.999)):
        average.mul_(decay).add_((1 - decay) * value)
    hats = [x / (1 - decay**t) for x, decay in ((m[0], 0.9), (m[1], 0.99), (v, 0.999))]
    u = (hats[0] + b1 * g + b2 * hats[1]) / (hats[2] + 1e-6 * hats[2].mean()).sqrt()
    size = s2
    if p.dim() > 1:
        size = s1 + e1 * math.log(p.numel() / p.shape[0] / 16) + e2 * math.log(max(rms(p), 0.01) / 0.2)
    return rms(u) ** -e3 * math.exp(growth + size) * u, growth


@torch.no_grad()
def test_tensorwise_updates_equal_the_formulas():
    torch.manual_seed(0)
    learned = TensorwiseOptimizer().double()
    learned.set_({name: 0.3 * torch.randn_like(parameter) for name, parameter in learned.named_parameters()})
    parameters = tensors(0)
    parameters["f"] *= 1e-3  # smaller than what counts
    optimizer = learned.transformation()
    state = optimizer.init(parameters)
    averages = {n: ([torch.zeros_like(p), torch.zeros_like(p)], torch.zeros_like(p)) for n, p in parameters.items()}
    growth = dict.fromkeys(parameters, 0.0)
    for number in range(4):
        gradients = tensors(number + 1)
        updates, state = optimizer.update(gradients, state, params=parameters)
        for name, parameter in parameters.items():
            step, growth[name] = tensorwise_step_of_one_tensor(
                learned, parameter, gradients[name], *averages[name], growth[name], number + 1
            )
            # Floors of 1e-24 under squares of order one.
            torch.testing.assert_close(updates[name], -step, rtol=1e-9, atol=1e-11)
        parameters = {name: tensor + updates[name] for name, tensor in parameters.items()}
    assert count(learned) == 9
