"""compare: train M models in the batch and alone, step by step, and say whether they are the same but for rounding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..batch.clip import norm_limits
from ..common.checks import check_seeds
from ..common.random_streams import in_turn
from ..training.loop import check_run, part, walk
from ..training.options import StepOptions
from ..training.sequential import LoneTrainer, check_configs, fresh, lone_models
from ..vmap import autocast_to
from .measure import gap
from .report import EquivalenceReport
from .subject import BatchRecipe, Recipe

# What a lone model is compared with to see how far rounding goes: itself, in another way. "last bits down" is for
# coarse numbers, whose start is moved by four last bits up and down: there, rounding often turns the sign of the
# smallest gradients, which Adam makes a whole step of, and one of the two shows it.
NOISE = ("channels_last", "last bit", "last bits down")
COARSE_MOVE = 4
# What is allowed whatever the noise floor is, per dtype: relative to the way that the parameters have come.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


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
    shared_targets: bool | None = None,
    max_norm: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    autocast: torch.dtype | None = None,
    build: Recipe | None = None,
) -> EquivalenceReport:
    """Train copies of the models in a batch and alone, on the same batches, and report how far apart they get.

    The models are trained in lockstep, each lone one from its own random state, so nothing but the present
    parameters is kept. A lone model is also compared with itself in channels_last memory (where the model can be run
    so, and nothing random is drawn in memory order), and with its start moved by the last bit of the least precise
    numbers that it computes with, such as bfloat16 under `torch.autocast` (there by four last bits, up and down): that
    is the noise floor.

    Args:
        models: M modules; they are not changed.
        optimizer_cls: a class of torch.optim.
        configs: one dict of hyperparameters for all models, or M.
        batches: an iterable of (inputs, targets); walked through again while steps remain.
        loss_fn: one model's outputs and targets to one number.
        steps: how many updates to make.
        seeds: one per model; drawn from torch's default generator when absent.
        shared_input: False where inputs are `[M, B, ...]`.
        shared_targets: False where targets are `[M, B, ...]`; told by their shape when absent.
        max_norm: clip each model's gradient to this norm; one number or one per model.
        scheduler: a callable that makes an lr scheduler from an optimizer; it is stepped after each step.
        autocast: torch.bfloat16 to train both under torch.autocast, as `fit` does; a step of `build` runs whole in it.
        build: makes (batch, optimizer), or any `verify.subject.Subject`, from M models, M configs and M seeds. It puts
            another batch or optimizer to the test: one of your own, or one of `mbkit.verify.faults`.

    Returns:
        An EquivalenceReport; `report.assert_equivalent()` is for test suites.

    Raises:
        TypeError, ValueError: as `fit_alone`; fewer than one step, models without parameters.

    Example:
        >>> models = [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)).double() for _ in range(3)]
        >>> data = [(torch.randn(16, 4).double(), torch.randint(2, (16,)))]
        >>> configs = [{"lr": lr} for lr in (0.001, 0.01, 0.1)]
        >>> report = compare(models, torch.optim.Adam, configs, data, nn.functional.cross_entropy, seeds=range(3))
        >>> report.equivalent
        True
    """
    models, configs, seeds = check_arguments(models, configs, batches, loss_fn, steps, seeds)
    num_models = len(models)
    norms = [None] * num_models if max_norm is None else norm_limits(max_norm, num_models)
    recipe = BatchRecipe(optimizer_cls, max_norm, scheduler, shared_input, shared_targets, build)
    subject = recipe([copy.deepcopy(model) for model in models], configs, seeds)
    pairs = ((pair, pair) for pair in endless(batches, models[0]))
    if hasattr(subject, "walk"):  # the batch has an order of its own
        pairs = zip(endless(batches, models[0]), endless(subject.walk(batches), models[0]), strict=False)
    settings = zip(models, seeds, configs, norms, strict=True)
    crowd = [_Crowd(model, seed, optimizer_cls, config, norm, scheduler) for model, seed, config, norm in settings]
    options, rows = StepOptions(loss_fn, shared_targets=shared_targets), []
    loss_fns = [options.loss_of_model(m, num_models) for m in range(num_models)]
    for pair, fed in itertools.islice(pairs, steps):
        with autocast_to(autocast, models[0]):
            for m in in_turn(range(-1, num_models)):
                if m < 0:
                    torch.clear_autocast_cache()  # a batch that others wrote must not see casts of an earlier step
                    losses = subject.step(*fresh(fed), loss_fn)
                    continue
                x, y = pair
                x = x if shared_input else part(x, m)
                loss = None if losses is None else losses[m]
                rows.append(crowd[m].step(x, y, loss_fns[m], subject.parameters(m), loss))

    names = [name for name in rows[0] if all(name in row for row in rows)]
    # A random mask is drawn in memory order: in another format it is another mask, and tells nothing of rounding.
    if any(each.alone.draws.drew for each in crowd) and "channels_last" in names:
        names.remove("channels_last")
    tables = {name: torch.tensor([row[name] for row in rows]).double().unflatten(0, (-1, num_models)) for name in names}
    return EquivalenceReport(
        parameters=[name for name, _ in models[0].named_parameters()],
        difference=tables["difference"],
        relative=tables["relative"],
        loss_difference=tables["loss"],
        floors={kind: tables[kind] for kind in NOISE if kind in names},
        tolerance=max(TOLERANCE.get(each.precision, 1e-2) for each in crowd),
        lost=tables["lost"].bool(),
    )


def check_arguments(
    models: Any, configs: Any, batches: Any, loss_fn: Any, steps: Any, seeds: Any
) -> tuple[list[nn.Module], list[dict[str, Any]], list[int]]:
    """Return M models, M configs and M seeds, or refuse what cannot be compared.

    Raises:
        TypeError, ValueError: as `compare`.
    """
    models = lone_models(models, may_share=True)
    if next(models[0].parameters(), None) is None:
        raise ValueError(f"Expected models with parameters, got {type(models[0]).__name__} without any.")
    check_run(batches, loss_fn, steps, "epoch")
    return models, check_configs(configs, len(models)), check_seeds(seeds, len(models))


class _Crowd:
    """One model trained alone, and again in each way of `NOISE`; `precision` is the coarsest that it computes with."""

    def __init__(self, model: nn.Module, *how: Any) -> None:
        self._model, self._how = model, how
        self.alone, self.precision = _Lone("alone", model, *how), next(model.parameters()).dtype.to_real()
        self._others: dict[str, _Lone] | None = None

    def step(self, x: Any, y: Any, loss_fn: Callable, mine: Mapping[str, Tensor], loss: Tensor | None) -> dict:
        """Make one update of each; compare them, and the parameters `mine`, with the model alone."""
        first = self._others is None
        with Precision() if first else nullcontext() as precision:
            expected, _ = self.alone.step(*fresh((x, y)), loss_fn)
        if first:
            self.precision = coarser(self.precision, precision.coarsest)
            kinds = NOISE[:2] if self.precision in TOLERANCE else NOISE
            self._others = {kind: _Lone(kind, self._model, *self._how, last=self.precision) for kind in kinds}
        reference = self.alone.ways(self.alone.parameters)
        numbers = [mine[name].detach() for name in self.alone.names]
        largest = [gap(a, b).flatten() for a, b in zip(numbers, self.alone.parameters, strict=True)]
        row = {
            "difference": [each.max().item() if len(each) else 0.0 for each in largest],
            "relative": _relative(self.alone.ways(numbers), reference),
            "loss": math.nan if loss is None else gap(loss, expected).item(),
            "lost": any(not way.isfinite().all() for way in reference)
            and not any((way.isfinite() & (way != 0)).any() for way in reference),
        }
        for kind in in_turn(list(self._others)):
            other = self._others[kind]
            try:
                other.step(*fresh((x, y)), loss_fn)
            except Exception:
                if kind != "channels_last":
                    raise
                del self._others[kind]  # a model may need views that this memory format does not have
            else:
                row[kind] = _relative(other.ways(other.parameters), reference)
        return row


class _Lone(LoneTrainer):
    """A copy of a model that trains by plain PyTorch, in one of the ways of `NOISE`."""

    def __init__(self, kind: str, model: nn.Module, *how: Any, last: torch.dtype | None = None) -> None:
        self.kind, model = kind, copy.deepcopy(model).train()
        if kind == "channels_last":
            model.to(memory_format=torch.channels_last)
        if kind in NOISE[1:]:
            move = 1 if last in TOLERANCE else COARSE_MOVE if kind == "last bit" else -COARSE_MOVE
            for p in model.parameters():
                _move(p.detach(), move * torch.finfo(coarser(p.dtype.to_real(), last)).eps)
        super().__init__(model, *how)
        self.names = [name for name, _ in model.named_parameters()]
        self._start = [p.clone() for p in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        """Asked for anew each time: an optimizer may put others in their place."""
        return [p.detach() for p in self.model.parameters()]

    def step(self, x: Any, y: Any, loss_fn: Callable) -> tuple[Tensor, Any]:
        """Make one update and step the schedule; return the loss and the outputs before it."""
        if self.kind == "channels_last":
            last = torch.channels_last
            x = tree_map_only(Tensor, lambda t: t.contiguous(memory_format=last) if t.dim() == 4 else t, x)
        made = super().step(x, y, loss_fn)
        if self.schedule is not None:
            self.schedule.step()
        return made

    def ways(self, values: Sequence[Tensor]) -> list[Tensor]:
        """How far each of the values is from its start: ways are compared, because "last bit" starts elsewhere."""
        return [_wide(value) - _wide(before) for value, before in zip(values, self._start, strict=True)]


class Precision(TorchFunctionMode):
    """A `with` block that notes the coarsest tensors of floating-point numbers that torch's functions return in it.

    Example:
        >>> with Precision() as precision, torch.autocast("cpu", torch.bfloat16):
        ...     _ = nn.Linear(2, 1)(torch.ones(3, 2))
        >>> precision.coarsest
        torch.bfloat16
    """

    coarsest: torch.dtype = torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):  # single numbers are an optimizer's counts and rates, often in float32
            if isinstance(leaf, Tensor) and leaf.dim() and (leaf.is_floating_point() or leaf.is_complex()):
                self.coarsest = coarser(self.coarsest, leaf.dtype.to_real())
        return made


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype with fewer digits."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _move(p: Tensor, share: float) -> None:
    """Move every number up by a share of its size, in place; of complex ones both parts."""
    p = torch.view_as_real(p) if p.is_complex() else p
    if p.is_floating_point():
        p.add_(p.abs(), alpha=share)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def endless(batches: Any, model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets) on the model's device, epoch after epoch."""
    for epoch in itertools.count():
        yield from walk(batches, epoch, model)


def _relative(ways: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Length of each difference over that of the reference: 0 where neither moved, inf where only the first did.

    Where the reference has no number left that could tell, NaN.
    """
    found = []
    for way, expected in zip(ways, reference, strict=True):
        apart, finite = gap(way, expected), expected[expected.isfinite()]
        length = torch.linalg.vector_norm(finite).item()
        if apart.isinf().any():
            found.append(math.inf)
        elif (expected.numel() and not finite.numel()) or length == math.inf:
            found.append(math.nan)
        else:
            off = torch.linalg.vector_norm(apart).item()
            found.append(0.0 if off == 0 else off / length if length else math.inf)
    return found
