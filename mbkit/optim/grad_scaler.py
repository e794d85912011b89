"""GradScaler: torch.amp's, with a scale, a growth count and a decision to skip for each model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.context import context_of
from ..batch.freeze import nonfinite_models
from ..common.checks import model_numbers, whole_number
from .base import BatchOptimizer
from .groups import parameters_of


class GradScaler(torch.amp.GradScaler):
    """Scales the losses of M models, each as `torch.amp.GradScaler` scales it alone; an overflow skips its own model.

    It is used like torch's, only with the losses `[M]`. Everything stays on the losses' device and nothing waits for
    it, but `get_scale` and `state_dict`. A frozen model keeps its scale.

    Args:
        init_scale: the first scale of each model.
        growth_factor: what a scale is multiplied by after `growth_interval` updates in a row.
        backoff_factor: what it is multiplied by when a gradient is not finite; that model's update is left out.
        growth_interval: a number of updates.
        enabled: False to do nothing.

    Raises:
        TypeError, ValueError: a scale that is not above 0 and finite; factors or an interval that cannot be.

    Example:
        >>> from torch import nn
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)], shared_input=False)
        >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=0.1)
        >>> scaler = GradScaler(init_scale=4.0, growth_interval=1)
        >>> x, y = torch.ones(3, 5, 2), torch.zeros(5, 1)
        >>> x[1] = torch.inf
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     losses = batch.compute_loss(batch(x), y, nn.functional.mse_loss, reduction="none")
        >>> scaler.scale(losses).sum().backward()
        >>> scaler.unscale_(optimizer)
        >>> norms = batch.clip_grad_norm_(1.0)
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.get_scale()
        [8.0, 2.0, 8.0]
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if enabled:
            _check_factors(growth_factor, backoff_factor, growth_interval)
            _column(init_scale, 1)
        # To torch's class "cpu" means any device that exists; tensors are made on the losses'.
        super().__init__("cpu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._frozen: Tensor | None = None  # what the optimizer's batch says, for update()

    def scale(self, losses: Tensor) -> Tensor:  # type: ignore[override]
        """Return the losses `[M]`, each times its model's scale.

        Raises:
            ValueError: a tensor that is not one loss per model.
        """
        if not self._enabled:
            return losses
        count = None if self._scale is None else len(self._scale)
        if not isinstance(losses, Tensor) or losses.dim() != 1 or count not in (None, len(losses)):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            told = f"Expected the losses [{count or 'M'}], one per model, got {got}"
            raise ValueError(f"{told}: pass what compute_loss(..., reduction='none') returns, and add up the result.")
        if self._scale is None:
            self._start(len(losses), losses.device)
        return losses * self._scale.to(losses.device, non_blocking=True)

    def _start(self, num_models: int, device: torch.device) -> None:
        self._scale = _column(self._init_scale, num_models, device)
        self._growth_tracker = _column(self._init_growth_tracker, num_models, device, torch.int32)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not isinstance(optimizer, BatchOptimizer) or optimizer.num_models != len(inv_scale):
            expected, got = f"an optimizer from OptimizerFactory for {len(inv_scale)} models", type(optimizer).__name__
            raise TypeError(f"Expected {expected}, got {got}: create one by create_optimizer(batch, ...).")
        self._frozen = context_of(optimizer.batch).frozen
        all_grads = [p.grad for p in parameters_of(optimizer.param_groups) if p.grad is not None]
        if not allow_fp16 and any(grad.dtype == torch.float16 for grad in all_grads):
            raise ValueError("Expected float32 gradients, got float16: keep the parameters in float32.")
        if not all_grads:
            told = "Expected gradients for the optimizer's batch, got none: the losses are those of another batch"
            raise RuntimeError(f"{told}, or backward() was not called. Create the optimizer for the trained batch.")
        found = {}
        for device in {grad.device for grad in all_grads}:
            grads = [grad for grad in all_grads if grad.device == device]
            found[device] = nonfinite_models(grads, len(inv_scale))
            own = inv_scale.to(device)
            with torch.no_grad():
                for grad in grads:
                    grad.mul_(own.view(-1, *[1] * (grad.dim() - 1)))
        return found

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        optimizer._skipped = self._found([optimizer_state])
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            optimizer._skipped = None

    def _found(self, states: Sequence[dict[str, Any]]) -> Tensor:
        """Return which models have met a gradient that is not finite, `[M]`."""
        found = [own for state in states for own in state["found_inf_per_device"].values()]
        return torch.stack([own.to(self._scale.device, non_blocking=True) for own in found]).any(0)

    def update(self, new_scale: float | Sequence[float] | Tensor | None = None) -> None:  # type: ignore[override]
        """Let each model's scale grow or shrink, after the steps of all optimizers.

        Args:
            new_scale: set the scales to this instead: one number, or one per model.

        Raises:
            RuntimeError: before the first `scale`, or no optimizer has made a step since the last update.
        """
        if not self._enabled:
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            scale.copy_(_column(new_scale, len(scale), scale.device))
            self._per_optimizer_states.clear()
            return
        states = list(self._per_optimizer_states.values())
        self._per_optimizer_states.clear()
        if not any(state["found_inf_per_device"] for state in states):
            raise RuntimeError("Expected scaler.step(optimizer) before update(), got none: no gradient was looked at.")
        found, done = self._found(states), tracker + 1
        larger = (scale.double() * self._growth_factor).float()  # a product in double, as torch.amp's own
        smaller = (scale.double() * self._backoff_factor).float()
        grows = done == self._growth_interval
        after = torch.where(found, smaller, torch.where(grows & larger.isfinite(), larger, scale))
        count = torch.where(found | grows, 0, done)
        if self._frozen is not None:
            frozen = self._frozen.to(scale.device)
            after, count = torch.where(frozen, scale, after), torch.where(frozen, tracker, count)
        scale.copy_(after)
        tracker.copy_(count)

    def get_scale(self) -> float | list[float]:  # type: ignore[override]
        """Return the M scales; before the first loss, when M is unknown, the one they start from."""
        return 1.0 if not self._enabled else self._init_scale if self._scale is None else self._scale.tolist()

    def _get_growth_tracker(self) -> int | list[int]:  # type: ignore[override]
        if self._growth_tracker is not None:
            return self._growth_tracker.tolist()
        return self._init_growth_tracker if self._enabled else 0

    def select(self, models: Iterable[int]) -> GradScaler:
        """Return a scaler that goes on with some of the models, between two steps.

        Scalers of several batches are merged by `load_state_dict`, their lists of scales and counts put together.

        Raises:
            TypeError, IndexError: models that are not whole numbers, or that are not there.
        """
        chosen = copy.deepcopy(self)  # which has the scales as lists, as a saved one has
        if isinstance(chosen._init_scale, list):
            numbers = model_numbers(models, len(chosen._init_scale))
            chosen._init_scale = [chosen._init_scale[m] for m in numbers]
            chosen._init_growth_tracker = [chosen._init_growth_tracker[m] for m in numbers]
        chosen._frozen = None
        return chosen

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned: torch's entries, "scale" and "_growth_tracker" with M numbers each.

        Raises:
            RuntimeError: the state is that of a disabled scaler.
            ValueError: it is not whole, has the scales of another number of models, or none to train with.
        """
        if not self._enabled or not state_dict:
            return super().load_state_dict(state_dict)  # which knows what to say
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if not set(names) <= state_dict.keys():
            raise ValueError(f"Expected {', '.join(names)}, got {sorted(state_dict)}: pass what state_dict() returned.")
        scale, *factors, tracker = (state_dict[name] for name in names)
        _check_factors(*factors)
        count = len(self._scale) if self._scale is not None else len(scale) if isinstance(scale, list) else 1
        _column(scale, count), _column(tracker, count, dtype=torch.int32)
        self._init_scale, self._init_growth_tracker = scale, tracker
        self._growth_factor, self._backoff_factor, self._growth_interval = factors
        if self._scale is not None:
            self._start(count, self._scale.device)


def _check_factors(growth_factor: Any, backoff_factor: Any, growth_interval: Any) -> None:
    for name, factor in (("growth_factor", growth_factor), ("backoff_factor", backoff_factor)):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"Expected a number as {name}, got {factor!r}: pass one like 2.0 or 0.5.")
    if not 1 < growth_factor < math.inf or not 0 < backoff_factor < 1:
        got = f"{growth_factor} and {backoff_factor}"
        raise ValueError(f"Expected growth_factor > 1 and 0 < backoff_factor < 1, got {got}: pass e.g. 2.0 and 0.5.")
    whole_number(growth_interval, "growth_interval")


def _column(value: Any, num_models: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one number for all, or one per model, as a tensor `[M]`.

    Raises:
        TypeError: no numbers.
        ValueError: another number of them, or a scale with which nothing could be trained: not above 0, or not finite.
    """
    try:
        given = torch.as_tensor(value, dtype=dtype, device=value.device if isinstance(value, Tensor) else "cpu")
    except (TypeError, RuntimeError):
        raise TypeError(f"Expected one number, or one per model, got {value!r}: pass one like 65536.0.") from None
    if given.dim() > 1 or (given.dim() == 1 and len(given) != num_models):
        told = f"Expected one scale or {num_models} (one per model), got {list(given.shape)}"
        raise ValueError(f"{told}: use it for as many models.")
    if dtype == torch.float32 and given.device.type == "cpu" and not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"Expected finite scales above 0, got {value}: pass one like 65536.0.")
    return given.to(device).expand(num_models).clone()
