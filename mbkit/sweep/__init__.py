"""Sweeps: thousands of configurations in batches, on one machine or many, stopped and resumed to the same bits.

`mbkit.sweep` is this room and the function in one: `mbkit.sweep(build, ...)` is `mbkit.sweep.sweep(build, ...)`.

    configs     grid and sample; who takes which setting; batches of trials whose models are alike
    engine      sweep: rung after rung, who goes on
    worker      one batch, one rung           executors   batches handed out; lost workers
    folder      files, lock, sweep.json       ask_tell    Optuna asks, mbkit trains and ranks
    result      table, best, load, plot       digits      a sweep to begin with
"""

import inspect
import sys
from types import ModuleType

from .ask_tell import optuna_sweep
from .configs import grid, sample
from .engine import sweep
from .executors import WorkersLost
from .result import SweepResult, Trial

__all__ = ["SweepResult", "Trial", "WorkersLost", "grid", "optuna_sweep", "sample", "sweep"]


__signature__ = inspect.signature(sweep)  # what help and editors show of the room that is called


class _CallableRoom(ModuleType):
    __call__ = staticmethod(sweep)


sys.modules[__name__].__class__ = _CallableRoom
