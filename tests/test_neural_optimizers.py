"""What all neural optimizers promise: derivatives, batching, missing gradients, independence of the tensors."""

from __future__ import annotations

import pytest
import torch

from lightning_l2l import LSTMOptimizer, MLPOptimizer, SmallFCOptimizer, TensorwiseOptimizer, Unroll, meta_gradient

# Small, so that forward mode over all meta-parameters is quick.
MAKERS = {
    "mlp": lambda **kw: MLPOptimizer(hidden_size=2, step_multiplier=0.05, initialisation="scaled", **kw),
    "small_fc": lambda **kw: SmallFCOptimizer(hidden_size=2, step_multiplier=0.05, **kw),
    "tensorwise": lambda **kw: TensorwiseOptimizer(),
    "lstm": lambda **kw: LSTMOptimizer(hidden_size=2, step_multiplier=0.05, **kw),
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))
OPTIONAL = [kind for kind in MAKERS if kind != "tensorwise"]  # where normalising the steps is an option
SHAPES = {"matrix": (3, 2), "vector": (3,), "scalar": (), "cube": (2, 2, 3), "other": (3, 2)}


def make(kind, **options):
    torch.manual_seed(1)
    learned = MAKERS[kind](**options).double()
    # Biases off zero: where all units of a small network are dead its output is the last bias, and normalising a
    # zero output has a derivative of 1e-9**-1/2, whose curvature no difference quotient resolves.
    redrawn = "" if kind == "tensorwise" else "biases"  # it has no network
    learned.set_({name: 0.3 * torch.randn_like(p) for name, p in learned.named_parameters() if redrawn in name})
    return learned


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def loss(parameters, batch):
    """Smooth, coupled, and far from quadratic."""
    value = parameters["scalar"].sin() + 2.0
    for name in ("matrix", "vector", "cube"):
        value = value + (parameters[name] * batch[name]).sin().sum() + 0.1 * parameters[name].pow(4).sum()
    return value + (parameters["matrix"].sum() * parameters["vector"].sum()).cos() + parameters["other"].square().sum()


BATCHES = [tensors(seed) for seed in (10, 11, 12)]


@pytest.mark.parametrize(
    ("kind", "normalise_output"),
    [*((kind, choice) for kind in OPTIONAL for choice in (False, True)), ("tensorwise", True)],
)
def test_meta_gradient_equals_central_differences(kind, normalise_output):
    def result_of(learned):
        estimator = Unroll(objective="naive_mean", mode="reverse")
        return meta_gradient(loss, tensors(0), learned, BATCHES, BATCHES[0], estimator=estimator)

    learned = make(kind, normalise_output=normalise_output)
    gradients = result_of(learned).gradients
    torch.manual_seed(2)
    direction = {name: torch.randn_like(parameter) for name, parameter in learned.named_parameters()}
    size, ends = 1e-6, []
    for sign in (1, -1):
        other = make(kind, normalise_output=normalise_output)
        other.set_({name: p.detach() + sign * size * direction[name] for name, p in learned.named_parameters()})
        ends.append(result_of(other).value)
    expected = (ends[0] - ends[1]) / (2 * size)
    found = sum((gradients[name] * along).sum().item() for name, along in direction.items())
    assert abs(expected) > 1e-6
    # Rounding gives 1e-16 / 1e-6, truncation 1e-12 times third derivatives.
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@KINDS
def test_forward_and_reverse_mode_agree(kind):
    learned = make(kind)
    if kind in ("mlp", "small_fc"):
        # Forward mode pays for each of its 62 or 78 numbers; central differences cover them.
        learned.network.weights[0].requires_grad_(False)
    forward, reverse = (
        meta_gradient(loss, tensors(0), learned, BATCHES[:2], BATCHES[2], estimator=Unroll(mode=mode)).gradients
        for mode in ("forward", "reverse")
    )
    for name, gradient in forward.items():
        # Two orders of summation of the same float64 numbers.
        torch.testing.assert_close(gradient, reverse[name], rtol=1e-9, atol=1e-14)
    assert max(gradient.abs().max() for gradient in forward.values()) > 1e-5


@KINDS
def test_vmap_over_tasks_at_different_steps_equals_a_loop(kind):
    optimizer = make(kind).transformation()
    tasks = [(tensors(seed), tensors(seed + 100), torch.tensor(50 * seed)) for seed in range(3)]

    def two_steps(parameters, gradients, step):
        state = {**optimizer.init(parameters), "step": step}
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params=parameters)
            parameters = {name: tensor + updates[name] for name, tensor in parameters.items()}
        return parameters, state

    stacked = [{name: torch.stack([task[part][name] for task in tasks]) for name in SHAPES} for part in (0, 1)]
    batched, states = torch.func.vmap(two_steps)(*stacked, torch.stack([step for *_, step in tasks]))
    for number, task in enumerate(tasks):
        alone, state = two_steps(*task)
        for name in SHAPES:
            torch.testing.assert_close(batched[name][number], alone[name], rtol=1e-12, atol=1e-14)
        for name, value in state.items():
            torch.testing.assert_close(states[name][number], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "sees_time"), [("mlp", True), ("small_fc", True), ("tensorwise", True), ("lstm", False)]
)
def test_a_later_step_is_another_step_where_the_network_sees_the_time(kind, sees_time):
    optimizer, parameters = make(kind).transformation(), tensors(0)
    state = optimizer.init(parameters)
    early, late = (
        optimizer.update(parameters, {**state, "step": torch.tensor(step)}, params=parameters)[0]["matrix"]
        for step in (0, 50)
    )
    assert torch.equal(early, late) != sees_time


@KINDS
def test_each_tensor_is_updated_as_if_it_were_alone(kind):
    optimizer, parameters, gradients = make(kind).transformation(), tensors(0), tensors(1)
    together, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    for name in SHAPES:
        own = {name: parameters[name]}
        alone, _ = optimizer.update({name: gradients[name]}, optimizer.init(own), params=own)
        torch.testing.assert_close(together[name], alone[name], rtol=1e-12, atol=1e-15)


@KINDS
@pytest.mark.parametrize("skipped", ["matrix", "vector"])
def test_a_missing_gradient_leaves_parameter_and_averages_alone(kind, skipped):
    optimizer, parameters, given = make(kind).transformation(), tensors(0), tensors(2)
    _, state = optimizer.update(tensors(1), optimizer.init(parameters), params=parameters)
    partial, after = optimizer.update({**given, skipped: None}, state, params=parameters)
    full, _ = optimizer.update(given, state, params=parameters)
    assert partial[skipped] is None
    assert all(torch.equal(partial[name], full[name]) for name in set(SHAPES) - {skipped})
    # Its next step is that of an optimizer which has not seen the step in between, apart from the time.
    resumed, _ = optimizer.update(given, after, params=parameters)
    expected, _ = optimizer.update(given, {**state, "step": after["step"]}, params=parameters)
    assert torch.equal(resumed[skipped], expected[skipped])


@KINDS
def test_nothing_is_changed_in_place(kind):
    optimizer, parameters, gradients = make(kind).transformation(), tensors(0), tensors(1)
    _, state = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    before = {name: value.clone() for name, value in state.items()}
    optimizer.update(gradients, state, params=parameters, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert all(torch.equal(value, tensors(0)[name]) for name, value in parameters.items())
    assert all(torch.equal(value, tensors(1)[name]) for name, value in gradients.items())


@KINDS
@pytest.mark.parametrize(
    ("dtype", "arithmetic"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_arithmetic_is_in_the_parameters_dtype_at_least_float32(kind, dtype, arithmetic):
    optimizer, parameters, gradients = make(kind).float().transformation(), tensors(0, dtype), tensors(1, dtype)
    updates, state = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    wide = {name: tensor.to(arithmetic) for name, tensor in parameters.items()}
    exact, _ = optimizer.update(
        {name: tensor.to(arithmetic) for name, tensor in gradients.items()}, optimizer.init(wide), params=wide
    )
    for name in SHAPES:
        assert updates[name].dtype == dtype
        assert torch.equal(updates[name], exact[name].to(dtype))
    assert {value.dtype for value in state.values()} == {arithmetic, torch.int64}


@KINDS
def test_autocast_does_not_reach_the_optimizer(kind):
    optimizer = make(kind).float().transformation()
    parameters, gradients = tensors(0, torch.float32), tensors(1, torch.float32)
    expected, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = optimizer.update(gradients, optimizer.init(parameters), params=parameters)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@KINDS
def test_a_dead_unit_keeps_the_meta_gradient_finite(kind):
    def dead(parameters, batch):
        return (parameters["w"] * torch.tensor([1.0, 0.0], dtype=torch.float64)).square().sum() + 0.1

    result = meta_gradient(dead, {"w": torch.ones(2, dtype=torch.float64)}, make(kind), [None] * 3, None)
    assert result.usable
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())


@pytest.mark.parametrize("kind", OPTIONAL)
def test_a_normalised_output_has_the_multiplier_as_its_size_in_each_tensor(kind):
    optimizer, parameters = make(kind, normalise_output=True).transformation(), tensors(0)
    updates, _ = optimizer.update(tensors(1), optimizer.init(parameters), params=parameters)
    for name in ("matrix", "vector", "cube"):
        assert updates[name].square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("kind", OPTIONAL)
def test_an_initial_output_of_zero_starts_at_rest(kind):
    cls = type(make(kind))
    optimizer = (cls(initial_output="zero") if kind == "lstm" else cls(initialisation="zero_output")).transformation()
    parameters = {"w": torch.randn(3)}
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
    assert updates["w"].tolist() == [0.0] * 3


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


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (MLPOptimizer, {"hidden_size": 0}),
        (SmallFCOptimizer, {"step_multiplier": 0.0}),
        (SmallFCOptimizer, {"initialisation": "zeros"}),
        (LSTMOptimizer, {"hidden_size": 0}),
        (LSTMOptimizer, {"preprocessing": "log"}),
        (LSTMOptimizer, {"preprocessing_range": 0.0}),
        (LSTMOptimizer, {"initial_output": "ones"}),
    ],
)
def test_arguments_that_mean_nothing_are_refused(cls, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cls(**wrong)
