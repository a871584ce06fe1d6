"""The tasks by name: each a minute or so on one core."""

from __future__ import annotations

import images
import tables
import text
from learner import Task

TASKS = {
    "minilm": Task("MiniLM, fine-tuned", text.FineTuned, text.sources, 2e-5, 216, "accuracy"),
    "lora": Task("MiniLM with LoRA", text.Adapted, text.sources, 1e-3, 216, "accuracy"),
    "language": Task(
        "character language model", text.CharacterModel, text.bible, 1e-3, 500, trainer={"gradient_clip_val": 1.0}
    ),
    "convnet": Task("MNIST, convnet", images.ConvNet, images.digits, 1e-3, 570, "accuracy"),
    "resnet": Task("MNIST, ResNet, augmented", images.ResNet, images.shifted_digits, 0.05, 570, "accuracy"),
    "mnist1d": Task("mnist1d, convnet", images.SignalNet, images.mnist1d, 1e-2, 1080, "accuracy"),
    "vae": Task("VAE", images.VAE, images.digits, 1e-3, 1140),
    "diffusion": Task("diffusion", images.Diffusion, images.digits, 1e-3, 570),
    "simclr": Task("SimCLR", images.SimCLR, images.views, 1e-3, 392, "accuracy"),
    "gan": Task("GAN, two optimizers", images.GAN, images.digits, 2e-4, 1140, "score", optimizers=2),
    "recommender": Task("recommender, MLP", tables.Recommender, tables.ratings, 1e-3, 714),
    "sparse": Task("recommender, sparse", tables.Factorization, tables.ratings, 1e-2, 357),
    "diamonds": Task("prices of diamonds", tables.Prices, tables.diamonds, 1e-3, 860),
    "vowels": Task("speakers, GRU", tables.Speakers, tables.vowels, 1e-3, 520, "accuracy"),
    "graph": Task("graph network", tables.GraphNet, tables.nodes, 1e-2, 300, "accuracy"),
}
