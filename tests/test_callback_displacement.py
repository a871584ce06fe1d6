"""The displacement estimator in a fit: its numbers by hand, and that it needs, and changes, nothing else."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import (
    Deterministic,
    Plain,
    Resumable,
    Rich,
    Saves,
    difference,
    learner,
    loader,
    loaders,
    observer,
    outcome,
    sgd,
)
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn
from lightning_l2l.exact.estimators import Displacement

MEMORY = 20  # short enough to look at the parameters after every step
SGD = sgd(0.1, momentum=0.9)


class TwoGroups(Plain):
    """Two layers with a rate each."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


PLACES = {
    "optimizer": [["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]],
    "group": [["net.0.weight", "net.0.bias"], ["net.2.weight", "net.2.bias"]],
    "tensor": [["net.0.weight"], ["net.0.bias"], ["net.2.weight"], ["net.2.bias"]],
}


class ByHand(pl.Callback):
    """Where the parameters are after each step, their average, the batches of each step, and the planned steps."""

    def __init__(self) -> None:
        self.places: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []
        self.windows: list[list[Any]] = []
        self.begins: list[int] = []
        self.planned = self.passes = 0

    def begin(self, module: Any) -> None:
        """The way begins here."""
        self.begins.append(len(self.places))
        self._note(module, 1.0)

    def _note(self, module: Any, weight: float) -> None:
        now = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        last = self.averages[-1] if self.averages else now
        self.places.append(now)
        self.averages.append({name: now[name] * weight + last[name] * (1 - weight) for name in now})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.planned, self.passes = trainer.estimated_stepping_batches, trainer.max_epochs
        self.begin(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.windows.append([])
        self.windows[-1].append(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.windows):
            step = len(self.places) - self.begins[-1]
            self._note(pl_module, max(1 / (step + 1), 1 / MEMORY))

    def meta_gradient(
        self, module: Any, at: int, batches: Any, places: Any, logarithmic: bool, *, back: bool = True
    ) -> tuple[float, Any]:
        """The meta-objective and its derivatives where step ``at`` led to, or some of the way back from there."""
        part = 0.4 * min(1, 2 * (1 - at / self.planned)) * (1 - self.passes / 20) if back else 0.0
        leaves = {
            name: (place + part * (self.averages[at][name] - place)).requires_grad_()
            for name, place in self.places[at].items()
        }
        inner = {name.removeprefix("net."): leaf for name, leaf in leaves.items()}
        losses = [functional.cross_entropy(functional_call(module.net, inner, (x,)), y) for x, y in batches]
        loss = sum(losses) / len(losses)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        along = {
            name: (gradients[name] * (self.places[at][name] - self.averages[at][name])).sum().item() for name in leaves
        }
        factor = 1 / (loss.item() * MEMORY) if logarithmic else 1.0
        return loss.item(), [factor * sum(along[name] for name in names) for names in places]


def judge(count: int = 16) -> list[Any]:
    """One held-out batch, so that it is known which."""
    return [tuple(t.double() if t.is_floating_point() else t for t in loader(count, 2, batch_size=count).dataset[:])]


# -- its numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", PLACES)
@pytest.mark.parametrize("objective", ["log", "naive"])
def test_the_meta_gradient_is_the_held_out_slope_along_the_way_from_the_average(
    trainer: Any, per: Any, objective: Any
) -> None:
    by_hand, module = ByHand(), TwoGroups()
    callback = LearnToLearn(
        LearnedStepSize(per=per), MEMORY, 5, objective, judge(), meta_learning_rate=0, initial_search=False
    )
    trainer(callback, by_hand, precision="64-true", max_epochs=6).fit(module, **loaders())
    assert [record["step"] for record in callback.history] == [5, 10, 15, 20, 25, 30, 35]
    for record in callback.history:
        value, slopes = by_hand.meta_gradient(module, record["step"], judge(), PLACES[per], objective == "log")
        assert record["diagnostics"]["estimator"] == "displacement"
        # The same sums in float64, in another order.
        assert record["meta_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9)
        expected = math.log(value) / MEMORY if objective == "log" else value
        assert record["meta_objective"] == pytest.approx(expected, rel=1e-12) and slopes[0] != 0


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}],
    ids=["plain", "accumulated", "clipped"],
)
@pytest.mark.parametrize("per", ["group", "tensor"])
def test_training_batches_judge_the_way_until_before_their_step(trainer: Any, per: Any, options: Any) -> None:
    by_hand, module = ByHand(), TwoGroups()
    callback = observer(
        learned=LearnedStepSize(per=per), unroll_steps=MEMORY, every_n_steps=4, objective="naive", meta_data="train"
    )
    trainer(callback, by_hand, precision="64-true", max_epochs=6, **options).fit(module, **loaders())
    assert len(callback.history) >= 4
    for record in callback.history:
        before = record["step"] - 1
        value, slopes = by_hand.meta_gradient(module, before, by_hand.windows[before], PLACES[per], False, back=False)
        assert record["meta_objective"] == pytest.approx(value, rel=1e-12)
        # Gradients that are not clipped; sums in float64 in another order.
        assert record["meta_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9) and slopes[0] != 0


def test_the_training_gradient_beside_it_is_that_of_the_last_training_batch(trainer: Any) -> None:
    by_hand, module = ByHand(), TwoGroups()
    callback = observer(unroll_steps=MEMORY, every_n_steps=5, meta_data=judge())
    trainer(callback, by_hand, precision="64-true").fit(module, **loaders())
    for record in callback.history:
        before = record["step"] - 1
        batches = by_hand.windows[before]
        _, slopes = by_hand.meta_gradient(module, before, batches, PLACES["group"], False, back=False)
        assert record["training_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9)  # as above
    assert len(callback.history) == 2


class Endless(IterableDataset):
    """Some fifty examples, and nobody knows that."""

    def __iter__(self) -> Any:
        return iter(loader(48, 0, batch_size=48).dataset)


@pytest.mark.parametrize(
    ("data", "epochs"), [(DataLoader(Endless(), 8), 2), (loader(16, batch_size=8), 20)], ids=["no end", "many passes"]
)
def test_where_the_end_is_unknown_or_passes_are_many_it_is_judged_where_it_is(
    trainer: Any, data: Any, epochs: int
) -> None:
    by_hand, module = ByHand(), TwoGroups()
    callback = observer(unroll_steps=MEMORY, every_n_steps=5, objective="naive", meta_data=judge())
    running = trainer(
        callback, by_hand, precision="64-true", max_epochs=epochs, accumulate_grad_batches=epochs // 10 or 1
    )
    running.fit(module, data, loaders()["val_dataloaders"])
    assert [record["step"] for record in callback.history][:2] == [5, 10]
    for record in callback.history:
        _, slopes = by_hand.meta_gradient(module, record["step"], judge(), PLACES["group"], False, back=False)
        assert record["meta_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9)  # float64, as above


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta_data", ["val", "train"])
@pytest.mark.parametrize("per", ["group", "tensor"])
def test_a_run_that_only_observes_is_the_run_without_us_bit_for_bit(trainer: Any, per: Any, meta_data: Any) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        module, fitted = Rich(SGD), trainer(*callbacks)  # batch norm, dropout, metrics
        fitted.fit(module, **loaders())
        return outcome(fitted, module)

    callback = observer(learned=LearnedStepSize(per=per), unroll_steps=None, meta_data=meta_data)
    assert difference(run(), run(callback)) == "" and len(callback.history) == 4


@pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*")
@pytest.mark.parametrize("step", [7, 9, 13])  # within an interval, right after a meta-update, between two looks
def test_a_resumed_run_goes_on_bit_for_bit(trainer: Any, tmp_path: Path, step: int) -> None:
    def fit(*others: Any, **options: Any) -> tuple[Any, LearnToLearn]:
        module, callback = Deterministic(lambda p: torch.optim.Adam(p, lr=0.01)), learner(unroll_steps=None)
        data = {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}
        trainer(callback, *others, max_epochs=4).fit(module, **data, **options)
        return module, callback

    whole, expected = fit(Saves(tmp_path / "x.ckpt", step))
    resumed, found = fit(ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert difference(whole.state_dict(), resumed.state_dict()) == ""
    assert difference(expected.history, found.history) == "" and len(found.history) == 8
    assert difference(expected.state_dict(), found.state_dict()) == ""


@pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*")
@pytest.mark.parametrize(("first", "second"), [("live", "auto"), ("auto", "live"), ("forward", "auto")])
def test_a_run_may_be_resumed_with_another_estimator(trainer: Any, tmp_path: Path, first: Any, second: Any) -> None:
    half = learner(estimator=first, unroll_steps=3, every_n_steps=4)
    trainer(half, Saves(tmp_path / "x.ckpt", 6), max_epochs=3).fit(Plain(SGD), **loaders())  # saves within a window
    callback = learner(estimator=second, unroll_steps=3, every_n_steps=4)
    trainer(callback, max_epochs=3).fit(Plain(SGD), **loaders(), ckpt_path=tmp_path / "x.ckpt")
    assert [record["step"] for record in callback.history] == [4, 8, 12, 16]
    used = [record["diagnostics"].get("estimator") for record in callback.history]  # a live window may be incomplete
    assert (used[0], used[-1]) == tuple("displacement" if name == "auto" else name for name in (first, second))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return gradient * (1 - inputs.tanh() ** 2)


class Once(Plain):
    """A loss through a function of the user's without a second derivative."""

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(_Once.apply(self.net(batch[0])), batch[1])


class Ctc(Plain):
    """A loss of torch's without a second derivative."""

    def loss(self, batch: Any) -> Tensor:
        probabilities = self.net(batch[0]).log_softmax(1).unsqueeze(0)
        ones = torch.ones(len(batch[1]), dtype=torch.long)
        return functional.ctc_loss(probabilities, 1 + batch[1].unsqueeze(1) % 2, ones, ones)


@pytest.mark.feature("losses without a second derivative", "works", "where learning rates are learned, none is taken")
@pytest.mark.parametrize("make", [Once, Ctc])
def test_no_second_derivative_is_needed(trainer: Any, make: Any) -> None:
    callback = learner(unroll_steps=None)
    trainer(callback).fit(make(), **loaders())
    assert len({record["learning_rates"][0] for record in callback.history}) == 4
    assert all(record["diagnostics"]["note"] == "" for record in callback.history)
    if make is Ctc:  # Where the other fails depends on the order in which torch goes backward.
        with pytest.raises(RuntimeError, match="_ctc_loss_backward"):
            trainer(learner(estimator="forward")).fit(make(), **loaders())


@pytest.mark.parametrize("per", ["group", "optimizer"])
def test_layers_that_are_thawed_have_a_way_of_their_own_from_then_on(trainer: Any, per: Any) -> None:
    class Thaws(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    class Frozen(TwoGroups):
        def configure_optimizers(self) -> Any:
            return SGD([p for p in self.parameters() if p.requires_grad])

    class FromThenOn(ByHand):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            if trainer.global_step == 7:  # the first step of the thawed layer is taken by then
                del self.places[-1], self.averages[-1]
                self.begin(pl_module)

    by_hand, module = FromThenOn(), Frozen()
    callback = observer(learned=LearnedStepSize(per=per), unroll_steps=MEMORY, every_n_steps=4, meta_data=judge())
    trainer(callback, Thaws(), by_hand, precision="64-true", max_epochs=4).fit(module, **loaders())
    assert [record["step"] for record in callback.history] == [4, 8, 12, 16, 20, 24]
    places = PLACES["group"][::-1] if per == "group" else PLACES["optimizer"]
    for record in callback.history:
        present = places if record["step"] > 6 else [PLACES["group"][1]]
        _, slopes = by_hand.meta_gradient(module, record["step"], judge(), present, True)
        assert record["meta_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9)  # float64, as above


@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
def test_where_the_guard_goes_back_to_the_way_begins_anew(trainer: Any) -> None:
    class Broken(TwoGroups):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            broken = self.global_step == 16 and "log" not in vars(self)
            return super().training_step((batch[0] * (math.nan if broken else 1), batch[1]), batch_idx)

    class Back(ByHand):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            if trainer.global_step == 17:  # we come after the guard
                del self.places[-1], self.averages[-1]
                self.begin(pl_module)

    by_hand, module = Back(), Broken()
    callback = learner(unroll_steps=MEMORY, every_n_steps=10, meta_data=judge())
    trainer(callback, by_hand, precision="64-true", max_epochs=4).fit(module, **loaders())
    assert [(record["step"], record["diagnostics"]["trouble"]) for record in callback.history] == [
        (10, ""), (17, "rolled_back"), (20, ""),
    ]  # fmt: skip
    _, slopes = by_hand.meta_gradient(module, 20, judge(), PLACES["group"], True)
    assert callback.history[-1]["meta_gradient"]["learning_rate"] == pytest.approx(slopes, rel=1e-9)  # float64


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learned": LearnedHyperparameters(("learning_rate", "momentum"))}, "learns something else than factors"),
        ({"objective": "log_mean"}, "objective='log_mean' counts losses on the way"),
        ({"unroll_steps": 1}, "leaves no memory"),
    ],
)
def test_what_the_displacement_cannot_say_is_refused_with_the_reason(trainer: Any, options: Any, reason: str) -> None:
    module = Plain(SGD)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=reason) as caught:
        trainer(learner(estimator="displacement", **options)).fit(module, **loaders())
    assert "estimator='auto'" in str(caught.value) and difference(before, module.state_dict()) == ""
    callback = learner(**options)
    trainer(callback).fit(module, **loaders())
    assert {record["diagnostics"]["estimator"] for record in callback.history} == {"live"}


def test_a_negative_loss_is_refused_before_the_first_step(trainer: Any) -> None:
    class Negative(Plain):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) - 50

    module = Negative()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="meta-loss is negative.*objective='naive'"):
        trainer(learner()).fit(module, **loaders())
    assert difference(before, module.state_dict()) == ""
    callback = learner(objective="naive")
    trainer(callback).fit(module, **loaders())
    assert {record["diagnostics"]["estimator"] for record in callback.history} == {"displacement"}


# -- rates that fall --------------------------------------------------------------------------------------------------

CURVATURE = 0.01


class Valley(pl.LightningModule):
    """A shallow valley about zero; a batch is where it seems to lie."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.full((20,), 2.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1 + 0.5 * CURVATURE * (self.place - batch).square().sum(1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Stream(IterableDataset):
    """The misleading batches, of which nobody knows how many: a training that is judged where it is from the start."""

    def __iter__(self) -> Any:
        return iter(misled())


def misled() -> Tensor:
    """A thousand noisy batches, of which the first sixty lead far away."""
    batches = 3 * torch.randn(1000, 1, 20, generator=torch.Generator().manual_seed(0))
    batches[:60] += 50
    return batches


def best_constant_rate() -> float:
    """That which ends nearest to zero; by hand."""

    def distance(rate: float) -> float:
        place = torch.full((20,), 2.0)
        for batch in misled():
            place = place - rate * CURVATURE * (place - batch[0])
        return float(place.norm())

    return float(min((10 ** (k / 4) for k in range(-12, 8)), key=distance))


def lowest_rate(trainer: Any) -> float:
    held_out = DataLoader(torch.zeros(1, 1, 20), batch_size=None)
    callback = LearnToLearn(initial_search=False, divergence_guard=False, meta_data=held_out)
    trainer(callback, max_epochs=1).fit(Valley(), DataLoader(Stream(), batch_size=None))
    return min(record["learning_rates"][0] for record in callback.history)


def test_a_rate_that_falls_fast_is_not_judged_by_its_first_large_steps_for_ever(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = best_constant_rate()
    # It has to fall while the steps lead away (to a fifth of the best, measured); 10 leaves a factor of two.
    assert lowest_rate(trainer) > best / 10
    monkeypatch.setattr(Displacement, "rescale", lambda *_: None)
    assert lowest_rate(trainer) < 1e-6 * best  # what rescaling the way is for


@pytest.mark.parametrize(("estimator", "own_kernels"), [("displacement", True), ("forward", False)])
def test_search_and_judgement_run_with_the_user_s_attention_kernels(
    trainer: Any, estimator: Any, own_kernels: bool
) -> None:
    # The fused ones, which a long sequence needs, have no second derivative; the displacement needs none.
    class Watching(Plain):
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            return super().training_step(batch, batch_index)

    seen: list[bool] = []
    trainer(learner(estimator=estimator, initial_search=True, every_n_steps=2)).fit(Watching(SGD), **loaders())
    assert all(seen) == own_kernels
