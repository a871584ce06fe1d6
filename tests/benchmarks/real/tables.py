"""Tables, sequences and a graph: recommenders, prices, speakers, communities."""

from __future__ import annotations

import csv
import io
import tarfile
from functools import cache
from typing import Any

import torch
from images import Classifier
from learner import Learner, Loaders, folder_of, loaders, three_parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau
from torch.utils.data import TensorDataset


@cache
def table(name: str) -> dict[str, list[str]]:
    """A table of pydataset, by columns; the package itself would unpack everything into the home folder."""
    with tarfile.open(folder_of("pydataset") / "resources.tar.gz") as archive:
        stream = archive.extractfile(f"resources/rdata/csv/{name}.csv")
        assert stream is not None
        rows = list(csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8")))
    return {column: [row[column] for row in rows] for column in rows[0]}


def codes(values: list[str]) -> Tensor:
    """Integers from 0 on."""
    number = {value: index for index, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values])


def numbers(values: list[str]) -> Tensor:
    return torch.tensor([float(value) for value in values])


# Students, lecturers, departments, and three small categories.
RATED = {"s": 2972, "d": 1128, "dept": 14, "studage": 4, "lectage": 6, "service": 2}


def ratings() -> Loaders:
    """73,421 ratings of lectures, from 1 to 5: 60,421 to train on, 5000 held out, 8000 to test."""
    columns = table("lme4/InstEval")
    inputs = torch.stack([codes(columns[name]) for name in RATED], 1)
    return loaders(*three_parts(inputs, numbers(columns["y"]), held_out=5000, test=8000), 512, evaluation=4000)


class Recommender(Learner):
    """Embeddings into an MLP: Adam, a tenth of the rate for the last third."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.embeddings = nn.ModuleList(nn.Embedding(count, 16) for count in RATED.values())
        self.mlp = nn.Sequential(nn.Linear(16 * len(RATED), 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        found = [embedding(column) for embedding, column in zip(self.embeddings, inputs.unbind(1), strict=True)]
        return 3 + self.mlp(torch.cat(found, 1)).squeeze(1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.scheduled(
            torch.optim.Adam(self.parameters(), lr=self.learning_rate),
            lambda optimizer, steps: MultiStepLR(optimizer, [2 * steps // 3]),
        )


class Factorization(Learner):
    """Students times lecturers, and a bias of each: sparse gradients, SparseAdam."""

    def __init__(self, learning_rate: float = 1e-2, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.embeddings = nn.ModuleList(nn.Embedding(RATED[name], 9, sparse=True) for name in ("s", "d"))
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.05)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        students, lecturers = (embedding(batch[0][:, index]) for index, embedding in enumerate(self.embeddings))
        products = (students[:, 1:] * lecturers[:, 1:]).sum(1)
        return F.mse_loss(3.2 + students[:, 0] + lecturers[:, 0] + products, batch[1])

    def configure_optimizers(self) -> Any:
        return self.scheduled(
            torch.optim.SparseAdam(list(self.parameters()), lr=self.learning_rate),
            lambda optimizer, steps: MultiStepLR(optimizer, [2 * steps // 3]),
        )


CUT = {"cut": 5, "color": 7, "clarity": 8}


def diamonds() -> Loaders:
    """Logarithms of 53,940 prices: 43,940 to train on, 4000 held out, 6000 to test."""
    columns = table("ggplot2/diamonds")
    measured = torch.stack([numbers(columns[name]) for name in ("carat", "depth", "table", "x", "y", "z")], 1)
    measured = (measured - measured.mean(0)) / measured.std(0)
    classes = torch.stack([codes(columns[name]) for name in CUT], 1)
    prices = numbers(columns["price"]).log()
    prices = (prices - prices.mean()) / prices.std()
    return loaders(*three_parts(measured, classes, prices, held_out=4000, test=6000), 512, evaluation=4000)


class Prices(Learner):
    """Numbers and embedded classes into an MLP: AdamW, cosine; the measure is the squared error in thousandths."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.embeddings = nn.ModuleList(nn.Embedding(count, 4) for count in CUT.values())
        self.mlp = nn.Sequential(
            nn.Linear(6 + 4 * len(CUT), 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
        )

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        measured, classes, prices = batch
        found = [embedding(column) for embedding, column in zip(self.embeddings, classes.unbind(1), strict=True)]
        return F.mse_loss(self.mlp(torch.cat([measured, *found], 1)).squeeze(1), prices)

    def measure(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return 1000 * self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        return self.scheduled(optimizer, CosineAnnealingLR)


def vowels() -> Loaders:
    """Nine speakers, 12 coefficients, up to 29 moments: of the benchmark's 270 for training, 70 are held out."""
    read = [speakers(f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST")]
    order = torch.randperm(270, generator=torch.Generator().manual_seed(0))
    train, held_out = (TensorDataset(*(tensor[part] for tensor in read[0])) for part in (order[70:], order[:70]))
    return loaders(train, held_out, TensorDataset(*read[1]), 16)


def speakers(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Padded series, their lengths, and classes."""
    text = (folder_of("sktime") / "datasets" / "data" / "JapaneseVowels" / name).read_text(encoding="utf-8")
    rows = [line.split(":") for line in text.split("@data")[1].split()]
    series = [torch.tensor([[float(x) for x in column.split(",")] for column in row[:-1]]).T for row in rows]
    padded = torch.zeros(len(series), 29, 12)
    for index, moments in enumerate(series):
        padded[index, : len(moments)] = moments
    return padded, torch.tensor([len(moments) for moments in series]), torch.tensor([int(row[-1]) - 1 for row in rows])


class Speakers(Classifier):
    """A bidirectional GRU over series of different lengths: Adam, ReduceLROnPlateau."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.recurrent = nn.GRU(12, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 9)

    def logits(self, series: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(series, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1].transpose(0, 1).flatten(1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(*batch[:2]), batch[2])

    def measure(self, batch: list[Tensor]) -> Tensor:
        return (self.logits(*batch[:2]).argmax(1) == batch[2]).float().mean()

    def configure_optimizers(self) -> Any:
        return self.scheduled(
            torch.optim.Adam(self.parameters(), lr=self.learning_rate),
            lambda optimizer, steps: ReduceLROnPlateau(optimizer, "max", factor=0.3, patience=0),
        )


@cache
def communities() -> tuple[Tensor, Tensor, Tensor]:
    """A stochastic block model: neighbours (normalized, sparse), features and classes of 2000 nodes in 8 blocks."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(8, (2000,), generator=generator)
    together = classes[:, None] == classes
    edges = torch.rand(2000, 2000, generator=generator) < torch.where(together, 0.03, 0.005)
    edges = edges.triu(1)
    adjacency = (edges | edges.T).float() + torch.eye(2000)
    scale = adjacency.sum(1).rsqrt()
    features = F.one_hot(classes, 8) + torch.randn(2000, 8, generator=generator)
    return (scale[:, None] * adjacency * scale).to_sparse(), features, classes


def nodes() -> Loaders:
    """Twenty labelled nodes of each class to train on, all in one batch; 400 held out, the others to test."""
    classes = communities()[2]
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    train = torch.cat([order[classes[order] == label][:20] for label in range(8)])
    others = order[~torch.isin(order, train)]
    parts = (TensorDataset(part, classes[part]) for part in (train, others[:400], others[400:]))
    return loaders(*parts, 160, evaluation=2000)


class GraphNet(Classifier):
    """Two graph convolutions on the whole graph: Adam with weight decay, cosine."""

    def __init__(self, learning_rate: float = 1e-2, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        neighbours, features, _ = communities()
        self.register_buffer("neighbours", neighbours)
        self.register_buffer("features", features)
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = F.relu(torch.sparse.mm(self.neighbours, self.first(self.features)))
        hidden = self.second(F.dropout(hidden, 0.5, self.training))
        return torch.sparse.mm(self.neighbours, hidden)[nodes]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=5e-4)
        return self.scheduled(optimizer, CosineAnnealingLR)
