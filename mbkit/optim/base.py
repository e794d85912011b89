"""What all optimizers of a batch share: one group per model, the batch's own gradients, a way out for one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..batch.context import context_of
from ..common.checks import model_numbers
from .groups import Configs, Names, construct, parameters_of
from .hyperparameters import SWITCHES, OptimizerClass, numbers_of
from .model_states import CanSelect, shapes_in

_HOOKS = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


class BatchOptimizer(CanSelect, torch.optim.Optimizer):
    """Base of the optimizers that `OptimizerFactory` makes: a `torch.optim.Optimizer` over a batch.

    A subclass gives `_update(closure)`, the step itself, without gradients; `_fill_state(lone, m)`, which gives a fresh
    lone optimizer a copy of model m's state; `_load_state(state, groups)`, which takes over a copy of a state, or
    refuses one that is not whole, or is another optimizer's or architecture's; and `_watch_groups()`, which turns
    `param_groups` of plain dicts into ones that notice what is written into them.

    `param_groups[m]` holds model m's hyperparameters as plain numbers; read and write them at any time. Group 0's
    "params" lists the stacked parameters and the other groups' lists are empty, because a stacked parameter belongs
    to all models at once: so all groups together hold each parameter once. torch's own tools that walk over them see
    `[M, ...]`. Where a tool takes norms over them, it mixes the models: clip by `batch.clip_grad_norm_` and scale by
    mbkit's `GradScaler`, not by torch's. So does a ReduceLROnPlateau that gets one number for all models: make one per
    model by `OptimizerFactory.create_lr_scheduler`.

    Where each model's parameters are in G groups, `param_groups` holds model 0's G groups, then model 1's, and so on;
    `groups_of(m)` are model m's, and model 0's list the stacked parameters.

    Args:
        batch: the `ModelBatch`.
        optimizer_cls: the torch.optim class to follow.
        configs: M lists of G dicts of keyword arguments for `optimizer_cls`.
        names: G lists of parameters' names, each parameter in one of them at most.
        groups: M x G dicts, the group of the lone optimizer that each config makes.
        defaults: a lone optimizer's `defaults`.
    """

    def __init__(
        self,
        batch: Any,
        optimizer_cls: OptimizerClass,
        configs: Configs,
        names: Names,
        groups: Sequence[dict[str, Any]],
        defaults: dict[str, Any],
    ) -> None:
        params = [[batch.stacked_params[name] for name in group] for group in names]
        # torch's add_param_group compares a group with all before it: quadratic in M, so it sees model 0's only.
        super().__init__([{"params": group} for group in params], dict(defaults))
        params += [[] for _ in range(len(groups) - len(names))]
        self.param_groups = [{**group, "params": own} for group, own in zip(groups, params, strict=True)]
        self.batch = batch
        self.optimizer_cls = optimizer_cls
        self._configs, self._names = configs, names
        self._skipped: Tensor | None = None  # [M], the models that a GradScaler leaves out of this step

    @property
    def num_models(self) -> int:
        """M."""
        return self.batch.num_models

    @property
    def configs(self) -> list[list[dict[str, Any]]]:
        """The hyperparameters that it was made with: M lists with a dict for each group of a model's parameters."""
        return [[dict(config) for config in own] for own in self._configs]

    def groups_of(self, m: int) -> list[dict[str, Any]]:
        """Return model m's entries of `param_groups`: one, or one for each group of its parameters."""
        size = len(self._names)
        return self.param_groups[m * size : (m + 1) * size]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all models from the gradients that the stacked parameters hold now.

        Args:
            closure: computes the losses and their gradients anew, and returns the losses `[M]`, or their sum. A class
                without a stacked rule may call it several times a step, as SAM and LBFGS do: each call is one for all
                models that ask for it, while nothing changes of those that have finished their step.

        Returns:
            What the closure returned, or what the models' own steps did; without a closure None.

        Raises:
            RuntimeError: the batch's parameters are no longer the ones that this optimizer was made for.
            TypeError: the class needs a closure, or reads each model's loss where the closure returned their sum.
        """
        hooks = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_HOOKS
        watched = any(hooks) or torch.autograd._profiler_enabled()
        step = self._watched_step if watched else self._step
        return step() if closure is None else step(closure)

    step.hooked = True  # torch wraps other steps in a range for its profiler, which takes as long as a layer

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.no_grad():
            loss = self._update(closure)
        self.note_step()
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)  # for hooks and the profiler

    def note_step(self) -> None:
        """Note that a step was made: torch's schedulers ask before they complain about the order of calls."""
        self._opt_called = True

    def _stopped(self) -> Tensor | None:
        """Return the models that take no part in this step, `[M]`; None if all do."""
        masks = [mask for mask in (context_of(self.batch).frozen, self._skipped) if mask is not None]
        if not masks:
            return None
        stopped = torch.stack([mask.to(masks[-1].device) for mask in masks]).any(0)
        # Nothing waits for a device; but on a CPU a mask of nobody may not cost anything.
        return None if stopped.device.type == "cpu" and not stopped.any() else stopped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the stacked gradients of the parameters that it trains, the only ones that there are."""
        for param in self._params():
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the groups are the models."""
        if "batch" in self.__dict__:
            told = f"Expected {len(self.param_groups)} groups (of {self.num_models} models), got a further one"
            raise RuntimeError(f"{told}: build a batch of more models, or name groups in create_optimizer(groups=[…]).")
        super().add_param_group(param_group)

    def unstack(self, m: int, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return an `optimizer_cls` over one model, with model m's hyperparameters and state as they are now.

        Training goes on alone from here exactly as it would in the batch.

        Args:
            m: the model, 0 to M - 1 (or negative, from the end).
            model: a module from `batch[m]`, when you have one already; its weights are left as they are.

        Returns:
            The optimizer, its `.model` the module it trains.

        Raises:
            IndexError: there is no model m.
            ValueError: `model` has other parameters than the batch's models.

        Example:
            >>> import torch
            >>> from mbkit import ModelBatch, OptimizerFactory
            >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(2)])
            >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=[0.1, 0.01])
            >>> lone = optimizer.unstack(1)
            >>> type(lone).__name__, lone.param_groups[0]["lr"], type(lone.model).__name__
            ('Adam', 0.01, 'Linear')
        """
        (m,) = model_numbers([m], self.num_models)
        model = self.batch[m] if model is None else model
        parameters, wanted = dict(model.named_parameters()), shapes_in(self.batch)
        got = ", ".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items())
        if got != wanted:
            raise ValueError(f"Expected a module with the parameters {wanted}, got {got}: pass batch[{m}], or nothing.")
        params = [[parameters[name] for name in group] for group in self._names]
        lone = construct(self.optimizer_cls, params, self._configs[m], m)
        self._fill_state(lone, m)
        for own, group in zip(lone.param_groups, self.groups_of(m), strict=True):
            own.update({name: value for name, value in numbers_of(group).items() if name not in SWITCHES})
        lone.model = model  # type: ignore[attr-defined]
        return lone

    # ---- staying whole through torch's own copying, pickling and loading

    def __getstate__(self) -> dict[str, Any]:
        own = ("batch", "optimizer_cls", "_configs", "_names")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_skipped": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; training goes on to the same bits.

        It differs from torch's in that all is checked before the first number changes, that nothing is shared with
        the state that was loaded, that counts keep their own dtype, and that hooks on loading are not called.

        Raises:
            ValueError: the state belongs to another number of models, another architecture or another optimizer, or a
                part of it is missing.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"Expected 'state' and 'param_groups', got {got}: pass what state_dict() returned.")
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            expected = f"{self.num_models} models with {len(self._names)} group(s) of parameters each"
            raise self._foreign(expected, f"one of {len(groups)} groups")
        groups = self._whole(groups)
        count = iter(range(len(self._params())))
        expected = [[next(count) for _ in group["params"]] for group in self.param_groups]
        got = [list(group["params"]) for group in groups]
        if got != expected:
            raise self._foreign(f"parameters numbered {expected[: len(self._names)]} in the groups", got)
        self._load_state(state_dict["state"], groups)
        for own, group in zip(self.param_groups, groups, strict=True):
            params = own["params"]
            own.clear()
            own.update({**group, "params": params})

    def _whole(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return groups that were saved, with the flags that newer versions of torch have given to some classes."""
        flags = {name: value for name, value in self.defaults.items() if isinstance(value, bool)}
        for group in groups:
            missing = [name for name in self.defaults if name not in {*group, *flags, *SWITCHES}]
            if missing:
                raise self._foreign("groups with all hyperparameters", f"one without {', '.join(missing)}")
        return [{**flags, **group} for group in groups]

    def _foreign(self, expected: str, got: Any) -> ValueError:
        told = f"Expected the state of {self.optimizer_cls.__name__} for {expected}, got {got}"
        return ValueError(f"{told}: load it into a batch and an optimizer like those that it was saved from.")

    def _params(self) -> list[nn.Parameter]:
        return parameters_of(self.groups_of(0))

    def _check_current(self) -> None:
        """Refuse to go on where no gradient can come, because the batch has got other parameters."""
        params = self._params()
        if any(p.grad is not None for p in params):
            return
        if not set(map(id, self.batch.stacked_params.values())).issuperset(map(id, params)):
            told = "Expected the parameters that this optimizer was made for, got others in the batch"
            raise RuntimeError(f"{told}, so no gradient reaches it: create a new optimizer for the batch.")
