"""The kinds of models that people train in batches compile, and each model is the one trained alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import mse_loss

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.training.options import StepOptions
from mbkit.training.step import Stepper
from tests.oracle import Identity, close, train_alone
from tests.training.compiled_kinds import KINDS, UNCOMPILED, Kind

SEEDS = [11, 5, 2**40]
M, STEPS = len(SEEDS), 3
SETTINGS = {"lr": 0.05, "momentum": 0.9}


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that are traced; they run as they are, without inductor."""
    made: list = []
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_, **__: made.append(graph) or graph)
    return made


def models_of(build: Callable[[], nn.Module]) -> list[nn.Module]:
    models = []
    for m in range(M):
        torch.manual_seed(m)
        models.append(build().double())
    return models


def assert_as_alone(batch: ModelBatch, models: list[nn.Module], data: list, loss_fn: Callable, losses: Tensor) -> None:
    """Train the models in plain PyTorch, and compare losses, parameters, buffers and random streams."""
    for m, lone in enumerate(copy.deepcopy(models)):
        expected = train_alone([lone], data, loss_fn=loss_fn, seeds=[SEEDS[m]], configs=SETTINGS)
        torch.testing.assert_close(losses[:, m : m + 1], expected, rtol=1e-10, atol=1e-10)
        own = batch[m].state_dict()
        for name, value in lone.state_dict().items():
            close(own[name], value, 1e-10, f"{name} of model {m}")
        assert torch.equal(batch.streams.on("cpu")[m].get_state(), torch.get_rng_state()), f"stream of model {m}"


def train(kind: Kind) -> tuple[str, str]:
    """Train M models compiled and alone, and compare; return how, and what was said."""
    models, g = models_of(kind.build), torch.Generator().manual_seed(1)
    data = [(kind.inputs(g), kind.targets(g)) for _ in range(STEPS)]
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(batch, optimizer, data, kind.loss, compile=True, progress=False)
    assert_as_alone(batch, models, data, kind.loss, history.loss)
    return history.how, "\n".join(str(w.message) for w in caught)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_compiles_and_each_model_is_the_one_trained_alone(graphs, name):
    assert train(KINDS[name]) == ("compiled", "")


@pytest.mark.parametrize("name", UNCOMPILED)
def test_what_cannot_be_compiled_says_so_and_is_as_exact(graphs, name):
    kind, reason = UNCOMPILED[name]
    how, said = train(kind)
    assert how == "all models at once"
    assert "compile=True: the steps run uncompiled, because " in said
    assert reason in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT with dropout", "VAE of distributions", "REINFORCE"])
def test_the_real_compiler_draws_and_asks_likewise(name):
    assert train(KINDS[name]) == ("compiled", "")


KEPT = """
from torch._dynamo.utils import counters
from tests.training.compiled_kinds import KINDS
from tests.training.test_compiled_kinds import train
assert train(KINDS["MC dropout"]) == ("compiled", "")
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_what_one_process_has_compiled_the_next_one_finds(tmp_path):
    """Though names are hashed differently in each; and it trains the models as alone.

    One with other instructions compiles its own, for it could not run what it finds.
    """
    root = Path(__file__).parents[2]
    place = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    counts = []
    has_others = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for seed, instructions in (("1", {}), ("2", {}), ("3", {"ATEN_CPU_CAPABILITY": "default"}))[: 2 + has_others]:
        env = os.environ | place | {"PYTHONHASHSEED": seed} | instructions
        run = subprocess.run([sys.executable, "-c", KEPT], env=env, cwd=root, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        counts.append(run.stdout.split())
    assert counts == [["0", "1"], ["1", "0"], ["0", "1"]][: 2 + has_others]


# ------------------------------------------------------------------ each random operator


def filled(method: Callable, *settings: Any, **named: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: method(torch.empty_like(x), *settings, **named)


def part_filled(x: Tensor) -> Tensor:
    """Fill every other column, which lies in memory with gaps."""
    x = torch.zeros_like(x)
    x[:, ::2].normal_()
    return x


def attended(x: Tensor) -> Tensor:
    q = torch.stack([x, 2 * x, x.flip(0)], 1).unsqueeze(1)  # [B, H, T, E]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    return nn.functional.scaled_dot_product_attention(q, q, q, mask, 0.4, scale=0.5).sum((1, 2))


P = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(len(x), 1, dtype=torch.float64),
    "rand of a size": lambda x: torch.rand(size=(5,), dtype=torch.float64, generator=None),
    "randn": lambda x: torch.randn((len(x), 5), dtype=torch.float64),
    "rand_like, turned": lambda x: torch.rand_like(x.t()).t(),
    "randn_like": lambda x: torch.randn_like(x, dtype=torch.float32).double(),
    "randint": lambda x: torch.randint(9, (5,)),
    "randint between": lambda x: torch.randint(-3, high=9, size=(5,)).double(),
    "randint_like": lambda x: torch.randint_like(x, 7),
    "randint_like between": lambda x: torch.randint_like(x, 2, 7, dtype=torch.int64),
    "randperm": lambda x: torch.randperm(5),
    "normal of numbers": lambda x: torch.normal(1.0, 2.0, size=(5,), dtype=torch.float64),
    "normal of means": lambda x: torch.normal(x.detach(), 0.5),
    "normal of deviations": lambda x: torch.normal(mean=0.5, std=P),
    "normal of both": lambda x: torch.normal(x.detach()[:, :1], x.detach().abs()),
    "bernoulli": lambda x: torch.bernoulli(x.detach().sigmoid()),
    "bernoulli of float32, turned": lambda x: x.detach().float().sigmoid().t().bernoulli().t(),
    "bernoulli_": filled(Tensor.bernoulli_, 0.3),
    "multinomial": lambda x: P[torch.multinomial(x.detach().softmax(-1), 1)],
    "multinomial of several": lambda x: P[torch.multinomial(x.detach().softmax(-1), num_samples=5)],
    "multinomial of one row": lambda x: P[P.multinomial(1, True)],
    "normal_": filled(Tensor.normal_, mean=1.0, std=2.0),
    "uniform_": filled(Tensor.uniform_, -1.0, 2.0),
    "exponential_": filled(Tensor.exponential_, 2.0),
    "cauchy_": filled(Tensor.cauchy_),
    "geometric_": filled(Tensor.geometric_, 0.4),
    "log_normal_": filled(Tensor.log_normal_),
    "random_": filled(Tensor.random_, 3, 9),
    "normal_ of no generator": filled(Tensor.normal_, 0.5, generator=None),
    "every other column": part_filled,
    "feature dropout": lambda x: nn.functional.dropout1d(torch.ones_like(x), 0.4),
    "attention with dropout": attended,
}


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.drop, self.draw = nn.Linear(3, 5), nn.Linear(5, 2), nn.Dropout(0.2), draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x))
        return self.last(self.drop(x + 0.1 * self.draw(x)))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_numbers_are_each_models_own_in_a_step_that_is_compiled_and_in_one_that_is_not(graphs, name, compile):
    models, g = models_of(lambda: Draws(DRAWS[name])), torch.Generator().manual_seed(1)
    data = [tuple(torch.randn(20, n, generator=g, dtype=torch.float64) for n in (3, 2)) for _ in range(STEPS)]
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **SETTINGS)
    history = fit(batch, optimizer, data, mse_loss, compile=compile, chunk_size=None, progress=False)
    assert history.how == ("compiled" if compile else "all models at once")
    assert_as_alone(batch, models, data, mse_loss, history.loss)


BY_KEYWORD: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(input=x.detach().sigmoid()),
    "bernoulli of a number": lambda x: x.detach().bernoulli(p=0.3),
    "multinomial": lambda x: P[torch.multinomial(input=x.detach().softmax(-1), num_samples=1)],
    "rand_like": lambda x: torch.rand_like(input=x),
    "a generator": lambda x: torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=x.dtype),
    "zeros for a gradient": lambda x: torch.bernoulli(x.sigmoid()),
}


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_calls_that_no_stream_draws_for_are_each_models_own(name):
    models, g = models_of(lambda: Draws(BY_KEYWORD[name])), torch.Generator().manual_seed(1)
    data = [tuple(torch.randn(20, n, generator=g, dtype=torch.float64) for n in (3, 2)) for _ in range(STEPS)]
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **SETTINGS)
    history = fit(batch, optimizer, data, mse_loss, chunk_size=None, progress=False)
    assert history.how == "all models at once"
    assert_as_alone(batch, models, data, mse_loss, history.loss)


class NoisyGradient(Identity):
    """The identity, with noise in its gradient, and a rule for vmap of its own."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.randn_like(gradient)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return NoisyGradient.apply(x), in_dims[0]


def test_numbers_drawn_in_a_backward_pass_are_not_compiled(graphs):
    batch = ModelBatch(models_of(lambda: Draws(NoisyGradient.apply)), seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **SETTINGS)
    stepper = Stepper(batch, optimizer, StepOptions(mse_loss, compile=True))
    with pytest.warns(UserWarning, match="backward pass|uncompiled") as said:
        stepper.step(torch.randn(20, 3).double(), torch.randn(20, 2).double())
    assert "uncompiled, because random numbers are drawn in a backward pass" in str(said[0].message)
    assert not graphs


# ------------------------------------------------------------------ what a graph takes for true


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.drop = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(self.words(x))))


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.out(self.norm(x)).chunk(2, -1)
        return Normal(mean, deviation.exp()).rsample()


class Policy(Gaussian):
    def forward(self, x: Tensor) -> Tensor:
        out = self.out(x)
        return out[:, :2] * torch.multinomial(out.detach().exp(), 1)


ROW = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BAD = {  # the model, good inputs, bad ones
    "an index too large": (Words, torch.tensor([0, 6, 2, 3]), torch.tensor([0, 7, 2, 3])),
    "a negative index": (Words, torch.tensor([0, 6, 2, 3]), torch.tensor([0, -1, 2, 3])),
    "a mean that is not a number": (Gaussian, ROW, ROW * torch.nan),
    "probabilities that are not": (Policy, ROW, ROW * torch.nan),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_alone_changes_nothing_and_the_next_step_goes_on_compiled(graphs, name):
    build, good, bad = BAD[name]
    models, y = models_of(build), torch.randn(len(good), 2).double()
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, **SETTINGS)
    stepper = Stepper(batch, optimizer, StepOptions(mse_loss, compile=True))
    with pytest.raises((IndexError, ValueError, RuntimeError)) as alone:
        copy.deepcopy(models[0])(bad)
    losses = [stepper.step(good, y)[0]]
    with pytest.raises(alone.type):
        stepper.step(bad, y)
    losses += [stepper.step(good, y)[0], stepper.step(good, y)[0]]
    assert (stepper.how, len(graphs)) == ("compiled", 1)
    assert_as_alone(batch, models, [(good, y)] * 3, mse_loss, torch.stack(losses))
