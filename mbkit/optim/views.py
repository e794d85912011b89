"""The optimizer for every class without a stacked rule: M lone optimizers over views of the stacked parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..vmap import models_with_gradient
from .base import BatchOptimizer, construct, numbers_of, parameters_of

__all__ = ["ViewsOptimizer"]


class ViewsOptimizer(BatchOptimizer):
    """An optimizer of a batch that runs one lone `optimizer_cls` a model: no faster than M lone ones, exact by nature.

    Each lone optimizer owns one model's slices of the stacked parameters, as views. During a step, and only then,
    each view's gradient is a view of the stacked gradient. `param_groups` can be read and written as in any optimizer
    of a batch; model m's state is in `lone[m].state`.

    One optimizer with M groups would do for torch's own classes. But some people's optimizers reckon over all groups
    at once (a global norm, a common step size), and would mix the models without a word.
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

    def _update(self) -> None:
        params = self._params()
        self._follow(params)
        stopped = self._stopped()
        stopped = [False] * self.num_models if stopped is None else stopped.tolist()
        reached = [None if p.grad is None else models_with_gradient(p.grad, self.num_models) for p in params]
        reached = [None if models is None else models.tolist() for models in reached]
        for m, lone in enumerate(self.lone):
            if stopped[m]:
                continue
            groups, views = self.groups_of(m), parameters_of(lone.param_groups)
            for own, group in zip(lone.param_groups, groups, strict=True):
                own.update(numbers_of(group))
            try:
                for view, param, has in zip(views, params, reached, strict=True):
                    view.grad = None if param.grad is None or (has and not has[m]) else param.grad[m]
                lone.step()
            finally:
                for view in views:
                    view.grad = None
            for own, group in zip(lone.param_groups, groups, strict=True):
                group.update(numbers_of(own))  # some classes write their own step size there

    def _follow(self, params: list[nn.Parameter]) -> None:
        """Point the views at the parameters' present memory: `batch.to()` and `batch.double()` give them another."""
        views = [parameters_of(lone.param_groups) for lone in self.lone]
        for i, param in enumerate(params):
            first = views[0][i]
            if first.data_ptr() == param.data_ptr() and first.dtype == param.dtype and first.device == param.device:
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

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and under `["state"]["models"]` the M lone optimizers' own states."""
        self.state = self._gather()
        packed = super().state_dict()
        self.state = defaultdict(dict)
        return packed

    def _gather(self) -> defaultdict[Any, Any]:
        self._follow(self._params())
        models = [lone.state_dict() for lone in self.lone]
        return defaultdict(dict, models=models, shapes=self._shapes(), dtypes=self._dtypes())

    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(param.shape) for param in self._params()]

    def _dtypes(self) -> list[str]:
        return [str(param.dtype) for param in self._params()]  # as words, which torch.load takes from strangers

    def _check_state(self, state: dict[Any, Any]) -> None:
        expected = self._shapes()
        shapes = [tuple(shape) for shape in state.get("shapes", ())]
        if shapes != expected:
            raise ValueError(
                f"Expected the state of {self.optimizer_cls.__name__} for parameters of shapes {expected}, got one for "
                f"{shapes}: load the state into the optimizer and the architecture that it was saved from."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self._gather()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by torch's load_state_dict
        if "lone" not in self.__dict__:  # a copy, whose parameters are not those that the original's views are of
            params = [group["params"] for group in self.groups_of(0)]
            self.lone = _over_views(params, self.optimizer_cls, self._configs)
        exactly = self.state["dtypes"] == self._dtypes()  # type: ignore[index]
        for lone, saved in zip(self.lone, self.state["models"], strict=True):  # type: ignore[index]
            _load(lone, saved, exactly)
        self.state = defaultdict(dict)


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
