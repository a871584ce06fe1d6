"""Bad input gets a clear error before training starts, and no parameter has moved by then."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Plain, Rich, learner, loader, loaders, observer, sgd
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_l2l import LearnedHyperparameters, LearnedStepSize, LearnToLearn
from lightning_l2l.host.refusals import refuse_strategy

ABSTRACT = dict.fromkeys(Strategy.__abstractmethods__)
BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"learned": 3}, TypeError, "LearnedOptimizer such as LearnedStepSize(), not int"),
    ({"learned": LearnedStepSize}, TypeError, "not the class LearnedStepSize"),
    *(
        ({name: value}, kind, message)
        for name in ("unroll_steps", "every_n_steps")
        for value, kind, message in [
            (0, ValueError, "at least 1"),
            (-1, ValueError, "at least 1"),
            (2.0, TypeError, "whole number, not float"),
            (True, TypeError, "whole number, not bool"),
            ("5", TypeError, "whole number, not str"),
        ]
    ),
    ({"every_n_steps": None}, TypeError, "whole number, not NoneType"),
    ({"objective": "logg"}, ValueError, "choose one of"),
    ({"objective": None}, TypeError, "a name (a string), not NoneType"),
    ({"estimator": "backward"}, ValueError, "choose one of"),
    ({"estimator": 1}, TypeError, "a name (a string), not int"),
    ({"meta_data": "test"}, ValueError, "'val', 'train' or a loader"),
    ({"meta_data": 1}, TypeError, "'val', 'train' or one loader"),
    ({"meta_data": {"a": []}}, TypeError, "one loader"),
    ({"meta_data": CombinedLoader([[1]])}, TypeError, "one loader"),
    ({"meta_data": [loader(), loader()]}, TypeError, "one loader that can be read more than once, not list"),
    ({"meta_data": loader().dataset}, TypeError, "not TensorDataset: without batches"),
    ({"meta_data": [torch.ones(4, 2), torch.ones(4)]}, TypeError, "not list of tensors: without batches"),
    ({"meta_data": torch.ones(4, 2)}, TypeError, "not Tensor: without batches"),
    ({"meta_data": None}, TypeError, "'val', 'train' or one loader"),
    ({"meta_data": (x for x in [])}, TypeError, "read more than once, not generator"),
    ({"meta_learning_rate": -0.1}, ValueError, "not negative"),
    ({"meta_learning_rate": math.nan}, ValueError, "finite"),
    ({"meta_learning_rate": math.inf}, ValueError, "finite"),
    ({"meta_learning_rate": "0.1"}, TypeError, "a number, not str"),
    ({"meta_learning_rate": True}, TypeError, "a number, not bool"),
    ({"search_budget": 0.0}, ValueError, "initial_search=False"),
    ({"search_budget": 2}, ValueError, "fraction of the training"),
    ({"search_budget": "5%"}, TypeError, "a number, not str"),
    ({"initial_search": 1}, TypeError, "True or False, not int"),
    ({"initial_search": "yes"}, TypeError, "True or False, not str"),
    ({"seed": 0.5}, TypeError, "whole number, not float"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"seed": 2**32}, ValueError, "[0, 2**32)"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_every_argument_is_checked_where_it_is_given(arguments: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        LearnToLearn(**arguments)
    assert next(iter(arguments)) in str(caught.value)


def test_numpy_numbers_are_numbers() -> None:
    settings = LearnToLearn(unroll_steps=np.int64(3), meta_learning_rate=np.float32(0.5), seed=np.int32(1)).settings
    assert type(settings.unroll_steps) is int and settings.meta_learning_rate == 0.5


def test_unroll_steps_may_be_left_to_the_estimator() -> None:
    assert LearnToLearn().settings == LearnToLearn(unroll_steps=None).settings
    assert LearnToLearn().settings.unrolled == 3 and LearnToLearn(unroll_steps=7).settings.unrolled == 7


def refused(trainer: Any, module: Any, message: str, callback: Any = None, **options: Any) -> str:
    """The message of a fit that is refused, without having moved a parameter."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = options.pop("data", None) or loaders()
    with pytest.raises((MisconfigurationException, ValueError, TypeError), match=message) as caught:
        trainer(callback or learner(), **options).fit(module, **data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return str(caught.value)


@pytest.mark.feature("manual optimization", "refused")
def test_manual_optimization_is_refused(trainer: Any) -> None:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    assert "meta_gradient" in refused(trainer, Manual(), "automatic optimization")


@pytest.mark.feature("no optimizer", "refused")
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer.*")
def test_no_optimizer_is_refused(trainer: Any) -> None:
    class Without(Plain):
        def configure_optimizers(self) -> None:
            return None

    assert "Return a torch.optim optimizer" in refused(trainer, Without(), "no optimizer to work on")


@pytest.mark.feature("an optimizer without a mirror", "refused", "the message lists those that have one")
def test_an_optimizer_without_a_mirror_is_refused_with_those_that_have_one(trainer: Any) -> None:
    module = Plain(lambda parameters: torch.optim.Rprop(parameters))
    message = refused(trainer, module, "no differentiable mirror of Rprop")
    assert "AdamW" in message and "register_mirror" in message


def test_what_the_optimizer_does_not_have_cannot_be_learned(trainer: Any) -> None:
    callback = learner(learned=LearnedHyperparameters(("learning_rate", "momentum")))
    refused(trainer, Plain(lambda parameters: torch.optim.Adam(parameters)), "'momentum' cannot be learned", callback)
    refused(trainer, Plain(sgd(0.1)), "momentum is 0", callback)


@pytest.mark.feature("`training_step(self, dataloader_iter)`", "refused")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_reads_the_iterator_is_refused(trainer: Any) -> None:
    class Reads(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    refused(trainer, Reads(), "dataloader_iter")


@pytest.mark.feature("`weight_norm`", "refused")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_refused(trainer: Any, normalise: Any) -> None:
    class Normalised(Plain):
        def make_net(self) -> nn.Module:
            return nn.Sequential(normalise(nn.Linear(6, 4)), nn.Linear(4, 3))

    assert "net.0" in refused(trainer, Normalised(), "weight_norm")


@pytest.mark.feature("sparse gradients", "refused")
def test_sparse_embeddings_are_refused(trainer: Any) -> None:
    class Sparse(Plain):
        def make_net(self) -> nn.Module:
            return nn.ModuleList([nn.Embedding(3, 3, sparse=True)])

    refused(trainer, Sparse(), "sparse gradients .here: net.0")


@pytest.mark.feature("a `configure_gradient_clipping` of one's own", "refused")
def test_gradient_clipping_of_the_user_s_own_is_refused(trainer: Any) -> None:
    class Clips(Plain):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, 0.5, "norm")

    refused(trainer, Clips(), "configure_gradient_clipping of your own")
    refused(trainer, Clips(), "configure_gradient_clipping of your own", gradient_clip_val=0.5)


@pytest.mark.feature("FSDP, DeepSpeed, model parallel strategies", "refused")
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "ShardedStrategy"])
def test_strategies_that_own_the_parameters_are_refused(name: str) -> None:
    fitted = SimpleNamespace(strategy=type(name, (Strategy,), {"__init__": lambda self: None, **ABSTRACT})())
    with pytest.raises(MisconfigurationException, match=name):
        refuse_strategy(fitted)
    refuse_strategy(SimpleNamespace(strategy=SingleDeviceStrategy(torch.device("cpu"))))


class Loses(Plain):
    """Returns something else than the loss."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.change(self.loss(batch))


CANNOT_BE_LEARNED_FROM = [
    (lambda loss: loss.expand(3), "a tensor of shape .3,."),
    (lambda loss: {"loss": loss.expand(2)}, "a tensor of shape .2,."),
    (lambda loss: None, "returned None"),
    (lambda loss: {"no loss": loss}, "found NoneType|returned NoneType"),
    (lambda loss: loss.item(), "returned float"),
    (lambda loss: loss.detach(), "does not depend on any parameter"),
    (lambda loss: loss * 0 - 1, "negative"),
]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("change", "message"), CANNOT_BE_LEARNED_FROM)
def test_losses_that_cannot_be_learned_from_are_refused(trainer: Any, change: Any, message: str, search: bool) -> None:
    callback = learner(initial_search=search)
    refused(trainer, Loses(change), message, callback)


def test_negative_losses_work_with_the_naive_objective(trainer: Any) -> None:
    callback = learner(objective="naive")
    trainer(callback).fit(Loses(lambda loss: loss - 5), **loaders())
    assert callback.history and callback.history[-1]["meta_objective"] < 0
    assert "objective='naive'" in refused(trainer, Loses(lambda loss: loss - 5), "negative")


def test_a_negative_loss_is_refused_before_a_candidate_is_tried(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("the search has begun")

    monkeypatch.setattr("lightning_l2l.host.look_ahead.search_learning_rate", tried)
    message = refused(trainer, Loses(lambda loss: loss - 5), "negative", learner(initial_search=True))
    assert "objective='naive'" in message
    with pytest.raises(AssertionError, match="the search has begun"):
        trainer(learner(initial_search=True, objective="naive")).fit(Loses(lambda loss: loss - 5), **loaders())


def test_two_callbacks_in_one_trainer_are_refused(trainer: Any) -> None:
    class Mine(LearnToLearn):
        """Lightning takes it for another kind of callback."""

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LearnToLearn`"):
        trainer(learner(), learner())
    fitted = trainer(learner(), Mine(initial_search=False))
    module = Plain()
    before = module.net.weight.clone()
    with pytest.raises(MisconfigurationException, match=r"2 LearnToLearn callbacks .*LearnToLearn, Mine.*Keep one"):
        fitted.fit(module, **loaders())
    assert torch.equal(module.net.weight, before)


@pytest.mark.feature('no validation data with `meta_data="val"`', "refused")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_no_validation_data_names_the_two_ways_out(trainer: Any) -> None:
    class NoStep(Plain):
        validation_step = LightningModule.validation_step  # not overridden

    data = {"train_dataloaders": loader()}
    for module, options in [
        (Plain(), {"data": data}),
        (Plain(), {"limit_val_batches": 0}),
        (NoStep(), {}),
    ]:
        message = refused(trainer, module, "needs validation data", **options)
        assert "meta_data=my_loader" in message and "meta_data='train'" in message
    for way_out in (learner(meta_data=loader()), learner(meta_data="train")):
        trainer(way_out).fit(Plain(), loader())
        assert way_out.history


class Nothing(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize("empty", [DataLoader(Nothing(), 2), [], DataLoader(loader().dataset, 64, drop_last=True)])
def test_empty_meta_data_is_said_to_be_empty(trainer: Any, empty: Any) -> None:
    refused(trainer, Plain(), "no batch", learner(meta_data=empty))


def test_empty_validation_data_is_said_to_be_empty(trainer: Any) -> None:
    data = {"train_dataloaders": loader(), "val_dataloaders": DataLoader(Nothing(), 2)}
    refused(trainer, Rich(), "no batch", data=data)


def test_an_operation_without_a_second_derivative_fails_before_the_first_step(trainer: Any) -> None:
    class Margin(Plain):
        def loss(self, batch: Any) -> Any:
            return nn.functional.multi_margin_loss(self.net(batch[0]), batch[1])

    module = Margin()
    before = module.net.weight.clone()
    with pytest.raises(RuntimeError, match="multi_margin_loss_backward"):
        trainer(observer(estimator="forward")).fit(module, **loaders())
    assert torch.equal(before, module.net.weight)
