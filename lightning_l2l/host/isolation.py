"""Calls of the user's training step that the run does not notice: logging, loggers and flags of the Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_l2l.host.lightning_api import is_a
from lightning_l2l.preserve import preserved_module, preserved_random_state

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What a LightningModule knows of the run: preserved by itself, or not a state of the module.
_OF_LIGHTNING = ("_trainer", "_fabric", "_fabric_optimizers")


@contextmanager
def hidden_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside; what it was before, the class's own included, is back afterwards."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    # Past nn.Module's attribute handling: on the instance it hides the class's method.
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, before)
        else:
            vars(owner).pop(name, None)


@contextmanager
def muted_logging(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """``self.log``, ``self.log_dict`` and ``self.print`` do nothing inside, and loggers record nothing."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        for child in module.modules():
            if is_a(child, "LightningModule"):
                for name in ("log", "log_dict", "print"):
                    stack.enter_context(hidden_attribute(child, name, _ignore))
        try:
            trainer.loggers = [_muted(logger) for logger in loggers]
            yield
        finally:
            trainer.loggers = loggers


def _ignore(*_args: Any, **_options: Any) -> None:
    """Stands in for whatever records something."""


class _MutedExperiment:
    """A logger's experiment: its values and getters pass through, its other methods do nothing."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experiment, name)
        return _ignore if callable(value) and not name.startswith("get") else value


def _muted(logger: Any) -> Any:
    """An object of the logger's class with its attributes (save_dir, version, ...) that records nothing."""
    kind = type(logger)
    silent: dict[str, Any] = {
        name: _ignore
        for name in dir(kind)
        if name.startswith("log_") and name != "log_dir" and callable(getattr(kind, name, None))
    }
    silent |= {"save": _ignore, "finalize": _ignore, "after_save_checkpoint": _ignore, "__module__": kind.__module__}
    silent["experiment"] = property(lambda self: _MutedExperiment(kind.experiment.__get__(logger)))
    muted: Any = object.__new__(type(kind.__name__, (kind,), silent))
    muted.__dict__ = vars(logger)
    return muted


@contextmanager
def unnoticed(trainer: pl.Trainer, module: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers, attributes, logs, loggers and the Trainer's flags are as before; gradients are on inside.

    Parameters and buffers are :class:`lightning_l2l.preserve.PreservedTensors`' part.

    Args:
        trainer: The Trainer.
        module: The user's module.
        seed: Of the random numbers inside.
    """
    flags = dict(vars(trainer))
    try:
        with (
            preserved_random_state(seed),
            preserved_module(module, skip=_OF_LIGHTNING),
            muted_logging(trainer, module),
            torch.enable_grad(),
        ):
            yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(flags)
