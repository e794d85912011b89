"""Files appear whole or not at all: under kill -9, two writers, full disks, links and pipes; every bit is checked."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mbkit.common.files import read_tree, temporary, write_tree

TREES = {
    "numbers": {"a": 1, "b": 2.5, "c": None, "d": True, "e": "text", "f": math.inf, "g": 0.1 + 0.2, "h": 2**70},
    "containers": [(1, (2,)), [], {}, {0: "int", "0": "text", None: 1, "a/b": 2}, Counter({30: 2})],
    "a number alone": 7,
    "an array": {"state": np.array([0, 2**32 - 1], np.uint32)},
}


@pytest.mark.parametrize("name", TREES)
def test_plain_values_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    write_tree(tmp_path / "file", TREES[name], "test")
    got = read_tree(tmp_path / "file", "test")
    assert repr(got) == repr(TREES[name])  # types, order and the last digit included


TENSORS = [
    torch.randn(3, 4).t(),
    torch.randn(2, 3, dtype=torch.complex128).conj(),
    torch.randn(3, dtype=torch.bfloat16),
    torch.tensor([math.nan, -0.0, math.inf]),
    torch.zeros(0, 3),
    torch.tensor(5),
    torch.tensor([True, False]),
    torch.arange(4, dtype=torch.uint8)[::2],
    torch.ones(1).expand(3),
]


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    tree = {"own": TENSORS, "tied": (TENSORS[0], TENSORS[0]), "own/0": torch.ones(2)}
    write_tree(tmp_path / "file", tree, "test")
    got = read_tree(tmp_path / "file", "test")
    for a, b in zip([*got["own"], *got["tied"]], [*TENSORS, TENSORS[0], TENSORS[0]], strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b) or torch.equal(a.view(torch.int32), b.view(torch.int32))
    assert torch.equal(got["own/0"], torch.ones(2))


@pytest.mark.parametrize(
    "value", [print, {1, 2}, {(1, 2): 3}, torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")]
)
def test_what_a_file_without_pickle_cannot_hold_is_refused_by_name(value: object, tmp_path: Path) -> None:
    write_tree(tmp_path / "file", 1, "test")
    with pytest.raises(TypeError, match=r"Expected .* to save.* got .*state/2"):
        write_tree(tmp_path / "file", {"state": [0, 1, value]}, "test")
    assert read_tree(tmp_path / "file", "test") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_every_byte_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_tree(file, {"weight": torch.arange(3.0), "step": 3}, "test")
    whole = file.read_bytes()
    for place in range(len(whole)):  # a bit of each byte
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        file.write_bytes(spoiled)
        with pytest.raises(ValueError, match="as it was saved"):
            read_tree(file, "test")
    for length in range(0, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="as it was saved"):
            read_tree(file, "test")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="it holds mbkit-1 test, not mbkit-1 run"):
        read_tree(file, "run")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_tree(tmp_path / "file", {"weight": torch.ones(10)}, "test")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Expected to write .*file, got: File too large; what was there"):
            write_tree(tmp_path / "file", {"weight": torch.zeros(1000)}, "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_tree(tmp_path / "file", "test")["weight"], torch.ones(10))
    assert os.listdir(tmp_path) == ["file"]


def test_neither_links_nor_pipes_are_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in (".file.part", "file.part", ".file.0123456789abcdef.part"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / ".file.fedcba9876543210.part")
    (tmp_path / "file").symlink_to(tmp_path / "precious")
    write_tree(tmp_path / "file", 3, "test")
    assert (tmp_path / "precious").read_text() == "precious"
    assert read_tree(tmp_path / "file", "test") == 3


def test_only_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.0000.part").write_text("left by a killed one")
    (tmp_path / "my.file.part").write_text("the user's")
    with temporary(tmp_path / "file") as part:
        write_tree(tmp_path / "file", 1, "test")
        assert part.exists()  # its writer lives
    assert sorted(os.listdir(tmp_path)) == ["file", "my.file.part"]


def test_a_file_system_without_locks_is_written_to_and_what_lies_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:  # as NFS does for a file that is opened to read
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".file.0000.part").write_text("perhaps another writer's")
    write_tree(tmp_path / "file", 1, "test")
    assert read_tree(tmp_path / "file", "test") == 1
    assert sorted(os.listdir(tmp_path)) == [".file.0000.part", "file"]


HARNESS = """
import itertools, json, os, random, signal, sys, time
import torch
from torch import nn
from mbkit import ModelBatch

folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
batch = ModelBatch([nn.Linear(30, 20) for _ in range(4)])
draws = random.Random(3)

def save_for_ever(first):
    for value in itertools.count(first, 2):
        with torch.no_grad():
            [p.fill_(value) for p in batch.parameters()]
        batch.save_all(folder)

def fork(first):
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(first)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(1)
    return child

def seen(kill):
    batch.load_all(folder)
    rows = [p[m].unique().tolist() for p in batch.parameters() for m in range(4)]
    values = {row[0] if len(row) == 1 else -1 for row in rows}
    return [value // 100 == kill for value in values]

for p in batch.parameters():
    p.data.fill_(0.0)
batch.save_all(folder)
loads, file = [], folder + "/models.safetensors"
for kill in range(1, kills + 1):
    before = os.stat(file).st_mtime_ns
    writers = 1 + kill % 2
    children = [fork(100 * kill + i) for i in range(writers)]
    while os.stat(file).st_mtime_ns == before:  # until the first of these saves is done
        time.sleep(0.001)
    time.sleep(draws.uniform(0, 0.02))
    if writers > 1:
        loads.append(seen(kill))
    ended = [os.waitpid(child, os.WNOHANG)[0] for child in children]
    assert not any(ended), "a writer failed"
    [os.kill(child, signal.SIGKILL) for child in children]
    [os.waitpid(child, 0) for child in children]
    loads.append(seen(kill))
batch.save_all(folder)
print(json.dumps([loads, sorted(os.listdir(folder)), [m for m in ("ipywidgets", "IPython") if m in sys.modules]]))
"""


def test_no_saves_are_mixed_by_kill_9_or_by_two_writers(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", HARNESS, str(tmp_path), "20"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loads, names, bars = json.loads(done.stdout)
    assert loads == [[True]] * 30  # one value in all of a file, and one of the latest writers'
    assert names == ["models.safetensors"]  # nothing of the killed ones is left
    assert bars == []  # what draws progress in a notebook is not loaded without one
