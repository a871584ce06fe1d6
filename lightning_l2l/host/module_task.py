"""Any LightningModule as a task to meta-train on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_l2l.exact.substitution import call_with
from lightning_l2l.host.isolation import hidden_attribute, isolated_random_state
from lightning_l2l.host.training_step import _CallTrainingStep, _loss_of, copied_batch
from lightning_l2l.tasks.task import Task


class ModuleTask(Task):
    """Your LightningModule, its ``training_step`` and its data as a :class:`~lightning_l2l.tasks.Task`.

    Each training starts from a newly made module. Batches are drawn with replacement from the loaders' datasets, in the
    loaders' batch size and through their ``collate_fn``. Only parameters that require a gradient are trained. Buffers
    are those of a fresh module in every step: running averages of BatchNorm are computed from each batch and forgotten.
    Tasks of this kind are trained one after the other, not batched.

    What ``training_step`` changes elsewhere (counters, metrics) stays on a private module and reaches no logger.

    Args:
        make_module: Makes the module, e.g. ``lambda: MyModule(width=32)``; its random numbers come from the task.
        train: The training data; its dataset must have a length.
        val: Held-out data for train-by-validation.
        test: Data for reports.

    Raises:
        TypeError: A loader's dataset has no length, or ``make_module`` makes something else.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> task = ModuleTask(BoringModel, DataLoader(RandomDataset(32, 64), batch_size=8))
        >>> parameters = task.initial_parameters(torch.Generator().manual_seed(0))
        >>> task.loss(parameters, task.sample_batch("train")).shape
        torch.Size([])
    """

    def __init__(
        self,
        make_module: Callable[[], pl.LightningModule],
        train: DataLoader[Any],
        val: DataLoader[Any] | None = None,
        test: DataLoader[Any] | None = None,
    ) -> None:
        self._make = make_module
        self._loaders = {"train": train, "val": val, "test": test}
        for split, loader in self._loaders.items():
            if loader is not None and not hasattr(loader.dataset, "__len__"):
                raise TypeError(
                    f"The {split} dataset has no length, so batches cannot be drawn from it at random. Wrap it in a "
                    "dataset with __len__ and __getitem__."
                )
        self._module = self._made(0)
        self._call = _CallTrainingStep(self._module)
        self._buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}

    def initial_parameters(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The parameters of a newly made module, by name."""
        seed = int(torch.randint(2**31, (), generator=generator))
        return {
            name: parameter.detach().clone()
            for name, parameter in self._made(seed).named_parameters()
            if parameter.requires_grad
        }

    def loss(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """What ``training_step`` returns at these parameters."""
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        substitutes = {f"module.{name}": tensor for name, tensor in {**buffers, **parameters}.items()}
        arguments = {"batch": copied_batch(batch)}
        if is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2):
            arguments["batch_idx"] = 0
        with hidden_attribute(self._module, "log", _ignore), hidden_attribute(self._module, "log_dict", _ignore):
            output = call_with(self._call, substitutes, arguments)
        return _loss_of(output)

    def sample_batch(self, split: Literal["train", "val", "test"], generator: torch.Generator | None = None) -> Any:
        """A batch of random examples of a split.

        Raises:
            ValueError: There is no such split.
        """
        loader = self._loaders[split]
        if loader is None:
            raise ValueError(f"This task has no {split!r} data: pass {split}=DataLoader(...), or use another split.")
        dataset: Any = loader.dataset
        count = loader.batch_size or 1
        chosen = torch.randint(len(dataset), (count,), generator=generator).tolist()
        examples = [dataset[index] for index in chosen]
        # Without automatic batching (batch_size=None) the dataset itself returns batches.
        if loader.batch_size is None:
            return examples[0]
        return (loader.collate_fn or default_collate)(examples)

    def _made(self, seed: int) -> pl.LightningModule:
        with isolated_random_state(seed):
            module = self._make()
        if not isinstance(module, pl.LightningModule):
            raise TypeError(f"make_module must make a LightningModule, but it made a {type(module).__name__}.")
        # A function that returns the same module each time would let one task train another's.
        return copy.deepcopy(module)


def _ignore(*_args: Any, **_options: Any) -> None:
    """Stands in for ``self.log``."""
