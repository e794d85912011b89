"""One call of M models, or of M losses: torch.vmap under the interception, with errors that name the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .operators import BatchingError, Interception, LayoutMatters, is_folded, module_path

if TYPE_CHECKING:
    from .model_batch import ModelBatch

__all__ = ["call_losses", "call_models"]

# How functorch's own complaints can be told from the errors of the user's code.
_FROM_VMAP = ("vmap", "functorch", "batching rule", "batched", "autograd.function", "data pointer of tensor")


def call_models(batch: ModelBatch, template: nn.Module, inputs: tuple, kwargs: dict, shared: bool) -> Any:
    """Call the template once for all models and keep the buffers that it assigned anew.

    Args:
        batch: supplies M, the streams and the per-model settings.
        template: the user's module, holding the stacked tensors.
        inputs, kwargs: what one model takes; tensors in them are `[B, ...]`, or `[M, B, ...]` unless `shared`.
        shared: whether all models see the same input.

    Returns:
        The model's own nested output, each tensor `[M, ...]`.
    """
    leaves, spec = tree_flatten((inputs, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not shared:
        for i in places:
            _check_leading(leaves[i], batch.num_models)
    parameters = dict(template.named_parameters())
    buffers = dict(template.named_buffers())
    names = [*parameters, *buffers]
    seen: dict[str, Any] = {}  # what one model returned, filled in under vmap

    def one_model(*tensors: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, tensors, strict=False))
        given = dict(state)
        own = list(leaves)
        for place, tensor in zip(places, tensors[len(names) :], strict=True):
            own[place] = tensor
        args, keywords = tree_unflatten(own, spec)
        output = functional_call(template, state, args, keywords)
        seen["assigned"] = [name for name in buffers if state[name] is not given[name]]
        seen["leaves"], seen["spec"] = _output_leaves(output, template)
        tensors_out = [leaf for leaf in seen["leaves"] if leaf is not None]
        return (*tensors_out, *(state[name] for name in seen["assigned"]))

    stacked = [*parameters.values(), *buffers.values(), *(leaves[i] for i in places)]
    in_dims = [0] * len(names) + [None if shared else 0] * len(places)
    restore = _remember(batch, buffers) if batch.folding else None
    try:
        results = list(_vectorized(batch, template, one_model, stacked, in_dims))
    except LayoutMatters:
        batch.folding = False
        restore()
        results = list(_vectorized(batch, template, one_model, stacked, in_dims))
    for name in reversed(seen["assigned"]):
        owner, _, attribute = name.rpartition(".")
        template.get_submodule(owner)._buffers[attribute] = results.pop()
    outputs = iter(t.contiguous() if is_folded(t) else t for t in results)  # a user may call view() on a slice
    return tree_unflatten([None if leaf is None else next(outputs) for leaf in seen["leaves"]], seen["spec"])


def call_losses(
    batch: ModelBatch, outputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor], shared_targets: bool | None
) -> Tensor:
    """Return the loss of each model, `[M]`.

    Args:
        batch: supplies M and the streams.
        outputs: nested tensors `[M, B, ...]`.
        targets: nested tensors `[B, ...]` or `[M, B, ...]`.
        loss_fn: from one model's outputs and targets to one number.
        shared_targets: which of the two forms the targets have; None to tell by their shapes.
    """
    output_leaves, output_spec = tree_flatten(outputs)
    target_leaves, target_spec = tree_flatten(targets)
    for leaf in output_leaves:
        if isinstance(leaf, Tensor):
            _check_leading(leaf, batch.num_models, "outputs")
    tensors = [leaf for leaf in (*output_leaves, *target_leaves) if isinstance(leaf, Tensor)]
    reference = next((leaf for leaf in output_leaves if isinstance(leaf, Tensor)), None)
    if reference is None:
        raise TypeError(
            f"Expected outputs made of tensors, got {type(outputs).__name__}: pass what the batch returned."
        )
    in_dims = [0 for leaf in output_leaves if isinstance(leaf, Tensor)]
    in_dims += [
        _target_dim(leaf, reference, batch.num_models, shared_targets)
        for leaf in target_leaves
        if isinstance(leaf, Tensor)
    ]

    def one_model(*own: Tensor) -> tuple[Tensor]:
        remaining = iter(own)
        leaves = [next(remaining) if isinstance(v, Tensor) else v for v in (*output_leaves, *target_leaves)]
        count = len(output_leaves)
        loss = loss_fn(tree_unflatten(leaves[:count], output_spec), tree_unflatten(leaves[count:], target_spec))
        if not isinstance(loss, Tensor):
            raise TypeError(f"Expected the loss of a model to be a tensor, got {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(
                f"Expected one loss a model, got a tensor {list(loss.shape)}: let loss_fn average or add up its batch."
            )
        return (loss.reshape(()),)

    root = loss_fn if isinstance(loss_fn, nn.Module) else nn.Identity()
    return _vectorized(batch, root, one_model, tensors, in_dims)[0]


def _remember(batch: ModelBatch, buffers: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that puts streams and buffers back where they are now, for a pass that has to be run again."""
    streams = batch.streams.state()
    values = {name: tensor.clone() for name, tensor in buffers.items()}

    def restore() -> None:
        batch.streams.load_state(streams)
        with torch.no_grad():
            for name, tensor in buffers.items():
                tensor.copy_(values[name])

    return restore


def _vectorized(
    batch: ModelBatch,
    root: nn.Module,
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    in_dims: Sequence[int | None],
) -> tuple[Tensor, ...]:
    device = tensors[0].device if tensors else torch.device("cpu")
    index = torch.arange(batch.num_models, device=device)

    def with_rules(index: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        with Interception(index, batch.num_models, batch.streams, device, bool(batch.settings), batch.folding):
            return function(*own)

    try:
        # "error": a random operator that no rule covers raises here, where "different" would draw wrong numbers.
        return torch.vmap(with_rules, in_dims=(0, *in_dims), randomness="error")(index, *tensors)
    except RuntimeError as error:  # NotImplementedError is one, too
        where, text = module_path(error.__traceback__, root), str(error)
        if isinstance(error, BatchingError) or any(mark in text.lower() for mark in _FROM_VMAP):
            many = f"cannot run for {batch.num_models} models at once"
            raise BatchingError(f"{where} {many}: {text}") from error
        raise RuntimeError(f"{where}: {text}") from error


def _output_leaves(output: Any, template: nn.Module) -> tuple[list[Tensor | None], Any]:
    leaves, spec = tree_flatten_with_path(output)
    for path, leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            where = f" at {keystr(path)}" if path else ""
            raise TypeError(
                f"Expected {type(template).__name__} to return tensors (or nested lists, tuples and dicts of them), "
                f"got {type(leaf).__name__}{where}: return a tensor, or None."
            )
    values = [leaf for _, leaf in leaves]
    if all(leaf is None for leaf in values):
        raise TypeError(f"Expected {type(template).__name__} to return at least one tensor, got {output!r}.")
    return values, spec


def _check_leading(tensor: Tensor, num_models: int, what: str = "per-model input") -> None:
    if tensor.dim() == 0 or tensor.shape[0] != num_models:
        raise ValueError(
            f"Expected {what} [{num_models}, B, …] (one slice per model), got {list(tensor.shape)}: "
            "stack one input a model, or pass shared_input=True for one input to all."
        )


def _target_dim(target: Tensor, outputs: Tensor, num_models: int, shared: bool | None) -> int | None:
    """Return vmap's in_dim of a target: None where all models share it, 0 where each has its own."""
    batch_size = outputs.shape[1] if outputs.dim() > 1 else None
    one_for_all = target.dim() == 0 or batch_size in (None, target.shape[0])
    one_a_model = (
        target.dim() > 0
        and target.shape[0] == num_models
        and (batch_size is None or (target.dim() > 1 and target.shape[1] == batch_size))
    )
    if one_for_all and one_a_model and shared is None and target.dim() == outputs.dim():
        return 0  # a target for all has no dimension M, so at most one dimension less than the outputs
    if one_for_all and one_a_model and shared is None:
        raise ValueError(
            f"Targets {list(target.shape)} for outputs {list(outputs.shape)} could be one batch for all models or one "
            "a model: say which with shared_targets=True or shared_targets=False."
        )
    fits = one_for_all if shared else one_a_model if shared is not None else one_for_all or one_a_model
    if not fits:
        size = "B" if batch_size is None else batch_size
        raise ValueError(
            f"Expected targets [{size}, …] for all models or [{num_models}, {size}, …] for each its own, "
            f"got {list(target.shape)} for outputs {list(outputs.shape)}."
        )
    return None if (one_for_all if shared is None else shared) else 0
