"""Train two digit classifiers from a careless learning rate: as it is, with LearnToLearn, and with the best of a grid.

Takes under a minute on one CPU core, prints a table and writes digits.png:

    python examples/digits.py
"""

import argparse
import time
from dataclasses import dataclass

import lightning as L
from digits_task import QUIET, Classifier, Digits, prepare
from matplotlib.figure import Figure

from lightning_l2l import LearnToLearn


@dataclass
class Run:
    """One training: rates (one per meta-update), held-out loss after each epoch, result on the test images, time."""

    start: float
    rates: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    loss: float
    accuracy: float
    seconds: float


class HeldOutLoss(L.Callback):
    """Keeps the held-out loss of every epoch, for the plot."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.curve.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))


def train(network: str, learning_rate: float, epochs: int, learn: bool = False) -> Run:
    L.seed_everything(0, verbose=False)
    model, data, curve = Classifier(network, "sgd", learning_rate), Digits(), HeldOutLoss()
    learner = LearnToLearn()  # <- this, and its place in the list of callbacks, is all there is to add
    trainer = L.Trainer(max_epochs=epochs, callbacks=[curve, learner] if learn else [curve], **QUIET)
    began = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - began
    tested = trainer.test(model, data, verbose=False)[0]
    start = learning_rate
    if learner.search_result is not None and learner.search_result.learning_rate is not None:
        start = learner.search_result.learning_rate
    steps = [(0, start), *((record["step"], record["learning_rates"][0]) for record in learner.history)]
    rates = [*steps, (trainer.global_step, steps[-1][1])]
    return Run(start, rates, curve.curve, tested["test_loss"], tested["test_accuracy"], seconds)


def draw(results: dict[str, dict[str, Run]], path: str) -> None:
    figure = Figure(figsize=(8, 2.9 * len(results)), layout="constrained", dpi=150)  # not pyplot: no window needed
    styles = [("0.5", ":"), ("#0072B2", "-"), ("#D55E00", "--")]
    axes = figure.subplots(len(results), 2, squeeze=False)
    for row, (network, runs) in zip(axes, results.items(), strict=True):
        for (name, run), (color, line) in zip(runs.items(), styles, strict=True):
            row[0].step(*zip(*run.rates, strict=True), where="post", color=color, linestyle=line, label=name)
            row[1].plot(*zip(*run.held_out, strict=True), color=color, linestyle=line)
        row[0].set(title=f"{network}: learning rate", xlabel="training step", yscale="log")
        row[1].set(title=f"{network}: held-out loss", xlabel="training step", yscale="log")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Run]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the careless rate (%(default)s)")
    parser.add_argument("--plot", default="digits.png", help="where to write the figure (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two epochs and a grid of two rates")
    options = parser.parse_args(arguments)
    epochs, grid = (2, [1e-2, 1e-1]) if options.quick else (25, [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    prepare()
    results: dict[str, dict[str, Run]] = {}
    print(f"{'':28}{'rate: start':>12}{'end':>9}{'test loss':>11}{'accuracy':>10}{'seconds':>9}")
    for network in ("mlp", "convnet"):
        tries = [train(network, rate, epochs) for rate in grid]
        best = min(tries, key=lambda run: run.held_out[-1][1])
        best.seconds = sum(run.seconds for run in tries)  # what it costs to know the best
        plain = train(network, options.learning_rate, epochs)
        learned = train(network, options.learning_rate, epochs, learn=True)
        results[network] = {"as it is": plain, "LearnToLearn": learned, f"best of {len(grid)} rates": best}
        for name, run in results[network].items():
            print(f"{network:9}{name:19}{run.start:12.3g}{run.rates[-1][1]:9.3g}", end="")
            print(f"{run.loss:11.4f}{run.accuracy:10.3f}{run.seconds:9.1f}", flush=True)
    draw(results, options.plot)
    print(f"figure: {options.plot}")
    return results


if __name__ == "__main__":
    main()
