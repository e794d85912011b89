"""Models, data and the plainest training loop, for the tests of fit and fit_alone."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mbkit.batch.model_batch import ModelBatch
from mbkit.optim import OptimizerFactory

M, B, SEEDS, RATES = 4, 5, [11, 22, 33, 44], [0.1, 0.05, 0.2, 0.15]  # fewer go one by one
CONFIGS = [{"lr": lr} for lr in RATES]
SGD = torch.optim.SGD


def build(dropout=0.5):
    return [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)) for _ in range(M)]


def points(batches=4):
    return [(torch.randn(B, 4), torch.randint(3, (B,))) for _ in range(batches)]


def loader(**kwargs):
    data = TensorDataset(torch.randn(22, 4), torch.randint(3, (22,)))
    return DataLoader(data, batch_size=B, **({"shuffle": True} | kwargs))


def by_hand(models, epochs_of_pairs, optimizer_cls=SGD, schedule=None, every="epoch", max_norm=None):
    """Train copies of the models by the plainest loop; return them, their losses and their accuracies [steps, M]."""
    models, losses, hits = copy.deepcopy(models), [], []
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        optimizer = optimizer_cls(model.parameters(), lr=RATES[m])
        scheduler = schedule(optimizer) if schedule else None
        model.train()
        losses.append([])
        hits.append([])
        for pairs in epochs_of_pairs:
            for x, y in pairs:
                optimizer.zero_grad()
                out = model(x)
                loss = cross_entropy(out, y)
                loss.backward()
                if max_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                losses[m].append(loss.item())
                hits[m].append((out.argmax(1) == y).double().mean().item())
                if scheduler and every == "step":
                    scheduler.step()
            if scheduler and every == "epoch":
                scheduler.step()
    return models, torch.tensor(losses).T, torch.tensor(hits).T


def batched(models, optimizer_cls=SGD, **kwargs):
    batch = ModelBatch(models, seeds=SEEDS, **kwargs)
    return batch, OptimizerFactory(optimizer_cls).create_optimizer(batch, CONFIGS)


def assert_same_parameters(got, expected, atol=1e-10):
    for one, other in zip(got, expected, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=atol)
