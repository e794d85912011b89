"""Whether a batch is the models alone (`compare`), and if not, why (`diagnose`)."""

from .diagnosis import Diagnosis, diagnose
from .equivalence import compare
from .report import EquivalenceReport

__all__ = ["Diagnosis", "EquivalenceReport", "compare", "diagnose"]
