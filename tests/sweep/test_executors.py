"""Other processes, and Dask's: the same bits as in this one; workers that die, batches that kill, nobody there."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import CONFIGS, DyingInSecondEpoch, digest, poisoned, slow_after, standard, whose_worker_dies_once

from mbkit.common.process import ProcessEnded
from mbkit.sweep import WorkersLost

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's on forks beside threads


@pytest.fixture(autouse=True)
def a_time_out() -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError("The test took more than 200 seconds.")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(200)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("here")
    standard(folder)
    return digest(folder)


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))


def test_a_pool_that_a_dying_worker_breaks_is_an_error_and_another_goes_on_from_the_last_epoch(
    tmp_path: Path, expected: str
) -> None:
    dying = functools.partial(DyingInSecondEpoch, str(tmp_path / "flag"))
    with pool() as broken, pytest.raises(WorkersLost, match=r"a pool breaks when a worker dies.*call sweep again"):
        standard(tmp_path / "sweep", executor=broken, data=dying)
    with pool() as whole:
        standard(tmp_path / "sweep", executor=whole, data=dying)
    assert digest(tmp_path / "sweep") == expected


class Forking(Executor):
    """Runs each batch in a forked process, and says of one that died what a thread's own process says."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        child = multiprocessing.get_context("fork").Process(target=function, args=args)
        child.start()
        child.join()
        if child.exitcode:
            future.set_exception(ProcessEnded(f"exit status {child.exitcode}"))
        else:
            future.set_result(function(*args))  # which finds it done
        return future


def test_a_worker_that_dies_is_replaced(tmp_path: Path, expected: str) -> None:
    dying = functools.partial(DyingInSecondEpoch, str(tmp_path / "flag"))
    standard(tmp_path / "sweep", executor=Forking(), data=dying)
    assert (tmp_path / "flag").exists()
    assert digest(tmp_path / "sweep") == expected


def test_a_batch_that_kills_its_workers_is_given_up_by_name_when_the_others_are_done(tmp_path: Path) -> None:
    configs = [{**config, "data_fold": t} for t, config in enumerate(CONFIGS)]
    settings = {"configs": configs, "data": poisoned, "executor": Forking(), "max_retries": 1}
    with pytest.raises(WorkersLost, match=r"batch 1 of rung 0 \(trials 3, 4\) died 2 times in a row"):
        standard(tmp_path, **settings)
    done = sorted(file.name for file in (tmp_path / "rung-0").glob("batch-?????.safetensors"))
    assert done == ["batch-00000.safetensors", "batch-00002.safetensors", "batch-00003.safetensors"]


@pytest.mark.slow
def test_threads_have_a_process_each(tmp_path: Path, expected: str) -> None:
    with ThreadPoolExecutor(2) as threads:
        standard(tmp_path, executor=threads)
    assert digest(tmp_path) == expected


# Dask


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Give two real worker processes."""
    distributed = pytest.importorskip("distributed")
    roots = [*map(str, Path(__file__).parents[:3]), os.environ.get("PYTHONPATH", "")]
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(**settings, local_directory=str(tmp_path_factory.mktemp("dask"))) as cluster:
        yield cluster
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_dask_with_a_worker_that_dies(tmp_path: Path, expected: str, cluster: Any) -> None:
    dying = functools.partial(DyingInSecondEpoch, str(tmp_path / "flag"))
    with cluster.get_client() as client:
        standard(tmp_path / "sweep", executor=client.get_executor(pure=False), data=dying)
    assert (tmp_path / "flag").exists()
    assert digest(tmp_path / "sweep") == expected


@pytest.mark.slow
def test_dask_whose_worker_is_killed(tmp_path: Path, expected: str, cluster: Any) -> None:
    dying = functools.partial(whose_worker_dies_once, str(tmp_path / "flag"))
    with cluster.get_client() as client:
        standard(tmp_path / "sweep", executor=client.get_executor(pure=False), data=dying)
    assert digest(tmp_path / "sweep") == expected


@pytest.mark.slow
def test_dask_whose_whole_group_of_workers_is_killed_with_its_nanny(
    tmp_path: Path, expected: str, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    settings = {"processes": False, "dashboard_address": ":0", "protocol": "tcp://"}
    started = []

    def start(address: str) -> None:
        command = [
            sys.executable,
            "-m",
            "dask",
            "worker",
            address,
            "--nworkers",
            "1",
            "--nthreads",
            "1",
            "--no-dashboard",
        ]
        command += ["--local-directory", str(tmp_path)]
        started.append(subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL))

    def kill_and_start_another(address: str) -> None:
        while not (tmp_path / "flag").exists():
            time.sleep(0.1)
        os.killpg(started[0].pid, signal.SIGKILL)
        start(address)

    with distributed.LocalCluster(n_workers=0, **settings) as empty, empty.get_client() as client:
        start(empty.scheduler_address)
        threading.Thread(target=kill_and_start_another, args=(empty.scheduler_address,), daemon=True).start()
        data = functools.partial(slow_after, str(tmp_path / "flag"))
        try:
            standard(tmp_path / "sweep", executor=client.get_executor(pure=False), data=data)
        finally:
            for group in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group.pid, signal.SIGKILL)
                group.wait()
    assert digest(tmp_path / "sweep") == expected


@pytest.mark.slow
def test_dask_gives_up_a_batch_that_kills_its_workers(tmp_path: Path, cluster: Any) -> None:
    configs = [{**config, "data_fold": t} for t, config in enumerate(CONFIGS)]
    with cluster.get_client() as client, pytest.raises(WorkersLost, match=r"batch 1 of rung 0 \(trials 3, 4\) died 4"):
        standard(tmp_path, configs=configs, data=poisoned, executor=client)
    done = sorted(file.name for file in (tmp_path / "rung-0").glob("batch-?????.safetensors"))
    assert done == ["batch-00000.safetensors", "batch-00002.safetensors", "batch-00003.safetensors"]


@pytest.mark.slow
def test_dask_whose_scheduler_is_lost_is_an_error_and_the_sweep_goes_on_elsewhere(
    tmp_path: Path, expected: str, cluster: Any
) -> None:
    with cluster.get_client() as client:
        threading.Timer(0.5, client.close).start()
        with pytest.raises(WorkersLost, match="call sweep again"):
            standard(tmp_path, executor=client.get_executor(pure=False))
    standard(tmp_path)
    assert digest(tmp_path) == expected


def test_dask_without_workers_is_an_error_in_time(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    settings = {"processes": False, "dashboard_address": ":0", "protocol": "inproc"}
    late = pytest.raises(WorkersLost, match=r"No worker has been there for 0\.2 s")
    with distributed.LocalCluster(n_workers=0, **settings) as empty, empty.get_client() as client, late:
        standard(tmp_path, executor=client.get_executor(pure=False), no_workers_timeout=0.2)


SCRIPT = """
import functools
from concurrent.futures import ThreadPoolExecutor
import torch
from torch import nn
import mbkit

@functools.cache  # which is found by its name only
def points():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3

def batches():
    return [points()]

def build(width):
    return mbkit.MLP([4, width, 3])

if __name__ == "__main__":
    given = (build, torch.optim.SGD, mbkit.grid(lr=[0.1, 0.2], width=[5]), batches, nn.functional.cross_entropy)
    with ThreadPoolExecutor(1) as threads:
        there = mbkit.sweep(*given, valid=batches, score="loss", executor=threads)
    here = mbkit.sweep(*given, valid=batches, score="loss")
    assert repr(there) == repr(here)
"""


@pytest.mark.slow
def test_functions_of_a_script_are_found_in_a_helper_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, str(tmp_path / "script.py")], check=True, timeout=180)
