"""The optimizer for every class without a stacked rule: M lone optimizers over views of the stacked parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..batch.context import context_of
from ..batch.select import has_gradient
from .at_once import form_of, image_of, step_at_once
from .base import BatchOptimizer
from .groups import Configs, Names, construct, parameters_of
from .hyperparameters import ModelGroup, ModelGroups, OptimizerClass
from .lone_calls import CanCallEach, place_of

_FEW = 3  # models that are as fast in turn


class ViewsOptimizer(CanCallEach, BatchOptimizer):
    """An optimizer of a batch with a lone `optimizer_cls` per model, exact by nature.

    A step of more than three models is made at once, where torch.vmap can run the class's own `step`; see `at_once`.
    Else, and in whatever other method is called, the lone optimizers run in turn, no faster than alone.

    Each lone optimizer owns one model's slices of the stacked parameters, as views. During a call, and only then,
    each view's gradient is a view of the stacked gradient, and torch's default generators are model m's random stream.
    `param_groups` repeats the lone optimizers' own groups; model m's state is in `lone[m].state`. Any other method of
    the class is called for each model in turn, as a step is: `optimizer.train()`, `optimizer.first_step(True)`. It
    returns what the calls returned: None, tensors stacked `[M, ...]`, or a list.

    One optimizer with M groups would be enough for torch's own classes. But some users' classes compute over all groups
    at once (a global norm, a common step size), and would mix the models silently.
    """

    lone: list[torch.optim.Optimizer]
    _vmap_can = True  # make the class's step, as far as is known

    def __init__(self, batch: Any, optimizer_cls: OptimizerClass, configs: Configs, names: Names) -> None:
        params = [[batch.stacked_params[name] for name in group] for group in names]
        lone = _over_views(params, optimizer_cls, configs)
        groups = [group for one in lone for group in one.param_groups]
        super().__init__(batch, optimizer_cls, configs, names, groups, lone[0].defaults)
        self.lone = lone
        self._watch_groups()

    def _watch_groups(self) -> None:
        self._changed: set[str] = set()
        groups = [ModelGroup(group, self._changed) for group in self.param_groups]
        self.param_groups = ModelGroups(groups, self.num_models)
        self._changed.clear()

    def _pairs(self) -> Iterator[tuple[ModelGroup, dict[str, Any]]]:
        """Return each of `param_groups` with the lone optimizer's own group; they differ in "params" only."""
        return zip(self.param_groups, (group for lone in self.lone for group in lone.param_groups), strict=True)

    def _read_back(self) -> None:
        """Take over what the lone optimizers have written into their groups."""
        for group, own in self._pairs():
            mine = {**own, "params": group["params"]}
            dict.clear(group)
            dict.update(group, mine)

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        self._check_current()
        if closure is not None:
            return self.in_lockstep(closure)
        try:
            left = self._step_at_once()
            if left:
                self.in_turn(lambda m: self.lone[m].step(), left)
        except TypeError as error:
            if "'NoneType' object is not callable" not in str(error) and "'closure'" not in str(error):
                raise
            told = f"{self.optimizer_cls.__name__} needs a closure that computes the losses anew: call step(closure)"
            raise TypeError(f"{told}, where the closure returns the M losses after their backward pass.") from error

    def _step_at_once(self) -> list[int]:
        """Make a step of all models that can make it at once, and return those that are left for one in turn."""
        going, left = self.going(), []
        if len(going) <= _FEW or not self._vmap_can:
            return going
        params, context, alike = self._params(), context_of(self.batch), {}
        self._follow(params)
        has = list(zip(*[has_gradient(param, self.num_models) for param in params], strict=True))
        images = {m: image_of(self.lone[m]) for m in going}
        for m in going:
            alike.setdefault((has[m], form_of(images[m])), []).append(m)
        for (own, _), models in alike.items():
            some = [p for p, has_one in zip(params, own, strict=True) if p.grad is not None and not has_one]
            lone, held = [self.lone[m] for m in models], [images[m] for m in models]
            if len(models) <= _FEW or some:
                left += models
            elif not step_at_once(context, lone, held, params, models):
                self._vmap_can = False  # a first attempt tells, as a rule; each one costs a part of a step
                left += models
        self._read_back()
        return sorted(left)

    def _follow(self, params: list[nn.Parameter]) -> None:
        """Bring the lone optimizers up to date: with what was written into `param_groups`, and with the parameters'
        present memory, as `batch.to()` and `batch.double()` give them another.
        """
        for group, own in self._pairs() if self._changed else ():
            for name in self._changed - {"params"}:
                own.pop(name, None)
                own.update({name: group[name]} if name in group else {})
        self._changed.clear()
        views = [parameters_of(lone.param_groups) for lone in self.lone]
        for i, param in enumerate(params):
            rows = param.detach().unbind(0)
            if place_of(views[0][i]) == place_of(rows[0]):
                continue
            for lone, own, row in zip(self.lone, views, rows, strict=True):
                view, old = own[i], own[i].dtype
                view.data = row
                state = lone.state.get(view, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step":  # torch leaves "step" where it is, too
                        state[name] = value.to(row.device, row.dtype if value.dtype == old else value.dtype)

    def _fill_state(self, lone: torch.optim.Optimizer, m: int) -> None:
        self._follow(self._params())
        _load(lone, _own_memory(self.lone[m].state_dict()), exactly=True)

    # ---- saving and loading: under `["state"]["models"]` are the M lone optimizers' own states

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and under `["state"]["models"]` the M lone optimizers' own states."""
        self._follow(self._params())
        models = [_own_memory(lone.state_dict()) for lone in self.lone]
        return {**super().state_dict(), "state": self._described(models)}

    def _described(self, models: list[dict[str, Any]]) -> dict[str, Any]:
        """Return M lone optimizers' states, with what tells whether they are whole: a class keeps what it likes."""
        params = self._params()
        return {
            "models": models,
            "shapes": [tuple(param.shape) for param in params],
            "dtypes": [str(param.dtype) for param in params],  # as words, which torch.load takes from strangers
            "forms": [_form(model) for model in models],
        }

    def _load_state(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        mine = self.state_dict()["state"]
        if not mine.keys() <= state.keys():
            raise self._foreign(", ".join(mine), sorted(map(str, state)))
        shapes = [tuple(shape) for shape in state["shapes"]]
        if shapes != mine["shapes"]:
            raise self._foreign(f"parameters of shapes {mine['shapes']}", f"one for {shapes}")
        numbers, got = _numbers_of(mine["models"]), _numbers_of(state["models"])
        if got != numbers:
            raise self._foreign(f"{self.num_models} models with parameters numbered {numbers[0]}", got)
        for m, model in enumerate(state["models"]):
            if state["forms"][m : m + 1] != [_form(model)]:
                raise self._foreign(f"model {m} that keeps {state['forms'][m : m + 1]}", _form(model))
        try:
            for lone, model in zip(self.lone, state["models"], strict=True):
                _load(lone, model, exactly=state["dtypes"] == mine["dtypes"])
        except Exception:  # from a class's own way to load, when some models are loaded already
            for lone, model in zip(self.lone, mine["models"], strict=True):
                _load(lone, model, exactly=True)
            raise

    def _model_state(self, state: dict[str, Any], m: int) -> dict[str, Any]:
        return {name: value for name, value in state["models"][m].items() if name != "param_groups"}

    def _state_from(self, models: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        size, (numbers, *_) = len(self._names), _numbers_of([one.state_dict() for one in self.lone])
        whole = []
        for m, model in enumerate(models):
            own = zip(groups[m * size : (m + 1) * size], numbers, strict=True)
            whole.append({**model, "param_groups": [{**group, "params": params} for group, params in own]})
        return self._described(whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "lone": self.state_dict()["state"]["models"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        params = [group["params"] for group in self.groups_of(0)]  # not those that the original's views are of
        states, self.lone = self.lone, _over_views(params, self.optimizer_cls, self._configs)
        for lone, own in zip(self.lone, states, strict=True):
            _load(lone, own, exactly=True)
        self._watch_groups()


def _numbers_of(models: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    return [[list(group["params"]) for group in model["param_groups"]] for model in models]


def _form(model: dict[str, Any]) -> str:
    """Return names, shapes and dtypes of what a lone optimizer keeps for each parameter, in words."""

    def form(value: Any) -> str:
        return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

    state = model["state"].items()
    return str({i: {n: form(v) for n, v in own.items()} if isinstance(own, dict) else form(own) for i, own in state})


def _over_views(
    params: list[list[nn.Parameter]], optimizer_cls: OptimizerClass, configs: Configs
) -> list[torch.optim.Optimizer]:
    def views(m: int) -> list[list[nn.Parameter]]:
        return [[nn.Parameter(p.detach()[m], requires_grad=p.requires_grad) for p in group] for group in params]

    return [construct(optimizer_cls, views(m), own, m) for m, own in enumerate(configs)]


def _own_memory(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without tensors that are rows of M models' memory, all of which a pickle or copy would hold."""

    def own(tensor: Tensor) -> Tensor:
        whole = tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if whole else tensor.clone()

    return tree_map_only(Tensor, own, state)


def _load(lone: torch.optim.Optimizer, saved: dict[str, Any], exactly: bool) -> None:
    """Load a copy of a lone optimizer's state; exactly, where parameters have the dtype that they had.

    torch casts everything but "step" to the parameter's dtype, also the numbers (ASGD's eta) that a class keeps in
    float32 beside float64 parameters; after an exact load these have their own dtype.
    """
    saved = copy.deepcopy(saved)
    lone.load_state_dict(saved)
    for i, view in enumerate(parameters_of(lone.param_groups) if exactly else ()):
        for name, value in saved["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                lone.state[view][name] = value if name == "step" else value.to(view.device)
