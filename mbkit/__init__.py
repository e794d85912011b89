"""mbkit: train many models at once, each exactly as if it were trained alone."""

import importlib

from .common.torch_private import check_torch

check_torch()

from .batch import ModelBatch
from .common.version import __version__ as __version__
from .data import Batches, ImageData, load_cifar10, load_digits, load_images
from .models import MLP, LeNet5, TinyMLP
from .optim import OptimizerFactory, create_adam_configs, create_lr_sweep_configs, create_sgd_configs
from .optim.grad_scaler import GradScaler
from .training import History, Step, evaluate, fit, fit_alone, train_steps
from .vmap import BatchingError

__all__ = [
    "MLP", "Batches", "BatchingError", "Diagnosis", "EquivalenceReport", "GradScaler", "History", "ImageData",
    "LeNet5", "ModelBatch", "OptimizerFactory", "Step", "TinyMLP", "compare", "create_adam_configs",
    "create_lr_sweep_configs", "create_sgd_configs", "diagnose", "evaluate", "fit", "fit_alone", "load_cifar10",
    "load_digits", "load_images", "train_steps",
]  # fmt: skip


# Rooms that training does not need, imported when they are first asked for.
_LATER = {
    "Diagnosis": "verify",
    "diagnose": "verify",
    "EquivalenceReport": "verify",
    "compare": "verify",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, where it is one of the names in `_LATER`."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
