"""Random architectures, optimizers and hyperparameters, each trained in a batch as alone."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import close, train_alone
from torch import Tensor, nn

from mbkit import ModelBatch
from mbkit.optim import OptimizerFactory

WIDTH, STEPS = 4, 5


class Branch(nn.Module):
    """Looks at its activations, so that it has to run model by model."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5 if x.sum() > 0 else x - 0.1


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Average(nn.Module):
    """A buffer that is assigned anew, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.last = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        x = x - self.mean + 0.1 * self.last
        self.last = x.detach().mean(0)
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(WIDTH, WIDTH, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x.unsqueeze(1))[0].squeeze(1)


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def plain_layers(rate):
    return st.sampled_from(
        [
            lambda m: nn.Linear(WIDTH, WIDTH),
            lambda m: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
            lambda m: nn.LayerNorm(WIDTH),
            lambda m: nn.BatchNorm1d(WIDTH, momentum=0.1 * (m + 1)),
            lambda m: nn.PReLU(),
            lambda m: nn.LeakyReLU(0.1 * (m + 1)),
            lambda m: nn.Dropout(rate * (m + 1) / 3),
            lambda m: nn.Dropout(rate),
            lambda m: nn.RReLU(),
            lambda m: Noise(),
            lambda m: Average(),
            lambda m: Branch(),
            lambda m: Recurrent(),
        ]
    )


layers = st.floats(0, 1).flatmap(plain_layers)
blocks = st.recursive(
    layers,
    lambda inner: st.tuples(st.booleans(), st.lists(inner, min_size=1, max_size=3)).map(
        lambda drawn: lambda m: (Skip if drawn[0] else nn.Sequential)(*(make(m) for make in drawn[1]))
    ),
    max_leaves=6,
)
rates = st.lists(st.floats(1e-4, 0.05), min_size=3, max_size=3)
optimizers = st.one_of(
    st.tuples(
        st.just(torch.optim.SGD), st.fixed_dictionaries({"momentum": st.floats(0, 0.9), "nesterov": st.just(False)})
    ),
    st.tuples(
        st.just(torch.optim.Adam), st.fixed_dictionaries({"eps": st.floats(1e-6, 1e-3), "amsgrad": st.booleans()})
    ),
    st.tuples(
        st.just(torch.optim.AdamW), st.fixed_dictionaries({"weight_decay": st.floats(0, 0.1), "eps": st.just(1e-4)})
    ),
    st.tuples(
        st.just(torch.optim.RMSprop), st.fixed_dictionaries({"alpha": st.floats(0.8, 0.99), "eps": st.just(1e-4)})
    ),
)


def build(make, count: int = 3) -> list[nn.Module]:
    models = []
    for m in range(count):
        torch.manual_seed(m)
        models.append(nn.Sequential(make(m), nn.Linear(WIDTH, 2)).double())
        for module in models[-1].modules():
            if isinstance(module, Average):
                module.last = module.last.double()
    return models


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    make=blocks,
    optimizer=optimizers,
    lr=rates,
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=3, max_size=3),
    shared=st.booleans(),
    max_norm=st.one_of(st.none(), st.floats(0.01, 2.0)),
)
def test_a_drawn_model_trains_as_alone(make, optimizer, lr, seeds, shared, max_norm):
    kind, options = optimizer
    g = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 3, 5, WIDTH, generator=g, dtype=torch.float64)
    y = torch.randn(STEPS, 5, 2, generator=g, dtype=torch.float64)
    batch, models = ModelBatch(build(make), shared_input=shared, seeds=seeds), build(make)
    step_all = OptimizerFactory(kind).create_optimizer(batch, lr=lr, **options)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs model by model.*")
        for step in range(STEPS):
            step_all.zero_grad()
            outputs = batch(x[step, 0] if shared else x[step])
            losses.append(batch.compute_loss(outputs, y[step], F.mse_loss, reduction="none", shared_targets=True))
            losses[-1].sum().backward()
            if max_norm is not None:
                batch.clip_grad_norm_(max_norm)
            step_all.step()
    data = [(x[i, 0], y[i]) if shared else (x[i], y[i].expand(3, 5, 2)) for i in range(STEPS)]
    configs = [{"lr": rate, **options} for rate in lr]
    expected = train_alone(models, data, not shared, F.mse_loss, max_norm, seeds, kind, configs)
    close(torch.stack(losses), expected, 1e-9, "losses")
    for model, state in zip(models, batch.get_model_states(), strict=True):
        for name, tensor in model.state_dict().items():
            close(state[name], tensor, 1e-8, name)
