"""What a step must not hold to be compiled."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils._pytree import tree_leaves

from ..batch.context import context_of
from ..common.machine import free_memory
from ..optim.stacked import StackedOptimizer
from ..vmap import HOOKS, has_grad_hooks

_SHARE = 0.5  # of the free memory that a step may take, as for chunks


class CannotCompile(RuntimeError):
    """The step holds something that a graph of operators cannot hold."""


def check_step(batch: Any, optimizer: Any) -> None:
    """Raise CannotCompile at what may change from step to step."""
    if type(optimizer) is not StackedOptimizer:
        raise CannotCompile(f"{getattr(optimizer, 'optimizer_cls', type(optimizer)).__name__} has no stacked rule")
    if context_of(batch).frozen is not None:
        raise CannotCompile("a model is frozen")
    slow = sorted(path for path in batch.model_by_model if not path.endswith("()"))
    if slow:
        raise CannotCompile(f"{slow} run model by model")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise CannotCompile("the optimizer has hooks")


def check_module(template: nn.Module) -> None:
    """Raise CannotCompile at what a look at the module shows."""
    if any(p.is_complex() for p in template.parameters()):
        raise CannotCompile("a parameter is complex")
    if any(map(has_grad_hooks, template.parameters())):
        raise CannotCompile("a parameter has hooks")
    for path, module in template.named_modules():
        if any(vars(module)[hooks] for hooks in HOOKS):
            raise CannotCompile(f"'{path}' ({type(module).__name__}) has hooks")


def check_graph(graph: Graph) -> None:
    """Raise CannotCompile where a traced step draws random numbers, which are no model's own, or might not fit.

    It has no chunks. Inductor makes less of it than is traced, so this errs on the safe side.
    """
    draws = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    if any("attention" not in node.name for node in draws):  # which is tagged without dropout, too
        raise CannotCompile("random numbers are drawn in a backward pass")
    given, sizes, first, last = set(), {}, {}, {}
    device = None
    for i, node in enumerate(graph.nodes):
        for value in tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)]):
            if not isinstance(value, Tensor):
                continue
            storage, device = value.untyped_storage(), value.device
            if node.op == "placeholder":
                given.add(storage._cdata)
            sizes[storage._cdata] = storage.nbytes()
            first.setdefault(storage._cdata, i)
            last[storage._cdata] = i
    changes = [0] * (len(graph.nodes) + 1)
    for storage in sizes.keys() - given:
        changes[first[storage]] += sizes[storage]
        changes[last[storage] + 1] -= sizes[storage]
    most, room = max(accumulate(changes)), int(_SHARE * free_memory(device))
    if most > room:
        raise CannotCompile(f"it might take {most / 1e6:,.2f} MB at once, with {room / 1e6:,.2f} left")
