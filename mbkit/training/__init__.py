"""Training a batch (`fit`), the same models alone (`fit_alone`), and measuring both (`evaluate`)."""

from .batched import fit, train_steps
from .evaluation import evaluate
from .history import History, Step
from .sequential import fit_alone
from .step import batch_step

__all__ = ["History", "Step", "batch_step", "evaluate", "fit", "fit_alone", "train_steps"]
