"""Runs a test's function in several processes at once, and brings back what each of them returns.

The processes are forked from a server that has imported torch and Lightning once, so that they start in no time and
without the threads of the test runner. Each is a process of a DDP run as a cluster would start it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Far beyond what any test takes: what is not back by then hangs.
PATIENCE = 90.0


class Hung(AssertionError):
    """Some process did not come back."""


def launch(folder: Path, function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returns in each process, or ``"Kind: message"`` of what it raises."""
    context = multiprocessing.get_context("forkserver")
    # Not the tests' own modules: the server of Python 3.11 does not know where they are.
    context.set_forkserver_preload(["lightning.pytorch", "torchmetrics.classification", "lightning_l2l"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [folder / f"{function.__name__}-{port}-{rank}.pt" for rank in range(count)]
    running = [
        context.Process(target=_run, args=(rank, count, port, paths[rank], function, arguments))
        for rank in range(count)
    ]
    for process in running:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(running) if process.is_alive()]
    for process in running:
        process.kill()
        process.join()
    if hung:
        raise Hung(f"processes {hung} of {count} still ran after {PATIENCE} s")
    return [torch.load(path, weights_only=False) for path in paths]


def _run(rank: int, count: int, port: int, path: Path, function: Callable[..., Any], arguments: Any) -> None:
    if count > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    torch.save(result, path)
    # Not through the interpreter's shutdown: a process group in a broken state may wait there.
    os._exit(0)
