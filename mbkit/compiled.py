"""One training step as one compiled function: forward, losses, backward, clipping and update.

The step is traced with tensors that hold no numbers, through the very rules that the eager step goes through, and the
graph of plain operators that comes out goes to inductor, the compiler behind `torch.compile`. Random masks are drawn
outside it, from the models' own streams, and passed in; so are the hyperparameters, which change without compiling
again. What a graph cannot hold (a branch on a tensor's value, a layer that runs model by model, a hook, a tensor that a
call assigns anew) raises `CannotCompile` before any parameter or count has changed.

What a forward reads from elsewhere than its module, its arguments and constants is read when the step is traced, not at
every step: a global number that the user changes meanwhile, say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .chunks import is_watched
from .clipping import clip_by_norm_, norm_limits
from .loop import arguments
from .model_call import attempt
from .operators import HOOKS, LayoutMatters, named_modules, read_state, replica, tensors_in
from .optim.hyperparameters import Hyperparameters
from .optim.stacked import StackedOptimizer
from .stacked_call import call_losses

__all__ = ["CannotCompile", "CompiledStep"]

# Without the threshold each of a million weights would work out its model's bias correction anew, in double precision.
_OPTIONS = {"realize_opcount_threshold": 3}
_OF_TORCH = set(vars(nn.Module())) - {"training"}


class CannotCompile(RuntimeError):
    """The step holds something that a graph of operators cannot hold."""


class CompiledStep:
    """Makes the update that `batch_step` makes, as one compiled function; compiles anew where shapes or modes change.

    Args:
        batch: a ModelBatch of M models.
        optimizer: from OptimizerFactory, of a class that has a stacked rule.
        loss_fn: one model's outputs and targets to one number.
        max_norm: clip each model's gradient to this norm; one number, M, or None.
        shared_targets: as in ModelBatch.compute_loss.
        on_nonfinite: as for `fit`.
    """

    def __init__(
        self,
        batch: Any,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        max_norm: float | Sequence[float] | None = None,
        shared_targets: bool | None = None,
        on_nonfinite: str | None = None,
    ) -> None:
        self._on_nonfinite = on_nonfinite
        self.batch, self.optimizer, self.loss_fn = batch, optimizer, loss_fn
        self.max_norm, self.shared_targets = max_norm, shared_targets
        self.reason = ""
        self._programs: dict[Any, _Program] = {}

    def attempt(self, x: Any, y: Any) -> tuple[Tensor, Any] | None:
        """Make one update; return the losses [M] and the outputs from before it, detached.

        Where that cannot be, return None before anything is changed; `reason` says why.
        """
        try:
            return self._attempt(x, y)
        except CannotCompile as error:
            self.reason = str(error)
        return None

    def _attempt(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        _check(self.batch, self.optimizer)
        if self._on_nonfinite is not None:
            raise CannotCompile("on_nonfinite looks at each gradient before its update")
        self.batch.zero_grad()
        for columns in self.optimizer._columns:
            columns.refresh()
        leaves, spec = tree_flatten((x, y))
        kept = tensors_in(read_state(self.batch._template))
        key = self._key(leaves, spec, kept)
        if key not in self._programs:
            try:
                with warnings.catch_warnings():  # torch's compiler steps on torch's own deprecations
                    warnings.simplefilter("ignore", DeprecationWarning)
                    self._programs[key] = _Program(self, leaves, spec)
            except (CannotCompile, torch.OutOfMemoryError):
                raise
            except Exception as error:  # from the model, from make_fx, from the compiler: the eager step tells which
                raise CannotCompile(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        losses, outputs = self._programs[key](kept, leaves)
        self.batch.__dict__["latest_losses"] = losses
        self.optimizer._opt_called = True  # what torch's schedulers look at
        return losses, outputs

    def _key(self, leaves: list, spec: Any, kept: list[Tensor]) -> Any:
        """Return what the graph takes for granted: when it changes, another graph is needed."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + kept
        forms = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
        numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        modules = [_settings(module) for _, module in named_modules(self.batch._template)]
        modes = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_default_dtype())
        flags = tuple(columns.on(name) for columns in self.optimizer._columns for name in columns.names)
        return forms, modes, flags, repr((spec, numbers, modules))  # a repr where a value may have no hash


def _settings(module: nn.Module) -> list[Any]:
    """Return what a module's forward may read as Python values."""
    return [id(v) if isinstance(v, (Tensor, nn.Module)) else v for n, v in vars(module).items() if n not in _OF_TORCH]


def _check(batch: Any, optimizer: Any) -> None:
    if type(optimizer) is not StackedOptimizer:
        raise CannotCompile(f"{getattr(optimizer, 'optimizer_cls', type(optimizer)).__name__} has no stacked rule")
    if batch._frozen is not None:
        raise CannotCompile("a model is frozen")
    if any(p.is_complex() for p in batch.parameters()):
        raise CannotCompile("a parameter is complex")
    if batch.model_by_model:
        raise CannotCompile(f"{sorted(batch.model_by_model)} run model by model")
    for path, module in named_modules(batch._template):
        if any(vars(module)[hooks] for hooks in HOOKS):
            raise CannotCompile(f"'{path}' ({type(module).__name__}) has hooks")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise CannotCompile("the optimizer has hooks")
    if any(map(is_watched, batch.parameters())):
        raise CannotCompile("a parameter has hooks")


class _Draws:
    """Stands for the models' streams while a step is traced: notes which masks are drawn, and hands out stand-ins.

    Args:
        ready: the stand-ins, in the order in which they are asked for; when they run out, new ones are made.
    """

    def __init__(self, ready: Iterator[Tensor]) -> None:
        self._ready = ready
        self.wanted: list[tuple[Tensor, tuple[float, ...]]] = []

    def dropout_masks(self, like: Tensor, rates: Sequence[float]) -> Tensor:
        strides = (like.numel(), *like.stride())
        made = torch.empty_strided((len(rates), *like.shape), strides, dtype=like.dtype, device=like.device)
        self.wanted.append((like, tuple(rates)))
        return next(self._ready, made)

    def remember(self) -> Callable[[], None]:
        return lambda: None

    def take_turns(self, device: torch.device) -> Any:
        raise CannotCompile("an operator runs model by model")

    on = take_turns


class _Program:
    """One graph, compiled, with what it takes to call it.

    Args:
        step: says what is trained by what.
        leaves, spec: inputs and targets, flattened.
    """

    def __init__(self, step: CompiledStep, leaves: list, spec: Any) -> None:
        self._step, self._leaves, self._spec = step, leaves, spec
        self._optimizer, self._template = step.optimizer, step.batch._template
        self._kept = tensors_in(read_state(self._template))
        self._reached: list[int] | None = None  # the kept tensors that the loss depends on and that are trained
        self._masks: list[tuple[dict[str, Any], tuple[float, ...]]] = []
        blank = _Draws(iter(()))
        with torch.no_grad():
            self._trace(self._arguments(self._kept, leaves, blank))  # learns what is drawn and what is reached
            operands = self._arguments(self._kept, leaves, blank)
            options = _OPTIONS | {"triton.cudagraphs": self._kept[0].is_cuda}
            self._run = torch._inductor.compile(self._trace(operands), operands, options=options)
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __call__(self, kept: list[Tensor], leaves: list) -> tuple[Tensor, Any]:
        with torch.no_grad():
            losses, *outputs = self._run(*self._arguments(kept, leaves, self._step.batch.streams))
        return losses, tree_unflatten(outputs, self._output_spec)

    def _arguments(self, kept: list[Tensor], leaves: list, streams: Any) -> list[Tensor]:
        """Return the graph's arguments: for each lot of parameters its states and columns; then the rest."""
        lots = []
        for params, columns in self._optimizer.alike([kept[i] for i in self._reached or ()]):
            states = [self._optimizer._prepare(p, columns) for p in params]
            lots += [tensor for each in (*states, columns.at(params).columns) for tensor in each.values()]
        masks = [streams.dropout_masks(torch.empty_strided(**form), rates) for form, rates in self._masks]
        return [*lots, *kept, *(leaf for leaf in leaves if isinstance(leaf, Tensor)), *masks]

    def _trace(self, operands: list[Tensor]) -> torch.fx.GraphModule:
        try:
            graph = make_fx(self._step_of, tracing_mode="fake", _allow_non_fake_inputs=True)(*operands)
        except LayoutMatters:
            self._step.batch.__dict__["folding"] = False
            return self._trace(operands)
        _turn_products(graph.graph)
        graph.graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments and results, which torch.compile can enter
        graph.recompile()
        return graph

    def _step_of(self, *tensors: Tensor) -> list[Tensor]:
        """Make the step on stand-ins for its tensors; the operators are recorded."""
        step, remaining = self._step, iter(tensors)
        batch, optimizer, rule = step.batch, step.optimizer, step.optimizer._rule
        lots = []
        for params, columns in optimizer.alike([self._kept[i] for i in self._reached or ()]):
            states = [_fill(optimizer._prepare(p, columns), remaining) for p in params]
            h = columns.at(params)
            lots.append((params, states, _fill(h.columns, remaining), h.flags))
        kept = list(islice(remaining, len(self._kept)))
        draws = _Draws(remaining)
        mine = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        x, y = tree_unflatten(mine, self._spec)

        own = [t.detach().requires_grad_(k.requires_grad) for t, k in zip(kept, self._kept, strict=True)]
        own = [o if k.requires_grad else t for o, t, k in zip(own, kept, self._kept, strict=True)]
        twins = {id(k): o for k, o in zip(self._kept, own, strict=True)}
        template = replica(self._template, twins)
        facts = "num_models settings folding model_by_model".split()
        crew = SimpleNamespace(**{name: getattr(batch, name) for name in facts}, streams=draws, _slow_losses=set())
        before = read_state(template)
        attributes = [twins[id(t)] for t in batch._attributes]
        args, kwargs = arguments(x)
        with torch.enable_grad():
            outputs, after, _ = attempt(crew, template, before, attributes, args, kwargs, batch.shared_input)
            for path, _, name in before.keys() ^ after.keys() | {k for k in after if after[k] is not before.get(k)}:
                raise CannotCompile(f"a call assigns '{path}.{name}' anew".replace("'.", "'"))
            losses = call_losses(crew, outputs, y, step.loss_fn, step.shared_targets)
            trained = [i for i, t in enumerate(self._kept) if t.requires_grad]
            grads = torch.autograd.grad(losses.sum(), [own[i] for i in trained], allow_unused=True)
        reached = {i: grad for i, grad in zip(trained, grads, strict=True) if grad is not None}
        if step.max_norm is not None:
            clip_by_norm_(list(reached.values()), norm_limits(step.max_norm, batch.num_models), 2.0)
        place = {id(self._kept[i]): i for i in reached}
        for params, states, columns, flags in lots:
            places = [place[id(p)] for p in params]
            mine = [kept[i] for i in places]
            rule.update(mine, [reached[i] for i in places], states, Hyperparameters(columns, flags, mine))
        self._reached, self._masks = list(reached), [(_form(t), rates) for t, rates in draws.wanted]
        flat, self._output_spec = tree_flatten(outputs)
        return [losses.detach(), *(t.detach() for t in flat)]


def _turn_products(graph: torch.fx.Graph) -> None:
    """Where only the transpose of a product is used, make the product of the transposes, in the other order.

    A weight's gradient comes as such a transpose; next to the weight, row by row, it is read in vectors.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        turned = [user for user in node.users if user.target is aten.transpose.int and {*user.args[1:]} == {1, 2}]
        if not turned or len(turned) < len(node.users):
            continue
        with graph.inserting_before(node):
            first, second = (graph.call_function(aten.transpose.int, (factor, 1, 2)) for factor in node.args)
            product = graph.call_function(aten.bmm.default, (second, first))
        for user in turned:
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        graph.erase_node(node)


def _fill(names: Mapping[str, Tensor], tensors: Iterator[Tensor]) -> dict[str, Tensor]:
    return {name: next(tensors) for name in names}


def _form(tensor: Tensor) -> dict[str, Any]:
    """Return what `torch.empty_strided` needs to make one like it."""
    return {"size": tensor.shape, "stride": tensor.stride(), "dtype": tensor.dtype, "device": tensor.device}
