"""Some models of a batch as a batch of their own, and several batches as one: all go on as they would have."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common.checks import model_numbers
from ..vmap import (
    HOOKS,
    OUTPUT,
    PerModel,
    PerModelValue,
    State,
    Streams,
    materialize,
    merge,
    models_with_gradient,
    note_models_with_gradient,
    stack_alike,
)  # fmt: skip
from .context import CallContext, context_of
from .stack import each_through_its_hooks, may_keep


class CanSelect:
    """The part of a ModelBatch that takes models out of batches and puts batches together."""

    def select(self, models: int | Iterable[int]) -> Any:
        """Return a new batch of some of the models, in the order given, which go on as they would have here.

        They have copies of all that is theirs: parameters and gradients, buffers, attributes that calls have kept,
        random streams, whether they are frozen, train or eval mode. Only a batch of one model may round otherwise. This
        batch stays as it is. Take the optimizer's share by `optimizer.select(models, batch)`.

        Args:
            models: a model's number, or several; negative numbers count from the end.

        Raises:
            TypeError: models that are not whole numbers.
            IndexError: there is no such model.
            ValueError: no model, or one twice; a loss function that keeps a state for each of the M models.

        Example:
            >>> from mbkit import ModelBatch
            >>> batch = ModelBatch([nn.Linear(2, 1) for _ in range(5)], seeds=range(5))
            >>> few = batch.select([3, -1])
            >>> few.seeds, torch.equal(few[0].weight, batch[3].weight)
            ([3, 4], True)
        """
        context = context_of(self)
        rows = model_numbers(models, context.num_models)
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(f"Expected at least one model, and none twice, got {rows}: name each of them once.")
        if context.kept is not None and context.kept.has_rows():
            told = "Expected a loss function and a forward that keep nothing outside of the models, got one that does"
            raise ValueError(f"{told}, and so cannot serve two batches: keep it in a buffer of the model.")
        selected = copy.deepcopy(self, _memo(context, rows))
        mine = context_of(selected)
        mine.num_models, mine.slow_losses = len(rows), set(context.slow_losses)
        for parameter, old in zip(mine.template.parameters(), context.template.parameters(), strict=True):
            for hook in (old._backward_hooks or {}).values():
                own = isinstance(hook, partial) and hook.func is each_through_its_hooks
                parameter.register_hook(partial(hook.func, [hook.args[0][m] for m in rows]) if own else hook)
        _carry_over(mine, [(context, rows)])
        return selected

    @classmethod
    def merge(cls, batches: Iterable[Any]) -> Any:
        """Return a new batch of the models of several batches, which go on as they would have in their own.

        Args:
            batches: ModelBatches of one architecture; each model's share of everything is copied as by `select`.

        Raises:
            ValueError: no batches; batches with another `shared_input`; models that are not alike, by the rules for a
                new batch.
            BatchingError: calls have kept values that have no common form, such as lists of two lengths.

        Example:
            >>> from mbkit import ModelBatch
            >>> first, second = (ModelBatch([nn.Linear(2, 1) for _ in range(3)]) for _ in range(2))
            >>> len(ModelBatch.merge([first.select(2), second]))
            4
        """
        batches = list(batches)
        sources = [(context_of(batch), list(range(len(batch)))) for batch in batches]
        if len({context.shared_input for context, _ in sources}) != 1:
            raise ValueError("Expected batches, all with the same shared_input, got none or others: merge those.")
        models = [model for batch in batches for model in batch]
        kept = _take_kept(sources, models)
        merged = cls(
            models,
            sources[0][0].shared_input,
            seeds=[seed for batch in batches for seed in batch.seeds],
            model_by_model=set().union(*(context.model_by_model for context, _ in sources)),
        )
        mine = context_of(merged)
        mine.folding = all(context.folding for context, _ in sources)
        each = [{key: values[m] for key, values in kept.items()} for m in range(len(models))]
        joined, columns = merge(each, State(), "" in mine.model_by_model)
        _, after, tensors = materialize(joined | {OUTPUT: None}, [stack_alike(column) for column in columns])
        for (path, _, name), value in after.items():
            vars(mine.template.get_submodule(path))[name] = value
        mine.attributes += tensors
        _carry_over(mine, sources)
        return merged


def _take_kept(sources: list[tuple[CallContext, list[int]]], models: list[nn.Module]) -> dict[Any, list[Any]]:
    """Take out of lone models what calls have kept for each of them, which need not be alike; return M values each."""
    keys: dict[Any, None] = {}
    for context, _ in sources:
        own = set(map(id, context.attributes))
        for key, value in State(context.template).items():
            if key[1] == "__dict__" and any(isinstance(v, PerModelValue) or id(v) in own for v in tree_leaves(value)):
                keys[key] = None
    kept = {}
    for key in keys:
        places = [vars(model.get_submodule(key[0])) for model in models]
        if all(key[2] in place for place in places):
            kept[key] = [place[key[2]] for place in places]
            for place in places:
                place[key[2]] = None
    return kept


def _memo(context: CallContext, rows: list[int]) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy`, by which it takes the chosen models' share of what it would copy."""
    template = context.template
    memo: dict[int, Any] = {id(context.streams): context.streams}  # made anew
    for tensor in (*template.parameters(), *template.buffers(), *context.attributes):
        stack = stack_alike([tensor.detach()[m] for m in rows])
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(stack, tensor.requires_grad) if is_parameter else stack
        memo[id(tensor)].requires_grad_(tensor.requires_grad and tensor.is_leaf)
    for module in template.modules():
        mine = vars(module)
        for hook in (hook for name in HOOKS for hook in mine[name].values()):
            holder = getattr(hook, "__self__", hook)
            if may_keep(holder):  # an object that watches the models goes on watching
                memo[id(hook)] = memo[id(holder)] = holder if holder is hook else hook
        for leaf in tree_leaves(list(mine.values())):
            if isinstance(leaf, PerModel | PerModelValue):
                memo[id(leaf)] = type(leaf)([leaf.values[m] for m in rows])
    return memo


def has_gradient(param: nn.Parameter, num_models: int) -> list[bool]:
    """Say for each model whether it has a gradient for a parameter."""
    models = None if param.grad is None else models_with_gradient(param.grad, num_models)
    return [param.grad is not None] * num_models if models is None else models.tolist()


def _carry_over(context: CallContext, sources: list[tuple[CallContext, list[int]]]) -> None:
    """Give models what they have, beside tensors and attributes, in their `sources`: contexts, and the numbers there.

    These are streams, gradients, the latest losses, and whether they are frozen.
    """
    origins = [(old, m) for old, rows in sources for m in rows]
    streams = context.streams = Streams([old.streams.seeds[m] for old, m in origins])
    states = {id(old): old.streams.state() for old, _ in sources}
    for row, (old, m) in enumerate(origins):
        for device, state in states[id(old)].items():
            streams.on(device)[row].set_state(state[m].cpu().clone())
    streams.from_python = any(old.streams.from_python for old, _ in sources) or None
    masks = [torch.zeros(len(rows)).bool() if old.frozen is None else old.frozen.cpu()[rows] for old, rows in sources]
    context.frozen = torch.cat(masks) if any(mask.any() for mask in masks) else None
    losses = [old.latest_losses[rows] for old, rows in sources if old.latest_losses is not None]
    context.latest_losses = torch.cat(losses) if len(losses) == len(sources) else None
    parameters = zip(*(old.template.parameters() for old, _ in sources), strict=True)
    for new, olds in zip(context.template.parameters(), parameters, strict=True):
        grads: list[Tensor] = []
        present: list[bool] = []
        for old, (source, rows) in zip(olds, sources, strict=True):
            whole = torch.zeros_like(old) if old.grad is None else old.grad
            has = has_gradient(old, source.num_models)
            present += [has[m] for m in rows]
            grads += [whole.detach()[m] for m in rows]
        if any(present):
            new.grad = stack_alike(grads)
            note_models_with_gradient(new.grad, present)
