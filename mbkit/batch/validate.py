"""What M models must have in common to be one batch; whatever differs is one per model or refused by name."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import did_you_mean, list_of_models, memory_of
from ..vmap import Absent
from .stack import may_keep
from .structure import Comparison, Names, refuse_circles, refuse_references

__all__ = ["Settings", "check_models", "check_paths", "is_callable"]

Settings = dict[str, dict[str, list[Any]]]  # module path -> attribute -> one value per model

_COMPARED = {"_parameters", "_buffers", "_modules", "training"}  # by `_facts`
_HOOKS = {name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN += (type, FunctionType, BuiltinFunctionType, ModuleType)
_REBUILT = {"_flat_weights", "_flat_weight_refs"}  # what torch's RNNs derive from their parameters


def check_models(models: Iterable[nn.Module]) -> tuple[list[nn.Module], Settings]:
    """Check that the models can be stacked, and return them as a list, with the settings that differ between them.

    Args:
        models: M modules.

    Returns:
        The models, and the settings that differ between them: module path to attribute to M values. These are floats (a
        dropout rate, a slope, a scale of the user's own), and objects and dicts of plain values (configurations).

    Raises:
        TypeError: something that is not a module, or not a list of them; a ModelBatch.
        ValueError: no models, the same one twice, or anything else in which they differ; the message names it.
    """
    models = list_of_models(models)
    if len({id(model) for model in models}) < len(models):
        raise ValueError("Expected M different models, got the same object twice: build each, or copy.deepcopy it.")
    for m, model in enumerate(models):
        refuse_circles(m, model)
        _refuse_late_hooks(model)
    first, settings = models[0], {}
    refuse_references(first)
    _refuse_what_vmap_ignores(first)
    _refuse_shared_memory(first)
    facts, modules, names = dict(_facts(first)), _modules(first), _names(first)
    for m, model in enumerate(models[1:], 1):
        for what, got in _facts(model):
            _compare(m, what, got, facts[what])
        others, compared = _modules(model), Comparison(_names(model), names)
        for path, module in modules.items():
            _compare_attributes(m, path, others[path], module, compared, settings)
    values = [_modules(model) for model in models] if settings else []
    return models, {
        path: {name: _column([vars(modules_m[path]).get(name, Absent) for modules_m in values]) for name in names}
        for path, names in settings.items()
    }


def check_paths(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Return the dotted paths of submodules, and of methods with "()" after their names, as a set.

    Raises:
        ValueError: a path that leads nowhere.
    """
    paths = {paths} if isinstance(paths, str) else set(paths)
    known = [path for path, _ in model.named_modules()]
    for path in paths.difference(known):
        if path.endswith("()") and is_callable(model, path[:-2]):
            continue
        raise ValueError(f"Expected a submodule's dotted path, got {path!r}.{did_you_mean(path, known)}")
    return paths


def is_callable(model: nn.Module, name: str) -> bool:
    """Say whether a model has something to call under a dotted name: a method or a submodule."""
    try:
        return callable(operator.attrgetter(name)(model))
    except AttributeError:
        return False


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name that they have, so that another tying shows as another name."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _names(model: nn.Module) -> Names:
    return {id(thing): name for things in (_modules(model), _tensors(model)) for name, thing in things.items()}


def _where(path: str) -> str:
    return f"at '{path}'" if path else "at its top"


# ------------------------------------------------------------------ what one model must not have
def _refuse_late_hooks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter '{name}' has a hook that runs once its gradient is there, which would see all models at "
                "once: use register_hook, which sees each model's own."
            )


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
                raise ValueError(
                    f"{where} keeps in {name!r} a tensor of layout {value.layout}, which cannot be stacked: keep it as "
                    "a COO tensor, .to_sparse_coo(), or pass it as an input."
                )
            if isinstance(value, Tensor) and not value.is_leaf and not _recomputed(module, name):
                raise ValueError(
                    f"{where} keeps in {name!r} a tensor that carries the gradient of an earlier computation: "
                    "compute it in forward, detach it, or set it to None before making the batch."
                )
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
    everything = _tensors(model)
    for path, module in _modules(model).items():
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
            raise ValueError(
                f"'{name}' and '{other}' share memory without being one tensor, so that a stack of one would not "
                "follow the other: register the same Parameter under both names, or compute the second in forward."
            )


# ------------------------------------------------------------------ in what two models must not differ
def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what models must have in common, from the coarse to the fine: what is wrong where it differs, and it."""
    tensors, modules = _tensors(model), _modules(model)
    yield "is of another class", type(model)
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
    if isinstance(got, type) and not Comparison({}, {}).same(got, expected):
        _refuse(m, what, *(f"{kind.__module__}.{kind.__qualname__}" for kind in (got, expected)))
    elif isinstance(got, tuple) and got != expected:
        odd = sorted(set(got) ^ set(expected)) or ["their order"]
        _refuse(m, f"{what} ({odd[0]!r} first)", len(got), len(expected))
    elif not isinstance(got, type) and got != expected:
        _refuse(m, what, got, expected)


def _compare_attributes(
    m: int, path: str, module: nn.Module, reference: nn.Module, compared: Comparison, settings: Settings
) -> None:
    """Compare plain attributes and hooks; note the settings that may differ."""
    mine, others = dict(_plain(module)), dict(_plain(reference))
    for name in mine.keys() | others.keys():
        a, b = mine.get(name), others.get(name)
        if a is b or (name in _HOOKS and not a and not b):
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
            if not alike and (_may_differ(a, b) or _is_own(module, name, a, b, compared)):
                alike = settings.setdefault(path, {})[name] = True
        if not alike:
            _refuse(m, what, *_contrast(a, b))


def _watcher(hook: Any) -> Any:
    """Return what two models' hooks have to have in common: where objects keep what they see, each keeps its own."""
    holder = getattr(hook, "__self__", hook)
    return (type(holder), getattr(hook, "__func__", None)) if may_keep(holder) else hook


def _may_differ(a: Any, b: Any) -> bool:
    """Say whether each model may have its own: a float, or an object or dict of plain values."""
    if {type(a), type(b)} in ({float}, {float, int}):
        return True
    is_open = isinstance(a, dict) or hasattr(a, "__dict__")
    return type(a) is type(b) and is_open and not callable(a) and _is_plain(a, set()) and _is_plain(b, set())


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Say whether nothing that a value holds is a tensor or a module, whose place is another one."""
    if isinstance(value, _PLAIN) or id(value) in seen or type(value).__module__ in ("typing", "types"):
        return True
    seen.add(id(value))
    if isinstance(value, (dict, list, tuple, set)):
        return all(_is_plain(one, seen) for one in (value.values() if isinstance(value, dict) else value))
    held = getattr(value, "__dict__", None)
    return isinstance(held, dict) and not isinstance(value, (Tensor, nn.Module)) and _is_plain(held, seen)


def _is_own(module: nn.Module, name: str, a: Any, b: Any, compared: Comparison) -> bool:
    """Say whether an attribute of the user's own class may differ: a whole number, a text, or what a call fills in.

    Calls fill in flags and tables where nothing was. All models at once cannot read such an attribute, so a layer that
    does runs model by model.
    """
    if type(module).__module__.startswith("torch.") or hasattr(type(module), name):
        return False
    filled = [value for value in (a, b) if value is not None and value is not False]
    if len(filled) == 1:
        known = compared.names_a.keys() | compared.names_b.keys()
        return filled[0] is True or (isinstance(filled[0], Tensor) and filled[0].is_leaf and id(filled[0]) not in known)
    return {type(a), type(b)} in ({int}, {str})


def _column(values: list[Any]) -> list[Any]:
    """Return M values of a setting, as floats where one of them is."""
    is_number = any(isinstance(value, float) for value in values)
    return [float(value) if is_number else value for value in values]


def _refuse(m: int, what: str, got: Any, expected: Any) -> None:
    raise ValueError(
        f"Model {m} {what}: got {got}, expected {expected} as in model 0; the models of a batch must match."
    )


def _contrast(got: Any, expected: Any) -> tuple[str, str]:
    """Two short texts for an error message, that differ."""
    texts = []
    for value in (got, expected):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value).replace("\n", " "))
        texts.append(text if len(text) <= 80 else text[:77] + "…")
    return (f"{texts[0]} with other values inside" if texts[0] == texts[1] else texts[0]), texts[1]
