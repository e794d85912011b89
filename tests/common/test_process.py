"""A process of its own answers, says what went wrong there, and its end is told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mbkit.common.process import ProcessEnded, Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


def test_a_worker_raises_what_was_raised_there_and_goes_on(worker: Worker) -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        worker.ask(int, "x")
    worker.ask(print, "on its own standard output")  # which is not where answers go
    worker.ask(int, "7")
    assert worker.ask("bit_length") == 3
    assert not worker.ended


def test_what_cannot_be_sent_back_comes_in_words(worker: Worker) -> None:
    worker.ask(threading.Condition)
    with pytest.raises(RuntimeError, match="RLock: "):
        worker.ask("__getattribute__", "_lock")


def test_the_end_of_a_process_is_told() -> None:
    with Worker() as worker:
        with pytest.raises(ProcessEnded, match=r"exit status -9, or it took longer than 4 s"):
            worker.ask(time.sleep, 600, patience=4.0)
        assert worker.ended
        with pytest.raises(ProcessEnded, match=r"^exit status -9$"):
            worker.ask(int, "7")


class Parent:
    """Has a worker of its own, which it lets sleep."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.worker.ask(os.getpid)
        self.pid = self.worker.ask("__int__")
        self.worker.send(time.sleep, 600)

    def number(self) -> int:
        return self.pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_a_process_ends_with_the_one_that_made_it_whatever_it_does() -> None:
    with Worker() as outer:
        outer.ask(Parent)
        pid = outer.ask("number")
        assert alive(pid)
    end = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
