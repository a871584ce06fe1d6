"""A progress bar for what takes a while before the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm.auto import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import lightning.pytorch as pl


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes away at the end, on the first process only, where the Trainer has one of its own that is on.

    Args:
        trainer: The Trainer.
        description: What is going on.
        total: Units of work at most.

    Yields:
        What to call with the units that have been done since.
    """
    own = trainer.progress_bar_callback
    shown = trainer.is_global_zero and getattr(own, "is_enabled", False)
    with tqdm(total=total, desc=description, unit="step", leave=False, disable=not shown) as bar:

        def done(steps: int) -> None:
            bar.update(steps)

        yield done
