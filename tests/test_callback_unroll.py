"""Exact estimators in a fit: the meta-gradient is that of the run's own training, and it is all that moves anything."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import Deterministic, Plain, Resumable, Rich, difference, loader, loaders, outcome, sgd
from launch import launch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lightning_l2l
from lightning_l2l import (
    Displacement,
    EvolutionStrategies,
    LearnedHyperparameters,
    LearnedOptimizer,
    LearnedStepSize,
    LearnToLearn,
    MLPOptimizer,
    Unroll,
)
from lightning_l2l.exact.clip import clip_gradient_norm, clip_gradient_value
from lightning_l2l.exact.meta_optimizer import MetaOptimizer
from lightning_l2l.functional import inner_optimizer, mirror, read_state

SGD = sgd(0.1, momentum=0.9, weight_decay=1e-2)
THREE = ("learning_rate", "momentum", "weight_decay")


def exact(estimator: Any = None, **options: Any) -> LearnToLearn:
    """Two steps are unrolled after every third one, and nothing else is done at the start."""
    estimator = Unroll(steps=2) if estimator is None else estimator
    return LearnToLearn(estimator, **{"every_n_steps": 3, "initial_search": False, **options})


def held_out() -> list[Any]:
    """The single batch of the loader of held-out data, so that it is known which."""
    return [tuple(t.double() if t.is_floating_point() else t for t in loader(16, 2, batch_size=16).dataset[:])]


# -- the meta-gradient by hand ----------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "plain": ({}, None),
    "accumulated": ({"accumulate_grad_batches": 2}, None),
    "accumulated, short last step": ({"accumulate_grad_batches": 4}, None),
    "clipped by norm": ({"gradient_clip_val": 0.1}, lambda: clip_gradient_norm(0.1)),
    "clipped by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        lambda: clip_gradient_value(0.01),
    ),
}


def cross_entropy(parameters: Any, batches: Any) -> Any:
    values = [
        functional.cross_entropy(functional.linear(x, parameters["net.weight"], parameters["net.bias"]), y)
        for x, y in batches["batches"]
    ]
    return sum(values) / batches["divisor"]


class PlainLoop(pl.Callback):
    """At each update of the callback, what plain PyTorch makes of the same weights with hyperparameters of its own."""

    def __init__(self, callback: LearnToLearn, learned: Any, mode: Any = "forward", clip: Any = None) -> None:
        self.callback, self.learned, self.mode, self.clip = callback, learned, mode, clip
        self.steps: list[dict[str, Any]] = []
        self.found: list[Any] = []
        self.values: list[Any] = []
        self.meta_optimizer: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.steps.append({"batches": [], "divisor": trainer.accumulate_grad_batches})
        self.steps[-1]["batches"].append([tensor.clone() for tensor in batch])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if len(self.callback.history) == len(self.found):
            return
        named, optimizer = dict(pl_module.named_parameters()), trainer.optimizers[0]
        user = torch.optim.SGD(pl_module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.learned.attach(mirror(user, named.items()))
        if self.meta_optimizer is None:
            self.meta_optimizer = MetaOptimizer(self.learned.parameters(), 0.4)
        older = self.callback.meta_data == "train"
        judged = self.steps[-3] if older else {"batches": held_out(), "divisor": 1}
        result = lightning_l2l.meta_gradient(
            cross_entropy,
            named,
            self.learned,
            self.steps[-2:],
            judged,
            estimator=Unroll(mode=self.mode),
            state=read_state(optimizer, named.items()),
            gradient_transformation=self.clip and self.clip(),
        )
        self.meta_optimizer.apply(self.learned, result.gradients)
        self.learned.project_()
        self.found.append(result)
        self.values.append(self.learned.values()[0])


@pytest.mark.feature("gradient accumulation", "works", "an unrolled step has all of its batches")
@pytest.mark.feature("gradient clipping by norm and by value", "works", "differentiable through the norm")
@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_learned_is_what_a_plain_loop_learns_with_meta_gradient(trainer: Any, case: str) -> None:
    options, clip = OPTIONS[case]
    callback = exact(Unroll(steps=2, mode="forward"), meta_data=loader(16, 2, batch_size=16))
    by_hand = PlainLoop(callback, LearnedStepSize(), clip=clip)
    trainer(callback, by_hand, precision="64-true", max_epochs=3, **options).fit(Plain(SGD), **loaders())
    compare(callback, by_hand)


@pytest.mark.parametrize("mode", ["forward", "reverse", "segmented"])
def test_momentum_and_decay_are_learned_with_the_rate(trainer: Any, mode: Any) -> None:
    callback = exact(
        Unroll(steps=2, mode=mode), learned=LearnedHyperparameters(THREE), meta_data=loader(16, 2, batch_size=16)
    )
    by_hand = PlainLoop(callback, LearnedHyperparameters(THREE), mode)
    fitted = trainer(callback, by_hand, precision="64-true", max_epochs=3)
    fitted.fit(Plain(SGD), **loaders())
    compare(callback, by_hand)
    (group,) = fitted.optimizers[0].param_groups
    assert {key: group[key] for key in by_hand.values[-1]} == pytest.approx(by_hand.values[-1], rel=1e-9)
    assert 0 < group["momentum"] < 1 and group["momentum"] != 0.9 and group["weight_decay"] != 1e-2
    # The last update comes after the last step.
    exported = callback.export_schedule().rows[-1]
    assert {key: exported[key] for key in by_hand.values[-2]} == pytest.approx(by_hand.values[-2], rel=1e-9)


def test_training_data_is_held_out_from_the_unroll(trainer: Any) -> None:
    callback = exact(meta_data="train")
    by_hand = PlainLoop(callback, LearnedStepSize())
    trainer(callback, by_hand, precision="64-true", max_epochs=2).fit(Plain(SGD), **loaders())
    compare(callback, by_hand)


def compare(callback: LearnToLearn, by_hand: PlainLoop) -> None:
    assert len(callback.history) == len(by_hand.found) >= 2
    for record, result, values in zip(callback.history, by_hand.found, by_hand.values, strict=True):
        assert record["diagnostics"]["trouble"] == "" and record["meta_gradient"].keys() == result.gradients.keys()
        assert record["meta_objective"] == pytest.approx(result.value, rel=1e-9)
        for name, gradient in result.gradients.items():
            assert record["meta_gradient"][name] == pytest.approx(gradient.tolist(), rel=1e-9)
            assert 0 not in record["meta_gradient"][name]
        assert record["learning_rates"] == pytest.approx([values["lr"]], rel=1e-9)


def test_the_held_out_loss_may_be_a_function_of_the_user_s(trainer: Any) -> None:
    def doubled(module: Any, batch: Any) -> Any:
        return 2 * module.loss(batch)

    def objective(**options: Any) -> float:
        callback = exact(
            Unroll(steps=2, objective="naive"), meta_data=loader(16, 2, batch_size=16), meta_learning_rate=0, **options
        )
        trainer(callback, precision="64-true", max_epochs=1).fit(Plain(), **loaders())
        return float(callback.history[0]["meta_objective"])

    assert objective(held_out_loss=doubled) == pytest.approx(2 * objective(), rel=1e-12)


def test_evolution_strategies_point_where_the_exact_gradient_points(trainer: Any) -> None:
    def gradient(estimator: Any) -> float:
        callback = exact(estimator, meta_data=loader(16, 2, batch_size=16), meta_learning_rate=0)
        trainer(callback, precision="64-true", max_epochs=1).fit(Plain(SGD), **loaders())
        return float(callback.history[0]["meta_gradient"]["learning_rate"][0])

    smooth = EvolutionStrategies(steps=2, particles=400, standard_deviation=0.01)
    # Antithetic pairs of a smooth function: the error is the spread of epsilon squared, 1.4 / sqrt(200).
    assert gradient(smooth) == pytest.approx(gradient(Unroll(steps=2)), rel=0.3)


# -- neural optimizers ------------------------------------------------------------------------------------------------


class Neural(Plain):
    """Trained by a learned optimizer that is not among the module's parameters."""

    def __init__(self, learned: LearnedOptimizer) -> None:
        super().__init__()
        self.given = (learned,)

    def configure_optimizers(self) -> Any:
        return self.given[0].as_torch_optimizer(self.named_parameters())


def neural() -> MLPOptimizer:
    torch.manual_seed(1)
    return MLPOptimizer(initialisation="scaled", step_multiplier=0.01)


def weights(learned: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learned.parameters()])


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}]
)
def test_the_weights_of_a_neural_optimizer_are_trained_on(trainer: Any, options: Any) -> None:
    learned = neural()
    before, callback = weights(learned), exact(Unroll(steps=3))
    trainer(callback, max_epochs=4, **options).fit(Neural(learned), **loaders())
    change = (weights(learned) - before).abs().max().item()
    # By about 1e-3 in each of four or eight updates.
    assert 1e-3 <= change <= 2e-2 and len(callback.history) >= 4
    assert callback.learned is learned and callback.learning_rates == [1.0]


def test_a_hyperparameter_of_an_optimizer_in_use_is_learned_on(trainer: Any) -> None:
    inner = inner_optimizer(torch.optim.Adam, lr=1e-4).with_names(["net.weight", "net.bias"])
    learned = LearnedHyperparameters(("learning_rate",)).attach(inner)
    trainer(exact(), max_epochs=4).fit(Neural(learned), **loaders())
    assert learned.get_parameter("learning_rate").item() > 0.2  # 1e-4 is far too small here


def test_the_displacement_learns_the_rate_of_a_neural_optimizer(trainer: Any) -> None:
    learned = neural()
    before, callback = weights(learned), LearnToLearn(every_n_steps=3)
    trainer(callback, max_epochs=4).fit(Neural(learned), **loaders())
    assert torch.equal(weights(learned), before) and callback.learning_rates != [1.0]


# -- nothing else changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [Unroll(steps=2), Unroll(steps=2, mode="reverse"), EvolutionStrategies(steps=2)])
def test_watching_leaves_the_run_bit_for_bit_as_it_is(trainer: Any, estimator: Any) -> None:
    def run(*callbacks: Any) -> Any:
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        module, fitted = Rich(SGD), trainer(*callbacks)
        fitted.fit(module, **loaders())
        return outcome(fitted, module)

    callback = exact(estimator, meta_learning_rate=0)
    assert difference(run(), run(callback)) == ""
    assert all(record["meta_gradient"]["learning_rate"][0] != 0 for record in callback.history) and callback.history


def test_a_schedule_of_rate_and_momentum_goes_on_underneath(trainer: Any) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = self.optimizer(self.parameters())
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    class Notes(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (group,) = trainer.optimizers[0].param_groups
            self.seen.append((group["lr"], group["momentum"]))

    plain, learned = Notes(), Notes()
    trainer(plain).fit(Scheduled(SGD), **loaders())
    callback = exact(learned=LearnedHyperparameters())
    trainer(callback, learned).fit(Scheduled(SGD), **loaders())
    offsets = {name: tensor.item() for name, tensor in callback.learned.state_dict().items()}
    assert 0 not in offsets.values()
    rate, momentum = plain.seen[-1]
    assert learned.seen[-1][0] == pytest.approx(rate * math.exp(offsets["learning_rate"]), rel=1e-9)
    assert learned.seen[-1][1] == pytest.approx(1 - (1 - momentum) * math.exp(offsets["momentum"]), rel=1e-9)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*that ended before the epoch ended.*")
@pytest.mark.parametrize("learned", [None, LearnedHyperparameters(THREE), "neural"], ids=["rate", "three", "neural"])
def test_a_resumed_run_is_the_uninterrupted_one(trainer: Any, tmp_path: Path, learned: Any) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (4, 6):  # between updates, and right after one
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(*more: Any, path: Any = None) -> Any:
        template = learned if isinstance(learned, LearnedOptimizer) else None
        callback = exact(Unroll(steps=3), learned=template)
        module = Neural(neural()) if learned == "neural" else Deterministic(SGD)
        fitted = trainer(callback, *more, max_epochs=4)
        data = {"train_dataloaders": Resumable(), "val_dataloaders": loaders()["val_dataloaders"]}
        fitted.fit(module, **data, ckpt_path=path, weights_only=True if path else None)
        return {"outcome": outcome(fitted, module)["state"], "history": callback.history, "ours": callback.state_dict()}

    whole = run(Saves())
    assert len(whole["history"]) == 8
    for step in (4, 6):
        assert difference(whole, run(path=tmp_path / f"{step}.ckpt")) == ""


# -- trouble ----------------------------------------------------------------------------------------------------------


class Spoilt(Plain):
    """Its loss is what ``change`` makes of it, from the fifth step on."""

    def __init__(self, change: Any) -> None:
        super().__init__(SGD)
        self.change = change

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        return self.change(loss) if self._trainer.global_step >= 5 and "log" in vars(self) else loss


@pytest.mark.filterwarnings("ignore:LearnToLearn")
@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        (lambda loss: loss * math.inf, "diverged"),
        (lambda loss: loss * 0, "underflow"),
        (lambda loss: -loss, "failed"),
        (lambda loss: 1 / 0, "failed"),
    ],
    ids=["infinite", "zero", "negative", "raises"],
)
def test_what_is_no_meta_gradient_is_never_applied_and_said(trainer: Any, change: Any, trouble: str) -> None:
    callback = exact(meta_data="train", learned=LearnedHyperparameters(("momentum",)))
    # The change is there in calls of ours only, in which `log` is hidden on the instance.
    with pytest.warns(UserWarning, match="LearnToLearn: after step 6"):
        trainer(callback, max_epochs=3).fit(Spoilt(change), **loaders())
    good, *bad = callback.history
    assert good["diagnostics"]["trouble"] == "" and {r["diagnostics"]["trouble"] for r in bad} == {trouble}
    assert all(record["diagnostics"]["note"] for record in bad)
    assert callback.export_schedule().rows[-1]["momentum"] == good["hyperparameters"][0]["momentum"] != 0.9


@pytest.mark.filterwarnings("ignore:LearnToLearn")
def test_a_lost_run_is_taken_back_and_learns_on(trainer: Any) -> None:
    module, callback = Plain(sgd(1e3, momentum=0.9)), exact()
    trainer(callback, max_epochs=8).fit(module, **loaders())
    assert callback.history[0]["diagnostics"]["trouble"] == "rolled_back"
    assert callback.history[-1]["meta_gradient"] and callback.learning_rates[0] < 100
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Checkpointed(Plain):
    def loss(self, batch: Any) -> Any:
        hidden = checkpoint(self.net, batch[0].clone().requires_grad_(), use_reentrant=True)
        return functional.cross_entropy(hidden, batch[1])


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnClipping(Plain):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.1, "norm")


class ClipsInAHook(Plain):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class WeightNorm(Plain):
    def make_net(self) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(super().make_net())


class Sparse(Plain):
    def make_net(self) -> nn.Module:
        return nn.ModuleList([nn.Embedding(3, 3, sparse=True), super().make_net()])


class FromIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


REFUSED: dict[str, Any] = {
    "no functional counterpart": (lambda: Plain(lambda p: torch.optim.Rprop(p, lr=0.1)), {}, "register_mirror"),
    "manual optimization": (Manual, {"held_out_loss": lambda module, batch: module.loss(batch)}, "train your weights"),
    "own clipping": (OwnClipping, {}, "gradient_clip_val"),
    "clipping in a hook": (ClipsInAHook, {}, "on_before_optimizer_step"),
    "weight_norm": (WeightNorm, {}, "second derivative"),
    "sparse gradients": (Sparse, {}, "sparse=False"),
    "reentrant checkpointing": (Checkpointed, {}, "use_reentrant=False"),
    "dataloader_iter": (FromIterator, {"meta_data": "train"}, "take `batch`"),
    "momentum that is off": (Plain, {"learned": LearnedHyperparameters()}, "small momentum"),
    "a learned optimizer twice": (lambda: Neural(neural()), {"learned": LearnedStepSize()}, "Leave learned"),
}


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_unrolled_is_refused_with_reason_and_way_out(trainer: Any, case: str) -> None:
    make, options, words = REFUSED[case]
    with pytest.raises(MisconfigurationException, match=words):
        trainer(exact(**options)).fit(make(), **loaders())


def test_what_needs_no_second_derivative_takes_weight_norm(trainer: Any) -> None:
    callback = exact(EvolutionStrategies(steps=2, particles=2))
    trainer(callback).fit(WeightNorm(), **loaders())
    assert callback.history[0]["diagnostics"]["trouble"] == ""


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((Displacement(),), {"learned": LearnedStepSize()}, ValueError, "nothing of momentum"),
        ((), {"learned": LearnedHyperparameters()}, ValueError, "Unroll"),
        ((Unroll(),), {}, ValueError, "how many steps"),
        ((EvolutionStrategies(steps=2, method="pes"),), {}, ValueError, "MetaTraining"),
        ((Unroll(steps=2),), {"learned": neural()}, TypeError, "as_torch_optimizer"),
        ((Unroll(steps=2),), {"learned": LearnedStepSize(per="tensor")}, ValueError, "a group of its own"),
        (("reverse",), {}, TypeError, "an object"),
    ],
)
def test_arguments_that_do_not_fit_together_are_errors(arguments: Any, options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        LearnToLearn(*arguments, **options)


# -- what a user sees, and sets ---------------------------------------------------------------------------------------


def test_meta_gradients_and_learned_values_are_logged(trainer: Any) -> None:
    fitted = trainer(exact(learned=LearnedHyperparameters(("learning_rate", "momentum"))))
    fitted.fit(Plain(SGD), **loaders())
    names = {"meta_objective", "meta_gradient/learning_rate", "meta_gradient/momentum", "learning_rate", "momentum"}
    assert {f"l2l/{name}" for name in names} <= fitted.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore::DeprecationWarning")
def test_the_command_line_configures_estimators_by_class_path(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    path = tmp_path / "learn.yaml"
    path.write_text(
        """
trainer:
  logger: false
  callbacks:
    - class_path: lightning_l2l.LearnToLearn
      init_args:
        estimator: {class_path: lightning_l2l.Unroll, init_args: {steps: 20, mode: reverse}}
        learned: {class_path: lightning_l2l.LearnedHyperparameters, init_args: {learn: [learning_rate, momentum]}}
    """
    )
    found = {}
    for arguments in (
        ["--config", str(path)],
        [
            "--trainer.callbacks=lightning_l2l.LearnToLearn",
            "--trainer.callbacks.estimator="
            '{"class_path": "lightning_l2l.EvolutionStrategies", "init_args": {"steps": 4}}',
        ],
    ):
        cli = LightningCLI(Plain, run=False, save_config_callback=None, seed_everything_default=False, args=arguments)
        (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, LearnToLearn))
        found[type(callback.estimator)] = callback.estimator
    assert found == {Unroll: Unroll(steps=20, mode="reverse"), EvolutionStrategies: EvolutionStrategies(steps=4)}


# -- several processes ------------------------------------------------------------------------------------------------


def fit_on(count: int) -> Any:
    """Together the processes see the batches of a single one."""
    from conftest import QUIET
    from helpers import examples
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    class Halves(DistributedSampler):
        """Process by process the parts of the same batches."""

        def __iter__(self) -> Any:
            own = 16 // self.num_replicas
            return iter([i for at in range(self.rank * own, 96, 16) for i in range(at, at + own)])

    rank = int(os.environ.get("LOCAL_RANK", 0))

    def data(seed: int) -> Any:
        dataset = examples(96, seed)
        return DataLoader(dataset, batch_size=16 // count, sampler=Halves(dataset, count, rank))

    callback = exact(learned=LearnedHyperparameters(THREE), meta_data=data(2))
    options = {"devices": count, "strategy": "ddp" if count > 1 else "auto", "use_distributed_sampler": False}
    trainer = pl.Trainer(**{**QUIET, "callbacks": [callback], "precision": "64-true", **options})
    module = Plain(SGD)
    trainer.fit(module, data(0), loader(8, seed=1))
    return {"history": callback.history, "state": dict(module.state_dict())}


@pytest.mark.feature("exact estimators with DDP", "works", "one meta-gradient, of all batches together")
def test_two_processes_learn_what_one_learns_from_all_batches(tmp_path: Path) -> None:
    first, second = launch(tmp_path, fit_on, 2)
    (single,) = launch(tmp_path, fit_on, 1, count=1)
    assert not isinstance(first, str), first
    assert difference(first, second) == ""
    for one, other in zip(first["history"], single["history"], strict=True):
        assert one["learning_rates"] == pytest.approx(other["learning_rates"], rel=1e-9)
        for name in THREE:
            assert one["meta_gradient"][name] == pytest.approx(other["meta_gradient"][name], rel=1e-6)
