"""Training a batch (`fit`), the same models alone (`fit_alone`), and measuring both (`evaluate`)."""

from .batched import fit, train_steps
from .checkpoint import load_run, save_run
from .evaluation import evaluate
from .history import History, Step
from .position import PositionedBatches
from .sequential import fit_alone
from .step import batch_step

__all__ = [
    "History", "PositionedBatches", "Step", "batch_step", "evaluate", "fit", "fit_alone", "load_run", "save_run",
    "train_steps",
]  # fmt: skip
