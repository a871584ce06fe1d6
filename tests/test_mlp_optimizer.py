"""The paper's 31-feature optimizer against numbers from the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l import MLPOptimizer
from lightning_l2l.exact.estimators import reverse
from lightning_l2l.exact.inner_step import InnerStep
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
    found = {}
    for name, (key, transposed) in NAMES.items():
        array = torch.from_numpy(fixture[key])
        found[name] = array.T if transposed else array
    learned.set_(found)
    return learned


def relative(found, expected):
    """Largest difference relative to the largest entry: an entry that cancels to zero has no digits of its own."""
    expected = torch.as_tensor(expected)
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def test_has_1090_meta_parameters():
    assert sum(parameter.numel() for parameter in MLPOptimizer().parameters()) == 1090


@torch.no_grad()
def test_features_updates_and_averages_equal_the_reference_over_twelve_steps():
    learned = reference_optimizer(UPDATE)
    optimizer = learned.transformation()
    parameters = {"w": torch.from_numpy(UPDATE["param"][0])}
    state = optimizer.init(parameters)
    layout = Layout.of(parameters)
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
    for place in range(5):
        assert relative(state["momenta"][place], UPDATE[f"state_ms_{place}"].ravel()) < 1e-5
        assert relative(state["second_moments"][place], UPDATE[f"state_rms_{place}"].ravel()) < 1e-5
    assert state["step"].item() == UPDATE["state_step"].item()


def classifier(parameters, batch):
    inputs, labels = batch
    hidden = torch.relu(inputs @ parameters["0"] + parameters["1"])
    hidden = torch.relu(hidden @ parameters["2"] + parameters["3"])
    return torch.nn.functional.cross_entropy(hidden @ parameters["4"] + parameters["5"], labels)


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients_equal_the_reference_over_two_truncated_unrolls(second_order):
    """The reference's meta-objective is the mean of the losses at w_0 ... w_{T-1}.

    The engine's ``naive_mean`` over T - 1 steps is the mean at w_1 ... w_{T-1}, and the loss at w_0 does not depend
    on the meta-parameters; so value and gradient follow from it. The last step is taken without being judged.
    """
    learned = reference_optimizer(UNROLL)
    step = InnerStep(classifier, learned, None, second_order)
    inputs, labels = torch.from_numpy(UNROLL["data"]), torch.from_numpy(UNROLL["labels"]).long()
    iterate = step.start({str(i): torch.from_numpy(UNROLL[f"init{i}"]) for i in range(6)}, None, {})
    for unroll in range(2):
        batches = [(inputs[places], labels[places]) for places in torch.from_numpy(UNROLL[f"batches{unroll}"])]
        prefix = f"second{int(second_order)}_val0_unroll{unroll}_"
        count = len(batches)
        first = step.evaluate(iterate, (inputs, labels)).item()
        result, last = reverse(step, iterate, batches[:-1], (inputs, labels), "naive_mean")
        value = (first + (count - 1) * result.value) / count
        assert value == pytest.approx(UNROLL[prefix + "metaobj"].item(), rel=1e-6)
        for name, (key, transposed) in NAMES.items():
            gradient = result.gradients[name] * (count - 1) / count
            found = gradient.T if transposed else gradient
            assert relative(found, UNROLL[f"{prefix}d{key}"]) < 1e-5, (unroll, key)
        loss = step.evaluate(last, batches[-1])
        iterate = step.update(last, step.gradients(loss, last, create_graph=False)).fresh()


def test_first_and_second_order_differ_in_the_fixture():
    # Else the test above could not tell the two apart.
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
    parameters = {"w": torch.randn(4)}
    optimizer = MLPOptimizer(initialisation="zero_output").transformation()
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), params=parameters)
    assert updates["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"step_multiplier": 0.0}, "step_multiplier"),
        ({"initialisation": "zeros"}, "initialisation"),
    ],
)
def test_refuses_wrong_arguments(wrong, name):
    with pytest.raises(ValueError, match=name):
        MLPOptimizer(**wrong)
