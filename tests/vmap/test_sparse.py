"""Graph networks on a sparse adjacency: an input, a table that all models share, or a buffer of each model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import SEEDS, M, assert_same_parameters, train_alone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mbkit import ModelBatch, OptimizerFactory, fit

N, RATE = 7, 0.1
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "spmm": torch.spmm,
    "sparse.mm": torch.sparse.mm,
}


class Graph(nn.Module):
    """Kipf and Welling's network of two layers."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.product = nn.Linear(3, 5).double(), nn.Linear(5, 2).double(), product
        self.adjacency: Tensor | None = None

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        edges = self.adjacency if adjacency is None else adjacency
        return self.product(edges, self.second(self.product(edges, self.first(x)).relu()))


def edges(layout: str) -> Tensor:
    dense = (torch.rand(N, N) < 0.4).double() * torch.rand(N, N).double() + torch.eye(N).double()
    return dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("chunk_size", [None, 2, 1])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("where", ["input coo", "input csr", "attribute", "buffer"])
def test_a_sparse_adjacency(where: str, product: str, chunk_size: int | None) -> None:
    models = [Graph(PRODUCTS[product]) for _ in range(M)]
    data = [(torch.randn(N, 3).double(), torch.randint(2, (N,))) for _ in range(3)]
    shared = edges(where.split()[-1] if " " in where else "coo")
    alone, given = copy.deepcopy(models), data
    if where == "buffer":  # other edges in each model
        for lone, model in zip(alone, models, strict=True):
            lone.adjacency = edges("coo")
            del model.adjacency
            model.register_buffer("adjacency", lone.adjacency.clone())
    else:
        for lone, model in zip(alone, models, strict=True):
            lone.adjacency = shared
            model.adjacency = shared if where == "attribute" else None
        given = [((x, shared), y) for x, y in data] if where != "attribute" else data
    batch = ModelBatch(models, seeds=SEEDS)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=RATE)
    fit(batch, optimizer, given, cross_entropy, chunk_size=chunk_size, progress=False)
    assert batch.model_by_model == set()
    train_alone(alone, data, loss_fn=cross_entropy, seeds=SEEDS, configs={"lr": RATE})
    assert_same_parameters(list(batch), alone, 1e-11)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_layout_that_cannot_be_copied_is_refused_by_name() -> None:
    models = [Graph(torch.matmul) for _ in range(2)]
    for model in models:
        model.adjacency = edges("csr")
    with pytest.raises(ValueError, match=r"keeps in 'adjacency' a tensor of layout torch.sparse_csr.*to_sparse_coo"):
        ModelBatch(models)
