"""What M models must have in common to be one batch; whatever differs is one per model or refused by name."""

from __future__ import annotations

import re
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import cut, did_you_mean, list_of_models, memory_of
from ..vmap import Absent, has_method
from .stack import may_keep
from .structure import Comparison, Names, may_differ, refuse_circles, refuse_references

Settings = dict[str, dict[str, list[Any]]]  # module path -> attribute -> one value per model

_COMPARED = {"_parameters", "_buffers", "_modules", "training"}  # by `_facts`
_HOOKS = {name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))}
_EMPTY = {dict, OrderedDict, list, set}  # types whose values are alike where they are empty
_REBUILT = {"_flat_weights", "_flat_weight_refs"}  # what torch's RNNs derive from their parameters


def check_models(models: Iterable[nn.Module]) -> tuple[list[nn.Module], Settings]:
    """Check that the models can be stacked, and return them as a list, with the settings that differ between them.

    Args:
        models: M modules.

    Returns:
        The models, and the settings that differ between them: module path to attribute to M values. These are floats (a
        dropout rate, a slope, a scale of the user's own), objects and dicts of plain values (configurations), and of
        the user's own classes whole numbers, texts, and what calls have filled in.

    Raises:
        TypeError: something that is not a module, or not a list of them; a ModelBatch.
        ValueError: no models, the same one twice, or anything else in which they differ; the message names it.
    """
    models = list_of_models(models)
    alike = AlikeModels(models[0])
    for model in models[1:]:
        alike.add(model)
    return models, alike.settings


class AlikeModels:
    """Checks that models can be stacked, one after the other.

    Args:
        first: model 0, with which the others are compared.

    Attributes:
        num_models: how many there have been.
        settings: those that differ between them, as `check_models` returns them.
    """

    def __init__(self, first: nn.Module) -> None:
        self.num_models, self.settings = 1, {}
        self._seen = weakref.WeakSet([first])
        refuse_circles(0, first)
        refuse_references(first)
        _refuse_what_vmap_ignores(first)
        _refuse_shared_memory(first)
        modules, tensors = _parts(first)
        _refuse_late_hooks(tensors)
        self._facts = dict(_facts(modules, tensors))
        self.compare_with(first)

    def compare_with(self, first: nn.Module) -> None:
        """Take a copy of model 0 in its place, which may hold other numbers."""
        modules, tensors = _parts(first)
        self._names = _names(modules, tensors)
        self._attributes = {path: dict(_plain(module)) for path, module in modules.items()}

    def add(self, model: nn.Module) -> nn.Module:
        """Check one more model, and return it; errors as for `check_models`."""
        m = self.num_models
        if model in self._seen:
            raise ValueError("Expected M different models, got the same object twice: build each, or copy.deepcopy it.")
        self._seen.add(model)
        refuse_circles(m, model)
        modules, tensors = _parts(model)
        _refuse_late_hooks(tensors)
        for what, got in _facts(modules, tensors):
            if got != self._facts[what]:
                _compare(m, what, got, self._facts[what])
        compared = Comparison(_names(modules, tensors), self._names)
        for path, attributes in self._attributes.items():
            for name in _differing_settings(m, path, modules[path], attributes, compared):
                self.settings.setdefault(path, {}).setdefault(name, [attributes.get(name, Absent)] * m)
        for path, settings in self.settings.items():
            for name, values in settings.items():
                values.append(vars(modules[path]).get(name, Absent))
        self.num_models += 1
        return model


def check_paths(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Return the dotted paths of submodules, and of methods with "()" after their names, as a set.

    Raises:
        ValueError: a path that leads nowhere.
    """
    paths = {paths} if isinstance(paths, str) else set(paths)
    known = [path for path, _ in model.named_modules()]
    for path in paths.difference(known):
        if not (path.endswith("()") and has_method(model, path[:-2])):
            raise ValueError(f"Expected a submodule's dotted path, got {path!r}.{did_you_mean(path, known)}")
    return paths


def _parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return modules, and parameters and buffers, under every name that they have: other ties show as other names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return modules, {
        f"{path}.{name}" if path else name: tensor
        for store in ("_parameters", "_buffers")
        for path, module in modules.items()
        for name, tensor in vars(module)[store].items()
        if tensor is not None
    }


def _names(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Names:
    return {id(thing): name for things in (modules, tensors) for name, thing in things.items()}


def _where(path: str) -> str:
    return f"at '{path}'" if path else "at its top"


# ------------------------------------------------------------------ what one model must not have
def _refuse_late_hooks(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor._post_accumulate_grad_hooks:
            told = f"parameter '{name}' has a hook that runs once its gradient is there, which would be all models'"
            raise ValueError(f"{told}: use register_hook, which sees each model's own.")


def _refuse_what_vmap_ignores(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"module '{path}'" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, which torch.vmap cannot enter: pass the eager module.")
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{where} asks for sparse gradients, which cannot be stacked: build it with sparse=False.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{where} keeps extra state outside tensors, which cannot be stacked: use buffers.")
        for name, value in (*_plain(module), *module._buffers.items()):
            if isinstance(value, Tensor) and value.layout not in (torch.strided, torch.sparse_coo):
                told = f"{where} keeps in {name!r} a tensor of layout {value.layout}, which cannot be stacked"
                raise ValueError(f"{told}: keep it as a COO tensor, .to_sparse_coo(), or pass it as an input.")
            if isinstance(value, Tensor) and not value.is_leaf and not _recomputed(module, name):
                told = f"{where} keeps in {name!r} a tensor that carries the gradient of an earlier computation"
                raise ValueError(f"{told}: compute it in forward, detach it, or set it to None beforehand.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"parameter '{name}' is not built yet: run each model once, then make the batch.")


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the attributes that are compared one by one."""
    skipped = _COMPARED | (_REBUILT if isinstance(module, nn.RNNBase) else set())
    return [(name, value) for name, value in vars(module).items() if name not in skipped]


def _recomputed(module: nn.Module, name: str) -> bool:
    """Say whether one of torch's own hooks (weight_norm, spectral_norm, pruning) computes this attribute anew."""
    return any(
        type(hook).__module__.startswith("torch.nn.utils.")
        and name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        for hook in module._forward_pre_hooks.values()
    )


def _refuse_shared_memory(model: nn.Module) -> None:
    """Refuse a view of a parameter: it follows the parameter's training when alone, and a copy of it would not."""
    modules, everything = _parts(model)
    for path, module in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not _recomputed(module, name):
                everything[f"{path}.{name}" if path else name] = value
    spans = []
    for name, tensor in {id(t): (name, t) for name, t in everything.items()}.values():
        if tensor.layout is torch.strided and tensor.numel() and tensor.device.type != "meta":
            spans.append((*memory_of(tensor), name, isinstance(tensor, nn.Parameter)))
    spans.sort()
    for (_, end, name, trained), (start, _, other, other_trained) in pairwise(spans):
        if start < end and (trained or other_trained):
            told = f"'{name}' and '{other}' share memory without being one tensor, which their stacks would not do"
            raise ValueError(f"{told}: register one Parameter under both names, or compute the second in forward.")


# ------------------------------------------------------------------ in what two models must not differ
def _facts(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Yield what models must have in common, from the coarse to the fine: what is wrong where it differs, and it."""
    yield "is of another class", type(modules[""])
    yield "has other parameters or buffers", tuple(sorted(tensors))
    for name, tensor in tensors.items():
        yield f"has '{name}' in another shape", list(tensor.shape)
        yield f"has '{name}' as another dtype or on another device", f"{tensor.dtype} on {tensor.device}"
        yield f"has '{name}' frozen where another is not", f"requires_grad={tensor.requires_grad}"
    ties: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        ties.setdefault(id(tensor), []).append(name)
    yield "shares other tensors between its layers", ["=".join(tied) for tied in ties.values() if len(tied) > 1]
    yield "has other submodules", tuple(modules)
    for path, module in modules.items():
        yield f"has another layer {_where(path)}", type(module)
        yield f"is in another mode {_where(path)}", f"{'train' if module.training else 'eval'}()"


def _compare(m: int, what: str, got: Any, expected: Any) -> None:
    """Refuse what differs, unless it is a class that is defined anew in the same way."""
    if isinstance(got, type):
        if not Comparison({}, {}).same(got, expected):
            _refuse(m, what, *(f"{kind.__module__}.{kind.__qualname__}" for kind in (got, expected)))
    elif isinstance(got, tuple):
        odd = sorted(set(got) ^ set(expected)) or ["their order"]
        _refuse(m, f"{what} ({odd[0]!r} first)", len(got), len(expected))
    else:
        _refuse(m, what, got, expected)


def _differing_settings(
    m: int, path: str, module: nn.Module, others: dict[str, Any], compared: Comparison
) -> Iterator[str]:
    """Compare a module's plain attributes and hooks with those of model 0; yield the settings, which may differ."""
    mine = dict(_plain(module))
    for name in mine.keys() | others.keys():
        a, b = mine.get(name), others.get(name)
        if a is b or (type(a) in _EMPTY and type(a) is type(b) and not a and not b):
            continue
        what = f"has another {name!r} {_where(path)}"
        if name in _HOOKS:  # one function runs for all models, so it may not keep anything for one of them
            own = [[_watcher(hook) for hook in hooks.values()] for hooks in (a, b)]
            alike = Comparison(compared.names_a, compared.names_b, strict=True).same(*own)
            what, a, b = f"has other {name.strip('_').replace('_', ' ')} {_where(path)}", [*a.values()], [*b.values()]
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        else:
            alike = compared.same(a, b)
            if not alike and may_differ(module, name, a, b, compared):
                alike = True
                yield name
        if not alike:
            _refuse(m, what, *_contrast(a, b))


def _watcher(hook: Any) -> Any:
    """Return what two models' hooks have to have in common: where objects keep what they see, each keeps its own."""
    holder = getattr(hook, "__self__", hook)
    return (type(holder), getattr(hook, "__func__", None)) if may_keep(holder) else hook


def _refuse(m: int, what: str, got: Any, expected: Any) -> None:
    told = f"Model {m} {what}: got {got}, expected {expected} as in model 0"
    raise ValueError(f"{told}; the models of a batch must match.")


def _contrast(got: Any, expected: Any) -> tuple[str, str]:
    """Two short texts for an error message, that differ."""
    told = (re.sub(r" at 0x[0-9a-f]+", "", repr(value).replace("\n", " ")) for value in (got, expected))
    texts = [cut(text) for text in told]
    return (f"{texts[0]} with other values inside" if texts[0] == texts[1] else texts[0]), texts[1]
