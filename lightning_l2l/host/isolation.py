"""Makes calls of the user's training step invisible to the user's run.

Each context manager says what is equal before and after; each restores in ``finally`` and can be tested alone.
Parameters and buffers need none: they are passed functionally (:mod:`lightning_l2l.host.training_step`).
"""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_l2l.exact.random_state import RandomState

if TYPE_CHECKING:
    import lightning.pytorch as pl

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
# What nn.Module itself keeps in __dict__: functional_call works on the very dictionaries.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds all generators, and puts back the state that they had.

    Covers torch on the CPU and on initialised CUDA devices, numpy's global generator, and :mod:`random`.
    Lightning's own ``isolate_rng`` loses the state when an exception passes through it (2.6.6).

    Args:
        seed: The seed inside. What is drawn inside is the same whatever happened before.
    """
    initialised = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    before = RandomState.now([torch.device("cuda", index) for index in initialised])
    try:
        # Not torch.manual_seed: on an uninitialised CUDA device that would leave a seed behind for later.
        torch.default_generator.manual_seed(seed)
        if initialised:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        before.restore()


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
            if loggers:  # without one, `self.logger` is None inside as well
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
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Every attribute of every submodule is the same object, with the same content, before and after.

    Substituting parameters and buffers does not reach ordinary attributes: the states of torchmetrics, counters, lists
    that a step appends to, the train or eval mode. Inside, tensors and plain containers (two levels deep) are
    working copies. Objects of other classes are shared, so what a step changes *inside* them stays changed.
    """
    saved = [(child, dict(vars(child))) for child in module.modules()]
    try:
        for child, attributes in saved:
            for name, value in attributes.items():
                if name not in _OF_EVERY_MODULE:
                    vars(child)[name] = _working_copy(value)
        yield
    finally:
        for child, attributes in saved:
            present = vars(child)
            for name in [name for name in present if name not in attributes]:
                del present[name]
            present.update(attributes)


def _working_copy(value: Any, depth: int = 2) -> Any:
    if type(value) is torch.Tensor and not value.requires_grad:
        return value.detach().clone()
    if depth == 0 or type(value) not in _CONTAINERS:
        return value
    copied = copy.copy(value)
    # Tensors in containers are shared: states of torchmetrics that are lists are appended to, and may be large.
    if isinstance(copied, dict):
        for key, item in value.items():
            if type(item) in _CONTAINERS:
                copied[key] = _working_copy(item, depth - 1)
    elif isinstance(copied, (list, deque)):
        for index, item in enumerate(value):
            if type(item) in _CONTAINERS:
                copied[index] = _working_copy(item, depth - 1)
    return copied


@contextmanager
def twice_differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Switches off what has no second derivative: compiled regions, and cuDNN's recurrent networks.

    Attention is taken care of in the core. Compiled code: "does not currently support double backward" (torch 2.13).
    """
    with ExitStack() as stack:
        if getattr(module, "_compiler_ctx", None) is not None or any(is_compiled(child) for child in module.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.cuda.is_initialized() and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module runs compiled code."""
    # torch.compile(child) wraps it; child.compile() marks it.
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def invisible(trainer: pl.Trainer, module: nn.Module, seed: int) -> Iterator[None]:
    """All of the above, with gradients on: for calls of the user's training step that the run must not notice."""
    with (
        isolated_random_state(seed),
        preserved_attributes(module),
        muted_logging(trainer, module),
        twice_differentiable_kernels(module),
        torch.enable_grad(),
    ):
        yield
