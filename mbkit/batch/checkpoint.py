"""States of M models in memory and on disk; nothing is overwritten before everything has been checked."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vmap import Streams
from .context import context_of

__all__ = ["load_states", "load_streams", "read_folder", "save_folder", "save_streams", "split_state", "take_streams"]

State = Mapping[str, Tensor]

# In a batch's state_dict: the seeds, and the random streams' states, one entry a device; and which models are frozen.
_STREAMS = "mbkit_streams."
_FROZEN = "frozen"


def split_state(stacked: dict[str, Tensor], num_models: int) -> list[dict[str, Tensor]]:
    """Return M state dicts with copies of the models' slices, and with the layers' versions, which torch hides there.

    Args:
        stacked: name to tensor `[M, ...]`.
        num_models: M.
    """
    states = [copy.copy(stacked) for _ in range(num_models)]
    for m, state in enumerate(states):
        state.update((name, tensor.detach()[m].clone()) for name, tensor in stacked.items())
    return states


def load_states(stacked: State, states: Sequence[State], num_models: int) -> None:
    """Copy M state dicts into the stacked tensors, in place.

    Args:
        stacked: name to tensor `[M, ...]`.
        states: M state dicts, name to tensor `[...]`.
        num_models: M.

    Raises:
        ValueError: another count, other names or other shapes; nothing has been changed then.
    """
    states = states if isinstance(states, Mapping) else list(states)
    if isinstance(states, Mapping) or len(states) != num_models:
        got = "one dict" if isinstance(states, Mapping) else f"{len(states)}"
        raise ValueError(f"Expected {num_models} states (one per model), got {got}: pass a list of {num_models} dicts.")
    for m, state in enumerate(states):
        _check(m, state, stacked)
    with torch.no_grad():
        for name, tensor in stacked.items():
            for m, state in enumerate(states):
                tensor[m].copy_(state[name])


def _check(m: int, state: Any, stacked: State) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"Expected a state dict for model {m}, got {type(state).__name__}: pass model.state_dict().")
    if state.keys() != stacked.keys():
        missing, foreign = (
            sorted(map(str, keys)) for keys in (stacked.keys() - state.keys(), state.keys() - stacked.keys())
        )
        raise ValueError(
            f"The state of model {m} belongs to another architecture: missing {_few(missing)}, "
            f"unexpected {_few(foreign)}; build the batch from models like the ones that were saved."
        )
    for name, tensor in stacked.items():
        got = state[name].shape if isinstance(state[name], Tensor) else type(state[name]).__name__
        if got != tensor.shape[1:]:
            shape = list(got) if isinstance(got, torch.Size) else got
            raise ValueError(f"Expected '{name}' of model {m} as {list(tensor.shape[1:])}, got {shape}.")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "nothing"


def save_folder(states: Sequence[State], folder: Path) -> None:
    """Write one file a model; the old files are replaced when all the new ones are complete.

    Raises:
        ValueError: the folder holds more models than are saved, so that two batches would be mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beyond = folder / f"model_{len(states)}.pt"
    if beyond.exists():
        raise ValueError(
            f"{folder} holds a batch of more than {len(states)} models (there is a {beyond.name}): "
            "choose another folder, or empty this one."
        )
    files = [folder / f"model_{m}.pt" for m in range(len(states))]
    partial = [file.with_suffix(".pt.part") for file in files]
    try:
        for file, state in zip(partial, states, strict=True):
            torch.save(state, file)
        for part, file in zip(partial, files, strict=True):
            os.replace(part, file)
    finally:  # nothing half-written stays behind, not even after Ctrl-C or on a full disk
        for part in partial:
            part.unlink(missing_ok=True)


def read_folder(folder: Path, num_models: int) -> list[State]:
    """Read M states from the files that `save_folder` wrote; weights only, so a foreign file cannot run code.

    Raises:
        FileNotFoundError: a model's file is missing.
        ValueError: a file that is not one of weights, or a folder that holds more models.
    """
    files = [folder / f"model_{m}.pt" for m in range(num_models)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected {num_models} files in {folder}, missing {_few(missing)}: "
            "give the folder that save_all() wrote, to a batch of as many models."
        )
    if (folder / f"model_{num_models}.pt").exists():
        raise ValueError(f"{folder} holds more than {num_models} models: load it into a batch of as many.")
    states = []
    for file in files:
        try:
            states.append(torch.load(file, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # whatever the unpickler makes of bytes that it cannot read
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} is not a file of weights that save_all() wrote: {reason}") from error
    return states


def save_streams(streams: Streams, frozen: Tensor | None, prefix: str) -> dict[str, Tensor]:
    """Return the streams' entries of a state_dict; none before the first draw, when the seeds say everything.

    Which models are frozen goes with them, if any are.
    """
    states = streams.state()
    if states:
        states["seeds"] = torch.tensor(streams.seeds)
    if frozen is not None:
        states[_FROZEN] = frozen.cpu()
    return {f"{prefix}{_STREAMS}{name}": rows for name, rows in states.items()}


def take_streams(
    state_dict: dict[str, Any], prefix: str, errors: list[str]
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Take what `save_streams` put into a state_dict out of it, and keep it with what `load_streams` has to know."""
    head = prefix + _STREAMS
    return {key[len(head) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(head)}, prefix, errors


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
    context_of(batch).frozen = None if frozen is None else frozen.clone()
    if "seeds" in saved:
        batch.streams.seeds = saved.pop("seeds").tolist()
    # Where there is no GPU its streams cannot be kept; should there be one again, they start from the seeds.
    gone = () if torch.cuda.is_available() else ("cuda",)
    batch.streams.load_state({device: rows for device, rows in saved.items() if not device.startswith(gone)})
