"""What it takes to call M models as one: a batch, a chunk of it and a compiled step have it in common."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..vmap import Streams


@dataclass(eq=False)
class CallContext:
    """M stacked models, and what calls have to know about them or have learnt about them.

    Attributes:
        template: the user's own module, holding the stacked tensors `[M, ...]`.
        attributes: the stacked tensors among its plain attributes.
        num_models: M.
        streams: the models' random generators.
        shared_input: whether all models see one input, unless a call says otherwise.
        per_model_settings: whether a float of some layer differs between the models.
        folding: whether convolutions may fold the models into their channels.
        own_rows: whether operators get shared tensors that require gradients as rows, because a call takes derivatives.
        traced: whether calls are traced to be compiled.
        model_by_model: dotted paths of the layers that run for one model after the other, "generate()" for a method.
        frozen: `[M]`, True for the models that are frozen; None for none.
        latest_losses: `[M]`, detached; None before the first.
        slow_losses: the loss functions that vmap cannot run; see `loss_code`.
        kept: what forward and the latest loss function may keep outside; see `kept_by`.
        steady: by what is called and the modules' train/eval flags, the tensors that calls do not edit; see `Memory`.
        returned: the tensors that the latest call has returned.
    """

    template: nn.Module
    attributes: list[Tensor]
    num_models: int
    streams: Streams
    shared_input: bool = True
    per_model_settings: bool = False
    folding: bool = False
    own_rows: bool = False
    traced: bool = False
    model_by_model: set[str] = field(default_factory=set)
    frozen: Tensor | None = None
    latest_losses: Tensor | None = None
    slow_losses: set[Any] = field(default_factory=set)
    kept: Any = None
    steady: dict[tuple, dict[int, weakref.ref]] = field(default_factory=dict)
    returned: list[weakref.ref] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # What has been learnt about these very tensors and functions stays here.
        learnt = {"steady": {}, "slow_losses": set(), "kept": None, "returned": []}
        return self.__dict__ | learnt


def context_of(batch: nn.Module) -> CallContext:
    """Return what a ModelBatch's calls go by; a function, because the batch's attributes have the user's own names."""
    return batch.__dict__["_context"]
