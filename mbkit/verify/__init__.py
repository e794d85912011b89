"""Whether a batch is the models alone (`compare`), and if not, why (`diagnose`)."""

from .diagnosis import Diagnosis, diagnose
from .equivalence import EquivalenceReport, compare

__all__ = ["Diagnosis", "EquivalenceReport", "compare", "diagnose"]
