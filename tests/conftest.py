"""One quiet Trainer for all tests, and the same random numbers at the start of each."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

# The tests' tensors are small: a second thread costs more than it helps, and much more where cores are shared.
torch.set_num_threads(1)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_epochs": 2,
}


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """``trainer(callback, ..., **options)``: a Trainer with quiet defaults, writing to a temporary folder."""

    torch.manual_seed(0), np.random.seed(0), random.seed(0)

    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        return pl.Trainer(**{**QUIET, "default_root_dir": tmp_path, "callbacks": list(callbacks), **options})

    return make


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
