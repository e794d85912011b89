"""The optimizer that updates all M models in one pass over the stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.freeze import rows_where
from ..vmap import models_with_gradient
from .base import BatchOptimizer
from .each import Each
from .fused import can_fuse, fused_adam_, prefers_kernel
from .groups import Configs, Names, construct, lone_shapes, parameters_of
from .hyperparameters import ALL, Columns, ModelGroups, OptimizerClass, cut
from .rules import RULES, Rule, known_hyperparameters, ruled_class

_BLOCK = {"cpu": 8 << 20}  # bytes of parameters updated at once: what a rule makes on its way then takes little memory
_BLOCK_ELSEWHERE = 64 << 20  # and, on a CPU, stays in the cache: 256 LeNets' RMSprop takes 0.4 of the time


class StackedOptimizer(BatchOptimizer):
    """An optimizer of a batch whose update rule works on `[M, ...]` tensors, to the bits of M lone optimizers.

    The lone optimizers meant are torch.optim's for-loop implementations, the default on a CPU (`foreach` and `fused`
    round differently), and the bits are those of float32 parameters. In float64 a power of a hyperparameter may differ
    in its last bit (torch's vectorised `pow` against C's), in half precision a sum may. Muon, whose products are in
    bfloat16, is equal to that format's rounding. On a CPU, Adam and AdamW of models with 16,384 parameters and more, or
    of at most three models, take torch's fused kernel, to rounding, unless `fused=False` is given.

    It reads the stacked gradient itself, so there is no second copy of a gradient that could be out of date. `state`
    is keyed by the stacked parameters, like any torch optimizer's, and holds `[M, ...]` tensors under torch's own
    names; "step" is `[M]`, each model counting its own.
    """

    def __init__(self, batch: Any, optimizer_cls: OptimizerClass, configs: Configs, names: Names) -> None:
        # The class itself fills in and checks the numbers. Learning rates have been checked, so models that differ in
        # nothing else share one lone optimizer; unless the class makes something of them itself.
        own_init = optimizer_cls.__init__ is not ruled_class(optimizer_cls).__init__
        made: dict[str, torch.optim.Optimizer] = {}
        shapes = lone_shapes(batch, names)
        groups = []
        for m, config in ((m, config) for m, own in enumerate(configs) for config in own):
            rest = repr(sorted((n, "lr" if n == "lr" and not own_init else value) for n, value in config.items()))
            if rest not in made:
                made[rest] = construct(optimizer_cls, [shapes], [config], m)
            groups.append({**made[rest].param_groups[0], **({} if own_init else config)})
        lone = next(iter(made.values()))
        super().__init__(batch, optimizer_cls, configs, names, groups, lone.defaults)
        self._watch_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_groups()

    def _watch_groups(self) -> None:
        self.columns = self._columns_of(self.param_groups)
        groups = [group for own in zip(*(c.groups for c in self.columns), strict=True) for group in own]
        self.param_groups = ModelGroups(groups, self.num_models)

    def _columns_of(self, groups: Sequence[dict[str, Any]]) -> list[Columns]:
        """Return the columns of M models for each of their G groups."""
        known, size, rule = known_hyperparameters(ruled_class(self.optimizer_cls)), len(self._names), self.rule
        return [Columns(groups[g::size], known, rule.common, rule.with_none) for g in range(size)]

    @property
    def rule(self) -> Rule:
        """What `optimizer_cls` does to parameters `[M, ...]`."""
        return RULES[ruled_class(self.optimizer_cls)]

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._check_current()
        stopped = self._stopped()
        for params, columns in self.alike([param for param in self._params() if param.grad is not None]):
            grads = [_gradient(param) for param in params]
            states = [self.prepare(param, columns) for param in params]
            active = [self._active(param.grad, stopped) for param in params]
            if can_fuse(ruled_class(self.optimizer_cls), params, states, columns):
                fused_adam_(params, grads, states, columns, active)
                continue
            limited = zip(params, states, active, strict=True)
            kept = [(t, who) for p, state, who in limited if who is not None for t in (p, *state.values())]
            if params[0].is_complex() and self.rule.real_only:
                name = self.optimizer_cls.__name__
                raise RuntimeError(f"{name} does not support complex parameters: train them by another optimizer.")
            if params[0].is_complex():  # to torch.optim a complex number is a pair of real ones
                states = [{name: _real(value) for name, value in state.items()} for state in states]
            params, grads = [_real(param) for param in params], [_real(grad) for grad in grads]
            for rows in self._blocks(params):
                copies = [(tensor[rows], tensor[rows].clone(), who[rows]) for tensor, who in kept]
                own = states
                if rows is not ALL:
                    own = [{name: value[rows] for name, value in state.items()} for state in states]
                h = columns.at(cut(params, rows), rows)
                self.rule.update(Each(cut(params, rows)), Each(cut(grads, rows)), own, h)
                for tensor, copy, who in copies:
                    tensor.copy_(rows_where(who, tensor, copy))
        return loss

    def _blocks(self, params: list[Tensor]) -> list[slice]:
        """Return the models to update at once, block by block."""
        taken = sum(param.nbytes for param in params)
        size = max(1, self.num_models * _BLOCK.get(params[0].device.type, _BLOCK_ELSEWHERE) // max(1, taken))
        return [slice(m, m + size) for m in range(0, self.num_models, size)] if size < self.num_models else [ALL]

    def alike(self, params: Sequence[nn.Parameter]) -> list[tuple[list[nn.Parameter], Columns]]:
        """Divide parameters into lots of one group, device and dtype, each with its columns, brought up to date."""
        wanted, lots = set(map(id, params)), {}
        for param, columns in self._with_columns(self.columns):
            if id(param) in wanted:
                members, _ = lots.setdefault((columns, param.device, param.dtype), ([], columns))
                members.append(param)
        return list(lots.values())

    def _active(self, gradient: Tensor, stopped: Tensor | None) -> Tensor | None:
        """Return the models `[M]` whose parameter and its state this step may change, by its gradient; None for all.

        These are not the models that are stopped, and not those that have no gradient for the parameter: where models
        run one after the other, a step may use it for some of them only.
        """
        reached = models_with_gradient(gradient, self.num_models)
        if stopped is None:
            return reached
        active = ~stopped.to(gradient.device)
        return active if reached is None else active & reached

    def prepare(self, param: nn.Parameter, columns: Columns) -> dict[str, Tensor]:
        """Return the parameter's state, made where it is missing and moved where the batch was moved."""
        rule, state = self.rule, self.state.get(param)
        kept = rule.shapes(param.shape[1:]) if callable(rule.state) else rule.state
        kept = [*kept, *(name for name, needs in rule.optional.items() if columns.on(needs) is not False)]
        if not kept and state is None:
            return {}  # SGD without momentum
        state, device, dtype = self.state[param] if state is None else state, param.device, param.dtype
        for name in (*rule.counts, *kept):
            if name not in state:
                state[name] = self._start(name, param, columns)
        for name, value in state.items():
            if value.device != device or (value.dtype != dtype and name not in rule.counts):
                state[name] = value.to(device, value.dtype if name in rule.counts else dtype)
        return state

    def _start(self, name: str, param: nn.Parameter, columns: Columns) -> Tensor:
        """Return what a parameter's state is before the first step."""
        if name in self.rule.counts:
            wide = torch.get_default_dtype() == torch.float64  # as in torch.optim
            kind = {"dtype": torch.float64 if wide else torch.float32, "device": param.device}
            return torch.full((self.num_models,), self.rule.counts[name], **kind)
        shape = self.rule.shapes(param.shape[1:]).get(name, param.shape[1:])
        state = torch.zeros_like(param) if shape == param.shape[1:] else param.new_zeros(self.num_models, *shape)
        if name == "sum":
            real = _real(state.detach())  # torch starts both parts of a complex sum from the value
            h = columns.at([real])
            real += h.spread(h["initial_accumulator_value"])[0]
        return state.detach()

    def get_model_states(self, models: Iterable[int] | None = None) -> list[dict[str, Any]]:
        states = super().get_model_states(models)
        for g, columns in enumerate(self.columns):  # which kernel updates a model stays, however many it is then among
            trained = [param for param in columns.groups[0]["params"] if param.requires_grad]
            fused = prefers_kernel(ruled_class(self.optimizer_cls), trained, columns)
            for state in states:
                if state.get(f"param_groups/{g}/fused", False) is None:
                    state[f"param_groups/{g}/fused"] = fused
        return states

    get_model_states.__doc__ = BatchOptimizer.get_model_states.__doc__

    def _model_state(self, state: dict[Any, Any], m: int) -> dict[str, Any]:
        return {"state": {i: {name: value[m] for name, value in own.items()} for i, own in state.items()}}

    def _state_from(self, models: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
        unknown = {name for model in models for name in model if name != "state"}
        if unknown:
            raise self._foreign("'state' and 'param_groups'", f"{sorted(unknown)} too")
        state: dict[Any, Any] = {}
        for i, (param, columns) in enumerate(self._with_columns(self._columns_of(groups))):
            kept = [model["state"].get(i, {}) for model in models]
            for name in {name: None for own in kept for name in own}:
                # A model that has no such state yet begins as it would without the others.
                whole = self._start(name, param, columns)
                for m, value in ((m, own[name]) for m, own in enumerate(kept) if name in own):
                    if not isinstance(value, Tensor) or value.shape != whole.shape[1:]:
                        expected = f"{name!r} of shape {tuple(whole.shape[1:])}"
                        raise self._foreign(expected, f"one {_words(value)} for model {m}")
                    whole = whole.to(value.dtype)
                    whole[m] = value
                state.setdefault(i, {})[name] = whole
        return state

    def _with_columns(self, columns: Sequence[Columns]) -> list[tuple[nn.Parameter, Columns]]:
        """Return each parameter with the columns of its group, brought up to date."""
        for own in columns:
            own.refresh()
        return [(p, own) for own, group in zip(columns, self.groups_of(0), strict=True) for p in group["params"]]

    def _fill_state(self, lone: torch.optim.Optimizer, m: int) -> None:
        counts, optional, state = self.rule.counts, self.rule.optional, self.state_dict()["state"]
        groups = [group for group in lone.param_groups for _ in group["params"]]
        for i, (own, group) in enumerate(zip(parameters_of(lone.param_groups), groups, strict=True)):
            kept = {name: value.detach()[m] for name, value in state.get(i, {}).items()}
            if "momentum_steps" in kept:  # SGD counts nothing of its own, and has a buffer from its first momentum
                kept = {"momentum_buffer": kept["momentum_buffer"]} if kept["momentum_steps"] > 0 else {}
            else:
                kept = {name: value for name, value in kept.items() if name not in optional or group[optional[name]]}
            if kept:  # torch keeps counts on the CPU, whichever device the parameters are on
                lone.state[own] = {n: v.to("cpu" if n in counts else v.device, copy=True) for n, v in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's optimizers return, with groups of M models and state `[M, ...]`."""
        for param, columns in self._with_columns(self.columns):
            if self.state.get(param):
                self.prepare(param, columns)  # what was switched on since the last step has its state from here on
        return super().state_dict()

    def _load_state(self, state: dict[Any, Any], groups: Sequence[dict[str, Any]]) -> None:
        params, counts, optional = self._with_columns(self._columns_of(groups)), self.rule.counts, self.rule.optional
        unknown = set(state) - set(range(len(params)))
        if unknown:
            raise self._foreign(f"{len(params)} parameters", f"one for parameter {min(unknown, key=str)!r}")
        for i, (param, columns) in enumerate(params):
            shape, kept = f"a parameter of shape {tuple(param.shape)}", self.rule.shapes(param.shape[1:])
            for name, value in state.get(i, {}).items():
                is_state = isinstance(value, Tensor) and name in {*counts, *kept, *optional}
                if not is_state or _kind(value) != _kind(self._start(name, param, columns)):
                    raise self._foreign(shape, f"{name!r} {_words(value)}")
            needed = {*counts, *kept, *(n for n, flag in optional.items() if columns.on(flag) is not False)}
            if state.get(i) and needed - state[i].keys():
                raise self._foreign(shape, f"one without {sorted(needed - state[i].keys())}")
        self.state.clear()
        for i, own in state.items():
            param = params[i][0]
            for name, value in own.items():
                dtype = value.dtype if name in counts else param.dtype
                self.state[param][name] = value.detach().to(param.device, dtype, copy=True)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a state's tensor has to have in common with its parameter."""
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex(), tensor.layout, tensor.is_meta


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"that is a {type(value).__name__}"
    return f"of shape {tuple(value.shape)}, {value.dtype}, {value.layout} on {value.device}"


def _gradient(param: nn.Parameter) -> Tensor:
    if param.grad.is_sparse:
        told = f"Expected a dense gradient, got a sparse one for a parameter of shape {tuple(param.shape)}"
        raise RuntimeError(f"{told}: build the embedding with sparse=False.")
    return param.grad


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
