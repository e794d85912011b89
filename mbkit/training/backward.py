"""The backward pass of several models, or of one by itself."""

from __future__ import annotations

import threading
import warnings

import torch
from torch import Tensor

from ..vmap import BatchingError, autocast_off

_DRAWN = (
    "A backward pass (an autograd.Function or a gradient's hook) draws from torch's default generator, so models do "
    "not get the numbers that they get alone: draw them in forward, or pass chunk_size=1 to fit."
)


def backward_pass(losses: Tensor, is_shared: bool = True) -> None:
    """Make the backward pass of several models; warn where it draws random numbers that are not each model's own.

    Args:
        losses: `[M]`.
        is_shared: False for one model that runs with its own stream in the default generator's place.

    Raises:
        BatchingError: it draws random numbers under vmap.
        ValueError: losses that depend on no parameter.
    """
    if not losses.requires_grad:
        told = "Expected losses that depend on the models' parameters, got losses without a graph"
        raise ValueError(f"{told}: loss_fn returns a constant or detached tensor, or no parameter requires gradients.")
    watched = is_shared and losses.device.type == "cpu" and is_main_thread()
    before = _draws() if watched else None
    try:
        with autocast_off(losses.device.type):
            losses.backward(torch.ones_like(losses))  # one node less than through their sum
    except RuntimeError as error:
        if "vmap: called random operation" in str(error):  # an autograd.Function's backward with a vmap rule
            raise BatchingError(_DRAWN) from error
        raise
    if watched and _draws() != before:
        warnings.warn(_DRAWN, stacklevel=2)


def _draws() -> bytes:
    """Return what differs once torch's default generator has drawn."""
    return torch.default_generator.get_state().numpy().tobytes()


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
