"""LearnToLearn on a module whose optimizer is itself a learned one."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn, TaskModule
from lightning_l2l.functional import inner_optimizer
from lightning_l2l.tasks import Quadratic


class Module(TaskModule):
    """A quadratic trained by a learned optimizer that is kept outside the module's parameters."""

    def __init__(self, learned):
        super().__init__(Quadratic.random(4, seed=0), steps_per_epoch=10)
        self.given = (learned,)

    def configure_optimizers(self):
        return self.given[0].as_torch_optimizer(self.named_parameters())


def tiny():
    torch.manual_seed(0)
    return SmallFCOptimizer()


def fit(module, callback, max_steps=20, ckpt_path=None):
    trainer = pl.Trainer(
        max_steps=max_steps,
        callbacks=[callback] if callback else [],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def weights(learned):
    return torch.cat([parameter.detach().flatten() for parameter in learned.parameters()])


def test_the_weights_of_the_optimizer_in_use_are_trained_on():
    learned = tiny()
    before = weights(learned)
    callback = LearnToLearn(every_n_steps=5, unroll_steps=3, meta_learning_rate=1e-3)
    fit(Module(learned), callback)
    assert len(callback.history) == 4
    change = (weights(learned) - before).abs().max()
    # Adam moves by about its rate in each of four steps.
    assert 1e-3 <= change <= 1e-2
    assert weights(callback.learned).equal(weights(learned))


def test_observing_leaves_the_run_bit_for_bit():
    plain, observed = Module(tiny()), Module(tiny())
    fit(plain, None)
    fit(observed, LearnToLearn(every_n_steps=5, meta_learning_rate=0.0))
    assert torch.equal(plain.values["point"], observed.values["point"])
    assert weights(plain.given[0]).equal(weights(observed.given[0]))


def test_learned_adam_in_use_is_trained_on():
    learned = LearnedHyperparameters(("learning_rate",)).attach(
        inner_optimizer(torch.optim.Adam, lr=1e-3).with_names(["values.point"])
    )
    callback = LearnToLearn(every_n_steps=5, meta_learning_rate=0.3)
    fit(Module(learned), callback)
    assert learned.get_parameter("learning_rate").item() > 0.2  # 1e-3 is far too small here


def test_resumed_equals_uninterrupted(tmp_path):
    def callback():
        return LearnToLearn(every_n_steps=5, unroll_steps=3, meta_learning_rate=1e-3)

    whole = Module(tiny())
    fit(whole, callback(), 20)
    first = Module(tiny())
    fit(first, callback(), 10).save_checkpoint(tmp_path / "half.ckpt")
    second = Module(tiny())
    resumed = callback()
    fit(second, resumed, 20, ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.history) == 4
    assert weights(whole.given[0]).equal(weights(second.given[0]))
    assert torch.equal(whole.values["point"], second.values["point"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "choose 1e-3 or less"), ({"learned": LearnedStepSize(), "meta_learning_rate": 1e-3}, "Leave")],
)
def test_settings_that_do_not_fit_are_refused_before_training(options, message):
    module = Module(tiny())
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, LearnToLearn(**options))
