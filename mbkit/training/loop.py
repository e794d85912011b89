"""What both training loops share: checks, the walk through the batches, and the schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map

from ..batch.context import context_of
from ..batch.targets import TargetForms, targets_at
from ..common.checks import open_mappings, whole_number
from ..common.objects import map_tensors, tensors_of

Pairs = Iterable[Any]  # (inputs, targets), or whatever `split` takes apart
_TARGETS = ("labels", "label", "targets", "target", "y")


def check_run(batches: Any, loss_fn: Any, epochs: Any, scheduler_every: str) -> None:
    """Refuse what no loop can run, before anything is trained.

    Args:
        batches: what is to be walked through.
        loss_fn: a callable.
        epochs: how many walks, a whole number, 1 or more.
        scheduler_every: "epoch" or "step".

    Raises:
        TypeError, ValueError: as the text says.
    """
    if not callable(loss_fn):
        raise TypeError(f"Expected loss_fn(outputs, targets), got {loss_fn!r}: pass e.g. nn.functional.cross_entropy.")
    whole_number(epochs, "epochs")
    if scheduler_every not in ("epoch", "step"):
        raise ValueError(f"Expected scheduler_every 'epoch' or 'step', got {scheduler_every!r}: choose one of them.")
    check_batches(batches, epochs)


def make_schedule(scheduler: Any, optimizer: Any) -> Any:
    """Return None, or the lr scheduler that the callable `scheduler` makes from `optimizer`.

    Raises:
        TypeError: no callable, or one that makes no scheduler; ReduceLROnPlateau, whose step needs a measurement.
    """
    if scheduler is None:
        return None
    made = scheduler(optimizer) if callable(scheduler) else scheduler
    if made is scheduler or not callable(getattr(made, "step", None)):
        told = f"Expected a callable that makes an lr scheduler from an optimizer, got {made!r}"
        raise TypeError(f"{told}: pass e.g. lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1).")
    return check_schedule(made)


def check_schedule(schedule: Any) -> Any:
    """Return `schedule`, unless its step needs a number that only the user can choose."""
    if any(isinstance(one, ReduceLROnPlateau) for one in (schedule if isinstance(schedule, list) else [schedule])):
        told = "Expected a scheduler that steps by itself, got ReduceLROnPlateau: call its step in a callback. For a"
        told += " batch make schedulers = OptimizerFactory.create_lr_scheduler(optimizer, ReduceLROnPlateau, {...})"
        raise TypeError(f"{told}, one per model, and call schedulers.step(losses).")
    return schedule


def check_batches(batches: Any, walks: int) -> None:
    """Refuse what cannot be walked through `walks` times.

    Raises:
        TypeError: not an iterable, or one that can be walked through only once where more is needed.
    """
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        told = f"Expected batches as an iterable of (inputs, targets), got {type(batches).__name__}"
        raise TypeError(f"{told}: pass a DataLoader, a Batches or a list of pairs.")
    # An iterator that knows its length is most likely a hand-written loader that starts again in __iter__.
    if walks > 1 and isinstance(batches, Iterator) and not hasattr(batches, "__len__"):
        told = f"Expected batches that can be walked through {walks} times, got a {type(batches).__name__}"
        raise TypeError(f"{told}, which is used up after once: pass a DataLoader, or list(batches).")


def walk(batches: Pairs, epoch: int, model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield one epoch's (inputs, targets) with their tensors on the model's device.

    Args:
        batches: an iterable of what `split` takes apart; where it, its `sampler` or its `batch_sampler` has
            set_epoch(epoch), as a DistributedSampler has, that is called first.
        epoch: the epoch's number, from 0.
        model: one of the models, or a batch of them.

    Raises:
        TypeError: an item of which it cannot be told what the targets are.
        ValueError: no batch at all.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(tree: Any) -> Any:  # a PackedSequence is no tensor, but it can be moved
        open_mappings(tree)
        return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if hasattr(leaf, "to") else leaf, tree)

    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    shuffling = {id(part): part for part in (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))}
    for part in shuffling.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
    empty = not getattr(batches, "resumed", False)  # after a run was saved with the epoch's last batch
    for item in batches:
        empty = False
        yield split(move(item), model)
    if empty:
        told = f"Expected at least one batch in epoch {epoch}, got none: pass a list if an iterator is used up"
        raise ValueError(f"{told}, or a smaller batch size where drop_last=True drops a set smaller than a batch.")


def split(batch: Any, model: nn.Module) -> tuple[Any, Any]:
    """Return a batch's inputs and its targets.

    A tuple or list ends with the targets; where several inputs are before them, these are the model's arguments. Of a
    dict, or another mapping, the targets are what is called labels, label, targets, target or y. The rest are the
    model's arguments by their names, and so are the targets where the model takes them itself, as Hugging Face's
    models do. An object with an attribute of such a name, a graph say, is the input as a whole.

    Args:
        batch: what one step gets.
        model: one of the models, or a batch of them, of which the arguments' names are read.

    Raises:
        TypeError: none of these.

    Example:
        >>> split((1, 2, 3), nn.Identity()), split({"input": 1, "label": 2}, nn.Identity())
        (((1, 2), 3), ({'input': 1}, 2))
    """
    several = type(batch) in (tuple, list) and len(batch) > 2
    if several or (isinstance(batch, (tuple, list)) and len(batch) == 2):
        *inputs, targets = batch
        return tuple(inputs) if several else inputs[0], targets
    has = batch.__contains__ if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None) is not None
    names = [name for name in _TARGETS if has(name)]
    if len(names) == 1 and not isinstance(batch, Mapping):
        return batch, getattr(batch, names[0])
    if len(names) == 1:
        forward = (context_of(model).template if hasattr(model, "stacked_params") else model).forward
        taken = inspect.signature(forward).parameters
        is_input = names[0] in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
        return {name: value for name, value in batch.items() if is_input or name != names[0]}, batch[names[0]]
    got = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    held = f" with {' and '.join(names)}" if names else f" of {', '.join(batch)}" if isinstance(batch, Mapping) else ""
    told = f"Expected each batch to be a pair (inputs, targets), got {got}{held}: give several inputs as"
    raise TypeError(f"{told} (input, another, targets), or in a dict with one of {', '.join(_TARGETS)} as the targets.")


def rounds(
    batches: Pairs,
    epochs: Iterable[int],
    model: nn.Module,
    every: str,
    schedules: Callable[[], Iterable[Any]],
    at_end: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any, Any, bool]]:
    """Walk through the batches epoch after epoch; yield (epoch, inputs, targets, whether schedulers step after them).

    Where the batches don't know their number, a scheduler's step of an epoch is made here, once the epoch is over.

    Args:
        batches, model: as for `walk`. epochs: the epochs' numbers.
        every: "epoch" or "step", the schedulers' rhythm.
        schedules: returns the schedulers of the models that still train.
        at_end: called when an epoch is over and its schedulers' steps are made.

    Raises:
        ValueError: more batches than their length says, where a scheduler goes by it.
    """
    for epoch in epochs:
        count, done = count_steps(batches, 1), 0
        for x, y in walk(batches, epoch, model):
            done += 1
            yield epoch, x, y, every == "step" or done == count
        due = list(schedules()) if every == "epoch" and done != count else []
        if due and count is not None and done > count:
            told = f"Expected {count} batches in epoch {epoch}, as len(batches) says, got {done}"
            raise ValueError(f"{told}: correct the length, which says when the scheduler's step of an epoch is due.")
        for schedule in due:
            schedule.step()
        if at_end is not None:
            at_end()


def goes_on(answer: Any) -> bool:
    """Say whether training goes on after a callback's answer: unless it is False, also as torch's or NumPy's False.

    Raises:
        TypeError: several truth values: it is not clear whether all or any of them are meant.

    Example:
        >>> goes_on(None), goes_on(torch.tensor(1.0) > 2)
        (True, False)
    """
    if str(getattr(answer, "dtype", "")) not in ("bool", "torch.bool"):
        return answer is not False
    if answer.ndim > 0:
        told = f"Expected a callback to return True, False or None, got {list(answer.shape)} truth values"
        raise TypeError(f"{told}: return (...).all() or (...).any().")
    return bool(answer)


def call(model: Any, inputs: Any) -> Any:
    """Return model(inputs), with a tuple or list spread over its arguments and a dict over their names."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple, dict]:
    """Return the arguments that `call` gives a model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if type(inputs) in (tuple, list):  # a PackedSequence is a tuple too, and one input
        return tuple(inputs), {}
    return (inputs,), {}


def first_tensor(tree: Any) -> Tensor | None:
    """Return the first tensor in a nested value, or None."""
    return next(iter(tensors_of(tree)), None)


def part(tree: Any, m: int) -> Any:
    """Return `tree` with model m's slice of every tensor in it."""
    return map_tensors(lambda tensor: tensor[m], tree)


def detach(tree: Any) -> Any:
    """Return `tree` with every tensor in it cut off from its graph."""
    return map_tensors(Tensor.detach, tree)


def own_targets(targets: Any, outputs: Any, m: int, num_models: int, forms: TargetForms) -> Any:
    """Return model m's targets, by the rule of a batch of M models: those for all, or its own out of [M, B, ...].

    Args:
        targets: nested tensors. outputs: what model m has returned for them.
        forms: which of the two forms the targets of this run have.

    Raises:
        ValueError: the shapes fit neither form, or both.
    """
    return targets_at(targets, forms.of(targets, stacked_shape(outputs, num_models), num_models), m)


def stacked_shape(outputs: Any, num_models: int) -> torch.Size:
    """Return the shape [M, B, ...] that M models' first outputs would have."""
    first = first_tensor(outputs)
    return torch.Size((num_models, *(() if first is None else first.shape)))


def count_steps(batches: Any, walks: int) -> int | None:
    """Return the number of batches in `walks` walks, or None where the batches don't know their number."""
    try:
        return walks * len(batches)
    except TypeError:  # no __len__, or a DataLoader over an IterableDataset
        return None
