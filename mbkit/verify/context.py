"""What diagnose's experiments share: the runs that all of them need, and how differences are measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..training.loop import make_schedule
from .experiment import Laboratory, Lone, Run, Values, apart, quiet

__all__ = ["LARGE", "SMALL", "Case", "Finding"]

# So small a loss is clipped by nobody, and so large a one by everybody who clips.
SMALL, LARGE = 2.0**-20, 2.0**20
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; what is planted or made by mistake is far above


@dataclass(frozen=True)
class Finding:
    """What was found out about one suspect.

    Attributes:
        suspect: its name, one of `faults.FAULTS` or "rounding".
        verdict: "guilty", "cleared" or "not measured"; of rounding that explains the whole difference "all there is".
        evidence: what was measured.
        model, parameter, step: where it shows most, and from which step on.
        size: how large the difference is, relative to what it is a difference of.
    """

    suspect: str
    verdict: str
    evidence: str
    model: int | None = None
    parameter: str | None = None
    step: int | None = None
    size: float | None = None


class Case(Laboratory):
    """One recipe under investigation: two runs that most experiments compare with, and what has been found so far.

    Attributes:
        quiet: the lone models without random layers. calm: the configs without weight decay.
        base: a run of both on a small loss and then on none. plain: the same on the full loss, with the real configs.
        blurred: kind to the parameters that share memory, which later experiments leave out.
        training, factor, wrong: what the batch's gradient is known to be: its mode, its common factor to autograd's,
            and the (model, parameter) for which it is wrong.
        trials: runs with other parameters: which models were changed, the run, and which models did not feel it.
        findings: suspect to `Finding`.
    """

    def __init__(self, optimizer_cls: type[torch.optim.Optimizer], scheduler: Any, *given: Any) -> None:
        super().__init__(*given)
        self.optimizer_cls, self.scheduler = optimizer_cls, scheduler
        self.findings: dict[str, Finding] = {}
        self.quiet = [quiet(model) for model in self.models]
        self.settings = [self._lone_optimizer(config).param_groups[0] for config in self.configs]
        # Weight decay makes gradients and states depend on parameters: it would carry one fault into another's test.
        self.calm = [
            {**config, **({"weight_decay": 0.0} if group.get("weight_decay") else {})}
            for config, group in zip(self.configs, self.settings, strict=True)
        ]
        self.tolerance = TOLERANCE.get(next(self.models[0].parameters()).dtype, 1e-2)
        self.blurred: dict[str, set[str]] = {"parameters": set(), "gradients": set(), "states": set()}
        self.training, self.factor = True, 1.0
        self.wrong: set[tuple[int, str]] = set()
        self.trials: list[tuple[set[int], Run, set[int]]] = []
        self.base = self.run(SMALL, 0.0, models=self.quiet, configs=self.calm)
        self.plain = self.run(1.0, 0.0, models=self.quiet)

    def guilty(self, suspect: str) -> bool:
        """Whether it has been found guilty so far."""
        return suspect in self.findings and self.findings[suspect].verdict == "guilty"

    def find(self, suspect: str, guilty: bool | None, evidence: str, **where: Any) -> None:
        """Note a finding; None where nothing could be measured."""
        verdict = "not measured" if guilty is None else "guilty" if guilty else "cleared"
        self.findings[suspect] = Finding(suspect, verdict, evidence, **(where if guilty else {}))

    def drawing(self, models: Sequence[nn.Module], training: bool) -> list[Lone]:
        """Return the models alone, each at the start of its random numbers."""
        return [Lone(model, seed, training) for model, seed in zip(models, self.seeds, strict=False)]

    def gradients(self, lones: Sequence[Lone], k: int, start: Values) -> Values:
        """Return each lone model's gradient on batch k at the parameters `start`."""
        pairs = [self.own(k, m) for m in range(len(lones))]
        return [lone.gradients(start[m], *pairs[m], self.loss_fn) for m, lone in enumerate(lones)]

    def alone(self, models: Sequence[nn.Module], training: bool = True, k: int = 0) -> tuple[Values, bool]:
        """Return each model's gradient by plain autograd where the batch starts, and whether random numbers were."""
        lones = self.drawing(models, training)
        found = self.gradients(lones, k, self.base.start)
        return found, any(lone.draws.drew for lone in lones)

    def fit(
        self, reference: Values, seen: Values, factor: float | None = None
    ) -> tuple[float, list[tuple[float, int, str]]]:
        """Return the one factor between most gradients and the reference, and those for which it does not hold."""
        pairs = []
        for m, (alone, batch) in enumerate(zip(reference, seen, strict=True)):
            whole = max((torch.linalg.vector_norm(g).item() for g in alone.values()), default=0.0)
            for name in self.names:
                a, b = alone.get(name), batch.get(name)
                if name not in self.blurred["gradients"] and (a is not None or b is not None):
                    a = torch.zeros_like(b) if a is None else a
                    pairs.append((m, name, a, torch.zeros_like(a) if b is None else b / SMALL, 1e-3 * whole))
        ratios = [((a * b).sum() / (a * a).sum()).item() for _, _, a, b, floor in pairs if a.norm().item() > floor > 0]
        factor = factor or (statistics.median_low(ratios) if ratios else 1.0)
        gaps = []
        for m, name, a, b, floor in pairs:
            length = max((factor * a).norm().item(), b.norm().item(), abs(factor) * floor) or 1.0
            gap = (factor * a - b).norm().item() / length
            gaps.append((gap if gap == gap else torch.inf, m, name))
        self.worst = max((gap for gap, _, _ in gaps), default=0.0)
        return factor, [gap for gap in gaps if not gap[0] <= self.tolerance]

    def lengths(self, gradients: Values) -> list[float]:
        """Return the length of each model's whole gradient."""
        kept = [[g for n, g in own.items() if n not in self.blurred["gradients"]] for own in gradients]
        return [torch.stack([torch.linalg.vector_norm(g) for g in own]).norm().item() if own else 0.0 for own in kept]

    def changes(self, kind: str, run: Run, m: int) -> list[tuple[float, Any]]:
        """Return how far model m's gradients or states are from those of the base run, where they are."""
        blurred, found = self.blurred["gradients"] | (self.blurred[kind]), []
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

    def _lone_optimizer(self, config: dict[str, Any]) -> torch.optim.Optimizer:
        return self.optimizer_cls([nn.Parameter(torch.zeros(1))], **config)

    def remembers(self) -> bool:
        """Whether a lone optimizer of this class keeps tensors from step to step."""
        optimizer = self._lone_optimizer(self.configs[0])
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        optimizer.step()
        return any(isinstance(value, Tensor) and value.dim() for value in optimizer.state[p].values())

    def law(self, m: int, config: dict[str, Any]) -> dict[str, Tensor]:
        """Return how far torch's own optimizer moves model m with the gradients that the batch had."""
        own = {name: nn.Parameter(value.clone()) for name, value in self.plain.start[m].items()}
        optimizer = self.optimizer_cls(own.values(), **config)
        for gradients in self.plain.gradients:
            for name, p in own.items():
                p.grad = gradients[m].get(name)
            optimizer.step()
        return {name: p.detach() - self.plain.start[m][name] for name, p in own.items()}

    def rates_alone(self, config: dict[str, Any], steps: int) -> list[float]:
        """Return the learning rates of a lone model at the start and after each step of its schedule."""
        optimizer = self._lone_optimizer(config)
        schedule, rates = make_schedule(self.scheduler, optimizer), [optimizer.param_groups[0]["lr"]]
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return [float(rate) for rate in rates]
