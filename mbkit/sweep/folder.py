"""A sweep's folder: which files there are, who may write, and whose sweep it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.files import read_tree, write_bytes
from ..common.version import __version__

try:
    import fcntl
except ImportError:  # Windows, where nobody keeps a second driver out
    fcntl = None  # type: ignore[assignment]

# A process's own locks of this kind do not keep itself out. A worker that outlives its driver has no part in them.
_LOCKED: set[Path] = set()


def batch_file(folder: str | Path, rung: int, number: int, part: str = "") -> Path:
    """Return where a batch's models and scores are.

    Args:
        part: "part." for where it stands in the middle of its epochs, "state." for its optimizer, for the next rung.
    """
    return Path(folder, f"rung-{rung}", f"batch-{number:05}.{part}safetensors")


def read_batch(file: Path, kind: str) -> Any:
    """Read one of these files; what is not as it was written is refused by name."""
    try:
        return read_tree(file, kind)
    except ValueError as error:
        raise ValueError(f"{error} Or remove it and call sweep again, which trains that batch anew.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other drivers out of a folder, which is made if need be; the kernel frees it when this process dies.

    Raises:
        RuntimeError: another process, or another sweep of this one, has it.
        OSError: it cannot be made or written.
    """
    busy = RuntimeError(f"Another process is running the sweep in {folder}: wait for it, or choose another folder.")
    place = folder.resolve()
    if place in _LOCKED:
        raise busy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise type(error)(error.errno, f"Expected a folder to write a sweep into, got: {error}") from error
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise busy from None
        _LOCKED.add(place)
        yield
    finally:
        _LOCKED.discard(place)
        os.close(lock)


def plain_json(value: Any, name: str = "") -> Any:
    """Return `value` as JSON gives it back: tuples as lists, classes and functions by their names.

    Raises:
        TypeError: something else, named.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(own, f"{name}.{key}" if name else str(key)) for key, own in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain_json(own, f"{name}[{i}]") for i, own in enumerate(value)]
    if hasattr(value, "tolist") and isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain_json(value.tolist(), name)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    expected = "numbers, texts, classes or functions in a sweep's configurations"
    raise TypeError(f"Expected {expected}, got {value!r} as {name}.")


def settle(folder: Path, asked: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Write down what makes a sweep, or hold it against what the folder's sweep was asked for.

    Args:
        asked: what the caller says, from `plain_json`.
        fresh: what is settled when the sweep begins, and kept by whoever goes on.

    Returns:
        What was settled when the folder's sweep began.

    Raises:
        ValueError: the folder holds another sweep; the difference is named.
    """
    file = folder / "sweep.json"
    if not file.exists():
        own = {"format": "mbkit-sweep-1", **fresh, "mbkit": __version__, "torch": torch.__version__}
        write_bytes(file, json.dumps({**own, **asked}, indent=0).encode())
        return fresh
    try:
        saved = json.loads(file.read_bytes())
        saved = {name: saved[name] for name in (*fresh, *asked)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"Expected {file} as a sweep wrote it, got: {error!r}. Choose another folder.") from error
    for name, value in asked.items():
        if _words(saved[name]) != _words(value):
            wanted, got = _differing(saved[name], value), _differing(value, saved[name])
            told = f"Expected {name} = {wanted} as in the sweep saved in {folder}, got {got}"
            raise ValueError(f"{told}: call sweep as before, or choose another folder.")
    return {name: saved[name] for name in fresh}


def _differing(value: Any, other: Any) -> str:
    """Return a value in words, of a list the first entry that differs."""
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        i = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if _words(a) != _words(b))
        return f"{value[i]!r} (entry {i})"
    return f"{len(value)} entries" if isinstance(value, list) and len(value) > 8 else repr(value)


def _words(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
