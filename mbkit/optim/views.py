"""The optimizer for every class without a stacked rule: M lone optimizers over views of the stacked parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.context import context_of
from ..vmap import models_with_gradient
from .base import BatchOptimizer, construct, parameters_of
from .hyperparameters import ModelGroup, numbers_of

__all__ = ["ViewsOptimizer"]


class ViewsOptimizer(BatchOptimizer):
    """An optimizer of a batch that runs a lone `optimizer_cls` per model: no faster than M lone ones, exact by nature.

    Each lone optimizer owns one model's slices of the stacked parameters, as views. During a step, and only then,
    each view's gradient is a view of the stacked gradient, and torch's default generators are model m's random stream.
    `param_groups` can be read and written as in any optimizer of a batch; model m's state is in `lone[m].state`, and a
    class's own verbs are called on each of `lone` (`for one in optimizer.lone: one.train()`).

    One optimizer with M groups would be enough for torch's own classes. But some users' classes compute over all groups
    at once (a global norm, a common step size), and would mix the models silently.
    """

    lone: list[torch.optim.Optimizer]

    def __init__(
        self,
        batch: Any,
        optimizer_cls: type[torch.optim.Optimizer],
        configs: Sequence[Sequence[dict[str, Any]]],
        names: Sequence[Sequence[str]],
    ) -> None:
        params = [[batch.stacked_params[name] for name in group] for group in names]
        lone = _over_views(params, optimizer_cls, configs)
        groups = [group for one in lone for group in one.param_groups]
        super().__init__(batch, optimizer_cls, configs, names, groups, lone[0].defaults)
        self.lone = lone
        self._adopt_groups()

    def _adopt_groups(self) -> None:
        """Turn plain dicts, equal to the lone optimizers' own, into groups that note what is written into them."""
        self._written: list[set[str]] = [set() for _ in self.lone]
        self.param_groups = [
            ModelGroup(group, written) for m, written in enumerate(self._written) for group in self.groups_of(m)
        ]
        for written in self._written:
            written.clear()

    def _update(self) -> None:
        params = self._params()
        self._follow(params)
        stopped = self._stopped()
        stopped = [False] * self.num_models if stopped is None else stopped.tolist()
        reached = [None if p.grad is None else models_with_gradient(p.grad, self.num_models) for p in params]
        reached = [None if models is None else models.tolist() for models in reached]
        with context_of(self.batch).streams.take_turns(params[0].device) as turns:
            for m in turns:
                if not stopped[m]:
                    self._step_alone(
                        m,
                        [
                            param.grad[m] if param.grad is not None and (models is None or models[m]) else None
                            for param, models in zip(params, reached, strict=True)
                        ],
                    )

    def _step_alone(self, m: int, grads: list[Tensor | None]) -> None:
        lone = self.lone[m]
        views = parameters_of(lone.param_groups)
        self._exchange(m)
        try:
            for view, grad in zip(views, grads, strict=True):
                view.grad = grad
            lone.step()
        except TypeError as error:
            if "'NoneType' object is not callable" not in str(error):
                raise
            raise TypeError(
                f"{self.optimizer_cls.__name__} needs a closure that computes one model's loss anew, and the models of "
                "a batch have theirs in common: make one optimizer per model, over batch.models."
            ) from error
        finally:
            for view in views:
                view.grad = None
        self._exchange(m)

    def _exchange(self, m: int) -> None:
        """Tell the lone optimizer what was written into `param_groups`; take over what it wrote into its own groups."""
        written = self._written[m]
        pairs = list(zip(self.lone[m].param_groups, self.groups_of(m), strict=True))
        for own, group in pairs:
            own.update({name: group[name] for name in written if name in group and name != "params"})
        for own, group in pairs:
            group.update(numbers_of(own))  # some classes write their own step size there
        written.clear()

    def _follow(self, params: list[nn.Parameter]) -> None:
        """Point the views at the parameters' present memory: `batch.to()` and `batch.double()` give them another."""
        views = [parameters_of(lone.param_groups) for lone in self.lone]
        for i, param in enumerate(params):
            first, row = views[0][i], param.detach()[0]
            if _place(first) == _place(row):
                continue
            for lone, own, source in zip(self.lone, views, param.detach().unbind(0), strict=True):
                view = own[i]
                state, old = lone.state.get(view, {}), view.dtype
                view.data = source
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step":  # torch leaves "step" where it is, too
                        state[name] = value.to(source.device, source.dtype if value.dtype == old else value.dtype)

    def _fill_state(self, lone: torch.optim.Optimizer, m: int) -> None:
        self._follow(self._params())
        _load(lone, self.lone[m].state_dict(), exactly=True)

    # ---- saving and loading: under `["state"]["models"]` are the M lone optimizers' own states

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and under `["state"]["models"]` the M lone optimizers' own states."""
        self.state = self._gather()
        packed = super().state_dict()
        self.state = defaultdict(dict)
        return packed

    def _gather(self) -> defaultdict[Any, Any]:
        self._follow(self._params())
        for m in range(self.num_models):
            self._exchange(m)
        models = [lone.state_dict() for lone in self.lone]
        return defaultdict(dict, models=models, shapes=self._shapes(), dtypes=self._dtypes(), forms=_forms(models))

    def _state_of(self, state: dict[Any, Any], m: int) -> dict[Any, Any]:
        return state["models"][m]["state"]

    def _state_from(self, rows: Sequence[dict[Any, Any]], groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
        size, own = len(self._names), self.lone[0].state_dict()["param_groups"]
        models = [
            {
                "state": row,
                "param_groups": [
                    {**group, "params": mine["params"]}
                    for group, mine in zip(groups[m * size : (m + 1) * size], own, strict=True)
                ],
            }
            for m, row in enumerate(rows)
        ]
        return {"models": models, "shapes": self._shapes(), "dtypes": self._dtypes(), "forms": _forms(models)}

    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(param.shape) for param in self._params()]

    def _dtypes(self) -> list[str]:
        return [str(param.dtype) for param in self._params()]  # as words, which torch.load takes from strangers

    def _check_state(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        if not {"models", "shapes", "dtypes", "forms"} <= state.keys():
            raise self._foreign("'models', 'shapes', 'dtypes' and 'forms'", sorted(map(str, state)))
        expected, shapes = self._shapes(), [tuple(shape) for shape in state["shapes"]]
        if shapes != expected:
            raise self._foreign(f"parameters of shapes {expected}", f"one for {shapes}")
        models, mine = state["models"], [group["params"] for group in self.lone[0].state_dict()["param_groups"]]
        numbered = [[list(group["params"]) for group in one["param_groups"]] for one in models]
        if numbered != [mine] * self.num_models:
            raise self._foreign(f"{self.num_models} models with parameters numbered {mine}", numbered)
        # A class keeps what it likes, so its state is whole if it has the form that was noted when it was saved.
        for m, form in enumerate(_forms(models)):
            if state["forms"][m : m + 1] != [form]:
                raise self._foreign(f"model {m} that keeps {state['forms'][m : m + 1]}", form)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self._gather()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole, saved = {**state, "state": defaultdict(dict)}, state["state"]
        if "lone" in self.__dict__:  # called by torch's load_state_dict
            self._load_models(saved)
            super().__setstate__(whole)
        else:  # a copy, whose parameters are not those that the original's views are of
            super().__setstate__(whole)
            params = [group["params"] for group in self.groups_of(0)]
            self.lone = _over_views(params, self.optimizer_cls, self._configs)
            self._load_models(saved)
        for m, lone in enumerate(self.lone):
            for own, group in zip(lone.param_groups, self.groups_of(m), strict=True):
                own.update(numbers_of(group))
        self._adopt_groups()

    def _load_models(self, saved: dict[str, Any]) -> None:
        exactly = saved["dtypes"] == self._dtypes()
        before = copy.deepcopy([lone.state_dict() for lone in self.lone])
        try:
            for lone, state in zip(self.lone, saved["models"], strict=True):
                _load(lone, state, exactly)
        except Exception:  # from a class's own way to load, when some models are loaded already
            for lone, state in zip(self.lone, before, strict=True):
                _load(lone, state, exactly=True)
            raise


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _forms(models: Sequence[dict[str, Any]]) -> list[dict[Any, Any]]:
    """Return names, shapes and dtypes of what M lone optimizers keep for each parameter."""

    def form(value: Any) -> Any:
        return [list(value.shape), str(value.dtype)] if isinstance(value, Tensor) else type(value).__name__

    def forms(kept: Any) -> Any:
        return {name: form(value) for name, value in kept.items()} if isinstance(kept, dict) else form(kept)

    return [{key: forms(kept) for key, kept in model["state"].items()} for model in models]


def _over_views(
    params: list[list[nn.Parameter]],
    optimizer_cls: type[torch.optim.Optimizer],
    configs: Sequence[Sequence[dict[str, Any]]],
) -> list[torch.optim.Optimizer]:
    def views(m: int) -> list[list[nn.Parameter]]:
        return [[nn.Parameter(p.detach()[m], requires_grad=p.requires_grad) for p in group] for group in params]

    return [construct(optimizer_cls, views(m), own, m) for m, own in enumerate(configs)]


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
