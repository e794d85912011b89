"""mbkit: train many models at once, each exactly as if it were trained alone."""

from .model_batch import ModelBatch
from .operators import BatchingError

__version__ = "0.1.0"
__all__ = ["BatchingError", "ModelBatch"]
