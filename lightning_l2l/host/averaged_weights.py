"""Returned weights: the running averages where weights are read, the weights of the training where it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_l2l.host import lightning_api
from lightning_l2l.host.held_out import SEED_STRIDE
from lightning_l2l.host.isolation import hidden_attribute, unnoticed
from lightning_l2l.host.training_loss import copied_batch
from lightning_l2l.preserve import PreservedTensors, local

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_l2l.tuner import Tuner

# By the convention of Lightning's WeightAveraging: where a checkpoint has the weights of the training, and what only
# its own checkpoints have.
_TRAINING_WEIGHTS, _OF_LIGHTNING = "current_model_state", "averaging_state"
# Training batches from which statistics of batch normalisation are taken anew. On the ResNet of tests/benchmarks/real,
# in the median of 35 measurements, the training's own statistics had 1.10 times the test loss, and running averages of
# them 1.09 times (1.5 and 1.7 times at worst); 32 batches had 0.98 times.
_BATCHES = 8


class Statistics:
    """Statistics of batch normalisation for averaged weights: means over the last training batches.

    They are taken by the user's own step, which the run does not notice. With manual optimization that would train, so
    the statistics stay those of the training. Layers that evaluate while the rest trains keep theirs, too.

    Args:
        trainer: The Trainer.
        module: The user's module.
        seed: Of what the step draws.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> None:
        self._trainer = trainer
        self._module = module
        self._seed = seed + trainer.global_rank * SEED_STRIDE
        can = not lightning_api.is_manual(module) and not lightning_api.takes_iterator(module)
        normalising = [
            child for child in module.modules() if isinstance(child, _NormBase) and child.track_running_stats
        ]
        self._layers = normalising if can else []
        self._batches: deque[tuple[Any, int]] = deque(maxlen=_BATCHES)
        self._evaluating: set[nn.Module] = set()
        self._tensors = PreservedTensors([module], *lightning_api.real_optimizers(trainer))
        self._found: dict[Tensor, Tensor] = {}
        self._step = -1

    @property
    def buffers(self) -> list[Tensor]:
        """All statistics of the module."""
        return _buffers(self._layers)

    def see(self, batch: Any, index: int) -> None:
        """A training batch begins."""
        if self._layers:
            self._batches.append((copied_batch(batch), index))
            self._evaluating = {child for child in self._module.modules() if not child.training}

    def forget(self) -> None:
        """Take none from now on: the run ends in an exception."""
        self._batches.clear()

    def of(self, step: int) -> dict[Tensor, Tensor]:
        """For the weights that the module holds after so many steps; empty where the training's have to do."""
        if self._layers and step != self._step:
            self._found, self._step = self._taken() if self._batches else {}, step
        return self._found

    def _taken(self) -> dict[Tensor, Tensor]:
        trainer, module = self._trainer, self._module
        layers = [layer for layer in self._layers if layer not in self._evaluating]
        buffers = _buffers(layers)
        failed: Exception | None = None
        with torch.inference_mode(False), self._tensors(), unnoticed(trainer, module, self._seed), torch.no_grad():
            for child in module.modules():
                child.training = child not in self._evaluating
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all batches
            try:
                for batch, index in self._batches:
                    lightning_api.run_training_step(trainer, module, copied_batch(batch), index)
            except Exception as error:  # whatever the user's step raises without a gradient
                failed = error
            values = [torch.zeros(1), *[buffer.flatten() for buffer in buffers]]
            joined = torch.cat([value.to(module.device) for value in values])
        joined[0] = float(failed is not None)
        if trainer.world_size > 1:
            joined = trainer.strategy.reduce(joined, reduce_op="mean")
        if joined[0] > 0:
            rank_zero_warn(
                "LearnToLearn called training_step to take the statistics of batch normalisation anew for the averaged "
                f"weights, and that failed ({failed or 'on another process'}). They stay those of the training."
            )
            self._layers = []
            return {}
        parts = joined[1:].split([buffer.numel() for buffer in buffers])
        return {buffer: part.view_as(buffer).to(buffer) for buffer, part in zip(buffers, parts, strict=True)}


def _buffers(layers: list[_NormBase]) -> list[Tensor]:
    return [b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None]


class AveragedWeights:
    """What ``LearnToLearn(average_weights=True)`` adds to a run, on the convention of Lightning's ``WeightAveraging``.

    In validation, and from the end of the training on, the module holds the averages that the tuners keep anyway, and
    the tuners hold the weights of the training: they trade places, so that there is no second copy. Checkpoints have
    the averages as ``state_dict`` and the weights of the training as ``current_model_state``.

    Args:
        is_on: Whether the run returns averages. Where not, a checkpoint of a run that did is resumed from the weights
            of the training all the same.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.release()

    def __reduce__(self) -> Any:
        """Copies and pickles of the callback know of no run."""
        return AveragedWeights, (self.is_on,)

    def release(self) -> None:
        """The run is over: what the module holds is what it returns."""
        self._loaded: dict[str, Tensor] | None = None
        self._module: pl.LightningModule | None = None
        self._tuners: list[Tuner] = []
        self._statistics: Statistics | None = None
        self._aside: dict[Tensor, Tensor] = {}
        self._shows_averages = False
        self._saves_averages = False

    # From the start of the training to its end.

    def go_on(self, tuner: Tuner, module: nn.Module, state: dict[str, Any]) -> None:
        """A tuner was attached to go on from a saved state.

        Args:
            tuner: The tuner.
            module: The user's module.
            state: The saved state.
        """
        average = state["average"]
        if self._loaded is not None and not average["average"]:  # too large, or sharded: the state_dict has it
            names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
            found = [self._loaded.get(names.get(p, ""), local(p)) for p in tuner.average.parameters]
            average = {**average, "average": found}
        tuner.load_state_dict({**state, "average": average})

    @contextmanager
    def returned(
        self, trainer: pl.Trainer, module: pl.LightningModule, tuners: list[Tuner], seed: int
    ) -> Iterator[None]:
        """Inside, checkpoints have the averages as ``state_dict``, those with nothing but weights, too.

        Args:
            trainer: The Trainer.
            module: The user's module.
            tuners: The present tuners: others may take their places in this list.
            seed: Of what the step draws where statistics are taken.
        """
        self._loaded = None
        if not self.is_on:
            yield
            return
        self._module, self._tuners, self._statistics = module, tuners, Statistics(trainer, module, seed)
        read = trainer.strategy.lightning_module_state_dict
        with hidden_attribute(trainer.strategy, "lightning_module_state_dict", lambda: self._state(True, read)):
            self._saves_averages = True
            try:
                yield
            finally:
                self._saves_averages = False

    def see_batch(self, batch: Any, index: int) -> None:
        """A training batch begins."""
        if self._statistics is not None:
            self._statistics.see(batch, index)

    @torch.no_grad()
    def show(self, averages: bool) -> None:
        """Let the module hold the averages, or the weights of the training."""
        if self._module is None or self._statistics is None or averages == self._shows_averages:
            return
        lightning_api.forget_gathered(self._module)
        for tuner in self._tuners if averages else reversed(self._tuners):
            tuner.average.exchange()
        values, self._aside, self._shows_averages = self._aside, {}, averages
        if averages:
            values = self._statistics.of(sum(tuner.steps for tuner in self._tuners))
            self._aside = {buffer: buffer.clone() for buffer in values}
        for buffer, value in values.items():
            buffer.copy_(value)

    def end_early(self, exception: BaseException) -> None:
        """What was interrupted returns the averages; what failed leaves the weights of the training."""
        if self._statistics is not None:
            self._statistics.forget()
        self.show(isinstance(exception, KeyboardInterrupt))

    def end(self, saved: dict[str, Any]) -> None:
        """The tuners are about to leave. Where the module keeps the averages, the next fit goes on from these.

        Args:
            saved: What the next fit begins with.
        """
        if self._shows_averages:
            for state in saved["tuners"]:
                state["average"]["average"] = []

    # Checkpoints.

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Averages and weights of the training into a checkpoint."""
        module = self._module
        if module is None:
            return
        if not self._saves_averages:  # after an exception
            checkpoint["state_dict"] = self._state(True, trainer.strategy.lightning_module_state_dict)
        checkpoint[_TRAINING_WEIGHTS] = self._state(False, lambda: lightning_api.whole_state(trainer, module))

    def _state(self, averages: bool, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The module's state with the averages, or with the weights of the training, whatever it holds now."""
        if averages == self._shows_averages or self._statistics is None:
            return read()
        self.show(averages)
        try:
            state = read()
            moving = [p for tuner in self._tuners for p in tuner.average.parameters] + self._statistics.buffers
            places = {_place(tensor) for tensor in moving}
            copies: dict[Any, Tensor] = {}  # one for tied weights
            for name, value in list(state.items()):
                if isinstance(value, Tensor) and _place(value) in places:
                    key = local(value).data_ptr(), value.shape
                    if key not in copies:
                        copies[key] = value.cpu() if value.device.type != "cpu" else value.clone()
                    state[name] = copies[key]
        finally:
            self.show(not averages)
        return state

    def load(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The training goes on from its own weights, and the average from what the module was loaded with."""
        self._loaded = None
        if _TRAINING_WEIGHTS not in checkpoint or _OF_LIGHTNING in checkpoint:
            if self.is_on:
                rank_zero_info(
                    "LearnToLearn: the checkpoint was saved without average_weights=True, or after the fit. The "
                    "training goes on from its state_dict, and so does the average, unless the callback's state has it."
                )
            return
        if not self.is_on:
            rank_zero_info(
                "LearnToLearn: the state_dict of the checkpoint is an average. The training goes on from the weights "
                "that it had, and will not return their average, as average_weights=True would."
            )
        parameters = {name: p for name, p in module.named_parameters() if not is_lazy(p)}
        averages = {name: local(parameter).clone() for name, parameter in parameters.items()}
        lightning_api.load_whole_state(trainer, module, checkpoint[_TRAINING_WEIGHTS])
        self._loaded = {n: value for n, value in averages.items() if not torch.equal(value, local(parameters[n]))}


def _place(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()
