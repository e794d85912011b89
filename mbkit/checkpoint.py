"""States of M models in memory and on disk; nothing is overwritten before everything has been checked."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_states", "read_folder", "save_folder"]

State = Mapping[str, Tensor]


def load_states(stacked: State, states: Sequence[State], num_models: int) -> None:
    """Copy M state dicts into the stacked tensors, in place.

    Args:
        stacked: name to tensor `[M, ...]`.
        states: M state dicts, name to tensor `[...]`.
        num_models: M.

    Raises:
        ValueError: another count, other names or other shapes; nothing has been changed then.
    """
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
        missing, foreign = sorted(stacked.keys() - state.keys()), sorted(state.keys() - stacked.keys())
        raise ValueError(
            f"The state of model {m} belongs to another architecture: missing {missing or 'nothing'}, "
            f"unexpected {foreign or 'nothing'}."
        )
    for name, tensor in stacked.items():
        got = state[name].shape if isinstance(state[name], Tensor) else type(state[name]).__name__
        if got != tensor.shape[1:]:
            shape = list(got) if isinstance(got, torch.Size) else got
            raise ValueError(f"Expected '{name}' of model {m} as {list(tensor.shape[1:])}, got {shape}.")


def save_folder(states: Sequence[State], folder: Path) -> None:
    """Write one file a model, each complete or not there at all.

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
    for m, state in enumerate(states):
        partial = folder / f"model_{m}.pt.part"
        torch.save(state, partial)
        os.replace(partial, folder / f"model_{m}.pt")


def read_folder(folder: Path, num_models: int) -> list[State]:
    """Read M states from the files that `save_folder` wrote; weights only, so a foreign file cannot run code.

    Raises:
        FileNotFoundError: a model's file is missing.
        ValueError: a file that holds no state dict, or a folder that holds more models.
    """
    files = [folder / f"model_{m}.pt" for m in range(num_models)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"Expected {num_models} files in {folder}, missing {', '.join(missing[:3])}.")
    if (folder / f"model_{num_models}.pt").exists():
        raise ValueError(f"{folder} holds more than {num_models} models: load it into a batch of as many.")
    states = []
    for file in files:
        try:
            states.append(torch.load(file, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{file} is not a file of weights: {str(error).splitlines()[0]}") from error
    return states
