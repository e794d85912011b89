"""States of M models in memory and on disk; nothing is overwritten before everything has been checked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import describe, read_tree, write_tree
from ..vmap import Streams
from .context import context_of
from .whole_state import snapshot

State = Mapping[str, Tensor]

# In a batch's state_dict: the seeds, the random streams' states with one entry per device, and the frozen models.
_STREAMS = "mbkit_streams."
_FROZEN = "frozen"
_FILE = "models.safetensors"


class CanSave:
    """The part of a ModelBatch that gives and takes states; whatever is refused changes nothing."""

    num_models: int
    streams: Streams

    def get_model_states(self) -> list[dict[str, Tensor]]:
        """Return M state dicts, each what the lone model's `state_dict()` would be, as copies."""
        stacked = context_of(self).template.state_dict()
        states = [copy.copy(stacked) for _ in range(self.num_models)]  # with the layers' versions, hidden by torch
        for m, state in enumerate(states):
            state.update((name, tensor.detach()[m].clone()) for name, tensor in stacked.items())
        return states

    def load_model_states(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Put M state dicts into the batch; all are checked before the first tensor is changed.

        Args:
            states: what `get_model_states()` or M lone models' `state_dict()` return.

        Raises:
            ValueError: another number of states than models, other names, other shapes, or tensors whose numbers do
                not fit: sparse, quantized or meta ones, complex ones for real ones, too large ones for the dtype.
        """
        stacked, num_models = context_of(self).template.state_dict(), self.num_models
        states = [states] if isinstance(states, Mapping) else list(states)
        if len(states) != num_models:
            told = f"Expected {num_models} states (one per model), got {len(states)}"
            raise ValueError(f"{told}: pass a list of {num_models} dicts.")
        for m, state in enumerate(states):
            _check(m, state, stacked)
        rows = {name: [state[name].to(tensor) for state in states] for name, tensor in stacked.items()}
        with torch.no_grad():
            for name, tensor in stacked.items():
                for own, row in zip(tensor, rows[name], strict=True):
                    own.copy_(row)

    def save_all(self, folder: str | Path) -> None:
        """Save all models' states as one file, `folder/models.safetensors`, which replaces an older one in one move.

        It holds the stacked tensors `[M, ...]` under the model's own names, so row m is the lone model m's state (a
        complex number is two real ones, in a last dimension of 2). It is written without pickle, with a checksum. A
        process killed at any moment leaves the old file or the new one; of two that save at once, the later stays.

        Raises:
            OSError: a folder that cannot be written, or a full disk; an older file is as it was.

        Example:
            >>> import tempfile
            >>> from safetensors.torch import load_file
            >>> from torch import nn
            >>> from mbkit import ModelBatch
            >>> batch = ModelBatch([nn.Linear(3, 2) for _ in range(4)])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     batch.save_all(folder)
            ...     stacked = load_file(f"{folder}/models.safetensors")
            >>> nn.Linear(3, 2).load_state_dict({name: rows[1] for name, rows in stacked.items()})
            <All keys matched successfully>
        """
        write_tree(Path(folder) / _FILE, dict(context_of(self).template.state_dict()), "models")

    def load_all(self, folder: str | Path) -> None:
        """Load what `save_all` saved; the file is checked to its last bit before the first tensor is changed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that has changed since it was saved, or that belongs to other models.
        """
        file = Path(folder) / _FILE
        stacked = read_tree(file, "models")
        counts = {len(rows) for rows in stacked.values()}
        if counts - {self.num_models}:
            told = f"Expected {self.num_models} models in {file}, got {min(counts)}"
            raise ValueError(f"{told}: load them into a batch of as many.")
        self.load_model_states([{name: t[m] for name, t in stacked.items()} for m in range(self.num_models)])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as every nn.Module does, but a state that is refused leaves tensors, streams and seeds as they were."""
        restore = snapshot(self)
        try:
            return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        except BaseException:
            restore()
            raise

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        context_of(self).template._save_to_state_dict(destination, prefix, keep_vars)
        # The streams go with it once they have been drawn from (before, the seeds say everything), and so do the
        # numbers of the frozen models, if there are any.
        own, frozen = self.streams.state(), context_of(self).frozen
        if own:
            own["seeds"] = torch.tensor(self.streams.seeds)
        if frozen is not None:
            own[_FROZEN] = frozen.cpu()
        destination.update((f"{prefix}{_STREAMS}{name}", rows) for name, rows in own.items())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        head = prefix + _STREAMS
        own = {key[len(head) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(head)}
        self.__dict__["_loading"] = own, prefix, rest[-1]  # for `load_streams`, with the list of errors
        context_of(self).template._load_from_state_dict(state_dict, prefix, *rest)


def _check(m: int, state: Any, stacked: State) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"Expected a state dict for model {m}, got {type(state).__name__}: pass model.state_dict().")
    if state.keys() != stacked.keys():
        missing, foreign = _few(stacked.keys() - state.keys()), _few(state.keys() - stacked.keys())
        told = f"The state of model {m} belongs to another architecture: missing {missing}, unexpected {foreign}"
        raise ValueError(f"{told}; build the batch from models like the ones that were saved.")
    for name, tensor in stacked.items():
        given = state[name]
        got = given.shape if isinstance(given, Tensor) else type(given).__name__
        if got != tensor.shape[1:]:
            shape = list(got) if isinstance(got, torch.Size) else got
            raise ValueError(f"Expected '{name}' of model {m} as {list(tensor.shape[1:])}, got {shape}.")
        _check_numbers(f"'{name}' of model {m}", given, tensor.dtype)


def _check_numbers(what: str, given: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor whose numbers do not become numbers of another dtype."""
    wanted = f"Expected {what} as dense numbers that fit {str(dtype).removeprefix('torch.')}, got"
    dense = given.layout is torch.strided and not given.is_quantized and not given.is_meta
    if not dense or not torch.can_cast(given.dtype, dtype):
        raise ValueError(f"{wanted} {describe(given)}: convert it first.")
    if given.dtype == dtype:
        return
    cast, rounds = given.detach().to(dtype), dtype.is_floating_point or dtype.is_complex
    lost = given.isfinite() & ~cast.isfinite() if rounds else cast != given
    if lost.any():
        raise ValueError(f"{wanted} {given[lost][0].item():g}: build the models in another dtype, or give others.")


def _few(names: Iterable[Any]) -> str:
    first = [repr(name) for name in sorted(map(str, names))]
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "") or "nothing"


def load_streams(batch: Any, keys: Any) -> None:
    """Put the streams where they were when the state was saved, once everything else has been loaded.

    A whole state without streams is one from before the first draw, so they go back to their seeds; part of one, such
    as pretrained weights, leaves them as they are.
    """
    saved, prefix, errors = batch.__dict__.pop("_loading")
    if any(len(rows) != batch.num_models for rows in saved.values()):
        errors.append(f"expected the random streams of {batch.num_models} models: load it into a batch of as many.")
    if errors or (not saved and any(key.startswith(prefix) for key in keys.missing_keys)):
        return
    frozen = saved.pop(_FROZEN, None)
    context_of(batch).frozen = None if frozen is None or not frozen.any() else frozen.clone()
    if "seeds" in saved:
        batch.streams.seeds = saved.pop("seeds").tolist()
    # Where there is no GPU its streams cannot be kept; should there be one again, they start from the seeds.
    gone = () if torch.cuda.is_available() else ("cuda",)
    batch.streams.load_state({device: rows for device, rows in saved.items() if not device.startswith(gone)})
