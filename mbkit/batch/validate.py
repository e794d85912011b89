"""What M models must have in common to be one batch; whatever differs is routed one a model or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import did_you_mean, list_of_models, memory_of
from .reference_cycles import refuse_circles
from .stack import may_keep
from .structural_equality import Comparison, Names

__all__ = ["Settings", "check_models", "check_paths"]

Settings = dict[str, dict[str, list[float]]]  # module path -> attribute -> one value a model

_KEPT_BY_TORCH = {"_parameters", "_buffers", "_modules", "training"}  # compared as tensors, children and flags
_HOOKS = {name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))}
_REBUILT = ("_flat_weights", "_flat_weight_refs")  # what torch's RNNs derive from their parameters


def check_models(models: Iterable[nn.Module]) -> tuple[list[nn.Module], Settings]:
    """Check that the models can be stacked, and return them as a list, with the settings that differ between them.

    Args:
        models: M modules.

    Returns:
        The models, and the floats of torch's own layers (a dropout rate, a slope, a momentum, an epsilon) that differ
        between them: module path to attribute to M values.

    Raises:
        TypeError: something that is not a module, or not a list of them.
        ValueError: no models, the same one twice, or anything else in which they differ; the message names it.
    """
    models = list_of_models(models)
    if len({id(model) for model in models}) < len(models):
        raise ValueError("Expected M different models, got the same object twice: build each, or copy.deepcopy it.")
    refuse_circles(models)

    first = models[0]
    modules, tensors = _modules(first), _tensors(first)
    names = _names(modules, tensors)
    _refuse_what_vmap_ignores(first)
    _refuse_shared_memory(modules, tensors)
    settings: Settings = {}
    for m, model in enumerate(models[1:], 1):
        if not Comparison({}, {}).same(type(model), type(first)):
            _refuse(m, "is of another class", _kind(model), _kind(first))
        others, others_tensors = _modules(model), _tensors(model)
        _compare_tensors(m, others_tensors, tensors)
        if list(others) != list(modules):
            odd = sorted(set(others) ^ set(modules)) or ["their order"]
            _refuse(m, f"has other submodules ({odd[0]!r} first)", len(others), len(modules))
        others_names = _names(others, others_tensors)
        for path, module in modules.items():
            _compare_modules(m, path, others[path], module, others_names, names, settings)
    values = [_modules(model) for model in models] if settings else []
    return models, {
        path: {name: [float(getattr(modules_m[path], name)) for modules_m in values] for name in names}
        for path, names in settings.items()
    }


def check_paths(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Return the dotted paths of submodules as a set.

    Raises:
        ValueError: a path that leads nowhere.
    """
    paths = {paths} if isinstance(paths, str) else set(paths)
    known = [path for path, _ in model.named_modules()]
    for path in paths.difference(known):
        raise ValueError(f"Expected a submodule's dotted path, got {path!r}.{did_you_mean(path, known)}")
    return paths


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


def _names(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Names:
    return {id(thing): name for things in (modules, tensors) for name, thing in things.items()}


def _refuse_what_vmap_ignores(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"module '{path}'" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, which torch.vmap cannot enter: pass the eager module.")
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{where} asks for sparse gradients, which cannot be stacked: build it with sparse=False.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{where} keeps extra state outside tensors, which cannot be stacked: use buffers.")
        for name, value in vars(module).items():
            if name in _KEPT_BY_TORCH or (name in _REBUILT and isinstance(module, nn.RNNBase)):
                continue
            if isinstance(value, Tensor) and not value.is_leaf and not _recomputed(module, name):
                raise ValueError(
                    f"{where} keeps in {name!r} a tensor that carries the gradient of an earlier computation: "
                    "compute it in forward, detach it, or set it to None before making the batch."
                )
    for name, parameter in model.named_parameters():
        _refuse_late_hook(name, parameter)
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"parameter '{name}' is not built yet: run each model once, then make the batch.")


def _refuse_late_hook(name: str, parameter: Tensor) -> None:
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"parameter '{name}' has a hook that runs once its gradient is there, which would see all models at once: "
            "use register_hook, which sees each model's own."
        )


def _recomputed(module: nn.Module, name: str) -> bool:
    """Say whether one of torch's own hooks (weight_norm, spectral_norm, pruning) computes this attribute anew."""
    return any(
        type(hook).__module__.startswith("torch.nn.utils.")
        and name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        for hook in module._forward_pre_hooks.values()
    )


def _refuse_shared_memory(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Refuse a view of a parameter: it follows the parameter's training when alone, and a copy of it would not."""
    everything = dict(tensors)
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
            raise ValueError(
                f"'{name}' and '{other}' share memory without being one tensor, so that a stack of one would not "
                "follow the other: register the same Parameter under both names, or compute the second in forward."
            )


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
        _refuse_late_hook(name, tensor)
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


def _compare_modules(
    m: int, path: str, module: nn.Module, reference: nn.Module, names: Names, other_names: Names, settings: Settings
) -> None:
    """Compare classes, train/eval flags and plain attributes; note the floats that differ in torch's own layers."""
    where = f"at '{path}'" if path else "at its top"
    compared = Comparison(names, other_names)
    if not compared.same(type(module), type(reference)):
        _refuse(m, f"has another layer {where}", _kind(module), _kind(reference))
    if module.training != reference.training:
        modes = [f"{'train' if flag else 'eval'}()" for flag in (module.training, reference.training)]
        _refuse(m, f"is in another mode {where}", *modes)
    mine, others = vars(module), vars(reference)
    for name in mine.keys() | others.keys():
        if name in _KEPT_BY_TORCH or (name in _REBUILT and isinstance(module, nn.RNNBase)):
            continue
        a, b = mine.get(name), others.get(name)
        if a is b or (name in _HOOKS and not a and not b):
            continue
        if name in _HOOKS:  # one function runs for all models, so it may not keep anything for one of them
            own = [[_watcher(hook) for hook in hooks.values()] for hooks in (a, b)]
            if not Comparison(names, other_names, strict=True).same(*own):
                what = f"has other {name.strip('_').replace('_', ' ')} {where}"
                _refuse(m, what, *_contrast([*a.values()], [*b.values()]))
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                _refuse(m, f"has another {name!r} {where}", *_contrast(a, b))
        elif not compared.same(a, b):
            if _is_setting(a, b) and type(module).__module__.startswith("torch.nn."):
                settings.setdefault(path, {})[name] = []
            else:
                _refuse(m, f"has another {name!r} {where}", *_contrast(a, b))


def _watcher(hook: Any) -> Any:
    """Return what two models' hooks have to have in common: where objects keep what they see, each keeps its own."""
    holder = getattr(hook, "__self__", hook)
    return (type(holder), getattr(hook, "__func__", None)) if may_keep(holder) else hook


def _is_setting(a: Any, b: Any) -> bool:
    return {type(a), type(b)} in ({float}, {float, int})


def _contrast(got: Any, expected: Any) -> tuple[str, str]:
    """Two short texts for an error message, that differ."""
    texts = []
    for value in (got, expected):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value).replace("\n", " "))
        texts.append(text if len(text) <= 80 else text[:77] + "…")
    return (f"{texts[0]} with other values inside" if texts[0] == texts[1] else texts[0]), texts[1]
