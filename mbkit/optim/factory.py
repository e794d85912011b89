"""OptimizerFactory: from a torch.optim class and M models' hyperparameters to one optimizer of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common.checks import per_model
from .base import BatchOptimizer
from .configs import check_names, merge_configs
from .groups import chosen_parameters, construct, lone_shapes, split_groups
from .rules import RULES, ruled_class
from .schedulers import ModelSchedulers
from .stacked import StackedOptimizer
from .views import ViewsOptimizer


class OptimizerFactory:
    """Makes optimizers of a batch that train each model as `optimizer_cls` trains it alone.

    SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, Adafactor and Muon update all models in one
    pass, and so do their subclasses that override no more than `__init__` and `zero_grad`. Of any other class the
    `step` runs under torch.vmap for all models that have the same options, floats aside, if it can, as those of Lion
    and schedule-free do; else, or for up to three models, for one after the other: as exact, but no faster than alone.
    Its other methods are called for each model: `optimizer.first_step(zero_grad=True)` of SAM, `optimizer.train()` of
    a schedule-free one.

    Args:
        optimizer_cls: a class from torch.optim, or your own.
        base_config: hyperparameters for all models; a model's own come before them.

    Raises:
        TypeError: `optimizer_cls` is not an optimizer class.
        ValueError: `base_config` has a name that the class does not know.

    Example:
        >>> import torch
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(2)])
        >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=[0.1, 0.01], eps=1e-6)
        >>> batch(torch.ones(4, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> optimizer.param_groups[1]["lr"] = 0.02
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.02]

    The name and its meaning follow the library `modelbatch` 0.1.0. Where it differs: the optimizer reads the stacked
    gradients, keywords can give hyperparameters, and each scheduler moves its own model's learning rate only.
    """

    def __init__(self, optimizer_cls: type[torch.optim.Optimizer], base_config: dict[str, Any] | None = None) -> None:
        if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
            raise TypeError(f"Expected a class of torch.optim, such as torch.optim.Adam, got {optimizer_cls!r}.")
        if issubclass(optimizer_cls, BatchOptimizer) or optimizer_cls is torch.optim.Optimizer:
            raise TypeError(f"Expected the class that trains one model alone, such as Adam, got {optimizer_cls!r}.")
        check_names(optimizer_cls, {} if base_config is None else base_config, "base_config")
        self.optimizer_cls = optimizer_cls
        self.base_config = dict(base_config or {})

    def create_optimizer(
        self,
        batch: Any,
        configs: Sequence[dict[str, Any]] | None = None,
        *,
        params: str | Callable[..., Any] | Sequence[Any] | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        **hyperparameters: Any,
    ) -> BatchOptimizer:
        """Return an optimizer for all models of the batch.

        Args:
            batch: M models.
            configs: M dicts of hyperparameters, one per model.
            params: which parameters to train, if not all: a module's or a parameter's name, a pattern like "*.bias", a
                function of a parameter's name and model 0's own parameter (`lambda name, p: p.ndim < 2`), or a list of
                these. A GAN that is one module has two optimizers, `params="generator"` and `params="discriminator"`;
                the `zero_grad` of each clears the gradients of its own part, as alone.
            groups: for other hyperparameters in other layers, G dicts as torch.optim takes them, but with names:
                "params" is as above; the other entries override what is said elsewhere, each one value for all models
                or a list of M. A parameter belongs to the first group that names it, so a last `{"params": "*"}` takes
                the rest.
            **hyperparameters: by name, one value for all models or a list of M. A tuple is one value:
                `betas=(0.9, 0.99)` is for all models, `betas=[(0.9, 0.99), (0.8, 0.99)]` for two.

        Returns:
            A `torch.optim.Optimizer` with one `param_groups` entry per model (with groups: model 0's G entries, then
            model 1's …; `groups_of(m)` are model m's). torch's lr_schedulers work on it as they are. Its `unstack(m)`
            gives an `optimizer_cls`, with the same groups, for going on alone with model m.

        Raises:
            TypeError: `batch` is not a ModelBatch; configs that are not a list of dicts; values of a wrong kind.
            ValueError: another number of configs or values than models, an unknown or doubled name, or a value that
                `optimizer_cls` refuses; a learning rate that is negative or not finite (the model is named); a
                parameter that no group names, or a group that is left without one.

        Example:
            >>> import torch
            >>> from mbkit import MLP, ModelBatch, OptimizerFactory
            >>> batch = ModelBatch([MLP((8, 4, 2)) for _ in range(2)])
            >>> groups = [{"params": "layers.0", "lr": [0.1, 0.2]}, {"params": "*", "weight_decay": 0.01}]
            >>> optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, groups=groups, lr=0.3)
            >>> [[group["lr"] for group in optimizer.groups_of(m)] for m in range(2)]
            [[0.1, 0.3], [0.2, 0.3]]
        """
        if not hasattr(batch, "stacked_params") or not hasattr(batch, "num_models"):
            raise TypeError(f"Expected a ModelBatch, got {type(batch).__name__}: wrap the models first, ModelBatch(…).")
        if not batch.stacked_params:
            raise ValueError("Expected models with parameters, got a batch without any: there is nothing to optimize.")
        merged = merge_configs(self.optimizer_cls, batch.num_models, self.base_config, configs, hyperparameters)
        chosen = chosen_parameters(batch.stacked_params, params)
        names, merged = split_groups(self.optimizer_cls, chosen, merged, groups)
        ruled = ruled_class(self.optimizer_cls)
        stacked = ruled is not None and RULES[ruled].suits(merged)
        if stacked and ruled is not self.optimizer_cls:
            lone = construct(self.optimizer_cls, [lone_shapes(batch, names)], merged[0][:1], 0)
            # Its constructor may have hung something on it that is called with its steps.
            stacked = not any(callable(v) or (name.endswith("_hooks") and v) for name, v in vars(lone).items())
        return (StackedOptimizer if stacked else ViewsOptimizer)(batch, self.optimizer_cls, merged, names)

    @staticmethod
    def create_lr_scheduler(
        optimizer: BatchOptimizer, scheduler_cls: Callable[..., Any], configs: Sequence[dict[str, Any]] | dict[str, Any]
    ) -> ModelSchedulers:
        """Return one scheduler per model; each changes the learning rate of its own model only.

        One schedule for all models needs none of this: `torch.optim.lr_scheduler.StepLR(optimizer, 10)` does it.

        Args:
            optimizer: from `create_optimizer`.
            scheduler_cls: a class from torch.optim.lr_scheduler, or a function that takes an optimizer of one model
                (and the config) and returns its scheduler, for SequentialLR and the like.
            configs: M dicts of the scheduler's arguments, or one dict for all models.

        Returns:
            A list of the M schedulers that is stepped like one: `schedulers.step()`, or `schedulers.step(losses)` with
            `[M]` numbers for ReduceLROnPlateau; with `state_dict()`, `load_state_dict()` and `get_last_lr()`.

        Raises:
            TypeError: not an optimizer of a batch, not a scheduler class, or a config that is not a dict.
            ValueError: another number of configs than models, or an argument that the scheduler does not know.

        Example:
            >>> import torch
            >>> from mbkit import ModelBatch, OptimizerFactory
            >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(2)])
            >>> factory = OptimizerFactory(torch.optim.SGD)
            >>> optimizer = factory.create_optimizer(batch, lr=1.0)
            >>> schedulers = factory.create_lr_scheduler(
            ...     optimizer, torch.optim.lr_scheduler.ExponentialLR, [{"gamma": 0.5}, {"gamma": 0.1}]
            ... )
            >>> optimizer.step()
            >>> schedulers.step()
            >>> schedulers.get_last_lr()
            [0.5, 0.1]
        """
        if not isinstance(optimizer, BatchOptimizer):
            told = f"Expected an optimizer from create_optimizer, got {type(optimizer).__name__}"
            raise TypeError(f"{told}: a lone optimizer takes torch's scheduler directly.")
        if not callable(scheduler_cls):
            raise TypeError(f"Expected a scheduler class, got {scheduler_cls!r}: pass the class, not an instance.")
        configs = per_model(list(configs) if isinstance(configs, tuple) else configs, optimizer.num_models, "configs")
        for m, config in enumerate(configs):
            check_names(scheduler_cls, config, f"the config of model {m}", skip=("self", "optimizer"))
        return ModelSchedulers(optimizer, scheduler_cls, configs)
