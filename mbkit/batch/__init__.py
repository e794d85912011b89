"""ModelBatch: M models checked, stacked, called, judged by a loss, frozen, clipped and saved as one."""

from .model_batch import ModelBatch

__all__ = ["ModelBatch"]
