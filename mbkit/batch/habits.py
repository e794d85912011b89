"""Habits from training one model that mix M models: noticed where torch's own code walks over `batch.parameters()`."""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import torch

from ..common.functions import depth_of_user

# Functions of torch.nn.utils that make one number, or one vector, of all the parameters that they are given.
_INSTEAD = {
    "clip_grad_norm_": "takes one norm over all {} models and scales them together. batch.clip_grad_norm_(max_norm) "
    "clips each by its own, as alone",
    "parameters_to_vector": "puts the parameters of all {} models into one vector. "
    "[parameters_to_vector(model.parameters()) for model in batch] makes each model's own",
}

# Classes whose update of one number depends on others in its tensor, by a norm, a mean, a product of matrices.
_OVER_TENSORS = set(
    """adafactor adalomo came dadaptadagrad dadaptadam dadaptlion dadaptsgd distributedshampoo fromage fusedlamb
    fusedlars fusednovograd galoreadamw lamb larc lars lbfgs muon muonwithauxadam novograd nvlamb nvnovograd prodigy
    shampoo singledevicemuon singledevicemuonwithauxadam sm3 soap""".split()
)
_told: weakref.WeakSet[Any] = weakref.WeakSet()


def notice_mixing(num_models: int) -> None:
    """Warn if the code that walks over the parameters is torch's, and mixes the models.

    It is for a generator to call when it is asked for the first parameter; the caller is the frame that asks.
    """
    reader = sys._getframe(2)
    room, name = reader.f_globals.get("__name__", ""), reader.f_code.co_name
    if num_models == 1 or not room.startswith("torch."):
        return
    if room.startswith("torch.nn.utils.") and name in _INSTEAD:
        warnings.warn(f"{name} {_INSTEAD[name].format(num_models)}.", stacklevel=depth_of_user())
    elif room == torch.optim.Optimizer.__module__ and name == "__init__":
        warn_of_norms(reader.f_locals["self"], num_models)


def warn_of_norms(optimizer: Any, num_models: int) -> None:
    """Warn, once for each optimizer, if it is one of torch's kind over `[M, ...]` that works by norms."""
    if optimizer in _told or not any(cls.__name__.lower() in _OVER_TENSORS for cls in type(optimizer).__mro__):
        return
    _told.add(optimizer)
    name = type(optimizer).__name__
    told = f"{name} takes norms or means over whole tensors, and the batch's are [{num_models}, ...]: it mixes the"
    told += f" models. OptimizerFactory({name}).create_optimizer(batch, ...) trains each as alone."
    warnings.warn(told, stacklevel=depth_of_user())
