"""Compare a rule at its one rate with AdamW at the best of eleven, on kinds of tasks that meta-training never saw.

Both with the same linear schedule to zero and the same batches. AdamW's rate is the one with the least mean validation
loss over the seeds; what is reported is the mean test loss at the end, divided by AdamW's. Also AdamW at 1e-3.

    python examples/pretrained/compare.py --output comparison.csv [--rule tensorwise.safetensors] [--steps 300 1000]

``--choosing`` compares on five other tasks: whoever changes the rule or its meta-training chooses there.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from tasks import perceptron, whole_text
from torch import Tensor, nn

from lightning_l2l import LearnedOptimizer

# Quarter decades from 3.2e-4 to 0.1.
RATES = [1e-3 * 10 ** (index / 4) for index in range(-2, 9)]
Splits = dict[str, tuple[Tensor, Tensor]]
Make = Callable[[nn.Module], torch.optim.Optimizer]


def split(inputs: Tensor, targets: Tensor, train: float = 0.7, val: float = 0.15) -> Splits:
    ends = [0, int(train * len(inputs)), int((train + val) * len(inputs)), len(inputs)]
    parts = zip(("train", "val", "test"), ends, ends[1:], strict=False)
    return {name: (inputs[start:end], targets[start:end]) for name, start, end in parts}


def table(load: Any) -> Splits:
    found = load()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(found.data, dtype=torch.float32)[order]
    targets = torch.tensor(found.target)[order]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    if targets.is_floating_point():
        targets = ((targets - targets.mean()) / targets.std())[:, None].float()
    return split(inputs, targets, 0.6, 0.2)


def images() -> Splits:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return split(torch.tensor(found.images, dtype=torch.float32)[order, None] / 16, torch.tensor(found.target)[order])


def characters(context: int = 12) -> Splits:
    numbers, _ = whole_text()
    splits = {}
    for name, (start, end), count in (
        ("train", (0.0, 0.8), 30_000),
        ("val", (0.8, 0.9), 2000),
        ("test", (0.9, 1.0), 2000),
    ):
        low, high = int(start * len(numbers)), int(end * len(numbers)) - context
        first = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(1))
        found = numbers[first[:, None] + torch.arange(context + 1)]
        splits[name] = found[:, :context], found[:, context]
    return splits


def ratings() -> Splits:
    generator = torch.Generator().manual_seed(3)
    users, items = torch.randn(50, 4, generator=generator) / 2, torch.randn(60, 4, generator=generator)
    pairs = torch.stack([torch.randint(n, (2400,), generator=generator) for n in (50, 60)], dim=1)
    scores = (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(1, keepdim=True) + 1
    return split(pairs, scores + 0.3 * torch.randn(scores.shape, generator=generator))


def waves() -> Splits:
    generator = torch.Generator().manual_seed(4)
    frequency, phase = (torch.rand(3000, 1, generator=generator) for _ in range(2))
    found = torch.sin((0.3 + 0.7 * frequency) * torch.arange(13.0) + 6.28 * phase)
    found = found + 0.05 * torch.randn(found.shape, generator=generator)
    return split(found[:, :12, None], found[:, 12:])


def clicks() -> Splits:
    generator = torch.Generator().manual_seed(5)
    users, items = torch.randn(60, 3, generator=generator), torch.randn(40, 3, generator=generator)
    pairs = torch.stack([torch.randint(n, (2000,), generator=generator) for n in (60, 40)], 1)
    likely = torch.sigmoid((users[pairs[:, 0]] * items[pairs[:, 1]]).sum(1, keepdim=True))
    return split(pairs, (torch.rand(likely.shape, generator=generator) < likely).float())


def friedman() -> Splits:
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(500, 10, generator=generator)
    y = 10 * torch.sin(3.14159 * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(500, generator=generator)
    return split((x - 0.5) * 3.46, ((y - y.mean()) / y.std())[:, None], 0.6, 0.2)


def spirals() -> Splits:
    generator = torch.Generator().manual_seed(7)
    radius, arm = torch.rand(900, generator=generator), torch.randint(3, (900,), generator=generator)
    angle = 4 * radius + 2.094 * arm + 0.25 * torch.randn(900, generator=generator)
    return split(2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module], inputs: nn.Module, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.cell = inputs, cell(width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.output(self.cell(self.inputs(sequence))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, count: int, context: int = 12, width: int = 24) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(count, width), nn.Parameter(0.1 * torch.randn(context, width))
        self.layer = nn.TransformerEncoderLayer(width, 3, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, count)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.output(self.norm(self.layer(self.embedding(numbers) + self.position))[:, -1])


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.bias = nn.Embedding(50, 8), nn.Embedding(60, 8), nn.Embedding(60, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        products = 0.1 * self.users(pairs[:, 0]) * self.items(pairs[:, 1])
        return products.sum(1, keepdim=True) + self.bias(pairs[:, 1])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(60, 6), nn.Embedding(40, 6)
        self.user_bias, self.item_bias = nn.Embedding(60, 1), nn.Embedding(40, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        products = (self.users(user) * self.items(item)).sum(1, keepdim=True) / 6**0.5
        return products + self.user_bias(user) + self.item_bias(item)


Tasks = dict[str, tuple[Splits, Callable[[], nn.Module], Callable[..., Tensor], int]]


def choosing() -> Tasks:
    ce, mse, logistic = (
        nn.functional.cross_entropy, nn.functional.mse_loss, nn.functional.binary_cross_entropy_with_logits
    )  # fmt: skip
    return {
        "network, iris": (table(load_iris), perceptron(4, 16, 3), ce, 16),
        "network, Friedman": (friedman(), perceptron(10, 32, 32, 1), mse, 32),
        "network with LayerNorm, spirals": (
            spirals(),
            lambda: nn.Sequential(
                nn.Linear(2, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
            ),
            ce, 32,
        ),
        "two towers, clicks": (clicks(), Towers, logistic, 64),
        "convolution, waves": (
            waves(),
            lambda: nn.Sequential(
                nn.Flatten(), nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 8, 3), nn.Tanh(), nn.Conv1d(8, 8, 3), nn.Tanh(),
                nn.Flatten(), nn.Linear(64, 1),
            ),
            mse, 64,
        ),
    }  # fmt: skip


def unseen() -> Tasks:
    ce, mse, count = nn.functional.cross_entropy, nn.functional.mse_loss, whole_text()[1]
    return {
        "convnet with BatchNorm, digits": (images(), convnet, ce, 64),
        "GRU, next character": (
            characters(), lambda: Recurrent(nn.GRU, nn.Embedding(count, 8), 8, 32, count), ce, 64
        ),
        "transformer, next character": (characters(), lambda: Transformer(count), ce, 64),
        "RNN, waves": (waves(), lambda: Recurrent(nn.RNN, nn.Identity(), 1, 16, 1), mse, 64),
        "factors, ratings": (ratings(), Factors, mse, 64),
        "SiLU network, diabetes": (table(load_diabetes), perceptron(10, 32, 32, 1, unit=nn.SiLU), mse, 32),
        "network, breast cancer": (table(load_breast_cancer), perceptron(30, 32, 2), ce, 32),
        "network, wine": (table(load_wine), perceptron(13, 16, 3), ce, 16),
        "logistic regression, digits": (
            images(), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ce, 64
        ),
        "deep GELU network, digits": (
            images(), lambda: nn.Sequential(nn.Flatten(), *perceptron(64, 48, 48, 48, 10, unit=nn.GELU)()), ce, 64
        ),
    }  # fmt: skip


def run(make: Make, task: Any, steps: int, seed: int) -> tuple[float, float]:
    """Validation and test loss after a training."""
    splits, network, criterion, size = task
    torch.manual_seed(seed)
    model, (inputs, targets) = network(), splits["train"]
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        optimizer.zero_grad()
        criterion(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = [criterion(model(splits[name][0]), splits[name][1]).item() for name in ("val", "test")]
    return tuple(value if value == value else float("inf") for value in found)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", type=Path, help="a file; the one that comes with the package if not given")
    parser.add_argument("--output", type=Path, default=Path("comparison.csv"))
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="of the rule")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choosing", action="store_true", help="other tasks: to choose on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learned = LearnedOptimizer.load(options.rule) if options.rule else LearnedOptimizer.pretrained("tensorwise")
    rows, means = [], {rate: [] for rate in options.rate}
    for name, task in (choosing() if options.choosing else unseen()).items():
        for steps in options.steps:

            def mean(make: Make) -> Tensor:
                return torch.tensor([run(make, task, steps, seed) for seed in range(options.seeds)]).mean(0)  # noqa: B023

            adamw = [mean(lambda model: torch.optim.AdamW(model.parameters(), rate)) for rate in RATES]  # noqa: B023
            best = min(range(len(RATES)), key=lambda index: adamw[index][0].item())
            usual = adamw[RATES.index(1e-3)][1] / adamw[best][1]
            row = {"task": name, "steps": steps, "adamw_rate": f"{RATES[best]:.2g}",
                   "adamw": f"{adamw[best][1]:.4g}", "adamw_1e-3": f"{usual:.3f}"}  # fmt: skip
            for rate in options.rate:
                ratio = mean(lambda model: learned.as_torch_optimizer(model.parameters(), lr=rate))[1] / adamw[best][1]  # noqa: B023
                means[rate].append((ratio.item(), usual.item()))
                row[f"rule_{rate:g}"] = f"{ratio:.3f}"
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
    with options.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for rate, found in means.items():
        ratios = torch.tensor([ratio for ratio, _ in found])
        better = sum(ratio < usual for ratio, usual in found)
        print(
            f"rule at lr={rate:g}: median {ratios.quantile(0.5):.3f}, "
            f"geometric mean {ratios.log().mean().exp():.3f}, worst {ratios.max():.3f}, "
            f"better than AdamW at 1e-3 on {better} of {len(found)}"
        )


if __name__ == "__main__":
    main()
