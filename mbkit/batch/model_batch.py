"""ModelBatch: M models of one architecture, stacked, called and trained in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import check_seeds, flag, model_numbers
from ..vmap import Streams, modules_of
from .build import CanBuild
from .call import call_models
from .checkpoint import CanSave, load_streams
from .clip import clip_by_norm_, norm_limits
from .context import CallContext, context_of
from .each_model import CanApply, reset_each_model
from .freeze import CanFreeze
from .habits import notice_mixing
from .loss import call_losses
from .loss_settings import LossSettings
from .methods import CanCall, stand_for_parts
from .select import CanSelect
from .stack import Stacks, set_memory_format, stack_models, unstack_model
from .targets import TargetForms
from .validate import check_models, check_paths

_TAKEN_OVER = """_parameters _buffers _modules _non_persistent_buffers_set _state_dict_hooks _state_dict_pre_hooks
    _load_state_dict_pre_hooks""".split()


def _known(name: str, doc: str) -> Any:
    """Return a property that reads a field of the batch's CallContext, whatever names the user's submodules have."""
    return property(lambda batch: getattr(context_of(batch), name), doc=doc)


class ModelBatch(CanBuild, CanCall, CanFreeze, CanApply, CanSelect, CanSave, nn.Module):
    """M models of one architecture as one module, each computing exactly what it computes alone.

    The batch is a module like any other: `.to()`, `.double()`, `train()`, `eval()`, `state_dict()` and
    `parameters()` do what they always do, on tensors `[M, ...]` under the names that the model itself uses.
    A method or submodule of the models is called for all of them, `batch.encode(x)`, `batch.encoder(x)`: see `call`.
    The models given are copied and never changed.

    Args:
        models: M modules of one architecture; floats (dropout rates, slopes, scales of the user's own), and objects and
            dicts of plain values (configurations) may differ. So may whole numbers and texts of the user's own, and
            flags and tables that calls have filled in; a layer that reads one of these runs model by model.
        shared_input: True when all models see one batch `[B, ...]`, False when each has its own, `[M, B, ...]`.
        seeds: one whole number a model. Model m draws its dropout masks and other random numbers as it would
            alone after `torch.manual_seed(seeds[m])`. Without seeds they are drawn from torch's default generator.
        model_by_model: dotted paths of layers to run for one model after the other ("" for the whole model): exact
            whatever they do, no faster than alone. What `torch.vmap` cannot run is added at its first call, with a
            warning.

    Raises:
        TypeError: models that are not modules, or seeds that are not whole numbers.
        ValueError: no models, or models that differ in anything but weights and such settings; another number
            of seeds than of models.

    Example:
        >>> models = [nn.Linear(3, 2) for _ in range(4)]
        >>> batch = ModelBatch(models, seeds=range(4))
        >>> x, y = torch.randn(8, 3), torch.randn(8, 2)
        >>> losses = batch.compute_loss(batch(x), y, nn.functional.mse_loss, reduction="none")
        >>> losses.sum().backward()
        >>> tuple(losses.shape), tuple(batch.stacked_params["weight"].grad.shape)
        ((4,), (4, 2, 3))

    One number for all parameters couples the models. So call `batch.clip_grad_norm_(c)`, not torch's function on
    `batch.parameters()` (Lightning's `gradient_clip_val`); give ReduceLROnPlateau, made by `create_lr_scheduler`, the M
    losses, not their sum; and take optimizers that use norms (LAMB, Adafactor) from `OptimizerFactory`.

    The name is that of the library `modelbatch` 0.1.0. Here model m is exactly the lone model (masks, buffers and
    settings included), the given models are not part of the module, and no gradient is a copy that can go stale.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        shared_input: bool = True,
        *,
        seeds: Sequence[int] | None = None,
        model_by_model: Iterable[str] = (),
    ) -> None:
        super().__init__()
        made = models if isinstance(models, Stacks) else stack_models(*check_models(models))
        shared_input, paths = flag(shared_input, "shared_input"), check_paths(made.template, model_by_model)
        streams = Streams(check_seeds(seeds, made.num_models))
        # The template is the user's own module, holding the stacked tensors. The batch takes over its tensors and
        # children instead of becoming their parent, so that every name is the user's own.
        template = made.template
        context = CallContext(template, made.attributes, made.num_models, streams, shared_input, bool(made.settings))
        context.model_by_model = paths
        context.folding = any(isinstance(m, nn.Conv2d) for m in template.modules())  # see vmap/rules
        self.training = template.training
        # Past nn.Module.__setattr__ here and below: the user's own names, whatever they are, stay the user's.
        self.__dict__ |= {"_context": context, "_version": template._version}
        self.__dict__ |= {name: template.__dict__[name] for name in _TAKEN_OVER}
        self._load_state_dict_post_hooks.update(template._load_state_dict_post_hooks)
        self.register_load_state_dict_post_hook(load_streams)
        stand_for_parts(context)
        reset_each_model(context)

    num_models: int = _known("num_models", "M.")
    shared_input: bool = _known("shared_input", "Whether all models see one input, unless a call says otherwise.")
    streams: Streams = _known("streams", "The models' random generators.")
    model_by_model: set[str] = _known("model_by_model", "The dotted paths of layers run for one model after the other.")
    latest_losses: Tensor | None = _known("latest_losses", "The losses `[M]` of the latest `compute_loss`, detached.")

    @property
    def seeds(self) -> list[int]:
        """The whole numbers from which the models' random streams started, one per model."""
        return list(self.streams.seeds)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return an iterator over the parameters `[M, ...]`.

        Warns where torch's `clip_grad_norm_` or an optimizer that works by norms walks over them: it mixes the models.
        """
        notice_mixing(self.num_models)
        owners = modules_of(self).values() if recurse else [self]
        yield from dict.fromkeys(p for owner in owners for p in owner._parameters.values() if p is not None)

    @property
    def stacked_params(self) -> dict[str, nn.Parameter]:
        """The parameters `[M, ...]` under the model's own dotted names."""
        return dict(self.named_parameters())

    @property
    def stacked_buffers(self) -> dict[str, Tensor]:
        """The buffers `[M, ...]` under the model's own dotted names."""
        return dict(self.named_buffers())

    def __len__(self) -> int:
        return self.num_models

    def __getitem__(self, m: int) -> nn.Module:
        """Return model m as a stand-alone module of the user's own class, with copies of its present tensors.

        Args:
            m: the model's number; negative numbers count from the end.

        Raises:
            IndexError: no such model.
        """
        (m,) = model_numbers([m], self.num_models)
        return unstack_model(context_of(self).template, context_of(self).attributes, m)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[m] for m in range(self.num_models))

    @property
    def models(self) -> list[nn.Module]:
        """M stand-alone modules with today's weights; to change them does not change the batch."""
        return list(self)

    def extra_repr(self) -> str:
        return f"{self.num_models} x {type(context_of(self).template).__name__}, shared_input={self.shared_input}"

    # ------------------------------------------------------------------ calling

    def forward(self, *inputs: Any, shared_input: bool | None = None, **kwargs: Any) -> Any:
        """Call all models; tensors may stand anywhere in the arguments.

        Args:
            *inputs: what the model takes; tensors are `[B, ...]` for all models or `[M, B, ...]`.
            shared_input: for this call only, instead of the batch's own.
            **kwargs: likewise.

        Returns:
            What the model returns, each tensor in it `[M, ...]`.

        Raises:
            ValueError: a per-model input whose first dimension is not M.
            TypeError: a model that returns something that is not made of tensors.
            BatchingError: a layer that cannot do for M models at once what it does for one.
        """
        shared = self.shared_input if shared_input is None else flag(shared_input, "shared_input")
        return call_models(context_of(self), inputs, kwargs, shared)

    def compute_loss(
        self,
        outputs: Any,
        targets: Any,
        loss_fn: Callable[..., Tensor],
        reduction: str = "sum",
        *,
        shared_targets: bool | TargetForms | None = None,
        loss_settings: Mapping[str, Any] | LossSettings | None = None,
    ) -> Tensor:
        """Return the models' losses, added up, averaged or one by one.

        Args:
            outputs: what the batch returned, `[M, B, ...]`.
            targets: `[B, ...]` for all models or `[M, B, ...]`.
            loss_fn: gets one model's outputs and targets, returns one number.
            reduction: "sum" (each model's gradient is its own), "none" for the losses `[M]`, or "mean", which
                divides every gradient by M.
            shared_targets: says which of the two forms the targets have, where their shape fits both; a `TargetForms`
                keeps what it has once told.
            loss_settings: what `loss_fn` gets by name beside: name to one value for all models, or to one per model,
                a list of M numbers or a tensor `[M, ...]`. `{"label_smoothing": [0.0, 0.1]}`, say.

        Returns:
            One number, or `[M]` for "none". The losses are kept in `latest_losses`, detached.

        Raises:
            ValueError: targets that fit neither form or could be both; a loss of many numbers; a wrong reduction;
                settings that `loss_fn` does not take, or another number of them than of models.
        """
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"Expected reduction 'sum', 'mean' or 'none', got {reduction!r}: choose one of them.")
        forms = TargetForms.made_of(shared_targets)
        settings = LossSettings.made_of(loss_settings, loss_fn, self.num_models)
        losses = call_losses(context_of(self), outputs, targets, loss_fn, forms, settings)
        return losses if reduction == "none" else getattr(losses, reduction)()

    def metrics(self) -> dict[str, float]:
        """Return the latest loss of each model as plain numbers, `{"loss_model_0": …}`; empty before the first."""
        losses = [] if self.latest_losses is None else self.latest_losses.tolist()
        return {f"loss_model_{m}": loss for m, loss in enumerate(losses)}

    # ------------------------------------------------------------------ gradients

    def clip_grad_norm_(self, max_norm: float | Sequence[float], norm_type: float = 2.0) -> Tensor:
        """Clip each model's gradient to its own norm, as `torch.nn.utils.clip_grad_norm_` does for a lone model.

        Args:
            max_norm: the largest norm, one for all models or one a model.
            norm_type: the p of the p-norm, `inf` included.

        Returns:
            The norms `[M]` before clipping.

        Raises:
            ValueError: another number of norms than models, or one that is not positive.

        Example:
            >>> batch = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
            >>> batch(torch.ones(4, 2)).sum().backward()
            >>> tuple(batch.clip_grad_norm_(1.0).shape)
            (3,)
        """
        limits = norm_limits(max_norm, self.num_models)
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        return clip_by_norm_(grads, limits, norm_type) if grads else torch.zeros(self.num_models)

    # ------------------------------------------------------------------ nn.Module's own verbs

    def train(self, mode: bool = True) -> ModelBatch:
        """Put all models into training mode, through the model's own `train`."""
        context_of(self).template.train(mode)
        self.training = context_of(self).template.training
        return self

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> ModelBatch:
        """Move or cast the stacked tensors, with `nn.Module.to`'s arguments; a memory format is each model's own."""
        if memory_format is not None:
            set_memory_format(context_of(self).template, memory_format)
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> ModelBatch:
        context_of(self).template._apply(fn)  # .to(), .double() and the rest, through the model's own
        return self
