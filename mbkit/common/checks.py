"""Checks that several rooms share: of models, inputs, outputs, a value for all or one per model; a guess at a name."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_unflatten

from .objects import tensors_of

_MAX_SEED = 2**63 - 1


def list_of_models(models: Any) -> list[nn.Module]:
    """Return `models` as a list of modules; one module is refused, though a Sequential can be walked through.

    Raises:
        TypeError: something that is not a module, or not a list of them.
        ValueError: no models.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise TypeError(f"Expected a list of models, got one {type(models).__name__}: pass [model_0, model_1, …].")
    if not isinstance(models, Iterable):
        raise TypeError(f"Expected a list of models, got {models!r}: pass [model_0, model_1, …].")
    models = list(models)
    if not models:
        raise ValueError("Expected at least one model, got an empty list: pass [model_0, model_1, …].")
    for m, one in enumerate(models):
        if not isinstance(one, nn.Module):
            raise TypeError(f"Expected nn.Modules, got {type(one).__name__} as model {m}: pass the models themselves.")
    return models


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """Return `value`, or refuse it as no whole number (TypeError) or too small a one (ValueError).

    Example:
        >>> whole_number(0, "epochs")
        Traceback (most recent call last):
        ValueError: Expected at least 1 as epochs, got 0: pass 1 or more.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected a whole number as {name}, got {value!r}: pass {least} or more.")
    if value < least:
        raise ValueError(f"Expected at least {least} as {name}, got {value}: pass {least} or more.")
    return value


def model_numbers(models: Any, num_models: int) -> list[int]:
    """Return the numbers of some of M models as a list from 0 on; -1 is the last model.

    Raises:
        TypeError: something that is not a whole number.
        IndexError: there is no such model.

    Example:
        >>> model_numbers([2, -1], 4)
        [2, 3]
    """
    several = isinstance(models, Iterable) and not isinstance(models, str) and getattr(models, "ndim", 1)
    numbers = list(models) if several else [models]
    for m in numbers:
        if isinstance(m, bool) or not hasattr(m, "__index__"):
            raise TypeError(f"Expected a model's number from 0 to {num_models - 1}, got {m!r}.")
        if not -num_models <= m < num_models:
            raise IndexError(f"Expected a model's number from 0 to {num_models - 1}, got {m}.")
    return [operator.index(m) % num_models for m in numbers]


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a strided tensor's first byte, and the one after its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


def per_model(value: Any, num_models: int, name: str) -> list[Any]:
    """Return `value` as a list with one entry for each of the M models.

    Args:
        value: one value for all models, or a list, range, 1-D array or 1-D tensor of M values. A tuple
            counts as *one* value, because `betas=(0.9, 0.999)` is one hyperparameter.
        num_models: M.
        name: what the values are, in the plural, for the error message.

    Returns:
        A list of M values; tensors and arrays become plain Python numbers.

    Raises:
        ValueError: a list of another length than M.

    Example:
        >>> per_model(0.1, 3, "learning rates")
        [0.1, 0.1, 0.1]
        >>> per_model([1, 2], 3, "learning rates")
        Traceback (most recent call last):
        ValueError: Expected 3 learning rates (one per model), got 2: pass one value for all models or a list of 3.
    """
    if hasattr(value, "tolist"):  # torch and numpy, scalars included
        value = value.tolist()
    if isinstance(value, range):
        value = list(value)
    if not isinstance(value, list):
        return [value] * num_models
    if len(value) != num_models:
        told = f"Expected {num_models} {name} (one per model), got {len(value)}"
        raise ValueError(f"{told}: pass one value for all models or a list of {num_models}.")
    return list(value)


def check_seeds(seeds: Sequence[int] | None, num_models: int) -> list[int]:
    """Return one seed per model, drawing them from torch's default generator where none are given.

    Args:
        seeds: M integers from 0 to 2**63 - 1, or None.
        num_models: M.

    Returns:
        A list of M integers.

    Raises:
        TypeError: something that is not a whole number, or one number where M are needed.
        ValueError: another count than M, or a number that `torch.manual_seed` does not take.

    Example:
        >>> check_seeds(range(3), 3)
        [0, 1, 2]
    """
    if seeds is None:
        return torch.randint(_MAX_SEED, (num_models,), device="cpu").tolist()
    if hasattr(seeds, "tolist"):
        seeds = seeds.tolist()
    if not isinstance(seeds, Iterable) or isinstance(seeds, (str, bytes)):
        # One seed for all would give every model the same dropout masks: legal, but then it has to be said.
        raise TypeError(f"Expected {num_models} seeds (one per model), got {seeds!r}: pass a list of {num_models}.")
    seeds = [seed.item() if hasattr(seed, "item") else seed for seed in seeds]  # numpy's and torch's numbers
    for seed in seeds:
        if whole_number(seed, "seed", least=0) > _MAX_SEED:
            raise ValueError(f"Expected seeds from 0 to 2**63 - 1, got {seed}: choose another seed.")
    if len(seeds) != num_models:
        told = f"Expected {num_models} seeds (one per model), got {len(seeds)}"
        raise ValueError(f"{told}: pass a list of {num_models}, or none at all.")
    return seeds


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option closest to `word`, or the options when none is close.

    Example:
        >>> did_you_mean("momentun", ["lr", "momentum"])
        " Did you mean 'momentum'?"
    """
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Choose from: {', '.join(options)}."


def check_output(output: Any, template: nn.Module) -> None:
    """Refuse what a model returned, if there is no tensor in it.

    Raises:
        TypeError: there is none.
    """
    if not isinstance(output, Tensor) and not tensors_of(output):
        told = f"Expected {type(template).__name__} to return at least one tensor (in tuples, lists, dicts and objects)"
        raise TypeError(f"{told}, got {cut(repr(output))}: return a tensor.")


def cut(text: str, length: int = 80) -> str:
    """Return a text, or its beginning where it is too long for an error.

    Example:
        >>> cut("abcdef", 4)
        'abc…'
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def flag(value: Any, name: str) -> bool:
    """Return `value`, or refuse it as neither True nor False: "no" would count as True.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"Expected True or False as {name}, got {value!r}: choose one of them.")
    return value


def open_mappings(tree: Any) -> Any:
    """Return `tree`, once torch's tree functions know how to walk through the mappings in it that are not dicts.

    To them a `UserDict`, which a tokenizer's output is, would be one opaque object, whose tensors would be missed.
    """
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Mapping):
            kind = type(leaf)
            try:
                kind(dict(leaf))
            except Exception:  # it cannot be made anew from a dict
                continue
            register_pytree_node(
                kind,
                lambda mapping: (list(mapping.values()), tuple(mapping)),
                lambda values, names, kind=kind: kind(dict(zip(names, values, strict=True))),
            )
            return open_mappings(tree)
    return tree


def take_apart(args: tuple, kwargs: dict) -> tuple[list[Any], Callable[[list[Any]], tuple[tuple, dict]]]:
    """Return the leaves of a call's arguments, and a function that rebuilds the arguments around other leaves."""
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):  # as most are; the walk takes longer than a layer
        return list(args), lambda leaves: (tuple(leaves), {})
    leaves, spec = tree_flatten(open_mappings((args, kwargs)))
    return leaves, lambda leaves: tree_unflatten(leaves, spec)


def check_numbers(leaves: list[Any], model: nn.Module) -> None:
    """Refuse inputs without numbers: tensors on the meta device, where the model is elsewhere.

    Raises:
        ValueError: there is one.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        weight = next(iter(model.parameters()), None)
        if weight is None or not weight.is_meta:
            raise ValueError("Expected inputs with numbers, got a tensor on the meta device: make it on the models'.")


def check_inputs(leaves: list[Any], num_models: int) -> None:
    """Refuse per-model inputs whose first dimension is not M.

    Raises:
        ValueError: there is one.
        TypeError: an object that hides tensors, which would be the same for all models.
    """
    for tensor in leaves:
        hidden = vars(tensor).values() if hasattr(tensor, "__dict__") and not callable(tensor) else ()
        if not isinstance(tensor, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(list(hidden))):
            told = f"Expected per-model inputs in lists, tuples and dicts, got a {type(tensor).__name__}, whose tensors"
            raise TypeError(f"{told} would be the same for all models: pass a dict, or pass shared_input=True.")
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[0] != num_models):
            told = f"Expected per-model input [{num_models}, B, …] (one slice per model), got {list(tensor.shape)}"
            raise ValueError(f"{told}: stack one input per model, or pass shared_input=True for one input to all.")
