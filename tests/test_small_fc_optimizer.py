"""The 39-feature optimizer against a second implementation, tensor by tensor, of learned_optimization's formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_l2l import SmallFCOptimizer, TinyOptimizer
from lightning_l2l.learned.layout import Layout

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
def test_features_and_updates_equal_the_formulas(moved):
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


def test_meta_parameter_counts_are_the_published_ones():
    def count(learned):
        return sum(parameter.numel() for parameter in learned.parameters())

    assert count(SmallFCOptimizer()) == 197
    assert count(SmallFCOptimizer(hidden_size=32)) == 2402 + 7
    assert count(TinyOptimizer()) == 24


def test_projection_keeps_decays_between_zero_and_one():
    learned = SmallFCOptimizer()
    learned.set_({"momentum_decays.offset": torch.tensor([5.0, -5.0, 0.0])})
    learned.project_()
    decays = 1 - learned.momentum_decays.weights()
    assert decays[0].item() == pytest.approx(0.0, abs=1e-5)
    assert decays[1].item() == pytest.approx(1 - 1e-7, abs=1e-9)
    assert decays[2].item() == pytest.approx(0.999, rel=1e-12)


@torch.no_grad()
def test_tiny_optimizer_equals_its_formula():
    torch.manual_seed(0)
    learned = TinyOptimizer().double()
    optimizer = learned.transformation()
    parameters = {"w": torch.randn(3, 2, dtype=torch.float64)}
    state = optimizer.init(parameters)
    m, v = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for seed in range(3):
        g = tensors(seed)["a"][:3, :2].contiguous()
        m, v = 0.9 * m + 0.1 * g.flatten(), 0.999 * v + 0.001 * g.flatten() ** 2
        features = torch.stack([m, m * (v + 1e-6).rsqrt()])
        features = features * (1e-5 + features.square().mean(1, keepdim=True)).rsqrt()
        updates, state = optimizer.update({"w": g}, state, params=parameters)
        torch.testing.assert_close(updates["w"].flatten(), -network(learned, features), rtol=1e-10, atol=1e-15)
