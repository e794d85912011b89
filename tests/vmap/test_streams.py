"""Model m's stream draws what torch draws after torch.manual_seed(seeds[m])."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from oracle import SEEDS, M, assert_same_parameters, train_alone
from torch import Tensor, nn
from torch.nn import functional as F

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.vmap import Streams
from mbkit.vmap.default_generator import DEFAULT


def test_masks_by_a_kernel_that_knows_the_default_generator_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_generators", {None: torch.default_generator})  # a CPU's, for a GPU's
    streams, like, rates = Streams([3, 4, 5]), torch.empty(5, 7), [0.5, 0.2, 0.0]
    torch.manual_seed(9)
    drawn = [streams.dropout_masks(like, rates, fused=True) for _ in range(2)]
    after = torch.rand(3)
    for m, rate in enumerate(rates):
        torch.manual_seed(streams.seeds[m])
        for masks in drawn:
            assert torch.equal(masks[m], torch.dropout(torch.ones(5, 7), rate, True))
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(3))  # the default generator stands where it stood


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return F.dropout(x, 0.5)


def seeded_for_a_while(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        return F.dropout(x, 0.5)


def seeded_itself(x: Tensor) -> Tensor:
    torch.default_generator.manual_seed(3)
    return F.dropout(x, 0.5)


def drawn_twice(x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    once = F.dropout(x, 0.5)
    torch.set_rng_state(state)
    return once * F.dropout(x, 0.5)


def put_back(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        once = F.dropout(x, 0.5)
    return once * F.dropout(x, 0.5)


def read(x: Tensor) -> Tensor:
    return x * (torch.initial_seed() % 7)


class Seeding(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(3, 8), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer(x))


@pytest.mark.filterwarnings("ignore:.* runs model by model", "ignore:The loss runs", "ignore:compile=True")
@pytest.mark.parametrize(
    "road", [{"chunk_size": None}, {"chunk_size": 2}, {"chunk_size": 1}, {"compile": True}], ids=str
)
@pytest.mark.parametrize("where", ["layer", "loss"])
@pytest.mark.parametrize("call", [seeded, seeded_for_a_while, seeded_itself, drawn_twice, put_back, read])
def test_what_forward_does_to_the_default_generator(call: Callable, where: str, road: dict) -> None:
    """The layer, or the loss, runs in turn; what draws after it goes on from where it has left the model's stream."""

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(call(out) if where == "loss" else out, y)

    def layer() -> nn.Module:
        return Seeding(call) if where == "layer" else nn.Linear(3, 8)

    models = [nn.Sequential(nn.Dropout(0.2), layer(), nn.Dropout(0.3), nn.Linear(8, 2)).double() for _ in range(M)]
    alone = copy.deepcopy(models)
    data = [(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(3)]
    train_alone(alone, data, loss_fn=loss_fn, seeds=SEEDS, configs={"lr": 0.1})
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    fit(batch, optimizer, data, loss_fn, progress=False, **road)
    assert_same_parameters(list(batch), alone, 1e-11)
    assert torch.default_generator is torch.random.default_generator is DEFAULT


def test_other_threads_may_use_the_default_generator_meanwhile() -> None:
    seen = []

    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            other = threading.Thread(target=lambda: seen.append(torch.initial_seed()))
            other.start()
            other.join()
            return super().forward(x)

    ModelBatch([Slow(3, 2) for _ in range(M)])(torch.randn(4, 3))
    assert len(seen) == 1
