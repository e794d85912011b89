"""Where diagnose runs its experiments: batches made anew, trained a step or two under control, and read."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only

from ..common.checks import memory_of
from ..common.random_streams import OwnDraws
from ..training.loop import call, part
from ..training.sequential import own_targets
from .subject import Recipe

__all__ = ["Laboratory", "Lone", "Run", "Values", "apart", "quiet"]

FEW = 16  # examples in an experiment's batch: a fault does not hide from them, and they are quick
Values = list[dict[str, Tensor]]  # model -> name -> numbers


@dataclass
class Run:
    """What was read of one batch: before its first step, and after each."""

    start: Values
    unlike: list[tuple[float, int, str]]  # initial parameters other than those given: how far, model, name
    parameters: list[Values] = field(default_factory=list)
    gradients: list[Values] = field(default_factory=list)
    states: list[Values] = field(default_factory=list)
    rates: list[list[float] | None] = field(default_factory=list)
    shared: list[tuple[str, str, int, int]] = field(default_factory=list)  # kind, name, and two models


class Laboratory:
    """Makes batches by somebody's recipe, from models, hyperparameters and losses that the experiment chooses.

    Args:
        build: the recipe. models: M lone models. configs: M dicts. seeds: M numbers.
        data: the batches, in the order in which the lone models see them; experiments use their first few examples.
        loss_fn: one model's outputs and targets to one number.
        shared_input: False where inputs are [M, B, ...].
        dtype: of the experiments, or None for the models' own.
    """

    def __init__(
        self,
        build: Recipe,
        models: Sequence[nn.Module],
        configs: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        data: Sequence[tuple[Any, Any]],
        loss_fn: Callable[[Any, Any], Tensor],
        shared_input: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.build, self.seeds, self.given = build, list(seeds), list(data)
        self.models = [copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype) for model in models]
        self.data = [_few(pair, 0 if shared_input else 1, dtype) for pair in data]
        self.configs = [dict(config) for config in configs]
        self.loss_fn, self.shared_input = loss_fn, shared_input
        self.names = [name for name, _ in self.models[0].named_parameters()]
        self.num_models = len(self.models)

    def run(self, *scales: float, models: Any = None, configs: Any = None, seeds: Any = None) -> Run:
        """Make a batch, train it one step for each scale, with its loss times that scale, and read it.

        Where it does not start from the models given, and can be written, they are written into it: an experiment
        must begin from a known state. Torch's default generator starts from the same place each time.
        """
        models = self.models if models is None else models
        configs = self.configs if configs is None else configs
        given = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = self.build(copy.deepcopy(list(models)), copy.deepcopy(list(configs)), list(seeds or self.seeds))

            def read(reader: Callable[[int], Mapping[str, Tensor]]) -> Values:
                return [{n: value.detach().clone() for n, value in reader(m).items()} for m in range(len(models))]

            start = read(made.parameters)
            gaps = [(apart(start[m][n], given[m][n]), m, n) for m in range(len(models)) for n in self.names]
            run = Run(start, sorted((gap for gap in gaps if gap[0] > 0), key=lambda gap: -gap[0]))
            if run.unlike and hasattr(made, "load"):
                for m, values in enumerate(given):
                    made.load(m, values)
                run.start = read(made.parameters)
            run.rates.append(_rates(made, len(models)))
            for (x, y), scale in zip(self.data, scales, strict=False):
                # Powers of two change no digit of any gradient.
                made.step(_fresh(x), y, lambda outputs, y, scale=scale: self.loss_fn(outputs, y) * scale)
                run.parameters.append(read(made.parameters))
                run.gradients.append(read(made.gradients))
                run.states.append(read(lambda m: _flat(made.optimizer_state(m))))
                run.rates.append(_rates(made, len(models)))
                if len(run.parameters) == 1 and len(models) > 1:
                    run.shared = _shared(made, len(models))
        return run

    def own(self, k: int, m: int) -> tuple[Any, Any]:
        """Return model m's inputs and targets in batch k."""
        x, y = self.data[k]
        x = x if self.shared_input else part(x, m)
        return x, own_targets(y, x, m, self.num_models, None if self.shared_input else False)

    def walk(self) -> list[tuple[Any, Any]] | None:
        """Return the batches that the batch would train on by itself, or None where it takes what it is given."""
        made = self.build(copy.deepcopy(self.models), copy.deepcopy(self.configs), self.seeds)
        return list(itertools.islice(made.walk(self.given), len(self.given))) if hasattr(made, "walk") else None

    def groups(self) -> list[set[int]]:
        """Return few groups of models, such that for any two models one group has the first without the second.

        Each model gets a set of groups of its own, all sets of one size, so that none contains another: six groups
        are enough for twenty models.
        """
        if self.num_models == 1:
            return []
        count = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= self.num_models)
        sets = itertools.islice(itertools.combinations(range(count), count // 2), self.num_models)
        chosen = list(enumerate(sets))
        return [{m for m, own in chosen if group in own} for group in range(count)]

    def perturbed(self, models: Sequence[nn.Module], group: set[int], spared: set[str]) -> list[nn.Module]:
        """Return copies of the models, the parameters of those in `group` moved, but for the names `spared`."""
        models, generator = copy.deepcopy(list(models)), torch.Generator().manual_seed(1)
        for m in sorted(group):
            for name, p in models[m].named_parameters():
                size = p.detach().abs().mean().item() or 0.1
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                if name not in spared:
                    p.data.add_(noise.to(p), alpha=size)
        return models


class Lone:
    """One model alone, with plain autograd and a random state of its own.

    Args:
        model: copied. seed: of its random state. training: its mode.
    """

    def __init__(self, model: nn.Module, seed: int, training: bool) -> None:
        self.model, self.draws = copy.deepcopy(model).train(training), OwnDraws(seed)

    def gradients(self, parameters: Mapping[str, Tensor], x: Any, y: Any, loss_fn: Callable) -> dict[str, Tensor]:
        """Return the gradient at `parameters`."""
        own = dict(self.model.named_parameters())
        for name, value in parameters.items():
            own[name].data.copy_(value)
        self.model.zero_grad()
        with self.draws.current():
            loss_fn(call(self.model, _fresh(x)), y).backward()
        return {name: p.grad for name, p in own.items() if p.grad is not None}


def quiet(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose layers draw nothing: dropout rates are 0, and RReLU has one slope."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.RReLU):
            module.lower = module.upper = (module.lower + module.upper) / 2
        elif isinstance(getattr(module, "dropout", None), float):  # attention and recurrent layers
            module.dropout = 0.0
    return model


def apart(a: Tensor | None, b: Tensor | None) -> float:
    """Return the length of the difference over that of the longer one: 0 where they are alike to the last bit.

    Example:
        >>> apart(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])), apart(None, torch.zeros(2))
        (0.5, 0.0)
    """
    a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
    if torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())):
        return 0.0
    length = max(torch.linalg.vector_norm(a).item(), torch.linalg.vector_norm(b).item())
    gap = torch.linalg.vector_norm(a - b).item() / length
    return gap if gap == gap else torch.inf


def _few(pair: Any, dim: int, dtype: torch.dtype | None) -> Any:
    """Return a batch's first examples, where all its tensors have one number of them, as `dtype`."""
    leaves = [leaf for leaf in tree_leaves(pair) if isinstance(leaf, Tensor)]
    alike = all(leaf.dim() > dim for leaf in leaves) and len({leaf.shape[dim] for leaf in leaves}) == 1

    def cut(leaf: Tensor) -> Tensor:
        leaf = leaf.narrow(dim, 0, min(FEW, leaf.shape[dim])) if alike else leaf
        return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf

    return tree_map_only(Tensor, cut, pair)


def _fresh(tree: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, tree)  # a model may write into its inputs


def _rates(made: Any, num_models: int) -> list[float] | None:
    rates = [made.learning_rate(m) for m in range(num_models)] if hasattr(made, "learning_rate") else [None]
    return None if None in rates else rates


def _flat(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {(name, key): v for name, own in states.items() for key, v in own.items() if isinstance(v, Tensor)}


def _shared(made: Any, num_models: int) -> list[tuple[str, str, int, int]]:
    """Find numbers of different models that lie in the same memory; counts, of one number, may be common."""

    def states(m: int) -> dict[str, Tensor]:
        return {f"{name} {key}": v for (name, key), v in _flat(made.optimizer_state(m)).items() if v.dim()}

    found = []
    for kind, reader in {"parameters": made.parameters, "gradients": made.gradients, "states": states}.items():
        spans = []
        for m in range(num_models):
            for name, value in reader(m).items():
                if value.numel() and value.layout is torch.strided:
                    spans.append((*memory_of(value), m, name, value))
        spans.sort(key=lambda span: span[0])
        for i, (_, end, m, name, value) in enumerate(spans):
            for _, _, other, _, another in itertools.takewhile(lambda span, end=end: span[0] < end, spans[i + 1 :]):
                if m != other and torch.isin(_addresses(value), _addresses(another)).any():
                    found.append((kind, name, *sorted((m, other))))
    return found


def _addresses(tensor: Tensor) -> Tensor:
    begin, end = memory_of(tensor)
    return torch.arange(begin, end, tensor.element_size()).as_strided(tensor.shape, tensor.stride()).flatten()
