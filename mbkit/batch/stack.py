"""Where a module keeps tensors: those of M modules stacked into one, and one model's own taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..vmap import PerModel, PerModelValue, copy_module, stack_alike

__all__ = ["each_through_its_hooks", "may_keep", "set_memory_format", "stack_models", "unstack_model"]


def stack_models(
    models: Sequence[nn.Module], settings: dict[str, dict[str, list[Any]]]
) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy of model 0 that holds stacked tensors `[M, ...]`, and those among them that are plain attributes.

    A stack stands wherever its tensor stood, so that tied weights stay tied. A plain attribute that is one and the
    same tensor in all models stays shared.

    Args:
        models, settings: what `check_models` returned: M modules that are alike but for these settings.
    """
    sources = [dict(model.named_modules()) for model in models]
    buffers = {id(b) for b in models[0].buffers()}
    replaced: dict[int, Any] = {}  # deepcopy's memo: instead of copying model 0's tensor, take the stack
    attributes: list[Tensor] = []
    for path in sources[0]:
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for own in zip(*(getattr(modules[path], kind).values() for modules in sources), strict=True):
                holders = [getattr(hook, "__self__", hook) for hook in own]
                shared = all(holder is holders[0] for holder in holders)
                if may_keep(holders[0]):  # objects that watch a model, or one that watches all, go on watching
                    replaced[id(own[0])] = own[0] if shared else PerModelValue(own)
                elif shared and not isinstance(holders[0], nn.Module):
                    replaced[id(holders[0])] = holders[0]
    for path, owner in models[0].named_modules():
        for kind in ("_parameters", "_buffers", "__dict__"):
            for name, tensor in getattr(owner, kind).items():
                differs = kind == "__dict__" and name in settings.get(path, ())
                if not isinstance(tensor, Tensor) or id(tensor) in replaced or differs:
                    continue
                own = [getattr(modules[path], kind)[name] for modules in sources]
                plain = kind == "__dict__" and id(tensor) not in buffers
                if plain and len(own) > 1 and all(t is tensor for t in own):
                    continue  # a table that all models share already
                stack = stack_alike([t.detach() for t in own])
                if kind == "_parameters":
                    stack = nn.Parameter(stack, requires_grad=tensor.requires_grad)
                    hooks = [getattr(modules[path], kind)[name]._backward_hooks or {} for modules in sources]
                    if any(hooks):
                        stack.register_hook(partial(each_through_its_hooks, hooks))
                replaced[id(tensor)] = stack
                if plain:
                    attributes.append(stack.requires_grad_(tensor.requires_grad and tensor.is_leaf))
    template = copy.deepcopy(models[0], replaced)
    memos: list[dict[int, Any]] = [{} for _ in models]  # what one model has in several places stays one object
    for path, own in settings.items():
        for name, values in own.items():
            numbers = all(isinstance(value, float) for value in values)
            copies = [copy.deepcopy(value, memo) for value, memo in zip(values, memos, strict=True)]
            vars(template.get_submodule(path))[name] = PerModel(copies) if numbers else PerModelValue(copies)
    return template, attributes


def may_keep(holder: Any) -> bool:
    """Say whether a hook, or what it is a method of, is an object of the user's, which may keep what it sees."""
    of_torch = type(holder).__module__.startswith("torch.")
    return not of_torch and not isinstance(holder, (nn.Module, FunctionType, partial, ModuleType))


def each_through_its_hooks(hooks: Sequence[dict[int, Callable]], gradient: Tensor) -> Tensor:
    """Let each model's own hooks see its row of the gradient; return what they make of it."""
    rows = []
    for own, row in zip(hooks, gradient, strict=True):
        for hook in own.values():
            changed = hook(row)
            row = row if changed is None else changed
        rows.append(row)
    return torch.stack(rows)


def unstack_model(template: nn.Module, attributes: Sequence[Tensor], m: int) -> nn.Module:
    """Return a copy of the template that holds model m's slices, as tensors of its own."""
    own: dict[int, Any] = {id(t): t.detach()[m].clone() for t in (*template.buffers(), *attributes)}
    for p in template.parameters():
        own[id(p)] = nn.Parameter(p.detach()[m].clone(), requires_grad=p.requires_grad)
    lone = copy_module(template, own, m, alone=True)
    lone = copy.deepcopy(lone)
    for mine, stacked in zip(lone.parameters(), template.parameters(), strict=True):
        for hook in (stacked._backward_hooks or {}).values():
            if isinstance(hook, partial) and hook.func is each_through_its_hooks:
                for own in hook.args[0][m].values():
                    mine.register_hook(own)
    return lone


def set_memory_format(template: nn.Module, memory_format: torch.memory_format) -> None:
    """Give each model's tensors the memory format that `nn.Module.to` gives them when it is alone."""
    for tensor in (*template.parameters(), *template.buffers()):
        if tensor.dim() in (5, 6):  # 4 and 5 without the models' dimension
            tensor.data = stack_alike([row.to(memory_format=memory_format) for row in tensor.data])
