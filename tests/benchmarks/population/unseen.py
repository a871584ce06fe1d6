"""Twelve families that were set aside after the rule had been chosen: nothing was chosen on them.

They were written without running a rule on them; only the grids of constant rates and cosines were looked at, to see
that a best rate lies inside the grid and that the loss falls. ``families.py`` says what a family is.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from families import (
    Family,
    bundled,
    cross_entropy,
    digits_only,
    drawn,
    each_token,
    label_noise,
    mlp,
    mlp_shapes,
    randn,
)
from torch import Tensor


def words(g: torch.Generator) -> tuple[Tensor, ...]:
    """Pieces of a text of 40 invented words, whose frequencies fall like 1/rank."""
    lengths = torch.randint(2, 6, (40,), generator=g).tolist()
    vocabulary = [torch.cat([torch.randint(1, 12, (n,), generator=g), torch.zeros(1).long()]) for n in lengths]
    said = torch.multinomial(1 / torch.arange(1.0, 41), 24_000, replacement=True, generator=g)
    text = torch.cat([vocabulary[i] for i in said.tolist()])
    return (text[: 8000 * 11].reshape(8000, 11),)


def transformer(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """One causal block with layer norms before attention and perceptron; the loss of every next character."""
    seen = F.one_hot(b[0][..., :-1], 12).float()
    x = each_token(seen, p[0]) + p[1][:, None]
    query, key, value = (each_token(F.layer_norm(x, x.shape[-1:]), w) for w in p[2:5])
    scores = query @ key.mT / math.sqrt(key.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    x = x + torch.softmax(scores.masked_fill(later, -math.inf), -1) @ value
    hidden = F.gelu(each_token(F.layer_norm(x, x.shape[-1:]), p[5]) + p[6][:, None, None])
    x = x + each_token(hidden, p[7]) + p[8][:, None, None]
    return cross_entropy(each_token(F.layer_norm(x, x.shape[-1:]), p[9]), b[0][..., 1:])


def copies(g: torch.Generator) -> tuple[Tensor, ...]:
    """Three symbols, two blanks, and three blanks at which they are to be repeated (one in six is another one)."""
    symbols, others = torch.randint(4, (2, 4000, 3), generator=g)
    seen = F.one_hot(torch.cat([symbols, torch.full((4000, 5), 4)], 1), 5).float()
    return seen, torch.where(torch.rand(4000, 3, generator=g) < 0.17, others, symbols)


def gru(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    width, answers = p[4].shape[-1], []
    hidden = b[0].new_zeros(*b[0].shape[:2], width)
    for t in range(b[0].shape[2]):
        x = b[0][:, :, t]
        update, reset = torch.sigmoid(x @ p[0] + hidden @ p[1] + p[2][:, None]).chunk(2, -1)
        candidate = torch.tanh(x @ p[3] + (reset * hidden) @ p[4] + p[5][:, None])
        hidden = torch.lerp(hidden, candidate, update)
        answers.append(torch.baddbmm(p[7][:, None], hidden, p[6]))
    return cross_entropy(torch.stack(answers[-3:], 2), b[1])


def lifetimes(g: torch.Generator) -> tuple[Tensor, ...]:
    """Weibull lifetimes that depend on eight covariates, a third of them censored."""
    x = randn(4000, 8, g=g)
    scale = torch.tanh(x @ randn(8, 4, g=g) / 2) @ randn(4, 1, g=g)
    life = (0.8 * scale).exp() * (-torch.rand(4000, 1, generator=g).clamp(min=1e-6).log()) ** (1 / 1.7)
    end = 2.5 * torch.rand(4000, 1, generator=g)
    return x, torch.minimum(life, end).clamp(min=1e-3).log(), (life <= end).float()


def weibull(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """Negative logarithm of the likelihood of log times, exact where the event was seen."""
    scale, shape = mlp(p, b[0], torch.tanh).chunk(2, -1)
    shape = 2 * torch.tanh(shape / 2)
    reached = shape.exp() * (b[1] - scale)
    hazard = torch.where(reached > 5, math.exp(5) * (reached - 4), reached.clamp(max=5).exp())
    return (hazard - b[2] * (shape + reached)).flatten(1).mean(1)


def autoencode(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """The negative evidence bound of a variational autoencoder with four latent variables."""
    mean, log = mlp(p[:4], b[0]).chunk(2, -1)
    log = 4 * torch.tanh(log / 4)
    logits = mlp(p[4:], mean + (log / 2).exp() * b[-1])
    pixels = F.binary_cross_entropy_with_logits(logits, b[0], reduction="none").sum(-1)
    return (pixels + 0.5 * (mean.square() + log.exp() - 1 - log).sum(-1)).mean(1)


@functools.cache
def pretrained() -> tuple[Tensor, ...]:
    """Two layers that have learned the digits 0 to 4; they are not trained any more."""
    g = torch.Generator().manual_seed(11)
    x, y = digits_only(range(5))(g)
    shapes = mlp_shapes(64, 32, 32, 5)
    weights = [randn(*s, g=g) / math.sqrt(s[0]) if len(s) == 2 else torch.zeros(s) for s in shapes]
    parameters = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(300):
        pick = torch.randint(len(x), (64,), generator=g)
        loss = cross_entropy(mlp([w[None] for w in parameters], x[None, pick]), y[None, pick]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuple(w.detach() for w in parameters[:4])


def adapters(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """Rank-four corrections of the two layers (the second factors are vectors, so that they start at zero)."""
    x, frozen = b[0], pretrained()
    for i in range(2):
        correction = x @ p[2 * i] @ p[2 * i + 1].unflatten(-1, (4, 32))
        x = torch.relu(x @ frozen[2 * i] + frozen[2 * i + 1] + correction)
    return cross_entropy(torch.baddbmm(p[5][:, None], x, p[4]), b[1])


def collocation(g: torch.Generator) -> tuple[Tensor, ...]:
    """Points of the interval and the right-hand side of a boundary value problem."""
    x, amplitudes = 2 * torch.rand(10_000, 1, generator=g) - 1, randn(3, g=g)
    waves = torch.arange(1.0, 4)
    return x, (amplitudes * torch.sin(math.pi * waves * x)).sum(1, keepdim=True)


def boundary_value(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """The residual of u'' = pi^2 f with u(-1) = u(1) = 0; derivatives are carried forward through the layers."""
    ends = torch.tensor([[-1.0], [1.0]]).expand(len(b[0]), 2, 1)
    value = torch.cat([b[0], ends], 1)
    slope, bend = torch.ones_like(value), torch.zeros_like(value)
    for i in range(0, len(p), 2):
        value, slope, bend = torch.baddbmm(p[i + 1][:, None], value, p[i]), slope @ p[i], bend @ p[i]
        if i + 2 < len(p):
            value = torch.tanh(value)
            inner = 1 - value.square()
            slope, bend = inner * slope, inner * (bend - 2 * value * slope.square())
    residual = bend[:, :-2] / math.pi**2 - b[1]
    return 0.5 * residual.square().flatten(1).mean(1) + 0.5 * value[:, -2:].square().flatten(1).sum(1)


def contexts(g: torch.Generator) -> tuple[Tensor, ...]:
    """Contexts, and for each of five actions the probability of a reward."""
    x = randn(8000, 8, g=g)
    return x, torch.sigmoid(torch.tanh(x @ randn(8, 12, g=g) / 2) @ randn(12, 5, g=g))


def policy(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """A policy gradient: in training one drawn action and reward for each context, elsewhere the expected regret."""
    log = torch.log_softmax(mlp(p, b[0]), -1)
    if len(b) == 2:
        return (b[1].amax(-1) - (log.exp() * b[1]).sum(-1)).mean(1)
    uniform = torch.special.ndtr(b[2]).clamp(1e-6, 1 - 1e-6)
    action = (log.detach() - (-uniform[..., :5].log()).log()).argmax(-1, keepdim=True)
    cost = 1 - (uniform[..., 5:] < b[1].gather(-1, action)).float()
    taken = log.gather(-1, action)
    return ((cost - 0.5) * (taken - taken.detach()).exp() + 0.5).flatten(1).mean(1)


def spread(g: torch.Generator) -> tuple[Tensor, ...]:
    """A curve with skewed noise, whose scale depends on the place."""
    x = 2 * torch.rand(10_000, 4, generator=g) - 1
    noise = randn(10_000, g=g).exp() - 1
    return x, (torch.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + (0.1 + 0.3 * x[:, 3].abs()) * noise)[:, None]


def quantiles(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    over = b[1] - mlp(p, b[0])
    levels = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(levels * over, (levels - 1) * over).flatten(1).mean(1)


def neighbours(g: torch.Generator) -> tuple[Tensor, ...]:
    """Nodes of a graph: own features, those of six neighbours (two thirds of the same class), and the class."""
    centres, y = 0.5 * randn(6, 16, g=g), torch.randint(6, (2000,), generator=g)
    same = torch.rand(2000, 6, generator=g) < 0.67
    around = torch.where(same, y[:, None], torch.randint(6, (2000, 6), generator=g))
    classes = torch.cat([y[:, None], around], 1)
    return centres[classes] + randn(2000, 7, 16, g=g), y


def aggregate(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """A node's own features and the mean of its neighbours' hidden ones."""
    around = torch.relu(each_token(b[0][:, :, 1:].flatten(1, 2)[:, :, None], p[0])[:, :, 0] + p[1][:, None])
    around = around.unflatten(1, (-1, 6)).mean(2)
    hidden = torch.relu(b[0][:, :, 0] @ p[2] + around @ p[3] + p[4][:, None])
    return cross_entropy(torch.baddbmm(p[6][:, None], hidden, p[5]), b[1])


def rare_class(g: torch.Generator) -> tuple[Tensor, ...]:
    """Some four percent of the examples lie on one side of a curved surface, blurred a little."""
    x = randn(7000, 12, g=g)
    score = torch.tanh(x @ randn(12, 6, g=g) / 3) @ randn(6, g=g) + 0.15 * randn(7000, g=g)
    return x, (score > score.quantile(0.96)).float()[:, None]


def focal(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    signed = (2 * b[1] - 1) * mlp(p, b[0])
    weight = 0.75 * b[1] + 0.25 * (1 - b[1])
    return (weight * torch.sigmoid(-signed).square() * F.softplus(-signed)).flatten(1).mean(1)


def rare_features(g: torch.Generator) -> tuple[Tensor, ...]:
    """Two hundred features that are on or off, the rarest in one of two hundred examples."""
    share = 0.5 / torch.arange(1.0, 201) ** 0.9
    x = (torch.rand(10_000, 200, generator=g) < share).float()
    score = x @ (1.5 * randn(200, 1, g=g))
    return x, (torch.rand(10_000, 1, generator=g) < torch.sigmoid(score - score.mean())).float()


def logistic(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    return F.softplus((1 - 2 * b[1]) * mlp(p, b[0])).flatten(1).mean(1)


def spirals(g: torch.Generator) -> tuple[Tensor, ...]:
    y, angle = torch.randint(2, (3000,), generator=g), 3 * math.pi * torch.rand(3000, generator=g).sqrt()
    turned = angle + math.pi * y
    x = torch.stack([turned.cos(), turned.sin()], 1) * (angle / 4)[:, None]
    return x + 0.1 * randn(3000, 2, g=g), y


def skip_init(p: list[Tensor], b: tuple[Tensor, ...]) -> Tensor:
    """Eight residual blocks without normalisation, each with a gain that starts at zero."""
    x = torch.baddbmm(p[1][:, None], b[0], p[0])
    for i in range(2, len(p) - 2, 4):
        inner = torch.relu(torch.baddbmm(p[i + 1][:, None], torch.relu(x), p[i])) @ p[i + 2]
        x = x + p[i + 3][:, None] * inner
    return cross_entropy(torch.baddbmm(p[-1][:, None], torch.relu(x), p[-2]), b[1])


SA, SW, AM, SM, AW = ("sgd", "adam"), ("sgd", "adamw"), ("adam", "muon"), ("sgd", "muon"), ("adam", "adamw")
UNSEEN: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "transformer-words",
            words,
            ((12, 16), (10, 16), (16, 16), (16, 16), (16, 16), (16, 32), (32,), (32, 16), (16,), (16, 12)),
            transformer,
            16,
            6000,
            optimizers=("adamw", "muon"),
        ),
        Family(
            "gru-copy",
            copies,
            ((5, 48), (24, 48), (48,), (5, 24), (24, 24), (24,), (24, 4), (4,)),
            gru,
            32,
            2000,
            optimizers=SA,
        ),
        Family("survival", lifetimes, mlp_shapes(8, 16, 2), weibull, 64, 1500, nats=True, optimizers=SW),
        Family(
            "variational",
            lambda g: bundled("digits")(g)[:1],
            mlp_shapes(64, 32, 8) + mlp_shapes(4, 32, 64),
            autoencode,
            128,
            1000,
            noise=drawn(4),
            optimizers=AW,
        ),
        Family(
            "adapters",
            label_noise(digits_only(range(5, 10)), 0.1, 5),
            ((64, 4), (128,), (32, 4), (128,), (32, 5), (5,)),
            adapters,
            8,
            400,
            200,
            optimizers=SW,
        ),
        Family("boundary-value", collocation, mlp_shapes(1, 24, 24, 1), boundary_value, 64, 8000, optimizers=AM),
        Family(
            "bandit",
            contexts,
            mlp_shapes(8, 24, 5),
            policy,
            128,
            6000,
            noise=drawn(6),
            noise_in_training_only=True,
            optimizers=SA,
        ),
        Family("quantiles", spread, mlp_shapes(4, 32, 3), quantiles, 8, 8500, optimizers=SW),
        Family(
            "graph",
            neighbours,
            ((16, 16), (16,), (16, 24), (16, 24), (24,), (24, 6), (6,)),
            aggregate,
            100,
            600,
            optimizers=AM,
        ),
        Family("focal", rare_class, mlp_shapes(12, 24, 1), focal, 256, 4000, 1000, optimizers=SA),
        Family("rare-features", rare_features, mlp_shapes(200, 1), logistic, 4, 8500, optimizers=SW),
        Family(
            "deep-residual",
            label_noise(spirals, 0.1, 2),
            ((2, 16), (16,), *(((16, 16), (16,), (16, 16), (16,)) * 8), (16, 2), (2,)),
            skip_init,
            32,
            1500,
            optimizers=SM,
        ),
    )
}
