"""mbkit: train many models at once, each exactly as if it were trained alone.

The rooms, from the top down; each imports only from those below it, and `tests/` has a folder for each:

    __main__    the terminal              widgets     explorers: sliders that train
    lessons     what the notebooks tell   benchmark   ways to train, timed in turns
    verify      compare, diagnose, faults sweep       thousands of configurations, in batches
    figures     pictures; only here is matplotlib known
    training    fit, fit_alone, evaluate; steps at once, in chunks, compiled
    optim       one optimizer for M models: rules, hyperparameters, schedulers, scaler
    batch       ModelBatch: stacking, calls, losses, clipping, freezing, checks, saving
    vmap        what torch.vmap cannot do, or not exactly: rules for operators and layers
    data        images and batches        models      the networks of the lessons
    common      what all share: checks, random streams, the machine, tables

To add …

    a batching rule      in the file of its family in vmap/rules/; a row in tests/vmap/exactness_cases.py
    an optimizer's rule  in optim/rules.py, where its docstring says how; a row in tests/optim/test_optim_rules.py
    a fault              in verify/faults.py, found by a check in verify/; its numbers in tests/verify/test_faults.py
    a baseline           in benchmark/baselines.py; tests/benchmark/test_suite.py takes it from there
    a data set           in data/load.py, as an ImageData; tests/data/test_data.py
"""

import importlib

from .common.torch_private import check_torch

check_torch()

from .batch import ModelBatch
from .common.machine import tune_malloc
from .common.version import __version__ as __version__
from .data import Batches, ImageData, load_cifar10, load_digits, load_images
from .models import MLP, LeNet5, TinyMLP
from .optim import OptimizerFactory, create_adam_configs, create_lr_sweep_configs, create_sgd_configs
from .optim.grad_scaler import GradScaler
from .training import History, Step, evaluate, fit, fit_alone, load_run, save_run, train_steps
from .vmap import BatchingError

__all__ = [
    "MLP", "Batches", "BatchingError", "Diagnosis", "EquivalenceReport", "GradScaler", "History", "ImageData",
    "LeNet5", "ModelBatch", "OptimizerFactory", "Step", "TinyMLP", "compare", "create_adam_configs",
    "create_lr_sweep_configs", "create_sgd_configs", "diagnose", "evaluate", "fit", "fit_alone", "grid",
    "load_cifar10", "load_digits", "load_images", "load_run", "optuna_sweep", "sample", "save_run", "sweep",
    "train_steps", "tune_malloc",
]  # fmt: skip


# Rooms that training does not need, imported when they are first asked for.
_LATER = {
    "verify": ("Diagnosis", "EquivalenceReport", "compare", "diagnose"),
    "sweep": ("grid", "optuna_sweep", "sample", "sweep"),  # the last is the room itself, which can be called
}


def __getattr__(name: str) -> object:
    """Import what is asked for, where it is one of the names in `_LATER`."""
    for room, names in _LATER.items():
        if name in names:
            found = importlib.import_module(f".{room}", __name__)
            return found if name == room else getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
