"""Messages along edges: what takes, adds and reduces rows by a list of places does for M models what it does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import SEEDS, M, assert_same_parameters, train_alone
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from mbkit import ModelBatch, OptimizerFactory, fit

N, E, F = 5, 11, 3
SOURCE, TARGET = torch.tensor([0, 1, 2, 3, 4, 4, 2, 0, 1, 1, 3]), torch.tensor([1, 1, 0, 2, 3, 0, 2, 3, 3, 0, 1])
SPELLED_OUT = {torch.ops.aten.gather.default, torch.ops.aten.scatter_add.default, torch.ops.aten.scatter_add_.default}


def wide(index: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """Repeat a list of places for every number in a row, as graph libraries do."""
    return index.view([-1 if d == dim % like.dim() else 1 for d in range(like.dim())]).expand_as(like)


def put(name: str, *how: object, dim: int = 0, **kwargs: object) -> Callable[[Tensor], Tensor]:
    """Return what adds or reduces messages into zeros, which the nodes begin with."""

    def call(messages: Tensor) -> Tensor:
        shape = list(messages.shape)
        shape[dim] = N
        nodes = messages.new_zeros(shape)
        return getattr(nodes, name)(dim, wide(TARGET, messages, dim), messages, *how, **kwargs)

    return call


def attend(messages: Tensor) -> Tensor:
    """Weigh what comes into a node by a softmax, as GAT does."""
    score = messages.sum(-1)
    largest = score.new_zeros(N).scatter_reduce_(0, TARGET, score.detach(), "amax", include_self=False)
    weight = (score - largest.index_select(0, TARGET)).exp()
    total = weight.new_zeros(N).scatter_add_(0, TARGET, weight)
    weight = weight / total.index_select(0, TARGET)
    return put("scatter_add")(messages * weight.unsqueeze(-1))


def into_messages(messages: Tensor) -> Tensor:
    """Adds in place to what the layer before has made, and reads both."""
    nodes = messages[:N] * 2
    out = nodes.scatter_add_(0, wide(TARGET, messages), messages)
    return nodes + 3 * out


def in_part(messages: Tensor) -> Tensor:
    """Leaves the last messages, and the last number of each, out, for which torch has no gradient."""
    index = wide(TARGET, messages)[:-2, :-1]
    return messages[:N].scatter_add(0, index, messages.detach())


def by_number(messages: Tensor) -> Tensor:
    """Sends every number of a message to another node."""
    index = (TARGET.view(-1, 1) + torch.arange(F)) % N
    return messages.new_zeros(N, F).scatter_add_(0, index, messages)


def by_own(messages: Tensor) -> Tensor:
    """Sends messages where each model's own numbers say."""
    index = messages.detach().sum(-1).sort()[1] % N
    return messages.new_zeros(N, F).scatter_add_(0, wide(index, messages), messages)


def among_constants(messages: Tensor) -> Tensor:
    """Adds what all models share to their own, and their own to what they share."""
    index, shared = wide(TARGET, messages), torch.linspace(0, 1, E * F, dtype=messages.dtype).view(E, F)
    return messages[:N].scatter_add(0, index, shared) + shared[:N].scatter_add(0, index, messages)


TAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "index_select": lambda h: h.index_select(0, SOURCE),
    "torch.index_select, from the end": lambda h: torch.index_select(h, -2, SOURCE),
    "by name": lambda h: h.index_select(dim=0, index=SOURCE),
    "columns": lambda h: h.index_select(1, torch.tensor([2, 0, 1])).index_select(0, SOURCE),
    "of what is turned": lambda h: h.t().contiguous().t().index_select(0, SOURCE),
    "own places": lambda h: h.index_select(0, h.detach().sum(-1).sort()[1]).index_select(0, SOURCE),
    "indexing": lambda h: h[SOURCE],
    "gather": lambda h: h.gather(0, SOURCE.view(-1, 1).expand(E, F)),
    "a row replaced": lambda h: torch.select_scatter(h, h.sin()[0], 0, 1).index_select(0, SOURCE),
    "a column replaced": lambda h: h.select_scatter(src=h[:, 0] * 2, dim=-1, index=1).index_select(0, SOURCE),
    "replaced by what all share": lambda h: h.select_scatter(torch.arange(3.0).double(), 0, 2)[SOURCE],
    "replaced in what all share": lambda h: torch.eye(N, F).double().select_scatter(h[1], 0, 2)[SOURCE] + h[SOURCE],
    "edited afterwards": lambda h: (given := h * 2).index_select(0, SOURCE) + given.sin_()[0],
}
PUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter_add_": put("scatter_add_"),
    "scatter_add": put("scatter_add"),
    "from the end": put("scatter_add_", dim=-2),
    "side by side": lambda messages: put("scatter_add_", dim=1)(torch.stack([messages, messages.sin()])).sum(0),
    "by name": lambda h: h.new_zeros(N, F).scatter_add_(dim=0, index=wide(TARGET, h), src=h),
    "by names": lambda h: torch.scatter_add(input=h.new_zeros(N, F), dim=0, index=wide(TARGET, h), src=h),
    "a maximum by name": lambda h: h[:N].scatter_reduce(dim=0, index=wide(TARGET, h), src=h, reduce="amax"),
    "index_add_": lambda messages: messages.new_zeros(N, F).index_add_(0, TARGET, messages),
    "into messages": into_messages,
    "in part": in_part,
    "by number": by_number,
    "by own": by_own,
    "among constants": among_constants,
    "attention": attend,
    **{
        f"{reduce}, {'with' if own else 'without'} self": put("scatter_reduce_", reduce, include_self=own)
        for reduce in ("sum", "mean", "amax", "amin", "prod")
        for own in (True, False)
    },
    "a new maximum": put("scatter_reduce", "amax"),
    "maxima side by side": lambda messages: put("scatter_reduce", "amax", dim=1)(messages.expand(2, E, F)).sum(0),
    "maxima of what is turned": lambda messages: (
        messages.new_zeros(F, N).t().scatter_reduce_(0, wide(TARGET, messages), messages, "amax")
    ),
}


class Graph(nn.Module):
    """Two layers, with messages between them; on request its second layer's own are those of each model."""

    def __init__(self, take: Callable[[Tensor], Tensor], put: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.take, self.put = nn.Linear(4, F), nn.Linear(F, 2), take, put

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.put(self.take(self.first(x).tanh())))


def train(take: str, put: str, chunk_size: int | None = None, compile: bool = False) -> None:
    models = [Graph(TAKES[take], PUTS[put]).double() for _ in range(M)]
    data = [(torch.randn(N, 4).double(), torch.randn(N, 2).double()) for _ in range(3)]
    alone = copy.deepcopy(models)
    train_alone(alone, data, seeds=SEEDS, configs={"lr": 0.1})
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    fit(batch, optimizer, data, mse_loss, chunk_size=chunk_size, compile=compile, progress=False)
    assert batch.model_by_model == set()
    assert_same_parameters(list(batch), alone, 1e-11)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("take", TAKES)
def test_rows_are_taken(take: str, chunk_size: int | None) -> None:
    train(take, "scatter_add_", chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("put", PUTS)
def test_rows_are_put(put: str, chunk_size: int | None) -> None:
    train("index_select", put, chunk_size)


@pytest.mark.parametrize("put", ["scatter_add_", "attention", "amax, without self"])
def test_in_a_traced_step(put: str, graphs: list) -> None:
    train("index_select", put, compile=True)
    assert len(graphs) == 1


class Watched(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("take", ["index_select", "by name"])
@pytest.mark.parametrize("put", ["scatter_add_", "by name", "by names"])
def test_no_list_is_spelled_out(take: str, put: str) -> None:
    models = [Graph(TAKES[take], PUTS[put]) for _ in range(M)]
    batch = ModelBatch(models)
    with Watched() as watched:
        batch(torch.randn(N, 4)).sum().backward()
    assert torch.ops.aten.index_select.default in watched.seen
    assert not watched.seen & SPELLED_OUT


BAD = {
    "a place too many": lambda h: h.index_select(0, SOURCE + 1),
    "a place before the first": lambda h: h.index_select(0, SOURCE - 1),
    "no such dimension": lambda h: h.index_select(2, SOURCE),
    "a number's dimension": lambda h: h.sum().index_select(1, SOURCE),
    "added beyond": lambda h: h.new_zeros(N - 2, F).scatter_add_(0, wide(TARGET, h[SOURCE]), h[SOURCE]),
    "added before": lambda h: h.new_zeros(N, F).scatter_add_(0, wide(TARGET - 1, h[SOURCE]), h[SOURCE]),
    "added nowhere": lambda h: h.new_zeros(N, F).scatter_add_(2, wide(TARGET, h[SOURCE]), h[SOURCE]),
    "reduced beyond": lambda h: h.new_zeros(N - 2, F).scatter_reduce_(0, wide(TARGET, h[SOURCE]), h[SOURCE], "amax"),
    "reduced before": lambda h: h.new_zeros(N, F).scatter_reduce_(0, wide(TARGET - 1, h[SOURCE]), h[SOURCE], "amax"),
    "a row too long": lambda h: h.new_zeros(N, F - 1).scatter_add_(0, wide(TARGET, h[SOURCE]), h[SOURCE]),
    "no tensor": lambda h: h.new_zeros(N, F).scatter_add_(0, wide(TARGET, h[SOURCE]), 1.0),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_list_is_refused_as_alone(name: str) -> None:
    """Never are the next model's rows read or written, which lie behind one's own."""
    models = [Graph(BAD[name], lambda h: h) for _ in range(M)]
    with pytest.raises((IndexError, RuntimeError, TypeError)) as alone:
        models[0](torch.randn(N, 4))
    with pytest.raises(alone.type):
        ModelBatch(models)(torch.randn(N, 4))


@pytest.mark.parametrize("edges", [0, 1])
def test_hardly_an_edge(edges: int) -> None:
    def call(h: Tensor) -> Tensor:
        messages = h.index_select(0, SOURCE[:edges])
        index = TARGET[:edges].view(-1, 1).expand(edges, F)
        largest = h.scatter_reduce(0, index, messages, "amax")
        return h.new_zeros(N, F).scatter_add_(0, index, messages) + largest

    models = [Graph(call, lambda h: h).double() for _ in range(M)]
    x = torch.randn(N, 4).double()
    for got, model in zip(ModelBatch(models)(x), models, strict=True):
        torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)
