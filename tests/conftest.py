"""What every test shares: the same random numbers in every run, one thread, no network in the notebooks' kernels."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbmake.nb_result import NotebookError
from nbmake.nb_run import NotebookRun

THREADS = int(os.environ.get("MBKIT_TEST_THREADS", "1"))  # two spin on a busy machine


def pytest_configure() -> None:
    """Set what the notebooks' kernels inherit; what the person at the terminal has set goes first."""
    os.environ.setdefault("MBKIT_QUICK", "1")
    os.environ.setdefault("MBKIT_OFFLINE", "1")
    torch.set_num_threads(THREADS)  # before a module's fixtures, which are made before any test's own
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    NotebookRun.execute = _and_complain(NotebookRun.execute)


def complaints(notebook: Any) -> list[tuple[int, str]]:
    """Return what is wrong with an executed notebook though no cell failed, each with its cell: noise, or no figure."""
    cells = [(n, output) for n, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]
    noise = [(n, f"stderr: {output.text}") for n, output in cells if output.get("name") == "stderr"]
    shows = {n for n, output in cells if "image/png" in output.get("data", {})}
    drawing = ("plots.", "widgets.explore", "widgets.live")
    lines = [(n, cell.source.splitlines()[-1:]) for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    return noise + [(n, "no figure") for n, last in lines if "".join(last).startswith(drawing) and n not in shows]


def solutions(notebook: Any) -> list[Any]:
    """Return the code in a notebook's markdown, the exercises' solutions, as cells."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [
        nbformat.v4.new_code_cell(code) for text in texts for code in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


def _and_complain(execute: Callable[[NotebookRun], Any]) -> Callable[[NotebookRun], Any]:
    """Let nbmake run the solutions too, and fail where a notebook printed to stderr or drew nothing where it should."""

    def execute_and_complain(run: NotebookRun) -> Any:
        notebook = nbformat.read(run.filename, as_version=4)
        notebook.cells += solutions(notebook)
        with tempfile.TemporaryDirectory() as folder:
            run.filename = Path(folder) / Path(run.filename).name
            nbformat.write(notebook, run.filename)
            result = execute(run)
        for cell, what in complaints(result.nb) if result.error is None else ():
            result.error = NotebookError(what, f"cell {cell}: {what}", cell)
        return result

    return execute_and_complain


@pytest.fixture(autouse=True)
def the_same_in_every_run() -> Iterator[None]:
    """Seed every generator, and put back afterwards what a test may have set."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(grad)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that compiled steps are traced to; they run as they are, without inductor."""
    made: list[Any] = []
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_, **__: made.append(graph) or graph)
    return made


@pytest.fixture
def show() -> Iterator[Callable[..., Any]]:
    """Open explorers, and close them at the end."""
    opened = []

    def show(explore: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        opened.append(explore(*args, **settings))
        return opened[-1]

    yield show
    for explorer in opened:
        explorer.close()


@pytest.fixture
def facts() -> Callable[[Any], dict[str, str]]:
    """What an explorer's status line says, as a page's own programs read it."""
    return lambda explorer: dict(re.findall(r'data-([a-z-]+)="([^"]*)"', explorer.status.value))
