"""The learned schedule is the user's to keep: a table, to the last bit what was applied, replayed without us."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import Plain, Rich, TiedAndFrozen, Witness, difference, learner, loaders, observer, outcome, sgd
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

from lightning_l2l import LearnedHyperparameters, LearnedSchedule, LearnedStepSize, LearnToLearn, SmallFCOptimizer

COSINE = lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 20), "interval": "step"}  # noqa: E731
BY_EPOCH = lambda o: lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
TENSOR_RATE = lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01), capturable=False)  # noqa: E731


class WarmUp(Rich):
    """Writes the rate in ``optimizer_step``, as many modules do."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class NoWarmUp(Rich):
    pass


class TwoGroups(Rich):
    def configure_optimizers(self) -> Any:
        first, *rest = self.net
        parts = [{"params": first.parameters(), "lr": 0.05}, {"params": nn.Sequential(*rest).parameters(), "lr": 0.2}]
        optimizer = self.optimizer(parts)
        return (
            optimizer if self.schedule is None else {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}
        )


# What learns, the module with its optimizer and schedule, the same module to replay in, options of the Trainer.
CASES: dict[str, Any] = {
    "constant": ({}, Rich, (sgd(0.1, momentum=0.9), None), {}),
    "cosine": ({}, Rich, (sgd(0.1, momentum=0.9), COSINE), {}),
    "by epoch": ({}, Rich, (ADAM, BY_EPOCH), {}),
    "warm-up": ({}, WarmUp, (sgd(0.1), None), {}),
    "search": ({"initial_search": True}, Rich, (sgd(1e-6), None), {}),
    "accumulate": ({"every_n_steps": 2}, Rich, (sgd(0.1), COSINE), {"accumulate_grad_batches": 4}),
    "groups": ({}, TwoGroups, (sgd(0.1, momentum=0.9), COSINE), {}),
    "momentum and decay": (
        {"learned": LearnedHyperparameters(["learning_rate", "momentum", "weight_decay"])},
        Rich,
        (sgd(0.1, momentum=0.8, weight_decay=1e-3), COSINE),
        {},
    ),
    "betas": (
        {"learned": LearnedHyperparameters(["learning_rate", "betas"], per="group")},
        TwoGroups,
        (ADAM, None),
        {},
    ),
    "tensor rate": ({}, Plain, (TENSOR_RATE, None), {}),
}


def train(trainer: Any, module: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fitted = trainer(*callbacks, max_epochs=3, **options)
    fitted.fit(module, **loaders())
    return {key: value for key, value in outcome(fitted, module).items() if key == "state"}


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("case", CASES)
def test_replaying_without_the_callback_reaches_the_same_weights(trainer: Any, tmp_path: Path, case: str) -> None:
    own, make, (optimizer, schedule), options = CASES[case]
    callback, witness = learner(**own), Witness()
    learned = train(trainer, make(optimizer, schedule), callback, witness, **options)
    callback.export_schedule().to_csv(tmp_path / "schedule.csv")
    table = LearnedSchedule.from_csv(tmp_path / "schedule.csv")
    assert table == callback.export_schedule()
    assert len(callback.history) >= 2 and len(table.steps) >= len(callback.history)
    replay = lambda o: {"scheduler": table.scheduler(o), "interval": "step"}  # noqa: E731
    again = train(trainer, (NoWarmUp if make is WarmUp else make)(optimizer, replay), **options)
    assert difference(learned, again) == ""


def test_the_table_has_the_rate_of_every_step(trainer: Any) -> None:
    callback, witness = learner(), Witness()
    before: list[float] = []

    class Sees(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before.append(optimizer.param_groups[0]["lr"])

    train(trainer, Rich(sgd(0.1), COSINE), callback, Sees(), witness)
    table = callback.export_schedule()
    assert [table.at(step)["lr"] for step in range(len(before))] == before and len(set(before)) > 10
    assert table.steps[0] == 0 and table.rows[0] == {"step": 0, "lr": before[0]}


def test_one_row_for_each_change(trainer: Any) -> None:
    callback = learner()
    train(trainer, Rich(sgd(0.1)), callback)
    updates = [record["step"] for record in callback.history]
    assert list(callback.export_schedule().steps) == [0, *(step for step in updates if step < 18)]


def test_rates_of_tensors_are_groups_by_name(trainer: Any, tmp_path: Path) -> None:
    callback = learner(learned=LearnedStepSize(per="tensor"))
    learned = train(trainer, Rich(sgd(0.1, momentum=0.9), COSINE), callback)
    table = callback.export_schedule()

    class Named(Rich):
        def configure_optimizers(self) -> Any:
            named = dict(self.named_parameters())
            groups = [{"params": [named[name]], "name": name} for name in table.groups]
            optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
            return [optimizer], [{"scheduler": table.scheduler(optimizer), "interval": "step"}]

    assert set(table.groups) == {name for name, _ in Rich().named_parameters()}
    assert difference(learned, train(trainer, Named())) == ""
    with pytest.raises(ValueError, match="one group for each tensor"):
        table.scheduler(torch.optim.SGD(Rich().parameters(), lr=1.0))


def test_a_group_that_is_added_later_has_an_empty_cell_until_then(trainer: Any, tmp_path: Path) -> None:
    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": [*pl_module.net[4].parameters()], "lr": 0.03})

    callback = learner()
    train(trainer, TiedAndFrozen(sgd(0.1)), Adds(), callback)
    table = callback.export_schedule()
    assert table.columns == ("lr/0", "lr/1") and table.at(6)["lr/1"] == 0.03 and table.at(5)["lr/1"] != 0.03
    table.to_csv(tmp_path / "schedule.csv")
    assert difference(LearnedSchedule.from_csv(tmp_path / "schedule.csv").rows, table.rows) == ""
    assert ",\n" in (tmp_path / "schedule.csv").read_text(encoding="utf-8")


def test_the_record_goes_on_after_a_resume(trainer: Any, tmp_path: Path) -> None:
    whole = learner()
    train(trainer, Rich(sgd(0.1), COSINE), whole)
    half, module = learner(), Rich(sgd(0.1), COSINE)
    torch.manual_seed(5)
    first = trainer(half, max_epochs=2)
    first.fit(module, **loaders())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = learner()
    second = trainer(again, max_epochs=3)
    second.fit(Rich(sgd(0.1), COSINE), **loaders(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    before, after = half.export_schedule(), again.export_schedule()
    assert after.steps[: len(before.steps)] == before.steps and after.values[: len(before.steps)] == before.values
    assert len(after.steps) == len(whole.export_schedule().steps) > len(before.steps)


@pytest.mark.filterwarnings("ignore:LearnToLearn, after step")  # about a look-ahead
def test_a_step_that_the_scaler_skips_costs_no_row(trainer: Any) -> None:
    callback = learner()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        train(trainer, Rich(sgd(0.1), COSINE), callback, plugins=plugin)
    steps = callback.export_schedule().steps
    assert steps[0] > 0 and list(steps) == sorted(set(steps))


def test_observing_exports_the_schedule_of_the_run(trainer: Any) -> None:
    callback = observer()
    train(trainer, Rich(sgd(0.1), BY_EPOCH), callback)
    assert callback.export_schedule().rows == [
        {"step": 0, "lr": 0.1}, {"step": 6, "lr": 0.05}, {"step": 12, "lr": 0.025}
    ]  # fmt: skip


def test_the_replay_leaves_nothing_of_ours_in_a_checkpoint(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = LearnedSchedule(("lr",), (0, 2), ((0.1,), (0.3,))).scheduler(optimizer)
    assert type(scheduler) is lr_scheduler.LambdaLR
    for _ in range(3):
        optimizer.step(), scheduler.step()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "replay.pt")
    code = (
        "import sys, torch; sys.modules['lightning_l2l'] = None; "
        f"print(torch.load({str(tmp_path / 'replay.pt')!r}, weights_only=True)[1]['_last_lr'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[0.3]"


def test_the_lines_of_the_docs_replay_the_table_with_plain_torch(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    LearnedSchedule(("lr",), (0, 3, 5), ((0.1,), (1 / 3,), (0.2,))).to_csv(path)
    source = (Path(__file__).parent.parent / "docs" / "schedule.md").read_text(encoding="utf-8")
    (lines,) = [block.split("```")[0] for block in source.split("```python\n")[1:] if "csv.DictReader" in block]
    model = nn.Linear(2, 1)
    names: dict[str, Any] = {"model": model}
    exec(lines.replace("schedule.csv", path.as_posix()), names)
    seen = []
    for _ in range(7):
        seen.append(names["optimizer"].param_groups[0]["lr"])
        names["optimizer"].step(), names["scheduler"].step()
    assert seen == [0.1, 0.1, 0.1, 1 / 3, 1 / 3, 0.2, 0.2]
    assert "lightning_l2l" not in lines


def test_nothing_to_export_says_why(trainer: Any) -> None:
    with pytest.raises(ValueError, match="no optimizer step has been made"):
        LearnToLearn().export_schedule()

    class Neural(Plain):
        def configure_optimizers(self) -> Any:
            return SmallFCOptimizer().as_torch_optimizer(self.parameters())

    callback = learner(meta_learning_rate=1e-3)
    trainer(callback).fit(Neural(), **loaders())
    with pytest.raises(ValueError, match="its own save"):
        callback.export_schedule()


@pytest.mark.parametrize(
    ("steps", "values"), [((), ()), ((0, 1), ((0.1,),)), ((0,), ((0.1, 0.2),)), ((3, 1), ((0.1,), (0.2,)))]
)
def test_what_is_no_table_is_refused(steps: Any, values: Any) -> None:
    with pytest.raises(ValueError, match="increasing steps"):
        LearnedSchedule(("lr",), steps, values)


def test_another_file_is_refused(tmp_path: Path) -> None:
    for text in ("", "epoch,loss\n1,2\n"):
        (tmp_path / "other.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no exported schedule"):
            LearnedSchedule.from_csv(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="no learning rate"):
        LearnedSchedule(("momentum",), (0,), ((0.9,),)).scheduler(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
