"""Each model of a batch ends by its own patience, in the state in which it ends alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import CONFIGS, SEEDS, M, assert_same_parameters, batched, classifiers, points
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mbkit.training import fit

EPOCHS, STEPS, PATIENCE = 30, 3, 2


def stopped_alone(model: nn.Module, m: int, pairs: list, held_out: tuple[Tensor, Tensor], optimizer_cls: Any) -> int:
    """Train a model by a loop as everybody writes it, and return the number of its epochs."""
    torch.manual_seed(SEEDS[m])
    optimizer, best, since = optimizer_cls(model.parameters(), **CONFIGS[m]), float("inf"), 0
    for epoch in range(EPOCHS):
        model.train()
        for x, y in pairs:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = cross_entropy(model.eval()(held_out[0]), held_out[1]).item()
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == PATIENCE:
            return epoch + 1
    return EPOCHS


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_callback_stops_each_model_by_its_own_patience_as_alone(optimizer_cls: Any) -> None:
    torch.set_default_dtype(torch.float64)
    models, pairs, [held_out] = classifiers(), points(STEPS), points(1)
    alone = copy.deepcopy(models)
    epochs = [stopped_alone(model, m, pairs, held_out, optimizer_cls) for m, model in enumerate(alone)]
    batch, optimizer = batched(models, optimizer_cls)
    best, since = torch.full((M,), torch.inf), torch.zeros(M, dtype=torch.int64)

    def callback(step: Any) -> bool:
        if (step.index + 1) % STEPS == 0:
            with torch.no_grad():
                losses = batch.compute_loss(batch.eval()(held_out[0]), held_out[1], cross_entropy, reduction="none")
            since.copy_(torch.where(losses < best, 0, since + 1))
            best.copy_(torch.minimum(best, losses))
            batch.freeze((since == PATIENCE).nonzero().flatten().tolist())
        return len(batch.frozen) < M

    history = fit(batch, optimizer, pairs, cross_entropy, EPOCHS, callback=callback)
    assert len(set(epochs)) > 1  # they do not stop together
    assert history.steps_done == [STEPS * count for count in epochs]
    assert_same_parameters(batch.models, alone)
