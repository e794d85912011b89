"""What every test shares: the same random numbers in every run, one thread, no network in the notebooks' kernels."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    """Set what the notebooks' kernels inherit; what the person at the terminal has set goes first."""
    os.environ.setdefault("MBKIT_QUICK", "1")
    os.environ.setdefault("MBKIT_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a busy machine


@pytest.fixture(autouse=True)
def the_same_in_every_run() -> Iterator[None]:
    """Seed every generator, run on one thread (two spin on a busy machine), and put the defaults back afterwards."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
