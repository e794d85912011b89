"""How a training step is made: all models at once, in chunks of models, one by one, or as one compiled function.

Whatever is chosen, the models end up the same, to rounding. It is chosen by sizes, never by a clock, so two equal runs
end in the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..batch.clip import norm_limits
from ..batch.freeze import stop_nonfinite
from ..common.functions import depth_of_user
from ..common.machine import tune_malloc
from ..optim.base import BatchOptimizer
from ..vmap import autocast_off, autocast_to
from .chunks import Chunks
from .options import StepOptions

# Numbers in the weight of a convolution, in the mean over a model's, from which on a CPU a grouped convolution for all
# models takes longer than one for each: it does in resnet18 (560,000 numbers), and not in mobilenetv3_small (17,000).
_WIDE = 1 << 17


def batch_step(
    batch: Any,
    optimizer: Any,
    x: Any,
    y: Any,
    loss_fn: Callable[..., Tensor],
    max_norm: float | Sequence[float] | None = None,
    shared_targets: bool | None = None,
    loss_settings: Any = None,
) -> tuple[Tensor, Any]:
    """Make one update of all models at once; return the losses [M] and the outputs from before it, detached."""
    options = StepOptions(loss_fn, max_norm, shared_targets, loss_settings=loss_settings)
    return make_update(optimizer, Chunks(batch, batch.num_models), x, y, options)


def make_update(optimizer: Any, chunks: Chunks, x: Any, y: Any, options: StepOptions) -> tuple[Tensor, Any]:
    """Make one update of all models, chunk by chunk; return the losses [M] and the outputs from before it, detached."""
    parameters = list(chunks.batch.parameters())
    optimizer.zero_grad()
    if isinstance(optimizer, BatchOptimizer) and len(optimizer.parameter_names) < len(parameters):
        chunks.batch.zero_grad()  # else what it does not train adds up from step to step, and clipping would count it
    losses, outputs = chunks.backward(x, y, options, parameters)
    with autocast_off(losses.device.type):
        if options.on_nonfinite is not None:
            stop_nonfinite(chunks.batch, losses, options.on_nonfinite)
        if options.max_norm is not None:
            chunks.batch.clip_grad_norm_(options.max_norm)
        optimizer.step()
    return losses, outputs


class Stepper:
    """Makes a run's steps, in the way that it is told or that sizes tell.

    Args:
        batch, optimizer: of M models.
        options: what the steps have in common.

    Attributes:
        how: in words, how the last step was made.

    Raises:
        TypeError, ValueError: a batch without parameters, or a `max_norm` or `loss_settings` that cannot be so.
    """

    def __init__(self, batch: Any, optimizer: Any, options: StepOptions) -> None:
        weight = next(batch.parameters(), None)
        if weight is None:
            raise ValueError("Expected models with parameters, got a batch without any: there is nothing to train.")
        if options.max_norm is not None:
            norm_limits(options.max_norm, batch.num_models)
        options.settings_of(batch.num_models)
        self.batch, self.optimizer, self.options = batch, optimizer, options
        size = {"auto": None, None: batch.num_models}.get(options.chunk_size, options.chunk_size)
        # One model by itself is a chunk of one, whose size needs no choice.
        lone = batch.num_models == 1 or (options.chunk_size == "auto" and weight.is_cpu and _is_wide(batch))
        self._chunks = Chunks(batch, 1 if lone else size)
        self._compiled, self._precision = None, autocast_to(options.autocast, batch)
        if options.compile:
            from .compiled import CompiledStep  # its imports take a second, and few runs need them

            self._compiled = CompiledStep(batch, optimizer, options)
        self.how = ""
        if weight.device.type == "cpu":
            tune_malloc()

    @property
    def chunk_size(self) -> int | None:
        """How many models are trained at once; None before it has been chosen."""
        return self._chunks.size

    def step(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Make one update of all models; return the losses [M] and the outputs from before it, detached."""
        with self._precision:
            if self._compiled is not None:
                made = self._compiled.attempt(x, y)
                if made is not None:
                    self.how = "compiled"
                    return made
                if self._compiled.reason:
                    told = f"compile=True: the steps run uncompiled, because {self._compiled.reason}."
                    self._compiled = None
                    warnings.warn(told, stacklevel=depth_of_user())
            made = make_update(self.optimizer, self._chunks, x, y, self.options)
        self.how = self._chunks.how
        return made


def _is_wide(batch: nn.Module) -> bool:
    """Say whether the models' convolutions are so wide that one model after the other is faster on a CPU."""
    layers = [layer for layer in batch.modules() if isinstance(layer, nn.Conv2d)]
    sizes = [p[0].numel() for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 5]
    is_most = 2 * sum(sizes) > sum(p[0].numel() for p in batch.parameters())  # of a vision transformer one is wide
    return is_most and sum(sizes) >= _WIDE * len(sizes)
