"""Where a module keeps tensors: those of M modules stacked into one, and one model's own taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..vmap import PerModel, PerModelValue, copy_module, memory_order, stack_alike

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def stack_models(models: Sequence[nn.Module], settings: dict[str, dict[str, list[Any]]]) -> Stacks:
    """Return the stacks of models and the settings that `check_models` returned."""
    stacks = Stacks(models[0], len(models), settings)
    stacks.write(models)
    return stacks.finish(models[0])


class Stacks:
    """The tensors of M models that are alike, stacked; the models come some after the others.

    A stack stands wherever its tensor stood, so that tied weights stay tied. A plain attribute that is one and the
    same tensor in all models stays shared.

    Args:
        first: model 0.
        num_models: M.
        settings: what differs between the models that have come so far; none of it is stacked.

    Attributes:
        template: a copy of model 0 that holds stacks `[M, ...]`, and the settings; after `finish`.
        attributes: those of the stacks that stand in plain attributes.
    """

    def __init__(self, first: nn.Module, num_models: int, settings: dict[str, dict[str, list[Any]]]) -> None:
        self.num_models, self.settings = num_models, settings
        self.attributes: list[Tensor] = []
        self._stacks: dict[tuple[str, str, str], _Stack] = {}  # by the module's path, the store, and the name there
        self._hooks: dict[tuple[str, str], list[list[Callable]]] = {}  # of each model
        self._gradient_hooks: dict[tuple[str, str, str], list[dict]] = {}
        buffers, known = {id(b) for b in first.buffers()}, set()
        for path, owner in first.named_modules():
            self._hooks |= {(path, kind): [] for kind in _FORWARD_HOOKS if getattr(owner, kind)}
            for kind in ("_parameters", "_buffers", "__dict__"):
                for name, tensor in getattr(owner, kind).items():
                    if isinstance(tensor, Tensor) and id(tensor) not in known:
                        known.add(id(tensor))
                        plain = kind == "__dict__" and id(tensor) not in buffers
                        self._stacks[path, kind, name] = _Stack(tensor, num_models, plain)

    def write(self, models: Sequence[nn.Module]) -> None:
        """Copy the next models' tensors."""
        sources = [dict(model.named_modules()) for model in models]
        for (path, kind), own in self._hooks.items():
            own += [list(getattr(modules[path], kind).values()) for modules in sources]
        for place, stack in self._stacks.items():
            path, kind, name = place
            if kind == "__dict__" and name in self.settings.get(path, ()):
                continue
            own = [getattr(modules[path], kind)[name] for modules in sources]
            if kind == "_parameters":
                self._gradient_hooks.setdefault(place, []).extend(p._backward_hooks or {} for p in own)
            stack.write(own)

    def finish(self, first: nn.Module) -> Stacks:
        """Make the template, of model 0 or of a copy of it that may hold other numbers."""
        modules = dict(first.named_modules())
        replaced: dict[int, Any] = {}  # deepcopy's memo: instead of copying model 0's tensor, take the stack
        for (path, kind), each in self._hooks.items():
            for hook, own in zip(getattr(modules[path], kind).values(), zip(*each, strict=True), strict=True):
                holders = [getattr(one, "__self__", one) for one in own]
                shared = all(holder is holders[0] for holder in holders)
                if may_keep(holders[0]):  # objects that watch a model, or one that watches all, go on watching
                    replaced[id(hook)] = hook if shared else PerModelValue(own)
                elif shared and not isinstance(holders[0], nn.Module):
                    replaced[id(holders[0])] = holders[0]
        for (path, kind, name), made in self._stacks.items():
            if made.table is not None or (kind == "__dict__" and name in self.settings.get(path, ())):
                continue
            tensor, stack = getattr(modules[path], kind)[name], made.whole()
            if kind == "_parameters":
                stack = nn.Parameter(stack, requires_grad=tensor.requires_grad)
                if any(self._gradient_hooks[path, kind, name]):
                    stack.register_hook(partial(each_through_its_hooks, self._gradient_hooks[path, kind, name]))
            replaced[id(tensor)] = stack
            if made.plain:
                self.attributes.append(stack.requires_grad_(tensor.requires_grad and tensor.is_leaf))
        self.template = copy.deepcopy(first, replaced)
        memos: list[dict[int, Any]] = [{} for _ in range(self.num_models)]  # what a model has twice stays one object
        for path, own in self.settings.items():
            for name, values in own.items():
                numbers = any(isinstance(value, float) for value in values)
                values = list(map(float, values)) if numbers else values
                copies = [copy.deepcopy(value, memo) for value, memo in zip(values, memos, strict=True)]
                vars(self.template.get_submodule(path))[name] = PerModel(copies) if numbers else PerModelValue(copies)
        return self


class _Stack:
    """M tensors, each with the strides that it has alone, copied into one as they come; see `stack_alike`.

    Attributes:
        plain: whether it is a plain attribute. table: the tensor, as long as all models have the very same in it.
    """

    def __init__(self, first: Tensor, num_models: int, plain: bool) -> None:
        self._num_models, self.plain, self.table = num_models, plain, first if plain and num_models > 1 else None
        self._written, self._memory = 0, None
        self._rows: list[Tensor] = []  # of a kind of tensor that cannot be copied into memory that is there already

    def write(self, tensors: Sequence[Tensor]) -> None:
        start, self._written = self._written, self._written + len(tensors)
        if self.table is not None:
            if all(tensor is self.table for tensor in tensors):
                return
            tensors, start, self.table = [self.table] * start + [*tensors], 0, None
        rows = [tensor.detach() for tensor in tensors]
        if start == 0 and rows[0].layout is torch.strided and type(rows[0]) is Tensor and not rows[0].is_quantized:
            self._order, self._inverse = memory_order(rows[0])
            self._memory = rows[0].new_empty(self._num_models, *(rows[0].shape[d] for d in self._order))
        if self._memory is None:
            self._rows += rows
        else:
            torch.stack([row.permute(self._order) for row in rows], out=self._memory[start : self._written])

    def whole(self) -> Tensor:
        if self._memory is None:
            return stack_alike(self._rows)
        return self._memory.permute(0, *(1 + d for d in self._inverse))


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
