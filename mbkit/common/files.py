"""Files that appear whole or not at all: tensors and plain values in a safetensors file with a checksum, no pickle."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where what a killed process left behind stays until it is removed by hand
    fcntl = None  # type: ignore[assignment]

_FORMAT = "mbkit-1"
_CHECKSUM, _ZEROS = re.compile(rb'(?<="sha256":")[0-9a-f]{64}(?=")'), "0" * 64


@contextmanager
def temporary(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Make a new file, or folder, beside `target`, to be filled and renamed; what is not renamed is removed afterwards.

    Its name is new, so that neither a link nor a pipe can stand there. It is locked for as long as its process lives:
    what a killed process left behind is known by having no lock, and removed before.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part") if fcntl else ():
        if (lock := _lock(left)) not in (None, -1):
            _remove(left, lock)
    lock = None
    while lock is None:  # before it was locked, another process may have taken it for an abandoned one
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        part.mkdir() if folder else part.touch(exist_ok=False)
        lock = _lock(part)
    try:
        yield part
    finally:
        _remove(part, lock)


def _lock(part: Path) -> int | None:
    """Return a locked file descriptor, or -1 where nothing can be locked; None: another process has it, or had."""
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone, or a link
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(part, follow_symlinks=False)
    except OSError as error:
        os.close(descriptor)
        return None if isinstance(error, (BlockingIOError, FileNotFoundError)) else -1  # some networks' file systems
    return descriptor


def _remove(part: Path, lock: int) -> None:
    shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    if lock >= 0:
        os.close(lock)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file by one rename, once its content is safe on the disk; its folder is made if need be.

    Raises:
        OSError: a folder that cannot be written, or a full disk; the old file is as it was.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary(file) as part:
            with part.open("r+b") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        if os.name != "nt":  # Windows opens no folders
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        told = f"Expected to write {file}, got: {error.strerror}; what was there before is as it was"
        raise type(error)(error.errno, told) from error


def write_tree(file: Path, tree: Any, kind: str) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers and texts; the old file stays until the new one is safe.

    Args:
        file: its folder is made if need be.
        tree: what is to be saved; a tensor stands in the file under the path that leads to it, such as "batch/weight".
        kind: what is saved, in a word; `read_tree` asks for the same.

    Raises:
        TypeError: something else in the tree, which is named; nothing has been written then.
        OSError: a folder that cannot be written, or a full disk; the old file is as it was.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_pack(tree, "", tensors))
    metadata = {"format": _FORMAT, "kind": kind, "values": values, "sha256": _ZEROS}
    content = safetensors.torch.save(tensors, metadata)
    write_bytes(file, _CHECKSUM.sub(hashlib.sha256(content).hexdigest().encode(), content, count=1))


def read_tree(file: Path, kind: str) -> Any:
    """Read what `write_tree` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, one of another kind, or one that has changed since, were it by one bit.
    """
    if not file.is_file():
        raise FileNotFoundError(f"Expected a file {file}, got none: give the folder that was saved into.")
    try:
        with safetensors.safe_open(file, "pt"):  # refuses another length than its header says, before all is read
            pass
        content = file.read_bytes()
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        if (metadata.get("format"), metadata.get("kind")) != (_FORMAT, kind):
            raise ValueError(f"it holds {metadata.get('format')} {metadata.get('kind')}, not {_FORMAT} {kind}")
        cleared = _CHECKSUM.sub(_ZEROS.encode(), content, count=1)
        if hashlib.sha256(cleared).hexdigest() != metadata.get("sha256"):
            raise ValueError("its checksum differs from its content, so it has changed since it was saved")
        del cleared
        return _unpack(json.loads(metadata["values"]), safetensors.torch.load(content))
    except OSError:
        raise
    except Exception as error:  # whatever the parsers make of bytes that they cannot read
        told = f"Expected {file} as it was saved ({_FORMAT} {kind}), got: {error}."
        raise ValueError(f"{told} Take a copy of the file, or save anew.") from error


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tree as JSON has it, its tensors moved into `tensors`; containers say what they are."""
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if not dense:
            raise TypeError(f"Expected dense tensors to save, got {path or 'one'} as {describe(value)}: convert it.")
        while path in tensors:  # a key with a slash in it
            path += "+"
        whole = value.detach().resolve_conj().resolve_neg()
        whole = torch.view_as_real(whole) if value.is_complex() else whole
        tensors[path] = whole.cpu().clone(memory_format=torch.contiguous_format)  # safetensors takes no shared memory
        return {"complex" if value.is_complex() else "tensor": path}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": [value.dtype.str, value.tolist()]}
    if isinstance(value, Mapping) and all(key is None or type(key) in (bool, int, float, str) for key in value):
        entries = [[key, _pack(own, f"{path}/{key}" if path else str(key), tensors)] for key, own in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": entries}
    if isinstance(value, (list, tuple)):
        entries = [_pack(own, f"{path}/{i}" if path else str(i), tensors) for i, own in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": entries}
    told = f"Expected tensors, numbers and texts to save, got {type(value).__name__} as {path or 'the whole'}"
    raise TypeError(f"{told}: a file without pickle cannot hold it; make it from numbers in your script instead.")


def _unpack(form: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(form, dict):
        return form
    ((tag, held),) = form.items()
    if tag in ("tensor", "complex"):
        return torch.view_as_complex(tensors[held]) if tag == "complex" else tensors[held]
    if tag == "array":
        return np.array(held[1], dtype=held[0])
    if tag in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[tag](_unpack(own, tensors) for own in held)
    return {"dict": dict, "counter": Counter}[tag]({key: _unpack(own, tensors) for key, own in held})


def describe(tensor: Tensor) -> str:
    """Return what is special about a tensor, in words: its layout, that it has no numbers, or its dtype."""
    if tensor.is_meta:
        return "a tensor on the meta device, without numbers"
    if tensor.layout is not torch.strided:
        return f"a tensor of the layout {str(tensor.layout).removeprefix('torch.')}"
    return f"a {'quantized ' if tensor.is_quantized else ''}tensor of {str(tensor.dtype).removeprefix('torch.')}"
