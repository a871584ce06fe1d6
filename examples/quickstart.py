"""Train a small language model from a careless learning rate: as it is, with LearnToLearn, and with rates of a grid.

The text is Python's own standard library. Prints a table and writes quickstart.png, in less than two minutes:

    python examples/quickstart.py
"""

import argparse
import logging
import sysconfig
import time
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnToLearn

CONTEXT, WIDTH = 64, 64
CARELESS, USUAL, GRID = 1e-5, 1e-3, (1e-3, 3e-3, 1e-2)


class LanguageModel(L.LightningModule):
    """Predicts the next character of Python source. Nothing in it knows of LearnToLearn."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.symbols, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def loss(self, batch: list[Tensor]) -> Tensor:
        text = batch[0]
        hidden = self.symbols(text[:, :-1]) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=self.device)
        logits = self.head(self.layers(hidden, mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Run(L.Callback):
    """One training: its held-out losses, and what came out of it."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.curve.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))


def passages(*modules: str) -> TensorDataset:
    """Pieces of the source of modules of the standard library."""
    text = "".join(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8") for name in modules)
    return TensorDataset(torch.tensor(list(text.encode("ascii", "ignore"))).unfold(0, CONTEXT + 1, CONTEXT))


def train(learning_rate: float, steps: int, learn: bool = False) -> Run:
    L.seed_everything(0, verbose=False)
    batches = DataLoader(passages("argparse", "inspect", "tarfile", "doctest", "pdb", "typing"), 16, shuffle=True)
    held_out, test = DataLoader(passages("textwrap"), 64), DataLoader(passages("optparse"), 64)
    model, run, learner = LanguageModel(learning_rate), Run(), LearnToLearn()
    trainer = L.Trainer(
        max_steps=steps, val_check_interval=max(1, steps // 12), check_val_every_n_epoch=None, accelerator="cpu",
        callbacks=[run, learner] if learn else [run],  # <- this is all there is to add
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(model, batches, held_out)
    run.seconds = time.perf_counter() - began
    run.first_rate = learning_rate
    run.largest_rate = max([learning_rate, *(record["learning_rates"][0] for record in learner.history)])
    run.test_loss = trainer.validate(model, test, verbose=False)[0]["val_loss"]
    return run


def draw(runs: dict[str, Run], path: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("k:", "r--", "b-", "k-"), strict=True):
        axes.plot(*zip(*run.curve, strict=True), style, linewidth=3 if style == "b-" else 1, label=name)
    axes.set(xlabel="training step", ylabel="held-out loss", title="A small language model")
    axes.legend(frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of each training (%(default)s)")
    parser.add_argument("--plot", default="quickstart.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    grid = {rate: train(rate, options.steps) for rate in GRID}
    runs = {
        f"careless rate {CARELESS:g}": train(CARELESS, options.steps),
        f"usual rate {USUAL:g}": grid[USUAL],
        f"LearnToLearn from {CARELESS:g}": train(CARELESS, options.steps, learn=True),
        f"best of {len(GRID)} rates": min(grid.values(), key=lambda run: run.curve[-1][1]),
    }
    print(f"{'':24}{'first rate':>12}{'largest':>12}{'test loss':>12}{'seconds':>10}")
    for name, run in runs.items():
        print(f"{name:24}{run.first_rate:12.2g}{run.largest_rate:12.2g}{run.test_loss:12.3f}{run.seconds:10.1f}")
    draw(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
