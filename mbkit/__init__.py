"""mbkit: train many models at once, each exactly as if it were trained alone."""

import importlib

__version__ = "0.1.0"  # before the rooms, because a benchmark's asks for it

from .data import Batches, ImageData, load_cifar10, load_digits, load_images
from .grad_scaler import GradScaler
from .history import History, Step
from .model_batch import ModelBatch
from .models import MLP, LeNet5, TinyMLP
from .operators import BatchingError
from .optim import OptimizerFactory, create_adam_configs, create_lr_sweep_configs, create_sgd_configs
from .training import evaluate, fit, fit_alone, train_steps

__all__ = [
    "MLP", "Batches", "BatchingError", "Diagnosis", "EquivalenceReport", "GradScaler", "History", "ImageData",
    "LeNet5", "ModelBatch", "OptimizerFactory", "Step", "TinyMLP", "compare", "create_adam_configs",
    "create_lr_sweep_configs", "create_sgd_configs", "diagnose", "evaluate", "fit", "fit_alone", "load_cifar10",
    "load_digits", "load_images", "train_steps",
]  # fmt: skip


# Rooms that training does not need, imported when they are first asked for.
_LATER = {
    "Diagnosis": "diagnosis",
    "diagnose": "diagnosis",
    "EquivalenceReport": "equivalence",
    "compare": "equivalence",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, where it is one of the names in `_LATER`."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
