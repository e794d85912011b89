"""Small models of the kinds that people train in batches, each with its inputs and loss, for compiled steps.

`KINDS[name]` is a `Kind`; those in `UNCOMPILED` cannot be compiled, for the reason beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from mbkit.models import GPT, MLP, LSTMClassifier

B, K = 6, 4


class Kind(NamedTuple):
    """How to make a model, its input and its target; the loss."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    targets: Callable[[torch.Generator], Any]
    loss: Callable[[Any, Any], Tensor]


class Does(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *x: Any) -> Any:
        return self.call(self, *x)


def net(inputs: int = 5, outputs: int = K) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def doing(call: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Does(call, **{name: make() for name, make in layers.items()})


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def whole(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(high, shape, generator=g)


ROWS, IMAGES, LABELS, NUMBERS = normal(B, 5), normal(B, 3, 8, 8), whole(K, B), normal(B, K)
CROSS, SQUARED = F.cross_entropy, F.mse_loss
KINDS: dict[str, Kind] = {}


def kind(name: str, build: Any, inputs: Any = ROWS, targets: Any = LABELS, loss: Any = CROSS) -> None:
    assert name not in KINDS
    KINDS[name] = Kind(build, inputs, targets, loss)


# ------------------------------------------------------------------ networks
kind("MLP", lambda: MLP([5, 8, K]))
CONVOLVED = (nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
kind("LeNet", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *CONVOLVED, nn.Linear(36, K)), IMAGES)
kind("BatchNorm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *CONVOLVED, nn.Linear(36, K)), IMAGES)
kind(
    "LayerNorm, GroupNorm",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, K)
    ),
    IMAGES,
)
kind("GPT", lambda: GPT(K, 8, 8, 1), whole(K, B, 8))
kind("GPT with dropout", lambda: GPT(K, 8, 8, 1, 0.2), whole(K, B, 8))
kind("LSTM", lambda: LSTMClassifier(K, 5, 6), normal(B, 4, 5))
kind(
    "embedding with a padding row",
    doing(lambda self, x: self.out(self.words(x).mean(1)), words=lambda: nn.Embedding(9, 5, padding_idx=0), out=net),
    whole(9, B, 3),
)
kind("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(9, 5), net()), whole(9, B, 3))
kind(
    "attention",
    doing(
        lambda self, x: self.out(self.attention(x, x, x)[0].mean(1)),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        out=lambda: net(4),
    ),
    normal(B, 3, 4),
)
kind(
    "encoder with dropout",
    lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, K)),
    normal(B, 3, 4),
)
kind(
    "weight_norm",
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, K)),
)


def experts(self: Any, x: Tensor) -> Tensor:
    scores = self.gate(x).softmax(-1)
    chosen = scores.argmax(-1, keepdim=True)
    out = torch.stack([expert(x) for expert in self.experts], 1)  # [B, E, K]
    return sum(torch.where(chosen == e, scores[:, e : e + 1] * out[:, e], 0.0) for e in range(3))


kind(
    "experts by where",
    doing(experts, gate=lambda: nn.Linear(5, 3), experts=lambda: nn.ModuleList(net() for _ in range(3))),
)


def quantized(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = self.encoder(x)
    nearest = self.codes(torch.cdist(z, self.codes.weight).argmin(-1))
    return self.decoder(z + (nearest - z).detach()), F.mse_loss(nearest, z.detach()) + F.mse_loss(z, nearest.detach())


kind(
    "VQ-VAE",
    doing(quantized, encoder=lambda: net(5, 3), codes=lambda: nn.Embedding(7, 3), decoder=lambda: net(3, 5)),
    ROWS,
    ROWS,
    lambda out, y: SQUARED(out[0], y) + out[1],
)

# ------------------------------------------------------------------ random numbers


class Noisy(nn.Linear):
    """A layer of a NoisyNet, as DQNs use it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.sigma = nn.Parameter(torch.full((outputs, inputs), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.randn(self.in_features, dtype=x.dtype), torch.randn(self.out_features, dtype=x.dtype)
        first, second = first.sign() * first.abs().sqrt(), second.sign() * second.abs().sqrt()
        return F.linear(x, self.weight + self.sigma * torch.outer(second, first), self.bias)


class Noise(nn.Module):
    """Gaussian noise in its forward, filled in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.new_empty(x.shape).normal_(0, 0.1) if self.training else x


def variational(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_var = self.encoder(x).chunk(2, -1)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    return self.decoder(z), 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(-1).mean()


def variational_by_distributions(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_var = self.encoder(x).chunk(2, -1)
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    return self.decoder(q.rsample()), kl_divergence(q, p).mean()


def elbo(out: tuple, y: Tensor) -> Tensor:
    return SQUARED(out[0], y) + out[1]


CODER = {"encoder": lambda: net(5, 4), "decoder": lambda: net(2, 5)}
kind("VAE", doing(variational, **CODER), ROWS, ROWS, elbo)
kind("VAE of distributions", doing(variational_by_distributions, **CODER), ROWS, ROWS, elbo)
kind(
    "likelihood of a distribution",
    net,
    ROWS,
    normal(B, 2),
    lambda out, y: -Normal(out[:, :2], F.softplus(out[:, 2:])).log_prob(y).mean(),
)
kind(
    "actor and critic",
    net,
    ROWS,
    LABELS,
    lambda out, y: -(Categorical(logits=out).log_prob(y) * y).mean() - 0.1 * Categorical(logits=out).entropy().mean(),
)


def reinforced(out: Tensor, y: Tensor) -> Tensor:
    policy = Categorical(logits=out)
    action = policy.sample()
    return -(policy.log_prob(action) * (action == y)).mean()


kind("REINFORCE", net, loss=reinforced)


def binary(out: Tensor, y: Tensor) -> Tensor:
    units = Bernoulli(logits=out)
    return -units.log_prob(units.sample()).mean() + SQUARED(out, y)


kind("Bernoulli units", net, ROWS, NUMBERS, binary)
kind(
    "score function of a normal",
    net,
    ROWS,
    normal(B, 2),
    lambda out, y: (lambda policy: -(policy.log_prob(policy.sample()) * y).mean())(
        Normal(out[:, :2], F.softplus(out[:, 2:]))
    ),
)
kind("NoisyNet", lambda: nn.Sequential(Noisy(5, 8), nn.ReLU(), Noisy(8, K)))
kind("MC dropout", lambda: MLP([5, 8, K], 0.3))
kind(
    "Dropout2d",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(144, K)),
    IMAGES,
)
kind("Gaussian noise", lambda: nn.Sequential(Noise(), net(), Noise()))


def stochastic_depth(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = x + block(x) * x.new_empty(len(x), 1).bernoulli_(0.8).div_(0.8)
    return self.out(x)


kind(
    "stochastic depth",
    doing(stochastic_depth, blocks=lambda: nn.ModuleList(net(5, 5) for _ in range(2)), out=lambda: nn.Linear(5, K)),
)


def mixed(self: Any, x: Tensor) -> Tensor:
    order, share = torch.randperm(len(x)), torch.rand(len(x), 1, dtype=x.dtype)
    return self.net(share * x + (1 - share) * x[order])


kind("mixup by randperm", doing(mixed, net=net))


def denoised(self: Any, x: Tensor) -> Tensor:
    steps = torch.randint(0, 10, (len(x),))
    noise, kept = torch.randn_like(x), self.kept[steps][:, None]
    seen = kept.sqrt() * x + (1 - kept).sqrt() * noise
    return F.mse_loss(self.net(seen + self.times(steps)), noise)


class Diffusion(Does):
    def __init__(self) -> None:
        super().__init__(denoised, net=net(5, 5), times=nn.Embedding(10, 5))
        self.register_buffer("kept", torch.linspace(0.9, 0.1, 10))


kind("DDPM", Diffusion, ROWS, LABELS, lambda out, y: out)
kind(
    "gumbel softmax",
    doing(lambda self, x: self.out(F.gumbel_softmax(self.first(x), hard=True)), first=net, out=lambda: net(K)),
)
kind(
    "masked tokens",
    doing(
        lambda self, x: self.out(self.words(x.masked_fill(torch.rand(x.shape) < 0.3, 0)).mean(1)),
        words=lambda: nn.Embedding(9, 5),
        out=net,
    ),
    whole(9, B, 3),
)

# ------------------------------------------------------------------ losses


def ctc(out: Tensor, y: Tensor) -> Tensor:
    return F.ctc_loss(out.transpose(0, 1).log_softmax(-1), y + 1, torch.full((B,), 5), torch.full((B,), 2))


def focal(out: Tensor, y: Tensor) -> Tensor:
    rows = CROSS(out, y, reduction="none")
    return ((1 - (-rows).exp()) ** 2 * rows).mean()


def contrasted(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out, dim=-1)
    alike = (z @ z.T / 0.5).masked_fill(torch.eye(B, dtype=torch.bool), -1e9)
    return CROSS(alike, (torch.arange(B) + B // 2) % B)


def bellman(out: Any, y: Any) -> Tensor:
    now, later = out
    action, reward = y
    return F.smooth_l1_loss(now.gather(1, action[:, None])[:, 0], reward + 0.9 * later.max(1).values.detach())


def of_two_states(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        later = self.target(x[:, 5:])
    return self.net(x[:, :5]), later


class Named(nn.Sequential):
    """Asks for its parts in a way that could name anything, as large libraries do."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in vars(self)["_modules"].values():
            x = F.dropout(layer(x), 0.3, self.training)
        return x


kind("parts by any name", doing(lambda self, x: self.part(x), part=lambda: Named(*net())))
kind("focal loss", net, loss=focal)
kind("SimCLR", net, loss=contrasted)
kind(
    "DQN",
    doing(of_two_states, net=net, target=lambda: net().requires_grad_(False)),
    normal(B, 10),
    lambda g: (LABELS(g), normal(B)(g)),
    bellman,
)

# ------------------------------------------------------------------ what runs uncompiled, and why


def branching(self: Any, x: Tensor) -> Tensor:
    return self.net(x) if (x > 0).any() else self.net(-x)


def of_layer(layer: Callable[[], nn.Module]) -> Kind:
    return Kind(lambda: nn.Sequential(nn.Linear(5, 8), layer(), nn.Linear(8, K)), ROWS, LABELS, CROSS)


IN_TURN = "an operator runs model by model"
UNCOMPILED = {
    "RReLU": (of_layer(nn.RReLU), IN_TURN),
    "AlphaDropout": (of_layer(nn.AlphaDropout), IN_TURN),
    "CTC": (Kind(net, normal(B, 5, 5), whole(3, B, 2), ctc), IN_TURN),
    "a branch on values": (Kind(doing(branching, net=net), ROWS, LABELS, CROSS), "data-dependent"),
}
