"""One training step as one compiled function: forward, losses, backward, clipping and update.

The step is traced with tensors that hold no numbers, through the very rules that the eager step goes through, and the
graph of plain operators that comes out goes to inductor, the compiler behind `torch.compile`. Random numbers are drawn
outside it, from the models' own streams, and passed in; so are the hyperparameters, which change without compiling
again. What a graph cannot hold (a branch on a tensor's value, a layer that runs model by model, a hook, a tensor that a
call assigns anew) raises `CannotCompile` before any parameter or count has changed.

Inductor keeps what it has compiled in its cache on disk, where other processes find it.

Python values that `forward` and `loss_fn` read are constants of the graph; `Guards` looks at them before each step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..batch.call import attempt
from ..batch.clip import clip_by_norm_, norm_limits
from ..batch.context import context_of
from ..batch.loss import call_losses
from ..common.checks import take_apart
from ..common.objects import flatten, unflatten
from ..optim.each import Each
from ..optim.hyperparameters import Hyperparameters
from ..vmap import LayoutMatters, State, TracedStreams, autocast_off, copy_module, rows_like
from .compilable import CannotCompile, check_graph, check_module, check_step
from .graph_passes import improve
from .guards import Guards
from .loop import arguments
from .options import StepOptions
from .replay import Replay

_MOST_CHANGES = 3  # of one value, that are compiled anew

# Inductor's cache for other processes goes by its options, and not by the instructions that its code is written for.
_SIMD_BITS = {"AVX2": 256, "AVX512": 512}


class CompiledStep:
    """Makes the update that `batch_step` makes, as one compiled function.

    It is compiled anew where shapes, modes or a Python value that `forward` or `loss_fn` read change; after three such
    changes of one value, the step cannot be compiled. A call that changes something itself (a count, a list, a random
    generator of Python's) cannot be compiled either. What `Guards` cannot see must not change: the clock, the
    environment, files, attributes reached by a name put together while running. What a call prints is printed only
    when it is compiled.

    Args:
        batch: a ModelBatch of M models.
        optimizer: from OptimizerFactory, of a class that has a stacked rule.
        options: what the steps have in common.
    """

    def __init__(self, batch: Any, optimizer: Any, options: StepOptions) -> None:
        self.batch, self.optimizer, self.options = batch, optimizer, options
        self.settings = options.settings_of(batch.num_models)
        self.reason = ""
        self._programs: dict[Any, _Program] = {}
        self._guards: Guards | None = None
        self._kept: list[Tensor] = []
        self._form: tuple = ()  # of all that a graph takes for granted beside a batch's form
        self._changed = ""  # the value because of which another graph may be needed
        self._changes: Counter[str] = Counter()

    def attempt(self, x: Any, y: Any) -> tuple[Tensor, Any] | None:
        """Make one update; return the losses [M] and the outputs from before it, detached.

        Where that cannot be, return None before anything is changed; `reason` says why, and is empty where only this
        step cannot be: an index is out of range, or a check of a distribution's fails, so that the eager step raises.
        """
        self.reason = ""
        leaves, spec = tree_flatten((x, y))
        try:
            program = self._program(leaves, spec)
        except CannotCompile as error:
            self.reason = str(error)
            return None
        except Exception as error:  # from the model, from make_fx, from the compiler: the eager step tells which
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        made = program(self._kept, leaves)
        if made is not None:
            context_of(self.batch).latest_losses = made[0]
            self.optimizer.note_step()
        return made

    def _program(self, leaves: list, spec: Any) -> _Program:
        """Return the graph for this step, compiled.

        Raises:
            CannotCompile: there is none, or another one would be needed over and over.
        """
        if self.options.on_nonfinite is not None:
            raise CannotCompile("on_nonfinite looks at each gradient before its update")
        self._keep_up()
        if any(p.grad is not None for p in self._kept if isinstance(p, nn.Parameter)):
            self.batch.zero_grad()
        key = self._key(leaves, spec)
        if key not in self._programs:
            self._changes[self._changed] += 1
            if self._changed and self._changes[self._changed] > _MOST_CHANGES:
                told = f"{self._changed} keeps changing, and each new value is compiled anew: make it a buffer"
                raise CannotCompile(f"{told} of the module's, or pass it with the inputs or targets")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler steps on torch's own
                self._programs[key] = _Program(self, leaves, spec)
        self._changed = ""
        return self._programs[key]

    def _keep_up(self) -> None:
        """Look at the values again, unless they and the batch's tensors are as they were at the last step."""
        template = context_of(self.batch).template
        check_step(self.batch, self.optimizer)
        for columns in self.optimizer.columns:
            columns.refresh()
        if self._guards is not None and self._guards.same:
            return
        before, self._guards = self._guards, None
        check_module(template)
        self._kept = State(template).tensors
        roots = {"": template, "loss_fn": self.options.loss_fn, "loss_settings": self.settings.values}
        guards = Guards(roots, self._kept)
        if before is not None:
            pairs = zip_longest(before.marks, guards.marks, fillvalue=("", None))
            self._changed = next((new[0] or old[0] for old, new in pairs if old != new), "")
        self._guards, self._form = guards, (tuple(guards.marks), tuple(map(_form, self._kept)))
        for program in self._programs.values():
            program.sources = None

    def _key(self, leaves: list, spec: Any) -> Any:
        """Return what the graph takes for granted: when it changes, another graph is needed."""
        forms = tuple(_form(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        numbers = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        modes = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
        modes.append(torch.get_default_dtype())
        flags = tuple(columns.on(name) for columns in self.optimizer.columns for name in columns.names)
        return forms, *modes, flags, self._form, repr((spec, numbers))  # a number may have no hash


def _form(tensor: Tensor) -> tuple:
    """Return what a graph takes for granted of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


class _Program:
    """One graph, compiled for inputs and targets like these `leaves`, flattened, with what it takes to call it."""

    def __init__(self, step: CompiledStep, leaves: list, spec: Any) -> None:
        self._step, self._leaves, self._spec = step, leaves, spec
        self._optimizer, self._template = step.optimizer, context_of(step.batch).template
        self._kept = State(self._template).tensors
        self._reached: list[int] | None = None  # the kept tensors that the loss depends on and that are trained
        self._guards = step._guards  # which keeps alive what the key goes by
        self._draws: list[tuple] = []
        self._assumes = False  # whether the graph takes conditions for true
        self.sources: list[Mapping[str, Tensor]] | None = None  # states and columns, until the batch changes
        blank = TracedStreams(step.batch.num_models, iter(()))
        with torch.no_grad():
            self._trace(self._arguments(self._kept, leaves, blank))  # learns what is drawn, assumed and reached
            operands = self._arguments(self._kept, leaves, blank)
            width = _SIMD_BITS.get(torch.backends.cpu.get_cpu_capability())
            graph = self._trace(operands)
            mode = FakeTensorMode(shape_env=ShapeEnv())  # without it, inductor keeps nothing for other processes
            forms = [mode.from_tensor(operand, static_shapes=True) for operand in operands]
            with tracing(TracingContext(mode)), autocast_off(self._kept[0].device.type):  # its casts are in the graph
                self._run = torch._inductor.compile(graph, forms, options={"cpp.simdlen": width})
        if all(operand.is_cuda for operand in operands):
            self._run = Replay(self._run, sum(isinstance(leaf, Tensor) for leaf in leaves) + len(self._draws))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __call__(self, kept: list[Tensor], leaves: list) -> tuple[Tensor, Any] | None:
        """Make the step; return None, with nothing changed, where a condition that the graph takes for true is not."""
        streams = self._step.batch.streams
        undo = streams.remember() if self._assumes and self._draws else None
        with torch.no_grad(), autocast_off(kept[0].device.type):
            losses, *outputs = self._run(*self._arguments(kept, leaves, streams))
        if self._assumes and not outputs.pop(0):
            if undo is not None:
                undo()
            return None
        made = iter(outputs)
        leaves = [next(made) if leaf is Tensor else leaf for leaf in self._output_leaves]
        return losses, unflatten(leaves, self._output_spec)

    def _arguments(self, kept: list[Tensor], leaves: list, streams: Any) -> list[Tensor]:
        """Return the graph's arguments: for each lot of parameters its states and columns; then the rest."""
        lots = [tensor for each in self._sources(kept) for tensor in each.values()]
        drawn = [streams.fill(*draw) for draw in self._draws]
        return [*lots, *kept, *(leaf for leaf in leaves if isinstance(leaf, Tensor)), *drawn]

    def _sources(self, kept: list[Tensor]) -> list[Mapping[str, Tensor]]:
        """Return where states and columns are: the dicts of the last step, unless others have taken their places."""
        optimizer = self._optimizer
        stale = self.sources is None or self._columns is not optimizer.columns
        if stale or any(optimizer.state.get(param) is not state for param, state in self._states):
            self._columns, self._states, self.sources = optimizer.columns, [], []
            for params, columns in optimizer.alike([kept[i] for i in self._reached or ()]):
                states = [optimizer.prepare(p, columns) for p in params]
                self._states += [(p, state) for p, state in zip(params, states, strict=True) if state]
                self.sources += [*states, columns.at(params).columns]
        return self.sources

    def _trace(self, operands: list[Tensor]) -> torch.fx.GraphModule:
        try:
            with self._guards.untouched():
                graph = make_fx(self._step_of, tracing_mode="fake", _allow_non_fake_inputs=True)(*operands)
        except LayoutMatters:
            context_of(self._step.batch).folding = False
            return self._trace(operands)
        self._draws = [(method, rows_like(like, 1)[0], *settings) for method, like, *settings in self._draws]
        check_graph(graph.graph)
        improve(graph.graph)
        graph.graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments and results, which torch.compile can enter
        graph.recompile()
        return graph

    def _step_of(self, *tensors: Tensor) -> list[Tensor]:
        """Make the step on stand-ins for its tensors; the operators are recorded."""
        step, given = self._step, tensors
        if self._assumes:  # edits are made to copies, which exist in no compiled step
            tensors = [t.clone().requires_grad_(t.requires_grad) for t in given]
        versions, remaining = [t._version for t in tensors], iter(tensors)
        whole, optimizer, rule = context_of(step.batch), step.optimizer, step.optimizer.rule
        lots = []
        for params, columns in optimizer.alike([self._kept[i] for i in self._reached or ()]):
            states = [_fill(optimizer.prepare(p, columns), remaining) for p in params]
            h = columns.at(params)
            lots.append((params, states, _fill(h.columns, remaining), h.flags))
        kept = list(islice(remaining, len(self._kept)))
        streams = TracedStreams(whole.num_models, remaining)
        mine = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        x, y = tree_unflatten(mine, self._spec)

        own = [t.detach().requires_grad_(k.requires_grad) for t, k in zip(kept, self._kept, strict=True)]
        own = [o if k.requires_grad else t for o, t, k in zip(own, kept, self._kept, strict=True)]
        twins = {id(k): o for k, o in zip(self._kept, own, strict=True)}
        template = copy_module(self._template, twins)
        before = State(template)
        attributes = [twins[id(t)] for t in whole.attributes]
        mine = {"template": template, "attributes": attributes, "streams": streams, "slow_losses": set()}
        context = replace(whole, **mine, traced=True)
        with torch.enable_grad():
            outputs, changes, _ = attempt(context, before, *take_apart(*arguments(x)), whole.shared_input)
            for path, _, name in changes:
                raise CannotCompile(f"a call assigns '{path}.{name}' anew".replace("'.", "'"))
            losses = call_losses(context, outputs, y, step.options.loss_fn, step.options.forms, step.settings)
            total, trained = losses.sum(), [i for i, t in enumerate(self._kept) if t.requires_grad]
        with autocast_off(losses.device.type):
            grads = torch.autograd.grad(total, [own[i] for i in trained], allow_unused=True)
            reached = {i: grad for i, grad in zip(trained, grads, strict=True) if grad is not None}
            if step.options.max_norm is not None:
                clip_by_norm_(list(reached.values()), norm_limits(step.options.max_norm, whole.num_models), 2.0)
            place = {id(self._kept[i]): i for i in reached}
            for params, states, columns, flags in lots:
                places = [place[id(p)] for p in params]
                mine = Each(kept[i] for i in places)
                rule.update(mine, Each(reached[i] for i in places), states, Hyperparameters(columns, flags, mine))
        self._reached, self.sources = list(reached), None
        leaves, self._output_spec = flatten(outputs)
        self._output_leaves = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        results = [losses.detach(), *(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor))]
        if self._assumes:
            hold = torch.stack([condition.all() for condition in streams.assumed]).all()
            buffers = {id(t) for t, k in zip(kept, self._kept, strict=True) if not isinstance(k, nn.Parameter)}
            for old, new, version in zip(given, tensors, versions, strict=True):
                if new._version != version or id(new) in buffers:  # BatchNorm's kernels count no versions
                    old.copy_(torch.where(hold, new, old))
            results.insert(1, hold)
        self._draws, self._assumes = streams.wanted, bool(streams.assumed)
        return results


def _fill(names: Mapping[str, Tensor], tensors: Iterator[Tensor]) -> dict[str, Tensor]:
    return {name: next(tensors) for name in names}
