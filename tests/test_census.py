"""Twelve modules after the projects that people really have: each learns, and is no worse for it.

Every module trains for 200 steps at a usual rate, with and without the callback. It is modelled on what a census of
public Lightning projects found to be hard: validation batches that are no training batches, several optimizers, losses
of either sign, clipping of one's own.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from any_module import fit, unchanged
from fsdp_runs import learn
from launch import launch
from lightning.pytorch import strategies
from test_any_loop import Gan
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2l import LearnToLearn

STEPS, BATCH = 200, 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int) -> Tensor:
    """Noisy copies of eight patterns; the label of image ``i`` is ``i % 8``."""
    patterns = torch.randn(8, 32, generator=generator(99))
    return patterns[torch.arange(count) % 8] + 0.5 * torch.randn(count, 32, generator=generator(seed))


def shuffled(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, BATCH, shuffle=True, drop_last=True, **options)


class Project(pl.LightningModule):
    """What the twelve share: loaders, a usual optimizer, and the measure of the end (lower is better)."""

    rate = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)

    def train_dataloader(self) -> Any:
        return shuffled(self.data(512, 0))

    def val_dataloader(self) -> Any:
        return DataLoader(self.data(64, 1), BATCH)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def measure(self) -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(self.loss(next(iter(DataLoader(self.data(512, 2), 512)))))


class GanByHand(Gan):
    """torchrecipes, vocos, taming: two optimizers, stepped by hand."""

    def train_dataloader(self) -> Any:
        return shuffled(TensorDataset(torch.randn(512, 8, generator=generator(0))))

    def measure(self) -> float:
        """How far mean and spread of what is generated are from the real ones."""
        torch.manual_seed(5)
        with torch.no_grad():
            fake = self.generator(torch.randn(4096, 4))
        return float((fake.mean(0) - 1).square().mean() + (fake.std(0) - 0.3).square().mean())


class SimCLR(Project):
    """lightly, torchgeo: trains on pairs of views, validates on labelled images."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))

    def data(self, count: int, seed: int) -> Any:
        clean = images(count, seed)
        views = [clean + 0.7 * torch.randn(clean.shape, generator=generator(seed + k)) for k in (10, 20)]
        return TensorDataset(*views, torch.arange(count))

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(images(64, 1), torch.arange(64) % 8), BATCH)

    def loss(self, batch: Any) -> Tensor:
        left, right, _ = batch
        left, right = (functional.normalize(self.net(view)) for view in (left, right))
        return functional.cross_entropy(left @ right.T / 0.5, torch.arange(len(left)))


class Diffusion(Project):
    """latent-diffusion, mattergen: predicts the noise that was added; every loss has noise of its own."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(33, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))

    def data(self, count: int, seed: int) -> Any:
        return TensorDataset(images(count, seed))

    def loss(self, batch: Any) -> Tensor:
        clean = batch[0]
        time, noise = torch.rand(len(clean), 1), torch.randn_like(clean)
        noisy = (1 - time).sqrt() * clean + time.sqrt() * noise
        return functional.mse_loss(self.net(torch.cat([noisy, time], 1)), noise)


class Detection(Project):
    """Training batches are images and lists of targets; those of validation are lists of pairs."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 12))

    def data(self, count: int, seed: int) -> Any:
        boxes = torch.randn(8, 4, generator=generator(7))
        return [
            (image, {"box": boxes[index % 8], "label": torch.tensor(index % 8)})
            for index, image in enumerate(images(count, seed))
        ]

    def train_dataloader(self) -> Any:
        return shuffled(self.data(512, 0), collate_fn=together)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data(64, 1), BATCH, collate_fn=list)

    def loss(self, batch: Any) -> Tensor:
        pictures, targets = batch
        found = self.net(pictures)
        boxes, labels = (torch.stack([target[key] for target in targets]) for key in ("box", "label"))
        return functional.cross_entropy(found[:, 4:], labels) + functional.smooth_l1_loss(found[:, :4], boxes)

    def measure(self) -> float:
        with torch.no_grad():
            return float(self.loss(together(self.data(512, 2))))


def together(pairs: Any) -> Any:
    return torch.stack([image for image, _ in pairs]), [target for _, target in pairs]


class Density(Project):
    """gluonts, asteroid: a likelihood (or SI-SDR) that becomes negative."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

    def data(self, count: int, seed: int) -> Any:
        inputs = torch.randn(count, 8, generator=generator(seed))
        return TensorDataset(inputs, 0.1 * inputs.mean(1).tanh())

    def loss(self, batch: Any) -> Tensor:
        mean, log_scale = self.net(batch[0]).unbind(1)
        return (log_scale + 0.5 * ((batch[1] - mean) / log_scale.exp()) ** 2).mean() + 0.5


class PolicyGradient(Project):
    """rl4co: -(advantage x log-probability), of either sign; the reward is the measure."""

    rate = 3e-3

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))

    def data(self, count: int, seed: int) -> Any:
        return TensorDataset(images(count, seed), torch.arange(count) % 8)

    def loss(self, batch: Any) -> Tensor:
        policy = torch.distributions.Categorical(logits=self.net(batch[0]))
        action = policy.sample()
        reward = (action == batch[1]).float()
        return -((reward - reward.mean()) * policy.log_prob(action)).mean()

    def measure(self) -> float:
        pictures, labels = self.data(512, 2)[:]
        with torch.no_grad():
            return float(1 - self.net(pictures).softmax(1)[torch.arange(512), labels].mean())


class Rays(Project):
    """nerf_pl: trains on rays, validates on a whole image in a batch of one."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3), nn.Sigmoid())

    def data(self, count: int, seed: int) -> Any:
        places = 2 * torch.rand(count, 2, generator=generator(seed)) - 1
        x, y = places.unbind(1)
        colors = torch.stack([x.sin(), y.cos(), (3 * x * y).sin()], 1) / 2 + 0.5
        return [{"rays": place, "colors": color} for place, color in zip(places, colors, strict=True)]

    def val_dataloader(self) -> Any:
        whole = self.data(64, 1)
        return DataLoader([{key: torch.stack([ray[key] for ray in whole]) for key in ("rays", "colors")}], 1)

    def loss(self, batch: Any) -> Tensor:
        rays, colors = batch["rays"], batch["colors"]
        (count, _) = rays.shape  # a whole image has one more dimension
        places = torch.cat([(2**k * rays).sin() for k in range(3)] + [(2**k * rays).cos() for k in range(3)], 1)
        return functional.mse_loss(self.net(places.view(count, 12)), colors)


class Speech(Project):
    """donut, NeMo, solo-learn: a recurrent network whose gradients the module clips itself; CTC loss."""

    rate = 5e-3

    def make_net(self) -> nn.Module:
        return nn.ModuleDict({"rnn": nn.GRU(4, 24, batch_first=True), "head": nn.Linear(24, 9)})

    def data(self, count: int, seed: int) -> Any:
        return TensorDataset(images(count, seed).view(count, 8, 4), 1 + torch.arange(count) % 8)

    def loss(self, batch: Any) -> Tensor:
        states, _ = self.net["rnn"](batch[0])
        logits = self.net["head"](states).log_softmax(2).transpose(0, 1)
        count = len(batch[1])
        lengths = torch.full((count,), 8), torch.ones(count, dtype=torch.long)
        return functional.ctc_loss(logits, batch[1][:, None], *lengths)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class Lora(Project):
    """stable-audio, fish-speech: small matrices on a frozen base that has weight_norm."""

    rate = 5e-3

    def make_net(self) -> nn.Module:
        torch.manual_seed(11)
        base = weight_norm(nn.Linear(32, 64)).requires_grad_(False)
        return nn.ModuleDict(
            {
                "base": base,
                "down": nn.Linear(32, 4, bias=False),
                "up": nn.Linear(4, 64, bias=False),
                "head": nn.Linear(64, 8),
            }
        )

    def data(self, count: int, seed: int) -> Any:
        return TensorDataset(images(count, seed), torch.arange(count) % 8)

    def loss(self, batch: Any) -> Tensor:
        hidden = torch.tanh(self.net["base"](batch[0]) + self.net["up"](self.net["down"](batch[0])))
        return functional.cross_entropy(self.net["head"](hidden), batch[1])


class TwoLoaders(Project):
    """COMET: the first validation loader is a part of the training data."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def data(self, count: int, seed: int) -> Any:
        pictures = images(count, seed)
        return TensorDataset(pictures, pictures[:, :4].mean(1, keepdim=True).sin())

    def val_dataloader(self) -> Any:
        return [DataLoader(self.data(512, 0), BATCH), DataLoader(self.data(64, 1), BATCH)]

    def loss(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])


class Recommender(Project):
    """RePlay: validation batches have no positive labels, but the items to rank."""

    rate = 1e-2

    def make_net(self) -> nn.Module:
        return nn.ModuleDict({"user": nn.Embedding(40, 8), "item": nn.Embedding(60, 8)})

    def data(self, count: int, seed: int) -> Any:
        users = torch.randint(40, (count,), generator=generator(seed))
        return [{"users": user, "positive_labels": (user * 7 + 3) % 60} for user in users]

    def val_dataloader(self) -> Any:
        return DataLoader([{"users": row["users"], "seen": torch.zeros(60)} for row in self.data(64, 1)], BATCH)

    def loss(self, batch: Any) -> Tensor:
        scores = self.net["user"](batch["users"]) @ self.net["item"].weight.T
        return functional.cross_entropy(scores, batch["positive_labels"])


PROJECTS = [
    GanByHand, SimCLR, Diffusion, Detection, Density, PolicyGradient, Rays, Speech, Lora, TwoLoaders, Recommender,
]  # fmt: skip
# Those whose validation batches training_step cannot take: the training gradients are used, and that is said once.
NOT_TAKEN = [SimCLR, Detection, Rays, Recommender]


def run(kind: Any, *callbacks: pl.Callback) -> Any:
    return fit(kind, *callbacks, train=None, val=None, max_epochs=13, max_steps=STEPS * (2 if kind is GanByHand else 1))


@pytest.mark.feature("GANs by hand", "training gradients", topic="project")
@pytest.mark.feature("SimCLR with labelled validation images", "training gradients", topic="project")
@pytest.mark.feature("diffusion", "works", topic="project")
@pytest.mark.feature("detection with another collate for validation", "training gradients", topic="project")
@pytest.mark.feature("likelihoods that turn negative", "works", topic="project")
@pytest.mark.feature("reinforcement learning by policy gradients", "works", topic="project")
@pytest.mark.feature("radiance fields that validate on whole images", "training gradients", topic="project")
@pytest.mark.feature("speech, with clipping of the module's own", "works", topic="project")
@pytest.mark.feature("LoRA on a frozen base with `weight_norm`", "works", topic="project")
@pytest.mark.feature("validation loaders of which the first is training data", "works", topic="project")
@pytest.mark.feature("recommenders with other keys in validation", "training gradients", topic="project")
@pytest.mark.parametrize("kind", PROJECTS)
def test_a_project_learns_and_ends_no_worse_than_at_its_usual_rate(kind: Any) -> None:
    callback = LearnToLearn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learned = run(kind, callback)
    said = [str(warning.message) for warning in caught if "to take a gradient" in str(warning.message)]
    assert len(said) == (kind in NOT_TAKEN)
    plain = run(kind)
    start = kind().measure()
    ours, theirs = learned.lightning_module.measure(), plain.lightning_module.measure()
    print(f"{kind.__name__:16} start {start:.4f} plain {theirs:.4f} learned {ours:.4f} rate {callback.learning_rates}")
    assert len(callback.history) > 5 and ours < start
    assert ours <= theirs + 0.05 * abs(theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PROJECTS)
def test_watching_leaves_a_project_as_it_is(kind: Any) -> None:
    assert unchanged(kind, train=None, val=None, max_epochs=2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(strategies, "ModelParallelStrategy"), reason="came with Lightning 2.4")
@pytest.mark.feature("a transformer under FSDP2", "works", topic="project")
def test_a_sharded_transformer_learns_and_ends_no_worse_than_at_its_usual_rate(tmp_path: Path) -> None:
    learned = launch(tmp_path, learn, "sharded", 2, LearnToLearn(), 25, 3e-3)[0]
    plain = launch(tmp_path, learn, "sharded", 2, LearnToLearn(meta_learning_rate=0, initial_search=False), 25, 3e-3)[0]
    assert learned["history"][-1]["learning_rates"] and math.isfinite(learned["end"])
    assert learned["end"] <= 1.05 * plain["end"] < 1.05 * learned["history"][0]["training_loss"]
