"""What diagnose measures with: distances, addresses, a few examples of a batch, models that draw nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only

from ..common.checks import memory_of

FEW = 16  # examples in an experiment's batch: a fault does not hide from them, and they are quick


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one shape hold the same number, or none of them holds one (NaN)."""
    return (a == b) | (a.isnan() & b.isnan())


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Return absolute differences: none between numbers that overflowed alike, endless where only one of them did."""
    return (a - b).abs().nan_to_num(nan=torch.inf).masked_fill(alike(a, b), 0.0)


def apart(a: Tensor | None, b: Tensor | None) -> float:
    """Return the length of the difference over that of the longer one: 0 where they are alike to the last bit.

    A NaN in the same place in both is alike; None counts as zeros.

    Example:
        >>> apart(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])), apart(None, torch.zeros(2))
        (0.5, 0.0)
    """
    a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
    if alike(a, b).all():
        return 0.0
    length = max(torch.linalg.vector_norm(a).item(), torch.linalg.vector_norm(b).item())
    ratio = torch.linalg.vector_norm(gap(a, b)).item() / length
    return ratio if ratio == ratio else torch.inf


def as_precision(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of the model in another precision, its complex numbers complex; None leaves it as it is."""
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _cast(tensor.data, dtype)
    return model


def few_examples(pair: Any, dim: int, dtype: torch.dtype | None) -> Any:
    """Return a batch's first examples, where all its tensors have one number of them, as `dtype`.

    Examples that are no numbers (NaN, or infinite) are left out where there are others, for they hide every fault.
    """
    leaves, rows = [leaf for leaf in tree_leaves(pair) if isinstance(leaf, Tensor)], None
    plain = all(leaf.layout is torch.strided and leaf.dim() > dim for leaf in leaves)
    if plain and len({leaf.shape[dim] for leaf in leaves}) == 1:
        finite = [leaf.isfinite().movedim(dim, 0).unsqueeze(-1).flatten(1).all(1) for leaf in leaves]
        rows = torch.stack(finite).all(0).nonzero().flatten()[:FEW]
        rows = rows if len(rows) else torch.arange(min(FEW, leaves[0].shape[dim]), device=rows.device)

    def cut(leaf: Tensor) -> Tensor:
        return _cast(leaf if rows is None else leaf.index_select(dim, rows), dtype)

    return tree_map_only(Tensor, cut, pair)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def shared_memory(values: Iterable[Mapping[str, Tensor]]) -> list[tuple[str, int, int]]:
    """Return where numbers of two models lie in the same memory: the tensor's name, and the models.

    Args:
        values: for each model its tensors.

    Example:
        >>> whole = torch.zeros(3)
        >>> shared_memory([{"a": whole[:2]}, {"a": whole[1:]}])
        [('a', 0, 1)]
    """
    named = ((m, *item) for m, own in enumerate(values) for item in own.items())
    every = [(m, name, t) for m, name, t in named if t.layout is torch.strided and t.numel()]
    if not every:
        return []
    addresses = torch.cat([_addresses(t) for *_, t in every])
    owners = torch.repeat_interleave(torch.tensor([t.numel() for *_, t in every]))
    addresses, order = addresses.sort(stable=True)
    pairs = torch.stack((owners[order][:-1], owners[order][1:]), 1)[addresses[:-1] == addresses[1:]]
    pairs = pairs.unique(dim=0).tolist()
    return [(every[a][1], *sorted((every[a][0], every[b][0]))) for a, b in pairs if every[a][0] != every[b][0]]


def _addresses(tensor: Tensor) -> Tensor:
    """Return the address of each number, on the CPU."""
    every = torch.arange(*memory_of(tensor), tensor.element_size())
    return every.as_strided(tensor.shape, tensor.stride()).flatten()


def quiet(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose layers draw nothing: dropout rates are 0, and RReLU has one slope."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.RReLU):
            module.lower = module.upper = (module.lower + module.upper) / 2
        elif isinstance(getattr(module, "dropout", None), float):  # attention and recurrent layers
            module.dropout = 0.0
    return model
