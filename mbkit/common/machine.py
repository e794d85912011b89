"""The machine that is measured: what it is, when it is done, and how much memory it has taken."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .version import __version__

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h; a threshold for mmap would not do, glibc takes no more than 32 MiB
_STATUS, _RESET, _SYSTEM = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_UNKNOWN = 4 << 30  # bytes that are taken to be free where the system does not tell


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device's name, thread and core counts, and versions, as plain values.

    Example:
        >>> describe_machine(torch.device("cpu"))["torch"] == torch.__version__
        True
    """
    processor = _line(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "mbkit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


@functools.cache
def tune_malloc() -> bool:
    """Have glibc's malloc keep the memory that tensors give back, for the next step; return whether it does.

    By default it hands large tensors back to the system in every step and takes them anew, which on a CPU costs tens of
    thousands of page faults a step: 64 LeNets at once take 1.6 times as long. `fit` calls this by itself; call it once
    before a training loop of your own. It is a setting of the process, which from then on keeps the memory that it
    needed at its worst. If the environment configures malloc, or where there is no glibc, nothing is changed.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False


@contextlib.contextmanager
def measure_peak_memory(device: torch.device) -> Iterator[SimpleNamespace]:
    """Measure how far memory rises inside a `with` block above where it stood at the start: `bytes`, or None.

    On CUDA this is what torch allocates. On a CPU under Linux it is the process's resident memory, after memory that
    is free has been handed back to the system; elsewhere nothing is measured.

    Example:
        >>> with measure_peak_memory(torch.device("cpu")) as peak:
        ...     numbers = torch.ones(10_000_000)
        >>> peak.bytes is None or 38e6 <= peak.bytes < 60e6
        True
    """
    peak = SimpleNamespace(bytes=None)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _RESET.write_text("5")  # its high-water mark
        before = _bytes(_STATUS, "VmRSS") if device.type == "cpu" else None
    yield peak
    after = _bytes(_STATUS, "VmHWM")
    if before is not None and after is not None:
        peak.bytes = max(0, after - before)


def free_memory(device: torch.device) -> int:
    """Return the bytes that tensors on `device` can still take: on CUDA and Linux as measured, else 4 GiB.

    Example:
        >>> free_memory(torch.device("cpu")) > 1_000_000
        True
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for new tensors
        return torch.cuda.mem_get_info(device)[0] + kept
    free = _bytes(_SYSTEM, "MemAvailable")
    return _UNKNOWN if free is None else free


def _line(file: Path, field: str) -> str:
    """Return what a file in /proc says of a field; nothing where there is none."""
    with contextlib.suppress(OSError, StopIteration):
        return next(line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith(field))
    return ""


def _bytes(file: Path, field: str) -> int | None:
    said = _line(file, field)
    return int(said.split()[0]) * 1024 if said else None
