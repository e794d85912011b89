"""Optimizers of a batch: every hyperparameter per model, to the bits of torch.optim on each model alone."""

from .configs import create_adam_configs, create_lr_sweep_configs, create_sgd_configs
from .factory import OptimizerFactory
from .schedulers import select_scheduler

__all__ = [
    "OptimizerFactory", "create_adam_configs", "create_lr_sweep_configs", "create_sgd_configs", "select_scheduler",
]  # fmt: skip
