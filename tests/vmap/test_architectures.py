"""Well-known families of models, small, from torch alone: 20 steps in a batch as alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import close, train_alone, train_batch
from torch import Tensor, nn

from mbkit import ModelBatch

SEEDS, STEPS = [3, 1, 4], 20


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def resnet() -> nn.Module:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), Residual(4, 4, 1), Residual(4, 8, 2), *pool)


class Block(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width), nn.Dropout(0.2))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        p = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1, self.training)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.Sequential(Block(8, True), Block(8, True), nn.LayerNorm(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.tokens(x) + self.places(torch.arange(x.shape[1])), 0.1, self.training)
        return self.head(self.blocks(x)).transpose(1, 2)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.encoder(x)[:, 0])


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.tags = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tags(F.dropout(self.lstm(self.words(x))[0], 0.2, self.training)).transpose(1, 2)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).rsample()
        return self.decoder(z), mean, log_variance


def vae_loss(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    decoded, mean, log_variance = outputs
    return F.mse_loss(decoded, x) - 0.05 * (1 + log_variance - mean**2 - log_variance.exp()).mean()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.last(F.dropout2d(torch.cat([x, self.up(self.deep(x))], 1), 0.2, self.training))


class Relative(nn.Module):
    """Attention with a bias for each bucket of distances, which are edited in place and are no model's own: T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias = nn.Embedding(11, 8), nn.Embedding(6, 2)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        h, places = self.words(x), torch.arange(x.shape[1])
        distance = places[None] - places[:, None]
        bucket = (distance > 0).long() * 3
        distance = distance.abs()
        bucket += torch.where(distance < 2, distance, torch.min(distance, torch.full_like(distance, 2)))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) + self.bias(bucket).permute(2, 0, 1)
        h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(F.dropout(h, 0.1, self.training)).transpose(1, 2)


class StateSpace(nn.Module):
    """A short convolution over the past and a scan whose steps depend on the input: Mamba's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.steps, self.gates = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.past, self.decay = nn.Conv1d(6, 6, 3, groups=6), nn.Parameter(torch.randn(6, 4))
        self.head = nn.Linear(6, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(self.words(x).transpose(1, 2), (2, 0))
        h = F.conv1d(h, weight=self.past.weight, bias=self.past.bias, groups=6)
        h = F.silu(h).transpose(1, 2)
        step, (into, out) = F.softplus(self.steps(h)).unsqueeze(-1), self.gates(h).chunk(2, -1)
        kept, taken = torch.exp(-step * self.decay.exp()), step * into.unsqueeze(2) * h.unsqueeze(-1)
        state, seen = torch.zeros(len(x), 6, 4), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + taken[:, t]
            seen.append((state * out[:, t, None]).sum(-1))
        return self.head(torch.stack(seen, 1)).transpose(1, 2)


def images(g: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=g)


def tokens(g: torch.Generator) -> Tensor:
    return torch.randint(11, (4, 6), generator=g)


def labels(high: int, *shape: int):
    return lambda g: torch.randint(high, shape, generator=g)


FAMILIES = {
    "ResNet": (resnet, images, labels(5, 4), F.cross_entropy),
    "GPT": (GPT, tokens, labels(11, 4, 6), F.cross_entropy),
    "ViT": (ViT, images, labels(5, 4), F.cross_entropy),
    "LSTM tagger": (Tagger, tokens, labels(5, 4, 6), F.cross_entropy),
    "VAE": (VAE, lambda g: torch.randn(4, 12, generator=g), None, vae_loss),
    "relative positions": (Relative, tokens, labels(11, 4, 6), F.cross_entropy),
    "state space": (StateSpace, tokens, labels(11, 4, 6), F.cross_entropy),
    "U-Net": (UNet, images, labels(5, 4, 8, 8), F.cross_entropy),
}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(make) -> list[nn.Module]:
    models = []
    for m in range(3):
        torch.manual_seed(100 + m)
        models.append(make())
    return models


def data(family: str, step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = FAMILIES[family][1](g)
    return x, FAMILIES[family][2](g) if FAMILIES[family][2] else x


def descend(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(p.grad, alpha=0.05)
            p.grad = None


def assert_same_state(batch: ModelBatch, m: int, model: nn.Module) -> None:
    state = batch.get_model_states()[m]
    for name, expected in model.state_dict().items():
        close(state[name], expected, what=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    make, _, _, loss_fn = FAMILIES[family]
    batch, models, first = ModelBatch(build(make), seeds=SEEDS), build(make), build(make)
    pairs = [data(family, step) for step in range(STEPS)]
    expected = train_alone(models, pairs, loss_fn=loss_fn, seeds=SEEDS)
    close(train_batch(batch, pairs, loss_fn), expected, what="losses")
    assert batch.model_by_model == set()  # nothing here needs the slow way
    x, _ = data(family, STEPS)
    with torch.no_grad():
        evaluated = batch.eval()(x)
    for m, (model, old) in enumerate(zip(models, first, strict=True)):
        assert any((p - q).abs().max() > 1e-3 for p, q in zip(model.parameters(), old.parameters(), strict=True))
        assert_same_state(batch, m, model)
        if family != "VAE":  # which samples in eval() too
            with torch.no_grad():
                close(evaluated[m], model.eval()(x), 1e-9, "outputs in eval")


def test_gan_trained_alternately():
    def generator() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))

    def discriminator() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1), nn.Flatten(0))

    def real(logits: Tensor, _: Tensor | None = None) -> Tensor:
        return F.softplus(-logits).mean()

    def fake(logits: Tensor, _: Tensor | None = None) -> Tensor:
        return F.softplus(logits).mean()

    g = torch.Generator().manual_seed(0)
    noise, truth = torch.randn(STEPS, 5, 3, generator=g), torch.randn(STEPS, 5, 4, generator=g)
    # Each pair draws from two streams, the generator's and the discriminator's, as two batches have them.
    makers = ModelBatch(build(generator), seeds=SEEDS)
    critics = ModelBatch(build(discriminator), seeds=[9, 8, 7])
    none = torch.zeros(())
    for step in range(STEPS):
        made = makers(noise[step])
        loss = critics.compute_loss(critics(truth[step]), none, real)
        loss = loss + critics.compute_loss(critics(made.detach(), shared_input=False), none, fake)
        loss.backward()
        descend(critics)
        critics.compute_loss(critics(made, shared_input=False), none, real).backward()
        descend(makers)
        critics.zero_grad()
    for m, (maker, critic) in enumerate(zip(build(generator), build(discriminator), strict=True)):
        states = {}
        for name, seed in ("maker", SEEDS[m]), ("critic", [9, 8, 7][m]):
            torch.manual_seed(seed)
            states[name] = torch.get_rng_state()

        def drawing(name: str, module: nn.Module, x: Tensor, states: dict = states) -> Tensor:
            torch.set_rng_state(states[name])
            out = module(x)
            states[name] = torch.get_rng_state()
            return out

        for step in range(STEPS):
            made = drawing("maker", maker, noise[step])
            loss = real(drawing("critic", critic, truth[step])) + fake(drawing("critic", critic, made.detach()))
            loss.backward()
            descend(critic)
            real(drawing("critic", critic, made)).backward()
            descend(maker)
            critic.zero_grad()
        assert_same_state(makers, m, maker)
        assert_same_state(critics, m, critic)
