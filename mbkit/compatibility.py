"""What M models must have in common to be one batch; whatever differs is routed one a model or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Settings", "check_models"]

Settings = dict[str, dict[str, list[float]]]  # module path -> attribute -> one value a model

_KEPT_BY_TORCH = {"_parameters", "_buffers", "_modules", "training"}  # compared as tensors, children and flags
_HOOKS = {name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))}
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def check_models(models: Sequence[nn.Module]) -> Settings:
    """Check that the models can be stacked, and return the settings that differ between them.

    Args:
        models: M modules.

    Returns:
        The floats of torch's own layers (a dropout rate, a slope, a momentum, an epsilon) that differ between
        the models: module path to attribute to M values.

    Raises:
        TypeError: something that is not a module, or not a list of them.
        ValueError: no models, the same one twice, or anything else in which they differ; the message names it.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise TypeError(f"Expected a list of models, got one {type(models).__name__}: pass [model_0, model_1, …].")
    models = list(models)
    if not models:
        raise ValueError("Expected at least one model, got an empty list: pass [model_0, model_1, …].")
    for m, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected nn.Modules, got {type(model).__name__} as model {m}: pass the models themselves."
            )
    if len({id(model) for model in models}) < len(models):
        raise ValueError("Expected M different models, got the same object twice: build each, or copy.deepcopy it.")

    first = models[0]
    _refuse_what_vmap_ignores(first)
    modules, tensors = _modules(first), _tensors(first)
    settings: Settings = {}
    for m, model in enumerate(models[1:], 1):
        if _kind(model) != _kind(first):
            _refuse(m, "is of another class", _kind(model), _kind(first))
        _compare_tensors(m, _tensors(model), tensors)
        others = _modules(model)
        if list(others) != list(modules):
            odd = sorted(set(others) ^ set(modules)) or ["their order"]
            _refuse(m, f"has other submodules ({odd[0]!r} first)", len(others), len(modules))
        for path, module in modules.items():
            _compare_modules(m, path, others[path], module, settings)
    values = [dict(_modules(model)) for model in models] if settings else []
    return {
        path: {name: [getattr(modules_m[path], name) for modules_m in values] for name in names}
        for path, names in settings.items()
    }


def _refuse(m: int, what: str, got: Any, expected: Any) -> None:
    raise ValueError(
        f"Model {m} {what}: got {got}, expected {expected} as in model 0; the models of a batch must match."
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name that they have, so that another tying shows as another name."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _refuse_what_vmap_ignores(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"module '{path}'" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, which torch.vmap cannot enter: pass the eager module.")
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{where} asks for sparse gradients, which cannot be stacked: build it with sparse=False.")
        if any(getattr(module, hooks, None) for hooks in _BACKWARD_HOOKS):
            raise ValueError(f"{where} has a backward hook, which torch.vmap would skip silently: remove it.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{where} keeps extra state outside tensors, which cannot be stacked: use buffers.")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise ValueError(f"parameter '{name}' has a gradient hook, which would see all models at once: remove it.")
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"parameter '{name}' is not built yet: run each model once, then make the batch.")


def _compare_tensors(m: int, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        _refuse(m, f"has other parameters or buffers ({odd[0]!r} first)", len(got), len(expected))
    for name, reference in expected.items():
        tensor = got[name]
        if tensor.shape != reference.shape:
            _refuse(m, f"has '{name}' in another shape", list(tensor.shape), list(reference.shape))
        if (tensor.dtype, tensor.device) != (reference.dtype, reference.device):
            mine, other = f"{tensor.dtype} on {tensor.device}", f"{reference.dtype} on {reference.device}"
            _refuse(m, f"has '{name}' as another dtype or on another device", mine, other)
        if tensor.requires_grad != reference.requires_grad:
            flags = f"requires_grad={tensor.requires_grad}", f"requires_grad={reference.requires_grad}"
            _refuse(m, f"has '{name}' frozen where another is not", *flags)
    if _ties(got) != _ties(expected):
        _refuse(m, "shares other tensors between its layers", _ties(got), _ties(expected))


def _ties(tensors: dict[str, Tensor]) -> list[str]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return ["=".join(tied) for tied in names.values() if len(tied) > 1]


def _compare_modules(m: int, path: str, module: nn.Module, reference: nn.Module, settings: Settings) -> None:
    """Compare classes, train/eval flags and plain attributes; note the floats that differ in torch's own layers."""
    where = f"at '{path}'" if path else "at its top"
    if _kind(module) != _kind(reference):
        _refuse(m, f"has another layer {where}", _kind(module), _kind(reference))
    if module.training != reference.training:
        modes = [f"{'train' if flag else 'eval'}()" for flag in (module.training, reference.training)]
        _refuse(m, f"is in another mode {where}", *modes)
    mine, others = vars(module), vars(reference)
    for name in mine.keys() | others.keys():
        if name in _KEPT_BY_TORCH:
            continue
        a, b = mine.get(name), others.get(name)
        if a is b:
            continue
        if name in _HOOKS:
            if len(a) != len(b):
                _refuse(m, f"has other hooks {where}", f"{len(a)} in {name}", len(b))
        elif not _same(a, b, module, reference, set()):
            if type(a) is float and type(b) is float and type(module).__module__.startswith("torch.nn."):
                settings.setdefault(path, {})[name] = []
            else:
                _refuse(m, f"has another {name!r} {where}", _short(a), _short(b))


def _same(a: Any, b: Any, owner_a: nn.Module, owner_b: nn.Module, seen: set[int]) -> bool:
    """Say whether two attributes mean the same; what cannot be told apart from different counts as different."""
    if a is b or id(a) in seen:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (nn.Parameter, nn.Module)):  # a reference into the model; its values are compared elsewhere
        return True
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    seen.add(id(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k], owner_a, owner_b, seen) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, owner_a, owner_b, seen) for x, y in zip(a, b, strict=True))
    if inspect.ismethod(a):
        same_owner = (a.__self__ is owner_a and b.__self__ is owner_b) or a.__self__ is b.__self__
        return a.__func__ is b.__func__ and (same_owner or _same(a.__self__, b.__self__, owner_a, owner_b, seen))
    if inspect.isfunction(a):
        cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
        defaults = [(f.__defaults__, f.__kwdefaults__) for f in (a, b)]
        return a.__code__ is b.__code__ and _same(
            [cells[0], defaults[0]], [cells[1], defaults[1]], owner_a, owner_b, seen
        )
    if type(a).__name__ in {"ReferenceType", "weakref"} or type(a).__module__ == "weakref":
        return True
    if type(a).__eq__ is not object.__eq__:
        equal = a == b
        return equal if isinstance(equal, bool) else bool(getattr(equal, "all", lambda: False)())
    return hasattr(a, "__dict__") and _same(vars(a), vars(b), owner_a, owner_b, seen)


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "…"
