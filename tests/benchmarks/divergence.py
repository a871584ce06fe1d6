"""Rates that are far too large, without the initial search: test loss on digits without and with the divergence guard.

    python tests/benchmarks/divergence.py

About four minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from digits_tasks import EPOCHS, Classifier, digits, loaders, test_loss
from plain_loop import QUIET

from lightning_l2l import LearnToLearn

RATES = (0.01, 0.1, 1.0, 10.0, 1000.0)


def run(kind: str, optimizer: str, rate: float, seed: int, guard: bool) -> tuple[float, list[int], float]:
    """Test loss, the steps after which it was taken back, and the last rate."""
    torch.manual_seed(seed)
    module = Classifier(kind, optimizer, rate)
    callback = LearnToLearn(initial_search=False, divergence_guard=guard)
    data = digits()
    pl.Trainer(max_epochs=EPOCHS, callbacks=[callback], **QUIET).fit(module, *loaders(data, seed))
    taken_back = [record["step"] for record in callback.history if record["diagnostics"]["trouble"] == "rolled_back"]
    return test_loss(module.net, data), taken_back, callback.learning_rates[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args(arguments).seed
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"{'network':9}{'optimizer':10}{'rate':>7}{'without':>9}{'with':>8}{'last rate':>11}  taken back after step")
    for kind in ("mlp", "convnet"):
        for optimizer in ("sgd", "adam"):
            for rate in RATES:
                without, _, _ = run(kind, optimizer, rate, seed, False)
                loss, steps, last = run(kind, optimizer, rate, seed, True)
                print(f"{kind:9}{optimizer:10}{rate:7g}{without:9.3f}{loss:8.3f}{last:11.3g}  {steps}", flush=True)


if __name__ == "__main__":
    main()
