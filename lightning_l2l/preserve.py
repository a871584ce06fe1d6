"""Everything that a call of the user's training step may change, put back afterwards.

A held-out gradient is taken on the live module, in place, by the user's own step. Parameters (frozen ones and teachers,
too), buffers, gradients, attributes and random numbers are as before when :func:`preserved` ends, also after an error.
"""

from __future__ import annotations

import copy
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

_CONTAINERS = (list, tuple, dict, set, deque, OrderedDict, defaultdict, Counter)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What nn.Module itself keeps in __dict__; parameters and buffers are put back by value.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Objects whose attributes are not looked into: modules are preserved by themselves, and data sets are large.
_LEFT_ALONE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, Dataset, DataLoader, Sampler)
# Tensors and arrays with more entries are data, and not copied for each call.
_LARGE = 2**22


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """All global random number generators are as before: torch's (CPU and initialised CUDA devices), numpy's, Python's.

    Args:
        seed: The seed inside; ``None`` leaves them where they are.
    """
    # A CUDA generator that is not initialised yet must not be: it would remember a seed for later.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    on_cuda = [torch.cuda.get_rng_state(device) for device in devices]
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
        for device, state in zip(devices, on_cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_generators(owner: Any) -> Iterator[None]:
    """The attributes of an object are the same objects before and after, and generators among them in the same state.

    For data sets and samplers, whose contents are too large to copy; those that they wrap are preserved, too.

    Args:
        owner: Any object; one without a ``__dict__`` has nothing to preserve.
    """
    attributes: list[tuple[Any, dict[str, Any]]] = []
    undo: list[tuple[Any, Any]] = []
    pending = [owner]
    while pending:
        value = pending.pop()
        if isinstance(value, _GENERATORS):
            undo.append((value, _generator_state(value)))
        elif hasattr(value, "__dict__") and all(value is not seen for seen, _ in attributes):
            attributes.append((value, dict(vars(value))))
            kinds = (*_GENERATORS, Dataset, Sampler)
            pending += [item for item in vars(value).values() if isinstance(item, kinds)]
    try:
        yield
    finally:
        for value, before in attributes:
            vars(value).clear()
            vars(value).update(before)
        _undo(undo)


@contextmanager
def preserved_module(module: nn.Module, *, skip: Iterable[str] = ()) -> Iterator[None]:
    """The attributes of every submodule are the same objects with the same content before and after.

    Inside, tensors, arrays and plain containers (nested ones, too) are working copies. Generators are put back to their
    state, and the attributes of other objects are preserved one level deep. Parameters and buffers are not covered.

    Args:
        module: The module.
        skip: Names of attributes that are left alone.
    """
    left_alone = _OF_EVERY_MODULE.union(skip)
    saved = [(child, dict(vars(child))) for child in module.modules()]
    undo: list[tuple[Any, Any]] = []
    try:
        for child, attributes in saved:
            for name in attributes.keys() - left_alone:
                value = attributes[name]
                if type(value) not in (int, float, bool, str, type(None)):
                    vars(child)[name] = _working_copy(value, undo)
        yield
    finally:
        for child, attributes in saved:
            present = vars(child)
            for name in [name for name in present if name not in attributes]:
                del present[name]
            present.update(attributes)
        _undo(undo)


def _working_copy(value: Any, undo: list[tuple[Any, Any]], depth: int = 3) -> Any:
    kind = type(value)
    if kind is Tensor:
        return value if value.requires_grad or value.numel() > _LARGE else value.detach().clone()
    if kind is np.ndarray:
        return value if value.size > _LARGE else value.copy()
    if kind in _CONTAINERS:
        if depth == 0:
            return value
        if kind is tuple:
            return tuple(_working_copy(item, undo, depth - 1) for item in value)
        copied = copy.copy(value)
        if isinstance(copied, dict):
            for key, item in value.items():
                copied[key] = _working_copy(item, undo, depth - 1)
        elif isinstance(copied, (list, deque)):
            for index, item in enumerate(value):
                copied[index] = _working_copy(item, undo, depth - 1)
        return copied
    if isinstance(value, _GENERATORS):
        undo.append((value, _generator_state(value)))
    elif isinstance(getattr(value, "__dict__", None), dict) and depth == 3 and not isinstance(value, _LEFT_ALONE):
        # The object itself stays, since others may hold it; its attributes are put back.
        attributes = vars(value)
        undo.append((value, dict(attributes)))
        for name, item in list(attributes.items()):
            attributes[name] = _working_copy(item, undo, 1)
    return value


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _undo(undo: list[tuple[Any, Any]]) -> None:
    for value, before in reversed(undo):
        if isinstance(value, np.random.Generator):
            value.bit_generator.state = before
        elif isinstance(value, random.Random):
            value.setstate(before)
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            value.set_state(before)
        else:
            vars(value).clear()
            vars(value).update(before)
    undo.clear()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the local shard of a ``DTensor``, else the tensor itself; detached."""
    shard = getattr(tensor, "to_local", None)
    return tensor.detach() if shard is None else shard().detach()


class PreservedTensors:
    """Puts back the parameters and buffers of a module, by value, after calls of the user's step.

    A step may move a teacher or a queue in place, through ``.data`` as well, so that only values tell. The first call
    copies everything and finds out what the step moves. Later ones copy the buffers, the trainable parameters, and of
    the frozen ones those that moved then; where the frozen part is the smaller one, all of it.

    Args:
        modules: The modules whose parameters and buffers are put back.
        optimizers: Their parameters are put back wherever they are.
    """

    def __init__(self, modules: Iterable[nn.Module], *optimizers: torch.optim.Optimizer) -> None:
        self._modules = list(modules)
        self._optimizers = optimizers
        self._moving: set[int] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the step may change what it likes; gradients are ``None`` at first, and as before afterwards."""
        owned = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        parameters = list(dict.fromkeys([*owned, *(p for module in self._modules for p in module.parameters())]))
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        tensors = [t for t in [*parameters, *buffers] if not nn.parameter.is_lazy(t)]
        flags = [(parameter, parameter.requires_grad) for parameter in parameters]
        frozen = {id(parameter) for parameter in parameters if not parameter.requires_grad}
        large = sum(p.numel() for p in parameters if id(p) in frozen) > sum(
            p.numel() for p in parameters if id(p) not in frozen
        )
        saved: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            spare = large and id(tensor) in frozen
            if not spare or self._moving is None or id(tensor) in self._moving:
                copied = local(tensor).clone()
                saved.append((tensor, copied.cpu() if spare else copied))
        gradients = [(tensor, tensor.grad) for tensor in parameters if tensor.grad is not None]
        for tensor, _ in gradients:
            tensor.grad = None
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            moved = set()
            for tensor, before in saved:
                before = before.to(tensor.device)
                # Sparse tensors (the adjacency of a graph) cannot be compared.
                if tensor.layout != torch.strided or not torch.equal(local(tensor), before):
                    moved.add(id(tensor))
                    local(tensor).copy_(before)
            self._moving = moved if self._moving is None else self._moving | moved
            for parameter in parameters:
                parameter.grad = None
            for tensor, gradient in gradients:
                tensor.grad = gradient
