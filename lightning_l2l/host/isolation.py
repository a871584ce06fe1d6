"""Makes calls of the user's training step invisible to the user's run.

Each context manager says what is equal before and after; each restores in ``finally`` and can be tested alone.
Parameters and buffers need none: they are passed functionally (:mod:`lightning_l2l.host.training_step`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import Metric

if TYPE_CHECKING:
    import lightning.pytorch as pl


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds all generators, and puts back the state that they had.

    Covers torch on the CPU and on every initialised accelerator, numpy's global generator, and :mod:`random`.
    Lightning's own ``isolate_rng`` loses the state when an exception passes through it (2.6.6).

    Args:
        seed: The seed inside. What is drawn inside is the same whatever happened before.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


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
    """``self.log``, ``self.log_dict`` and ``self.logger`` do nothing inside; results and loggers stay as they were."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        for child in module.modules():
            if _is_lightning_module(child):
                stack.enter_context(hidden_attribute(child, "log", _ignore))
                stack.enter_context(hidden_attribute(child, "log_dict", _ignore))
        try:
            trainer.loggers = [DummyLogger()]
            yield
        finally:
            trainer.loggers = loggers


def _ignore(*_args: Any, **_options: Any) -> None:
    """Stands in for ``self.log``."""


def _is_lightning_module(module: nn.Module) -> bool:
    # By name as well as by type: `pytorch_lightning.LightningModule` is another class than `lightning.pytorch`'s.
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


@contextmanager
def preserved_metrics(module: nn.Module) -> Iterator[None]:
    """Every torchmetrics state in the module is the same object with the same content before and after.

    Metric states are ordinary attributes, so substituting parameters and buffers does not reach them.
    """
    saved: list[tuple[Metric, dict[str, Any]]] = []
    for metric in (child for child in module.modules() if isinstance(child, Metric)):
        names = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_to_sync", "_should_unsync"]
        saved.append((metric, {name: metric.__dict__[name] for name in names if name in metric.__dict__}))
    try:
        for metric, state in saved:
            for name in metric._defaults:
                if name in state:
                    metric.__dict__[name] = _copied(state[name])
        yield
    finally:
        for metric, state in saved:
            metric.__dict__.update(state)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [_copied(item) for item in value] if isinstance(value, list) else value


@contextmanager
def twice_differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Switches off what has no second derivative: compiled regions, and cuDNN's recurrent networks.

    Attention is taken care of in the core. Compiled code: "does not currently support double backward" (torch 2.13).
    """
    with ExitStack() as stack:
        if any("_orig_mod" in name for name, _ in module.named_modules()) or hasattr(module, "_compiler_ctx"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.cuda.is_initialized() and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def invisible(trainer: pl.Trainer, module: nn.Module, seed: int) -> Iterator[None]:
    """All of the above, with gradients on: for calls of the user's training step that the run must not notice."""
    with (
        isolated_random_state(seed),
        muted_logging(trainer, module),
        preserved_metrics(module),
        twice_differentiable_kernels(module),
        torch.enable_grad(),
    ):
        yield
