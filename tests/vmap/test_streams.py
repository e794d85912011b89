"""Model m's stream draws what torch draws after torch.manual_seed(seeds[m])."""

from __future__ import annotations

import torch

from mbkit.vmap import Streams


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
