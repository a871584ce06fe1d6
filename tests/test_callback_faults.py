"""Whatever fails, and wherever: what the run has until then is what it would have without us."""

from __future__ import annotations

import builtins
import errno
import itertools
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import ALONG, Plain, Rich, difference, learner, loader, loaders, observer, outcome
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader, Dataset

from lightning_l2l import LearnedStepSize, LearnToLearn
from lightning_l2l.host import applied as applied_module
from lightning_l2l.host import session as session_module
from lightning_l2l.host import source as source_module
from lightning_l2l.host.displacement import DisplacementSteps
from lightning_l2l.host.live import LiveSteps
from lightning_l2l.host.look_ahead import LookAhead

HOOKS = [name for name in vars(LearnToLearn) if name.startswith("on_") or name == "teardown"]
HOOKS = [name for name in HOOKS if name not in ("on_exception", "on_load_checkpoint")]
OFTEN = ("on_train_batch_start", "on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end")


class Boom(Exception):
    pass


def fails_at(number: int, error: type[BaseException] = Boom) -> Callable[..., None]:
    """A function that raises when it is called for the n-th time."""
    calls = itertools.count(1)

    def maybe(*_arguments: Any, **_options: Any) -> None:
        if next(calls) == number:
            raise error

    return maybe


def fails_in(hook: str, number: int, error: type[BaseException] = Boom) -> pl.Callback:
    """Another callback, which has nothing to do with us and fails in this hook."""
    other = pl.Callback()
    setattr(other, hook, fails_at(number, error))
    return other


def switches() -> dict[str, Any]:
    """The global switches of torch that a look-ahead turns."""
    return {
        "grad": torch.is_grad_enabled(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "forward level": torch.autograd.forward_ad._current_level,
        "functorch level": torch._C._functorch.maybe_current_level(),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "parametrized modules are cached": torch.nn.utils.parametrize._cache_enabled,
    }


def names(owner: Any) -> list[str]:
    return sorted(vars(owner))


def run(trainer: Any, module: pl.LightningModule, *callbacks: Any, data: Any = None, **options: Any) -> dict[str, Any]:
    """Everything that a fit which fails leaves behind."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    error = options.pop("error", Boom)
    fitted = trainer(*callbacks, **options)
    with pytest.raises(error):
        fitted.fit(module, **(data or loaders)())
    optimizer = fitted.optimizers[0]
    return {
        **outcome(fitted, module),
        **switches(),
        "names": [names(child) for child in module.modules()] + [names(fitted), names(optimizer)],
        "hooks": list(optimizer._optimizer_step_post_hooks),
        "modes": [child.training for child in module.modules()],
        "graphs": [name for name, parameter in module.named_parameters() if not parameter.is_leaf],
        "gradients": {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
        "hook in force": module._current_fx_name,
    }


def watcher(**options: Any) -> LearnToLearn:
    """Splits the groups as well, and applies the scheduled rates to the last bit."""
    return observer(**{"learned": LearnedStepSize(per="tensor"), **options})


# -- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.feature("exceptions, in the user's step too", "works", "the run is left as it is without us")
@pytest.mark.parametrize(
    ("hook", "number"), [*((hook, 1) for hook in HOOKS), *((hook, 3) for hook in OFTEN)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "ours",
    [{}, {"learned": None, "estimator": "live"}, {"estimator": "reverse"}],
    ids=["displacement", "live", "look-ahead"],
)
def test_an_exception_in_our_hook_leaves_what_an_exception_in_another_s_leaves(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, hook: str, number: int, when: str, ours: dict[str, Any]
) -> None:
    expected = run(trainer, Rich(), fails_in(hook, number))
    original, maybe = getattr(LearnToLearn, hook), fails_at(number)

    def fails(*arguments: Any, **options: Any) -> None:
        if when == "before":
            maybe()
        original(*arguments, **options)
        if when == "after":
            maybe()

    monkeypatch.setattr(LearnToLearn, hook, fails)
    assert difference(expected, run(trainer, Rich(), watcher(**ours))) == ""


class FailsUnseen(Rich):
    """Fails in the n-th call of its step inside a hook: in one of ours, since the loop calls the step outside hooks."""

    def __init__(self, hook: str, number: int, error: type[BaseException]) -> None:
        super().__init__()
        self.hook, self.maybe = hook, fails_at(number, error)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        if "log" in vars(self) and self._current_fx_name == self.hook:
            self.maybe()
        return outputs


class OpensLate(FailsUnseen):
    """With a hook that the step may depend on: we wait for it."""

    def on_train_start(self) -> None:
        pass


# What fails, in which hook that is, at which call of the step, and the call of the hook.
LOOKS: dict[str, tuple[type[FailsUnseen], str, int, int, dict[str, Any]]] = {
    "first step of the search": (FailsUnseen, "on_train_start", 1, 1, {"initial_search": True}),
    "a later step of the search": (FailsUnseen, "on_train_start", 9, 1, {"initial_search": True}),
    "search, put off": (OpensLate, "on_before_zero_grad", 5, 1, {"initial_search": True}),
    "first judgement": (FailsUnseen, "on_train_batch_start", 1, 1, {"estimator": "displacement"}),
    "first judgement, put off": (OpensLate, "on_before_zero_grad", 1, 1, {"estimator": "displacement"}),
    "judgement": (FailsUnseen, "on_train_batch_end", 1, 3, {"estimator": "displacement"}),
    "live judgement": (FailsUnseen, "on_train_batch_end", 1, 3, {"estimator": "live"}),
    "rehearsal": (FailsUnseen, "on_train_batch_start", 1, 1, {"estimator": "forward"}),
    "second step of the rehearsal": (FailsUnseen, "on_train_batch_start", 2, 1, {"estimator": "forward"}),
    "held-out loss of the rehearsal": (FailsUnseen, "on_train_batch_start", 3, 1, {"estimator": "reverse"}),
    "rehearsal, put off": (OpensLate, "on_before_zero_grad", 2, 1, {"estimator": "forward"}),
    "unroll": (FailsUnseen, "on_train_batch_end", 1, 3, {"estimator": "forward"}),
    "second step of the unroll": (FailsUnseen, "on_train_batch_end", 2, 3, {"estimator": "forward"}),
    "held-out loss": (FailsUnseen, "on_train_batch_end", 3, 3, {"estimator": "reverse"}),
}


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_an_exception_in_the_user_s_step_in_a_call_of_ours_leaves_the_run_as_it_was(
    trainer: Any, look: str, error: type[BaseException]
) -> None:
    make, hook, number, calls, options = LOOKS[look]
    raised = SystemExit if error is KeyboardInterrupt else error  # by Lightning, which ends the process
    expected = run(trainer, make("", 0, error), fails_in(hook, calls, error), error=raised)
    module, callback = make(hook, number, error), watcher(**options)
    found = run(trainer, module, callback, error=raised)
    for left in (expected, found):
        left["names"] = [[name for name in those if name != "maybe"] for those in left["names"]]
    assert difference(expected, found) == ""
    assert callback.search_result is None


STAGES: list[tuple[Any, str, str, int]] = [
    (session_module, "planned_steps", "on_train_start", 1),
    (source_module, "LookAhead", "on_train_start", 1),
    (session_module.Session, "_install", "on_train_start", 1),
    (source_module.MetaGradientSource, "see_batch", "on_train_batch_start", 2),
    (LookAhead, "held_out", "on_train_batch_end", 3),
    (LookAhead, "meta_gradient", "on_train_batch_end", 3),
    (DisplacementSteps, "judge", "on_train_batch_end", 3),
    (DisplacementSteps, "result", "on_train_batch_end", 3),
    (DisplacementSteps, "before_step", "on_before_optimizer_step", 2),
    (LiveSteps, "judge", "on_train_batch_end", 3),
    (session_module.Session, "_apply", "on_train_batch_end", 3),
    (applied_module.AppliedValues, "split", "on_before_optimizer_step", 2),
]


@pytest.mark.parametrize(
    ("owner", "name", "hook", "number"), STAGES, ids=[f"{stage[0].__name__}.{stage[1]}" for stage in STAGES]
)
def test_an_exception_between_two_of_our_own_lines_leaves_the_run_as_it_was(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, hook: str, number: int
) -> None:
    expected = run(trainer, Rich(), fails_in(hook, number))
    original = getattr(owner, name)
    # These have been called once before, in the rehearsal; the live estimator's rehearsal is a look-ahead.
    rehearsed = (LookAhead, DisplacementSteps) if name in ("held_out", "meta_gradient", "judge") else ()
    calls = {"judge": 1, "result": 1, "_apply": 1}.get(name, number)
    maybe = fails_at(2 if owner in rehearsed else calls)
    estimator = {(LookAhead, "meta_gradient"): "forward", (LiveSteps, "judge"): "live"}.get((owner, name), "auto")

    def fails(*arguments: Any, **options: Any) -> Any:
        maybe()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, fails)
    assert difference(expected, run(trainer, Rich(), watcher(estimator=estimator))) == ""


# -- numbers that are none --------------------------------------------------------------------------------------------


class Spoilt(Dataset):
    """Examples of which some are not finite."""

    def __init__(self, count: int, spoilt: range, value: float, seed: int) -> None:
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        self.targets = self.inputs[:, :3].argmax(1)
        self.inputs[spoilt.start : spoilt.stop] = value

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


BAD = [math.nan, math.inf]


@pytest.mark.feature("NaN or infinity in held-out data", "works", "the rate is kept")
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
def test_a_held_out_batch_that_is_not_finite_keeps_the_rate_and_says_so(
    trainer: Any, value: float, estimator: Any
) -> None:
    """Not the rate's doing: it is so before the first step of a look-ahead."""
    spoilt = [(torch.full((8, 6), value), torch.zeros(8, dtype=torch.long))]
    callback, module = learner(meta_data=spoilt, estimator=estimator), Plain()
    trainer(callback).fit(module, loader(), loader(24, seed=1))
    assert [record["learning_rates"] for record in callback.history] == [[0.1]] * 4
    assert all("held-out" in record["diagnostics"]["note"] for record in callback.history)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("estimator", ALONG)
@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
@pytest.mark.usefixtures("short_search")
def test_some_held_out_examples_that_are_not_finite_stop_nothing(trainer: Any, value: float, estimator: Any) -> None:
    data = {"train_dataloaders": loader(), "val_dataloaders": DataLoader(Spoilt(48, range(3), value, 1), 8)}
    callback, module = learner(initial_search=True, estimator=estimator), Plain()
    trainer(callback, max_epochs=8).fit(module, **data)
    rates = [record["learning_rates"][0] for record in callback.history]
    assert len(rates) == 16 and len(set(rates)) > 5
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("estimator", ["forward", *ALONG])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_batches_that_the_step_refuses_to_train_on_are_not_looked_at(
    trainer: Any, value: float, estimator: Any
) -> None:
    class Careful(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if torch.isfinite(loss) else None

    callback, module = learner(estimator=estimator), Careful()
    trainer(callback, max_epochs=4).fit(module, DataLoader(Spoilt(48, range(9, 11), value, 0), 8), loader(24, seed=1))
    notes = [record["diagnostics"]["note"] for record in callback.history]
    if estimator == "live":  # a window with a skipped step is left out: the second batch of each epoch
        assert all("was skipped" in note for note in notes[::2]) and notes[1::2] == [""] * 4
    else:
        assert notes == [""] * 8 and len({record["learning_rates"][0] for record in callback.history}) == 8


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("estimator", ALONG)
@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
def test_a_run_that_dies_of_a_training_batch_dies_as_it_would_without_us(
    trainer: Any, value: float, estimator: Any
) -> None:
    def fit(*callbacks: Any) -> dict[str, Any]:
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        module, fitted = Plain(), trainer(*callbacks, max_epochs=4)
        fitted.fit(module, DataLoader(Spoilt(48, range(9, 11), value, 0), 8), loader(24, seed=1))
        return outcome(fitted, module)

    watching, learning = observer(estimator=estimator), learner(divergence_guard=False, estimator=estimator)
    assert difference(fit(), fit(watching)) == "" and len(watching.history) == 8
    fit(learning)
    rates = [rate for record in learning.history for rate in record["learning_rates"]]
    assert len(rates) == 8 and all(math.isfinite(rate) and rate > 0 for rate in rates)


class Guarded(Plain):
    """Refuses to go on with a loss that is not finite, as published modules do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not torch.isfinite(loss):
            raise RuntimeError("Loss is NaN, training stopped.")
        return loss


class GuardedDeep(Guarded):
    def make_net(self) -> torch.nn.Module:
        layers = [torch.nn.Linear(6, 6) for _ in range(12)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(6, 3))


@pytest.mark.feature(
    "a `training_step` that raises when its loss is NaN", "works", "a look-ahead that comes to it has diverged"
)
def test_a_candidate_of_the_search_that_the_step_refuses_has_diverged(trainer: Any) -> None:
    callback = learner(initial_search=True, search_budget=1.0)
    trainer(callback, max_epochs=4).fit(GuardedDeep(), **loaders())
    assert callback.search_result is not None and callback.search_result.learning_rate is not None
    losses = callback.search_result.losses
    assert losses[max(losses)] == math.inf and min(losses.values()) < math.inf
    assert len(callback.history) == 8


@pytest.mark.parametrize("estimator", ["forward", "reverse"])
@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
def test_a_look_ahead_that_the_step_refuses_has_diverged_and_the_run_goes_on(trainer: Any, estimator: Any) -> None:
    class Explodes(GuardedDeep):
        def loss(self, batch: Any) -> Any:
            moved = self.net[0].weight - start[-1]  # since the look-ahead began
            far = "log" in vars(self) and self._current_fx_name == "on_train_batch_end"
            return super().loss(batch) + (1e30 * moved.pow(2).sum() * 1e30 if far else 0)

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            start.append(pl_module.net[0].weight.detach().clone())

    start = [torch.zeros(6, 6)]
    module, callback = Explodes(), learner(estimator=estimator)
    fitted = trainer(Notes(), callback)
    fitted.fit(module, **loaders())
    assert [record["learning_rates"][0] for record in callback.history] == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    assert all("halved" in record["diagnostics"]["note"] for record in callback.history)
    assert "Loss is NaN" in callback.history[0]["diagnostics"]["reason"] and fitted.global_step == 12


@pytest.mark.parametrize("estimator", [*ALONG, "forward"])
@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")
def test_a_held_out_batch_that_the_step_refuses_keeps_the_rate(trainer: Any, estimator: Any) -> None:
    spoilt = [(torch.full((8, 6), math.nan), torch.zeros(8, dtype=torch.long))]
    callback = learner(meta_data=spoilt, estimator=estimator)
    trainer(callback).fit(Guarded(), **loaders())
    assert [record["learning_rates"] for record in callback.history] == [[0.1]] * 4


# -- loaders that die -------------------------------------------------------------------------------------------------


class Dies(Spoilt):
    """Raises when an example is asked for, or ends its process."""

    def __init__(self, count: int, at: int, seed: int, how: Callable[[], Any]) -> None:
        super().__init__(count, range(0), 0.0, seed)
        self.at, self.how = at, how

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            self.how()
        return super().__getitem__(index)


def boom() -> None:
    raise Boom


def test_a_training_loader_that_dies_in_mid_epoch_leaves_the_run_as_it_was(trainer: Any) -> None:
    data = lambda: {  # noqa: E731
        "train_dataloaders": DataLoader(Dies(48, 41, 0, boom), 8, shuffle=True),
        "val_dataloaders": loader(24, seed=1),
    }
    expected = run(trainer, Rich(), data=data)
    found = run(trainer, Rich(), watcher(every_n_steps=1), data=data)
    assert difference(expected, found) == "" and expected["progress"][0] > 0


def test_a_training_loader_that_dies_in_the_search_leaves_the_run_as_it_was(trainer: Any) -> None:
    data = lambda: {**loaders(), "train_dataloaders": DataLoader(Dies(48, 41, 0, boom), 8)}  # noqa: E731
    expected = run(trainer, Rich(), fails_in("on_train_start", 1), data=data)
    assert difference(expected, run(trainer, Rich(), watcher(initial_search=True), data=data)) == ""


# Of 24 held-out examples, in the first pass, with LearnToLearn(seed=0).
OUR_ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()


def test_a_validation_loader_that_dies_while_we_read_it_leaves_the_run_as_it_was(trainer: Any) -> None:
    def data() -> dict[str, Any]:
        return {**loaders(), "val_dataloaders": DataLoader(Dies(24, OUR_ORDER[8], 1, boom), 8)}  # our second batch

    expected = run(trainer, Rich(), fails_in("on_train_batch_end", 6), data=data)
    assert difference(expected, run(trainer, Rich(), watcher(), data=data)) == ""


def test_a_validation_loader_that_dies_in_validation_leaves_the_run_as_it_was(trainer: Any) -> None:
    def data() -> dict[str, Any]:
        return {**loaders(), "val_dataloaders": DataLoader(Dies(24, OUR_ORDER[16], 1, boom), 8)}  # our third batch

    expected = run(trainer, Rich(), data=data)
    found = run(trainer, Rich(), watcher(), data=data)
    assert difference(expected, found) == "" and expected["progress"][0] == 6


@pytest.mark.filterwarnings("ignore:.*unclosed.*")
def test_a_worker_process_that_dies_leaves_nothing_of_ours(trainer: Any) -> None:
    def data() -> dict[str, Any]:
        return {**loaders(), "train_dataloaders": DataLoader(Dies(48, 41, 0, lambda: os._exit(1)), 8, num_workers=1)}

    ended = (RuntimeError, OSError, EOFError)  # by where the death is noticed
    found = run(trainer, Rich(), watcher(every_n_steps=1), data=data, error=ended)
    expected = run(trainer, Rich(), data=data, error=ended)
    # How many batches come before the death is a race between two processes.
    for key in ("names", "hooks", "modes", "graphs", *switches()):
        assert difference(expected[key], found[key]) == ""


# -- a full disk ------------------------------------------------------------------------------------------------------


def full(*_arguments: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("short_search")
def test_no_file_is_written_during_a_fit_so_a_full_disk_cannot_stop_us(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened, original = [], builtins.open

    def noting(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            opened.append(file)
            full()
        return original(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", noting)
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.chdir(tmp_path)
    callback = learner(initial_search=True)
    trainer(callback).fit(Rich(), **loaders())
    assert opened == [] and list(tmp_path.iterdir()) == [] and len(callback.history) == 4


class FullDisk(TorchCheckpointIO):
    """Writes once, and then the disk is full."""

    def __init__(self) -> None:
        self.saved = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.saved:
            full()
        self.saved += 1
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*", "ignore:.*before the epoch ended.*")
def test_a_checkpoint_that_cannot_be_saved_fails_as_it_does_without_us_and_the_last_one_is_resumed_from(
    trainer: Any, tmp_path: Path
) -> None:
    def options(folder: str) -> dict[str, Any]:
        saves = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1)
        return {"callbacks": [saves], "plugins": [FullDisk()], "enable_checkpointing": True, "error": OSError}

    def fails(folder: str, *callbacks: Any) -> dict[str, Any]:
        given = options(folder)
        return run(trainer, Rich(), *callbacks, **{**given, "callbacks": [*callbacks, *given["callbacks"]]})

    assert difference(fails("without", callback := watcher()), fails("with")) == ""
    assert len(callback.history) == 1  # of step 3; the disk is full at step 4
    again = watcher()
    (path,) = (tmp_path / "without").iterdir()
    trainer(again).fit(Rich(), **loaders(), ckpt_path=path)
    assert [record["step"] for record in again.history] == [3, 6, 9, 12]


def test_a_plot_that_cannot_be_saved_says_so_and_loses_nothing(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    callback = learner()
    trainer(callback).fit(Plain(), **loaders())
    with monkeypatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", full)
        with pytest.raises(OSError, match="[Nn]o space"):
            callback.plot(str(tmp_path / "x.png"))
    assert pyplot.get_fignums() == [] and len(callback.history) == 4
    callback.plot(str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 0
