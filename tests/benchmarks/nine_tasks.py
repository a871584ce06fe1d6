"""``LearnToLearn()`` on the nine tasks that its first version was measured on: reported, not chosen on.

    python tests/benchmarks/nine_tasks.py [--results nine_tasks.csv] [--seeds 1] [--tasks NAMES] [--grid-seeds 1]

About 1000 steps each, with SGD with momentum, Adam and AdamW, from rates of 1e-6, 0.001, 0.1 and 10, against the best
of eleven constant rates, half a decade apart, by mean test loss. Held-out data are the validation data of the fit, test
data are for the report alone. Finished runs are rows of the results and are not run again; a ratio is that of the seeds
that both sides have.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import numpy
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_l2l import LearnToLearn

STARTS = (1e-6, 1e-3, 1e-1, 10.0)
FINEST = {"sgd": -4, "adam": -5, "adamw": -5}  # log10 of the first of eleven rates
# Text that is on every machine with Python; its versions differ a little.
TEXT = (("argparse", "inspect", "tarfile"), ("zipfile",), ("typing", "optparse"))
SYMBOLS, CONTEXT = 96, 32
Key = tuple[str, str, str, float, int]  # method, task, optimizer, start, seed


@dataclass(frozen=True)
class Task:
    """What is trained, on what (training, held-out and test data), for how long."""

    parts: list[TensorDataset]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    epochs: int


class Learner(pl.LightningModule):
    """Any user's module: nothing in it knows of LearnToLearn."""

    def __init__(self, task: Task, optimizer: str, rate: float) -> None:
        super().__init__()
        self.net, self.criterion = task.network(), task.loss
        self.kind, self.rate = optimizer, rate

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, ...], _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.net.parameters(), lr=self.rate, momentum=0.9)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.kind](self.net.parameters(), lr=self.rate)


class Rows(nn.Module):
    """A GRU that reads an 8 x 8 image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.recurrent(images.unflatten(1, (8, 8)))[0][:, -1])


class Characters(nn.Module):
    """A causal transformer of one layer that says the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, characters: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.block(self.embedding(characters) + self.position, src_mask=mask, is_causal=True))


def perceptron(*sizes: int) -> nn.Module:
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(
    make: Callable[[], nn.Module], images: int = 1000, noise: float = 0.0, batch: int = 32, epochs: int = 32
) -> Task:
    data = load_digits()
    order = torch.randperm(len(data.data), generator=seeded(1))
    pairs = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    parts = [list(part) for part in zip(*(x.split([1000, 300, 497]) for x in pairs), strict=True)]
    generator = seeded(2)
    inputs, labels = parts[0][0][:images], parts[0][1][:images].clone()
    noisy = torch.rand(images, generator=generator) < noise
    labels[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator)
    parts[0] = [inputs, labels]
    return Task([TensorDataset(*part) for part in parts], make, nn.functional.cross_entropy, batch, epochs)


def divided(pairs: Iterable[Tensor], sizes: list[int]) -> list[TensorDataset]:
    return [TensorDataset(*part) for part in zip(*(x.split(sizes) for x in pairs), strict=True)]


def least_squares() -> Task:
    """Features whose scales fall like 1 / sqrt(index), 200 samples for 100 weights, noise."""
    g = seeded(3)
    inputs = torch.randn(1400, 100, generator=g) / torch.arange(1.0, 101.0).sqrt()
    targets = inputs @ torch.randn(100, 1, generator=g) + 0.5 * torch.randn(1400, 1, generator=g)
    parts = divided((inputs, targets), [200, 200, 1000])
    return Task(parts, lambda: nn.Linear(100, 1), nn.functional.mse_loss, 20, 100)


def tabular() -> Task:
    """scikit-learn's diabetes, inputs and target standardised by the training part."""
    data, order = load_diabetes(), torch.randperm(442, generator=seeded(4))
    columns = torch.tensor(data.data), torch.tensor(data.target)[:, None]
    pairs = [x.float()[order] for x in columns]
    scaled = [(x - x[:222].mean(0)) / x[:222].std(0) for x in pairs]
    return Task(divided(scaled, [222, 100, 120]), lambda: perceptron(10, 32, 32, 1), nn.functional.mse_loss, 32, 143)


def windows(names: tuple[str, ...], count: int) -> TensorDataset:
    text = "".join(Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8") for name in names)
    codes = torch.tensor([min(max(ord(letter) - 31, 0), SYMBOLS - 1) for letter in text[: count * CONTEXT + 1]])
    return TensorDataset(codes[:-1].view(count, CONTEXT), codes[1:].view(count, CONTEXT))


def transformer() -> Task:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    parts = [windows(names, count) for names, count in zip(TEXT, (4000, 800, 1500), strict=True)]
    return Task(parts, Characters, loss, 8, 2)


def same_text() -> Task:
    """The transformer, with the windows of all three texts shuffled before they are divided; none of them twice."""
    apart = transformer()
    pairs = [torch.cat([part.tensors[i] for part in apart.parts]) for i in (0, 1)]
    first = torch.from_numpy(numpy.unique(pairs[0].numpy(), axis=0, return_index=True)[1])
    order = first[torch.randperm(len(first), generator=seeded(5))]
    return replace(apart, parts=divided([x[order] for x in pairs], [4000, len(first) - 5500, 1500]))


TASKS: dict[str, Callable[[], Task]] = {
    "digits MLP": lambda: digits(lambda: perceptron(64, 64, 64, 10)),
    "label noise": lambda: digits(lambda: perceptron(64, 64, 64, 10), noise=0.2),
    "GRU": lambda: digits(Rows),
    "tabular regression": tabular,
    "least squares": least_squares,
    "convnet": lambda: digits(convnet),
    "few samples": lambda: digits(lambda: perceptron(64, 64, 64, 10), images=150, batch=15, epochs=100),
    "transformer": transformer,
    "same text": same_text,
}
task = cache(lambda name: TASKS[name]())


def run(method: str, name: str, optimizer: str, start: float, seed: int) -> float:
    """Test loss: of a constant rate, in a plain loop, or with the callback, in a fit."""
    of = task(name)
    torch.manual_seed(seed)
    module, order = Learner(of, optimizer, start), RandomSampler(of.parts[0], generator=seeded(seed))
    if method == "constant":
        sampler, inner = BatchSampler(order, of.batch_size, drop_last=False), module.configure_optimizers()
        # No further than the last batch: a RandomSampler that is asked for more draws random numbers once again.
        for batch in (batch for _ in range(of.epochs) for batch in list(islice(sampler, len(sampler)))):
            loss = module.loss(of.parts[0][batch])
            if not math.isfinite(loss.item()):
                return math.inf
            inner.zero_grad()
            loss.backward()
            inner.step()
    else:
        loaders = DataLoader(of.parts[0], of.batch_size, sampler=order), DataLoader(of.parts[1], 100)
        pl.Trainer(
            max_epochs=of.epochs, callbacks=[LearnToLearn()], check_val_every_n_epoch=max(1, of.epochs // 10),
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        ).fit(module, *loaders)  # fmt: skip
    with torch.no_grad():
        return module.eval().loss(of.parts[2].tensors).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("nine_tasks.csv"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--grid-seeds", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    done: dict[Key, float] = {}
    if arguments.results.exists():
        with arguments.results.open(newline="", encoding="utf-8") as stream:
            done = {(m, t, o, float(r), int(s)): float(loss) for m, t, o, r, s, loss in csv.reader(stream)}
    for name in arguments.tasks if not arguments.report else ():
        for optimizer, finest in FINEST.items():
            rates = [10.0 ** (finest + place / 2) for place in range(11)]
            keys = [("constant", name, optimizer, rate, s) for rate in rates for s in range(arguments.grid_seeds)]
            keys += [("LearnToLearn", name, optimizer, rate, s) for rate in STARTS for s in range(arguments.seeds)]
            for key in keys:
                if key not in done:
                    done[key] = run(*key)
                    with arguments.results.open("a", newline="", encoding="utf-8") as stream:
                        csv.writer(stream).writerow([*key, done[key]])
    every: list[float] = []
    print(f"| task | optimizer | best constant | {' | '.join(f'{start:g}' for start in STARTS)} |\n|{'---|' * 7}")
    for name in TASKS:
        for optimizer in FINEST:
            mine = {(m, start, seed): v for (m, t, o, start, seed), v in done.items() if (t, o) == (name, optimizer)}
            grid = {start: {s for m, r, s in mine if (m, r) == ("constant", start)} for m, start, _ in mine}
            cells = []
            for start in STARTS:
                seeds = {s for m, r, s in mine if (m, r) == ("LearnToLearn", start)}
                means = [
                    statistics.fmean(mine["constant", rate, s] for s in seeds)
                    for rate, known in grid.items()
                    if seeds and seeds <= known
                ]
                if means:
                    found = statistics.fmean(mine["LearnToLearn", start, s] for s in seeds)
                    every.append(found / min(means))
                    cells.append(f"{every[-1]:.2f}")
            if cells:
                print(f"| {name} | {optimizer} | {min(means):.4g} | {' | '.join(cells)} |")
    if every:
        print(f"\nOf {len(every)}: median {statistics.median(every):.2f}, worst {max(every):.2f}")


if __name__ == "__main__":
    main()
