"""diagnose: when a batch and its models disagree, find out who did it, by one experiment for each suspect."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.random_streams import seeded
from ..common.tables import Tables, plain
from ..data.load import demo_points
from ..models import MLP
from ..vmap import autocast_to
from . import isolation_checks as isolation
from . import model_checks as each
from .equivalence import check_arguments, compare, endless
from .experiment import Case
from .faults import FAULTS, plant
from .report import EquivalenceReport, Finding, finding
from .subject import BatchRecipe, Recipe

# In this order, for what one has found is made good in the next: the lone models follow the batch's real initial
# weights, model 0's settings and its mode, and parameters in shared memory are left out.
EXPERIMENTS = (
    each.memory, each.weights, each.order, isolation.settings, each.stale, each.gradient, each.masks, each.clipping,
    isolation.states, isolation.leak, isolation.schedule,
)  # fmt: skip
READINGS = (each.memory, each.weights, each.order, isolation.schedule)  # those that need no gradient
MARKS = {"guilty": "✗", "cleared": "✓", "not measured": "?", "all there is": "≈"}


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Tables):
    """Who is guilty, who is cleared, and by what measurement.

    Attributes:
        findings: suspect to `Finding`, for every name in `faults.FAULTS`, and "rounding".
        equivalence: how far the batch is from its models alone, step by step, as `compare` measured it.
    """

    findings: dict[str, Finding]
    equivalence: EquivalenceReport
    _left = 4

    @property
    def guilty(self) -> list[str]:
        """The guilty suspects' names; rounding is no guilt."""
        return [name for name in FAULTS if self.findings[name].verdict == "guilty"]

    @property
    def conclusion(self) -> str:
        """The finding in one sentence."""
        if self.guilty:
            return f"The batch is not its models alone: {'; and '.join(FAULTS[name] for name in self.guilty)}."
        if self.equivalence.verdict.startswith("CANNOT TELL"):
            return "Whether the batch is its models alone cannot be told. " + self.equivalence.verdict
        if not self.equivalence.equivalent:
            return "The batch is not its models alone, and it is none of the suspects: " + self.equivalence.verdict
        return f"The batch is its models alone: {self.findings['rounding'].evidence}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, fit for JSON."""
        findings = {name: vars(finding) for name, finding in self.findings.items()}
        head = {"conclusion": self.conclusion, "guilty": self.guilty, "findings": findings}
        return {**plain(head), "equivalence": self.equivalence.to_dict()}

    def plot(self) -> Any:
        """Return a figure: how far each parameter is, step by step, one panel a model."""
        return self.equivalence.plot()

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        rows = [["", "suspect", "verdict", "what was measured"]]
        order = sorted(self.findings.values(), key=lambda finding: finding.verdict != "guilty")
        rows += [[MARKS[f.verdict], f.suspect, f.verdict, f.evidence] for f in order]
        return [(self.conclusion, []), ("", rows)]

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self.plot().png()).decode()
        return f'{super()._repr_html_()}<img alt="differences" src="data:image/png;base64,{picture}">'


def diagnose(
    models: Sequence[nn.Module],
    optimizer_cls: type[torch.optim.Optimizer],
    configs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    batches: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    steps: int = 6,
    seeds: Sequence[int] | None = None,
    *,
    shared_input: bool = True,
    shared_targets: bool | None = None,
    max_norm: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    autocast: torch.dtype | None = None,
    build: Recipe | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Diagnosis:
    """Find out why training in a batch differs from training alone: one controlled experiment for each suspect.

    The arguments say how the models are trained alone; `build` says how they are trained at once. Each experiment
    makes a batch anew, changes one thing (a loss of zero, one model's learning rate, ...), trains a step or two, and
    reads parameters, gradients and optimizer states. Then both are trained side by side, as by `compare`.

    Args:
        models, optimizer_cls, configs, batches, loss_fn, seeds, shared_input, shared_targets, max_norm, scheduler,
            autocast: as for `compare`.
        steps: how many updates are compared side by side.
        build: makes (batch, optimizer), or a `verify.subject.Subject`, from M models, M configs and M seeds: your own
            batch, seen from outside. A `ModelBatch` and mbkit's optimizer where absent.
        dtype: of the experiments, so that rounding cannot look like a fault; None for the models' own. autocast leaves
            float64 alone, so by default it is used side by side only.

    Returns:
        A Diagnosis, which shows itself in a notebook and prints in a terminal.

    Raises:
        TypeError, ValueError: as `compare`.

    Example:
        >>> from mbkit.verify.faults import plant
        >>> models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(3)]
        >>> data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]
        >>> build = plant(BatchRecipe(torch.optim.Adam), "stale-gradients")
        >>> configs = [{"lr": lr} for lr in (0.001, 0.01, 0.1)]
        >>> diagnose(models, torch.optim.Adam, configs, data, nn.functional.cross_entropy, build=build).guilty
        ['stale-gradients']
    """
    models, configs, seeds = check_arguments(models, configs, batches, loss_fn, steps, seeds)
    recipe = BatchRecipe(optimizer_cls, max_norm, scheduler, shared_input, shared_targets, build)
    data = list(itertools.islice(endless(batches, models[0]), max(steps, 2)))  # experiments make two steps
    with autocast_to(autocast, models[0]):
        case = Case(recipe, models, configs, seeds, data, loss_fn, dtype)
        for experiment in EXPERIMENTS if case.finite else READINGS:
            found = experiment(case)
            case.findings |= {one.suspect: one for one in (found if isinstance(found, list) else [found])}
    findings = {name: finding(name, None, "the models' gradients are no numbers alone either") for name in FAULTS}
    findings |= case.findings
    report = compare(
        models, optimizer_cls, configs, data, loss_fn, steps, seeds, shared_input=shared_input, max_norm=max_norm,
        scheduler=scheduler, shared_targets=shared_targets, autocast=autocast, build=recipe,
    )  # fmt: skip
    findings["rounding"] = _rounding(report, any(f.verdict == "guilty" for f in findings.values()))
    return Diagnosis({name: findings[name] for name in (*FAULTS, "rounding")}, report)


def diagnose_planted(
    *faults: str, rates: Sequence[float] = (0.01, 0.03, 0.1), seed: int = 0, optimizer: str = "Adam", steps: int = 6
) -> Diagnosis:
    """Plant faults in a small demonstration, and diagnose it: what each of them looks like.

    Args:
        *faults: names in `faults.FAULTS`.
        rates: one learning rate a model.
        seed: of the data, the models, and of what a fault leaves open.
        optimizer: the name of a class of torch.optim; SGD gets momentum 0.9.
        steps: how many updates are compared side by side.

    Example:
        >>> report = diagnose_planted("mean-loss", optimizer="SGD")
        >>> report.guilty
        ['mean-loss']
        >>> print(report.conclusion)
        The batch is not its models alone: the loss is averaged over the M models and not added up, so every gradient \
is divided by M.
    """
    with seeded(seed):
        x, y = demo_points(64, 8, 4)
        models = [MLP((8, 8, 4), dropout=0.2) for _ in rates]
    optimizer_cls = getattr(torch.optim, optimizer)
    configs = [{"lr": rate, **({"momentum": 0.9} if optimizer == "SGD" else {})} for rate in rates]
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    return diagnose(
        models, optimizer_cls, configs, list(zip(x.split(16), y.split(16), strict=True)), nn.functional.cross_entropy,
        steps, range(seed, seed + len(models)), max_norm=0.5, scheduler=schedule,
        build=plant(BatchRecipe(optimizer_cls, 0.5, schedule), *faults, seed=seed),
    )  # fmt: skip


def _rounding(report: EquivalenceReport, others: bool) -> Finding:
    """Say whether what the batch and its models differ by, after all steps, is what rounding explains."""
    if report.unknown:
        return finding("rounding", None, "there are no numbers to compare")
    gap, floor = (values[-1].nan_to_num(nan=0.0).amax().item() for values in (report.relative, report.floor))
    text = f"after {len(report.relative)} steps they are at most {gap:.1e} of their way apart, "
    text += f"and a lone model up to {floor:.1e} from itself"
    if report.equivalent and not others:
        return Finding("rounding", "all there is" if gap else "cleared", text, size=gap)
    what = "the parameters do not show it yet" if report.equivalent else "it does not explain the difference"
    return Finding("rounding", "cleared", f"{what}: {text}")
