"""Batches whose models are built straight into the stacks: those that lists of models make, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import NETS, SEEDS, B, Holds, M, close, hooked
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbkit.batch import build as room
from mbkit.batch.model_batch import ModelBatch

TABLE = torch.arange(3.0)
BACKBONE = nn.Linear(3, 3)


def drawn_settings() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(torch.rand(()).item()), nn.Linear(4, 2))


def drawn_config() -> nn.Module:
    return Holds(config=SimpleNamespace(rate=torch.rand(()).item(), size=3), table=TABLE, noise=torch.rand(2))


def permuted() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].weight.data = torch.randn(3, 4).t()
    return net


def watched() -> nn.Module:
    net = nn.Linear(3, 2)
    net.weight.register_hook(lambda gradient: gradient * 2)
    return net


def sparse() -> nn.Module:
    net = nn.Linear(3, 2)
    net.register_buffer("graph", torch.eye(2).to_sparse())
    return net


class Late(nn.Module):
    """A setting that begins to differ with the third model, and a table that is another one from there on."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.table = nn.Linear(3, 2), 1.0, TABLE
        type(self).count += 1
        if type(self).count % M == 3:
            self.scale, self.table = 0.5, TABLE * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.table) * self.scale


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    **NETS,
    "settings": drawn_settings,
    "config": drawn_config,
    "permuted": permuted,
    "watched": watched,
    "hooked": lambda: hooked(2),
    "sparse": sparse,
    "late": Late,
    "shared backbone": lambda: nn.Sequential(BACKBONE, nn.Linear(3, 2)),
    "lstm": lambda: nn.LSTM(3, 2, batch_first=True),
}


def listed(factory: Callable[[], nn.Module]) -> list[nn.Module]:
    models = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(factory())
    return models


@pytest.mark.parametrize("most", [1, 2, 32])
@pytest.mark.parametrize("name", FACTORIES)
def test_it_is_the_batch_of_a_list(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MOST", most)
    Late.count = 0
    expected, before = ModelBatch(listed(FACTORIES[name]), seeds=SEEDS), torch.get_rng_state()
    Late.count = 0
    batch = ModelBatch.build(FACTORIES[name], SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert batch.seeds == expected.seeds
    for one, other in (
        (batch.stacked_params, expected.stacked_params),
        (batch.stacked_buffers, expected.stacked_buffers),
    ):
        assert list(one) == list(other)
        for key, tensor in other.items():
            assert type(one[key]) is type(tensor)
            assert (one[key].requires_grad, one[key].layout) == (tensor.requires_grad, tensor.layout)
            if tensor.layout is torch.strided:
                assert one[key].stride() == tensor.stride()
            assert torch.equal(one[key].to_dense(), tensor.to_dense())
    x = torch.randn(B, 3)
    for got, mine in zip(batch, expected, strict=True):
        assert str(got) == str(mine)
        assert got.training is mine.training
        assert vars(got).keys() == vars(mine).keys()
    for _ in range(2):
        for each in (batch, expected):
            outputs = each(x)
            (outputs if isinstance(outputs, Tensor) else outputs[0]).square().sum().backward()
    for p, q in zip(batch.parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)


class Live(TorchDispatchMode):
    """Counts the bytes that operators have made and somebody still holds, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for known, size in self.held.values() if not known.expired()))
        return out


@pytest.mark.parametrize("factory", [lambda: nn.LSTM(200, 256), lambda: nn.Linear(600, 600)], ids=["lstm", "linear"])
def test_beside_the_stacks_there_is_one_model(factory: Callable[[], nn.Module]) -> None:
    one, models = sum(p.nbytes for p in factory().parameters()), 6
    assert one > room._MOST_BYTES
    with Live() as live:
        batch = ModelBatch.build(factory, range(models))
    assert models * one == sum(p.nbytes for p in batch.parameters())
    assert models * one < live.most <= (models + 1.3) * one
    with Live() as live:
        ModelBatch([factory() for _ in range(models)])
    assert live.most >= 2 * models * one  # what counts here is what a list of models takes


def test_what_factories_must_not_do() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="got the same object twice"):
        ModelBatch.build(lambda: net, range(3))
    with pytest.raises(TypeError, match=r"builds an nn\.Module, got int"):
        ModelBatch.build(lambda: 3, range(3))
    sizes, before = iter([2, 2, 3]), torch.get_rng_state()
    with pytest.raises(ValueError, match="Model 2 has 'weight' in another shape"):
        ModelBatch.build(lambda: nn.Linear(3, next(sizes)), range(3))
    assert torch.equal(torch.get_rng_state(), before)
    for seeds in (3, []):
        with pytest.raises(TypeError, match="Expected at least one seed"):
            ModelBatch.build(lambda: nn.Linear(3, 2), seeds)
    with pytest.raises(ValueError, match="Expected at least 0 as seed"):
        ModelBatch.build(lambda: nn.Linear(3, 2), [-1])
    with pytest.raises(ValueError, match="Expected a submodule's dotted path, got 'fc'"):
        ModelBatch.build(lambda: nn.Linear(3, 2), range(2), model_by_model=["fc"])
    assert ModelBatch.build(lambda: nn.Linear(3, 2), range(2), False).shared_input is False
