"""compare: train M models in the batch and alone, step by step, and say whether they are the same but for rounding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.checks import check_seeds, list_of_models, per_model
from ..common.random_streams import OwnDraws
from ..common.tables import Tables, plain
from ..training.loop import check_run, make_schedule, part, walk
from ..training.sequential import lone_step, own_targets
from .subject import BatchRecipe, BatchSubject

__all__ = ["EquivalenceReport", "compare", "gap"]

KINDS = ("alone", "one thread", "channels_last", "last bit")  # the reference, and what it is compared with
# Allowed whatever the noise floor is: relative to the way that the parameters have come, per dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Above it, so many times the noise floor: rounding of another kind is not rounding of another size.
FLOOR_FACTOR = 30.0

Build = Callable[[list[nn.Module], list[int]], Any]


@dataclass(frozen=True, eq=False, repr=False)
class EquivalenceReport(Tables):
    """How far M models trained in a batch are from the same models trained alone, and how far rounding goes.

    Attributes:
        parameters: the P parameters' names.
        difference: [steps, M, P], the largest absolute difference of each parameter after each step.
        relative: [steps, M, P], the length of a parameter's whole difference over the way it has come from its start.
        loss_difference: [steps, M], absolute.
        floors: noise source to [steps, M, P], the same as `relative` for a lone model against itself. A parameter
            whose true gradient is zero, such as a bias before BatchNorm, is nothing but noise under Adam: its floor
            says so, and no other parameter's has to suffer for it.
        tolerance: the relative difference that is allowed where the noise floor is lower still.
    """

    parameters: list[str]
    difference: Tensor
    relative: Tensor
    loss_difference: Tensor
    floors: dict[str, Tensor]
    tolerance: float

    @property
    def floor(self) -> Tensor:
        """[steps, M, P], the largest of the noise floors."""
        return torch.stack(list(self.floors.values())).nan_to_num(nan=0.0).amax(0)

    @property
    def allowed(self) -> Tensor:
        """[steps, M, P], what counts as rounding."""
        return (FLOOR_FACTOR * self.floor.cummax(0).values).clamp(min=self.tolerance)

    @property
    def equivalent(self) -> bool:
        """Whether every model at every step is within what rounding explains."""
        return bool((self.relative <= self.allowed).all())

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        steps, num_models, _ = self.relative.shape
        if self.equivalent:
            return (
                f"EQUIVALENT: over {steps} steps all parameters of the {num_models} models stay within rounding of "
                f"those trained alone. Typically (in the median) they are {self.relative.median().item():.1e} of their "
                f"way apart, and a lone model {self.floor.median().item():.1e} from itself."
            )
        excess = (self.relative / self.allowed).nan_to_num(nan=torch.inf)
        step, m, _ = (excess > 1).nonzero()[0].tolist()
        p = int(excess[step, m].argmax())
        return (
            f"DIFFERENT: from step {step + 1} on model {m} is not the model trained alone. "
            f"Its '{self.parameters[p]}' is off by {self.relative[step, m, p].item():.1e} of its way, where rounding "
            f"explains {self.allowed[step, m, p].item():.1e}."
        )

    def assert_equivalent(self) -> None:
        """Raise an AssertionError with the verdict unless batch and models are equivalent."""
        if not self.equivalent:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, fit for JSON; what is not finite becomes None."""
        return plain({"verdict": self.verdict, "equivalent": self.equivalent, **vars(self)})

    def plot(self) -> Any:
        """Return a figure: how far each parameter is, step by step, one panel a model."""
        from ..figures.plots import heat_map

        return heat_map(self)

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        steps = len(self.relative)
        shown = sorted({s for s in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if s <= steps})
        rows = [["after step", "largest difference", "in", "of its way", "rounding explains", *self.floors]]
        for step in shown:
            excess = (self.relative[step - 1] / self.allowed[step - 1]).nan_to_num(nan=torch.inf)
            m, p = divmod(int(excess.argmax()), len(self.parameters))  # the parameter that is nearest to the limit
            values = [self.relative, self.allowed, *self.floors.values()]
            numbers = [f"{value[step - 1, m, p].item():.1e}" for value in values]
            largest = f"{self.difference[step - 1, m, p].item():.1e}"
            rows.append([f"{step}", largest, f"{self.parameters[p]} of model {m}", *numbers])
        return [(self.verdict, []), ("", rows)]


def compare(
    models: Sequence[nn.Module],
    optimizer_cls: type[torch.optim.Optimizer],
    configs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    batches: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    steps: int = 10,
    seeds: Sequence[int] | None = None,
    *,
    shared_input: bool = True,
    max_norm: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    build: Build | None = None,
) -> EquivalenceReport:
    """Train copies of the models in a batch and alone, on the same batches, and report how far apart they get.

    The models are trained in lockstep, each lone one from its own random state, so nothing but the present
    parameters is kept. A lone model is also compared with itself on one thread (where torch uses more), in
    channels_last memory (where nothing random is drawn in memory order), and with its start moved by the last bit:
    that is the noise floor.

    Args:
        models: M modules; they are not changed.
        optimizer_cls: a class of torch.optim.
        configs: one dict of hyperparameters for all models, or M.
        batches: an iterable of (inputs, targets); walked through again while steps remain.
        loss_fn: one model's outputs and targets to one number.
        steps: how many updates to make.
        seeds: one a model; drawn from torch's default generator when absent.
        shared_input: False where inputs are `[M, B, ...]`.
        max_norm: clip each model's gradient to this norm; one number or one a model.
        scheduler: a callable that makes an lr scheduler from an optimizer; it is stepped after each step.
        build: makes (batch, optimizer), or any `Subject`, from M models and M seeds. It puts another batch or
            optimizer to the test: one of your own, or one of `mbkit.faults`.

    Returns:
        An EquivalenceReport; `report.assert_equivalent()` is for test suites.

    Raises:
        TypeError, ValueError: as `fit`; fewer than one step.

    Example:
        >>> models = [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)).double() for _ in range(3)]
        >>> data = [(torch.randn(16, 4).double(), torch.randint(2, (16,)))]
        >>> configs = [{"lr": lr} for lr in (0.001, 0.01, 0.1)]
        >>> report = compare(models, torch.optim.Adam, configs, data, nn.functional.cross_entropy, seeds=range(3))
        >>> report.equivalent
        True
    """
    models = list_of_models(models)
    check_run(batches, loss_fn, steps, "epoch", walks=steps)
    seeds = check_seeds(seeds, len(models))
    configs = per_model(dict(configs) if isinstance(configs, Mapping) else list(configs), len(models), "configs")
    norms = per_model(max_norm, len(models), "norms")
    if build is None:
        recipe = BatchRecipe(optimizer_cls, max_norm, scheduler, shared_input)

        def build(models: list[nn.Module], seeds: list[int]) -> Any:
            return recipe(models, configs, seeds)

    subject = build([copy.deepcopy(model) for model in models], seeds)
    subject = BatchSubject(*subject, max_norm) if isinstance(subject, tuple) else subject
    theirs = subject.walk(batches) if hasattr(subject, "walk") else None
    kinds = [kind for kind in KINDS if kind != "one thread" or torch.get_num_threads() > 1]
    crowd = {
        kind: [_Lone(kind, *each, optimizer_cls, scheduler) for each in zip(models, seeds, configs, strict=True)]
        for kind in kinds
    }
    names = [name for name, _ in models[0].named_parameters()]
    found: dict[str, list[Any]] = {name: [] for name in ("difference", "relative", "loss", *kinds)}
    device = next(models[0].parameters()).device
    pairs = ((pair, pair) for pair in endless(batches, device))
    if theirs is not None:  # the batch has an order of its own
        pairs = zip(endless(batches, device), endless(theirs, device), strict=False)
    for (x, y), fed in itertools.islice(pairs, steps):
        losses = subject.step(*fed, loss_fn)
        for m in range(len(models)):
            own_x = x if shared_input else part(x, m)
            own_y = own_targets(y, own_x, m, len(models), None if shared_input else False)
            loss, *_ = (lones[m].step(own_x, own_y, loss_fn, norms[m]) for lones in crowd.values())
            alone, own = crowd["alone"][m], subject.parameters(m)
            mine = [own[name].detach() for name in names]
            reference = alone.ways(alone.parameters)
            found["loss"].append(math.nan if losses is None else gap(losses[m], loss).item())
            found["difference"].append([gap(a, b).max().item() for a, b in zip(mine, alone.parameters, strict=True)])
            found["relative"].append(_apart(alone.ways(mine), reference))
            for kind in kinds:
                lone = crowd[kind][m]
                found[kind].append(_apart(lone.ways(lone.parameters), reference))
    tensors = {
        name: torch.tensor(values, dtype=torch.float64).unflatten(0, (-1, len(models)))
        for name, values in found.items()
    }
    tolerance = TOLERANCE.get(next(models[0].parameters()).dtype, 1e-2)
    # A random mask is drawn in memory order: in another format it is another mask, and tells nothing of rounding.
    masked = any(lone.draws.drew for lone in crowd["alone"])
    floors = {kind: tensors[kind] for kind in kinds if kind != "alone" and not (masked and kind == "channels_last")}
    return EquivalenceReport(names, tensors["difference"], tensors["relative"], tensors["loss"], floors, tolerance)


class _Lone:
    """One model trained by plain PyTorch with a random state of its own, in one of the ways of `KINDS`."""

    def __init__(
        self, kind: str, model: nn.Module, seed: int, config: Mapping[str, Any], optimizer_cls: type, scheduler: Any
    ) -> None:
        self.kind, self.draws = kind, OwnDraws(seed)
        self.model = copy.deepcopy(model).train()
        if kind == "channels_last":
            self.model.to(memory_format=torch.channels_last)
        if kind == "last bit":
            for p in self.parameters:
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)) if p.is_floating_point() else p)
        self.start = [p.clone() for p in self.parameters]
        self.optimizer = optimizer_cls(self.model.parameters(), **config)
        self.schedule = make_schedule(scheduler, self.optimizer)

    @property
    def parameters(self) -> list[Tensor]:
        """Asked for anew each time: an optimizer may put others in their place."""
        return [p.detach() for p in self.model.parameters()]

    def step(self, x: Any, y: Any, loss_fn: Callable, max_norm: float | None) -> Tensor:
        """Make one update; return the loss before it."""
        if self.kind == "channels_last":
            x = tree_map_only(
                Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, x
            )
        with self.draws.current(), _one_thread(self.kind == "one thread"):
            loss, _ = lone_step(self.model, self.optimizer, x, y, loss_fn, max_norm)
        if self.schedule is not None:
            self.schedule.step()
        return loss

    def ways(self, values: Sequence[Tensor]) -> list[Tensor]:
        """How far each of the values is from its start: ways are compared, because "last bit" starts elsewhere."""
        return [value.double() - before.double() for value, before in zip(values, self.start, strict=True)]


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def endless(batches: Any, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets) on `device`, epoch after epoch."""
    for epoch in itertools.count():
        yield from walk(batches, epoch, device)


def _apart(ways: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Length of each difference over that of the reference; 0 where neither moved, inf where only the first did."""
    ratios = [(gap(a, b).norm(), b.norm()) for a, b in zip(ways, reference, strict=True)]
    return [(apart / length).item() if apart > 0 else 0.0 for apart, length in ratios]


def gap(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences: none between numbers that overflowed alike, endless where only one of them did."""
    alike = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(nan=torch.inf).masked_fill(alike, 0.0)
