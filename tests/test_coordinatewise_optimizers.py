"""What all neural optimizers promise: derivatives, batching, missing gradients, independence of the tensors."""

from __future__ import annotations

import pytest
import torch

from lightning_l2l import LSTMOptimizer, MLPOptimizer, SmallFCOptimizer, TinyOptimizer
from lightning_l2l.exact.meta_gradient import meta_gradient

# Small, so that forward mode over all meta-parameters is quick.
MAKERS = {
    "mlp": lambda **kw: MLPOptimizer(hidden_size=2, step_multiplier=0.05, initialisation="scaled", **kw),
    "small_fc": lambda **kw: SmallFCOptimizer(hidden_size=2, step_multiplier=0.05, **kw),
    "tiny": lambda **kw: TinyOptimizer(step_multiplier=0.05, **kw),
    "lstm": lambda **kw: LSTMOptimizer(hidden_size=2, step_multiplier=0.1, **kw),
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))
SHAPES = {"matrix": (3, 2), "vector": (3,), "scalar": (), "cube": (2, 2, 3), "other": (3, 2)}


def make(kind, **kw):
    torch.manual_seed(1)
    learned = MAKERS[kind](**kw).double()
    # Biases off zero: where all units of a small network are dead its output is the last bias, and normalising a
    # zero output has a derivative of 1e-9**-1/2, whose curvature no difference quotient resolves.
    biases = {name: 0.3 * torch.randn_like(p) for name, p in learned.named_parameters() if "biases" in name}
    learned.set_(biases)
    return learned


def tensors(seed, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def loss(parameters, batch):
    """Smooth, coupled, and far from quadratic."""
    value = parameters["scalar"].sin() + 2.0
    for name in ("matrix", "vector", "cube"):
        value = value + (parameters[name] * batch[name]).sin().sum() + 0.1 * parameters[name].pow(4).sum()
    return value + (parameters["matrix"].sum() * parameters["vector"].sum()).cos() + parameters["other"].square().sum()


BATCHES = [tensors(seed) for seed in (10, 11, 12)]


def value_of(learned):
    return meta_gradient(loss, tensors(0), learned, BATCHES, BATCHES[0], objective="naive_mean").value


@KINDS
@pytest.mark.parametrize("normalise_output", [False, True])
def test_meta_gradient_equals_central_differences(kind, normalise_output):
    learned = make(kind, normalise_output=normalise_output)
    result = meta_gradient(loss, tensors(0), learned, BATCHES, BATCHES[0], objective="naive_mean", estimator="reverse")
    torch.manual_seed(2)
    direction = {name: torch.randn_like(parameter) for name, parameter in learned.named_parameters()}
    size = 1e-6
    ends = []
    for sign in (1, -1):
        moved = {name: p.detach() + sign * size * direction[name] for name, p in learned.named_parameters()}
        other = make(kind, normalise_output=normalise_output)
        other.set_(moved)
        ends.append(value_of(other))
    expected = (ends[0] - ends[1]) / (2 * size)
    found = sum((result.gradients[name] * along).sum().item() for name, along in direction.items())
    assert abs(expected) > 1e-6
    # Rounding gives 1e-16 / 1e-6, truncation 1e-12 times third derivatives.
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@KINDS
def test_forward_and_reverse_mode_agree(kind):
    learned = make(kind)
    if kind in ("mlp", "small_fc"):
        # Forward mode pays for each of its 62 or 78 numbers; central differences cover them.
        learned.network.weights[0].requires_grad_(False)
    found = [
        meta_gradient(loss, tensors(0), learned, BATCHES[:2], BATCHES[2], estimator=name).gradients
        for name in ("forward", "reverse")
    ]
    for name, gradient in found[0].items():
        # Two orders of summation of the same float64 numbers.
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-14)
    assert max(gradient.abs().max() for gradient in found[0].values()) > 1e-5


@KINDS
def test_vmap_over_tasks_equals_a_loop(kind):
    learned = make(kind)
    optimizer = learned.transformation()
    tasks = [(tensors(seed), tensors(seed + 100)) for seed in range(3)]

    def two_steps(parameters, gradients):
        state = optimizer.init(parameters)
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params=parameters)
            parameters = {name: tensor + updates[name] for name, tensor in parameters.items()}
        return parameters, state

    stacked = [{name: torch.stack([task[part][name] for task in tasks]) for name in SHAPES} for part in (0, 1)]
    batched, states = torch.func.vmap(two_steps)(*stacked)
    for number, task in enumerate(tasks):
        alone, state = two_steps(*task)
        for name in SHAPES:
            torch.testing.assert_close(batched[name][number], alone[name], rtol=1e-12, atol=1e-14)
        for name, value in state.items():
            torch.testing.assert_close(states[name][number], value, rtol=1e-12, atol=1e-14)


@KINDS
def test_vmap_takes_tasks_at_different_steps(kind):
    optimizer = make(kind).transformation()
    parameters = tensors(0)
    state = optimizer.init(parameters)
    stacked = {name: torch.stack([tensor, tensor]) for name, tensor in parameters.items()}
    states = {name: torch.stack([value, value]) for name, value in state.items()}
    states["step"] = torch.tensor([0, 50])

    def update(gradients, state, parameters):
        return optimizer.update(gradients, state, params=parameters)[0]

    batched = torch.func.vmap(update)(stacked, states, stacked)
    late = update(parameters, {**state, "step": torch.tensor(50)}, parameters)
    torch.testing.assert_close(batched["matrix"][1], late["matrix"], rtol=1e-12, atol=1e-14)
    sees_time = kind in ("mlp", "small_fc")
    assert torch.equal(batched["matrix"][0], batched["matrix"][1]) != sees_time


@KINDS
def test_each_tensor_is_updated_as_if_it_were_alone(kind):
    optimizer = make(kind).transformation()
    parameters, gradients = tensors(0), tensors(1)
    together, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    for name in SHAPES:
        own, gradient = {name: parameters[name]}, {name: gradients[name]}
        alone, _ = optimizer.update(gradient, optimizer.init(own), params=own)
        torch.testing.assert_close(together[name], alone[name], rtol=1e-12, atol=1e-15)


@KINDS
def test_missing_gradient_leaves_parameter_and_averages_alone(kind):
    optimizer = make(kind).transformation()
    parameters = tensors(0)
    state = optimizer.init(parameters)
    _, state = optimizer.update(tensors(1), state, params=parameters)
    given = tensors(2)
    for skipped in ("matrix", "vector"):
        partial, after = optimizer.update({**given, skipped: None}, state, params=parameters)
        full, _ = optimizer.update(given, state, params=parameters)
        assert partial[skipped] is None
        for name in set(SHAPES) - {skipped}:
            assert torch.equal(partial[name], full[name])
        # Its next step is that of an optimizer which has not seen the step in between, apart from the time.
        resumed, _ = optimizer.update(given, after, params=parameters)
        expected, _ = optimizer.update(given, {**state, "step": after["step"]}, params=parameters)
        assert torch.equal(resumed[skipped], expected[skipped])


@KINDS
def test_nothing_is_changed_in_place(kind):
    optimizer = make(kind).transformation()
    parameters, gradients = tensors(0), tensors(1)
    state = optimizer.init(parameters)
    _, state = optimizer.update(gradients, state, params=parameters)
    before = {name: value.clone() for name, value in state.items()}
    optimizer.update(gradients, state, params=parameters, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert all(torch.equal(value, tensors(0)[name]) for name, value in parameters.items())
    assert all(torch.equal(value, tensors(1)[name]) for name, value in gradients.items())


@KINDS
def test_half_precision_parameters_are_updated_in_float32_arithmetic(kind):
    learned = make(kind).float()
    parameters, gradients = (tensors(seed, dtype=torch.bfloat16) for seed in (0, 1))
    optimizer = learned.transformation()
    updates, state = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    wide = {name: tensor.float() for name, tensor in parameters.items()}
    exact, _ = optimizer.update(
        {name: tensor.float() for name, tensor in gradients.items()}, optimizer.init(wide), params=wide
    )
    for name in SHAPES:
        assert torch.equal(updates[name], exact[name].bfloat16())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


@KINDS
def test_autocast_does_not_reach_the_optimizer(kind):
    optimizer = make(kind).float().transformation()
    parameters, gradients = (tensors(seed, dtype=torch.float32) for seed in (0, 1))
    expected, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@KINDS
def test_a_dead_unit_keeps_the_meta_gradient_finite(kind):
    def dead(parameters, batch):
        return (parameters["w"] * torch.tensor([1.0, 0.0], dtype=torch.float64)).square().sum() + 0.1

    learned = make(kind)
    start = {"w": torch.ones(2, dtype=torch.float64)}
    result = meta_gradient(dead, start, learned, [None] * 3, None)
    assert result.usable
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())


@KINDS
def test_normalised_output_has_the_multiplier_as_its_size(kind):
    optimizer = make(kind, normalise_output=True).transformation()
    parameters = tensors(0)
    updates, _ = optimizer.update(tensors(1), optimizer.init(parameters), params=parameters)
    multiplier = {"lstm": 0.1}.get(kind, 0.05)
    for name in ("matrix", "vector", "cube"):
        assert updates[name].square().mean().sqrt().item() == pytest.approx(multiplier, rel=1e-4)


@KINDS
def test_wrong_use_is_refused(kind):
    optimizer = make(kind).transformation()
    with pytest.raises(ValueError, match="no parameters"):
        optimizer.init({})
    with pytest.raises(TypeError, match="complex"):
        optimizer.init({"w": torch.ones(2, dtype=torch.complex64)})
    parameters = {"w": torch.ones(2, 2)}
    state = optimizer.init(parameters)
    with pytest.raises(ValueError, match="params="):
        optimizer.update(parameters, state)
    with pytest.raises(TypeError, match="sparse"):
        optimizer.update({"w": torch.ones(2, 2).to_sparse()}, state, params=parameters)


@KINDS
def test_an_update_of_a_float64_module_with_a_float32_optimizer_is_in_float64(kind):
    optimizer = make(kind).float().transformation()
    parameters = tensors(0)
    updates, _ = optimizer.update(tensors(1), optimizer.init(parameters), params=parameters)
    assert {update.dtype for update in updates.values()} == {torch.float64}
