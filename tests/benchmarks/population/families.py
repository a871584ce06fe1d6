"""The population: small tasks in families, each a batch of runs in lockstep, and their division into two halves.

A family says how to draw its data from a seed and how to compute the losses of many runs at once. Parameters carry a
leading dimension of runs, so that the gradient of the *sum* of the runs' losses holds every run's own gradient. All
data are generated or come with scikit-learn; training, held-out and test examples are disjoint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# The division was made before the first result and is never changed: rules are designed and their constants chosen on
# the first half; the second is run once for each rule that would be shipped.
CHOOSING = (
    "logistic", "digits", "digits-label-noise", "digits-autoencoder", "diabetes", "moons", "friedman",
    "least-squares-ill", "least-squares-exact", "deep-linear", "gaussian-density", "bigram", "rnn-adding",
    "attention-recall", "diffusion-points", "finetune-digits", "layernorm", "factorization", "text-mlp", "contrastive",
)  # fmt: skip
JUDGING = (
    "digits-few", "breast-cancer", "wine", "friedman-noisy", "least-squares", "teacher", "parity", "mixture-density",
    "rnn-text", "attention-sort", "diffusion-digits", "finetune-text", "finetune-regression", "dropout", "poisson",
    "hinge", "convolution", "digits-residual", "rosenbrock", "covtype-like",
)  # fmt: skip

Loss = Callable[[list[Tensor], tuple[Tensor, ...]], Tensor]  # parameters, batch -> one loss for each run


@dataclass(frozen=True)
class Family:
    """How a task is drawn and what its loss is.

    ``draw`` returns the whole data set for one seed: tensors whose first dimension is the example. ``shapes`` are those
    of the parameters, ``loss`` gives each run's mean loss. ``noise`` appends what is drawn anew for every batch.
    """

    name: str
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    loss: Loss
    batch: int = 32
    train: int = 1000
    held: int = 256
    gain: float = 1.0  # of the initial weights
    noise: Callable[[torch.Generator, int], Tensor] | None = None
    noise_in_training_only: bool = False
    nats: bool = False  # a loss that crosses zero: compared by exp(difference), not by a quotient
    pretrain: Callable[[torch.Generator], tuple[Tensor, ...]] | None = None
    optimizers: tuple[str, ...] = field(default=("sgd", "adam"))

    def start(self, generator: torch.Generator) -> list[Tensor]:
        """Initial parameters: normal with variance 1/fan-in, vectors zero."""
        return [
            torch.randn(shape, generator=generator) * self.gain / math.sqrt(shape[-2])
            if len(shape) >= 2
            else torch.zeros(shape)
            for shape in self.shapes
        ]


def mlp_shapes(*sizes: int) -> tuple[tuple[int, ...], ...]:
    """Weights and biases of a multi-layer perceptron."""
    return tuple(shape for a, b in zip(sizes, sizes[1:], strict=False) for shape in ((a, b), (b,)))


def mlp(parameters: list[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """The perceptrons of all runs, x of shape (runs, batch, features)."""
    for i in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[i + 1][:, None], x, parameters[i])
        if i + 2 < len(parameters):
            x = activation(x)
    return x


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch, one for each run."""
    chosen = logits.gather(-1, target[..., None].long())[..., 0]
    return (torch.logsumexp(logits, -1) - chosen).flatten(1).mean(1)


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error, one for each run."""
    return 0.5 * (prediction - target).square().flatten(1).mean(1)


def classify(activation: Callable[[Tensor], Tensor] = torch.relu) -> Loss:
    return lambda p, b: cross_entropy(mlp(p, b[0], activation), b[1])


def regress(activation: Callable[[Tensor], Tensor] = torch.relu) -> Loss:
    return lambda p, b: squared(mlp(p, b[0], activation), b[1])


def linear_loss(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    x = b[0]
    for weight in p:
        x = x @ weight
    return squared(x, b[1])


def reconstruct(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    return squared(mlp(p, b[0]), b[0])


def randn(*shape: int, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def drawn(columns: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda g, n: randn(n, columns, g=g)


Draw = Callable[[torch.Generator], tuple[Tensor, ...]]


def bundled(name: str, classes: bool = True) -> Draw:
    """One of scikit-learn's data sets, standardised and shuffled."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        import sklearn.datasets

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = getattr(sklearn.datasets, f"load_{name}")()
        x = torch.tensor(data.data, dtype=torch.float32)
        x = x / 16 if name == "digits" else (x - x.mean(0)) / (x.std(0) + 1e-6)
        y = torch.tensor(data.target)
        y = y.long() if classes else ((y - y.mean()) / y.std()).float()[:, None]
        order = torch.randperm(len(x), generator=g)
        return x[order], y[order]

    return draw


def label_noise(draw: Draw, share: float, classes: int) -> Draw:
    def noisy(g: torch.Generator) -> tuple[Tensor, ...]:
        x, y = draw(g)
        wrong = torch.rand(len(y), generator=g) < share
        return x, torch.where(wrong, torch.randint(classes, y.shape, generator=g), y)

    return noisy


def clusters(features: int, classes: int, spread: float, decay: float = 1.0, n: int = 6000) -> Draw:
    """Gaussian classes whose features have geometrically falling scales."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        centres, y = randn(classes, features, g=g), torch.randint(classes, (n,), generator=g)
        scale = decay ** torch.arange(features)
        return (centres[y] + spread * randn(n, features, g=g)) * scale, y

    return draw


def moons(g: torch.Generator) -> tuple[Tensor, ...]:
    y = torch.randint(2, (3000,), generator=g)
    angle = math.pi * torch.rand(3000, generator=g)
    side = 1 - 2 * y
    x = torch.stack([torch.cos(angle) * side + y, torch.sin(angle) * side + 0.5 * y], 1)
    return x + 0.08 * randn(3000, 2, g=g), y


def friedman(noise: float) -> Draw:
    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.rand(4000, 8, generator=g)
        y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        return 2 * x - 1, ((y - 14.4) / 4.9 + noise * randn(4000, g=g))[:, None]

    return draw


def linear(features: int, decay: float, noise: float, n: int = 8000) -> Draw:
    """A linear model; ``decay`` is the quotient of neighbouring singular values."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        x = randn(n, features, g=g) * decay ** torch.arange(features)
        solution = randn(features, 1, g=g) * decay ** (-0.5 * torch.arange(features)[:, None])
        return x, x @ solution / math.sqrt(features) + noise * randn(n, 1, g=g)

    return draw


def teacher(features: int, hidden: int, noise: float) -> Draw:
    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        x, first, second = randn(8000, features, g=g), randn(features, hidden, g=g), randn(hidden, 1, g=g)
        y = torch.tanh(1.5 * x @ first / math.sqrt(features)) @ second / math.sqrt(hidden)
        return x, y + noise * randn(8000, 1, g=g)

    return draw


def deep_linear(g: torch.Generator) -> tuple[Tensor, ...]:
    x = randn(4000, 10, g=g)
    target = randn(10, 3, g=g) @ randn(3, 10, g=g) / 5
    return x, x @ target + 0.1 * randn(4000, 10, g=g)


def parity(g: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randint(2, (6000, 10), generator=g).float() * 2 - 1
    return x + 0.1 * randn(6000, 10, g=g), (x[:, 0] * x[:, 1] * x[:, 2] > 0).long()


def covtype(g: torch.Generator) -> tuple[Tensor, ...]:
    """Ten continuous features of unequal scale, twelve binary ones, seven unequal classes of a random tree."""
    scaled = randn(6000, 10, g=g).exp() * 2.0 ** (-torch.arange(10) / 2)
    x = torch.cat([scaled, torch.randint(2, (6000, 12), generator=g).float()], 1)
    hidden = torch.tanh((x - x.mean(0)) / x.std(0) @ randn(22, 16, g=g) / 3)
    return x, (hidden @ randn(16, 7, g=g) + torch.linspace(2, -2, 7) + randn(6000, 7, g=g)).argmax(1)


def density(g: torch.Generator) -> tuple[Tensor, ...]:
    x = 2 * torch.rand(4000, 2, generator=g) - 1
    scale = (0.03 + 0.3 * x[:, :1].abs()) * 0.5
    return x, torch.sin(3 * x.sum(1, keepdim=True)) + scale * randn(4000, 1, g=g)


def gaussian_nll(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    mean, log = mlp(p, b[0], torch.tanh).chunk(2, -1)
    log = 4 * torch.tanh(log / 4)
    return (0.5 * ((b[1] - mean) / log.exp()).square() + log).flatten(1).mean(1)


def mixture(g: torch.Generator) -> tuple[Tensor, ...]:
    x = 2 * torch.rand(4000, 1, generator=g) - 1
    side = torch.randint(2, (4000, 1), generator=g).float() * 2 - 1
    return x, side * (0.2 + x.square()) + 0.05 * randn(4000, 1, g=g)


def mixture_nll(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    weight, mean, log = mlp(p, b[0], torch.tanh).chunk(3, -1)
    log = 4 * torch.tanh(log / 4)
    terms = torch.log_softmax(weight, -1) - 0.5 * ((b[1] - mean) / log.exp()).square() - log
    return -torch.logsumexp(terms, -1).mean(1)


def text(which: tuple[str, ...]) -> Tensor:
    """Characters (27) of the descriptions that come with scikit-learn's data sets."""
    import sklearn.datasets

    letters = " ".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in which).lower()
    cleaned = "".join(c if "a" <= c <= "z" else " " for c in letters).split()
    return torch.tensor([ord(c) - 96 if c != " " else 0 for c in " ".join(cleaned)])


DESCRIBED = ("breast_cancer", "diabetes", "iris", "linnerud", "wine")


def characters(context: int, which: tuple[str, ...] = DESCRIBED) -> Draw:
    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        pieces = text(which).unfold(0, context + 1, 1)
        return (pieces[torch.randperm(len(pieces), generator=g)],)

    return draw


def text_mlp(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    seen = F.one_hot(b[0][..., :-1], 27).float().flatten(2)
    hidden = torch.tanh(torch.baddbmm(p[1][:, None], seen, p[0]))
    return cross_entropy(torch.baddbmm(p[3][:, None], hidden, p[2]), b[0][..., -1])


def bigram(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    rows = torch.gather(p[0], 1, b[0][..., :1].expand(-1, -1, 27))
    return cross_entropy(rows, b[0][..., 1])


def rnn(p: list[Tensor], x: Tensor) -> list[Tensor]:
    """Hidden states of a plain recurrent network: x of shape (runs, batch, time, features)."""
    hidden = x.new_zeros(x.shape[0], x.shape[1], p[1].shape[-1])
    states = []
    for t in range(x.shape[2]):
        hidden = torch.tanh(torch.baddbmm(p[2][:, None], x[:, :, t], p[0]) + hidden @ p[1])
        states.append(hidden)
    return states


def adding(g: torch.Generator) -> tuple[Tensor, ...]:
    values, marks = torch.rand(4000, 8, generator=g), torch.zeros(4000, 8)
    marks.scatter_(1, torch.rand(4000, 8, generator=g).argsort(1)[:, :2], 1.0)
    return torch.stack([values, marks], 2), (values * marks).sum(1, keepdim=True) - 1


def rnn_last(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    return squared(torch.baddbmm(p[4][:, None], rnn(p[:3], b[0])[-1], p[3]), b[1])


def rnn_text(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    states = torch.stack(rnn(p[:3], F.one_hot(b[0][..., :-1], 27).float()), 2)
    return cross_entropy(each_token(states, p[3]) + p[4][:, None, None], b[0][..., 1:])


def each_token(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map of every token: x of shape (runs, batch, time, features)."""
    return (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])


def attend(p: list[Tensor], x: Tensor, last: bool = False) -> Tensor:
    """One head with a residual, then a perceptron: x of shape (runs, batch, time, width)."""
    query, key, value = (each_token(x, w) for w in p[:3])
    if last:
        query, x = query[:, :, -1:], x[:, :, -1:]
    scores = (query[:, :, :, None] * key[:, :, None]).sum(-1) / math.sqrt(key.shape[-1])
    mixed = x + (torch.softmax(scores, -1)[..., None] * value[:, :, None]).sum(3)
    hidden = torch.relu(each_token(mixed, p[3]) + p[4][:, None, None])
    return each_token(hidden, p[5]) + p[6][:, None, None]


def attend_last(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(attend(p, b[0], last=True)[:, :, -1], b[1])


def attend_all(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(attend(p, b[0]), b[1])


def recall(g: torch.Generator) -> tuple[Tensor, ...]:
    """Four key-value pairs and a question: which value belongs to the key."""
    keys = torch.rand(6000, 6, generator=g).argsort(1)[:, :4]
    values, asked = torch.randint(6, (6000, 4), generator=g), torch.randint(4, (6000, 1), generator=g)
    pairs = torch.cat([F.one_hot(keys, 6), F.one_hot(values, 6), torch.zeros(6000, 4, 1)], 2)
    question = torch.cat([F.one_hot(keys.gather(1, asked), 6), torch.zeros(6000, 1, 6), torch.ones(6000, 1, 1)], 2)
    wrong = torch.rand(6000, 1, generator=g) < 0.1
    answer = torch.where(wrong, torch.randint(6, (6000, 1), generator=g), values.gather(1, asked))
    return torch.cat([pairs, question], 1).float(), answer[:, 0]


def sorting(g: torch.Generator) -> tuple[Tensor, ...]:
    """For every number of four its rank."""
    x = torch.rand(6000, 4, generator=g)
    return torch.stack([x, x.square(), torch.ones_like(x)], 2), x.argsort(1).argsort(1)


def spiral(g: torch.Generator) -> tuple[Tensor, ...]:
    angle = 3 * math.pi * torch.rand(1500, generator=g).sqrt()
    return (torch.stack([angle * torch.cos(angle), angle * torch.sin(angle)], 1) / 5,)


def denoise(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """Predict the noise, at noise levels drawn anew (the last of the drawn columns)."""
    level = 0.05 * 40 ** torch.special.ndtr(b[-1][..., -1:])
    noise = b[-1][..., :-1]
    seen = (b[0] + level * noise) / (0.5 + level)
    return squared(mlp(p, torch.cat([seen, level.log(), seen * level], -1), F.silu), noise)


def digits_only(chosen: range, n: int = 10**9) -> Draw:
    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        x, y = bundled("digits")(g)
        keep = (y >= chosen.start) & (y < chosen.stop)
        return x[keep][:n], y[keep][:n] - chosen.start

    return draw


def layernorm(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    x = b[0]
    for i in (0, 2, 4):
        x = F.gelu(F.layer_norm(x @ p[i] + p[i + 1][:, None], (p[i].shape[-1],)))
    return cross_entropy(x @ p[6], b[1])


def ratings(g: torch.Generator) -> tuple[Tensor, ...]:
    """Ratings of 60 things by 80 people: rank 3 and noise."""
    people, things = torch.randint(80, (6000,), generator=g), torch.randint(60, (6000,), generator=g)
    a, b = randn(80, 3, g=g), randn(60, 3, g=g)
    return torch.stack([people, things], 1), (a[people] * b[things]).sum(1) / 1.7 + 0.3 * randn(6000, g=g)


def factorization(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    first = torch.gather(p[0], 1, b[0][..., :1].expand(-1, -1, 6))
    second = torch.gather(p[1], 1, b[0][..., 1:].expand(-1, -1, 6))
    return squared((first * second).sum(-1), b[1])


def two_views(g: torch.Generator) -> tuple[Tensor, ...]:
    hidden = randn(4000, 5, g=g)
    views = [torch.tanh(hidden @ randn(5, 16, g=g)) + 0.5 * randn(4000, 16, g=g) for _ in range(2)]
    return tuple(views)


def contrastive(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    a, c = (F.normalize(mlp(p[4 * i : 4 * i + 4], b[i]), dim=-1) for i in range(2))
    runs, batch = a.shape[:2]
    cut = batch - batch % 16  # always sixteen candidates, so that the loss means the same on every batch
    a, c = (z[:, :cut].reshape(runs * (cut // 16), 16, -1) for z in (a, c))
    logits = 5 * a @ c.mT
    losses = torch.logsumexp(logits, -1) - logits.diagonal(dim1=1, dim2=2)
    return losses.reshape(runs, -1).mean(1)


def counts(g: torch.Generator) -> tuple[Tensor, ...]:
    x = randn(4000, 12, g=g)
    rate = (0.4 * x @ randn(12, 1, g=g) + 0.5).clamp(max=4).exp()
    return x, torch.poisson(rate, generator=g)


def poisson(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    log = mlp(p, b[0], torch.tanh)
    log = torch.where(log > 5, 5 + torch.log1p((log - 5).clamp(min=0)), log)
    return (log.exp() - b[1] * log).flatten(1).mean(1)


def hinge(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    sign = 2.0 * b[1] - 1
    return torch.relu(1 - sign * mlp(p, b[0])[..., 0]).mean(1) + 1e-3 * p[0].square().flatten(1).sum(1)


def motifs(g: torch.Generator) -> tuple[Tensor, ...]:
    """Which of four motifs is hidden where in a noisy signal of 32."""
    shapes, y = randn(4, 7, g=g), torch.randint(4, (4000,), generator=g)
    place = torch.randint(26, (4000, 1), generator=g)
    x = 0.7 * randn(4000, 32, g=g)
    return x.scatter_add(1, place + torch.arange(7), 1.3 * shapes[y]), y


def convolution(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    hidden = torch.relu(each_token(b[0].unfold(2, 7, 2), p[0]) + p[1][:, None, None])
    return cross_entropy(hidden.amax(2) @ p[2] + p[3][:, None], b[1])


def dropout(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """A perceptron whose hidden units are dropped in training (the drawn columns are given in training only)."""
    hidden = torch.relu(torch.baddbmm(p[1][:, None], b[0], p[0]))
    if len(b) == 3:
        hidden = hidden * (b[2] > -0.25) / 0.6
    return cross_entropy(torch.baddbmm(p[3][:, None], hidden, p[2]), b[1])


def residual(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    x = b[0] @ p[0]
    for i in (1, 3, 5):
        x = x + torch.relu(x @ p[i]) @ p[i + 1]
    return cross_entropy(x @ p[7], b[1])


def valley(g: torch.Generator) -> tuple[Tensor, ...]:
    return (randn(4000, 8, g=g),)


def rosenbrock(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """A bent valley; every example shifts it a little."""
    w = p[0][:, None, :, 0] + 0.1 * b[0]
    return (0.1 * (w[..., 1:] - w[..., :-1].square()).square() + 0.05 * (1 - w[..., :-1]).square()).flatten(1).mean(1)


SA, SW, AM, SM = ("sgd", "adam"), ("sgd", "adamw"), ("adam", "muon"), ("sgd", "muon")
TEXT = ("diabetes", "wine", "iris")
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("logistic", clusters(20, 5, 1.5, 0.85), mlp_shapes(20, 5), classify(), 16, 3000, optimizers=SA),
        Family("digits", bundled("digits"), mlp_shapes(64, 32, 10), classify(), 64, 1000, optimizers=SA),
        Family(
            "digits-label-noise",
            label_noise(bundled("digits"), 0.2, 10),
            mlp_shapes(64, 32, 10),
            classify(),
            32,
            1000,
            optimizers=SW,
        ),
        Family(
            "digits-autoencoder",
            lambda g: bundled("digits")(g)[:1],
            mlp_shapes(64, 12, 64),
            reconstruct,
            32,
            1000,
            optimizers=AM,
        ),
        Family("diabetes", bundled("diabetes", False), mlp_shapes(10, 32, 1), regress(), 8, 220, 80, optimizers=SW),
        Family("moons", moons, mlp_shapes(2, 24, 24, 2), classify(), 128, 800, optimizers=SA),
        Family("friedman", friedman(0.0), mlp_shapes(8, 32, 1), regress(torch.tanh), 64, 2000, optimizers=SW),
        Family("least-squares-ill", linear(20, 0.75, 0.3), ((20, 1),), linear_loss, 8, 6000, optimizers=SA),
        Family("least-squares-exact", linear(20, 0.85, 0.0), ((20, 1),), linear_loss, 16, 400, optimizers=SA),
        Family("deep-linear", deep_linear, ((10, 10),) * 4, linear_loss, 32, 2000, gain=0.4, optimizers=SM),
        Family("gaussian-density", density, mlp_shapes(2, 24, 2), gaussian_nll, 32, 2000, nats=True, optimizers=SA),
        Family("bigram", characters(1), ((27, 27),), bigram, 64, 6000, gain=0.01, optimizers=SA),
        Family("rnn-adding", adding, ((2, 16), (16, 16), (16,), (16, 1), (1,)), rnn_last, 32, 3000, optimizers=SA),
        Family(
            "attention-recall",
            recall,
            ((13, 12), (13, 12), (13, 13), (13, 24), (24,), (24, 6), (6,)),
            attend_last,
            16,
            4000,
            optimizers=AM,
        ),
        Family("diffusion-points", spiral, mlp_shapes(5, 32, 32, 2), denoise, 64, 1000, noise=drawn(3), optimizers=AM),
        Family(
            "finetune-digits",
            digits_only(range(5, 10), 700),
            mlp_shapes(64, 32, 10),
            classify(),
            16,
            200,
            200,
            pretrain=digits_only(range(5)),
            optimizers=SW,
        ),
        Family(
            "layernorm",
            bundled("digits"),
            ((64, 24), (24,), (24, 24), (24,), (24, 24), (24,), (24, 10)),
            layernorm,
            16,
            1000,
            optimizers=SW,
        ),
        Family("factorization", ratings, ((80, 6), (60, 6)), factorization, 64, 4000, gain=1.0, optimizers=SA),
        Family("text-mlp", characters(3), ((81, 32), (32,), (32, 27), (27,)), text_mlp, 32, 6000, optimizers=AM),
        Family("contrastive", two_views, mlp_shapes(16, 24, 6) * 2, contrastive, 32, 2000, optimizers=SW),
        Family("digits-few", bundled("digits"), mlp_shapes(64, 32, 10), classify(), 8, 100, 100, optimizers=SA),
        Family("breast-cancer", bundled("breast_cancer"), mlp_shapes(30, 2), classify(), 16, 300, 100, optimizers=SW),
        Family("wine", bundled("wine"), mlp_shapes(13, 24, 3), classify(torch.tanh), 4, 80, 40, optimizers=SA),
        Family("friedman-noisy", friedman(0.7), mlp_shapes(8, 32, 1), regress(), 16, 1000, optimizers=SW),
        Family("least-squares", linear(30, 1.0, 1.0), ((30, 1),), linear_loss, 4, 6000, optimizers=SA),
        Family("teacher", teacher(12, 8, 0.05), mlp_shapes(12, 32, 1), regress(torch.tanh), 32, 6000, optimizers=SA),
        Family("parity", parity, mlp_shapes(10, 32, 2), classify(), 32, 4000, gain=0.5, optimizers=SA),
        Family("mixture-density", mixture, mlp_shapes(1, 24, 9), mixture_nll, 64, 2000, nats=True, optimizers=AM),
        Family(
            "rnn-text", characters(5), ((27, 16), (16, 16), (16,), (16, 27), (27,)), rnn_text, 8, 6000, optimizers=AM
        ),
        Family(
            "attention-sort",
            sorting,
            ((3, 8), (3, 8), (3, 3), (3, 24), (24,), (24, 4), (4,)),
            attend_all,
            8,
            4000,
            optimizers=SA,
        ),
        Family(
            "diffusion-digits",
            lambda g: (bundled("digits")(g)[0][:, 18:46:2] - 0.5,),
            mlp_shapes(29, 48, 14),
            denoise,
            32,
            800,
            noise=drawn(15),
            optimizers=SW,
        ),
        Family(
            "finetune-text",
            characters(3, TEXT),
            ((81, 32), (32,), (32, 27), (27,)),
            text_mlp,
            16,
            1500,
            pretrain=characters(3, ("breast_cancer",)),
            optimizers=AM,
        ),
        Family(
            "finetune-regression",
            teacher(10, 6, 0.2),
            mlp_shapes(10, 32, 1),
            regress(torch.tanh),
            8,
            150,
            pretrain=teacher(10, 6, 0.0),
            optimizers=SA,
        ),
        Family(
            "dropout",
            bundled("digits"),
            mlp_shapes(64, 48, 10),
            dropout,
            32,
            600,
            noise=drawn(48),
            noise_in_training_only=True,
            optimizers=SA,
        ),
        Family("poisson", counts, mlp_shapes(12, 16, 1), poisson, 16, 2000, nats=True, optimizers=SW),
        Family("hinge", clusters(16, 2, 2.0), mlp_shapes(16, 1), hinge, 8, 2000, optimizers=SA),
        Family("convolution", motifs, ((7, 12), (12,), (12, 4), (4,)), convolution, 32, 2500, optimizers=SW),
        Family(
            "digits-residual",
            bundled("digits"),
            ((64, 16), *(((16, 24), (24, 16)) * 3), (16, 10)),
            residual,
            128,
            1000,
            optimizers=SM,
        ),
        Family("rosenbrock", valley, ((8, 1),), rosenbrock, 16, 3000, optimizers=SA),
        Family("covtype-like", covtype, mlp_shapes(22, 24, 7), classify(), 256, 4000, optimizers=SW),
    )
}


def halves(name: str) -> Iterator[Family]:
    """The families of a half, of both, or those that nothing was chosen on."""
    if name == "unseen":
        from unseen import UNSEEN  # built from the parts above

        yield from UNSEEN.values()
        return
    for family in {"choosing": CHOOSING, "judging": JUDGING, "both": CHOOSING + JUDGING}[name]:
        yield FAMILIES[family]
