"""Where diagnose's experiments run: batches made anew, trained a step or two under control, and read."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..training.loop import call, make_schedule, part
from ..training.options import StepOptions
from ..training.sequential import LoneTrainer, fresh
from .equivalence import Precision
from .measure import apart, as_precision, few_examples, quiet, shared_memory
from .report import Finding
from .subject import BatchRecipe

# So small a loss is clipped by nobody, and so large a one by everybody who clips.
SMALL, LARGE = 2.0**-20, 2.0**20
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; what is planted or made by mistake is far above
COARSE = 5e-2  # of all that is less precise
Values = list[dict[str, Tensor]]  # model -> name -> numbers
Gap = tuple[float, int, str]  # how far apart, of its length; the model, and the parameter's name


@dataclass
class Run:
    """What was read of one batch: before its first step, and after each."""

    start: Values
    unlike: list[Gap]  # initial parameters other than those given
    parameters: list[Values] = field(default_factory=list)
    gradients: list[Values] = field(default_factory=list)
    states: list[Values] = field(default_factory=list)
    rates: list[list[float] | None] = field(default_factory=list)
    shared: list[tuple[str, str, int, int]] = field(default_factory=list)  # kind, name, and two models


class Case:
    """One recipe under investigation: what its batches do, what the lone models do, and what has been found so far.

    Args:
        recipe: makes a batch, and says how the lone models are trained.
        models, configs, seeds, loss_fn, dtype: as for `diagnose`; M of the first three.
        data: the batches, in the order in which the lone models see them; experiments use a few examples of each.

    Attributes:
        quiet: the lone models without random layers. calm: the configs without weight decay.
        base: a run of both on a small loss and then on none. plain: the same on the full loss, with the real configs.
        finite: whether the lone models' gradients are numbers; else little can be measured.
        blurred: kind to the parameters that share memory, which later experiments leave out.
        training, factor, wrong: what the batch's gradient is known to be: its mode, its common factor to autograd's,
            and the (model, parameter) for which it is wrong.
        trials: runs with other parameters: which models were changed, the run, and which models did not feel it.
        findings: suspect to `Finding`.
    """

    def __init__(
        self,
        recipe: BatchRecipe,
        models: Sequence[nn.Module],
        configs: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        data: Sequence[tuple[Any, Any]],
        loss_fn: Callable[[Any, Any], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.recipe, self.seeds, self.given, self.loss_fn = recipe, list(seeds), list(data), loss_fn
        self.models, self.configs = [as_precision(model, dtype) for model in models], [dict(c) for c in configs]
        self.data = [few_examples(pair, 0 if recipe.shared_input else 1, dtype) for pair in data]
        self.names, self.num_models = [name for name, _ in self.models[0].named_parameters()], len(self.models)
        options = StepOptions(loss_fn, shared_targets=recipe.shared_targets)
        self.loss_fns = [options.loss_of_model(m, self.num_models) for m in range(self.num_models)]
        self.quiet = [quiet(model) for model in self.models]
        self.settings = [self._lone_optimizer(config).param_groups[0] for config in self.configs]
        # Weight decay makes gradients and states depend on parameters: it would carry one fault into another's test.
        pairs = zip(self.configs, self.settings, strict=True)
        self.calm = [{**own, "weight_decay": 0.0} if group.get("weight_decay") else own for own, group in pairs]
        self.findings: dict[str, Finding] = {}
        self.blurred: dict[str, set[str]] = {"parameters": set(), "gradients": set(), "states": set()}
        self.training, self.factor = True, 1.0
        self.wrong: set[tuple[int, str]] = set()
        self.trials: list[tuple[set[int], Run, set[int]]] = []
        self.base = self.run(SMALL, 0.0, configs=self.calm)
        self.plain = self.run(1.0, 0.0)
        with Precision() as precision:
            gradients, _ = self.alone(self.quiet)
        self.finite = all(g.isfinite().all() for own in gradients for g in own.values())
        self.tolerance = TOLERANCE.get(precision.coarsest, COARSE)

    def guilty(self, suspect: str) -> bool:
        """Whether it has been found guilty so far."""
        return suspect in self.findings and self.findings[suspect].verdict == "guilty"

    # ------------------------------------------------------------------ what the batch does

    def run(self, *scales: float, models: Any = None, configs: Any = None, seeds: Any = None) -> Run:
        """Make a batch, train it one step for each scale, with its loss times that scale, and read it.

        Where it does not start from the models given, and can be written, they are written into it: an experiment
        must begin from a known state. Torch's default generator starts from the same place each time.
        """
        models, configs = self.quiet if models is None else models, configs or self.configs
        given = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = self.recipe(copy.deepcopy(list(models)), copy.deepcopy(list(configs)), list(seeds or self.seeds))

            def states(m: int) -> dict[Any, Tensor]:
                every = made.optimizer_state(m).items()
                return {(name, key): v for name, own in every for key, v in own.items() if isinstance(v, Tensor)}

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
                torch.clear_autocast_cache()
                # Powers of two change no digit of any gradient.
                made.step(*fresh((x, y)), lambda outputs, y, scale=scale: self.loss_fn(outputs, y) * scale)
                run.parameters.append(read(made.parameters))
                run.gradients.append(read(made.gradients))
                run.states.append(read(states))
                run.rates.append(_rates(made, len(models)))
                if len(run.parameters) == 1 and len(models) > 1:
                    readers = {"parameters": made.parameters, "gradients": made.gradients}
                    # Counts, of one number, may be common.
                    readers["states"] = lambda m: {" ".join(name): v for name, v in states(m).items() if v.dim()}
                    for kind, reader in readers.items():
                        run.shared += [(kind, *each) for each in shared_memory(map(reader, range(len(models))))]
        return run

    def order(self) -> list[tuple[Any, Any]] | None:
        """Return the batches that the batch would train on by itself, or None where it takes what it is given."""
        made = self.recipe(copy.deepcopy(self.models), copy.deepcopy(self.configs), self.seeds)
        return list(itertools.islice(made.walk(self.given), len(self.given))) if hasattr(made, "walk") else None

    def changes(self, kind: str, run: Run, m: int) -> list[tuple[float, Any]]:
        """Return how far model m's gradients or states are from those of the base run, where they are."""
        blurred, found = self.blurred["gradients"] | self.blurred[kind], []
        for before, after in zip(getattr(self.base, kind), getattr(run, kind), strict=True):
            for name in before[m]:
                gap = apart(before[m][name], after[m].get(name))
                if gap > 1e-3 * self.tolerance and (name if kind == "gradients" else name[0]) not in blurred:
                    found.append((gap, name))
        return found

    def moved(self, one: Run, other: Run, m: int, step: int) -> tuple[float, str]:
        """Return by how much of its way model m's parameters end elsewhere in one run than in the other, and which."""
        blurred, gaps = set().union(*self.blurred.values()), [(0.0, "")]
        for name in self.names:
            a, b = (run.parameters[step][m][name] - run.start[m][name] for run in (one, other))
            if name not in blurred:
                gaps.append((apart(a, b), name))
        return max(gaps)

    def lengths(self, gradients: Values) -> list[float]:
        """Return the length of each model's whole gradient."""
        kept = [[g for n, g in own.items() if n not in self.blurred["gradients"]] for own in gradients]
        return [torch.stack([torch.linalg.vector_norm(g) for g in own]).norm().item() if own else 0.0 for own in kept]

    # ------------------------------------------------------------------ what the models do alone

    def lones(self, models: Sequence[nn.Module], training: bool) -> list[LoneTrainer]:
        """Return copies of the models alone, each at the start of its random numbers, for `gradients`."""
        copies = [copy.deepcopy(model).train(training) for model in models]
        return [LoneTrainer(*own, torch.optim.SGD, {}) for own in zip(copies, self.seeds, strict=False)]

    def gradients(self, lones: Sequence[LoneTrainer], k: int, start: Values) -> Values:
        """Return each lone model's gradient by plain autograd on batch k at the parameters `start`."""
        for m, lone in enumerate(lones):
            for name, p in lone.model.named_parameters():
                p.data.copy_(start[m][name])
            lone.model.zero_grad()
            x, y = fresh(self._own(k, m))
            torch.clear_autocast_cache()
            with lone.draws.current():
                self.loss_fns[m](call(lone.model, x), y).backward()
        every = [lone.model.named_parameters() for lone in lones]
        return [{name: p.grad for name, p in own if p.grad is not None} for own in every]

    def alone(self, models: Sequence[nn.Module], training: bool = True, k: int = 0) -> tuple[Values, bool]:
        """Return each model's gradient where the batch starts, and whether random numbers were drawn for it."""
        lones = self.lones(models, training)
        return self.gradients(lones, k, self.base.start), any(lone.draws.drew for lone in lones)

    def way_alone(self, m: int, models: Any = None, configs: Any = None) -> dict[str, Tensor]:
        """Return how far model m comes alone in a step on the loss and a step on none."""
        model = copy.deepcopy((models or self.quiet)[m])
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        lone = LoneTrainer(model, self.seeds[m], self.recipe.optimizer_cls, (configs or self.configs)[m])
        for k, scale in enumerate((1.0, 0.0)):
            x, y = fresh(self._own(k, m))
            lone.step(x, y, lambda outputs, y, scale=scale: self.loss_fns[m](outputs, y) * scale)
        return {name: p.detach() - start[name] for name, p in model.named_parameters()}

    def remembers(self) -> bool:
        """Whether a lone optimizer of this class keeps tensors from step to step."""
        optimizer = self._lone_optimizer(self.configs[0])
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        optimizer.step()
        return any(isinstance(value, Tensor) and value.dim() for value in optimizer.state[p].values())

    def rates_alone(self, config: dict[str, Any], steps: int) -> list[float]:
        """Return the learning rates of a lone model at the start and after each step of its schedule."""
        optimizer = self._lone_optimizer(config)
        schedule, rates = make_schedule(self.recipe.scheduler, optimizer), [optimizer.param_groups[0]["lr"]]
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return [float(rate) for rate in rates]

    def _own(self, k: int, m: int) -> tuple[Any, Any]:
        """Return model m's inputs in batch k, and the targets of all models."""
        x, y = self.data[k]
        return x if self.recipe.shared_input else part(x, m), y

    def _lone_optimizer(self, config: dict[str, Any]) -> torch.optim.Optimizer:
        return self.recipe.optimizer_cls([nn.Parameter(torch.zeros(1))], **config)

    # ------------------------------------------------------------------ both

    def compared(self, reference: Values, seen: Values, factor: float | None = None) -> tuple[float, list[Gap]]:
        """Return the one factor between most gradients and the reference, and those for which it does not hold."""
        pairs = []
        for m, (alone, batch) in enumerate(zip(reference, seen, strict=True)):
            whole = max((torch.linalg.vector_norm(g).item() for g in alone.values()), default=0.0)
            for name in self.names:
                a, b = alone.get(name), batch.get(name)
                if name not in self.blurred["gradients"] and (a is not None or b is not None):
                    a = torch.zeros_like(b) if a is None else a
                    pairs.append((m, name, a, torch.zeros_like(a) if b is None else b / SMALL, 1e-3 * whole))
        ratios = [
            torch.vdot(a.flatten(), b.flatten().to(a)).real.item() / a.norm().item() ** 2
            for _, _, a, b, floor in pairs
            if a.norm().item() > floor > 0
        ]
        factor = factor or (statistics.median_low(ratios) if ratios else 1.0)
        gaps = []
        for m, name, a, b, floor in pairs:
            length = max((factor * a).norm().item(), b.norm().item(), abs(factor) * floor) or 1.0
            gap = (factor * a - b).norm().item() / length
            gaps.append((gap if gap == gap else torch.inf, m, name))
        self.worst = max((gap for gap, _, _ in gaps), default=0.0)
        return factor, [gap for gap in gaps if not gap[0] <= self.tolerance]

    def groups(self) -> list[set[int]]:
        """Return few groups of models, such that for any two models one group has the first without the second.

        Each model gets a set of groups of its own, all sets of one size, so that none contains another: six groups
        are enough for twenty models.
        """
        if self.num_models == 1:
            return []
        count = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= self.num_models)
        chosen = list(itertools.islice(itertools.combinations(range(count), count // 2), self.num_models))
        return [{m for m, own in enumerate(chosen) if group in own} for group in range(count)]

    def perturbed(self, group: set[int], spared: set[str]) -> list[nn.Module]:
        """Return copies of the quiet models, the parameters of those in `group` moved, but for the names `spared`."""
        models, generator = copy.deepcopy(self.quiet), torch.Generator().manual_seed(1)
        for m in sorted(group):
            for name, p in models[m].named_parameters():
                size = p.detach().abs().mean().item() or 0.1
                kind = torch.complex128 if p.is_complex() else torch.float64
                noise = torch.randn(p.shape, generator=generator, dtype=kind)
                if name not in spared:
                    p.data.add_(noise.to(p), alpha=size)
        return models


def _rates(made: Any, num_models: int) -> list[float] | None:
    rates = [made.learning_rate(m) for m in range(num_models)] if hasattr(made, "learning_rate") else [None]
    return None if None in rates else rates
